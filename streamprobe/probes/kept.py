"""All probes and controls of a run as they end, and the file that keeps what `probes.safetensors` does not.

With both files a run's probes can be judged on other data beside the controls that they were trained with.

Shapes: L sites, K columns, D features, E width of an embedding.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.base import Probes
from streamprobe.probes.linear import LINEAR
from streamprobe.probes.merged import cut_out, merged
from streamprobe.probes.nested import NESTED
from streamprobe.probes.sites import checked_site
from streamprobe.probes.storage import (
    checked_column,
    class_of,
    find_probes,
    group_of,
    kinds_in,
    load_probes,
    pack_tensors,
    raw_bytes,
    read_about,
)

CONTROLS_FILE = "controls.safetensors"
FORMAT = 2  # of that file; raised whenever what is in it changes
SAME = ("data_fingerprint", "model_fingerprint", "config")  # in both files of a run
JUDGED_BY = ("half", "best_pass", "gradient_norm")


class FinalProbes(NamedTuple):
    """The probes of one solver and one group of sites as training left them, with what is said of them in results."""

    solver: str
    feed: str  # the name of what they read
    bank: Probes  # of all columns, those of controls and of other seeds too, with their thresholds
    half: Tensor  # [K] the logit at which the class-weighted probability is one half
    best_pass: Tensor  # [L, K] int64
    gradient_norm: Tensor  # [L, K]
    penalty: Tensor | None = None  # [L, K] of the layer's weights of NESTED probes, inf where they have none

    @property
    def of_kind(self) -> str:
        """The kind of the probes, or of what nested ones read beside the joint control."""
        _, _, kind = self.feed.partition(f"{NESTED} ")
        return kind or (LINEAR if self.bank.kind == NESTED else self.bank.kind)

    @property
    def shared(self) -> list[int]:
        """The columns of the probes that others get: no control's, of the first seed.  They come first."""
        if any(site.is_control for site in self.bank.sites):
            return []
        return [k for k, column in enumerate(self.bank.columns) if not (column.control or column.seed)]


def mean_of_folds(final: FinalProbes, n: int) -> FinalProbes:
    """The means over n folds of probes whose columns stand fold by fold, with the median threshold.

    Of each is said what is worst: the largest gradient norm, the last pass, the smallest penalty.
    """
    if n == 1:
        return final

    def apart(grid: Tensor) -> Tensor:  # [L, K, ...] -> [L, F, K / F, ...]
        return grid.unflatten(1, (n, -1))

    bank, mean = final.bank, final.bank.mean_of_folds(n)
    assert bank.threshold is not None, "probes without a threshold"
    mean.threshold = apart(bank.threshold).nanmedian(1).values  # one fold's may be far off
    return final._replace(
        bank=mean,
        half=final.half.unflatten(0, (n, -1)).mean(0),
        best_pass=apart(final.best_pass).amax(1),
        gradient_norm=apart(final.gradient_norm).amax(1),
        penalty=None if final.penalty is None else apart(final.penalty).amin(1),
    )


class KeptProbes(NamedTuple):
    """What a run keeps: all that judging its probes and controls on other data takes."""

    final: Sequence[FinalProbes]
    seen: Tensor  # [n] int64, rising: hashes of the problems that trained them or chose their thresholds
    words: Mapping[str, Tensor]  # `mean` [E] and `directions` [E, E / 2] of controls made of embeddings, if there are
    section_labels: Sequence[str] = ()  # those whose sections the control `joint` is given


def shared_probes(final: Sequence[FinalProbes]) -> dict[str, Probes]:
    """Each solver's and kind's probes that are no controls, of the first seed: what `probes.safetensors` holds."""
    groups: dict[str, list[Probes]] = {}
    for each in final:
        if each.shared:
            groups.setdefault(group_of(each.solver, each.bank.kind), []).append(_choose(each.bank, each.shared))
    return {name: merged(banks) for name, banks in groups.items()}


def _choose(bank: Probes, columns: list[int]) -> Probes:
    assert bank.threshold is not None, "probes without a threshold"
    return bank.choose(columns, bank.threshold[:, columns])


def pack_controls(kept: KeptProbes, about: Mapping[str, Any]) -> bytes:
    """The content of `controls.safetensors`: what `about` (SAME) and `shared_probes` do not say of a run's probes.

    `<solver>.<feed>.<tensor>` are those of the columns that are not shared, and the JUDGED_BY of all columns.
    """
    tensors = {"seen": kept.seen, **{f"words.{name}": tensor for name, tensor in kept.words.items()}}
    jobs = []
    for each in kept.final:
        bank = each.bank
        rest = _choose(bank, [k for k in range(len(bank.columns)) if k not in each.shared])
        own = rest.tensors() | {"threshold": rest.threshold} | {name: getattr(each, name) for name in JUDGED_BY}
        own |= {} if each.penalty is None else {"penalty": each.penalty}
        tensors |= {f"{each.solver}.{each.feed}.{name}": tensor for name, tensor in own.items()}
        places = {"sites": [list(site) for site in bank.reads], "columns": [column.saved for column in bank.columns]}
        jobs.append({"solver": each.solver, "feed": each.feed, "kind": bank.kind, **places})
    facts = {"format": FORMAT, "jobs": jobs, "section_labels": list(kept.section_labels), **about}
    return pack_tensors(tensors, {**facts, "sha256": _digest(tensors, facts)})


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of all that the file holds."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + raw_bytes(tensor))
    return digest.hexdigest()


