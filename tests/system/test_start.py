"""Cycles of objects are left alone while a command starts, and found behind it."""

import gc
import weakref

import pytest

from streamprobe.system.start import no_collections


class Cycle:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.own = self


def make_many() -> weakref.ref[Cycle]:
    """One such object, and more than enough others for collections of all generations; what is left of the one."""
    gone = weakref.ref(Cycle())
    assert [[] for _ in range(200_000)]
    return gone


def test_nothing_is_collected_inside_and_all_behind():
    with no_collections():
        kept = make_many()
        assert kept() is not None
    gc.collect()
    assert kept() is None and gc.isenabled()


def test_objects_are_kept_fails_without_the_pause():
    """The negative control."""
    assert make_many()() is None


def test_collections_go_on_behind_an_error_and_stay_off_where_they_were():
    with pytest.raises(KeyError), no_collections():
        raise KeyError
    assert gc.isenabled()
    with no_collections():
        with no_collections():
            pass
        assert not gc.isenabled()
