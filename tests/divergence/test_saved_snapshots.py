"""Snapshots in checkpoints: a resumed run returns to where the run without interruption would have returned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_optim as lo
from lightning_optim.callbacks.divergence_guard import CHECKPOINT_KEY
from lightning_optim.divergence import Rollback
from lightning_optim.divergence.snapshots import OptimizerState, Snapshot, SnapshotPair, Tensors
from tests.helpers import (
    ADAMWS,
    RULES,
    SGDS,
    Net,
    SaveAt,
    StatefulLoader,
    TwoOptimizers,
    batches,
    bit_equal,
    make_trainer,
    precision,
    through_a_file,
)

pytestmark = pytest.mark.filterwarnings("ignore:Step ")

QUICK = Rollback(every=12, clean=7)
BAD = (14, *range(28, 33), *range(40, 45), *range(55, 60))
"""Back to the snapshot of step 11 twice, and then to that of step 47."""


class Bad(Net):
    """Its loss is NaN at some steps of the run.

    Args:
        steps: The steps.
        error_at: Step at which it raises an error.
    """

    def __init__(self, steps: Collection[int], error_at: int | None = None) -> None:
        super().__init__()
        self.steps, self.error_at = steps, error_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.error_at:
            raise RuntimeError("by the user")
        return loss * float("nan") if self.trainer.global_step in self.steps else loss


class Run:
    """A fit of 60 steps: its state at the end, what the guard did, and what was reported about snapshots."""

    def __init__(
        self,
        *others: L.Callback,
        rollback: Rollback = QUICK,
        bad: Collection[int] = BAD,
        optimizer: dict[str, Any] = ADAMWS["ours"],
        resume: Path | None = None,
        name: str = "32-true",
        epochs: int = 3,
        **configured: Any,
    ) -> None:
        guard = lo.DivergenceGuard(lr_cut=None, rollback=rollback, cooldown=1)
        settings = {**optimizer, "lr": 0.01, "schedule": "cosine", "warmup": 3, **configured}
        parts = [lo.ConfigureOptimizers(**settings), lo.GradientClipping(method="zclip"), guard, *others]
        model, trainer = Bad(bad), make_trainer(parts, max_epochs=epochs, **precision(name))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, StatefulLoader(20, []), ckpt_path=resume, weights_only=True if resume else None)
        self.did = [(entry.step, entry.text) for entry in guard.report.entries if entry.kind == "did"]
        texts = [str(warning.message) for warning in caught]
        self.told = [text for text in texts if text.startswith("The snapshots")]
        stateful: list[Any] = [
            trainer.optimizers[0],
            trainer.lr_scheduler_configs[0].scheduler,
            trainer.precision_plugin,
        ]
        self.state = [model.state_dict(), *(part.state_dict() for part in stateful)]


def guard_state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)[CHECKPOINT_KEY]
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


AT = {
    "one that was put off by a skip": 18,
    "the end of an epoch": 20,
    "a candidate that is discarded": 26,
    "the very step of a return": 33,
    "between two returns to the same": 38,
    "a candidate that is confirmed": 50,
}


@pytest.mark.parametrize(
    ("memory", "optimizer", "name", "at"),
    [
        ("auto", ADAMWS["ours"], "32-true", AT.values()),
        ("disk", ADAMWS["torch-fused"], "16-mixed", [26]),
        ("device", SGDS["torch"], "bf16-mixed", [50]),
    ],
    ids=["auto", "disk", "device"],
)
def test_a_resumed_run_returns_where_the_whole_run_returned(
    tmp_path: Path, memory: str, optimizer: dict[str, Any], name: str, at: Collection[int]
) -> None:
    options: dict[str, Any] = {"rollback": Rollback(12, 7, memory), "optimizer": optimizer, "name": name}
    whole = Run(*(SaveAt(step, tmp_path / str(step)) for step in at), **options)
    assert [text.split(",")[0] for _, text in whole.did] == [f"back to the state after step {s}" for s in (11, 11, 47)]
    for step in at:
        resumed = Run(resume=tmp_path / str(step), **options)
        assert resumed.did == [(when, text) for when, text in whole.did if when >= step], step
        assert bit_equal(resumed.state, whole.state), step
        assert resumed.told == []


def test_each_of_several_optimizers_goes_back_after_a_resume_too(tmp_path: Path) -> None:
    def fit(*others: L.Callback, **options: Any) -> tuple[Any, int]:
        makes = [lambda params: torch.optim.AdamW(params, lr=0.01), lambda params: torch.optim.SGD(params, lr=0.01)]
        model = TwoOptimizers(*makes, factor=lambda index, batch: float("nan") if 24 <= batch < 29 else 1.0)
        guard = lo.DivergenceGuard(lr_cut=None, rollback=QUICK)
        trainer = make_trainer([guard, *others])
        trainer.fit(model, StatefulLoader(34, []), **options)
        return [model.state_dict(), *(each.state_dict() for each in trainer.optimizers)], guard.rollback_count

    whole = fit(SaveAt(2 * 22, tmp_path / "saved"))
    assert whole[1] == 1
    assert bit_equal(fit(ckpt_path=tmp_path / "saved"), whole)


LEFT_OUT = (
    r"The snapshots of the run before are not in the checkpoint \(they take 3\.\d+ kB; `rollback: \{checkpoint_mb: "
    r"\.inf\}` saves them\): a divergence now returns to step 25, where the run was resumed\."
)


@pytest.mark.parametrize(
    ("memory", "limit", "saved"),
    [("auto", 0, False), ("disk", 0.001, False), ("disk", 0.004, True), ("auto", math.inf, True)],
)
def test_only_small_snapshots_are_saved_and_the_resumed_run_reports_others(
    tmp_path: Path, memory: str, limit: float, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = Snapshot.read, []
    monkeypatch.setattr(Snapshot, "read", lambda snapshot: (reads.append(1), read(snapshot))[1])
    Run(SaveAt(26, tmp_path / "saved"), rollback=Rollback(12, 7, memory, checkpoint_mb=limit), bad=(), epochs=2)
    state = guard_state(tmp_path / "saved")["snapshots"]
    assert ("good" in state, "candidate" in state) == (saved, saved)
    if saved:
        assert (state["good"]["step"], state["candidate"]["step"]) == (11, 23)
        return
    assert not reads
    resumed = Run(resume=tmp_path / "saved", bad=range(29, 34), epochs=2)
    (told,) = resumed.told
    with pytest.warns(UserWarning, match=LEFT_OUT):
        warnings.warn(told, stacklevel=1)
    assert [text.split(",")[0] for _, text in resumed.did] == ["back to the state after step 25"]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run without faults."""
    path = tmp_path_factory.mktemp("healthy") / "saved"
    Run(SaveAt(26, path), bad=(), epochs=2)
    return path


