"""Activations that are infinite, not numbers or all 0: named as they are read, or looked for before.

Shapes: N tokens, L sites, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from streamprobe.activations.batch import TokenBatch
from streamprobe.activations.stream import stream_samples
from streamprobe.data.tokenize import Chain
from streamprobe.errors import InputError
from streamprobe.model.taps import Taps
from streamprobe.probes.sites import Site
from streamprobe.system.hardware import Arriving


def check_finite(batches: Iterable[TokenBatch], chains: Sequence[Chain], sites: Sequence[Site]) -> Iterator[TokenBatch]:
    """The batches of a stream over `chains`, each looked through; `sites` [L] names their activations.

    What was found is asked for when the next batch is on its way, or the last one was taken: so the host need not wait
    for the device.  Raises InputError then for the first activation that is infinite or not a number, by chain, token
    and layer, and for a layer that is 0 at all tokens of a batch.
    """
    n_layers = sum(not site.is_control for site in sites)
    last: tuple[TokenBatch, Arriving] | None = None
    for batch in batches:
        if last and not last[1].get():
            _refuse(last[0], chains, sites)
        last = batch, Arriving(_seems_right(batch.acts, n_layers))
        yield batch
    if last and not last[1].get():
        _refuse(last[0], chains, sites)


def _seems_right(acts: Tensor, n_layers: int) -> Tensor:
    """Whether activations [N, L, D] are finite, and none of the first `n_layers`, the layers, is all 0: bool [].

    Sums report it at the price of one read; where they overflow or cancel out themselves, a closer look decides.
    """
    sums = acts.sum(2)
    finite = sums.isfinite().all()
    return finite & sums[:, :n_layers].any(0).all() if len(sums) else finite


def _refuse(batch: TokenBatch, chains: Sequence[Chain], sites: Sequence[Site]) -> None:
    """Raises InputError for the first activation that is infinite or not a number, and for a layer that is all 0."""
    for n, i in (~batch.acts.isfinite().all(2)).nonzero()[:1].tolist():
        chain, token, site = chains[int(batch.chain[n])], int(batch.token[n]), sites[i]
        other = "other --controls" if site.is_control else "leave such chains out by --bad_chains skip"
        raise InputError(
            f"activations that are infinite or not numbers: chain {chain.id!r}, token {token}, {site.title}",
            "finite numbers",
            f"use --dtype float32 or bfloat16, or {other}",
        )
    for i, site in enumerate(sites):
        if not site.is_control and not batch.acts[:, i].any():
            raise InputError(
                f"activations that are 0 at all {len(batch.acts):,} tokens of a batch: {site.title}",
                "what the model computes",
                "use another --device_map, such as a single device, or another --dtype",
            )


def find_bad_chains(
    chains: Sequence[Chain],
    backbone: nn.Module,
    layers: Sequence[int] | Taps,
    max_batch_tokens: int,
    *,
    on_forward: Callable[[int, int], None] | None = None,
) -> list[Chain]:
    """Those of the chains that have an activation that is infinite or not a number at a sample, whatever its label.

    The other arguments are those of `stream_samples`.
    """
    bad: set[int] = set()
    for batch in stream_samples(chains, backbone, layers, max_batch_tokens, on_forward=on_forward):
        if not batch.acts.sum(2).isfinite().all():
            wrong = ~batch.acts.isfinite().flatten(1).all(1)
            bad |= set(batch.chain[wrong.to(batch.chain.device)].tolist())
    return [chains[i] for i in sorted(bad)]
