"""Runs of several folds: as many separate runs at once, in which every chain is tested by probes of other chains."""

import csv
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from builders import COMMON, make_rows
from finished import results
from forked import forked
from torch import Tensor

from streamprobe.cli import main as streamprobe
from streamprobe.cli import train as main
from streamprobe.controls.embedding import EmbeddingLayers, WordBasis
from streamprobe.data import dataset
from streamprobe.data.splits import FoldPlace, fold_chains
from streamprobe.evaluation.scored_probes import ScoredProbes
from streamprobe.probes.kept import NESTED, KeptProbes, load_kept
from streamprobe.run import ending
from streamprobe.run.inputs import Inputs
from streamprobe.run.pass_end import PassEnd

F = 3
KEYS = {
    "dtype": "float32",
    "layers": [0, 2],
    "lags": [0, 4],
    "labels": ["backtracking"],
    "targets": ["token", "onset"],
    "max_passes": 100,
    "tolerance": 1e-6,
    "max_batch_tokens": 512,
    "bootstrap": 20,
    "validation_share": 0.2,
    "controls": ["position", "permuted", "joint+chain"],
    "report_to": "none",
}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory, model_dir: str, chains_file: Path) -> Iterator[Path]:
    """A folder with a config, in which all is done."""
    folder = tmp_path_factory.mktemp("folds")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(KEYS | {"model": model_dir, "data": str(chains_file)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def train(out: str, *argv: str) -> Path:
    assert main(["tiny.yaml", *argv, "--output_dir", out]) == 0
    return Path(out)


def rows_of(folder: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(folder) / "results.csv").open()))


def summary(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "summary.json").read_text())["run"]


def scored_in(out: str, *argv: str) -> list[ScoredProbes]:
    """What a run judges."""
    found: list[ScoredProbes] = []
    judge = ending.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ending, "judge", lambda probes, *rest, **more: found.extend(probes) or judge(probes, *rest, **more)
        )
        train(out, *argv)
    return found


class Crossed(NamedTuple):
    """What a run of F folds judges and keeps, and what separate runs do, each with a fold for its test chains."""

    scored: list[ScoredProbes]
    kept: KeptProbes
    separate: list[list[ScoredProbes]]
    kept_separately: list[KeptProbes]
    places: list[FoldPlace]  # of every chain


@pytest.fixture(scope="module")
def crossed(here: Path, chains_file: Path) -> Crossed:
    """Controls of all runs are given the principal directions of the same embeddings."""
    scored, separate = scored_in("kept", "--folds", str(F)), []
    problems = [row["problem"] for row in json.loads(chains_file.read_text())]
    places = fold_chains(problems, folds=F, validation_share=KEYS["validation_share"])
    words = WordBasis(**load_kept(Path("kept")).words)
    for fold in range(F):
        splits = ["test" if place.fold == fold else place.split for place in places]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "split_chains", lambda *_, splits=splits, **__: splits)
            patch.setattr(
                EmbeddingLayers, "fitted", lambda embedding, _, *rest: EmbeddingLayers(embedding, words, *rest)
            )
            separate.append(scored_in(f"separate-{fold}"))
    kept = [load_kept(Path(f"separate-{fold}")) for fold in range(F)]
    return Crossed(scored, load_kept(Path("kept")), separate, kept, places)


def real(probes: ScoredProbes) -> list[int]:
    """The columns that ask for the data's own labels."""
    return [k for k, column in enumerate(probes.columns) if not column.control]


def logits(probes: ScoredProbes, chains: list[int], i: int, k: int) -> Tensor:
    """At site i and column k, of the tokens of these chains that are asked, in their order."""
    scored = probes.scored
    asked = scored.valid[:, k] & torch.isin(scored.chain, torch.tensor(chains))
    order = (scored.chain * 10_000 + scored.token)[asked].argsort()
    return scored.scores[asked, i, k][order]


def test_every_chain_is_scored_as_by_a_run_of_which_its_fold_is_the_test(crossed: Crossed) -> None:
    others = 0.0
    for number, ours in enumerate(crossed.scored):
        assert not any(column.fold for column in ours.columns)
        for fold in range(F):
            chains = [c for c, place in enumerate(crossed.places) if place.fold == fold]
            theirs = crossed.separate[fold][number]
            assert theirs.sites == ours.sites and theirs.feed == ours.feed
            for k in real(ours):
                for i in range(len(ours.sites)):
                    own, expected = logits(ours, chains, i, k), logits(theirs, list(range(len(chains))), i, k)
                    own, expected = own - ours.half[k], expected - theirs.half[k]  # whose priors are others
                    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)
                    if not fold and ours.feed != NESTED:  # negative control: as other folds' probes would have it
                        bank = crossed.kept_separately[1].final[number].bank
                        others = max(
                            others, float((bank.bias[i, k] - crossed.kept.final[number].bank.bias[i, k]).abs())
                        )
    assert others > 0.01


def test_what_is_kept_is_the_mean_of_separate_runs(crossed: Crossed) -> None:
    for number, ours in enumerate(crossed.kept.final):
        theirs = [kept.final[number] for kept in crossed.kept_separately]
        columns = [k for k, column in enumerate(ours.bank.columns) if not column.control]
        for name, tensor in ours.bank.tensors().items():
            found = [each.bank.tensors()[name].double() for each in theirs]
            if name == "bias":  # whose priors are others
                found = [one + (ours.half - each.half) for one, each in zip(found, theirs, strict=True)]
            mean = torch.stack(found).mean(0)
            scale = mean.abs().amax()
            assert ((tensor.double() - mean)[:, columns].abs().amax() / scale) < 1e-4, (ours.feed, name)
        assert torch.equal(ours.gradient_norm.isnan(), theirs[0].gradient_norm.isnan())
    assert len(crossed.kept.seen) == len(crossed.places)


