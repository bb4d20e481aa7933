"""The page of a report: what was trained, a verdict, charts, tables. It needs no other file and no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_optim.diagnostics.metric_names import is_better_higher
from lightning_optim.diagnostics.run_report import interactive, pictures
from lightning_optim.diagnostics.run_report.analysis import (
    ACTS,
    convergence,
    convergence_of,
    generalisation,
    generalisation_of,
    stability,
)
from lightning_optim.diagnostics.run_report.charts import Chart, charts_of
from lightning_optim.diagnostics.run_report.configuration import differs, main_rows, other_rows
from lightning_optim.diagnostics.run_report.run import Run, loss_tags, short, with_own_names
from lightning_optim.diagnostics.run_report.verdict import REMEDY, compare, duration, of_run

_NO_LIBRARY = "The charts are pictures, because Bokeh is not installed: pip install 'lightning-optim[plot]'."

_FOLDED_FROM = 6
"""Number of lines from which an alarm is folded."""


def write_report(
    runs: Sequence[Run],
    folder: str | Path,
    targets: Sequence[float] | None = None,
    levels: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write ``report.html``, which needs no other file, and each chart as a PNG file.

    The charts of the page are interactive with Bokeh, and pictures without it. The PNG files need matplotlib.

    Args:
        runs: The runs to show.
        folder: Folder to write to; created if it does not exist.
        targets: Target losses, as for `convergence`.
        levels: Levels by name of a metric, as ``{"val_acc": [0.9]}``, for which steps and time to reach them are shown.

    Returns:
        The path of the page.

    Raises:
        ModuleNotFoundError: Neither Bokeh nor matplotlib is installed.
        NotADirectoryError: ``folder`` is a file, or below one.
        ValueError: ``levels`` has a metric that no run has.
    """
    with_library, with_pictures = interactive.can_draw(), pictures.can_draw()
    if not (with_library or with_pictures):
        raise ModuleNotFoundError("A report needs Bokeh or matplotlib: pip install 'lightning-optim[plot]'")
    runs = with_own_names(runs)
    for name in levels or {}:
        if not any(name in run.scalars for run in runs):
            known = ", ".join(dict.fromkeys(metric for run in runs for metric in run.metrics)) or "none"
            raise ValueError(f"No run has a metric {name!r}. The metrics of these runs: {known}.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"Cannot write a report to {folder}: {error.filename or folder} is a file. Give the name of a folder, in "
            "which report.html and the pictures are put."
        ) from None
    charts = charts_of(runs)
    saved = _Pictures(folder)
    drawn = [saved.add(chart.title, pictures.draw(chart, runs)) if with_pictures else "" for chart in charts]
    script, elements = interactive.draw(charts, runs) if with_library and charts else ("", drawn)
    parts = [
        _header(runs),
        "" if with_library else f'<p class="note">{html.escape(_NO_LIBRARY)}</p>',
        _section("What was trained", _configuration(runs)),
        _run_chips(runs) if len(runs) > 1 else "",
        '<section class="charts">',
        *map(partial(_chart, len(runs)), range(len(charts)), charts, elements),
        "</section>",
        _tables(runs, targets, levels or {}),
        *(_details(run, saved, len(runs) > 1) for run in runs),
    ]  # fmt: skip
    page = folder / "report.html"
    values = {
        "title": html.escape(", ".join(short(run.name) for run in runs)),
        "style": _template("page.css"),
        "library": interactive.library() if script else "",
        "body": "\n".join(part for part in parts if part),
        "charts": script,
        "code": _template("page.js"),
    }
    # In one pass, because a name may look like a place of the template.
    text = re.sub("%%([a-z]+)%%", lambda match: values[match[1]], _template("page.html"))
    page.write_text(text, encoding="utf-8")
    return page


