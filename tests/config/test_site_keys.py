"""The keys `sites` and `hookpoints`: what both ask for, in one way or another, and what cannot be."""

import pytest

from streamprobe.config.site_keys import Asked, sort_sites
from streamprobe.errors import InputError

NONE = ["none"]


@pytest.mark.parametrize(
    ("sites", "hookpoints", "expected"),
    [
        (["resid_post"], NONE, Asked(["resid_post"], NONE)),
        (["hook_attn_out", "mlp_out"], NONE, Asked(["attn_out", "mlp_out"], NONE)),
        (["blocks.3.hook_attn_out"], NONE, Asked(NONE, ["blocks.3.hook_attn_out"])),
        (["resid_pre"], ["hook_attn_out", "*.mlp"], Asked(["resid_pre", "attn_out"], ["*.mlp"])),
        (NONE, ["*.mlp"], Asked(NONE, ["*.mlp"])),
    ],
)
def test_both_keys(sites: list[str], hookpoints: list[str], expected: Asked) -> None:
    found = sort_sites(sites, hookpoints)
    assert found == expected
    assert sort_sites(found.points, found.patterns) == found  # as a config that a run wrote is read again
    assert found.is_usual == (sites == ["resid_post"])


@pytest.mark.parametrize(
    ("sites", "hookpoints", "said"),
    [
        (["atn_out"], NONE, "^sites atn_out; expected attn_out, the nearest one"),
        (["*.z"], NONE, "^sites [*].z; expected one of resid_pre, .* or name a module by --hookpoints"),
        (["mlp_out", "hook_mlp_out"], NONE, "^sites mlp_out mlp_out with a repetition"),
        (["mlp_out"], ["a", "a"], "^hookpoints a a with a repetition"),
        (["none", "mlp_out"], NONE, "^sites none mlp_out; expected none alone"),
        (NONE, NONE, "^sites none with hookpoints none; expected one of them"),
        ([], NONE, "^no sites"),
        (NONE, [""], "^hookpoints with an empty pattern"),
    ],
)
def test_what_cannot_be(sites: list[str], hookpoints: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sort_sites(sites, hookpoints)
