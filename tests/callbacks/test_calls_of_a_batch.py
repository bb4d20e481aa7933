"""What a batch costs in Python with all callbacks does not grow with the number of parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lightning_optim as lo
from tests.benchmarks.hops import Trace

pytest.importorskip("numba")
from lightning_optim.kernels.cpu import object_layout

COUNTED = 22


class Many(L.LightningModule):
    """A module with many parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.params = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(count)])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.stack(list(self.params)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def calls_of_a_batch(count: int, folder: Path) -> int:
    """Number of calls of this package's functions in one batch of which nothing is reported."""
    trace = Trace()

    class Begin(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == COUNTED:
                sys.setprofile(trace)

    class End(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            sys.setprofile(None)

    ours = [
        lo.ConfigureOptimizers("adamw", lr=1e-3, schedule="cosine", warmup="5%"),
        lo.GradientClipping(max_norm=1.0),
        lo.DivergenceGuard(report_dir=folder),
        lo.OptimizerMonitor(),
    ]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Begin(), *ours, End()],
    )
    trainer.fit(Many(count), torch.utils.data.DataLoader(torch.zeros(COUNTED + 4, 1)))
    return len(trace.calls)


@pytest.mark.skipif(object_layout.layout() is None, reason="objects lie elsewhere in this version")
def test_more_parameters_take_no_more_calls(tmp_path: Path) -> None:
    few, many = calls_of_a_batch(40, tmp_path / "few"), calls_of_a_batch(400, tmp_path / "many")
    assert many - few < 15
    assert 0 < many < 560
