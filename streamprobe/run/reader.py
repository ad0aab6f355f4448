"""The frozen model at work on the chains of a run: where all batches that a run trains on come from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.finite import check_finite, find_bad_chains
from streamprobe.activations.reading import site_of
from streamprobe.activations.shards import Trip, deal
from streamprobe.activations.stream import stream
from streamprobe.config.load import RunConfig
from streamprobe.controls.embedding import EmbeddingLayers
from streamprobe.data.dataset import NOT_FINITE, Dataset
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.model import trial
from streamprobe.model.places import describe_places, main_device
from streamprobe.model.points import RESID_POST, Place
from streamprobe.model.served import load_shared
from streamprobe.model.taps import Taps
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.sites import Site, control_sites, mean_sites
from streamprobe.run.cost import Cost
from streamprobe.run.inputs import Inputs, Texts, make_inputs, must_chunk
from streamprobe.system.console import say, shows_progress
from streamprobe.system.distributed import add, is_own, share
from streamprobe.system.workers import worker


class Backbone(NamedTuple):
    """The frozen model, cut off above the deepest probed layer."""

    model: Any
    taps: Taps  # where it is read: places of the same width side by side
    widths: list[int]  # of these places
    hidden_size: int  # of the widest of them: what is kept of each has so many numbers, zeros at the end
    device: torch.device

    @property
    def sites(self) -> list[Site]:
        """The sites of the places."""
        return [site_of(place) for place in self.taps.hooks]


def load_model(config: RunConfig, texts: Texts, inputs: Inputs, whole: Any = None) -> Backbone:
    """Puts the model into memory and lets it read a short text; `whole` is there already, with an LM head that is not
    read.  Raises InputError for one that cannot be probed.
    """
    c, layers = config.model, sorted({place.layer for place in texts.places})
    model: Any = load_shared(c.model, layers, c.loading) if whole is None else whole.base_model
    if among := worker():
        say(f"model     {among.describe()}")
    if places := describe_places(model):
        say(f"model     {places}")
    tokens = trial.some_tokens(texts.tokenizer, texts.model_config)
    taps = trial.find_places(model, texts.places, tokens)
    widths = trial.check_places(model, taps, tokens, must_chunk(config, inputs.dataset))
    _check_kinds(config.probes.kinds, list(taps.hooks), widths)
    return _by_width(model, taps, widths, inputs)


def _check_kinds(kinds: Sequence[str], places: Sequence[Place], widths: Sequence[int]) -> None:
    """Raises InputError for other kinds than linear where the places are of several widths."""
    if kinds != [LINEAR] and len(set(widths)) > 1:
        some = {width: place for place, width in zip(reversed(places), reversed(widths), strict=True)}
        listed = ", ".join(f"{width} of {some[width]}" for width in dict.fromkeys(widths))
        others = " ".join(kind for kind in kinds if kind != LINEAR)
        raise InputError(
            f"kinds {others} with places of several widths ({listed})",
            "one width, which other kinds than linear need",
            "give --kinds linear, or other --sites and --hookpoints",
        )


def _by_width(model: Any, taps: Taps, widths: Sequence[int], inputs: Inputs) -> Backbone:
    """The backbone with its places in groups of the same width, in the order of the first of each."""
    order = sorted(range(len(widths)), key=lambda i: widths.index(widths[i]))
    places = list(taps.hooks)
    hooks = {places[i]: taps.hooks[places[i]] for i in order}
    widest = max(widths)
    if inputs.controls.embedded and any(place.point != RESID_POST for place in places):
        widest = max(widest, embedding_size(model))
    return Backbone(model, taps._replace(hooks=hooks), [widths[i] for i in order], widest, main_device(model))


def embedding_size(model: Any) -> int:
    """How many numbers the model's embedding has for a token."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        return embedding(torch.zeros(1, dtype=torch.int64, device=main_device(embedding))).shape[1]


def skip_bad_chains(config: RunConfig, texts: Texts, inputs: Inputs, backbone: Backbone, *, cost: Cost) -> Inputs:
    """The inputs without chains whose activations are infinite or not numbers, as if their rows had been refused."""
    bad = find_bad_rows(config, inputs.dataset, backbone, cost=cost)
    if not bad:
        return inputs
    left = make_inputs(config, texts, bad)
    say(f"skipped   {len(bad)} chains {NOT_FINITE}; what is left:\n\n{left.preflight}")
    return replace(left, fingerprint=inputs.fingerprint)


