"""Snapshots of modules that have changed since, and snapshots on disk: when it is full, damaged, or we are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_optim.divergence.snapshots import OptimizerState, Snapshot, SnapshotPair, StateDict, Tensors
from tests.helpers import file_size_limit


class Buffers(nn.Module):
    """A weight, and a buffer with a value."""

    cache: Tensor | None

    def __init__(self, cache: Tensor | None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("cache", cache)


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (None, torch.full((4,), 7.0), ["cache"]),
        (torch.ones(4), None, ["cache"]),
        (torch.ones(4), torch.full((12,), 7.0), ["cache"]),
        (torch.ones(1), torch.full((4,), 7.0), ["cache"]),
        (torch.ones(1, 4), torch.full((3, 4), 7.0), ["cache"]),
        (torch.ones(()), torch.full((1,), 7.0), ["cache"]),
        (torch.full((4,), 0.5), torch.full((4,), 7), ["cache"]),
        (torch.ones(1).expand(4), torch.full((1,), 7.0).expand(4), ["cache"]),
        (torch.ones(1).expand(4), torch.ones(1).expand(4), []),
        (torch.eye(3).to_sparse(), torch.eye(3), ["cache"]),
    ],
    ids=["new", "gone", "longer", "broadcasts", "rows", "0-d", "integer", "expanded", "expanded-same", "dense"],
)
def test_what_fits_is_restored_and_the_rest_is_left_and_named(
    before: Tensor | None, after: Tensor | None, left: list[str]
) -> None:
    module = Buffers(before)
    parts, snapshot = [Tensors(lambda: [module])], Snapshot()
    snapshot.capture(parts, 0)
    weight = module.linear.weight.detach().clone()
    module.linear.weight.data.zero_()
    module.cache = after
    was = None if after is None else after.clone()
    assert snapshot.restore(parts) == left
    assert torch.equal(module.linear.weight, weight)
    assert after is None or (was is not None and torch.equal(after, was))


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.ones(4), torch.full((4,), 7.0)), (torch.ones(4), torch.full((4,), 7.0, dtype=torch.bfloat16))],
)
def test_a_buffer_that_was_assigned_anew_is_restored(before: Tensor, after: Tensor) -> None:
    module = Buffers(before)
    parts, snapshot = [Tensors(lambda: [module])], Snapshot()
    snapshot.capture(parts, 0)
    module.cache = after
    assert snapshot.restore(parts) == []
    assert torch.equal(after.float(), torch.ones(4))


def test_a_sparse_buffer_is_restored_and_counted() -> None:
    module = Buffers(torch.eye(3).to_sparse())
    parts, snapshot = [Tensors(lambda: [module])], Snapshot()
    snapshot.capture(parts, 0)
    assert snapshot.nbytes == 4 * 8 + 3 * (4 + 16)
    module.cache = torch.zeros(3, 3).to_sparse()
    assert snapshot.restore(parts) == []
    assert torch.equal(module.cache.to_dense(), torch.eye(3))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("way", ["prune", "unprune", "parametrize"])
def test_a_parameter_that_is_renamed_is_restored(way: str) -> None:
    module = Buffers(None)
    if way == "unprune":
        prune.l1_unstructured(module.linear, "weight", amount=0.5)
    weight: Any = dict(module.linear.named_parameters())["weight_orig" if way == "unprune" else "weight"]
    parts, snapshot = [Tensors(lambda: [module])], Snapshot()
    snapshot.capture(parts, 0)
    before = weight.detach().clone()
    if way == "prune":
        prune.l1_unstructured(module.linear, "weight", amount=0.5)
    elif way == "unprune":
        prune.remove(module.linear, "weight")
    else:
        parametrize.register_parametrization(module.linear, "weight", Halved())
    weight.data.zero_()
    assert snapshot.restore(parts) == ([] if way == "parametrize" else ["linear.weight_mask"])
    assert torch.equal(weight, before)


def test_a_parameter_in_the_place_of_another_is_not_mistaken_for_it() -> None:
    module = Buffers(None)
    parts, snapshot = [Tensors(lambda: [module])], Snapshot()
    snapshot.capture(parts, 0)
    old = module.linear.weight
    module.kept, before = old, old.detach().clone()
    module.linear.weight = nn.Parameter(torch.full((2, 3), 7.0))
    old.data.zero_()
    assert snapshot.restore(parts) == ["linear.weight (new)"]
    assert torch.equal(old, before)
    assert torch.equal(module.linear.weight, torch.full((2, 3), 7.0))


def test_the_state_of_each_parameter_follows_it_when_others_are_added_before_it() -> None:
    first, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([first], lr=0.1, momentum=0.9)
    first.grad = torch.full((3,), 2.0)
    optimizer.step()
    parts, snapshot = [OptimizerState(optimizer)], Snapshot()
    snapshot.capture(parts, 0)
    optimizer.param_groups[0]["params"].insert(0, late)
    late.grad = torch.full((3,), 5.0)
    optimizer.step()
    assert snapshot.restore(parts) == []
    assert torch.equal(optimizer.state[first]["momentum_buffer"], torch.full((3,), 2.0))
    assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.full((3,), 5.0))


def test_an_object_that_refuses_its_former_state_is_named_and_the_others_are_restored() -> None:
    def refuse(state: Any) -> None:
        raise KeyError("no such key")

    module = nn.Linear(1, 1, bias=False)
    parts = [StateDict(dict, refuse, "the scheduler"), Tensors(lambda: [module])]
    snapshot = Snapshot()
    snapshot.capture(parts, 0)
    before = module.weight.item()
    module.weight.data.zero_()
    (left,) = snapshot.restore(parts)
    assert left.startswith("the scheduler (KeyError")
    assert module.weight.item() == before


# On disk.


@pytest.fixture
def module() -> nn.Linear:
    return nn.Linear(64, 64)


def set_to(module: nn.Linear, value: float) -> None:
    module.weight.data.fill_(value)


@pytest.mark.parametrize("limit", [100, 5000, 16000])
def test_after_a_full_disk_the_snapshot_before_is_used(module: nn.Linear, tmp_path: Path, limit: int) -> None:
    errors: list[Exception] = []
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("disk", clean=4, folder=tmp_path, on_loss=errors.append)
    set_to(module, 1.0)
    pair.capture_first(parts, 0)
    assert pair.good is not None
    set_to(module, 2.0)
    with file_size_limit(limit):
        pair.capture(parts, 10)
        pair.confirm(14)
    assert len(errors) == 1
    assert pair.good is not None
    assert pair.good.step == 0
    assert pair.restore(parts) == []
    assert module.weight[0, 0].item() == 1.0
    pair.capture(parts, 20)  # There is room again.
    pair.confirm(24)
    assert pair.good.step == 20
    pair.close()


def test_a_first_snapshot_that_is_lost_is_none(module: nn.Linear, tmp_path: Path) -> None:
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("disk", clean=4, folder=tmp_path / "is not there")
    pair.capture_first(parts, 0)
    assert pair.good is None
    assert pair.restore(parts) is None
    (tmp_path / "is not there").mkdir()
    pair.capture(parts, 10)
    pair.confirm(14)
    assert pair.restore(parts) == []
    pair.close()


def test_a_snapshot_that_is_lost_on_another_rank_is_lost_on_all(module: nn.Linear, tmp_path: Path) -> None:
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("disk", 4, tmp_path, agree=lambda whole: False)
    pair.capture_first(parts, 0)
    assert pair.good is None
    pair.close()


@pytest.mark.parametrize("damage", [0, 1000])
def test_a_file_that_cannot_be_read_changes_nothing(module: nn.Linear, tmp_path: Path, damage: int) -> None:
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("disk", clean=4, folder=tmp_path)
    pair.capture_first(parts, 0)
    assert pair.good is not None
    assert pair.good._file is not None
    os.ftruncate(pair.good._file.fileno(), damage)
    set_to(module, 3.0)
    assert pair.restore(parts) is None
    assert module.weight[0, 0].item() == 3.0
    assert pair.good is None
    pair.close()


def test_a_disk_without_room_is_not_filled(module: nn.Linear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.divergence.snapshots.snapshot.free_disk", lambda folder: 10_000)
    snapshot = Snapshot("disk", tmp_path)
    snapshot.capture([Tensors(lambda: [module])], 0)
    assert "16.6 kB" in str(snapshot.error)
    assert snapshot._file is None


@pytest.mark.skipif(os.name != "posix", reason="files without a name")
def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    program = """
        import os, signal, torch
        from lightning_optim.divergence.snapshots import Snapshot, Tensors
        snapshot = Snapshot("disk")
        snapshot.capture([Tensors(lambda: [torch.nn.Linear(64, 64)])], 0)
        assert snapshot.error is None
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError, TypeError])
@pytest.mark.parametrize("memory", ["cpu", "device", "disk"])
def test_a_copy_that_fails_costs_that_snapshot_only(
    module: nn.Linear, memory: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = []
    parts, pair = [Tensors(lambda: [module])], SnapshotPair(memory, clean=4, on_loss=errors.append)
    set_to(module, 1.0)
    pair.capture_first(parts, 0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", fail)
        pair.capture(parts, 10)
    pair.confirm(14)
    assert [type(e) for e in errors] == [error]
    set_to(module, 2.0)
    assert pair.restore(parts) == []
    assert module.weight[0, 0].item() == 1.0
    pair.capture(parts, 20)
    pair.confirm(24)
    assert pair.good is not None
    assert pair.good.step == 20
    pair.close()
