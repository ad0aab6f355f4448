"""The whole program against sources whose truth is known: no claim where there is nothing, and the planted one found."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import organisms
import pytest
from builders import make_rows, parse_annotations

from streamprobe.cli import train as main
from streamprobe.controls.table import CONTROLS
from streamprobe.evaluation import verdict
from streamprobe.evaluation.rows import JOINT_CHAIN
from streamprobe.evaluation.verdict import LEAST
from streamprobe.run import jobs

pytestmark = pytest.mark.usefixtures("undrawn")
Rows = list[dict[str, Any]]
SINGLE = [name for name, control in CONTROLS.items() if control.under_lift]
PLANTED = ("2", "8")  # layer and lag of what `organisms.planted` plants


class Finished(NamedTuple):
    """What a run said."""

    rows: Rows  # of results.csv
    verdict: str

    def above(self, least: Mapping[str, float]) -> list[tuple[str, str]]:
        """The (layer, lag) ahead of the text of which all these numbers are above these."""
        ahead = [row for row in self.rows if not row["control"] and int(row["lag"]) > 0]
        return [
            (row["layer"], row["lag"]) for row in ahead if all(float(row[name]) > low for name, low in least.items())
        ]

    @property
    def claims(self) -> list[tuple[str, str]]:
        """The (layer, lag) that are said to foresee; the sentence says the same, and of no probe that is unconverged."""
        found = self.above(LEAST)
        assert ("nothing certain is foreseen of onset" in self.verdict) == (not found)
        assert "WARNING" not in self.verdict
        return found

    @property
    def lifts(self) -> list[tuple[str, str]]:
        """The (layer, lag) that are surely above the best single control, of which claims were made before."""
        return self.above({"lift_low_corrected": 0})


def launch(
    folder: Path, model_dir: str, rows: Rows, *, seed: int, controls: list[str], more: Sequence[str] = ()
) -> Finished:
    """What a run over these chains says of layers 0 and 2; `more` options of it."""
    folder.mkdir(exist_ok=True)
    data, out = folder / f"chains-{seed}.jsonl", folder / f"run-{seed}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.yaml").write_text(f"model: {model_dir}\ndtype: float32\n", encoding="utf-8")
    keys = f"--layers 0 2 --lags 0 4 8 12 --targets onset --test_share 0.5 --validation_share 0.3 --bootstrap 200 --seed {seed}"
    files = ["--data", str(data), "--output_dir", str(out), "--report_to", "none"]
    passes = ["--max_passes", "60"]
    assert main([str(folder / "run.yaml"), *files, *keys.split(), *passes, *more, "--controls", *controls]) == 0
    [verdict] = json.loads((out / "summary.json").read_text())["run"]["verdicts"]
    return Finished(list(csv.DictReader((out / "results.csv").open())), verdict)


def annotate_at_random(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The same texts with sections of 2 to 9 words whose labels are drawn, so that nothing in the text tells them."""
    random = np.random.default_rng(seed)
    result = []
    for row in rows:
        words, parts = row["reasoning_chain"].split(), []
        while words:
            n = int(random.integers(2, 10))
            label = "backtracking" if random.random() < 0.15 or not parts else "deduction"
            parts.append(f'["{label}"]{" ".join(words[:n])}["end-section"]')
            words = words[n:]
        labels = [part.split('"')[1] for part in parts]
        shuffled = random.permutation(labels)  # one of them is the label, but it may be any
        annotated = " ".join(
            part.replace(f'["{old}"]', f'["{new}"]', 1) for part, old, new in zip(parts, labels, shuffled, strict=True)
        )
        plain = parse_annotations(annotated).text
        result.append(row | {"reasoning_chain": plain, "annotated_chain": annotated})
    return result


def test_nothing_is_claimed_of_a_model_that_knows_nothing(tmp_path: Path, model_dir: str) -> None:
    """20 seeds of random weights and labels that are independent of the text: 0.5 false alarms are to be expected."""
    alarms = one_by_one = 0
    for seed in range(20):
        rows = annotate_at_random(make_rows(60, seed=100 + seed), seed)
        run = launch(tmp_path, model_dir, rows, seed=seed, controls=[JOINT_CHAIN])
        alarms += bool(run.claims)
        one_by_one += sum(float(row["auroc_low"]) > 0.5 for row in run.rows if not row["control"])
    assert alarms <= 3  # more than 3 with a chance of 0.2%
    assert one_by_one > 0  # negative control: among 160 probes, some look good by themselves


