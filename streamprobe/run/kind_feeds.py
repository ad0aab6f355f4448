"""What probes of other kinds than linear are fed, and those that say what a kind adds to the joint control.

Shapes: N tokens, L layers, S sites (the control, then those of the kind), K columns.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.probes.kinds import form_if_any
from streamprobe.probes.mixed import Logits
from streamprobe.probes.nested import NESTED
from streamprobe.probes.sites import ALL_LAYERS, Site


def kind_feed(layers: Feed, kind: str) -> Feed:
    """What the probes of a kind read: the layers, as linear probes do, by the name of the kind."""
    return layers._replace(name=kind)


def mixed_feed(nested: Feed, layers: Feed, kind: str, *, own: Feed | None = None) -> Feed:
    """What says how much a kind adds to the joint control: the logits of nested probes and of the kind's own.

    `layers` are what the kind reads; `own` is its feed, if it asks for other columns than these.  It holds the columns
    of `nested`, if it has folds in each of them.
    """
    sites = [*nested.sites[:1], *_sites_of_kind(layers.sites, kind)]
    of_kind = _chooser(nested, own or kind_feed(layers, kind))

    def features(said: Mapping[str, Tensor]) -> Logits:
        return Logits(said[nested.name], of_kind(said[kind]))

    name, reads = f"{NESTED} {kind}", (nested.name, kind)
    return Feed(name, sites, len(nested.sites), features, nested.columns, folds=nested.folds, reads=reads)


def _sites_of_kind(layers: list[Site], kind: str) -> list[Site]:
    """Where probes of a kind stand that read these layers."""
    form = form_if_any(kind)
    return [ALL_LAYERS] if form and form.joined else layers


def _chooser(nested: Feed, feed: Feed) -> Callable[[Tensor], Tensor]:
    """What takes from logits [N, L, K] of all columns of a feed those of the columns of `nested`.

    In a run of several folds it does so of those of each, and of their means.
    """
    place = _places(nested.first_fold().columns.tolist(), feed.first_fold().columns.tolist())
    width = len(feed.columns) // feed.n_folds
    if place == list(range(width)):
        return lambda logits: logits
    index = torch.tensor(place)

    def choose(logits: Tensor) -> Tensor:
        of_folds = logits.unflatten(-1, (-1, width))
        return of_folds.index_select(-1, index.to(logits.device)).flatten(-2)

    return choose


def _places(wanted: Sequence[int], held: Sequence[int]) -> list[int]:
    """Where each of the wanted columns first stands among those that are held."""
    assert set(wanted) <= set(held), "a kind is asked for what the joint control is"
    return [held.index(column) for column in wanted]
