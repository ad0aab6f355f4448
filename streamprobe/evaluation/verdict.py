"""The sentence that says what may be claimed: how far ahead a layer surely foresees what a section of the text brings.

Foresight is what a layer adds to the joint control (see `gains`), both in bits a token and within chains, by more than
chance gives after looking at all of its family's probes.  What a chain is like as a whole gives bits and orders no pair
of its own tokens; what orders these by chance gives no bits.

A family is the rows of one solver, label and target.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from streamprobe.evaluation.rows import BASELINE_EXACTNESS, JOINT_CHAIN, Judged, Row, group_by, is_beyond_linear, reads
from streamprobe.evaluation.significance import LEAST_CHAINS
from streamprobe.probes.sites import LINEAR

BEYOND = "text, position, sections so far and the chain's own rate"  # what the control that a gain is over is given
LOW_ENDS = ("gain_bits_low_corrected", "gain_within_low_corrected")
LEAST = dict(zip(LOW_ENDS, (1e-6, 0.0), strict=True))  # above which they are where there is foresight; in bits training
# leaves so much open: a control with gradient g is at most |g|^2 / (4 l2) above the least loss that it can have, 3.6e-7


def is_certain(row: Row) -> bool:
    """Whether the layer of a row surely foresees: ahead of the text, the low ends of both of its gains are above LEAST.

    A control foresees nothing, whatever its numbers.  A probe of another kind than linear is to be certainly above the
    linear one, too, so that none is named for what that holds.
    """
    if row.get("control") or row["lag"] <= 0 or not (row["kind"] == LINEAR or is_beyond_linear(row)):
        return False
    return all(row[name] > least for name, least in LEAST.items())


def furthest(certain: Sequence[Row]) -> Row:
    """Of the rows of probes that surely foresee the one that a verdict names."""
    return max(certain, key=itemgetter("lag", *LOW_ENDS))


def probe_of_verdict(rows: Sequence[Row]) -> Row:
    """The row of the probe that a run's verdict names, given those of its probes without controls.

    Where none surely foresees: of the lag nearest to 0, and of the first target that has it, the one with the highest
    AUROC.
    """
    certain = [row for row in rows if is_certain(row)]
    if certain:
        return furthest(certain)
    nearest = min(rows, key=lambda row: abs(row["lag"]))
    near = [row for row in rows if (row["lag"], row["target"]) == (nearest["lag"], nearest["target"])]
    return max(near, key=lambda row: -1.0 if math.isnan(row["auroc"]) else row["auroc"])


def verdicts(judged: Sequence[Judged], tolerance: float, whole_texts: Collection[str] = ()) -> list[str]:
    """For each solver, label and target a sentence: how many tokens ahead a layer surely foresees, and by how much.

    Where a claim rests on a probe whose gradient norm is above `tolerance`, or not known, the sentence ends in a
    warning.  whole_texts: the labels of which every text is all inside or all outside.
    """
    has_joint = any(each.row["control"] == JOINT_CHAIN for each in judged)
    found = []
    for (solver, label, target), own in group_by(judged, itemgetter("solver", "label", "target")):
        rows = [each.row for each in own]
        resampled = any(len(each.areas) for each in own)
        missing = _missing(rows, label in whole_texts, has_joint=has_joint, resampled=resampled)
        if missing:
            found.append(f"{label}: no verdict on {_thing(label, target)}, since {missing} [{solver}]")
        else:
            found.append(f"{label}: {_verdict(rows, label, target)}{_warning(rows, tolerance)}")
    return found


def _thing(label: str, target: str) -> str:
    """What is to be foreseen."""
    return {"token": f"a token inside {label}", "onset": "onset", "within": "a beginning"}[target]


def _ahead(target: str, *lags: int) -> str:
    """How far ahead: 4 tokens ahead, 4 to 12 tokens ahead, within the next 4 tokens."""
    count = " to ".join(str(lag) for lag in dict.fromkeys(lags)) + (" token" if lags == (1,) else " tokens")
    return f"within the next {count}" if target == "within" else f"{count} ahead"


def _layers(rows: Iterable[Row]) -> list[Row]:
    """The rows of probes that look ahead and are no controls."""
    return [row for row in rows if not row["control"] and row["lag"] > 0]


def _looked_at(rows: Iterable[Row]) -> list[Row]:
    """Those of which it can be said whether they surely foresee."""
    return [row for row in _layers(rows) if not any(math.isnan(row[name]) for name in LOW_ENDS)]


def _missing(rows: Sequence[Row], whole_text: bool, *, has_joint: bool, resampled: bool) -> str:
    """What a family lacks for a verdict; nothing where there is one."""
    ahead = _layers(rows)
    if whole_text:
        return "every text is all inside or all outside: nothing of it lies ahead"
    if not ahead:
        return "no lag is above 0 (--lags)"
    most = max(row["n_positive_chains"] for row in ahead)
    if most < LEAST_CHAINS:
        held = {0: "no test chain holds", 1: "at most 1 test chain holds"}.get(most, f"at most {most} test chains hold")
        return f"{held} a positive, and {LEAST_CHAINS} are needed"
    if not has_joint:
        return f"the control {JOINT_CHAIN} was not trained (--controls)"
    if all(math.isnan(row["gain_bits"]) and math.isnan(row["penalty"]) for row in ahead):
        if not all(math.isnan(row["nested_gradient_norm"]) for row in ahead):
            return f"training ended before a probe that reads {JOINT_CHAIN} and a layer was chosen (--max_passes)"
        return f"{ahead[0]['solver']} trains no probe that reads {JOINT_CHAIN} and a layer (--solvers newton)"
    if not resampled:
        return "nothing was resampled (--bootstrap)"
    return "" if _looked_at(rows) else f"fewer than {LEAST_CHAINS} test chains hold both a positive and a negative"


def _verdict(rows: Sequence[Row], label: str, target: str) -> str:
    """What is foreseen, without a warning."""
    looked = _looked_at(rows)
    certain, lags = [row for row in looked if is_certain(row)], sorted({row["lag"] for row in looked})
    noun = "probe" if len(looked) == 1 else "probes"
    corrected = f"[{looked[0]['solver']}, corrected for the {len(looked)} {noun} looked at]"
    if not certain:
        how_far = _ahead(target, lags[0], lags[-1])
        return f"nothing certain is foreseen of {_thing(label, target)}, {how_far} (beyond {BEYOND}) {corrected}"
    row = furthest(certain)
    nearer, further = [lag for lag in lags if lag < row["lag"]], [lag for lag in lags if lag > row["lag"]]
    parts = [_claim(row, label, target)]
    if nearer:
        parts.append(_nearer(certain, nearer, "within" if target == "within" else "at"))
    if further:
        parts.append(f"from {_ahead('', further[0]).removesuffix(' ahead')} on nothing is certain")
    return f"{'; '.join(parts)} {corrected}"


def _claim(row: Row, label: str, target: str) -> str:
    """That the probe of a row foresees, beyond what, and by how much."""
    thing, how_far, low = _thing(label, target), _ahead(target, row["lag"]), row[LOW_ENDS[0]]
    said = f"{thing} {how_far} is foreseen" if target == "within" else f"{thing} is foreseen {how_far}"
    return (
        f"{said} ({reads(row)}; beyond {BEYOND}), by {row['gain_bits']:.{_decimals(low)}f} bits a token, "
        f"at least {_at_least(low)}"
    )


def _nearer(certain: Sequence[Row], lags: Sequence[int], at: str) -> str:
    """What is said of the smaller lags: at which something is certain, and at which not."""
    known = {row["lag"] for row in certain}
    surely, rest = [lag for lag in lags if lag in known], [lag for lag in lags if lag not in known]
    said = [(f"also {at}", surely), (f"not {at}", rest)]
    return ", ".join(f"{words} {_listed(some)}" for words, some in said if some)


def _listed(lags: Sequence[int]) -> str:
    """1, 2 and 4."""
    *first, last = map(str, lags)
    return f"{', '.join(first)} and {last}" if first else last


def _decimals(low: float) -> int:
    """Decimals that show two digits of a low end above 0; three at least."""
    return max(3, 1 - math.floor(math.log10(low)))


def _at_least(low: float) -> str:
    """A low end, rounded down."""
    decimals = _decimals(low)
    return f"{math.floor(low * 10**decimals) / 10**decimals:.{decimals}f}"


def _warning(rows: Sequence[Row], tolerance: float) -> str:
    """What is said where a claim rests on a probe that is not converged.

    It rests on the probes that it names with their controls or, where nothing is certain, on all that were looked at.
    A probe without a penalty is the control itself, which was to be solved more exactly.
    """
    looked = sorted(_looked_at(rows), key=itemgetter("lag"))
    certain = [row for row in looked if is_certain(row)]
    named = [furthest(list(own)) for _, own in groupby(certain, itemgetter("lag"))] or looked
    lags = {row["lag"] for row in named}
    known = [(row["nested_gradient_norm"], tolerance) for row in named if row["penalty"] != math.inf]
    of_control = [row for row in rows if row["control"] == JOINT_CHAIN and row["lag"] in lags]
    known += [(row["gradient_norm"], tolerance / BASELINE_EXACTNESS) for row in of_control]
    above = [(norm / asked, norm, asked) for norm, asked in known if norm > asked]
    if above:
        _, norm, asked = max(above)
        return f" WARNING: not converged (gradient norm {norm:.1e}, tolerance {asked:.1e}): raise --max_passes"
    if any(math.isnan(norm) for norm, _ in known):
        return f" WARNING: perhaps not converged (gradient norm unknown, tolerance {tolerance:.1e}): raise --max_passes"
    return ""
