"""What a step takes at most over parameters, gradients and state: ``python -m tests.benchmarks.memory [SECTION ...]``.

Measured twice: by the events of torch's allocator during one warm step, and by the peak of the resident memory of the
process from before the optimizer is made until after its third step, without parameters, gradients and state. The
second includes what kernels and numpy allocate, and what stays. Each section runs in a process of its own, in which
every large block is mapped anew, so that none hides in memory that was freed before.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import lightning_optim as lo
from lightning_optim.clipping import ClipRule, GlobalNorm, get_clip_rule, list_clip_rules
from lightning_optim.diagnostics import Histograms, PerTensor
from lightning_optim.divergence import NonFiniteGradient, Rollback
from lightning_optim.step.histograms import KINDS
from tests import allocations
from tests.benchmarks.models import matrices, transformer
from tests.benchmarks.timing import machine, table

ON_MATRICES = ("muon", "normuon", "soap")
PEERS: dict[str, Callable[[Any], Optimizer]] = {
    "torch AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch AdamW, for-loop": lambda params: torch.optim.AdamW(params, foreach=False),
}
HEADER = ["torch's allocations in a warm step", "resident, from the start on", "limit"]
WIDTH, DEPTH = 1024, 16
"""Of the model on the Trainer: 16.8 M parameters, in tensors of a sixteenth of it."""
GROWTH_STEPS, GROWTH_FROM = 5_000, 1_000


def _nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(_nbytes(state.values()) for state in optimizer.state.values())


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %"


Make = Callable[[list[nn.Parameter]], Optimizer]


def _train_mode(optimizer: Optimizer) -> Optimizer:
    if hasattr(optimizer, "train"):  # schedule-free optimizers are trained in a mode
        optimizer.train()
    return optimizer


def _resident(make: Make, params: list[nn.Parameter]) -> str:
    """The peak of the process in three steps, without parameters, gradients and state, over these."""
    gc.collect()
    before = allocations.resident()
    allocations.reset_resident_peak()
    optimizer = _train_mode(make(params))
    for _ in range(3):
        optimizer.step()
    state = _state_bytes(optimizer)
    return _percent(allocations.resident_peak() - before - state, 2 * _nbytes(params) + state)


def _in_torch(make: Make, params: list[nn.Parameter]) -> str:
    """The peak of torch's allocations in a third step, over parameters, gradients and state."""
    optimizer = _train_mode(make(params))
    for _ in range(2):
        optimizer.step()
    return _percent(allocations.torch_peak(optimizer.step), 2 * _nbytes(params) + _state_bytes(optimizer))


def _rows(candidates: dict[str, tuple[Make, Callable[..., list[nn.Parameter]], str]]) -> list[list[object]]:
    """Both measures of each candidate; the resident ones first, because the profiler keeps and frees memory itself."""
    resident = {}
    for name, (make, model, _) in candidates.items():
        _resident(make, model(layers=1, dim=64))  # loads code, which stays
        resident[name] = _resident(make, model())
        print(f"  {name} {resident[name]}", file=sys.stderr, flush=True)
    return [
        [name, _in_torch(make, model()), resident[name], limit] for name, (make, model, limit) in candidates.items()
    ]


def _with_everything(cls: Callable[..., Optimizer], rule: ClipRule, params: list[nn.Parameter]) -> Optimizer:
    """Clip, check, skip and sums, in the optimizer's own step."""
    optimizer = cls(params)
    lo.StepPipeline(optimizer, clip=rule, detectors=[NonFiniteGradient()], on_report=lambda record: None)
    return optimizer


def memory_of_optimizers() -> str:
    """Each optimizer alone and with clip + skip + sums, and torch's AdamW."""
    candidates: dict[str, tuple[Make, Callable[..., list[nn.Parameter]], str]] = {}
    for name in lo.optim.list_optimizers():
        cls: Any = lo.optim.get_optimizer_class(name)
        if name in ("sgd", "lars"):
            cls = partial(cls, momentum=0.9)
        model = _two_layers if name == "soap" else matrices if name in ON_MATRICES else transformer
        limit = "1 %" if name == "adamw" else ""
        candidates[name] = cls, model, limit
        candidates[f"{name}, clip + skip + sums"] = partial(_with_everything, cls, GlobalNorm()), model, limit
    candidates |= {name: (make, transformer, "") for name, make in PEERS.items()}
    return table(["optimizer", *HEADER], _rows(candidates))


def _two_layers(layers: int = 2, **shape: int) -> list[nn.Parameter]:
    return matrices(layers, **shape)


def _four_layers(layers: int = 4, **shape: int) -> list[nn.Parameter]:
    return transformer(layers, **shape)


def memory_of_clipping_methods() -> str:
    """AdamW with each method, skip and sums."""
    rules = {name: get_clip_rule(name)() for name in list_clip_rules()}
    return table(
        ["method", *HEADER],
        _rows(
            {
                name: (partial(_with_everything, lo.optim.AdamW, rule), _four_layers, "1 %")
                for name, rule in rules.items()
            }
        ),
    )


