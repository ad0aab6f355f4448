"""What the probes of a run are fed: layers, and what is made by hand of the chains."""

from pathlib import Path

import pytest
import torch
from builders import inputs_of, setup_of

from streamprobe.controls.table import CONTROLS
from streamprobe.run.memory_plan import plan_run

KEYS = ["--layers", "0", "2", "--lags", "0", "4", "--labels", "backtracking", "--dtype", "float32"]
HAND_MADE = {"position": 29, "persistence": 58}


def setup(model_dir: str, chains_file: Path, *controls: str):
    return setup_of(["--model", model_dir, "--data", str(chains_file), *KEYS, "--controls", *controls])


def test_every_feed_says_how_many_of_its_features_are_made_by_hand(model_dir: str, chains_file: Path) -> None:
    """The last ones, which are none of a layer."""
    found = setup(model_dir, chains_file, *CONTROLS)
    feeds = {feed.name: feed for feed in found.feeds}
    assert list(feeds) == ["layers", "embeddings", "position", "persistence", "joint", "joint+chain"]
    assert {feeds[name].n_hand_made for name in ("layers", "embeddings")} == {0}
    known = len(found.inputs.dataset.section_labels)
    of_joint = 29 + (58 + 3) * known + 29
    by_hand = HAND_MADE | {"joint": of_joint, "joint+chain": of_joint + 2 * known}
    assert {name: feeds[name].n_hand_made for name in by_hand} == by_hand and known > 2
    width = found.reader.embedded.width
    batch = next(found.reader.read("test"))
    for name, feed in feeds.items():
        layers = 2 * width if name.startswith("joint") else 0
        assert feed.n_features == (by_hand[name] + layers if name in by_hand else 32)
        acts, targets, valid, extras = feed.of(batch)
        assert extras.fold is batch.fold and extras.chance is batch.chance
        assert acts.shape == (len(batch.chain), len(feed.sites), feed.n_features)
        assert targets.shape == valid.shape == (len(batch.chain), len(feed.columns))
    assert [found.inputs.columns[k].lag for k in feeds["joint"].columns] == [4]


def test_nothing_is_kept_for_controls_that_no_lag_asks_for(model_dir: str, chains_file: Path) -> None:
    argv = ["--model", model_dir, "--data", str(chains_file), *KEYS, "--lags", "-4", "0"]
    inputs = inputs_of(argv)
    assert list(inputs.controls.embedded) == ["embed", "text"] and inputs.controls.width == 1
    ahead = inputs_of([*argv, "4"])
    assert list(ahead.controls.embedded) == ["embed", "text", "order"] and ahead.controls.width > 20


@pytest.mark.parametrize("names", [["joint"], ["joint+chain"], ["embed", "joint"]])
def test_joint_controls_are_given_layers_that_no_control_is_trained_on(
    model_dir: str, chains_file: Path, names: list[str]
) -> None:
    found, whole = setup(model_dir, chains_file, *names), setup(model_dir, chains_file, *CONTROLS)
    feeds = {feed.name: feed for feed in found.feeds}
    own = ["embeddings"] * ("embed" in names)
    assert list(feeds) == ["layers", *own, names[-1]]
    assert [site.name for name in own for site in feeds[name].sites] == ["embed"] * len(own)
    assert [site.name for site in found.reader.sites[2:]] == [*names[:-1], "text", "order"]
    batch, other = next(found.reader.read("test")), next(whole.reader.read("test"))
    assert batch.acts.shape[1] == 2 + len(found.inputs.controls.embedded)
    [of_whole] = [feed for feed in whole.feeds if feed.name == names[-1]]
    assert torch.equal(feeds[names[-1]].features(batch), of_whole.features(other))
    plan = plan_run(found.config, found.inputs, found.backbone, found.feeds, shards=found.reader.shards, before=None)
    assert plan.sizes.layers == batch.acts.shape[1] and plan.sizes.side == batch.side.shape[1]
    assert plan.sizes.side == found.inputs.controls.width < feeds[names[-1]].n_hand_made / 5