def load_kept(folder: Path) -> KeptProbes:
    """All probes and controls of the finished run in `folder`, of both of its files; nothing is unpickled.

    Raises InputError where one is missing, damaged, or of another run than the other.
    """
    probes = find_probes(folder)
    shared_about = read_about(probes)
    shared = {
        group_of(solver, kind): load_probes(folder, solver, kind=kind)
        for solver in shared_about["solvers"]
        for kind in kinds_in(shared_about, solver)
    }
    path = folder / CONTROLS_FILE
    if not os.path.isfile(path):
        raise InputError(
            f"{folder}, a run without {CONTROLS_FILE}",
            "one that kept its controls, as every run now does",
            f"run it again: streamprobe train {folder / 'config.yaml'}",
        )
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {})["streamprobe"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, not {FORMAT}")
        if about.pop("sha256") != _digest(tensors, about):
            raise ValueError("not as it was written")
        if any(about.get(name) != shared_about.get(name) for name in SAME):
            raise ValueError(f"of another run than {probes.name}")
        words = {name: tensors[f"words.{name}"] for name in ("mean", "directions") if f"words.{name}" in tensors}
        final = [_read_job(job, tensors, shared) for job in about["jobs"]]
        kept = KeptProbes(final, tensors["seen"], words, about["section_labels"])
        _check(kept, shared)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            f"the {CONTROLS_FILE} that was written with {probes}",
            "put it back, or run it again",
        ) from error
    return kept


def _read_job(job: Mapping[str, Any], tensors: Mapping[str, Tensor], shared: Mapping[str, Probes]) -> FinalProbes:
    """One job of the file.  Raises ValueError, LookupError or TypeError for what is none."""
    start = f"{job['solver']}.{job['feed']}."
    own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    half, best_pass, gradient_norm = (own.pop(name) for name in JUDGED_BY)
    sites = [checked_site(*site) for site in job["sites"]]
    columns = [Column(*checked_column(*column)) for column in job["columns"]]
    if not any(site.is_control for site in sites):
        bank = shared[group_of(job["solver"], job["kind"])]
        if bank.columns != columns[: len(bank.columns)]:
            raise ValueError(f"other columns than those of the probes of {job['solver']}")
        first = cut_out(bank, sites, own)
        own = {name: torch.cat([first[name], tensor], dim=1) for name, tensor in own.items()}
    threshold, penalty = own.pop("threshold"), own.pop("penalty", None)
    bank = class_of(job["kind"]).from_tensors(sites, columns, own, solver=job["solver"], kind=job["kind"])
    shape = (len(bank.sites), len(columns))
    grids = [threshold, best_pass, gradient_norm, *([] if penalty is None else [penalty])]
    if any(tuple(grid.shape) != shape for grid in grids) or tuple(half.shape) != shape[1:]:
        raise ValueError(f"tensors that are no grid of {shape[0]} sites x {shape[1]} columns")
    if best_pass.is_floating_point() or not all(x.is_floating_point() for x in (half, gradient_norm, *own.values())):
        raise TypeError("tensors of another kind of number")
    if not all(tensor.isfinite().all() for tensor in (half, *own.values())):
        raise ValueError("numbers that are infinite or none")
    bank.threshold = threshold.double()
    return FinalProbes(job["solver"], job["feed"], bank, half, best_pass, gradient_norm, penalty)


def _check(kept: KeptProbes, shared: Mapping[str, Probes]) -> None:
    """Raises ValueError for what does not go together."""
    if {group_of(each.solver, each.bank.kind) for each in kept.final if each.shared} != shared.keys():
        raise ValueError(f"not the probes {' '.join(shared)}")
    if not (isinstance(kept.section_labels, list) and all(isinstance(name, str) for name in kept.section_labels)):
        raise TypeError("labels that are no names")
    if kept.seen.dim() != 1 or kept.seen.dtype != torch.int64:
        raise ValueError("no hashes of problems")
    if kept.words:
        mean, directions = kept.words["mean"], kept.words["directions"]
        if mean.dim() != 1 or directions.dim() != 2 or len(mean) != len(directions):
            raise ValueError("a mean and directions of embeddings that do not go together")
        if not (mean.isfinite().all() and directions.isfinite().all()):
            raise ValueError("embeddings that are infinite or none")
