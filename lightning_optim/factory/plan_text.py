"""The plan of a run as text, and its schedule as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_optim.core.block_plot import block_rows
from lightning_optim.core.durations import Horizon
from lightning_optim.core.sizes import format_bytes
from lightning_optim.factory.plan import Curve, GroupPlan, Plan

_UNBOUNDED = 1000
"""Steps that are plotted of a run that nothing bounds."""


def format_plan(plan: Plan, parameters: bool = False, width: int = 72) -> str:
    """Format the plan as plain text: length, groups, schedule, notes and conflicts.

    Args:
        plan: The plan.
        parameters: Whether to list every parameter under its group.
        width: Columns of the plot, at least 20.
    """
    total, per_epoch = plan.horizon.total_steps, plan.horizon.steps_per_epoch
    lines = [
        f"Optimizer steps: {'unbounded' if total is None else f'{total:,}'}"
        + ("" if per_epoch is None else f" ({per_epoch:,g} per epoch)")
    ]
    lines += [line for label, text in plan.facts.items() for line in _fact(label, text)]
    if plan.groups:
        lines += ["", *_table(plan.groups, parameters)]
        lines += [f"{group.name}: {_left_out(group.not_hidden)}." for group in plan.groups if group.not_hidden]
        lines += [line for group in plan.groups for line in _fact(group.name, _forms(group.forms)) if group.forms]
    for curve in plan.curves:
        lines += ["", *_plot(curve, total, max(width, 20))]
    lines += [f"\nNote: {note}" for note in plan.notes]
    if plan.conflicts:
        lines += ["", f"{len(plan.conflicts)} conflict{'s' if len(plan.conflicts) > 1 else ''}:"]
        lines += [f"  {number}. {conflict}" for number, conflict in enumerate(plan.conflicts, 1)]
    else:
        lines += ["", "No conflicts."]
    return "\n".join(lines)


def _table(groups: Sequence[GroupPlan], parameters: bool) -> list[str]:
    header = ["group", "tensors", "parameters", "peak lr", "weight decay", "rule", "state", "B/param"]
    further = _further_columns(groups)
    rows: list[list[str]] = [[*header, *further]]
    details: dict[int, list[str]] = {}
    for group in groups:
        row = [group.name, f"{len(group.parameters):,}", f"{group.numel:,}", f"{group.lr:.4g}"]
        row += ["-" if group.weight_decay is None else f"{group.weight_decay:g}", group.rule]
        row += [_bytes(group.state_bytes), _each(group.state_bytes, group.numel)]
        rows.append([*row, *(show(group) for show in further.values())])
        if parameters:
            plain = {name: f"matrix {list(shape)}" for name, shape in group.parameters}
            about = {name: form for name, form in group.forms.items() if form != plain[name]} | dict(group.not_hidden)
            details[len(rows) - 1] = [
                f"    {name}  {list(shape)}" + (f"  ({about[name]})" if name in about else "")
                for name, shape in group.parameters
            ]
    sizes = [group.state_bytes for group in groups]
    known = [size for size in sizes if size is not None]
    last = ["total", f"{sum(len(group.parameters) for group in groups):,}", f"{sum(group.numel for group in groups):,}"]
    size = sum(known) if len(known) == len(sizes) else None
    last += ["", "", "", _bytes(size), _each(size, sum(group.numel for group in groups))]
    rows.append([*last, *[""] * len(further)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if number in (0, len(rows) - 2):
            lines += details.pop(number, [])
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines += details.get(number, [])
    return lines


def _further_columns(groups: Sequence[GroupPlan]) -> dict[str, Callable[[GroupPlan], str]]:
    """Columns for what is not the same in all groups."""
    columns: dict[str, Callable[[GroupPlan], str]] = {}
    if len({(group.rule, group.betas) for group in groups}) > len({group.rule for group in groups}):
        columns["betas"] = lambda group: ", ".join(f"{beta:g}" for beta in group.betas or ()) or "-"
    if any(group.decay_kind is not None for group in groups):
        columns["decay kind"] = lambda group: group.decay_kind or "-"
    if any(group.schedule is not None for group in groups):
        columns["schedule"] = lambda group: group.schedule or "-"
    if any(group.frozen_until is not None for group in groups):
        columns["frozen until"] = lambda group: group.frozen_until or "-"
    return columns


def _fact(label: str, text: str) -> list[str]:
    """A fact in lines of 80 columns, its text indented."""
    head = f"{label}: "
    return textwrap.wrap(text, 80, initial_indent=head, subsequent_indent="    ", break_on_hyphens=False) or [head]


def _left_out(reasons: Mapping[str, str]) -> str:
    """The parameters that are not orthogonalised, by kind; vectors are counted, the first matrices named."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in reasons.items():
        by_kind.setdefault(kind, []).append(name)
    parts = []
    for kind, names in sorted(by_kind.items(), key=lambda item: item[0] != "vector"):
        named = "" if kind == "vector" else f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        parts.append(f"{len(names):,} {kind}{'s' if len(names) > 1 else ''}{named}")
    return f"no hidden matrices, so {', '.join(parts)} go to AdamW"