class _Pictures:
    """PNG files in a folder, which the page contains as well."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()

    def add(self, title: str, picture: bytes) -> str:
        """Write a picture, and return it as an element of the page."""
        (self._folder / pictures.file_name(title, self._taken)).write_bytes(picture)
        encoded = base64.b64encode(picture).decode()
        return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


def _header(runs: Sequence[Run]) -> str:
    items = [f"<li>{html.escape(sentence)}</li>" for sentence in compare(runs)]
    for index, run in enumerate(runs):
        lines = [f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in of_run(run)]
        if lines:
            name = f"{_chip(index)} <b>{name_of(run)}</b>: " if len(runs) > 1 else ""
            items.append(f"<li>{name}{' '.join(lines)}</li>")
    if any("overfits" in item for item in items):
        items.append(f'<li class="note">{html.escape(REMEDY)}</li>')
    title = name_of(runs[0]) if len(runs) == 1 else f"{len(runs)} runs" if runs else "No runs"
    found = (
        f'<ul class="verdict">{"".join(items)}</ul>' if items else "<p>Nothing was logged that tells how it went.</p>"
    )
    return f"<header><h1>{title}</h1>{found}</header>"


def _configuration(runs: Sequence[Run]) -> str:
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else ["setting", "value"]
    found = _table(header, main_rows(runs), compares=True)
    tables = [
        (f"<h3>{name_of(run)}</h3>" if len(runs) > 1 else "") + _table(run.groups[0], run.groups[1:])
        for run in runs
        if len(run.groups) > 1
    ]
    if tables:
        found += f"<details><summary>Parameter groups</summary>{''.join(tables)}</details>"
    if rest := other_rows(runs):
        found += f"<details><summary>All other settings</summary>{_table(header, rest, compares=True)}</details>"
    return found


def _run_chips(runs: Sequence[Run]) -> str:
    chips = "".join(
        f'<button class="run" data-run="{index}" aria-pressed="true" title="{html.escape(run.name)}">'
        f"{_chip(index)}{name_of(run)}</button>"
        for index, run in enumerate(runs)
    )
    return f'<nav class="runs" aria-label="Runs to show">{chips}</nav>'


def _chip(index: int) -> str:
    return f'<i class="chip" style="background:{pictures.colour_of(index)}"></i>'


def _chart(runs: int, number: int, chart: Chart, element: str) -> str:
    dashes = {line.series: line.dash for line in chart.lines}
    chips = ""
    for place, name in enumerate(chart.series):
        colour = pictures.colour_of(place) if runs == 1 else "currentColor"
        chips += (
            f'<button class="series" data-chart="{number}" data-series="{place}" '
            f'aria-pressed="{json.dumps(name in chart.shown)}" title="{html.escape(name)}">'
            f'<i class="line {dashes[name]}" style="color:{colour}"></i>{html.escape(short(name))}</button>'
        )
    kinds = dict.fromkeys(mark.kind for mark in chart.marks)
    signs = {"skip": "✕ step skipped", "cut": "▼ learning rate cut", "rollback": "◆ rollback"}
    notes = [chart.note, *(signs[kind] for kind in kinds)]
    notes += ["Broad line: at least half of the steps were clipped."] * bool(chart.clipped)
    notes += ["Logarithmic."] * chart.log
    note = " · ".join(filter(None, (text.strip() for text in notes)))
    return (
        f'<article class="{"wide" if chart.wide else "half"}"><h2>{html.escape(short(chart.title))}</h2>'
        f'<p class="note">{html.escape(note)}</p><div class="series">{chips}</div>{element}</article>'
    )


def _tables(runs: Sequence[Run], targets: Sequence[float] | None, levels: Mapping[str, Sequence[float]]) -> str:
    rows = [[_name_of_loss(runs), *row] for row in convergence(runs, targets)]
    known = {row[0] for row in rows}
    rows += [row for row in convergence_of(runs, levels) if row[0] not in known]
    names = dict.fromkeys(row[0] for row in rows)
    body = "".join(_convergence(name, [row[1:] for row in rows if row[0] == name]) for name in names)
    note = '<p class="note">Step and time at which each level was first reached.</p>'
    found = _section("Convergence", body and note + body)
    gaps = [["loss", *row] for row in generalisation(runs)] + generalisation_of(runs)
    header = ["metric", "run", "best in validation", "at step", "training", "gap"]
    found += _section("Generalisation", _table(header, gaps))
    return found + _section("Stability", _table(["run", *ACTS, "last learning rates"], stability(runs)))


def _convergence(name: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table of one metric: a row for each run, a column for each level."""
    sign = "≥" if is_better_higher(name) else "≤"
    levels = list(dict.fromkeys(row[1] for row in rows))
    of_run: dict[str, list[str]] = {}
    for run, _, step, seconds in rows:
        of_run.setdefault(run, []).append(step if step == "never" else f"{step} ({duration(float(seconds))})")
    return _table([name, *(f"{sign} {level}" for level in levels)], [[run, *cells] for run, cells in of_run.items()])


