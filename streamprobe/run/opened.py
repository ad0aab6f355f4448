"""A finished run, opened again: what it takes to let its model write while its probes look on, or push it.

Only this package's own folder format is read; nothing in it is executed unless the user says so.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamprobe.activations.reading import places_of
from streamprobe.config.load import RunConfig, load_config
from streamprobe.data.dataset import Dataset
from streamprobe.errors import InputError
from streamprobe.model import blocks, trial
from streamprobe.model.backbone import load_backbone
from streamprobe.model.loading import read_config
from streamprobe.model.tokenizer import load_tokenizer
from streamprobe.probes.base import Probes
from streamprobe.probes.merged import widths_of
from streamprobe.probes.storage import find_probes, load_probes, read_about
from streamprobe.run.inputs import chains_of, read_texts


class OpenedRun(NamedTuple):
    """A finished run: where it lies, how it was made, and its probes of one solver and kind."""

    folder: Path
    config: RunConfig
    probes: Probes


class Front(NamedTuple):
    """What stands in front of a run's model, and says what it takes: its tokenizer and its config."""

    tokenizer: Any
    config: Any


class OpenedModel(NamedTuple):
    """The model that was probed, frozen, and its tokenizer."""

    model: Any
    tokenizer: Any


def open_run(
    folder: Path,
    *,
    solver: str | None = None,
    kind: str | None = None,
    changed: Mapping[str, str | Sequence[str] | None] | None = None,
    trusted: bool = False,
) -> OpenedRun:
    """The run in `folder`, with its probes of `solver` (none: of its first one) and `kind` (none: linear).

    `changed` holds, as text, keys of its config that are otherwise today, such as `model` (None: as in the run); `data`
    in it are the run's own in another place.  Raises InputError for a folder that holds no finished run, and for a
    config that runs Python code of the model's where the user has not `trusted` it: the folder may be a stranger's.
    """
    if not os.path.isdir(folder):  # which is no error for a name that is too long
        raise InputError(f"{folder}, which is no folder", "the folder of a finished run", "check the path")
    if not os.path.isfile(folder / "config.yaml"):
        raise InputError(f"{folder}, a folder without config.yaml", "the folder of a finished run", "check the path")
    probes = load_probes(folder, solver, kind=kind)
    keys = [word for key, value in (changed or {}).items() if value is not None for word in _as_words(key, value)]
    config = load_config([str(folder / "config.yaml"), *keys], same_data=True)
    if config.model.trust_remote_code and not trusted:
        raise InputError(
            f"{folder}, whose config runs Python code that comes with {config.model.model}",
            "your word that you trust it",
            "give --trust_remote_code, too",
        )
    return OpenedRun(folder, config, probes)


def _as_words(key: str, value: str | Sequence[str]) -> list[str]:
    """A key and its value, or its list of values, as a command line has them."""
    return [f"--{key}={value}"] if isinstance(value, str) else [f"--{key}", *value]


def load_front(run: OpenedRun) -> Front:
    """What a prompt needs of the run's model, before any weight is read.

    Raises InputError for a model without the probed layers.
    """
    c = run.config.model
    tokenizer, config = load_tokenizer(c.model, **c.source), read_config(c.model, **c.source)
    blocks.check_layers(config, run.probes.layers)
    return Front(tokenizer, config)


def load_whole(run: OpenedRun, front: Front | None = None) -> OpenedModel:
    """The run's model with all its blocks and its LM head; `front` is its `load_front`, if that is there already.

    Raises InputError for another model than the probes'.
    """
    return _load(run, None, front or load_front(run))


def load_cut(run: OpenedRun) -> OpenedModel:
    """The run's model, cut off above the deepest layer of `run.probes`.  Raises InputError as `load_whole` does."""
    return _load(run, run.probes.layers, load_front(run))


def _load(run: OpenedRun, layers: Sequence[int] | None, front: Front) -> OpenedModel:
    c, probes = run.config.model, run.probes
    tokenizer, model_config = front
    model = load_backbone(c.model, layers, **c.loading)
    tokens = trial.some_tokens(tokenizer, model_config)
    taps = trial.find_places(model, places_of(probes.reads), tokens)
    widths, expected = trial.check_places(model, taps, tokens), widths_of(probes)
    if widths != expected:
        has, needs = next((w, e) for w, e in zip(widths, expected, strict=True) if w != e)
        raise InputError(
            f"probes of {needs} features and a model of hidden size {has}",
            "the model that was probed",
            "correct --model",
        )
    return OpenedModel(model, tokenizer)


def chains_of_run(config: RunConfig) -> Dataset:
    """The chains that a run of this config trains on and is tested on."""
    texts, settled = read_texts(config)
    return chains_of(settled, texts)


def check_chains(folder: Path, chains: Dataset) -> None:
    """Raises InputError for other chains than those of the run in `folder`, as far as its probes say."""
    fingerprint = chains.fingerprint()
    known = read_about(find_probes(folder)).get("data_fingerprint", fingerprint)
    if known != fingerprint:
        raise InputError(
            f"data whose chains have the fingerprint {fingerprint[:12]}",
            f"{str(known)[:12]}, that of the chains of {folder}",
            "give the run's own data by --data",
        )
