"""State that a class declares is saved as plain values and comes back in the containers it was in."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
import torch

from lightning_optim.core.stateful import Stateful


class Inner(Stateful):
    STATE = ("count",)

    def __init__(self, count=0):
        self._count = count


class Outer(Stateful):
    STATE = ("last", "seen", "recent", "by_group", "names", "peaks")
    PARTS = ("inner", "none")

    def __init__(self, none=None):
        self._last = None
        self._seen = set()
        self._recent = deque(maxlen=3)
        self._by_group = defaultdict(lambda: deque(maxlen=2))
        self._names = []
        self._peaks = {}
        self.inner, self.none = Inner(), none


def _filled():
    outer = Outer()
    outer._last = (3, "rollback")
    outer._seen = {("dead", "w"), ("stalled", "b")}
    outer._recent.extend([1.0, 2.0])
    outer._by_group["body"].extend([5.0, 6.0])
    outer._names.append("w")
    outer._peaks["body"] = 0.1
    outer.inner._count = 7
    return outer


def test_state_comes_back_in_its_containers(tmp_path):
    outer = _filled()
    torch.save(outer.state_dict(), tmp_path / "state.pt")
    other = Outer()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name in ("_last", "_seen", "_recent", "_by_group", "_names", "_peaks"):
        assert getattr(other, name) == getattr(outer, name)
        assert type(getattr(other, name)) is type(getattr(outer, name))
    assert other.inner._count == 7
    assert other.state_dict() == outer.state_dict()
    assert (other._recent.maxlen, other._by_group["body"].maxlen, other._by_group["new"].maxlen) == (3, 2, 2)


def test_a_saved_state_is_a_copy_and_so_is_a_loaded_one():
    outer, other = _filled(), Outer()
    state = outer.state_dict()
    other.load_state_dict(state)
    outer._recent.append(9.0)
    outer._peaks["head"] = 1.0
    other._names.append("v")
    other._by_group["body"].append(0.0)
    assert state == _filled().state_dict()


def test_a_part_that_is_missing_here_is_left_out_and_one_that_was_missing_there_starts_afresh():
    state = _filled().state_dict()
    assert state["none"] == {}
    with_part = Outer(none=Inner(count=2))
    with_part.load_state_dict(state)
    assert with_part.none._count == 2
    Outer().load_state_dict(with_part.state_dict())


def test_a_missing_key_is_an_error_and_changes_nothing():
    state = _filled().state_dict()
    del state["peaks"], state["inner"]
    outer = Outer()
    with pytest.raises(KeyError, match=r"state of Outer: 'peaks', 'inner' missing; it has 'last', .*another version"):
        outer.load_state_dict(state)
    assert outer.state_dict() == Outer().state_dict()
