"""The whole program against sources whose truth is known: no claim where there is nothing, and the planted one found."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_rows, parse_annotations
from torch import Tensor, nn

from streamprobe.cli import train as main
from streamprobe.data.dataset import Dataset
from streamprobe.evaluation.verdict import LOW_ENDS
from streamprobe.run import reader

LAGS = ["0", "4", "8", "12"]


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


def launch(folder: Path, model_dir: str, seed: int, n: int, *argv: str) -> list[dict[str, str]]:
    """The rows of results.csv of a run over n chains that were annotated at random; its verdicts are in summary.json."""
    data = folder / f"chains-{seed}.json"
    data.write_text(json.dumps(annotate_at_random(make_rows(n, seed=100 + seed), seed)), encoding="utf-8")
    (folder / "run.yaml").write_text(f"model: {model_dir}\ndtype: float32\n", encoding="utf-8")
    keys = [
        "--data",
        str(data),
        "--layers",
        "0",
        "2",
        "--lags",
        *LAGS,
        "--targets",
        "onset",
        "--test_share",
        "0.5",
        "--output_dir",
        str(folder / f"run-{seed}"),
        "--seed",
        str(seed),
    ]
    assert main([str(folder / "run.yaml"), *keys, *argv]) == 0
    return list(csv.DictReader((folder / f"run-{seed}" / "results.csv").open()))


def claims(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The (layer, lag) that are said to foresee."""
    ahead = [row for row in rows if not row["control"] and int(row["lag"]) > 0]
    return [(row["layer"], row["lag"]) for row in ahead if all(float(row[name]) > 0 for name in LOW_ENDS)]


def test_nothing_is_claimed_of_a_model_that_knows_nothing(tmp_path: Path, model_dir: str) -> None:
    """20 seeds of random weights and labels that are independent of the text: 0.5 false alarms are to be expected."""
    alarms = one_by_one = 0
    for seed in range(20):
        keys = ("--max_passes", "3", "--bootstrap", "200", "--controls", "joint+chain")
        rows = launch(tmp_path, model_dir, seed, 60, *keys)
        alarms += bool(claims(rows))
        one_by_one += sum(float(row["auroc_low"]) > 0.5 for row in rows if not row["control"])
        sentences = json.loads((tmp_path / f"run-{seed}" / "summary.json").read_text())["run"]["verdicts"]
        assert ("nothing certain is foreseen of onset" in sentences[0]) == (not claims(rows))
    assert alarms <= 3  # more than 3 with a chance of 0.2%
    assert one_by_one > 0  # negative control: among 160 probes, some look good by themselves


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, ...], Tensor]]:
    """Chains by their first tokens: block 2 of the model adds a direction where the token 8 further begins a section."""
    onsets: dict[tuple[int, ...], Tensor] = {}
    load = reader.load_backbone

    def load_planted(*args: Any, **where: Any) -> nn.Module:
        model = load(*args, **where)
        seen: dict[str, Tensor] = {}
        direction = torch.randn(32, generator=torch.Generator().manual_seed(5))

        def remember(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            seen["ids"] = kwargs["input_ids"]

        def plant(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            planted = output.clone()
            for b, ids in enumerate(seen["ids"].tolist()):
                onset = onsets.get(tuple(ids[:25]))
                if onset is not None:  # else it is no chain, but the text that the model is tried with
                    planted[b, : len(onset) - 8] += 0.5 * onset[8:, None] * direction
            return planted

        model.register_forward_pre_hook(remember, with_kwargs=True)
        model.layers[2].register_forward_hook(plant)  # type: ignore[union-attr, index]
        return model

    monkeypatch.setattr(reader, "load_backbone", load_planted)
    take = Dataset.take_census

    def take_note(dataset: Dataset, columns: Any) -> Any:
        for chain in dataset.chains():
            onsets[tuple(chain.ids[:25].tolist())] = (chain.codes[:, 0] == 2).float()
        return take(dataset, columns)

    monkeypatch.setattr(Dataset, "take_census", take_note)
    yield onsets


def test_exactly_the_planted_direction_is_found(tmp_path: Path, model_dir: str, planted: dict) -> None:
    rows = launch(tmp_path, model_dir, 0, 100, "--max_passes", "10", "--bootstrap", "500")
    assert claims(rows) == [("2", "8")] and len(planted) == 100
    [sentence] = json.loads((tmp_path / "run-0" / "summary.json").read_text())["run"]["verdicts"]
    assert "onset is foreseen 8 tokens ahead (layer 2;" in sentence
    permuted = [float(row["auroc"]) for row in rows if row["control"] == "permuted"]
    assert max(abs(area - 0.5) for area in permuted) < 0.1
