"""The page of a report: what was trained, a verdict, charts, tables. It needs no other file and no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lightning_optim.diagnostics.metric_names import is_better_higher
from lightning_optim.diagnostics.run_report.analysis import (
    ACTS,
    convergence,
    convergence_of,
    generalisation,
    generalisation_of,
    stability,
)
from lightning_optim.diagnostics.run_report.charts import charts_of
from lightning_optim.diagnostics.run_report.configuration import main_rows, other_rows
from lightning_optim.diagnostics.run_report.elements import (
    Pictures,
    chart_element,
    chip,
    draw_charts,
    library_note,
    made_folder,
    name_of,
    require_plots,
    run_chips,
    section,
    table,
    write_page,
)
from lightning_optim.diagnostics.run_report.run import Run, loss_tags, short, with_own_names
from lightning_optim.diagnostics.run_report.verdict import REMEDY, compare, duration, of_run

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
    require_plots()
    runs = with_own_names(runs)
    for name in levels or {}:
        if not any(name in run.scalars for run in runs):
            known = ", ".join(dict.fromkeys(metric for run in runs for metric in run.metrics)) or "none"
            raise ValueError(f"No run has a metric {name!r}. The metrics of these runs: {known}.")
    folder = made_folder(folder)
    charts = charts_of(runs)
    saved = Pictures(folder)
    script, elements = draw_charts(charts, runs, saved)
    parts = [
        _header(runs),
        library_note(),
        section("What was trained", _configuration(runs)),
        run_chips(runs) if len(runs) > 1 else "",
        '<section class="charts">',
        *map(partial(chart_element, len(runs)), range(len(charts)), charts, elements),
        "</section>",
        _tables(runs, targets, levels or {}),
        *(_details(run, saved, len(runs) > 1) for run in runs),
    ]  # fmt: skip
    return write_page(folder / "report.html", ", ".join(short(run.name) for run in runs), parts, script)


def _header(runs: Sequence[Run]) -> str:
    items = [f"<li>{html.escape(sentence)}</li>" for sentence in compare(runs)]
    for index, run in enumerate(runs):
        lines = [f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in of_run(run)]
        if lines:
            name = f"{chip(index)} <b>{name_of(run)}</b>: " if len(runs) > 1 else ""
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
    found = table(header, main_rows(runs), compares=True)
    tables = [
        (f"<h3>{name_of(run)}</h3>" if len(runs) > 1 else "") + table(run.groups[0], run.groups[1:])
        for run in runs
        if len(run.groups) > 1
    ]
    if tables:
        found += f"<details><summary>Parameter groups</summary>{''.join(tables)}</details>"
    if rest := other_rows(runs):
        found += f"<details><summary>All other settings</summary>{table(header, rest, compares=True)}</details>"
    return found


def _tables(runs: Sequence[Run], targets: Sequence[float] | None, levels: Mapping[str, Sequence[float]]) -> str:
    rows = [[_name_of_loss(runs), *row] for row in convergence(runs, targets)]
    known = {row[0] for row in rows}
    rows += [row for row in convergence_of(runs, levels) if row[0] not in known]
    names = dict.fromkeys(row[0] for row in rows)
    body = "".join(_convergence(name, [row[1:] for row in rows if row[0] == name]) for name in names)
    note = '<p class="note">Step and time at which each level was first reached.</p>'
    found = section("Convergence", body and note + body)
    gaps = [["loss", *row] for row in generalisation(runs)] + generalisation_of(runs)
    header = ["metric", "run", "best in validation", "at step", "training", "gap"]
    found += section("Generalisation", table(header, gaps))
    return found + section("Stability", table(["run", *ACTS, "last learning rates"], stability(runs)))


def _convergence(name: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table of one metric: a row for each run, a column for each level."""
    sign = "≥" if is_better_higher(name) else "≤"
    levels = list(dict.fromkeys(row[1] for row in rows))
    of_run: dict[str, list[str]] = {}
    for run, _, step, seconds in rows:
        of_run.setdefault(run, []).append(step if step == "never" else f"{step} ({duration(float(seconds))})")
    return table([name, *(f"{sign} {level}" for level in levels)], [[run, *cells] for run, cells in of_run.items()])


def _name_of_loss(runs: Sequence[Run]) -> str:
    tags = {loss_tags(run)[0] for run in runs if loss_tags(run)}
    return (
        "training loss" if tags != {tag for tag in tags if tag != "optim_loss/mean"} or len(tags) != 1 else tags.pop()
    )


def _details(run: Run, saved: Pictures, several: bool) -> str:
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
    return section(title, body)


def _alarm(text: str) -> str:
    """Return a sentence as it is, and a long text, such as the guard's report, folded under its first line."""
    first, _, rest = text.partition("\n")
    if rest.count("\n") < _FOLDED_FROM:
        return f"<pre>{html.escape(text)}</pre>"
    return (
        f"<details><summary>{html.escape(first.lstrip('# '))}</summary><pre>{html.escape(rest.strip())}</pre></details>"
    )
