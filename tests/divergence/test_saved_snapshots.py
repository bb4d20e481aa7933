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
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_optim as lo
from lightning_optim.callbacks import divergence_guard
from lightning_optim.callbacks._guard import snapshots as run_snapshots
from lightning_optim.divergence import Rollback
from lightning_optim.divergence.snapshots import OptimizerState, SnapshotPair, Tensors
from tests.helpers import ADAMWS, Net, SaveAt, StatefulLoader, batches, bit_equal, make_trainer, precision, through_a_file

pytestmark = pytest.mark.filterwarnings("ignore:Step ")


class Bad(Net):
    """Its loss is NaN at some steps of the run.

    Args:
        steps: The steps.
    """

    def __init__(self, steps: Collection[int]) -> None:
        super().__init__()
        self.steps = steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in self.steps else loss


def fit(
    rollback: Rollback,
    bad: Collection[int],
    *others: L.Callback,
    optimizer: Any = ADAMWS["ours"],  # noqa: B008
    resume: Path | None = None,
    name: str = "32-true",
    **configured: Any,
) -> tuple[Any, list[str], list[str]]:
    """Fit for 60 steps; return all state at the end, what the guard did, and what was said of snapshots."""
    guard = lo.DivergenceGuard(lr_cut=None, rollback=rollback, cooldown=1)
    settings = {**optimizer, "lr": 0.01, "schedule": "cosine", "warmup": 3, **configured}
    model, parts = Bad(bad), [lo.ConfigureOptimizers(**settings), lo.GradientClipping(method="zclip"), guard, *others]
    trainer = make_trainer(parts, max_epochs=3, **precision(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, StatefulLoader(20, []), ckpt_path=resume, weights_only=True if resume else None)
    state = [model.state_dict(), trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
    did = [entry.text for entry in guard.report.entries if entry.kind == "did"]
    return state, did, [text for text in (str(each.message) for each in caught) if "snapshots" in text.lower()]


def guard_state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True)[divergence_guard.CHECKPOINT_KEY])


# Good at 11, candidate of 23 until 31; the candidate becomes good; the same snapshot a second time; at the end of an
# epoch; with an alarm of its own between snapshot and checkpoint.
CASES = {
    "before the candidate is good": (Rollback(every=12, clean=8), 27, range(29, 34), [11]),
    "when it is": (Rollback(every=12, clean=8), 27, range(34, 39), [23]),
    "a second return": (Rollback(every=12, clean=8), 22, range(15, 20), [11]),
    "a second return after it": (Rollback(every=50), 30, (*range(15, 20), *range(40, 45)), [0, 0]),
    "the start again": (Rollback(every=50), 30, range(15, 40), [0, 0, 0]),
    "after a return, in the next step": (Rollback(every=12, clean=8), 37, (*range(32, 37), *range(40, 45)), [11, 11]),
    "a skipped one before it": (Rollback(every=12, clean=8), 28, (25, *range(34, 39)), [11]),
    "at the end of an epoch": (Rollback(every=12, clean=8), 20, range(29, 34), [11]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", ["auto", "disk", "device"])
def test_a_resumed_run_returns_to_the_same_snapshot(tmp_path: Path, case: str, memory: str) -> None:
    config, at, bad, back_to = CASES[case]
    config = Rollback(config.every, config.clean, memory)
    whole = fit(config, bad, SaveAt(at, tmp_path / "saved"))
    resumed = fit(config, bad, resume=tmp_path / "saved")
    print(case, whole[1], resumed[1], resumed[2])
    for a,b in zip(whole[0], resumed[0]): print(bit_equal(a,b))
    if not bit_equal(whole[0], resumed[0]): print(whole[0][2], resumed[0][2])
    assert bit_equal(whole[0], resumed[0])
