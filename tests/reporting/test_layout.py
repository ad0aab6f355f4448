"""Every chart of the Custom Scalars tab holds its own curves and no other."""

import re

from probe_grids import GRIDS, LABEL, LAYERS, Grid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from streamprobe.probes.sites import Site
from streamprobe.reporting.tracking.layout import layout
from streamprobe.reporting.tracking.metric_grid import metric_grids
from streamprobe.reporting.tracking.tags import place, tag

TITLE = f"auroc validation newton {LABEL} token: "
START = f"auroc/validation/newton/{LABEL}/token "


def charts_of(events: EventAccumulator) -> dict[tuple[str, str], list[str]]:
    """The curves that the expression of each chart finds, without what they all begin with."""
    written = layout_pb2.Layout()
    written.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    return {
        (category.title.removeprefix(TITLE), chart.title): sorted(
            tag.removeprefix(START) for tag in tags if re.search(chart.multiline.tag[0], tag)
        )
        for category in written.category
        for chart in category.chart
    }


def test_by_default_charts_hold_the_best(events: EventAccumulator) -> None:
    held = charts_of(events)
    assert held["best layer and controls, by lag", "lag+04"] == ["lag+04 best control", "lag+04 best layer"]
    for side in ("best layer", "best control"):
        assert held["all lags", side] == sorted(f"{lag} {side}" for lag in ("lag-04", "lag+04", "lag+40"))
    training = "training: median and largest of all probes"
    assert held[training, "train_loss"] == ["train_loss/newton/largest", "train_loss/newton/median"]
    curves = [tag for tag in events.Tags()["scalars"] if not tag.startswith("test/")]
    assert len({tag for tags in held.values() for tag in tags}) == len(curves), "each curve is in a chart"


def test_with_every_probe_charts_hold_their_curves_and_no_others(all_events: EventAccumulator) -> None:
    held = charts_of(all_events)
    assert held["all layers, by lag", "lag+04"] == ["lag+04 layer03", "lag+04 layer12"]
    assert held["all lags, by layer", "layer12"] == [f"lag{lag:+03d} layer12" for lag in (4, 40, -4)]
    assert held["best layer and controls, by lag", "lag+04"] == [
        "lag+04 best layer",
        "lag+04 control embed",
        "lag+04 control permuted",
        "lag+04 control persistence",
        "lag+04 control text",
    ]
    assert held["best layer and controls, by lag", "lag-04"][-1] == "lag-04 control text", "persistence looks ahead"
    assert len(held["all lags, by control", "layer03 control permuted"]) == 3


def test_each_point_of_the_blocks_has_charts_of_its_own() -> None:
    points = [
        Site(f"layer{layer:02d}{name}", layer, point=point)
        for name, point in (("", "resid_post"), (" attn_out", "attn_out"))
        for layer in (3, 12)
    ]
    grid = Grid("newton", points, LAYERS.columns)
    charts = {category.title.removeprefix(TITLE): category.charts for category in layout(metric_grids([grid]), True)}
    tags = [
        tag(f"auroc/validation/newton/{LABEL}/token", c.lag, place(site, c)) for site in points for c in grid.columns
    ]
    for title, end in (("all layers, by lag", ""), ("attn_out of all layers, by lag", " attn_out")):
        held = [one for one in tags if re.search(charts[title]["lag+04"], one)]
        assert held == [f"{START}lag+04 layer{layer}{end}" for layer in ("03", "12")]


def test_a_few_charts_are_open_since_a_page_draws_them_all() -> None:
    for every in (False, True):
        categories = layout(metric_grids(GRIDS), every)
        assert {c.title.split(" ")[0] for c in categories if c.is_open} == {"auroc", "training:"}
        assert all(c.charts for c in categories)


def test_nothing_to_show_has_no_charts() -> None:
    assert layout([], True) == []


def test_a_chart_fails_to_find_its_curve_without_escaping(events: EventAccumulator) -> None:
    tag = f"{START}lag+04 best layer"
    assert tag in events.Tags()["scalars"] and not re.search(tag, tag)
