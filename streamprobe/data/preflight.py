"""What will be fed to the model, in numbers and in one example, before anything is trained."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from streamprobe.data.annotations import END, plain_name
from streamprobe.data.census import Census
from streamprobe.data.counts import Counts
from streamprobe.data.dataset import Dataset
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, ONSET, OUTSIDE, UNKNOWN, Column

FEW = 20  # chains, from which on a label that only one of them has is named
SHOWN = 5  # names in a line
MARKS = {UNKNOWN: "-", OUTSIDE: "0", INSIDE: "1", ONSET: "1<"}


def check_splits(dataset: Dataset, labels: Sequence[str]) -> None:
    """Raises InputError for an empty split or fold, and for a label that never occurs."""
    counts, folds = dataset.counts, dataset.folds
    empty = [fold for fold in range(folds) if not any(chain.fold == fold for chain in dataset.splits["test"])]
    if empty and folds > 1:
        found = f"{folds} folds of {len(dataset.splits['test'])} chains, {len(empty)} of them empty"
        raise InputError(found, "chains in each", "give fewer --folds")
    for name, chains in dataset.splits.items():
        if not chains:
            reasons = f" ({counts.n_refused} chains refused: {refusals(counts)})" if counts.refused else ""
            raise InputError(
                f"no {name} chains{reasons}",
                "at least one in every split",
                "fix the data, use more problems, or a larger "
                + ("--validation_share" if folds > 1 else "--test_share or --validation_share"),
            )
    for label in labels:
        if not counts.labels[label]:
            known = _listed([in_a_line(name) for name, _ in counts.labels.most_common()], most=20)
            expected = f"one of {known}" if known else "one that the data or label_rules give, which give none"
            raise InputError(f"label {label!r}, which never occurs", expected, "correct --labels")


def check_train(dataset: Dataset) -> None:
    """Raises InputError for data without a training chain."""
    check_splits(replace(dataset, splits=dict.fromkeys(dataset.splits, dataset.splits["train"])), [])


def has_both(census: Mapping[str, Census], k: int) -> bool:
    """Whether column k has training tokens of both classes, and validation tokens."""
    train = census["train"]
    return 0 < int(train.positive[k]) < int(train.valid[k]) and int(census["validation"].valid[k]) > 0


def check_census(census: Mapping[str, Census], columns: Sequence[Column], chains: Sequence[Chain]) -> None:
    """Raises InputError for a lag longer than every training chain, and a column that cannot be trained or validated.

    `columns` are the first of those that the census counts; `chains` those of the training split.
    """
    longest = max(int(c.support.sum()) for c in chains)
    for name, found in census.items():
        for k, column in enumerate(columns):
            n, hits = int(found.valid[k]), int(found.positive[k])
            if not n and abs(column.lag) >= longest:
                raise InputError(
                    f"lag {column.lag}, which is longer than every chain",
                    f"less than {longest} tokens",
                    "correct --lags",
                )
            if not n or (name == "train" and hits in (0, n)):
                raise InputError(
                    f"{column} with {hits} positive {name} tokens of {n}",
                    "tokens of both classes in the training chains and some in validation, with folds in those of each",
                    "use more chains, other labels, other lags or fewer folds",
                )


def refusals(counts: Counts) -> str:
    """Why chains were refused, how many for each reason, and the names of the first ones."""
    by_size = sorted(counts.refused, key=counts.n_refused_for, reverse=True)
    return ", ".join(f"{counts.n_refused_for(why)} {why} ({_names(counts.refused[why])})" for why in by_size)


def _names(ids: Sequence[str], most: int = 3) -> str:
    return ", ".join([*(id[:60] for id in ids[:most]), *["..."] * (len(ids) > most)])


def describe(
    dataset: Dataset,
    by_fold: Sequence[Mapping[str, Census]],
    columns: Sequence[Column],
    *,
    labels: Sequence[str],
    tokenizer: Any,
) -> str:
    """What `describe_chains` says, what cannot be validated, and one example, as text for the terminal.

    `labels` are those that are probed, the first of the dataset's; `by_fold` counts `columns` for each fold's probes.
    """
    lines = describe_chains(dataset, labels)
    positive = torch.stack([census["validation"].positive for census in by_fold]).amin(0).tolist()
    blind = [str(c) for c, n in zip(columns, positive, strict=True) if not (n or c.control)]
    if blind:
        of_a_fold = " of a fold" if dataset.folds > 1 else ""
        lines.append(
            f"no positive in validation{of_a_fold} for {', '.join(blind)}: threshold and F1 are nan, Adam's first pass "
            "is its best"
        )
    return "\n".join([*lines, "", example(dataset.splits["train"], labels, tokenizer)])


def describe_chains(dataset: Dataset, labels: Sequence[str]) -> list[str]:
    """Lines on the chains and sections read and used, and on the tokens and base rates of every split."""
    counts = dataset.counts
    refused = f": {refusals(counts)}" if counts.refused else ""
    named = "".join(f"{in_a_line(label)[:22]:>24}" for label in labels)
    return [
        f"chains    {counts.read:,} read, {counts.used:,} used ({counts.repaired:,} of them repaired: "
        f"{counts.edited_sections} sections edited, {counts.lost_sections} lost, {counts.unbalanced_tags} tags "
        f"unbalanced), {counts.n_refused:,} refused{refused}",
        f"labels    {counts.labelled_characters / counts.characters:.1%} of the response's characters; sections: "
        + ", ".join(f"{in_a_line(name)} {n:,}" for name, n in counts.labels.most_common()),
        *_notes(counts),
        *describe_tags(counts, labels),
        *_describe_section_labels(dataset),
        "",
        f"{'split':<12}{'chains':>8}{'tokens':>10}{'labelled':>10}{named}",
        *(_split_line(name, chains, len(labels)) for name, chains in dataset.splits.items()),
        "            (base rate of the label's tokens, in so many sections)",
        *_describe_folds(dataset),
    ]


def _describe_folds(dataset: Dataset) -> list[str]:
    """A line on the folds, where there are several."""
    n = dataset.folds
    if n == 1:
        return []
    sizes = [sum(chain.fold == fold for chain in dataset.splits["test"]) for fold in range(n)]
    return [
        f"folds     {n}, of {_listed(list(map(str, sizes)), most=n)} test chains: each has probes that the others train"
    ]


def _describe_section_labels(dataset: Dataset) -> list[str]:
    """A line on the labels of the data that the control `joint` is not given, if there are any."""
    known = dataset.section_labels
    left_out = [in_a_line(name) for name, _ in dataset.counts.labels.most_common() if name not in known]
    if not known or not left_out:
        return []
    return [f"joint     the sections of {len(known)} labels are given to this control, but not {_listed(left_out)}"]


def _split_line(name: str, chains: Sequence[Chain], n_labels: int) -> str:
    """A split's chains and tokens, and the base rate of each label's tokens in so many sections."""
    labelled = sum(int((c.codes[:, :n_labels] != UNKNOWN).any(1).sum()) for c in chains)
    rates = ""
    for c in range(n_labels):
        known = sum(int((chain.codes[:, c] != UNKNOWN).sum()) for chain in chains)
        hits = sum(int((chain.codes[:, c] >= INSIDE).sum()) for chain in chains)
        begun = sum(int((chain.codes[:, c] == ONSET).sum()) for chain in chains)
        rates += f"{f'{hits / max(1, known):.2%} in {begun:,}':>24}"
    return f"{name:<12}{len(chains):>8,}{sum(len(c.ids) for c in chains):>10,}{labelled:>10,}{rates}"


def _notes(counts: Counts) -> list[str]:
    """What else is to be known of the chains that are used."""
    notes = [
        f"prompt    without its last {marker!r} for the {n:,} responses that begin with it"
        for marker, n in counts.markers.most_common()
    ]
    if counts.without_problem:
        notes.append(f"          {counts.without_problem:,} texts have no problem before them")
    if counts.without_sections:
        notes.append(f"          {counts.without_sections:,} texts without a section are used as negatives")
    return notes


def describe_tags(counts: Counts, labels: Sequence[str]) -> list[str]:
    """Lines on what is odd about the annotator's tags: their form, nearly equal names, names in a single chain."""
    lines = []
    if counts.missing_spans:
        named = _listed([repr(text[:60]) for text, _ in counts.missing_spans.most_common()])
        lines.append(f"spans     {counts.missing_spans.total():,} not found in their text: {named}")
    if counts.strange_tags:
        forms = counts.strange_tags.most_common()
        (commonest, _), *_ = forms
        pair = shlex.quote(f"{commonest}=LABEL")
        lines.append(
            f"tags      {counts.strange_tags.total():,} of a form that is not understood, passed over: "
            f"{_listed([f'{form} {n:,}' for form, n in forms])} (--label_names {pair} reads it as LABEL)"
        )
    for label, names in near_names(counts.labels, labels).items():
        found = _listed([f"{name!r} {counts.labels[name]:,}" for name in names])
        pairs = _listed([shlex.quote(f"{name}={label}") for name in names], " ")
        lines.append(f"names     {found}, nearly {label!r}: counted apart, unless --label_names {pairs}")
    rare = sorted(name for name, n in counts.label_chains.items() if n == 1)
    if rare and counts.used >= FEW:
        lines.append(
            f"rare      labels in a single chain, a slip or the model's own text: {_listed(list(map(repr, rare)))} "
            "(--label_names maps a name to another)"
        )
    return lines


def near_names(found: Mapping[str, int], labels: Sequence[str]) -> dict[str, list[str]]:
    """Names that differ in case, numbering or separators alone: the one that is probed, or the commonest -> the others.

    What is nearly the end of a section is counted to it.
    """
    groups: dict[str, list[str]] = {plain_name(END): [END]}
    for name in sorted(found, key=lambda name: (name not in labels, -found[name], name)):
        groups.setdefault(plain_name(name), []).append(name)
    return {first: others for first, *others in groups.values() if others}


def _listed(words: Sequence[str], separator: str = ", ", most: int = SHOWN) -> str:
    """The words in a row, the first few of them where there are many."""
    return separator.join([*words[:most], *(["..."] if len(words) > most else [])])


def in_a_line(name: str) -> str:
    """A name from the data, so that it is one line, and no long one."""
    return " ".join(name.split())[:60]


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
        marks = [MARKS[int(code)] if chain.support[t] else "." for code in chain.codes[t, : len(labels)]]
        lines.append(f"{t:>8}  {word[:18]:<18}" + "".join(f"{mark:>24}" for mark in marks))
    return "\n".join(lines)
