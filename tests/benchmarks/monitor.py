"""What everything on a Trainer costs together, over a bare Trainer with torch's fused AdamW."""

from __future__ import annotations

import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_optim as lo
from examples.char_lm import CharLM, stdlib_sources
from tests.benchmarks.timing import table

LAYERS, DIM, TIME, BATCH = 12, 128, 64, 8
STEPS = 200
"""In a row of each Trainer: as many as between two of the guard's snapshots, so that each turn pays for one."""


class Text(Dataset[Tensor]):
    """Windows of the standard library's sources, as many as any run here wants."""

    def __init__(self) -> None:
        files = (path.read_bytes() for _, path in stdlib_sources())
        text = b"".join(data for _, data in zip(range(40), files, strict=False))
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, TIME + 1, TIME)

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index % len(self.windows)]


class Bare(CharLM):
    """The model with torch's fused AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1, fused=True)


class Recipe(Bare):
    """With the norms of its gradients, as Lightning's documentation has them logged."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the norm of each parameter's gradient."""
        self.log_dict(grad_norm(self, norm_type=2))


class Turns(L.Callback):
    """Lets several Trainers, each in its thread, train one after the other, and times each turn.

    Args:
        mine: What says that it is this one's turn.
        done: What says that its turn is over.
        warmup: Steps before the first turn.
    """

    def __init__(self, mine: threading.Semaphore, done: threading.Semaphore, warmup: int = 60) -> None:
        self.mine, self.done, self.warmup = mine, done, warmup
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a turn and awaits the next."""
        turn, within = divmod(batch_idx - self.warmup, STEPS)
        if turn < 0 or within:
            return
        if turn > 0:
            self.seconds.append(time.perf_counter() - self._start)
        self.done.release()
        self.mine.acquire()
        self._start = time.perf_counter()


def _bare(folder: Path) -> tuple[L.LightningModule, dict[str, Any]]:
    return Bare(DIM, LAYERS), {"logger": False}


def _everything(every: int) -> Callable[[Path], tuple[L.LightningModule, dict[str, Any]]]:
    def make(folder: Path) -> tuple[L.LightningModule, dict[str, Any]]:
        callbacks = [
            lo.ConfigureOptimizers("adamw", lr=1e-3, weight_decay=0.1, schedule="cosine", param_groups=["no_decay"]),
            lo.GradientClipping(max_norm=1.0),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(),
        ]
        logger = TensorBoardLogger(folder, name="everything", default_hp_metric=False)
        return CharLM(DIM, LAYERS), {"callbacks": callbacks, "logger": logger, "log_every_n_steps": every}

    return make


def _recipe(every: int) -> Callable[[Path], tuple[L.LightningModule, dict[str, Any]]]:
    def make(folder: Path) -> tuple[L.LightningModule, dict[str, Any]]:
        logger = TensorBoardLogger(folder, name="recipe", default_hp_metric=False)
        rest = {"callbacks": [LearningRateMonitor()], "log_every_n_steps": every, "gradient_clip_val": 1.0}
        return Recipe(DIM, LAYERS), {"logger": logger, **rest}

    return make


CANDIDATES: dict[str, Callable[[Path], tuple[L.LightningModule, dict[str, Any]]]] = {
    "torch's fused AdamW alone, no logger": _bare,
    "everything, log_every_n_steps=50": _everything(50),
    "everything, log_every_n_steps=1": _everything(1),
    "LearningRateMonitor, grad_norm, gradient_clip_val; 50": _recipe(50),
    "LearningRateMonitor, grad_norm, gradient_clip_val; 1": _recipe(1),
}


def _in_turns(rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn of each candidate."""
    text = Text()
    with tempfile.TemporaryDirectory() as folder:
        turns = {name: Turns(threading.Semaphore(0), threading.Semaphore(0)) for name in CANDIDATES}

        def train(name: str) -> None:
            torch.manual_seed(0)
            module, options = CANDIDATES[name](Path(folder))
            trainer = L.Trainer(
                **{
                    **options,
                    "callbacks": [turns[name], *options.get("callbacks", [])],
                    "accelerator": "cpu",
                    "max_steps": turns[name].warmup + rounds * STEPS + 1,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "enable_checkpointing": False,
                    "default_root_dir": folder,
                }
            )
            trainer.fit(module, DataLoader(text, BATCH))
            turns[name].done.release()

        threads = {name: threading.Thread(target=train, args=(name,)) for name in CANDIDATES}
        for name, thread in threads.items():  # each warms up alone
            thread.start()
            turns[name].done.acquire()
        for _ in range(rounds):
            for turn in turns.values():
                turn.mine.release()
                turn.done.acquire()
        for name, thread in threads.items():
            turns[name].mine.release()
            thread.join()
    return {name: turn.seconds for name, turn in turns.items()}


def trainer_with_everything(rounds: int = 7) -> str:
    """Five Trainers in turn, ratios of the time of each turn to the bare one's of the same round, medians."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seconds = _in_turns(rounds)
    bare = next(iter(seconds.values()))
    parameters = sum(p.numel() for p in Bare(DIM, LAYERS).parameters())
    rows: list[list[object]] = [
        [name, statistics.median(took) / STEPS * 1e3, statistics.median(a / b for a, b in zip(took, bare, strict=True))]
        for name, took in seconds.items()
    ]
    label = f"{LAYERS} layers, {parameters / 1e6:.1f} M parameters, {BATCH} x {TIME} bytes a batch"
    return table([label, "ms a step", "over the first"], rows)


SECTIONS = (trainer_with_everything,)
