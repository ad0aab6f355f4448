"""The chains of a run: which records are used, for what, and what became of all that were read.

Shapes: T tokens in a chain, C label arrays, K columns.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from streamprobe.data.annotations import NAMES, check_names
from streamprobe.data.census import Census, count_tokens
from streamprobe.data.counts import Counts
from streamprobe.data.prompts import is_unicode
from streamprobe.data.records import Record, Refused, Unusable
from streamprobe.data.splits import FoldPlace, fold_chains, split_chains
from streamprobe.data.tokenize import AS_TEXT, Chain, TextOptions, tokenize
from streamprobe.errors import InputError
from streamprobe.lags import INSIDE, OUTSIDE, Column
from streamprobe.system.console import shows_progress


def _constant(codes: Tensor) -> bool:
    """Whether each label [T, C] of a chain is known to be there at all of its labelled tokens, or at none."""
    inside, outside = (codes >= INSIDE).any(0), (codes == OUTSIDE).any(0)
    return not bool((inside & outside).any())


class Division(NamedTuple):
    """Which chains are for what."""

    test_share: float = 0.2
    validation_share: float = 0.1
    seed: int = 42
    test_categories: Sequence[str] | None = None  # the test chains are those of these categories
    validate_on_test: bool = False  # no validation chains but the test chains
    by: str = "problem"  # or `chain`, see `split_chains`
    folds: int = 1  # more: every chain is a test chain of one of them, see `fold_chains`


DIVIDED = Division()
NO_TOKEN = "without a token that counts, as where a chat template leaves the response out"
NOT_FINITE = "with activations that are infinite or not numbers"
SPLITS = ("train", "validation", "test")
MOST_SECTION_LABELS = 16  # each is some 60 features of the control `joint`


@dataclass(frozen=True)
class Dataset:
    """The chains of a run, by split, and what became of every record."""

    splits: Mapping[str, Sequence[Chain]]  # `train`, `validation` and `test`, which is all chains where there are folds
    labels: Sequence[str]  # the names of the chains' C label arrays
    counts: Counts
    section_labels: Sequence[str] = ()  # the names of the chains' A labels in `sections`
    folds: int = 1

    def chains(self) -> list[Chain]:
        """Every chain once, split by split: the validation chains may be the test chains."""
        return list({chain.row: chain for split in self.splits.values() for chain in split}.values())

    @property
    def one_label_a_text(self) -> bool:
        """Whether no label changes within a chain, as where whole texts are labelled."""
        return all(_constant(chain.codes) for chain in self.chains())

    def lengths(self) -> list[int]:
        """Tokens of every chain."""
        return [len(chain.ids) for chain in self.chains()]

    def fingerprint(self) -> str:
        """SHA-256 of everything that is fed: token ids, labels, support and sentence ends of every chain, by split."""
        digest = hashlib.sha256()
        for name, chains in self.splits.items():
            digest.update(name.encode())
            for c in chains:
                for tensor in (c.ids, c.codes, c.support, c.sections, c.sentence_end):
                    digest.update(tensor.numpy().tobytes())
                if self.folds > 1:
                    digest.update(str(c.fold).encode())
        return digest.hexdigest()

    def take_census(self, columns: Sequence[Column]) -> dict[str, Census]:
        """Of the training and of the validation chains."""
        return {name: count_tokens(self.splits[name], columns, self.labels) for name in ("train", "validation")}

    def take_fold_censuses(self, columns: Sequence[Column]) -> list[dict[str, Census]]:
        """Of the training and of the validation chains of the probes of each fold."""
        whole = self.take_census(columns)
        if self.folds == 1:
            return [whole]
        found = []
        for fold in range(self.folds):
            own = {name: [chain for chain in self.splits[name] if chain.fold == fold] for name in whole}
            left_out = {name: count_tokens(chains, columns, self.labels) for name, chains in own.items()}
            found.append({name: whole[name].less(left_out[name]) for name in whole})
        return found


def make_dataset(
    records: Sequence[Record | Refused],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    context: int,
    text: TextOptions = AS_TEXT,
    division: Division = DIVIDED,
    bad: Collection[int] = (),
    label_names: Mapping[str, str] = NAMES,
    section_labels: Sequence[str] | None = None,
) -> Dataset:
    """Records -> the chains of every split with codes for `labels`; a progress bar shows in a terminal.

    The split is drawn over all records, so that a refused one moves no other.  Chains of more than `context` tokens are
    refused, and so are the rows `bad`, with whose activations something is wrong.  `section_labels` are those of the
    chains' `sections` (None: see `choose_section_labels`).  Raises InputError for a test category that no record has,
    and for one of `label_names` that no tag of a chain in use names.
    """
    splits: dict[str, list[Chain]] = {name: [] for name in SPLITS}
    beside = choose_section_labels(records, labels, text) if section_labels is None else section_labels
    maker = ChainMaker(tokenizer, labels, context=context, text=text, section_labels=beside, bad=bad)
    for record, split in zip(_shown(records), _divide(records, division), strict=True):
        chain = maker.make(record, "with a problem of the test split" if split == "duplicate" else "")
        if chain:
            _place(chain, split, splits)
    check_names(label_names, maker.names)
    if division.validate_on_test:
        splits["validation"] = splits["test"]
    return Dataset(splits, list(labels), maker.counts, beside, division.folds)


class ChainMaker:
    """Makes chains of records, one by one, and counts what becomes of them."""

    def __init__(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        context: int,
        text: TextOptions,
        section_labels: Sequence[str],
        bad: Collection[int] = (),
    ):
        """The arguments are those of `make_dataset`."""
        self.tokenizer, self.labels, self.context, self.text = tokenizer, labels, context, text
        self.section_labels, self.bad = section_labels, bad
        self.counts = Counts()
        self.names: set[str] = set()  # of tags in chains that are used

    def make(self, record: Record | Refused, reason: str = "") -> Chain | None:
        """The chain of a record; None where it is refused, for a `reason` that is known or one of its own."""
        self.counts.read += 1
        reason = reason or _why_unused(record, self.bad, self.text)
        if reason or isinstance(record, Refused):
            self.counts.refuse(reason, record.id)
            return None
        try:
            chain = tokenize(record, self.tokenizer, self.labels, self.text, section_labels=self.section_labels)
            chain = _fitting(chain, self.context, self.text)
        except Unusable as why:
            self.counts.refuse(str(why), record.id)
            return None
        self.counts.use(record, chain.marker)
        self.names.update(record.annotation.names)
        return chain


def _place(chain: Chain, where: str | FoldPlace, splits: Mapping[str, list[Chain]]) -> None:
    """Adds a chain to its split, or to both where there are folds."""
    if isinstance(where, FoldPlace):
        chain = replace(chain, fold=where.fold)
        splits[where.split].append(chain)
        splits["test"].append(chain)
    else:
        splits[where].append(chain)


def _shown(records: Sequence[Record | Refused]) -> Iterable[Record | Refused]:
    """The records, with a progress bar in a terminal."""
    return tqdm(records, "tokenise", unit="chain", delay=2, disable=not shows_progress(), leave=False)


def choose_section_labels(
    records: Sequence[Record | Refused], labels: Sequence[str], text: TextOptions = AS_TEXT
) -> list[str]:
    """The labels whose sections the control `joint` is given: `labels`, then those that most records have.

    At most MOST_SECTION_LABELS, and the same ones whichever chains turn out to have activations that are not finite.
    """
    found = Counter(
        label
        for record in records
        if isinstance(record, Record) and not _why_unused(record, (), text)
        for label in sorted({section.label for section in record.sections})
    )
    others = sorted(found, key=lambda label: (-found[label], label))
    return list(dict.fromkeys([*labels, *others]))[:MOST_SECTION_LABELS]


def _fitting(chain: Chain, context: int, text: TextOptions) -> Chain:
    """The chain, if it fits the model's context and has tokens that count.  Raises Unusable otherwise."""
    if len(chain.ids) > context:
        raise Unusable(f"longer than the model's context of {context:,} tokens")
    if not chain.support.any():
        raise Unusable(f"without a token in the region {text.region}" if text.region != "all" else NO_TOKEN)
    return chain