def test_nothing_is_claimed_of_a_model_that_knows_rate_place_and_text_as_lifts_fail_to_see(
    tmp_path: Path, model_dir: str
) -> None:
    """20 organisms that foresee nothing, though block 2 knows the rate of a chain from its first token on."""
    claims, lifts = [], []
    for seed in range(20):
        chains = organisms.grow(300, seed)
        with organisms.planted([chain.rate for chain in chains]):
            rows = [chain.row for chain in chains]
            run = launch(tmp_path, model_dir, rows, seed=seed, controls=[*SINGLE, JOINT_CHAIN])
        claims.append(run.claims)
        lifts.append(run.lifts)
    assert sum(map(bool, claims)) <= 1, claims
    assert sum(map(bool, lifts)) >= 10, lifts  # negative control: the layer is above every single one in most runs


def test_the_planted_direction_is_found_and_nothing_else(tmp_path: Path, model_dir: str) -> None:
    found = []
    for seed in range(20):
        rows = [chain.row for chain in organisms.grow(150, 1000 + seed)]
        with organisms.planted(ahead=1.5) as told:
            run = launch(tmp_path, model_dir, rows, seed=seed, controls=["permuted", JOINT_CHAIN])
        found.append(run.claims)
        assert len(told) == 150
        if run.claims == [PLANTED]:
            assert "onset is foreseen 8 tokens ahead (layer 2;" in run.verdict
    assert sum(claims == [PLANTED] for claims in found) >= 18, found


def test_a_planted_direction_is_found_beside_rate_and_place(tmp_path: Path, model_dir: str) -> None:
    for seed in range(3):
        chains = organisms.grow(300, 2000 + seed)
        with organisms.planted([chain.rate for chain in chains], ahead=1.5):
            run = launch(tmp_path, model_dir, [chain.row for chain in chains], seed=seed, controls=[JOINT_CHAIN])
        assert run.claims == [PLANTED]


def test_no_gain_is_only_that_nested_probes_were_trained_further(
    tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An organism in which nothing is planted, and a claim of it where that control is solved less exactly instead."""
    rows = [chain.row for chain in organisms.grow(150, 1008)]
    run = launch(tmp_path, model_dir, rows, seed=8, controls=[JOINT_CHAIN])
    assert run.claims == []
    for module in (jobs, verdict):
        monkeypatch.setattr(module, "BASELINE_EXACTNESS", 0.1)
    assert launch(tmp_path / "other", model_dir, rows, seed=8, controls=[JOINT_CHAIN]).claims != []


def test_with_folds_nothing_is_claimed_where_nothing_is_foreseen_and_what_is_planted_is_found(
    tmp_path: Path, model_dir: str
) -> None:
    """Organisms as above, all of whose chains are tested."""
    claims = []
    for seed in range(8):
        chains = organisms.grow(200, 3000 + seed)
        with organisms.planted([chain.rate for chain in chains]):
            rows = [chain.row for chain in chains]
            run = launch(tmp_path, model_dir, rows, seed=seed, controls=[JOINT_CHAIN], more=["--folds", "3"])
        claims.append(run.claims)
    assert sum(map(bool, claims)) <= 1, claims
    for seed in range(8, 11):
        chains = organisms.grow(200, 3000 + seed)
        with organisms.planted([chain.rate for chain in chains], ahead=1.5):
            rows = [chain.row for chain in chains]
            run = launch(tmp_path, model_dir, rows, seed=seed, controls=[JOINT_CHAIN], more=["--folds", "3"])
        assert run.claims == [PLANTED]


def test_a_stream_of_which_a_quarter_is_kept_claims_nothing_where_nothing_is_foreseen_and_finds_what_is_planted(
    tmp_path: Path, model_dir: str
) -> None:
    """Organisms as above, whose probes and controls are trained on few chains and anchored by the means of all.

    With so many test chains lag 4 may be claimed beside what is planted, rightly: an onset 8 tokens ahead leaves less
    room for one before it.
    """
    stream = ["--streaming", "true", "--reservoir_tokens", "5000", "--round_tokens", "8000"]  # of 20,000
    claims = []
    for seed in range(11):
        planted = 1.5 if seed >= 8 else 0.0
        chains = organisms.grow(600, 4000 + seed)
        with organisms.planted([chain.rate for chain in chains], ahead=planted):
            rows = [chain.row for chain in chains]
            run = launch(tmp_path, model_dir, rows, seed=seed, controls=[JOINT_CHAIN], more=stream)
        claims.append(run.claims)
    assert sum(map(bool, claims[:8])) <= 1, claims
    assert all(PLANTED in found and {layer for layer, _ in found} == {"2"} for found in claims[8:]), claims
