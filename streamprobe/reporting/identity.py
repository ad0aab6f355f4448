"""What a run is of, in a few words: the head of its report, and of a comparison with others."""

from collections.abc import Mapping
from typing import Any


def identity_of(run: Mapping[str, Any]) -> dict[str, str]:
    """What a run is of: model, data, date, sizes, and by which version; what its summary does not say is left out."""
    config, versions, splits = run["config"], run.get("versions", {}), run.get("splits", {})
    commit, _, changes = str(run.get("git_commit", "unknown")).partition("+")
    layers = " ".join(map(str, config.get("layers") or []))
    found = {
        "model": f"{config.get('model', '')}" + f", layers {layers}" * bool(layers),
        "data": str(config.get("data", "")),
        "date": str(run.get("date", "")),
        "chains": _sizes(splits, "chains", config.get("folds", 1)),
        "tokens": _sizes(splits, "tokens", config.get("folds", 1)),
        "streamprobe": f"{versions.get('streamprobe', '')}, commit {commit[:12]}" + " with changes" * bool(changes),
        "device": ", ".join(str(run[name]) for name in ("device", "dtype") if name in run),
    }
    return {name: value for name, value in found.items() if value}


def _sizes(splits: Mapping[str, Mapping[str, int]], name: str, folds: int) -> str:
    """How many of them all splits have, and each; where there are folds, the test chains are all."""
    if folds > 1 and splits:
        return f"{splits['test'][name]:,} in {folds} folds, all of them tested"
    counts = {split: own[name] for split, own in splits.items() if own[name]}
    each = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    return f"{sum(counts.values()):,}" + f" ({each})" * (len(counts) > 1) if counts else ""
