"""The curves of every probe are those of a plain reference, and its counts give the F1 of its row."""

import json
import math

import numpy as np
import pytest
import torch
from scored_chains import LENGTH, N_CHAINS
from sklearn.metrics import precision_recall_curve

from streamprobe.evaluation.metrics import rank
from streamprobe.evaluation.results import ScoredProbes
from streamprobe.evaluation.rows import Row
from streamprobe.reporting import curves
from streamprobe.reporting.curves import POINTS, collect, curve


def test_a_curve_goes_through_points_of_scikit_learns() -> None:
    random = np.random.default_rng(0)
    targets = random.random(400) < 0.3
    scores = np.round(random.normal(size=400) + targets, 1)  # with ties
    recall, precision = curve(rank(torch.tensor(scores)[:, None], torch.tensor(targets)), POINTS)
    reference = {(round(r, 9), round(p, 9)) for p, r in zip(*precision_recall_curve(targets, scores)[:2], strict=True)}
    found = [(round(r, 9), round(p, 9)) for r, p in zip(recall[0].tolist(), precision[0].tolist(), strict=True)]
    assert len(found) == POINTS and set(found) <= reference
    assert found == sorted(found, key=lambda point: point[0]) and found[-1][0] == 1
    assert np.diff([r for r, _ in found]).max() < 0.1, "evenly, but for ties"


def test_counts_are_those_behind_the_f1_of_the_row(groups: list[ScoredProbes], rows: list[Row]) -> None:
    found = collect(groups)
    real = {(row["layer"], row["lag"]): row for row in rows if not row["control"]}
    assert len(found) == len(real) == 4
    for each in found:
        row = real[each["layer"], each["lag"]]
        tp, fp, fn, tn = (each[name] for name in curves.COUNTS)
        assert (tp + fn, tp + fp + fn + tn) == (row["n_positive"], row["n_tokens"])
        assert 2 * tp / (2 * tp + fp + fn) == pytest.approx(row["f1"])
        assert len(each["recall"]) == len(each["precision"]) == POINTS


def test_controls_have_no_curve_and_what_is_not_known_is_null(groups: list[ScoredProbes]) -> None:
    assert collect(groups[1:]) == [], "the groups of controls"
    blind = groups[0]._replace(threshold=groups[0].threshold * math.nan)
    assert {each[name] for each in collect([blind]) for name in curves.COUNTS} == {None}
    never = blind._replace(scored=blind.scored._replace(targets=torch.zeros_like(blind.scored.targets)))
    assert all(each["recall"] == each["precision"] == [] for each in collect([never]))
    json.dumps(collect([never]), allow_nan=False)


def test_the_file_is_bounded_however_many_probes_there_are(
    groups: list[ScoredProbes], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(json.dumps(collect(groups), separators=(",", ":"))) / 4
    label = len(json.dumps(groups[0].columns[0].label))
    assert 140 * (size - label + 30) < 1e6 and N_CHAINS * LENGTH > POINTS
    monkeypatch.setattr(curves, "ROOM", 48)
    assert {len(each["recall"]) for each in collect(groups)} == {12}
    monkeypatch.setattr(curves, "ROOM", 1)
    assert {len(each["recall"]) for each in collect(groups)} == {curves.FEWEST}
