"""What probes of a kind are fed: the layers, and of what they add the logits of others at the right columns."""

import pytest
import torch
from builders import sites_of
from torch import Tensor

from streamprobe.activations.feed import Feed
from streamprobe.probes.sites import ALL_LAYERS
from streamprobe.run.kind_feeds import kind_feed, mixed_feed

LAYERS = [0, 2]


def feeds(folds: int = 1, control_columns: tuple[int, ...] = (0, 3)) -> tuple[Feed, Feed]:
    """The feed of nested probes, which are asked a few of the columns, and that of the layers."""

    def in_folds(columns: list[int]) -> tuple[Tensor, Tensor | None]:
        own = torch.tensor(columns).repeat(folds)
        return own, None if folds == 1 else torch.arange(folds).repeat_interleave(len(columns))

    (own, own_folds), (every, every_folds) = in_folds(list(control_columns)), in_folds([0, 1, 2, 3])
    nested = Feed("nested", sites_of(["joint+chain", *LAYERS]), 9, lambda batch: None, own, folds=own_folds)
    layers = Feed("layers", sites_of(LAYERS), 8, lambda batch: batch.acts, every, folds=every_folds)
    return nested, layers


def logits(feed: Feed, n_sites: int, folds: int) -> Tensor:
    """[2, S, K]: 100 times the fold and 10 times the site, and the number of the column; all that names a probe."""
    per_fold = feed.first_fold().columns
    at = torch.arange(folds)[:, None] * 100 + per_fold  # [F, k]
    return (torch.arange(n_sites)[:, None, None] * 10 + at).flatten(1).float().expand(2, -1, -1)


def test_a_kind_reads_what_linear_probes_do_by_its_own_name() -> None:
    _, layers = feeds()
    own = kind_feed(layers, "stack")
    assert own == layers._replace(name="stack") and own.features is layers.features


@pytest.mark.parametrize(("kind", "n_sites"), [("stack", 1), ("meandiff", 2)])
@pytest.mark.parametrize("folds", [1, 3])
def test_what_a_kind_adds_reads_logits_at_the_columns_of_the_joint_control(kind: str, n_sites: int, folds: int) -> None:
    nested, layers = feeds(folds)
    feed = mixed_feed(nested, layers, kind)
    assert (feed.name, feed.reads) == (f"nested {kind}", ("nested", kind))
    assert feed.sites == [nested.sites[0], *([ALL_LAYERS] if n_sites == 1 else layers.sites)]
    assert feed.n_features == len(LAYERS) + 1 and torch.equal(feed.columns, nested.columns)
    for scored in {folds, 1}:  # the probes of all folds, and their means
        said = {"nested": logits(nested, 3, scored)}
        found = feed.features(said | {kind: logits(layers, n_sites, scored)})
        assert torch.equal(found.nested, said["nested"])
        assert torch.equal(found.kind, logits(nested, n_sites, scored))


def test_a_kind_that_is_asked_other_columns_than_the_layers_is_read_at_its_own() -> None:
    nested, layers = feeds()
    own = kind_feed(layers, "stack")._replace(columns=torch.tensor([3, 0]))
    said = {"nested": logits(nested, 3, 1), "stack": logits(own, 1, 1)}
    feed = mixed_feed(nested, layers, "stack", own=own)
    assert torch.equal(feed.features(said).kind, logits(nested, 1, 1))
    with pytest.raises(RuntimeError):  # negative control: as if they were those of the layers
        mixed_feed(nested, layers, "stack").features(said)


def test_columns_are_right_fails_without_looking_for_them() -> None:
    nested, layers = feeds()
    said = {"nested": logits(nested, 3, 1), "stack": logits(layers, 1, 1)}
    same, _ = feeds(control_columns=(0, 1, 2, 3))
    assert torch.equal(mixed_feed(same, layers, "stack").features(said).kind, said["stack"])
    assert not torch.equal(mixed_feed(nested, layers, "stack").features(said).kind, said["stack"][..., :2])
