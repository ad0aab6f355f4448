"""TensorBoard: what is written is what was measured, and every chart holds its own curves and no other."""

import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
from conftest import sites_of
from PIL import Image
from sklearn.metrics import precision_recall_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor

from streamprobe.evaluation.scores import Scored
from streamprobe.lags import Column
from streamprobe.reporting.tensorboard.heat_map import BLANK, CELL, LEVELS, draw, size
from streamprobe.reporting.tensorboard.layout import Board, make_boards, place
from streamprobe.reporting.tensorboard.writer import POINTS, Tracker

LABEL = "back+track (a|b)"  # what a regular expression would take for more than text


class Grid(NamedTuple):
    name: str
    sites: list[Any]
    columns: list[Column]


REAL = [Column(LABEL, "token", lag) for lag in (-4, 4, 40)]
GRIDS = [
    Grid(
        "newton", sites_of([3, 12]), [*REAL, *(c._replace(control="permuted") for c in REAL), REAL[0]._replace(seed=1)]
    ),
    Grid("newton", sites_of(["embed", "text"]), REAL),
    Grid("newton", sites_of(["persistence"]), REAL[1:]),
]


def values_of(grid: Grid, seed: int) -> Tensor:
    shape = (len(grid.sites), len(grid.columns))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """Two passes of two metrics, and the end of a run."""
    folder = tmp_path_factory.mktemp("events")
    tracker = Tracker(folder, GRIDS)
    for step in (100, 200):
        for number, grid in enumerate(GRIDS):
            tracker.probes("val_auroc", grid, values_of(grid, step + number), step)
            tracker.probes("val_average_precision", grid, values_of(grid, step + number).square(), step)
        tracker.maps(step)
    tracker.curves(GRIDS[0], SCORED, AREAS, 200)
    tracker.outcome({"layers": [3, 12], "seed": 0, "problem_column": "x", "quantization": None}, {"test/lift": 0.25})
    tracker.close()
    return EventAccumulator(str(folder), {"histograms": 0, "images": 0}).Reload()


RANDOM = torch.Generator().manual_seed(0)
SCORED = Scored(
    torch.randn(500, 2, 7, generator=RANDOM), torch.rand(500, 7, generator=RANDOM) < 0.2,
    torch.rand(500, 7, generator=RANDOM) < 0.9, torch.zeros(500), torch.zeros(500),
)  # fmt: skip
SCORED = SCORED._replace(targets=SCORED.targets & SCORED.valid)
AREAS = torch.tensor([[0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9], [0.7, 0.6, math.nan, 0.9, 0.9, 0.9, 0.9]])


def test_every_value_is_a_point_of_its_own_curve(events: EventAccumulator) -> None:
    for number, grid in enumerate(GRIDS):
        values = values_of(grid, 200 + number)
        for i, site in enumerate(grid.sites):
            for k, column in enumerate(grid.columns):
                tag = f"val_auroc/newton/{LABEL}/token/{place(site, column)}/lag{column.lag:+03d}"
                last = events.Scalars(tag)[-1]
                assert (last.step, last.value) == (200, pytest.approx(float(values[i, k])))


def test_charts_hold_their_curves_and_no_others(events: EventAccumulator) -> None:
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    held = {
        (category.title, chart.title): sorted(
            tag.removeprefix(f"val_auroc/newton/{LABEL}/token/")
            for tag in tags
            if re.search(chart.multiline.tag[0], tag)
        )
        for category in layout.category
        for chart in category.chart
    }
    title = f"val_auroc newton {LABEL} token: "
    assert held[title + "all layers, by lag", "lag+04"] == ["layer03/lag+04", "layer12/lag+04"]
    assert held[title + "all lags, by layer", "layer12"] == [f"layer12/lag{lag:+03d}" for lag in (4, 40, -4)]
    assert held[title + "best layer and controls", "lag+04"] == [
        f"{name}/lag+04" for name in
        ("best layer", "control embed", "control permuted", "control persistence", "control text")
    ]  # fmt: skip
    assert held[title + "best layer and controls", "lag-04"][-1] == "control text/lag-04", "persistence looks ahead"
    assert len(held[title + "all lags, by control", "layer03 control permuted"]) == 3
    careless = [tag for tag in tags if re.search(f"val_auroc/newton/{LABEL}/token/layer12/lag+04", tag)]
    assert careless == [], "negative control: text that is not escaped finds nothing"


def lift_by_loop(values: list[Tensor], i: int, k: int) -> float:
    """AUROC of layer i at lag k less that of the best control, permuted ones of its own layer only."""
    controls = [values[0][i, 3 + k], *values[1][:, k], *(values[2][:, k - 1] if k else [])]
    return float(values[0][i, k] - max(controls))


def test_the_lift_on_the_board_is_over_the_best_control() -> None:
    [board] = make_boards(GRIDS)
    values = [values_of(grid, number) for number, grid in enumerate(GRIDS)]
    for grid, own in zip(GRIDS[:2], values, strict=False):
        board.take("val_auroc", grid, own)
    assert np.isnan(board.lift()[:, 1:]).all(), "persistence is not known yet, so neither is the lift"
    assert not np.isnan(board.lift()[:, 0]).any()
    board.take("val_auroc", GRIDS[2], values[2])
    expected = [[lift_by_loop(values, i, k) for k in range(3)] for i in range(2)]
    np.testing.assert_allclose(board.lift(), expected)
    wrong = [[float(values[0][i, k] - values[1][0, k]) for k in range(3)] for i in range(2)]
    assert not np.allclose(board.lift(), wrong)  # negative control: over one control only


