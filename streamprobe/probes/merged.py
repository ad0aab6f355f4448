"""Probes of sites of different widths as those of one bank, as a file holds them: narrower ones end in weights of 0.

Shapes: L sites, K columns, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamprobe.errors import InputError
from streamprobe.probes.base import Probes
from streamprobe.probes.sites import Site

WIDTHS = "widths"  # of what is read, in what a file says of itself, where they differ


def merged(banks: Sequence[Probes]) -> Any:
    """The probes of one solver and kind, of groups of sites with as many features each, as one bank.

    What they read ends in zeros behind the width of its site.  Raises InputError for probes that read several sites.
    """
    first, *rest = banks
    if not rest:
        return first
    if any(bank.sites != bank.reads for bank in banks):
        raise InputError(f"{first.kind} probes of sites of several widths", "one width", "choose other --sites")
    reads = [site for bank in banks for site in bank.reads]
    own = [bank.tensors() for bank in banks]
    tensors = {name: _stacked([each[name] for each in own]) for name in own[0]}
    whole = type(first).from_tensors(reads, first.columns, tensors, solver=first.solver, kind=first.kind)
    whole.threshold = torch.cat([bank.threshold for bank in banks if bank.threshold is not None])
    widths = [bank.n_features for bank in banks for _ in bank.reads]
    whole.about = {"sites": [list(site) for site in reads], WIDTHS: widths}
    return whole


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [L, K, ...] one behind the other, each filled up with zeros to the largest in every other dimension."""
    largest = [max(sizes) for sizes in zip(*(each.shape[2:] for each in tensors), strict=True)]
    return torch.cat([pad(each, _missing(each, largest)) for each in tensors])


def _missing(tensor: Tensor, sizes: Sequence[int]) -> list[int]:
    """What `pad` takes to fill up the last dimensions of a tensor to these sizes."""
    pairs = [(0, size - has) for has, size in zip(tensor.shape[2:], sizes, strict=True)]
    return [n for pair in reversed(pairs) for n in pair]


def cut_out(whole: Probes, sites: Sequence[Site], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the probes of these sites, `threshold` among them, each as wide as the one of that name in `like`.

    Raises ValueError for sites that stand not side by side.
    """
    assert whole.threshold is not None, "probes without a threshold"
    tensors, rows = whole.tensors() | {"threshold": whole.threshold}, slice(None)
    if whole.reads != list(sites):
        first = whole.reads.index(sites[0])
        rows = slice(first, first + len(sites))
        if whole.reads[rows] != list(sites) or whole.sites != whole.reads:
            raise ValueError(f"other layers than those of the probes of {whole.solver}")
    wide = {name: tuple(slice(size) for size in like[name].shape[2:]) for name in tensors}
    return {name: tensor[rows][(slice(None), slice(None), *wide[name])] for name, tensor in tensors.items()}


def widths_of(probes: Probes) -> list[int]:
    """The width of each of the sites that the probes read."""
    about = probes.about
    known = dict(zip((Site(*site) for site in about.get("sites", [])), about.get(WIDTHS, []), strict=False))
    return [known.get(site, probes.n_features) for site in probes.reads]
