"""What will be fed to the model, in numbers and in one example, before it is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from streamprobe.chains import Chain, Counts
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column
from streamprobe.stream import count_tokens

Census = dict[str, tuple[int, Tensor, Tensor]]  # split -> tokens, and valid and positive ones of each column [K]
MARKS = {UNKNOWN: "-", OUTSIDE: "0", INSIDE: "1", ONSET: "1<"}


def take_census(
    splits: Mapping[str, Sequence[Chain]], columns: Sequence[Column], labels: Sequence[str], counts: Counts
) -> Census:
    """What `stream` will yield for the training and the validation chains.

    Raises InputError for an empty split, a label that never occurs, a lag longer than every chain, and a column without
    a positive or a negative training token or without any validation token.
    """
    for name, chains in splits.items():
        if not chains:
            reasons = f" ({counts.refused.total()} chains refused: {refusals(counts)})" if counts.refused else ""
            raise InputError(
                f"no {name} chains{reasons}",
                "at least one in every split",
                "mend the data, or use more or a larger share",
            )
    for label in labels:
        if not counts.labels[label]:
            known = ", ".join(name for name, _ in counts.labels.most_common())
            raise InputError(f"label {label!r}, which never occurs", f"one of {known}", "mend --labels")
    longest = max(int(c.support.sum()) for c in splits["train"])
    census = {name: count_tokens(splits[name], columns, labels) for name in ("train", "validation")}
    for name, (_, valid, positive) in census.items():
        for column, n, hits in zip(columns, valid.tolist(), positive.tolist(), strict=True):
            if not n and abs(column.lag) >= longest:
                raise InputError(
                    f"lag {column.lag}, which is longer than every chain", f"less than {longest} tokens", "mend --lags"
                )
            if not n or (name == "train" and hits in (0, n)):
                raise InputError(
                    f"{column} with {hits} positive {name} tokens of {n}",
                    "tokens of both classes in the training chains and some in validation",
                    "use more chains, other labels or other lags",
                )
    return census


def refusals(counts: Counts) -> str:
    """Why chains were refused, and how many for each reason."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.refused.most_common())


def describe(
    counts: Counts,
    splits: Mapping[str, Sequence[Chain]],
    census: Census,
    columns: Sequence[Column],
    labels: Sequence[str],
    tokenizer: Any,
) -> str:
    """Chains and sections read and used, tokens and base rates, and one example, as text for the terminal."""
    tokens = {name: sum(len(c.ids) for c in chains) for name, chains in splits.items()}
    labelled = {name: sum(int((c.codes[:, 0] != UNKNOWN).sum()) for c in chains) for name, chains in splits.items()}
    lines = [
        f"chains    {counts.read:,} read, {counts.used:,} used ({counts.repaired:,} of them repaired: "
        f"{counts.edited_sections} sections edited, {counts.lost_sections} lost, {counts.unbalanced_tags} tags "
        f"unbalanced), "
        f"{counts.refused.total():,} refused{': ' + refusals(counts) if counts.refused else ''}",
        f"labels    {counts.labelled_characters / counts.characters:.1%} of the response's characters; sections: "
        + ", ".join(f"{name} {n:,}" for name, n in counts.labels.most_common()),
        "",
        f"{'split':<12}{'chains':>8}{'tokens':>10}{'labelled':>10}" + "".join(f"{label[:22]:>24}" for label in labels),
    ]
    for name, chains in splits.items():
        rates = ""
        for c in range(len(labels)):
            hits = sum(int((x.codes[:, c] >= INSIDE).sum()) for x in chains)
            begun = sum(int((x.codes[:, c] == ONSET).sum()) for x in chains)
            rates += f"{f'{hits / max(1, labelled[name]):.2%} in {begun:,}':>24}"
        lines.append(f"{name:<12}{len(chains):>8,}{tokens[name]:>10,}{labelled[name]:>10,}{rates}")
    blind = [str(c) for c, hits in zip(columns, census["validation"][2].tolist(), strict=True) if not hits]
    if blind:
        lines.append(
            f"no positive in validation for {', '.join(blind)}: the first pass counts as best, threshold and F1 are nan"
        )
    lines += [
        "            (base rate of the label's tokens, in so many sections)",
        "",
        example(splits["train"], labels, tokenizer),
    ]
    return "\n".join(lines)


def example(chains: Sequence[Chain], labels: Sequence[str], tokenizer: Any, around: int = 6) -> str:
    """The tokens around the first section of the first label, with their labels, as the model will see them."""
    chain = next(c for c in chains if (c.codes[:, 0] == ONSET).any())
    onset = int((chain.codes[:, 0] == ONSET).nonzero()[0])
    lines = [
        f"example   {chain.id!r}, tokens of {len(chain.ids)}; '1<' begins a section, '-' has no label, '.' is no sample"
    ]
    lines.append(f"{'':>8}  {'token':<18}" + "".join(f"{label[:22]:>24}" for label in labels))
    rows = [*range(min(4, onset)), *range(max(4, onset - around), min(len(chain.ids), onset + around + 1))]
    for before, t in zip([-1, *rows], rows, strict=False):
        if t != before + 1:
            lines.append(f"{'...':>8}")
        word = repr(tokenizer.decode([int(chain.ids[t])]))[1:-1]
        marks = [MARKS[int(code)] if chain.support[t] else "." for code in chain.codes[t]]
        lines.append(f"{t:>8}  {word[:18]:<18}" + "".join(f"{mark:>24}" for mark in marks))
    return "\n".join(lines)
