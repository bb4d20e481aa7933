"""The coordinate check of muP: whether activations, and what training changes in them, are the same at every width."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.tuning.inspection.plain_steps import PlainSteps

STEEP = 0.25
"""Slope in log-log from which something depends on width. With Adam, a hidden layer in the usual parametrisation has
about 1, and the noise of three seeds over a factor of 8 in width is about 0.1."""


@dataclass(frozen=True)
class CoordinateRow:
    """One module over widths and steps.

    Args:
        name: Name of the module; ``"output"`` for that of the whole model.
        rms: RMS of its outputs, `(steps + 1, widths)`, the first before training.
        change: RMS of what training has changed in its outputs for the same batch, `(steps + 1, widths)`.
    """

    name: str
    rms: tuple[tuple[float, ...], ...]
    change: tuple[tuple[float, ...], ...]
    widths: tuple[int, ...]

    @property
    def start_slope(self) -> float:
        """Exponent of width in the RMS before training."""
        return slope(self.widths, self.rms[0])

    @property
    def end_slope(self) -> float:
        """Exponent of width in the RMS after the last step."""
        return slope(self.widths, self.rms[-1])

    @property
    def change_slope(self) -> float:
        """Exponent of width in what training has changed."""
        return slope(self.widths, self.change[-1])

    @property
    def verdict(self) -> str:
        """``"grows"`` with width, ``"shrinks"``, or ``"flat"``."""
        if self.end_slope > STEEP or self.change_slope > STEEP:
            return "grows"
        # What is smaller from the start may be meant so, as a head of muP is; that training changes less is not.
        return "shrinks" if self.change_slope < -STEEP else "flat"


@dataclass
class CoordinateCheck:
    """What `coordinate_check` has seen."""

    widths: tuple[int, ...]
    steps: int
    rows: list[CoordinateRow] = field(default_factory=list)

    @property
    def flat(self) -> bool:
        """Whether nothing depends on width."""
        return all(row.verdict == "flat" for row in self.rows)

    @property
    def grows(self) -> list[str]:
        """Names of the modules that grow with width."""
        return [row.name for row in self.rows if row.verdict == "grows"]

    @property
    def shrinks(self) -> list[str]:
        """Names of the modules in which training changes less the wider they are."""
        return [row.name for row in self.rows if row.verdict == "shrinks"]

    def table(self) -> str:
        """Return slopes and ends by module as a table of at most 80 columns, with a verdict below it."""
        from lightning_optim.tuning.inspection.text import shortened

        first, last = self.widths[0], self.widths[-1]
        head = ("module", f"rms at {first}", f"at {last}", "slope", "change slope", "")
        cells = [head]
        for row in self.rows:
            ends = (f"{row.rms[-1][0]:.3g}", f"{row.rms[-1][-1]:.3g}")
            slopes = (f"{row.end_slope:+.2f}", f"{row.change_slope:+.2f}")
            cells.append((shortened(row.name, 28), *ends, *slopes, "" if row.verdict == "flat" else row.verdict))
        sizes = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = []
        for cell in cells:
            middle = [value.rjust(size) for value, size in zip(cell[1:5], sizes[1:5], strict=True)]
            lines.append("  ".join((cell[0].ljust(sizes[0]), *middle, cell[5])).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, "", *textwrap.wrap(self._verdict(), 80)])

    def _verdict(self) -> str:
        if self.flat:
            return f"Flat: over widths {self.widths[0]} to {self.widths[-1]} nothing depends on width."
        parts = [
            f"{' and '.join(names)} {verb}" for verb, names in (("grow", self.grows), ("shrink", self.shrinks)) if names
        ]
        return f"Not flat: with width, {'; '.join(parts)}. A learning rate will not transfer."

    def picture(self, path: str | Path) -> None:
        """Draw RMS and change over width, a line for each module, into a PNG.

        Args:
            path: Where to write it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from lightning_optim.tuning.inspection.picture import new_figure

        figure = new_figure((9.0, 4.5))
        panels: Any = figure.subplots(1, 2, sharex=True)
        titles = (f"RMS of outputs after {self.steps} steps", "RMS of what the steps have changed")
        for panel, title, key in zip(panels, titles, ("rms", "change"), strict=True):
            for row in self.rows:
                panel.plot(self.widths, getattr(row, key)[-1], marker=".", linewidth=1.2, label=row.name)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("width")
            panel.set_title(title, fontsize=10, loc="left")
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        figure.savefig(str(path), dpi=110, format="png")

    def __str__(self) -> str:
        return self.table()


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    make_optimizer: Callable[[nn.Module, int], Any],
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    step: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 4,
    seeds: int = 3,
) -> CoordinateCheck:
    """Train models of several widths for a few steps, and see whether their activations depend on width.

    In the maximal update parametrisation they do not: neither at the start nor in what training changes. Then a
    learning rate that was found on a narrow model is right for a wide one (`WidthScaling`). In the usual
    parametrisation with Adam, hidden layers and outputs change more the wider they are.

    Args:
        make_model: Makes the model of a width.
        widths: At least two widths, in increasing order; a factor of 8 between the ends tells well.
        make_optimizer: Makes the optimizer of a model of this width, with the rates of its groups; or optimizer and
            scheduler, as `OptimizerFactory.build` does, of which the scheduler is not moved.
        batch: The batch that all steps train on, ``(inputs, targets)`` with `loss`.
        loss: Function of outputs and targets that returns one number.
        step: Function of model and batch that returns the loss, in place of `loss`.
        steps: Number of optimizer steps, at least 1.
        seeds: Number of seeds to average over, at least 1.

    Returns:
        Slopes for each module with parameters, and for the output of the model.

    Raises:
        ValueError: A number is invalid, or widths are fewer than two or not increasing.

    References:
        Yang et al., Tensor Programs V, 2022, https://arxiv.org/abs/2203.03466, appendix D.1.

    Example:
        >>> def make(width):
        ...     layers = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        ...     return nn.Sequential(*layers)
        >>> adam = lambda model, width: torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> batch = torch.randn(32, 4), torch.randint(2, (32,))
        >>> coordinate_check(make, [16, 64, 256], adam, batch, loss=nn.functional.cross_entropy).flat
        False
    """
    widths = tuple(widths)
    if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"Invalid widths={list(widths)!r}: must be at least two positive numbers, increasing.")
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"Invalid {name}={value!r}: must be a whole number of at least 1.")
    runs = []
    with torch.random.fork_rng(), torch.enable_grad():
        for width in widths:
            over_seeds = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make_model(width)
                made = make_optimizer(model, width)
                optimizer = made[0] if isinstance(made, tuple) else made
                over_seeds.append(_train(PlainSteps(model, [batch], loss, step), optimizer, batch, steps))
            runs.append(over_seeds)
    names = [name for name in runs[0][0] if all(name in run for per_width in runs for run in per_width)]
    rows = []
    for name in names:
        rms, change = (
            tuple(
                tuple(_mean([run[name][at][which] for run in per_width]) for per_width in runs)
                for at in range(steps + 1)
            )
            for which in (0, 1)
        )
        rows.append(CoordinateRow(name, rms, change, widths))
    return CoordinateCheck(widths, steps, rows)


