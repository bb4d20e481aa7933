"""What everything on a Trainer costs together, over a bare Trainer with torch's fused AdamW."""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_optim as lo
from examples.char_lm import CharLM, stdlib_sources
from tests.benchmarks.timing import table

LAYERS, DIM = 12, 128
STEPS = 50
"""In a row of each Trainer: one report. The guard's snapshot is in every fourth turn; it takes about 20 ms here."""
WARMUP = 60


class Text(Dataset[Tensor]):
    """Windows of the standard library's sources, as many as any run here wants."""

    def __init__(self, length: int) -> None:
        files = (path.read_bytes() for _, path in stdlib_sources())
        text = b"".join(data for _, data in zip(range(40), files, strict=False))
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length + 1, length)

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
    """Lets several Trainers train one after the other, and times each turn.

    Args:
        parent: Tells of each turn's seconds, and is told when the next one may begin.
    """

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Ends a turn and awaits the next."""
        turn, within = divmod(batch_idx - WARMUP, STEPS)
        if turn < 0 or within:
            return
        self._parent.send(time.perf_counter() - self._start)
        self._parent.recv()
        self._start = time.perf_counter()


Make = Callable[[Path, int], tuple[L.LightningModule, dict[str, Any]]]
"""Of a folder and the width of the model: the model, and options of its Trainer."""


def _bare(folder: Path, dim: int) -> tuple[L.LightningModule, dict[str, Any]]:
    return Bare(dim, LAYERS), {"logger": False}


def _everything(every: int) -> Make:
    def make(folder: Path, dim: int) -> tuple[L.LightningModule, dict[str, Any]]:
        callbacks = [
            lo.ConfigureOptimizers("adamw", lr=1e-3, weight_decay=0.1, schedule="cosine", param_groups=["no_decay"]),
            lo.GradientClipping(max_norm=1.0),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(),
        ]
        logger = TensorBoardLogger(folder, name="everything", default_hp_metric=False)
        return CharLM(dim, LAYERS), {"callbacks": callbacks, "logger": logger, "log_every_n_steps": every}

    return make


def _recipe(every: int) -> Make:
    def make(folder: Path, dim: int) -> tuple[L.LightningModule, dict[str, Any]]:
        logger = TensorBoardLogger(folder, name="recipe", default_hp_metric=False)
        rest = {"callbacks": [LearningRateMonitor()], "log_every_n_steps": every, "gradient_clip_val": 1.0}
        return Recipe(dim, LAYERS), {"logger": logger, **rest}

    return make


CANDIDATES: dict[str, Make] = {
    "torch's fused AdamW alone, no logger": _bare,
    "everything, log_every_n_steps=50": _everything(50),
    "everything, log_every_n_steps=1": _everything(1),
    "LearningRateMonitor, grad_norm, gradient_clip_val; 50": _recipe(50),
    "LearningRateMonitor, grad_norm, gradient_clip_val; 1": _recipe(1),
}


def _train(
    name: str, parent: Connection, folder: str, rounds: int, shape: tuple[int, int], dim: int, more: dict[str, Any]
) -> None:
    """One candidate, in a process of its own: threads of one process would share torch's."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module, options = CANDIDATES[name](Path(folder), dim)
    trainer = L.Trainer(
        **{
            **options,
            "callbacks": [Turns(parent), *options.get("callbacks", [])],
            "accelerator": "cpu",
            **more,
            "max_steps": WARMUP + rounds * STEPS + 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": folder,
        }
    )
    windows, length = shape
    trainer.fit(module, DataLoader(Text(length), windows))


def _in_turns(
    names: list[str], rounds: int, shape: tuple[int, int], dim: int, more: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds of each turn of each candidate."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in names:  # each warms up alone
            mine, theirs = context.Pipe()
            process = context.Process(target=_train, args=(name, theirs, folder, rounds, shape, dim, more))
            process.start()
            mine.recv()
            trainers[name] = mine, process
        for _ in range(rounds):
            for name, (mine, _) in trainers.items():
                mine.send(None)
                seconds[name].append(mine.recv())
        for mine, process in trainers.values():
            mine.send(None)
            process.join()
    return seconds


def trainer_with_everything(
    rounds: int = 12, shape: tuple[int, int] = (8, 64), dim: int = DIM, only: int = 5, **options: Any
) -> str:
    """Five Trainers in turn, ratios of the time of each turn to the bare one's of the same round, medians.

    Args:
        rounds: How many turns each gets.
        shape: Windows in a batch, and bytes in a window.
        dim: Width of the model.
        only: Number of Trainers.
        **options: Options of all Trainers.
    """
    seconds = _in_turns(list(CANDIDATES)[:only], rounds, shape, dim, options)
    bare = next(iter(seconds.values()))
    parameters = sum(p.numel() for p in Bare(dim, LAYERS).parameters())
    rows: list[list[object]] = []
    for name, took in seconds.items():
        ratios = [a / b for a, b in zip(took, bare, strict=True)]
        low, high = _interval(ratios)
        rows.append(
            [name, statistics.median(took) / STEPS * 1e3, statistics.median(ratios), f"{low:.3f} to {high:.3f}"]
        )
    label = f"{LAYERS} layers, {parameters / 1e6:.1f} M parameters, {shape[0]} x {shape[1]} bytes a batch"
    return table([label, "ms a step", "over the first", "95 % interval"], rows)


def _interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the median, by drawing from the ratios anew."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def trainer_on_a_fast_model() -> str:
    """The same on a model whose step takes some 10 ms, with as many tensors."""
    return trainer_with_everything(rounds=24, shape=(1, 32), dim=64, only=3)


def trainer_with_the_demos_batches() -> str:
    """The same with batches as large as in ``make demo``."""
    return trainer_with_everything(rounds=5, shape=(16, 128))


SECTIONS = (trainer_with_everything, trainer_on_a_fast_model, trainer_with_the_demos_batches)
