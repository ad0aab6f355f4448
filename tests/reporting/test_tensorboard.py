"""What is written for TensorBoard is what was measured."""

import io

import numpy as np
import pytest
from PIL import Image
from probe_grids import LABEL, REAL, SCORED
from sklearn.metrics import precision_recall_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from streamprobe.reporting.tracking.tensorboard import POINTS


def test_heat_maps_are_small_and_drawn_of_the_last_pass(events: EventAccumulator) -> None:
    assert len(events.Tags()["images"]) == 3
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        assert [image.step for image in images] == [200]
        assert all(len(image.encoded_image_string) < 8_000 for image in images)
        shown = images[0]
        assert Image.open(io.BytesIO(shown.encoded_image_string)).size == (shown.width, shown.height)


def test_precision_over_recall_is_scikit_learns(events: EventAccumulator) -> None:
    for k, i in ((0, 1), (1, 0), (2, 0)):  # the best layer of each column, where one is known
        tag = f"precision/newton/{LABEL}/token lag{REAL[k].lag:+03d} best layer"
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
        tag = f"logits/newton/{LABEL}/token lag{column.lag:+03d} best layer (0 negatives, 1 positives)"
        found = {e.step: e.histogram_value for e in events.Histograms(tag)}
        valid, i = SCORED.valid[:, k], (1, 0, 0)[k]
        y, s = SCORED.targets[valid, k].numpy(), SCORED.scores[valid, i, k].numpy()
        assert set(found) == {0, 1}
        for kind, histogram in found.items():
            limits = np.array(histogram.bucket_limit)
            expected = [(s[y == kind] <= limit).mean() for limit in limits]
            np.testing.assert_allclose(np.cumsum(histogram.bucket), expected, atol=2e-3)


def test_histograms_fail_to_differ_without_the_classes(events: EventAccumulator) -> None:
    for column in REAL:
        tag = f"logits/newton/{LABEL}/token lag{column.lag:+03d} best layer (0 negatives, 1 positives)"
        negatives, positives = (np.array(e.histogram_value.bucket) for e in events.Histograms(tag))
        assert np.abs(negatives - positives).max() > 0.01


def test_hparams_hold_what_makes_runs_differ(events: EventAccumulator) -> None:
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    keys = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: keys[name].string_value or keys[name].number_value for name in keys} == {
        "layers": "3 12",
        "seed": 0,
        "quantization": "none",
    }
    assert events.Scalars("test/lift")[0].value == 0.25


def test_the_verdict_is_the_first_text_and_stays_as_it_is(events: EventAccumulator) -> None:
    """Markdown shows what is indented as it stands."""
    texts = [tag for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")]
    assert sorted(texts)[0] == "1 verdict/text_summary"
    [shown] = events.Tensors("1 verdict/text_summary")[0].tensor_proto.string_val
    assert shown.decode() == "    at no lag\n    | a | *b*"
