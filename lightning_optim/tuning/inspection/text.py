"""An inspection as text."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator

from lightning_optim.tuning.inspection.findings import Finding
from lightning_optim.tuning.inspection.inspection import Inspection, Row

_HEADER = ("place", "function", "rms", "zeros", "grad rms", "gain", "dW rms")
_MOST_PLACES = 3
"""Further places of a finding that are named."""


def format_inspection(inspection: Inspection, width: int = 80) -> str:
    """Format losses, table and findings.

    Args:
        inspection: What was seen.
        width: Most columns of a line.
    """
    lines = [
        f"Batches: {inspection.batches} of {inspection.samples}, forward and backward, no update",
        f"Parameters: {inspection.parameters:,}, trainable {inspection.trainable:,}",
    ]
    for loss in inspection.losses:
        chance = "" if loss.chance is None else f", chance gives {loss.chance:.4g}"
        text = f"Loss at the start: {loss.value:.4g} ({loss.name}{chance})"
        lines += textwrap.wrap(text, width, subsequent_indent="   ")
    if inspection.rows:
        lines += ["", format_table(inspection, width)]
    problems, notes = inspection.problems, [each for each in inspection.findings if each.level == "note"]
    for number, finding in enumerate(problems, 1):
        lines += ["", *_finding(f"{number}. ", finding, width)]
    for note in notes:
        lines += ["", *_finding("Note: ", note, width)]
    if inspection.error is not None:
        lines += ["", *textwrap.wrap(f"The look ended early: {inspection.error}", width)]
    plural = "s" if len(problems) != 1 else ""
    lines += ["", f"{len(problems)} finding{plural}." if problems else "Nothing stands against training."]
    return "\n".join(lines)


def _finding(head: str, finding: Finding, width: int) -> Iterator[str]:
    where = finding.where
    if finding.further:
        more = len(finding.further) - _MOST_PLACES
        names = ", ".join(finding.further[:_MOST_PLACES]) + (f" and {more} more" if more > 0 else "")
        where += f" (also {names})"
    indent = " " * 3
    for text, first in ((f"{finding.kind}: {where}", head), (finding.seen, indent), (finding.why, indent)):
        yield from textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
    yield from textwrap.wrap(
        f"-> {finding.advice}", width, initial_indent=indent, subsequent_indent=indent * 2, break_on_hyphens=False
    )


def format_table(inspection: Inspection, width: int = 80) -> str:
    """Format the rows.

    Args:
        inspection: What was seen.
        width: Most columns of a line; names are shortened in the middle.
    """
    marked = {name for finding in inspection.findings for name in (finding.where, *finding.further)}
    rows = [_HEADER, *(_cells(row) for row in inspection.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    widths[1] = min(widths[1], 14)
    left = width - sum(widths[1:]) - 2 * (len(widths) - 1) - 2
    widths[0] = max(min(widths[0], left), 8)
    lines = []
    for number, row in enumerate(rows):
        flag = " "
        if number:
            name = inspection.rows[number - 1].name
            flag = "!" if name in marked or any(m.rpartition(".")[0] == name for m in marked) else " "
        cells = [shortened(row[0], widths[0]).ljust(widths[0]), shortened(row[1], widths[1]).ljust(widths[1])]
        cells += [cell.rjust(size) for cell, size in zip(row[2:], widths[2:], strict=True)]
        lines.append(f"{flag} {'  '.join(cells)}".rstrip())
        if number == 0:
            lines.append("-" * (sum(widths) + 2 * len(widths)))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    zeros = f"{row.zeros:.0%}" if row.zeros >= 0.005 else ""
    gain = "" if row.weight_gain is None else f"{row.weight_gain:.2g}"
    return (
        row.name,
        row.operation,
        _number(row.rms),
        zeros,
        _number(row.gradient_rms),
        gain,
        "" if row.weight_gradient_rms is None else _number(row.weight_gradient_rms),
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def shortened(text: str, width: int) -> str:
    """Return a text with its middle left out if it is too long.

    Example:
        >>> shortened("model.decoder.layers.11.attention.out", 20)
        'model.dec~ention.out'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2 + (width - 1) % 2
    return f"{text[: width - 1 - tail]}~{text[-tail:]}"


def styled(text: str) -> str:
    """Return the text of an inspection with marks for rich: findings stand out.

    Args:
        text: What `format_inspection` returns.

    Example:
        >>> styled("1. large-weights: head.weight")
        '[bold red]1. large-weights: head.weight[/]'
    """
    styles = {"Note: ": "bold yellow", "   -> ": "green", "! ": "bold"}
    lines = []
    for line in text.replace("[", "\\[").splitlines():
        style = next((style for head, style in styles.items() if line.startswith(head)), None)
        if re.match(r"\d+\. [a-z-]+: ", line):
            style = "bold red"
        lines.append(f"[{style}]{line}[/]" if style else line)
    return "\n".join(lines)