def _forms(forms: Mapping[str, str]) -> str:
    """The matrices that the parameters of a group consist of, those of one form counted."""
    counts: dict[str, int] = {}
    for form in forms.values():
        counts[form] = counts.get(form, 0) + 1
    return "; ".join(f"{count:,} x {form}" if count > 1 else form for form, count in counts.items())


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _each(count: int | None, numel: int) -> str:
    """Bytes of state per parameter."""
    return "-" if count is None or not numel else f"{count / numel:.3g}"


_ROWS = 8


def _plot(curve: Curve, total_steps: int | None, width: int) -> list[str]:
    """The curve as an area of block characters, an eighth of a line exact."""
    last = max((_UNBOUNDED if total_steps is None else total_steps) - 1, 0)
    steps = [round(index * last / (width - 1)) for index in range(width)]  # of a short run each several times
    values = [curve.values(step) for step in steps]
    top = max(*values, 0.0)
    areas = block_rows([value / top if top > 0 else 0.0 for value in values], _ROWS)
    margin = max(len(f"{top:.4g}"), 1)
    labels = [f"{top:.4g}", *[""] * (_ROWS - 2), "0"]
    lines = [f"{curve.label}:"]
    lines += [f"{label.rjust(margin)} |{area}".rstrip() for label, area in zip(labels, areas, strict=True)]
    lines.append(f"{' ' * margin} 0{f'step {steps[-1]:,}'.rjust(len(steps))}")
    return lines


def _steps(total_steps: int | None, count: int) -> list[int]:
    """Steps that take part, evenly spread, the first and the last among them."""
    last = max((_UNBOUNDED if total_steps is None else total_steps) - 1, 0)
    return sorted({round(index * last / (count - 1)) for index in range(count)})


def save_plot(curves: Iterable[Curve], horizon: Horizon, path: str | Path) -> None:
    """Draw the curves into a PNG, each over the steps of the run.

    Args:
        curves: What to draw.
        horizon: Length of the run.
        path: Where to write it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    _figure(curves, horizon).savefig(path, format="png", dpi=120)


def draw_curves(curves: Iterable[Curve], horizon: Horizon, step: int) -> Any:
    """Draw the curves as pixels, with a line at ``step``.

    Args:
        curves: What to draw.
        horizon: Length of the run.
        step: Where to draw the line.

    Returns:
        uint8 array, shape [height, width, 3].

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = _figure(curves, horizon)
    for panel in figure.axes:
        panel.axvline(step, color="tab:red", linewidth=1)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _figure(curves: Iterable[Curve], horizon: Horizon) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A plot as PNG needs matplotlib: pip install 'lightning-optim[plot]'") from error
    curves = list(curves)
    figure = Figure(figsize=(7, 2.4 * max(len(curves), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    steps = _steps(horizon.total_steps, 1000)
    panels = figure.subplots(max(len(curves), 1), 1, squeeze=False, sharex=True)[:, 0]
    for panel, curve in zip(panels, curves, strict=False):
        panel.plot(steps, [curve.values(step) for step in steps])
        panel.set_title(curve.label, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    return figure