def _name_of_loss(runs: Sequence[Run]) -> str:
    tags = {loss_tags(run)[0] for run in runs if loss_tags(run)}
    return (
        "training loss" if tags != {tag for tag in tags if tag != "optim_loss/mean"} or len(tags) != 1 else tags.pop()
    )


def _details(run: Run, saved: _Pictures, several: bool) -> str:
    body = ""
    for quantity, picture in run.heat_maps.items():
        title = f"{quantity} of each tensor in {run.name}"
        body += f"<h3>{html.escape(quantity)} of each tensor</h3>{saved.add(title, picture)}"
    for step, picture in run.incidents.items():
        title = f"Incident at step {step} of {run.name}"
        body += f"<h3>Incident at step {step:,}</h3>{saved.add(title, picture)}"
    lines = "".join(f"<li>{_alarm(alarm)}</li>" for alarm in run.alarms)
    body += f"<h3>Alarms and advice</h3><ul>{lines}</ul>" if lines else ""
    title = f"What happened in {short(run.name)}" if several else "What happened"
    return _section(title, body)


def _alarm(text: str) -> str:
    """Return a sentence as it is, and a long text, such as the guard's report, folded under its first line."""
    first, _, rest = text.partition("\n")
    if rest.count("\n") < _FOLDED_FROM:
        return f"<pre>{html.escape(text)}</pre>"
    return (
        f"<details><summary>{html.escape(first.lstrip('# '))}</summary><pre>{html.escape(rest.strip())}</pre></details>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], compares: bool = False) -> str:
    """Return a table; empty without rows.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
        compares: Whether each row compares runs: what all have is written once, and what differs is marked. Any other
            table sorts by a click on its header.
    """
    rows = list(rows)
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = [_cell("td", text) for text in row]
        mark = ""
        if compares and len(row) > 2:
            if differs(row[1:]):
                mark = ' class="differs"'
            else:
                cells[1:] = [_cell("td", row[1], f' colspan="{len(row) - 1}"')]
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    head = "".join(_cell("th", text) for text in header)
    kind = "compares" if compares else "sorts"
    body = "".join(lines)
    return f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(kind: str, content: Any, attributes: str = "") -> str:
    text = str(content)
    shown = text if kind == "td" else short(text)
    title = f' title="{html.escape(text)}"' if shown != text else ""
    # Parts of long words may stand in lines of their own, and so does each group of a list of groups.
    lines = [re.split(r"(?<=\S{40})(?=\S)", line) for line in shown.split("; ")]
    escaped = ";<br>".join("<wbr>".join(map(html.escape, parts)) for parts in lines)
    return f"<{kind}{attributes}{title}>{escaped}</{kind}>"


def name_of(run: Run) -> str:
    """Return the name of a run for the page."""
    return html.escape(short(run.name))


def _template(name: str) -> str:
    return files("lightning_optim.diagnostics.run_report").joinpath(name).read_text(encoding="utf-8")