def test_all_chains_are_tested_and_intervals_are_narrower(crossed: Crossed) -> None:
    n = len(crossed.places)
    for row, one in zip(rows_of("kept"), rows_of("separate-0"), strict=True):
        assert int(row["n_tokens"]) > 2 * int(one["n_tokens"]) and int(row["n_chains"]) == n, row
    width = [
        torch.tensor([float(row["auroc_high"]) - float(row["auroc_low"]) for row in rows_of(out)]).nanmean()
        for out in ("kept", "separate-0")
    ]
    assert width[0] < 0.8 * width[1]
    about = summary("kept")
    assert [about["splits"][name]["chains"] for name in ("train", "validation", "test")] == [
        *(sum(place.split == name for place in crossed.places) for name in ("train", "validation")),
        n,
    ]


def test_streamed_activations_give_the_same_and_the_model_reads_kept_ones_once() -> None:
    argv = ["--folds", str(F), "--tolerance", "1e-5", "--controls", "position"]
    kept, streamed = train("few", *argv), train("streamed", *argv, "--memory_gb", "0.001")
    for row, other in zip(rows_of(kept), rows_of(streamed), strict=True):
        assert float(row["auroc"]) == pytest.approx(float(other["auroc"]), abs=1e-3, nan_ok=True)
    cost = summary(kept), summary(streamed)
    assert "kept" in cost[0]["activations"] and "streamed" in cost[1]["activations"]
    assert cost[0]["model_tokens"] < 1.1 * cost[0]["splits"]["test"]["tokens"] < cost[1]["model_tokens"] / 5


def random_texts(n: int, seed: int) -> list[dict[str, Any]]:
    """Texts with a label each that nothing tells."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(COMMON, 20)) + "." for _ in range(n)]
    return [{"problem": f"{i}?", "response": text, "odd": bool(random.random() < 0.5)} for i, text in enumerate(texts)]


def test_a_probe_that_knows_nothing_ranks_no_folds_as_it_does_without_a_common_prior(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The AUROC of the place in texts of one label each, over four draws."""
    argv = ["--labels", "odd", "--targets", "token", "--lags", "0", "--controls", "position", "--folds", "5"]

    def mean(out: str) -> float:
        found = []
        for seed in range(4):
            Path(f"texts-{seed}.json").write_text(json.dumps(random_texts(60, seed)))
            rows = rows_of(train(f"{out}-{seed}", "--data", f"texts-{seed}.json", *argv))
            found += [float(row["auroc"]) for row in rows if row["control"] == "position"]
        return float(np.mean(found))

    common = mean("common")
    assert abs(common - 0.5) < 0.06
    monkeypatch.setattr(Inputs, "prior_of", lambda inputs, feed: -inputs.positive_weight_of(feed).log())
    assert mean("own") < common - 0.05


def killed_after_pass(number: int) -> Callable[[], None]:
    def prepare() -> None:
        end = PassEnd.__call__

        def deadly(self: PassEnd, done: Any) -> None:
            end(self, done)
            if self.checkpoints.offered:
                self.checkpoints.write(self.checkpoints.offered)
                self.checkpoints.wait()
            if done.passes == number:
                os.kill(os.getpid(), signal.SIGKILL)

        PassEnd.__call__ = deadly  # type: ignore[method-assign]  # in a process of its own

    return prepare


@pytest.mark.parametrize("solvers", [["newton"], ["adam"]], ids=str)
def test_killed_and_resumed_it_ends_as_a_straight_run(solvers: list[str]) -> None:
    argv = ["tiny.yaml", "--folds", "3", "--solvers", *solvers, "--max_passes", "6", "--output_dir", "killed"]
    assert main(argv) == 0
    Path("killed").rename(straight := f"straight-{solvers[0]}")
    [done] = forked(argv, prepare=killed_after_pass(5))
    assert done.status == -signal.SIGKILL
    [done] = forked([*argv, "--resume"])
    assert done.status == 0 and "resumed   after pass" in done.out
    again = results("killed")
    assert [name for name, content in results(straight).items() if content != again[name]] == []
    Path("killed").rename(f"killed-{solvers[0]}")


def test_other_folds_are_another_run(crossed: Crossed) -> None:
    [done] = forked(["tiny.yaml", "--folds", "4", "--output_dir", "kept", "--resume"])
    assert "folds" in done.line


def test_what_is_kept_is_judged_on_other_data_and_not_on_its_own(crossed: Crossed, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(make_rows(20, seed=9)))
    assert streamprobe(["evaluate", "kept", "--data", str(other), "--out", str(tmp_path / "judged")]) == 0
    assert {row["n_chains"] for row in rows_of(tmp_path / "judged")} <= {"19", "20"}
    capsys.readouterr()
    assert streamprobe(["evaluate", "kept", "--split", "test", "--out", str(tmp_path / "own")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a run of 3 folds" in said and "--data" in said


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--folds", "0"], ["folds 0", "1 .. 20"]),
        (["--folds", "21"], ["folds 21", "1 .. 20"]),
        (["--folds", "five"], ["folds", "five"]),
        (["--folds", "3", "--validation", "test"], ["folds 3 with validation test", "drop --folds or --validation"]),
        (["--folds", "3", "--split", "category", "--test_categories", "alpha"], ["folds 3 with split category"]),
        (["--folds", "20", "--max_chains", "10"], ["20 folds of 10 chains, 10 of them empty", "--folds"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_the_user_got_wrong_is_told_in_one_line(argv: list[str], words: list[str]) -> None:
    [done] = forked(["tiny.yaml", *argv, "--output_dir", "wrong"])
    assert all(word in done.line for word in words), done.err
    assert not Path("wrong").exists()