def test_without_controls_there_is_no_lift_and_no_map_of_it() -> None:
    board = Board(f"newton/{LABEL}/token", [Grid("newton", sites_of([3]), REAL)])
    assert np.isnan(board.lift()).all() and set(board.images()) == {"val_auroc", "val_average_precision"}


def test_heat_maps_are_small_and_drawn_after_every_pass(events: EventAccumulator) -> None:
    assert len(events.Tags()["images"]) == 3
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        assert [image.step for image in images] == [100, 200]
        assert all(len(image.encoded_image_string) < 8_000 for image in images)
        assert size(images[0].encoded_image_string) == (images[0].width, images[0].height)


def test_a_cell_has_the_colour_of_its_value() -> None:
    """Against matplotlib's viridis; the cell's corner is free of text."""
    values = np.array([[0.5, 0.75, 1.0], [0.625, math.nan, 2.0]])
    png = draw(values, ["layer00", "b"], ["-4", "+0", "+4"], 0.5, 1.0, "sequential")
    image = Image.open(io.BytesIO(png))
    height, width = CELL
    left = image.width - 3 * width
    colours, levels = np.asarray(image.convert("RGB")), np.asarray(image)
    for i, k in np.ndindex(values.shape):
        y, x = height * (i + 1) + 1, left + width * k + 1
        if math.isnan(values[i, k]):
            assert levels[y, x] == BLANK
            continue
        at = min(1.0, (values[i, k] - 0.5) / 0.5)
        expected = np.array(matplotlib.colormaps["viridis"](at)[:3]) * 255
        assert np.abs(colours[y, x] - expected).max() < 12
        assert levels[y, x] == round(at * (LEVELS - 1))
    assert (
        np.abs(colours[height + 1, left + 1] - np.array([253.0, 231, 37])).max() > 100
    )  # negative control: the other end


def test_the_largest_lift_fits_its_cell() -> None:
    for values in ([[1.0, 0.1]], [[-1.0]], [[float("nan"), 1.0]]):
        png = draw(np.array(values), ["a"], ["+0", "+8"][: len(values[0])], -0.2, 0.2, "diverging")
        assert size(png)[0] > CELL[1]


def test_precision_over_recall_is_scikit_learns(events: EventAccumulator) -> None:
    for k, i in ((0, 1), (1, 0), (2, 0)):  # the best layer of each column, where one is known
        tag = f"precision/newton/{LABEL}/token/lag{REAL[k].lag:+03d} best layer"
        data = np.array(events.Tensors(tag)[0].tensor_proto.float_val).reshape(6, POINTS)
        valid = SCORED.valid[:, k]
        y, s = SCORED.targets[valid, k].numpy(), SCORED.scores[valid, i, k].numpy()
        precision, recall, _ = precision_recall_curve(y, s)
        known = {round(float(r) * y.sum()): p for p, r in sorted(zip(precision, recall, strict=True))}
        np.testing.assert_allclose(data[4], [known[round(float(r) * y.sum())] for r in data[5]], rtol=1e-5)
        assert data[5, 0] == 1 and data[5, -1] == pytest.approx(1 / y.sum())
        np.testing.assert_allclose(data[:4].sum(0), valid.sum())
    assert not [tag for tag in events.Tags()["tensors"] if "permuted" in tag or "seed" in tag]


def test_histograms_are_of_negatives_then_positives(events: EventAccumulator) -> None:
    for k, column in enumerate(REAL):
        tag = f"logits/newton/{LABEL}/token/lag{column.lag:+03d} best layer (0 negatives, 1 positives)"
        found = {e.step: e.histogram_value for e in events.Histograms(tag)}
        valid, i = SCORED.valid[:, k], (1, 0, 0)[k]
        y, s = SCORED.targets[valid, k].numpy(), SCORED.scores[valid, i, k].numpy()
        assert set(found) == {0, 1}
        for kind, histogram in found.items():
            limits = np.array(histogram.bucket_limit)
            expected = [(s[y == kind] <= limit).mean() for limit in limits]
            np.testing.assert_allclose(np.cumsum(histogram.bucket), expected, atol=2e-3)
        assert np.abs(np.array(found[0].bucket) - found[1].bucket).max() > 0.01, "negative control"


def test_hparams_hold_what_makes_runs_differ(events: EventAccumulator) -> None:
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    keys = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: keys[name].string_value or keys[name].number_value for name in keys} == {
        "layers": "3 12", "seed": 0, "quantization": "none",
    }  # fmt: skip
    assert events.Scalars("test/lift")[0].value == 0.25


def test_a_value_that_is_not_a_number_is_no_point(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [GRIDS[1]])
    tracker.probes("val_auroc", GRIDS[1], torch.tensor([[0.5, math.nan, 1], [math.nan] * 3]), 1)
    tracker.maps(1)
    tracker.close()
    scalars = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert sorted(tag.split("token/")[1] for tag in scalars) == ["control embed/lag+40", "control embed/lag-04"]
