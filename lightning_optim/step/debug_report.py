"""The report of a step under observation: a verdict in words, and a table in 80 columns."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

from lightning_optim.step.debug_findings import StepFinding
from lightning_optim.step.debug_rows import TensorStep

WIDTH = 80
MOST_ROWS = 40
"""Rows of the text; `DebugReport.rows` has all."""
HARMLESS = ("some-without-gradient", "some-zero-gradients", "found-inf")
"""Kinds that are seen in runs that train well."""


@dataclass(frozen=True)
class DebugReport:
    """What one step did.

    Args:
        rows: One for each tensor, in the order of the groups.
        findings: What stands against training, the most fundamental first.
        optimizer: Name of the class of the optimizer.
        undone: Whether everything was put back.

    Example:
        >>> import torch
        >>> import lightning_optim as lo
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> print(lo.debug_step(optimizer))
        SGD: nothing moved (1 tensor). No tensor has a gradient.
        <BLANKLINE>
          tensor                   grad   update    ratio   cos  decay       lr    step
        -------------------------------------------------------------------------------
        ! group 0[0]               none        0        0     -      -      0.1       -
            no gradient
        <BLANKLINE>
        1. no-gradient
           No tensor has a gradient.
           -> Call backward() before the step, and zero_grad() only after it; see that
              the loss depends on these parameters (no detach(), item(), no_grad()).
    """

    rows: tuple[TensorStep, ...]
    findings: tuple[StepFinding, ...]
    optimizer: str
    undone: bool

    @property
    def kinds(self) -> list[str]:
        """Kinds of the findings, in order."""
        return [finding.kind for finding in self.findings]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that stands against training."""
        return all(kind in HARMLESS for kind in self.kinds)

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        moved = sum(row.skipped is None for row in self.rows)
        total = f"{len(self.rows)} tensor{'s' * (len(self.rows) != 1)}"
        head = f"nothing moved ({total})" if not moved else f"{moved} of {total} moved"
        telling = [f for f in self.findings if f.kind not in HARMLESS] or ([] if moved else list(self.findings))
        last = telling[0].seen if telling else "Nothing stands against training."
        return f"{self.optimizer}: {head}{', and was put back' if moved and self.undone else ''}. {last}"

    def __str__(self) -> str:
        lines = [*textwrap.wrap(self.verdict, WIDTH), ""]
        widths = (20, 7, 7, 7, 4, 5, 7, 6)
        head = ("tensor", "grad", "update", "ratio", "cos", "decay", "lr", "step")
        lines += ["  " + _line(head, widths), "-" * (sum(widths) + 2 * len(widths))]
        for row in self.rows[:MOST_ROWS]:
            mark = "  " if row.skipped is None else "! "
            lines.append(mark + _line(_cells(row, widths[0]), widths))
            if row.skipped is not None:
                lines.append(f"    {row.skipped}")
        if len(self.rows) > MOST_ROWS:
            lines.append(f"  and {len(self.rows) - MOST_ROWS} more")
        for number, finding in enumerate(self.findings, start=1):
            lines += ["", f"{number}. {finding.kind}"]
            lines += textwrap.wrap(finding.seen, WIDTH, initial_indent="   ", subsequent_indent="   ")
            lines += textwrap.wrap(finding.advice, WIDTH, initial_indent="   -> ", subsequent_indent="      ")
        return "\n".join(line.rstrip() for line in lines)


def _line(cells: tuple[str, ...], widths: tuple[int, ...]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)])


def _cells(row: TensorStep, width: int) -> tuple[str, ...]:
    name = row.name if len(row.name) <= width else "..." + row.name[3 - width :]
    grad = {"fine": _short(row.grad_norm), "sparse": _short(row.grad_norm), "zero": "0", "not finite": "NaN/inf"}
    decay = "-" if row.decay_share is None else f"{min(row.decay_share, 9.99):.0%}"
    steps = [("-" if step is None else f"{step:g}") for step in (row.step_before, row.step_after)]
    step = steps[1] if steps[0] in ("-", steps[1]) else f"{steps[0]}>{steps[1]}"
    cosine = "-" if math.isnan(row.against_grad) else f"{row.against_grad:.2f}".replace("0.", ".")
    numbers = (_short(row.update_norm), _short(row.ratio), cosine, decay, _short(row.lr), step)
    return (name, grad.get(row.grad, row.grad), *numbers)


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"
