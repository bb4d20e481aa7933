"""Fits of a model by tensor parallelism, through Lightning; called on each rank by test_tensor_parallel_fit.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.diagnostics import Histograms, PerTensor
from tests.clip_rules import OF_BLOCK
from tests.helpers import ADAMWS, make_trainer
from tests.optim.tensor_parallel_checks import block

STEPS, BAD_STEP = 6, 3
RUNS = [(kind, rule) for kind in ADAMWS for rule in ("global_norm", "agc")]


class Tokens(L.LightningModule):
    """A block over tokens; the loss is NaN at one step, on one rank of each group of tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block(None)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        loss = nn.functional.cross_entropy(self.block(tokens).flatten(0, 1), targets.flatten())
        return loss * float("nan") if batch_idx == BAD_STEP and self.bad() else loss

    def bad(self) -> bool:
        return True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=123.0)


class Parallel(Tokens):
    """The same over ranks; each group of tensor parallelism takes its part of every batch."""

    def configure_model(self) -> None:
        if isinstance(self.block.up.weight, DTensor):
            return
        self.block = block(self.device_mesh["tensor_parallel"])
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() > 1:
            for layer in (self.block.up, self.block.down, self.block.out, self.block):
                fully_shard(layer, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        mesh = self.device_mesh["data_parallel"]
        return super().training_step([part[mesh.get_local_rank() :: mesh.size()] for part in batch], batch_idx)

    def bad(self) -> bool:
        return self.device_mesh["tensor_parallel"].get_local_rank() == 1


class Deciding(L.Callback):
    """Notes the counts after each batch."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        guard = next(c for c in trainer.callbacks if isinstance(c, lo.DivergenceGuard))  # type: ignore[attr-defined]
        (counts,) = guard.hub.counts()
        self.counts.append([counts.steps, counts.clipped, counts.skipped])


def fit(kind: str, rule: str, folder: Path, data_parallel_size: int | None) -> dict[str, Any]:
    """Counts after each step, the final weights, whole, and what each rank has of them.

    Args:
        kind: Which optimizer.
        rule: How to clip.
        folder: For the logs.
        data_parallel_size: Groups of two ranks; None for one process.
    """
    deciding = Deciding()
    options: dict[str, Any] = {}
    if data_parallel_size is not None:
        strategy = ModelParallelStrategy(data_parallel_size, 2, process_group_backend="gloo")
        devices = 2 * data_parallel_size
        options = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    trainer = make_trainer(
        [
            lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01, schedule="cosine", warmup=2),
            lo.GradientClipping(method=OF_BLOCK[rule]()),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(per_tensor=PerTensor(heat_maps=()), histograms=Histograms(every=2)),
            deciding,
        ],
        logger=L.loggers.TensorBoardLogger(folder, name=f"{kind}-{rule}", version="0"),
        **options,
    )
    model = Tokens() if data_parallel_size is None else Parallel()
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*torch.randint(0, 7, (2, 4 * STEPS, 6), generator=generator))
    trainer.fit(model, DataLoader(data, batch_size=4))
    params = [p.detach() for p in model.parameters()]
    return {
        "counts": deciding.counts,
        "weights": [p.full_tensor() if isinstance(p, DTensor) else p for p in params],
    }


def fit_all(folder: Path, data_parallel_size: int) -> dict[str, dict[str, Any]]:
    """Every run, on two ranks for each of ``data_parallel_size``; what this rank has to show."""
    return {f"{kind}-{rule}": fit(kind, rule, folder, data_parallel_size) for kind, rule in RUNS}
