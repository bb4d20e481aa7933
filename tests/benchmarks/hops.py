"""Count what one warm step walks through: calls, functions, files, and hops between files of the package.

Run ``python -m tests.benchmarks.hops``; with ``-v`` it prints every call. A hop is a call from one file of the package
into another one. Calls into torch, Lightning and compiled kernels are not counted.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.divergence import NonFiniteGradient

ROOT = os.path.dirname(lo.__file__) + os.sep
WARM = 6
"""Steps before the one that is counted: kernels are compiled, batches are sorted."""


class Trace:
    """A profile function that notes the calls of this package's functions."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, str, str | None]] = []
        """Depth, file, function, and the file of the nearest caller in the package."""
        self._stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(ROOT):
            return
        if event == "call":
            file = code.co_filename[len(ROOT) :]
            name = getattr(code, "co_qualname", code.co_name)
            self.calls.append((len(self._stack), file, name, self._stack[-1] if self._stack else None))
            self._stack.append(file)
        elif event == "return" and self._stack:
            self._stack.pop()

    def hops(self) -> int:
        """Calls that lead from one file into another."""
        return sum(caller not in (None, file) for _, file, _, caller in self.calls)

    def row(self, title: str) -> str:
        """One row of a Markdown table."""
        functions = {(file, name) for _, file, name, _ in self.calls}
        files = {file for _, file, _, _ in self.calls}
        return f"| {title} | {len(self.calls)} | {len(functions)} | {len(files)} | {self.hops()} |"

    def __str__(self) -> str:
        return "\n".join(f"{'  ' * depth}{file}: {name}" for depth, file, name, _ in self.calls)


@contextmanager
def traced(trace: Trace) -> Any:
    """Count within the block."""
    sys.setprofile(trace)
    try:
        yield
    finally:
        sys.setprofile(None)


def plain_step(optimizer_name: str, guarded: bool) -> Trace:
    """One step in a loop of one's own, with or without clipping by norm and skipping of non-finite gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))
    optimizer, _ = lo.OptimizerFactory(optimizer_name, lr=3e-4).build(model, lo.Horizon(total_steps=100))
    if guarded:
        lo.StepPipeline(optimizer, clip=GlobalNorm(1.0), detectors=[NonFiniteGradient()])
    trace = Trace()
    for step in range(WARM + 1):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        if step < WARM:
            optimizer.step()
        else:
            with traced(trace):
                optimizer.step()
    return trace


def lightning_batch() -> Trace:
    """One batch of a fit with the four callbacks, none of them due to report."""
    import lightning.pytorch as L
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)  # `ConfigureOptimizers` puts another in its place

    trace, counted = Trace(), 15

    class Begin(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == counted:
                sys.setprofile(trace)

    class End(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            sys.setprofile(None)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 4)), batch_size=2)
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            lo.ConfigureOptimizers("adamw", lr=1e-3, schedule="cosine", warmup="5%"),
            lo.GradientClipping(max_norm=1.0),
            lo.DivergenceGuard(report_dir=folder),
            lo.OptimizerMonitor(),
        ]
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            log_every_n_steps=5,
            callbacks=[Begin(), *ours, End()],
            **quiet,
        )
        trainer.fit(Module(), data)
    return trace


CASES: dict[str, Callable[[], Trace]] = {
    "AdamW alone": lambda: plain_step("adamw", guarded=False),
    "AdamW + norm + skip": lambda: plain_step("adamw", guarded=True),
    "Muon + norm + skip": lambda: plain_step("muon", guarded=True),
    "a Lightning batch with the four callbacks": lightning_batch,
}


def main() -> None:
    """Print a row for each case."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| one warm step | calls | functions | files | hops between files |", "|---|---|---|---|---|", sep="\n")
    for title, case in CASES.items():
        trace = case()
        print(trace.row(title))
        if "-v" in sys.argv:
            print(trace)


if __name__ == "__main__":
    main()
