"""Elements of pages: sections, tables, charts with their buttons, and a page around them that needs no other file."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_optim.diagnostics.run_report import interactive, pictures
from lightning_optim.diagnostics.run_report.charts import Chart
from lightning_optim.diagnostics.run_report.configuration import differs
from lightning_optim.diagnostics.run_report.run import Run, short

_NO_LIBRARY = "The charts are pictures, because Bokeh is not installed: pip install 'lightning-optim[plot]'."


def require_plots() -> None:
    """Check that charts can be drawn.

    Raises:
        ModuleNotFoundError: Neither Bokeh nor matplotlib is installed.
    """
    if not (interactive.can_draw() or pictures.can_draw()):
        raise ModuleNotFoundError("A report needs Bokeh or matplotlib: pip install 'lightning-optim[plot]'")


def library_note() -> str:
    """Return a note for a page without Bokeh; empty with it."""
    return "" if interactive.can_draw() else f'<p class="note">{html.escape(_NO_LIBRARY)}</p>'


def made_folder(folder: str | Path) -> Path:
    """Create a folder for a page if it does not exist.

    Raises:
        NotADirectoryError: ``folder`` is a file, or below one.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"Cannot write to {folder}: {error.filename or folder} is a file. Give the name of a folder."
        ) from None
    return folder


def draw_charts(charts: Sequence[Chart], runs: Sequence[Run], saved: Pictures) -> tuple[str, list[str]]:
    """Draw charts for a page, and each as a PNG file where matplotlib is installed.

    Returns:
        The script of all charts, and the element of each: of Bokeh, or a picture without it.
    """
    with_pictures = pictures.can_draw()
    drawn = [saved.add(chart.title, pictures.draw(chart, runs)) if with_pictures else "" for chart in charts]
    return interactive.draw(charts, runs) if interactive.can_draw() and charts else ("", drawn)


def write_page(path: Path, title: str, parts: Iterable[str], script: str) -> Path:
    """Write a page.

    Args:
        path: Its file.
        title: Its title, as text.
        parts: Its elements; empty ones are left out.
        script: What draws its charts; empty without.

    Returns:
        ``path``.
    """
    values = {
        "title": html.escape(title),
        "style": _template("page.css"),
        "library": interactive.library() if script else "",
        "body": "\n".join(part for part in parts if part),
        "charts": script,
        "code": _template("page.js"),
    }
    # In one pass, because a name may look like a place of the template.
    text = re.sub("%%([a-z]+)%%", lambda match: values[match[1]], _template("page.html"))
    path.write_text(text, encoding="utf-8")
    return path


class Pictures:
    """PNG files in a folder, which the page contains as well.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()

    def add(self, title: str, picture: bytes) -> str:
        """Write a picture, and return it as an element of the page."""
        (self._folder / pictures.file_name(title, self._taken)).write_bytes(picture)
        encoded = base64.b64encode(picture).decode()
        return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


def run_chips(runs: Sequence[Run]) -> str:
    """Return a button for each run, which shows and hides its curves."""
    chips = "".join(
        f'<button class="run" data-run="{index}" aria-pressed="true" title="{html.escape(run.name)}">'
        f"{chip(index)}{name_of(run)}</button>"
        for index, run in enumerate(runs)
    )
    return f'<nav class="runs" aria-label="Runs to show">{chips}</nav>'


def chip(index: int) -> str:
    """Return a dot in the colour of a run."""
    return f'<i class="chip" style="background:{pictures.colour_of(index)}"></i>'


def chart_element(runs: int, number: int, chart: Chart, element: str) -> str:
    """Return a chart with its title, note and buttons.

    Args:
        runs: Number of runs of the page.
        number: Number of the chart on the page.
        chart: The chart.
        element: What `draw_charts` returns for it.
    """
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


def section(title: str, body: str) -> str:
    """Return a section of a page, its title as text; empty without a body."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], compares: bool = False) -> str:
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
