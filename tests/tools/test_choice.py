"""Which probe is meant where the user does not say: that of the verdict, and what he does say counts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamprobe.errors import InputError
from streamprobe.evaluation.rows import FIELDS
from streamprobe.evaluation.verdict import LOW_ENDS
from streamprobe.lags import Column
from streamprobe.probes.linear import ProbeBank
from streamprobe.probes.sites import layer_sites
from streamprobe.tools.choice import choose_all, choose_probe

COLUMNS = [Column("a", "token", 0), Column("a", "token", 8), Column("a", "onset", 8), Column("b", "token", 16)]
BANK = ProbeBank(layer_sites([1, 3]), COLUMNS, torch.zeros(2, 4, 5), torch.zeros(2, 4), solver="newton")


def write(folder: Path, rows: list[tuple[int, Column, float, str]]) -> Path:
    """results.csv of rows (layer, column, AUROC, corrected low end), and of a control that is better than all."""
    lines = [",".join(FIELDS)]
    for layer, column, area, low in rows:
        cells = {
            "kind": "linear",
            "site": "resid_post",
            "solver": "newton",
            "layer": layer,
            "label": column.label,
            "target": column.target,
            "lag": column.lag,
        }
        cells |= {"auroc": area, "lift_low_corrected": "0.1", **dict.fromkeys(LOW_ENDS, low)}
        for control in ("", "text"):
            lines.append(",".join(str((cells | {"control": control}).get(name, "")) for name in FIELDS))
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder


def chosen(folder: Path, **given) -> tuple[int, Column]:
    i, k = choose_probe(folder, BANK, **given)
    return BANK.layers[i], BANK.columns[k]


def test_it_is_the_probe_that_the_verdict_names(tmp_path):
    token, ahead, onset, other = COLUMNS
    rows = [(1, token, 0.9, "0.2"), (3, ahead, 0.8, "0.02"), (1, onset, 0.7, "0.03"), (3, onset, 0.95, "-0.1")]
    folder = write(tmp_path, [*rows, (1, other, 0.99, "0.3")])
    assert chosen(folder) == (1, onset)
    assert chosen(folder, target="token") == (3, ahead) and chosen(folder, lag=0) == (1, token)
    assert chosen(folder, label="b") == (1, other) and chosen(folder, layer=3) == (3, ahead)


@pytest.mark.parametrize("lacking", LOW_ENDS)
def test_a_probe_without_one_of_the_gains_is_not_that_of_the_verdict(tmp_path, lacking):
    """Nor one of a lag that does not look ahead."""
    token, ahead, onset, _ = COLUMNS
    rows = [(1, token, 0.9, "0.2"), (3, ahead, 0.8, "0.2"), (1, onset, 0.7, "0.2")]
    folder = write(tmp_path, rows)
    assert chosen(folder)[1].lag == 8
    lines = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
    for line in lines[1:]:
        line[FIELDS.index(lacking)] = "-0.1"
    (folder / "results.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    assert chosen(folder) == (1, token), "that of the lag nearest to 0"


def test_without_a_verdict_it_is_the_best_at_the_lag_nearest_to_0(tmp_path):
    token, ahead, *_ = COLUMNS
    folder = write(tmp_path, [(1, token, 0.6, "nan"), (3, token, 0.7, "-0.1"), (1, ahead, 0.9, "nan")])
    assert chosen(folder) == (3, token)


def test_a_layer_and_a_lag_need_no_results(tmp_path):
    assert chosen(tmp_path, layer=3, lag=8) == (3, COLUMNS[1])
    with pytest.raises(InputError, match=r"results\.csv, which cannot be read .*; fix: give --layer"):
        chosen(tmp_path)
    with pytest.raises(InputError, match="lag 5; expected one of 0 8"):
        chosen(tmp_path, lag=5)


def test_all_probes_are_those_that_have_what_is_given():
    bank = replace(BANK, weight=torch.randn(2, 4, 5), bias=torch.randn(2, 4), threshold=torch.rand(2, 4).double())
    acts = torch.randn(7, 2, 5)
    every = choose_all(bank)
    real = [k for k, column in enumerate(COLUMNS) if not column.control]
    assert every.columns == [COLUMNS[k] for k in real] and every.layers == [1, 3] and every.about is bank.about
    torch.testing.assert_close(every.scores(acts), bank.scores(acts)[..., real])
    one = choose_all(
        bank, layer=3, lag=COLUMNS[real[0]].lag, target=COLUMNS[real[0]].target, label=COLUMNS[real[0]].label
    )
    assert (
        one.columns == [COLUMNS[real[0]]] and one.layers == [3] and one.threshold.item() == bank.threshold[1, real[0]]
    )
    torch.testing.assert_close(one.scores(acts[:, 1:])[:, 0, 0], bank.scores(acts)[:, 1, real[0]])
    assert (one.scores(acts[:, :1]) - one.scores(acts[:, 1:])).abs().max() > 1e-3  # negative control: another layer


@pytest.mark.parametrize("given", [{"layer": 2}, {"lag": 99}, {"label": "x"}, {"target": "y", "layer": 1}])
def test_no_probes_of_what_is_given_is_refused(given):
    with pytest.raises(ValueError, match="which no probe has; expected layers 1 3 and columns of "):
        choose_all(BANK, **given)
