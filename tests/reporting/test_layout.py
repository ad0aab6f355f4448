"""Every chart of the Custom Scalars tab holds its own curves and no other."""

import re

from probe_grids import LABEL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2


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
        "best layer/lag+04",
        "control embed/lag+04",
        "control permuted/lag+04",
        "control persistence/lag+04",
        "control text/lag+04",
    ]
    assert held[title + "best layer and controls", "lag-04"][-1] == "control text/lag-04", "persistence looks ahead"
    assert len(held[title + "all lags, by control", "layer03 control permuted"]) == 3


def test_a_chart_fails_to_find_its_curve_without_escaping(events: EventAccumulator) -> None:
    tag = f"val_auroc/newton/{LABEL}/token/layer12/lag+04"
    assert tag in events.Tags()["scalars"] and not re.search(tag, tag)
