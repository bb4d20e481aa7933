"""How good suggested learning rates are: ``python -m tests.benchmarks.rates [--grid FILE] [TASK ...]`` prints Markdown.

For each task and optimizer, short runs at each rate of a fine grid and at each suggested rate; what is compared is the
held-out loss of the last tenth of a run, mean over seeds. Not the training loss, which on data of this size goes to
zero, so that a ratio says more about the number of epochs than about the rate. ``--grid`` keeps the runs in a file
of JSON lines: the grid takes most of the time, and depends on no finder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor

import lightning_optim as lo
from lightning_optim.core.durations import Horizon
from lightning_optim.optim import get_optimizer_class
from tests.benchmarks.rates_tasks import HELD_OUT_TASKS, OPTIMIZERS, STEPS, TASKS, Module, Task
from tests.benchmarks.timing import machine, table
from tests.helpers import make_trainer

SEEDS = (0, 1, 2)
LOWEST = {"sgd": 1e-3, "adamw": 1e-4, "lion": 3.16e-5, "muon": 1e-3, "rmsprop": 3.16e-5}
RATES = {name: [low * 10 ** (k / 4) for k in range(16)] for name, low in LOWEST.items()}
"""The grid: a factor of 1.78 between neighbours, 5600 from end to end."""

FINDERS = ("sweep", "trials", "Lightning")


def factory(name: str, lr: float, task: Task) -> lo.OptimizerFactory:
    """Return what makes the optimizer of a run; a Muon's AdamW always has a twentieth of its rate, as by default."""
    configured = dict(OPTIMIZERS[name])
    if name == "muon":
        configured["optimizer_kwargs"] = {"adamw_lr": lr / 20}
    return lo.OptimizerFactory(lr=lr, **configured, **task.schedule)


def held_out_loss(task: Task, name: str, lr: float, seed: int) -> float:
    """Train in a plain loop; the mean of five held-out losses in the last tenth, infinite after a divergence."""
    torch.manual_seed(seed)
    network = task.network().train()
    optimizer, scheduler = factory(name, lr, task).build(network, Horizon(total_steps=STEPS))
    found, first = [], None
    for step, (inputs, targets) in enumerate(batches(task, seed)):
        loss = task.loss(network(inputs), targets)
        value = float(loss)
        first = value if first is None else first
        if not math.isfinite(value) or value > 20 * first + 20:
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        if task.clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), task.clip)
        optimizer.step()
        scheduler.step()
        if step >= STEPS - STEPS // 10 and (STEPS - 1 - step) % (STEPS // 50) == 0:
            found.append(task.loss_on(network, task.split[1]))
    return statistics.mean(found) if all(map(math.isfinite, found)) else math.inf


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield as many batches as a run has steps."""
    inputs, targets = task.split[0].tensors
    generator = torch.Generator().manual_seed(seed + 100)
    left = STEPS
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        for start in range(0, len(inputs) - task.batch_size + 1, task.batch_size):
            if left == 0:
                return
            left -= 1
            chosen = order[start : start + task.batch_size]
            yield inputs[chosen], targets[chosen]


class Tuned(Module):
    """A module with an optimizer of its own and an attribute ``lr``, as Lightning's finder wants it."""

    def __init__(self, task: Task, name: str, lr: float, seed: int) -> None:
        super().__init__(task, seed)
        self.name, self.lr = name, lr

    def configure_optimizers(self) -> Any:
        return factory(self.name, self.lr, self.task)(self)


def suggested(finder: str, task: Task, name: str, seed: int = 0) -> float | None:
    """Return the rate that a finder suggests before a run, configured with the middle of the usual rates."""
    low, high = get_optimizer_class(name).usual_lr  # type: ignore[attr-defined]
    module = Tuned(task, name, math.sqrt(low * high), seed)
    clipping = [] if task.clip is None else [lo.GradientClipping(task.clip)]
    trainer = make_trainer(clipping, max_steps=STEPS, max_epochs=-1)
    if finder == "Lightning":
        return Tuner(trainer).lr_find(module, task.loader(seed)).suggestion()
    given = {"steps": 200, "repeats": 2} if finder == "sweep" else {"steps": STEPS // 2}
    return lo.find_lr(trainer, module, task.loader(seed), method=finder, **given).lr


class Grid:
    """Held-out losses by task, optimizer, rate and seed, kept in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, float] = {}
        if path is not None and path.exists():
            self._known = {key: float(value) for key, value in map(json.loads, path.read_text().splitlines())}

    def loss(self, task: str, name: str, lr: float) -> float:
        """Return the mean over the seeds."""
        return statistics.mean(self._one(task, name, lr, seed) for seed in SEEDS)

    def _one(self, task: str, name: str, lr: float, seed: int) -> float:
        key = f"{task}, {name}, {lr:.4g}, {seed}"
        if key not in self._known:
            self._known[key] = held_out_loss(TASKS[task], name, float(f"{lr:.4g}"), seed)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, str(self._known[key])]) + "\n")
        return self._known[key]


def main(tasks: list[str], path: Path | None) -> None:
    """Print a table of all tasks and optimizers, and one of medians and worst."""
    grid = Grid(path)
    rows: list[list[object]] = []
    ratios: dict[tuple[str, bool], list[float]] = {}
    off: dict[tuple[str, bool], list[float]] = {}
    silent: dict[tuple[str, bool], int] = {}
    for task in tasks:
        for name in OPTIMIZERS:
            losses = {lr: grid.loss(task, name, lr) for lr in RATES[name]}
            best = min(losses, key=losses.__getitem__)
            row: list[object] = [task, name, f"{best:.2g}", losses[best]]
            for finder in FINDERS:
                key = finder, task in HELD_OUT_TASKS
                with quiet():
                    lr = suggested(finder, TASKS[task], name)
                if lr is None:
                    silent[key] = silent.get(key, 0) + 1
                    row += ["cannot tell", ""]
                    continue
                loss = grid.loss(task, name, lr)
                ratios.setdefault(key, []).append(loss / losses[best])
                off.setdefault(key, []).append(max(lr / best, best / lr))
                row += [f"{lr:.2g} ({lr / best:.2g}x)", loss / losses[best]]
            rows.append(row)
            print(*row, sep=" | ", file=sys.stderr, flush=True)
    print(machine())
    header = ["task", "optimizer", "best of the grid", "its loss"]
    print(table([*header, *(part for finder in FINDERS for part in (finder, "loss over best"))], rows))
    summary: list[list[object]] = []
    for held_out in (False, True):
        for finder in FINDERS:
            key = finder, held_out
            if found := ratios.get(key):
                summary.append(
                    [
                        *("left out of the design" if held_out else "designed on", finder, len(found)),
                        *(silent.get(key, 0), statistics.median(found), max(found)),
                        *(sum(ratio > 1.25 for ratio in found), max(off[key]), sum(factor > 10 for factor in off[key])),
                    ]
                )
    print()
    header = ["tasks", "finder", "suggestions", "cannot tell", "loss over best, median", "worst", "above 1.25"]
    print(table([*header, "most off the best rate", "more than 10x off"], summary))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning, bars and warnings write."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--grid", type=Path)
    arguments = parser.parse_args()
    if unknown := [task for task in arguments.tasks if task not in TASKS]:
        raise SystemExit(f"No task {unknown[0]!r}. There are: {', '.join(TASKS)}.")
    warnings.simplefilter("ignore")
    main(arguments.tasks or list(TASKS), arguments.grid)
