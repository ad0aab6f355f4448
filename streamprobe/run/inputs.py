"""What a run works with before any weight is read: its texts, its chains, and what is asked of them."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.config.data_keys import DataConfig
from streamprobe.config.load import RunConfig
from streamprobe.controls.chosen import ChosenControls
from streamprobe.controls.permuted import relabel, relabelled_columns
from streamprobe.controls.table import CONTROLS
from streamprobe.data import preflight
from streamprobe.data.census import Census
from streamprobe.data.dataset import Dataset, Division, make_dataset
from streamprobe.data.prompts import resolve_day
from streamprobe.data.records import FormatOptions, Record, Refused
from streamprobe.data.sources import RowSource, open_source, read_records
from streamprobe.data.tokenize import text_options
from streamprobe.errors import InputError
from streamprobe.lags import Column, make_columns
from streamprobe.model.blocks import check_layers, check_vocabulary, context, depth, resolve_layers
from streamprobe.model.chunks import check_chunks
from streamprobe.model.hookpoints import resolve_places
from streamprobe.model.loading import build_empty, read_config, readable_errors
from streamprobe.model.points import Place
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.system.console import say


class HasFormat(Protocol):
    """Where records come from that are of a format, a `Found` or what has its name and keys."""

    @property
    def found(self) -> Any:
        """The format."""
        ...


Opened = TypeVar("Opened", bound=HasFormat)


class Texts(NamedTuple):
    """The records of the data, and what reads them."""

    records: list[Record | Refused]
    partial: bool  # whether these are a choice of the data alone
    format: str  # how the data lie in their rows
    tokenizer: Any
    model_config: Any
    places: list[Place]  # where activations are read, in the order in which they are named


def read_texts(config: RunConfig) -> tuple[Texts, RunConfig]:
    """The data, the tokenizer and the model's config; and the run's, with what these settle: layers, and the day."""
    texts, settled, source = open_texts(config, open_data)
    return texts._replace(records=read_records(source), partial=source.partial), settled


def open_texts(config: RunConfig, open: Callable[[DataConfig], Opened]) -> tuple[Texts, RunConfig, Opened]:
    """The same without any record; `open` gives where these come from, which is returned, too."""
    data, model = config.data, config.model
    model_config = read_config(model.model, **model.source)
    check_layers(model_config, [])
    layers: Any = resolve_layers(config.probes.layers, depth(model_config))
    places = _places_of(config, model_config, layers)
    source = open(data)
    tokenizer = load_tokenizer(model.model, **model.source)
    known = replace(settle_prompt(data, tokenizer, is_chat=source.found.name == "messages"), **source.found.keys)
    settled = replace(config, data=known, probes=replace(config.probes, layers=layers))
    return Texts([], True, str(source.found), tokenizer, model_config, places), settled, source


def settle_prompt(data: DataConfig, tokenizer: Any, *, is_chat: bool) -> DataConfig:
    """The keys of data with the `prompt` and the `chat_date` that they are read with, which is printed."""
    prompt = "chat" if is_chat else data.prompt
    if prompt != data.prompt != DataConfig().prompt:
        say(f"prompt    chats go through the chat template: {data.prompt!r} is not used")
    day = resolve_day(prompt, data.chat_date, tokenizer)
    if day:
        say(f"prompt    the chat template writes the date: {day} (--chat_date)")
    return replace(data, chat_date=day, prompt=prompt)


def _places_of(config: RunConfig, model_config: Any, layers: Sequence[int]) -> list[Place]:
    """Where activations are read.  Raises InputError for a pattern that names no place."""
    asked, model = config.probes.read, config.model

    def build() -> Any:
        with readable_errors(model.model):
            return build_empty(model_config, torch.float32, **model.code)

    return resolve_places(asked.of_layers, layers, asked.of_modules, depth(model_config), build=build)


def open_data(data: DataConfig) -> RowSource:
    """Where the records of a config's data come from.  Raises InputError for data that cannot be read."""
    return open_source(
        data.data,
        data.asked,
        format_options(data),
        split=data.data_split,
        config=data.data_config,
        sha256=data.data_sha256,
        most=data.max_chains,
    )


def format_options(data: DataConfig) -> FormatOptions:
    """How a format reads a row; which columns hold what is found in the data."""
    return FormatOptions(rejoined=data.response == "rejoined", label_names=data.names, rules=data.rules)


def chains_of(
    config: RunConfig,
    texts: Texts,
    bad: Collection[int] = (),
    division: Division | None = None,
    *,
    section_labels: Sequence[str] | None = None,
) -> Dataset:
    """The chains of a run, by split (none: as its config says); the rows `bad` are refused.

    `section_labels` are those of their `sections` (None: see `choose_section_labels`).
    """
    data = config.data
    of_config = Division(
        test_share=data.test_share,
        validation_share=data.validation_share,
        seed=data.split_seed,
        test_categories=data.test_categories,
        validate_on_test=data.validation == "test",
        by=data.split_by,
        folds=data.folds,
    )
    return make_dataset(
        texts.records,
        texts.tokenizer,
        config.probes.labels,
        context=context(texts.model_config),
        text=text_options(vars(data)),
        division=division or of_config,
        bad=bad,
        label_names={} if texts.partial else data.names,
        section_labels=section_labels,
    )


