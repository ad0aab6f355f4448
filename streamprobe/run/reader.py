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
from streamprobe.activations.stream import stream
from streamprobe.config.load import RunConfig
from streamprobe.controls.embedding import EmbeddingLayers
from streamprobe.data.dataset import NOT_FINITE, Dataset
from streamprobe.data.tokenize import Chain
from streamprobe.model import trial
from streamprobe.model.backbone import load_backbone
from streamprobe.model.places import describe_places, main_device
from streamprobe.probes.sites import Site, control_sites, layer_sites
from streamprobe.run.cost import Cost
from streamprobe.run.inputs import Inputs, Texts, make_inputs, must_chunk
from streamprobe.system.console import say, shows_progress


class Backbone(NamedTuple):
    """The frozen model, cut off above the deepest probed layer."""

    model: Any
    layers: list[int]
    hidden_size: int
    device: torch.device


def load_model(config: RunConfig, texts: Texts, inputs: Inputs) -> Backbone:
    """Puts the model into memory and lets it read a short text.  Raises InputError for one that cannot be probed."""
    c, layers = config.model, config.probes.layer_numbers
    model: Any = load_backbone(c.model, layers, **c.loading)
    if places := describe_places(model):
        say(f"model     {places}")
    tokens = trial.some_tokens(texts.tokenizer, texts.model_config)
    width = trial.check_reading(model, layers, tokens, must_chunk(config, inputs.dataset))
    return Backbone(model, layers, width, main_device(model))


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
    start = time.perf_counter()
    bad = find_bad_chains(
        dataset.chains(), backbone.model, backbone.layers, config.model.max_batch_tokens, on_forward=cost.count
    )
    cost.model_seconds += time.perf_counter() - start
    return {chain.row for chain in bad}


def embed_controls(inputs: Inputs, backbone: Backbone) -> EmbeddingLayers | None:
    """The layers made of embeddings that controls are, or are given, if the run has any."""
    wanted = inputs.controls.embedded
    if not wanted:
        return None
    ids = torch.cat([chain.ids for chain in inputs.dataset.splits["train"]])
    layers = EmbeddingLayers.fitted(backbone.model.get_input_embeddings(), ids, backbone.hidden_size, wanted)
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # so that the plan of memory sees what is free
    return layers


class Reader:
    """Trips over the chains through the model, counted and looked through."""

    def __init__(
        self,
        inputs: Inputs,
        backbone: Backbone,
        max_batch_tokens: int,
        cost: Cost,
        *,
        embedded: EmbeddingLayers | None,
    ):
        """`embedded` are the layers of the controls that are made of embeddings: see `embed_controls`."""
        self.embedded = embedded
        self.splits: Mapping[str, Sequence[Chain]] = inputs.dataset.splits
        self.sites: list[Site] = [*layer_sites(backbone.layers), *control_sites(inputs.controls.embedded)]
        self.cost = cost
        self.stream: Callable[..., Iterator[TokenBatch]] = partial(
            stream,
            backbone=backbone.model,
            layers=backbone.layers,
            columns=inputs.columns,
            labels=inputs.dataset.labels,
            max_batch_tokens=max_batch_tokens,
            embedded=embedded,
            side=inputs.controls.features,
        )

    def read(self, split: str, seed: int | None = None, title: str = "") -> Iterator[TokenBatch]:
        """One trip over a split, with a progress bar in a terminal; `seed` orders the batches (None: by length).

        Raises InputError for an activation that is infinite or not a number, before the trip is over.
        """
        chains = self.splits[split]
        total = sum(len(c.ids) for c in chains)
        hidden = not shows_progress()
        with tqdm(total=total, desc=title or split, unit="tok", unit_scale=True, disable=hidden, leave=False) as bar:

            def count(tokens: int, padded: int) -> None:
                self.cost.count(tokens, padded)
                bar.update(tokens)

            batches = self.stream(chains, seed=seed, on_forward=count)
            start = time.perf_counter()
            for batch in check_finite(batches, chains, self.sites):
                self.cost.model_seconds += time.perf_counter() - start
                yield batch
                start = time.perf_counter()
