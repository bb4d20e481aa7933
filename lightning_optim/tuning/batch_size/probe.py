"""What a short fit measures about its batch: memory, speed, and gradients of a part of it and of all of it."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.callbacks._lightning import data_parallel_size, loss_scale
from lightning_optim.callbacks._monitor.meter import samples_in
from lightning_optim.step.measure import measure_norm_sq


class BatchProbe(L.Callback):
    """Measure a short fit, and write what came of it to a file, as JSON.

    It takes checkpoints out of the fit. It does not change the training.

    Args:
        path: The file.
        noise: Whether to measure the gradients of each first micro-batch, as the gradient noise scale needs.
    """

    def __init__(self, path: str, noise: bool = False) -> None:
        self.path, self.noise = Path(path), noise
        self._found: dict[str, Any] = {"steps": 0, "pairs": []}
        self._micro_batches = 0
        self._small: Tensor | None = None
        self._pairs: list[Tensor] = []
        self._began = 0.0
        self._timed = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take out what would write checkpoints."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the size of the batch."""
        size = samples_in(batch)
        self._found["size"] = max(size or 0, self._found.get("size", 0)) or None
        self._whole = size == self._found["size"]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the gradient of the first micro-batch, and of all of them."""
        if not (self.noise and pl_module.automatic_optimization):
            return
        accumulated = trainer.accumulate_grad_batches
        self._micro_batches += 1
        norm_sq = self._norm_sq(trainer, pl_module)
        if norm_sq is None or not self._whole:
            self._micro_batches, self._small = 0, None
        elif self._micro_batches == 1:
            self._small = trainer.strategy.reduce(norm_sq * accumulated**2, reduce_op="mean")
        if self._micro_batches == accumulated and self._small is not None and norm_sq is not None:
            self._pairs.append(torch.stack([self._small, norm_sq]))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Begin with the next micro-batch."""
        self._micro_batches, self._small = 0, None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the batches after the first step, which compiles and allocates."""
        if trainer.global_step > self._found["steps"]:
            self._found["steps"] = trainer.global_step
            if not self._began:
                _wait(pl_module)
                self._began, self._timed = time.perf_counter(), 0
                return
        self._timed += samples_in(batch) or 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what was measured."""
        _wait(pl_module)
        seconds = time.perf_counter() - self._began if self._began else 0.0
        ranks = data_parallel_size(trainer)
        accumulated, size = trainer.accumulate_grad_batches, self._found.get("size")
        if pl_module.device.type == "cuda":
            self._found |= {"memory": torch.cuda.max_memory_reserved(pl_module.device), "device": "cuda"}
        else:
            self._found |= {"memory": _resident(), "device": pl_module.device.type}
        if self._timed and seconds:
            self._found["samples_per_second"] = self._timed * ranks / seconds
        if size is not None:
            self._found |= {"small": size, "large": size * accumulated * ranks, "accumulated": accumulated}
        self._found["pairs"] = [pair.tolist() for pair in self._pairs]
        self._write("ok")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what ended the fit."""
        self._write("memory" if is_memory_error(exception) else "error", f"{type(exception).__name__}: {exception}")

    def _norm_sq(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor | None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None and not p.grad.is_sparse]
        if not grads:
            return None
        norm_sq = measure_norm_sq(grads).sum()
        scale = loss_scale(trainer)
        return norm_sq if scale is None else norm_sq / scale.square()

    def _write(self, status: str, message: str = "") -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        self.path.write_text(json.dumps({**self._found, "status": status, "message": message}))


def is_memory_error(error: BaseException) -> bool:
    """Return whether an exception says that memory is exhausted, of a device or of the host.

    Args:
        error: The exception.
    """
    return isinstance(error, MemoryError) or bool(is_oom_error(error))


def _wait(module: L.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def _resident() -> int:
    """The most memory that this process had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