def _train(steps: PlainSteps, optimizer: Optimizer, batch: Any, count: int) -> dict[str, list[tuple[float, float]]]:
    """RMS and change of each module before the first and after each step."""
    first: dict[str, Tensor] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    (placed,) = steps.batches(1)
    for _ in range(count + 1):
        optimizer.zero_grad()
        with _outputs(steps.model) as outputs:
            steps.run(placed, 0)
        for name, value in outputs.items():
            start = first.setdefault(name, value)
            changed = value - start if start.shape == value.shape else torch.full((), math.nan, device=value.device)
            found.setdefault(name, []).append((_rms(value), _rms(changed)))
        optimizer.step()
    return {name: values for name, values in found.items() if len(values) == count + 1}


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The outputs of all modules with parameters of their own, in the order of execution, and that of the model."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple | list) else output
            tensor = getattr(tensor, "logits", tensor)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in outputs:
                outputs[name] = tensor.detach().float().clone()

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)) or module is model:
                stack.callback(module.register_forward_hook(keep(name or "output")).remove)
        yield outputs


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _mean(values: Sequence[float]) -> float:
    """Root of the mean square."""
    return math.sqrt(sum(value**2 for value in values) / len(values))


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent of width that fits the values best; 0 if they are not all positive, infinite if not finite.

    Example:
        >>> round(slope([16, 64, 256], [1.0, 2.0, 4.0]), 3)
        0.5
    """
    if not all(math.isfinite(value) for value in values):
        return math.inf
    if not all(value > 0 for value in values):
        return 0.0
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
