"""Where one probe lies among those of a bank."""

from collections.abc import Iterable, Sequence
from typing import Any

from streamprobe.errors import InputError
from streamprobe.lags import Column
from streamprobe.probes.sites import ALL_LAYERS, Site


def place_of(
    sites: Sequence[Site],
    columns: Sequence[Column],
    *,
    layer: int | None,
    lag: int,
    label: str | None = None,
    target: str | None = None,
    site: str | None = None,
) -> tuple[int, int]:
    """Where a probe lies, (l, k), among these sites and columns.

    Without a label, a target or a site (a point of the layer): the first that there is.  Of probes that read all layers
    there is one, whatever layer is named.  Raises InputError for a probe that is not there.
    """
    real = {k: column for k, column in enumerate(columns) if not column.control}
    for name, value in (("label", label), ("target", target)):
        held = _unique(getattr(column, name) for column in real.values())
        value = held[0] if value is None else value
        real = {k: column for k, column in real.items() if getattr(column, name) == value}
        _require(value, held, name)
    lags = {column.lag: k for k, column in real.items()}
    layer_places: dict[int | None, int] = {layer: 0}
    if list(sites) != [ALL_LAYERS]:
        if site is not None:
            _require(site, _unique(each.point for each in sites), "site")
        own = [(each.layer, place) for place, each in enumerate(sites) if site in (None, each.point)]
        layer_places = dict(reversed(own))
        _require(layer, _unique(number for number, _ in own), "layer")
    _require(lag, sorted(lags), "lag")
    return layer_places[layer], lags[lag]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _require(value: Any, held: list[Any], name: str) -> None:
    if value not in held:
        raise InputError(
            f"{name} {value}", f"one of {' '.join(map(str, held))}, as in the run", f"choose another {name}"
        )
