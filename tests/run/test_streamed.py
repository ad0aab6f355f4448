"""A stream with Adam, kinds and places, of whose chains a quarter is kept: against plain sums, and in all tools."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from builders import make_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamprobe.cli import main, train
from streamprobe.data.census import count_tokens
from streamprobe.data.tokenize import Chain
from streamprobe.probes.storage import find_probes, load_probes, read_about
from streamprobe.run.checkpoint import load_run
from streamprobe.run.streaming import loop
from streamprobe.run.streaming.learning import Learners, make_learners
from streamprobe.run.streaming.samples import Arrived, Samples
from streamprobe.system.csv_files import read_csv
from streamprobe.tools.hub import COLUMNS, make_card

pytestmark = pytest.mark.usefixtures("undrawn")
KINDS = ["linear", "meandiff", "ema4", "stack", "quad4", "mlp8", "attn2", "top_k4"]
LABEL, LAGS, LAYERS = "backtracking", [0, 4], [0, 2]
KEYS: dict[str, Any] = {
    "dtype": "float32",
    "layers": LAYERS,
    "sites": ["resid_post", "attn_out"],
    "kinds": KINDS,
    "lags": LAGS,
    "solvers": ["newton", "adam"],
    "seeds": 2,
    "controls": ["embed", "joint+chain", "permuted"],
    "bootstrap": 5,
    "max_passes": 30,
    "report_to": "none",
    "streaming": True,
    "reservoir_tokens": 4000,
    "round_tokens": 3000,
}
PLACE = ("solver", "kind", "site", "layer", "label", "target", "lag", "control")


class Streamed(NamedTuple):
    """A stream behind its end, and what the test saw of it."""

    folder: Path
    chains: list[Chain]  # of training
    learners: Learners
    samples: Samples

    @property
    def rows(self) -> list[dict[str, str]]:
        return rows_of(self.folder)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def places_of(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in PLACE) for row in rows_of(folder)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Path:
    """A config whose working directory holds its data."""
    folder = tmp_path_factory.mktemp("streamed")
    rows = make_rows(240, seed=19)
    (folder / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(KEYS | {"model": model_dir, "data": str(folder / "chains.jsonl")}))
    return path


@pytest.fixture(scope="module")
def streamed(config: Path) -> Iterator[Streamed]:
    chains: list[Chain] = []
    found: dict[str, Any] = {}
    add = Samples.add

    def take_note(samples: Samples, arrived: Arrived) -> None:
        found["samples"] = samples
        if arrived.split == "train":
            chains.append(arrived.chain)
        add(samples, arrived)

    def keep(*given: Any) -> Learners:
        found["learners"] = make_learners(*given)
        return found["learners"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "add", take_note)
        patch.setattr(loop, "make_learners", keep)
        assert train([str(config), "--output_dir", str(config.parent / "stream")]) == 0
    yield Streamed(config.parent / "stream", chains, **found)


def test_a_quarter_of_the_stream_is_kept(streamed: Streamed) -> None:
    all_tokens = sum(len(chain.ids) for chain in streamed.chains)
    kept = streamed.samples.reservoirs["train"]
    assert 0.15 < kept.tokens / all_tokens < 0.35 and not kept.holds_all


def test_probes_of_few_chains_are_judged_by_few(streamed: Streamed) -> None:
    for most, few in ((600, True), (10**6, False)):  # without few training chains, the negative control
        samples = Samples(most, 10**6, seed=3)
        for number, chain in enumerate(streamed.chains):
            samples.add(Arrived(chain, "test" if number % 10 else "train", number))
        trained, kept = samples.reservoirs["train"].tokens, samples.reservoirs["test"].tokens
        tested = sum(len(chain.ids) for chain in samples.splits()["test"])
        assert kept > 8 * trained
        assert (tested < kept) == few == bool(samples.cautions)
        assert not few or [line.split()[0] for line in samples.cautions] == ["judged", "WARNING"]
        assert not few or 3.5 * trained < tested <= 4 * trained


def test_it_has_the_rows_of_a_finite_run(streamed: Streamed, config: Path) -> None:
    finite = config.parent / "finite"
    fewer = ["--max_chains", "60", "--max_passes", "3"]
    assert train([str(config), "--streaming", "false", "--output_dir", str(finite), *fewer]) == 0
    assert places_of(streamed.folder) == places_of(finite)
    for row in streamed.rows:
        if not row["control"]:
            assert 0.2 < float(row["auroc"]) < 1 and row["n_positive"] != "0"


def test_probes_of_adam_and_newton_know_something_and_permuted_labels_nothing(streamed: Streamed) -> None:
    for solver in ("newton", "adam"):
        linear = [row for row in streamed.rows if row["kind"] == "linear" and row["lag"] == "0"]
        own = [row for row in linear if row["solver"] == solver]
        real = [float(row["auroc"]) for row in own if not row["control"] and row["site"] == "resid_post"]
        permuted = [float(row["auroc"]) for row in own if row["control"] == "permuted"]
        assert len(real) == len(LAYERS) and len(permuted) >= len(LAYERS)
        assert all(abs(area - 0.5) < 0.08 for area in permuted)
        assert min(real) > max(permuted), (solver, real, permuted)


def test_class_weights_are_those_of_all_chains_at_the_end(streamed: Streamed) -> None:
    columns = streamed.learners.adam[0].solver.columns
    own = list(dict.fromkeys(column._replace(seed=0) for column in columns if not column.control))
    of_all = count_tokens(streamed.chains, own, [LABEL])
    expected = dict(zip(own, ((of_all.valid - of_all.positive) / of_all.positive).tolist(), strict=True))
    for fed in streamed.learners.adam:
        for column, weight in zip(fed.solver.columns, fed.solver.positive_weight.tolist(), strict=True):
            if not column.control:
                assert weight == pytest.approx(expected[column._replace(seed=0)], rel=1e-6)
    kept = count_tokens(list(streamed.samples.reservoirs["train"].chains), own, [LABEL])
    of_kept = (kept.valid - kept.positive) / kept.positive
    assert (of_kept / torch.tensor(list(expected.values())) - 1).abs().max() > 1e-3  # the negative control
    state = load_run(streamed.folder)
    assert state and torch.equal(state.states["rates"]["valid"], streamed.learners.rates.valid)


@torch.no_grad()
def mean_differences(model_dir: str, chains: list[Chain]) -> Tensor:
    """Of positives less negatives over all tokens of some chains, [L, K, D] float64, by the whole model: block outputs."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    of_class: dict[tuple[int, int, bool], list[Tensor]] = {}
    for chain in chains:
        states = model(chain.ids[None], output_hidden_states=True).hidden_states
        for k, lag in enumerate(LAGS):
            for t in range(len(chain.ids) - lag):
                code = int(chain.codes[t + lag, 0])
                if chain.support[t] and chain.support[t + lag] and code >= 0:
                    for i, layer in enumerate(LAYERS):
                        of_class.setdefault((i, k, code > 0), []).append(states[layer + 1][0, t])
    means = {place: torch.stack(acts).double().mean(0) for place, acts in of_class.items()}
    return torch.stack(
        [torch.stack([means[i, k, True] - means[i, k, False] for k in range(len(LAGS))]) for i in range(len(LAYERS))]
    )