def find_bad_rows(config: RunConfig, dataset: Dataset, backbone: Backbone, *, cost: Cost) -> set[int]:
    """The rows of the chains, of all splits, whose activations are infinite or not numbers."""
    start, chains, most = time.perf_counter(), dataset.chains(), config.model.max_batch_tokens
    place = {chain.row: i for i, chain in enumerate(chains)}
    bad = torch.zeros(len(chains), dtype=torch.int64)
    for number, shard in enumerate(deal(dataset.lengths(), config.training.shards, most)):
        own = [chains[i] for batch in shard for i in batch] if is_own(number) else []
        if own:
            found = find_bad_chains(own, backbone.model, backbone.taps, most, on_forward=cost.count)
            bad[[place[chain.row] for chain in found]] = 1
    add(bad)
    cost.model_seconds += time.perf_counter() - start
    return {chains[i].row for i in bad.nonzero()[:, 0].tolist()}


def embed_controls(inputs: Inputs, backbone: Backbone) -> EmbeddingLayers | None:
    """The layers made of embeddings that controls are, or are given, if the run has any."""
    wanted = inputs.controls.embedded
    if not wanted:
        return None
    ids = torch.cat([chain.ids for chain in inputs.dataset.splits["train"]])
    layers = EmbeddingLayers.fitted(backbone.model.get_input_embeddings(), ids, backbone.hidden_size, wanted)
    for tensor in layers.words:
        share(tensor)  # directions have no sign, and other machines may find another
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # so that the plan of memory sees what is free
    return layers


def make_reader(
    config: RunConfig,
    inputs: Inputs,
    backbone: Backbone,
    cost: Cost,
    *,
    embedded: EmbeddingLayers | None,
    every: bool = False,
    half_lives: Sequence[int] = (),
) -> "Reader":
    """The reader of a run's chains, as its config says; `every` and `half_lives`: see `stream`."""
    most, n_shards = config.model.max_batch_tokens, config.training.shards
    return Reader(
        inputs, backbone, most, cost, embedded=embedded, n_shards=n_shards, every=every, half_lives=half_lives
    )


class Reader:
    """Trips over the chains through the model, in shards, counted and looked through."""

    def __init__(
        self,
        inputs: Inputs,
        backbone: Backbone,
        max_batch_tokens: int,
        cost: Cost,
        *,
        embedded: EmbeddingLayers | None,
        n_shards: int,
        every: bool = False,
        half_lives: Sequence[int] = (),
    ):
        """`embedded` are the layers of the controls that are made of embeddings: see `embed_controls`.

        With `every` all tokens that may be samples are read, with the running means of `half_lives`: see `stream`.
        """
        self.embedded = embedded
        self.splits: Mapping[str, Sequence[Chain]] = inputs.dataset.splits
        lengths = {name: [len(chain.ids) for chain in chains] for name, chains in self.splits.items()}
        self.shards = {name: deal(own, n_shards, max_batch_tokens) for name, own in lengths.items()}
        means = [site for half_life in half_lives for site in mean_sites(backbone.sites, half_life)]
        self.sites: list[Site] = [*backbone.sites, *means, *control_sites(inputs.controls.embedded)]
        self.cost = cost
        self.bar: Any = None
        self.title, self.left = "", 0  # of the bar, and how many tokens its trip has left
        self.stream: Callable[..., Iterator[TokenBatch]] = partial(
            stream,
            backbone=backbone.model,
            layers=backbone.taps,
            columns=inputs.columns,
            labels=inputs.dataset.labels,
            max_batch_tokens=max_batch_tokens,
            embedded=embedded,
            side=inputs.controls.features,
            every=every,
            half_lives=half_lives,
        )

    def trip(self, split: str, seed: int | None = None, title: str = "") -> Trip:
        """One trip over a split; `seed` orders the batches of every shard (None: by length)."""
        return Trip(self.shards[split], partial(self._read, split, title or split), seed)

    def read(self, split: str) -> Iterator[TokenBatch]:
        """One trip over this rank's shards of a split, one behind the other."""
        for _, batches in self.trip(split).own():
            yield from batches

    def _read(self, split: str, title: str, batches: Sequence[Sequence[int]]) -> Iterator[TokenBatch]:
        """The tokens of these batches of chains, with a progress bar in a terminal.

        Raises InputError for an activation that is infinite or not a number, before they are over.
        """
        if not batches:
            return
        chains, bar = self.splits[split], self._bar(split, title)

        def count(tokens: int, padded: int) -> None:
            self.cost.count(tokens, padded)
            bar.update(tokens)
            self.left -= tokens

        start = time.perf_counter()
        for batch in check_finite(self.stream(chains, batches=batches, on_forward=count), chains, self.sites):
            self.cost.model_seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
        if not self.left:
            bar.close()

    def _bar(self, split: str, title: str) -> Any:
        """The progress bar of a trip, over this rank's shards."""
        if self.title != title or not self.left:
            own = [shard for number, shard in enumerate(self.shards[split]) if is_own(number)]
            total = sum(len(self.splits[split][i].ids) for shard in own for batch in shard for i in batch)
            shown: dict[str, Any] = {"unit": "tok", "unit_scale": True, "leave": False, "disable": not shows_progress()}
            self.bar, self.title, self.left = tqdm(total=total, desc=title, **shown), title, total
        return self.bar
