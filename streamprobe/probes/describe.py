"""Probes in words: what they are, where they come from, and how to use one."""

from collections.abc import Iterable
from typing import Any

from streamprobe.probes.base import Probes
from streamprobe.probes.sites import RESID_POST, Site
from streamprobe.system.console import printable


def describe(probes: Probes) -> str:
    """Some ten lines: how many probes of what, the model and the data behind them, and a line to go on with."""
    about, columns = probes.about, probes.columns
    config = dict(about.get("config", {}))
    n = len(probes.sites) * len(columns)
    source = f" from {about['source']}" if "source" in about else ""
    places = "all layers" if _joined(probes) else f"{len(probes.sites)} layers"
    lines = [f"{n:,} {probes.kind} probes{source}, {places} x {len(columns)} columns"]
    rows: list[tuple[str, Any]] = [
        ("solver", probes.solver or "none said"),
        ("layers", _layers_of(probes)),
        ("labels", _listed(column.array for column in columns)),
        ("targets", _listed(column.target for column in columns)),
        ("lags", _listed(f"{column.lag:+d}" if column.lag else 0 for column in columns)),
        ("features", f"{probes.n_features:,}" + ", the model's hidden size" * _of_blocks(probes)),
    ]
    for name in ("model", "data"):
        if config.get(name):
            rows.append((name, _origin(config[name], about.get(f"{name}_fingerprint"))))
    if "prompt" in config:
        prompt = "the chat template" if config["prompt"] == "chat" else f"the prompt {config['prompt']!r}"
        rows.append(("reads", f"{config.get('support', 'assistant')} tokens, with {prompt}"))
    lines += [f"  {name:<9} {value}" for name, value in rows]
    real = [column for column in columns if not column.control]
    if real and probes.layers:
        one = next((column for column in real if column.lag > 0), real[0])
        label = f", label={one.label!r}" if one.label != real[0].label else ""
        layer = None if _joined(probes) else probes.layers[-1]
        place = f"layer={layer}, lag={one.lag}{label}, target={one.target!r}"
        direction = "" if hasattr(probes, "form") else "; probes.weight[l, k]"  # of linear ones
        lines.append(f"  use       l, k = probes.place({place}){direction}")
        lines.append("            probes.score(model, tokenizer, text).probabilities[:, l, k]")
    return "\n".join(printable(line).replace("\n", " ") for line in lines)


def _joined(probes: Probes) -> bool:
    """Whether one probe reads all layers."""
    return probes.sites != probes.reads


def _of_blocks(probes: Probes) -> bool:
    """Whether they read the outputs of blocks, and nothing else."""
    return all(site.point == RESID_POST for site in probes.reads)


def _layers_of(probes: Probes) -> str:
    """The layers where the probes stand, or those that all of them read."""
    listed = _listed(map(_layer, probes.reads))
    return f"{listed}, all read by each probe" if _joined(probes) else listed


def _layer(site: Site) -> Any:
    """A layer by its number, and another site by its name."""
    return site.layer if site.point == RESID_POST and site.layer is not None else site.name


def _listed(values: Iterable[Any]) -> str:
    return " ".join(str(value) for value in dict.fromkeys(values))


def _origin(name: Any, fingerprint: Any) -> str:
    return f"{name}, fingerprint {str(fingerprint)[:12]}" if fingerprint else str(name)