def test_a_checkpoint_of_an_older_version_is_loaded(healthy: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(healthy, weights_only=True)
    del checkpoint[CHECKPOINT_KEY]["snapshots"]
    torch.save(checkpoint, tmp_path / "saved")
    resumed = Run(resume=tmp_path / "saved", bad=range(29, 34), epochs=2)
    assert [text.split(",")[0] for _, text in resumed.did] == ["back to the state after step 25"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"optimizer": SGDS["ours"]}, "AdamW then, SGD now"),
        ({"lr": 0.02}, "other settings of AdamW"),
        ({"schedule": "linear"}, "other schedules of the state of Scheduler"),
        ({"param_groups": RULES}, "other parameters of AdamW"),
    ],
)
def test_snapshots_of_another_configuration_are_left_out_with_the_reason(
    healthy: Path, changed: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    resumed = Run(resume=healthy, bad=range(29, 34), epochs=2, on_resume="config", **changed)
    (told,) = [text for text in caplog.messages if text.startswith("The snapshots")]
    assert told == (
        f"The snapshots of the run before do not fit this run ({reason}): a divergence now returns to step 25, where "
        "the run was resumed."
    )
    assert [text.split(",")[0] for _, text in resumed.did] == ["back to the state after step 25"]


def test_a_damaged_entry_does_not_end_the_run(healthy: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(healthy, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["snapshots"]["candidate"]["states"].pop()
    torch.save(checkpoint, tmp_path / "saved")
    resumed = Run(resume=tmp_path / "saved", bad=range(29, 34), epochs=2)
    (told,) = resumed.told
    assert "cannot be restored (ValueError: " in told
    assert [text.split(",")[0] for _, text in resumed.did] == ["back to the state after step 25"]


class LosesFiles(L.Callback):
    """Closes the files of the snapshots after a step, as if the disk were gone."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 25:
            callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
            pair = next(each for each in callbacks if isinstance(each, lo.DivergenceGuard))._snapshots._pair
            for snapshot in (pair._good, pair._candidate):
                assert snapshot.error is None
                snapshot._file.close()


def test_snapshots_that_cannot_be_read_are_left_out_with_one_warning(tmp_path: Path) -> None:
    saves = SaveAt(26, tmp_path / "saved"), SaveAt(27, tmp_path / "again")
    told = Run(LosesFiles(), *saves, rollback=Rollback(12, 7, "disk"), bad=(), epochs=2).told
    assert len([text for text in told if text.startswith("The snapshots are left out of checkpoints: OSError")]) == 1
    (told_again,) = Run(resume=tmp_path / "saved", bad=(), epochs=2).told
    assert "are not in the checkpoint (they could not be read)" in told_again


def test_a_checkpoint_that_an_exception_leaves_has_them_too(tmp_path: Path) -> None:
    saving = OnExceptionCheckpoint(tmp_path, "saved")
    model, parts = Bad((), error_at=26), [lo.ConfigureOptimizers("adamw", lr=0.01), lo.DivergenceGuard(rollback=QUICK)]
    with pytest.raises(RuntimeError, match="by the user"):
        make_trainer([*parts, saving], max_epochs=2, enable_checkpointing=True).fit(model, batches(40))
    state = guard_state(tmp_path / "saved.ckpt")["snapshots"]
    assert (state["good"]["step"], state["candidate"]["step"]) == (11, 23)


# Without a Trainer.


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def test_a_parameter_that_was_renamed_is_saved_under_its_present_name() -> None:
    module = nn.Linear(3, 2)
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("cpu", clean=4)
    pair.capture_first(parts, 3)
    weight = module.weight.detach().clone()
    prune.identity(module, "weight")
    state = through_a_file(pair.state_dict(parts))

    other = nn.Linear(3, 2)
    prune.identity(other, "weight")
    parts_of_other, loaded = [Tensors(lambda: [other])], SnapshotPair("cpu", clean=4)
    assert parts_of_other[0].identity() == parts[0].identity()
    loaded.load_state_dict(state, parts_of_other)
    assert loaded.restore(parts_of_other) == ["weight_mask"]  # which the snapshot does not have
    assert torch.equal(other.weight_orig, weight)


def test_a_candidate_that_a_skip_has_put_off_is_put_off_after_a_resume_too() -> None:
    parts, pair, loaded = [Tensors(lambda: [nn.Linear(3, 2)])], SnapshotPair("cpu", 4), SnapshotPair("cpu", 4)
    pair.capture_first(parts, 0)
    pair.capture(parts, 10)
    pair.mark_suspect(12)
    loaded.load_state_dict(through_a_file(pair.state_dict(parts)), parts)
    for step, good in ((14, 0), (15, 0), (16, 10)):
        loaded.confirm(step)
        assert loaded.good is not None
        assert loaded.good.step == good


def test_state_is_saved_by_the_present_places_of_parameters() -> None:
    body, head = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = _optimizer(body)
    optimizer.add_param_group({"params": list(head.parameters())})
    for place, param in enumerate((*body.parameters(), *head.parameters())):
        optimizer.state[param]["momentum_buffer"] = torch.full_like(param, place)
    parts, pair = [OptimizerState(optimizer)], SnapshotPair("cpu", clean=4)
    pair.capture_first(parts, 3)
    optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    saved = through_a_file(pair.state_dict(parts))["good"]["states"][0]["state"]
    assert {place: state["momentum_buffer"].flatten()[0].item() for place, state in saved.items()} == {0: 2, 1: 3}


def test_loading_copies_and_the_next_capture_does_not_write_into_the_checkpoint() -> None:
    module = nn.Linear(3, 2)
    parts, pair = [Tensors(lambda: [module])], SnapshotPair("cpu", clean=0)
    pair.capture_first(parts, 3)
    state = through_a_file(pair.state_dict(parts))
    before = through_a_file(state)
    loaded = SnapshotPair("cpu", clean=0)
    loaded.load_state_dict(state, parts)
    module.weight.data.zero_()
    for step in (4, 5):
        loaded.capture(parts, step)
        loaded.confirm(step)
    assert bit_equal(state, before)