class Deep(L.LightningModule):
    """Layers whose activations are next to nothing beside their weights."""

    def __init__(self, width: int, depth: int, fused: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        self._fused = fused

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Return a loss that has a gradient."""
        loss: Tensor = self.layers(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Return torch's fused AdamW; `ConfigureOptimizers` replaces it."""
        return torch.optim.AdamW(self.parameters(), fused=True)


def _suite(*more: L.Callback) -> list[L.Callback]:
    return [lo.ConfigureOptimizers("adamw", lr=1e-4, schedule="constant"), *more]


def _guard(memory: str | None) -> L.Callback:
    return lo.DivergenceGuard(rollback=None if memory is None else Rollback(every=2, clean=1, memory=memory))


def _details(of: tuple[str, ...], every: int = 1) -> L.Callback:
    per_tensor = PerTensor(every=every)
    histograms = Histograms(of=of, every=every) if of else None
    return lo.OptimizerMonitor(per_tensor=per_tensor, histograms=histograms)


ON_A_TRAINER: dict[str, tuple[Callable[[], list[L.Callback]], str]] = {
    "torch's fused AdamW, no callback": (list, ""),
    "ours, no other callback": (lambda: _suite(), "1 %"),
    "`GradientClipping`": (lambda: _suite(lo.GradientClipping(max_norm=1.0)), "1 %"),
    "`DivergenceGuard`, `rollback=None`": (lambda: _suite(_guard(None)), "1 %"),
    "`DivergenceGuard`, two snapshots in memory": (lambda: _suite(_guard("cpu")), "150 %: two of 12 bytes over 16"),
    "`DivergenceGuard`, snapshots on disk": (lambda: _suite(_guard("disk")), "75 % while one is written"),
    "`OptimizerMonitor`": (lambda: _suite(lo.OptimizerMonitor()), "1 %"),
    "its tables of tensors": (lambda: _suite(_details(())), "1 %"),
    "and histograms of gradients and parameters": (lambda: _suite(_details(("grad", "param"))), "1 %"),
    "and of updates": (lambda: _suite(_details(("update",))), "25 %: a copy of the parameters"),
}


def _fit(callbacks: list[L.Callback], width: int, depth: int, steps: int, every: int = 1) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder),
            log_every_n_steps=every,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(Deep(width, depth), DataLoader([torch.randn(width) for _ in range(8)] * (steps // 8 + 1)))


def memory_of_callbacks() -> str:
    """One row for each callback on a Trainer that logs at every step."""
    whole = 16 * DEPTH * WIDTH**2
    rows: list[list[object]] = []
    for name, (callbacks, limit) in ON_A_TRAINER.items():
        _fit(callbacks(), 16, DEPTH, steps=8)  # loads code, which stays
        gc.collect()
        before = allocations.resident()
        allocations.reset_resident_peak()
        _fit(callbacks(), WIDTH, DEPTH, steps=8)
        extra = allocations.resident_peak() - before - whole
        rows.append([name, _percent(extra, whole), f"{extra / 2**20:.1f}", limit])
        print("  " + " ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    return table(["on a Trainer", "resident, from the start on", "MiB", "limit"], rows)


class Growth(L.Callback):
    """Resident memory after a warm-up and at the end.

    Args:
        start: Step after which the warm-up is over.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self.grown = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Start or end the measurement."""
        if trainer.global_step in (self._start, trainer.max_steps):
            gc.collect()
            self.grown = allocations.resident() - (self.grown if trainer.global_step == trainer.max_steps else 0)


def memory_over_5000_steps() -> str:
    """Growth of the resident memory from step 1 000 to 5 000, of a Trainer that logs at every 10th."""
    runs: dict[str, Callable[[], list[L.Callback]]] = {
        "torch's fused AdamW, no callback": list,
        "`GradientClipping`": lambda: _suite(lo.GradientClipping(max_norm=1.0)),
        "`DivergenceGuard`, snapshots in memory": lambda: _suite(lo.DivergenceGuard()),
        "`OptimizerMonitor` with all details": lambda: _suite(_details(KINDS, every=20)),
        "all of these": lambda: _suite(
            lo.GradientClipping(max_norm=1.0), lo.DivergenceGuard(), _details(KINDS, every=20)
        ),
    }
    rows: list[list[object]] = []
    for name, callbacks in runs.items():
        growth = Growth(GROWTH_FROM)
        _fit([*callbacks(), growth], 16, 4, steps=GROWTH_STEPS, every=10)
        rows.append([name, f"{growth.grown / 2**20:.2f} MiB", "as without callbacks"])
        print("  " + " ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    return table(["on a Trainer", "growth in 4 000 steps", "limit"], rows)


def _alone(section: Callable[[], str]) -> Callable[[], str]:
    """The section, run in a process of its own."""

    def run() -> str:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", "--here", section.__name__],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    run.__name__ = section.__name__
    return run


HERE = (memory_of_optimizers, memory_of_clipping_methods, memory_of_callbacks, memory_over_5000_steps)
SECTIONS = tuple(map(_alone, HERE))


def main(arguments: list[str]) -> None:
    """Run the sections called so, or all; after ``--here`` one, in this process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = arguments[:1] == ["--here"]
    known = {section.__name__: section for section in (HERE if here else SECTIONS)}
    names = arguments[here:] or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"No section {unknown[0]!r}. There are: {', '.join(known)}.")
    if not here:
        print(machine(), flush=True)
    for name in names:
        if not here:
            print(f"\n## {name.replace('_', ' ')}\n", flush=True)
        print(known[name](), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