@dataclass(frozen=True)
class Inputs:
    """The chains of a run, and what is asked of each of their tokens."""

    dataset: Dataset  # with the labels of controls behind those of the data
    fingerprint: str  # of the dataset before those were added, and before chains were skipped
    columns: list[Column]  # K: the data's, then those of controls that change labels
    census: Mapping[str, Census]  # of all chains of a split
    fold_censuses: Sequence[Mapping[str, Census]]  # of those that train, or validate, the probes of each of F folds
    controls: ChosenControls
    preflight: str  # what was read, for the terminal

    @property
    def n_real(self) -> int:
        """How many columns ask for the data's own labels; they come first."""
        return sum(not column.control for column in self.columns)

    @property
    def positive_weight(self) -> Tensor:
        """Negatives over positives [F, K] among the training tokens of each column."""
        own = [census["train"] for census in self.fold_censuses]
        return torch.stack([(train.valid - train.positive) / train.positive for train in own])

    def positive_weight_of(self, feed: Feed) -> Tensor:
        """The same [k] of the columns of a feed."""
        columns, folds = feed.columns.cpu(), torch.zeros_like(feed.columns) if feed.folds is None else feed.folds
        return self.positive_weight[folds.cpu(), columns]

    def prior_of(self, feed: Feed) -> Tensor:
        """Log of positives over negatives [k] among the training tokens of all folds, for each column of a feed.

        Where a fold has many positives the others have few, so that with its own training tokens' prior a probe that
        knows nothing would rank the folds by that, backwards.
        """
        train, columns = self.census["train"], feed.columns.cpu()
        return -((train.valid - train.positive) / train.positive).log()[columns]


def make_inputs(config: RunConfig, texts: Texts, bad: Collection[int] = ()) -> Inputs:
    """The chains with the labels of controls, and the columns that have tokens of both classes.

    Raises InputError for data that cannot be trained on, and for a model that cannot read them.
    """
    return inputs_of(config, texts, chains_of(config, texts, bad))


def inputs_of(config: RunConfig, texts: Texts, plain: Dataset, names: Sequence[str] | None = None) -> Inputs:
    """The same for chains that are there already, with the controls of these names (None: all that are fair)."""
    probes, training = config.probes, config.training
    preflight.check_splits(plain, probes.labels)
    real = make_columns(probes.labels, probes.targets, probes.lags)
    asked = fair_controls(config, plain) if names is None else names
    controls = choose_controls(asked, real, len(probes.labels), plain)
    dataset = relabel(plain, controls.relabelled, training.seeds, training.seed)
    columns = relabelled_columns(real, list(controls.relabelled), training.seeds)
    by_fold = dataset.take_fold_censuses(columns)
    for own in by_fold:
        preflight.check_census(own, real, dataset.splits["train"])
    fair = [all(preflight.has_both(own, k) for own in by_fold) for k in range(len(columns))]
    kept = [k for k, column in enumerate(columns) if not column.control or fair[k]]
    left_out = Counter(column.control for k, column in enumerate(columns) if k not in kept)
    for name, n in left_out.items():
        say(f"{name:<9} {n} columns without both classes are left out")
    columns = [columns[k] for k in kept]
    by_fold = [{name: own.of(kept) for name, own in censuses.items()} for censuses in by_fold]
    census = dataset.take_census(columns) if dataset.folds > 1 else by_fold[0]
    described = preflight.describe(dataset, by_fold, columns, labels=probes.labels, tokenizer=texts.tokenizer)
    check_vocabulary(texts.model_config, max(int(chain.ids.max()) for chain in dataset.chains()))
    if must_chunk(config, dataset):
        check_chunks(texts.model_config, **config.model.code)
    shown = f"format    {texts.format}\n{described}"
    return Inputs(dataset, plain.fingerprint(), columns, census, by_fold, controls, shown)


def choose_controls(names: Sequence[str], columns: Sequence[Column], n_labels: int, dataset: Dataset) -> ChosenControls:
    """The controls of these names, less those that are fair ones for none of the columns: nothing is kept for them."""
    real = [column for column in columns if not column.control]
    asked = [name for name in names if name in CONTROLS and any(map(CONTROLS[name].applies, real))]
    return ChosenControls(asked, n_labels, len(dataset.section_labels))


def fair_controls(config: RunConfig, dataset: Dataset) -> list[str]:
    """The controls of a run that do not know its labels.

    Raises InputError for onsets of labels that begin in no text.
    """
    probes = config.probes
    if not dataset.one_label_a_text:
        return probes.controls
    if probes.targets != ["token"]:
        raise InputError(
            f"targets {' '.join(probes.targets)} with one label a text", "token alone", "give --targets token"
        )
    left_out = controls_that_know(probes.controls, dataset)
    return [name for name in probes.controls if name not in left_out] or ["none"]


def controls_that_know(controls: Sequence[str], dataset: Dataset) -> list[str]:
    """Those of the controls that know the labels of a dataset, since they are one a text; prints which they are."""
    found = (
        [name for name in controls if name in CONTROLS and CONTROLS[name].within] if dataset.one_label_a_text else []
    )
    if found:
        say(f"controls  {', '.join(found)} left out: a text has one label, which they would know")
    return found


def must_chunk(config: RunConfig, dataset: Dataset) -> bool:
    """Whether a chain is too long for one forward pass."""
    return max(dataset.lengths()) > config.model.max_batch_tokens
