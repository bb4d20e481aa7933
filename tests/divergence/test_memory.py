from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_optim as lo
from lightning_optim.callbacks._guard import snapshots as run_snapshots
from lightning_optim.divergence import LRCut, Rollback, memory
from lightning_optim.divergence.snapshots import OptimizerState, Snapshot, Tensors, bytes_needed
from tests.helpers import Net, batches, make_trainer


def test_free_memory_is_that_of_the_machine_or_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64_000))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_memory() == 64_000
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert memory.free_memory() == 6000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() == 64_000


def test_what_is_needed_counts_the_state_to_come():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    parts = [Tensors(lambda: [net]), OptimizerState(optimizer)]
    count = sum(p.numel() for p in net.parameters())
    before = bytes_needed(parts)
    assert before == 12 * count
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert before <= bytes_needed(parts) <= before + 4 * len(list(net.parameters()))  # a step count each


def _fit(rollback=Rollback(every=2)):  # noqa: B008
    guard, kept = lo.DivergenceGuard(rollback=rollback), []

    class Look(L.Callback):
        def on_train_batch_end(self, *args):
            kept.append(guard._snapshots._pair._good._file)

    make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01), guard, Look()]).fit(Net(), batches(3))
    return kept[-1]


def test_snapshots_that_do_not_fit_into_memory_go_to_disk_with_a_warning(monkeypatch):
    given = Rollback(every=2, memory="cpu")
    assert _fit(given) is None
    monkeypatch.setattr(run_snapshots, "free_memory", lambda: 2000)
    with pytest.warns(UserWarning, match=r"Two snapshots take .* kB.*more than 50% of the 2 kB.*memory: disk"):
        assert _fit(given) is not None


@pytest.mark.filterwarnings("ignore:Step ")
def test_by_default_there_are_none_where_they_do_not_fit_and_the_guard_does_everything_else(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_snapshots, "free_memory", lambda: 2000)
    monkeypatch.setattr(Snapshot, "capture", None)
    guard = lo.DivergenceGuard(cooldown=1, lr_cut=LRCut(budget=1))
    assert guard.rollback is not None
    parts = [lo.ConfigureOptimizers("adamw", lr=0.01), guard]
    with pytest.warns(UserWarning, match="there are none") as caught:
        make_trainer(parts).fit(Net(nan_batches=range(4, 14)), batches(20))
    told = [str(w.message) for w in caught if "snapshots" in str(w.message)]
    assert len(told) == 1
    for part in ("more than 50% of the 2 kB", "there are none", "memory: disk", "memory: device", "rollback: null"):
        assert part in told[0]
    assert [entry.kind for entry in guard.report.entries].count("nonfinite") == 10
    did = [entry.text for entry in guard.report.entries if entry.kind == "did"]
    assert [text.split(" ")[0] for text in did] == ["learning", "training"]
    assert did[1].endswith("(lr_cut: 1 of 1, rollback: 0 of 3; there is no snapshot to return to)")


@pytest.mark.parametrize(("memory", "kept"), [("auto", "cpu"), ("cpu", "cpu"), ("disk", "disk"), ("device", "device")])
def test_each_place_is_the_one_that_was_asked_for_where_there_is_room(memory, kept):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, *args):
            seen.append(guard._snapshots._pair._good._memory)

    guard = lo.DivergenceGuard(rollback=Rollback(memory=memory))
    make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01), guard, Look()]).fit(Net(), batches(1))
    assert seen == [kept]


def test_snapshots_that_fit_nowhere_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(run_snapshots, "free_disk", lambda: 1000)
    with pytest.raises(MisconfigurationException, match=r"has 1 kB free. Set TMPDIR.*rollback: null"):
        _fit(Rollback(memory="disk"))
