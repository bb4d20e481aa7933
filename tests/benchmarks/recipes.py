"""Recipes beside AdamW at its best rate, on small tasks: ``python -m tests.benchmarks.recipes``, prints Markdown.

Every run has the same steps and the same batches. AdamW has a cosine with 5 % warmup and a gradient norm of at most 1.
The recipe runs at the rate that it says for this batch, and at others, three a decade, from there to where it is best;
AdamW likewise from 0.001. What counts is the loss on held-out
data after the last step, mean over seeds.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from tests.benchmarks.recipe_tasks import BATCH, TASKS, Task
from tests.benchmarks.timing import machine
from tests.helpers import make_trainer

SCALE = (1.0, 3.0, 10.0)
"""Rates of a decade, as factors."""
DECADES = range(-2, 4)
"""Of factors on the rate that a search begins with."""


class Module(L.LightningModule):
    """Trains the network of a task."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.task = task.network(), task

    def no_weight_decay(self) -> set[str]:
        """Those of the network."""
        of_network: Callable[[], set[str]] = getattr(self.network, "no_weight_decay", set)
        return {f"network.{name}" for name in of_network()}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.task.loss(self.network, *batch)


def _end(task: Task, callbacks: list[L.Callback], steps: int, seed: int, dense: bool) -> float:
    """The score on held-out data after so many steps; infinite if it is not finite."""
    train, held_out = task.data()
    loader = DataLoader(
        TensorDataset(*train), BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
    )
    module = Module(task, seed)
    for layer in module.modules():
        if isinstance(layer, nn.EmbeddingBag):
            layer.sparse = not dense
    lo.attach(module, next(each for each in callbacks if isinstance(each, lo.ConfigureOptimizers)))
    make_trainer(callbacks, max_steps=steps, max_epochs=-1, log_every_n_steps=1000).fit(module, loader)
    module.eval()
    torch.manual_seed(0)  # of noise in the score
    with torch.no_grad():
        score = float((task.score or task.loss)(module.network, *held_out))
    return score if math.isfinite(score) else math.inf


def _adamw(lr: float) -> list[L.Callback]:
    return [lo.ConfigureOptimizers("adamw", lr=lr, schedule="cosine", warmup="5%"), lo.GradientClipping(1.0)]


def _recipe(task: Task, lr: float, steps: int) -> list[L.Callback]:
    settings = lo.recipe(task.recipe).settings
    callbacks: list[L.Callback] = [lo.ConfigureOptimizers(**{**settings["optim"], "lr": lr})]
    if "clip" in settings:
        callbacks.append(lo.GradientClipping(**settings["clip"]))
    if "callbacks" in settings.get("trainer", {}):
        callbacks.append(EMAWeightAveraging(decay=min(0.9999, 1 - 5 / steps)))
    return callbacks


def _own_rate(task: Task) -> float:
    """The rate that the recipe says for this task."""
    recipe = lo.recipe(task.recipe)
    if task.lr is not None:
        return task.lr(task.network())
    if recipe.lr is None:
        return 0.01
    return recipe.lr if recipe.batch is None or recipe.batch.rule is None else recipe.scaled_to(BATCH).lr or 0.0


def _mean(task: Task, make: Callable[[], list[L.Callback]], steps: int, seeds: int, dense: bool = False) -> float:
    return statistics.fmean(_end(task, make(), steps, seed, dense) for seed in range(seeds))


def climb(score: Callable[[float], float], start: float) -> dict[float, float]:
    """Scores of rates around ``start``, three a decade: upwards as long as it gets better, else downwards."""
    factors = [scale * 10.0**decade for decade in DECADES for scale in SCALE]
    place = factors.index(1.0)
    scores = {start: score(start)}
    for direction in (1, -1):
        at = place
        while 0 <= (at := at + direction) < len(factors):
            scores[start * factors[at]] = score(start * factors[at])
            if scores[start * factors[at]] > scores[start * factors[at - direction]]:
                break
        if min(scores, key=scores.__getitem__) != start:
            break
    return scores


def compare(task: Task, steps: int, seeds: int) -> list[str]:
    """One row of the table."""
    task.network()  # pretrains, where that is part of it, which moves the seed
    start, own = time.perf_counter(), _own_rate(task)
    adamw = climb(lambda lr: _mean(task, partial(_adamw, lr), steps, seeds, dense=True), 1e-3)
    grid = climb(lambda lr: _mean(task, partial(_recipe, task, lr, steps), steps, seeds), own)
    best, tuned = min(adamw, key=adamw.__getitem__), min(grid, key=grid.__getitem__)
    row = [f"`{task.recipe}`", task.what, f"{adamw[best]:.3g} ({best:.0e})", f"{grid[own]:.3g} ({own:.1e})"]
    row += [f"{grid[tuned]:.3g} ({tuned:.1e})", f"{grid[tuned] / adamw[best]:.2f}"]
    print(f"| {' | '.join(row)} |", flush=True)
    print(f"{task.recipe}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("names", nargs="*", metavar="RECIPE")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of layers that are adapted here
    print(machine(), f"{options.steps} steps of {BATCH}, {options.seeds} seeds", sep="; ", flush=True)
    head = ["recipe", "task", "AdamW, best rate", "recipe, own rate", "recipe, best rate", "of AdamW's"]
    print(f"\n| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |", flush=True)
    for task in TASKS:
        if not options.names or task.recipe in options.names:
            compare(task, options.steps, options.seeds)


if __name__ == "__main__":
    main()