def test_mean_differences_are_those_of_all_tokens_of_the_stream(streamed: Streamed, model_dir: str) -> None:
    bank = load_probes(streamed.folder, kind="meandiff")
    own = bank.weight[: len(LAYERS)].double()  # of block outputs, which come first
    unit = own / own.norm(dim=-1, keepdim=True)
    of_all = mean_differences(model_dir, streamed.chains)
    of_kept = mean_differences(model_dir, list(streamed.samples.reservoirs["train"].chains))
    off = [1 - (unit * each).sum(-1) / each.norm(dim=-1) for each in (of_all, of_kept)]
    assert off[0].max() < 1e-6
    assert off[1].min() > 1e-4  # the negative control


def test_probes_mean_probabilities_by_the_rates_of_all_chains(streamed: Streamed) -> None:
    """Those of Adam: what its logits are moved by is the last class weight that it was trained with."""
    summed = streamed.learners.adam[0].solver
    kept = load_probes(streamed.folder, solver="adam")
    for k, column in enumerate(kept.columns):
        j = summed.columns.index(column)
        moved = kept.bias[0, k] - summed.bank().bias[0, j]
        assert float(moved) == pytest.approx(-float(summed.positive_weight[j].log()), abs=1e-5)


# --- what is done with its folder ---


def test_probes_are_judged_on_other_data_which_say_how_many_problems_the_stream_has_seen(
    streamed: Streamed, config: Path, tmp_path: Path
) -> None:
    rows, tested = make_rows(240, seed=19)[:40], {chain.id for chain in streamed.samples.reservoirs["test"].chains}
    seen = sum(row["task_id"] not in tested for row in rows)
    (tmp_path / "other.json").write_text(json.dumps(rows + make_rows(20, seed=77)))
    data = ["--data", str(tmp_path / "other.json"), "--max_chains", "60", "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(streamed.folder), *data]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["run"]["chains_seen"] == seen > 20
    assert places_of(tmp_path / "out") == places_of(streamed.folder)


def test_on_its_own_test_chains_which_its_checkpoint_holds_it_says_the_same(
    streamed: Streamed, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(streamed.folder, folder)
    hidden = config.parent / "chains.jsonl"
    hidden.rename(tmp_path / "away.jsonl")
    try:
        assert main(["evaluate", str(folder), "--split", "test", "--out", str(tmp_path / "out")]) == 0
    finally:
        (tmp_path / "away.jsonl").rename(hidden)
    for name in ("results.csv", "differences.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    given = ["--split", "test", "--data", str(hidden)]
    assert said_of(["evaluate", str(folder), *given], capsys).endswith("fix: drop --data")
    shutil.rmtree(folder / "checkpoint")
    assert "which holds the chains that it has kept" in said_of(["evaluate", str(folder), *given[:2]], capsys)


def said_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_its_folder_is_as_good_as_any_to_the_tools(
    streamed: Streamed, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, few = str(streamed.folder), ["--max_new_tokens", "3"]
    data = str(config.parent / "chains.jsonl")
    first = tmp_path / "first.jsonl"
    first.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:3]))
    assert main(["score", run, str(first), "--out", str(tmp_path / "scores.jsonl")]) == 0
    scored = [json.loads(line)["id"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(scored)) == ["alpha_0", "beta_0", "gamma_0"]
    assert main(["watch", run, "--site", "resid_post", "--prompt", "one two", "--json", *few]) == 0
    shutil.copytree(run, tmp_path / "copy")
    assert main(["report", run]) == 0 and main(["compare", run, str(tmp_path / "copy")]) == 0
    steer = ["steer", run, "--site", "resid_post", "--problems", "2", "--strengths", "0", "2", *few]
    assert main([*steer, "--json", str(tmp_path / "steered.json")]) == 0
    assert json.loads((tmp_path / "steered.json").read_text())
    assert said_of([*steer, "--data", data], capsys).endswith("fix: drop --data")
    card = make_card(
        read_about(find_probes(streamed.folder)), read_csv(streamed.folder / "results.csv", COLUMNS), "u/x"
    )
    assert "AUROC on held-out test chains" in card and "mlp8" in card


def test_its_config_runs_again_to_the_byte(config: Path, tmp_path: Path) -> None:
    fewer = ["--kinds", "linear", "--sites", "resid_post", "--solvers", "newton", "--max_tokens", "8000"]
    assert train([str(config), *fewer, "--output_dir", str(tmp_path / "first")]) == 0
    assert train([str(tmp_path / "first/config.yaml"), "--output_dir", str(tmp_path / "second")]) == 0
    for name in ("results.csv", "probes.safetensors", "controls.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_adam_alone_is_adam_beside_newton(streamed: Streamed, config: Path, tmp_path: Path) -> None:
    """Here of linear probes alone, whose steps no other kind bears on."""
    assert train([str(config), "--solvers", "adam", "--kinds", "linear", "--output_dir", str(tmp_path / "adam")]) == 0
    alone, beside = (load_probes(folder, solver="adam") for folder in (tmp_path / "adam", streamed.folder))
    assert torch.equal(alone.weight, beside.weight) and torch.equal(alone.bias, beside.bias)
    own = [row["auroc"] for row in streamed.rows if row["solver"] == "adam"]
    assert [row["auroc"] for row in rows_of(tmp_path / "adam")] == own