def _why_unused(record: Record | Refused, bad: Collection[int], text: TextOptions) -> str:
    """The reason why a record is not used, as far as its text tells; nothing where it is.

    A text without a section is one of negatives where text in no section is, unless its sections were lost.
    """
    if record.row in bad:
        return NOT_FINITE
    if isinstance(record, Refused):
        return record.reason
    if not is_unicode(record.response + "".join(section.label for section in record.sections)):
        return "with text that is not Unicode"
    if record.sections:
        return ""
    if record.annotation.lost:
        return "none of whose sections is found in the response"
    known = text.unlabelled == "negative" or (text.unlabelled == "auto" and record.complete) or record.everywhere
    return "" if known and record.response else "without a section"


def _divide(records: Sequence[Record | Refused], division: Division) -> Sequence[str | FoldPlace]:
    categories = [record.category for record in records]
    problems = [record.origin if isinstance(record, Record) else record.problem for record in records]
    if division.folds > 1:
        share, seed = division.validation_share, division.seed
        return fold_chains(problems, folds=division.folds, validation_share=share, seed=seed)
    return split_chains(
        problems,
        test_share=division.test_share,
        validation_share=0.0 if division.validate_on_test else division.validation_share,
        seed=division.seed,
        by=division.by,
        test=None if division.test_categories is None else _in_categories(categories, division.test_categories),
    )


def _in_categories(kinds: Sequence[str], chosen: Sequence[str]) -> list[bool]:
    strange = sorted(set(chosen) - set(kinds))
    if strange:
        known = ", ".join(sorted(set(kinds))[:20])
        raise InputError(
            f"test_categories {' '.join(strange)}, which no chain has", f"of {known}", "correct --test_categories"
        )
    return [kind in chosen for kind in kinds]
