"""The charts of a report as figures of Bokeh, whose library is written into the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_optim.diagnostics.run_report.analysis import finite
from lightning_optim.diagnostics.run_report.charts import MOST_POINTS, Chart, thinned
from lightning_optim.diagnostics.run_report.pictures import colour_of
from lightning_optim.diagnostics.run_report.run import Run, short

_MARKERS = {"skip": "x", "cut": "inverted_triangle", "rollback": "diamond"}
_TIP = "<b>$name</b><br>step @{step}{%d}: <b>@{value}{%.5g}</b><br>after @{seconds}{00:00:00}"
_EVENT = "<b>$name</b><br>step @{step}{%d}: <b>@{text}</b>"


def can_draw() -> bool:
    """Return whether Bokeh is installed."""
    try:
        import bokeh.plotting  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def library() -> str:
    """Return Bokeh's code for the browser, as the element of a page. It loads nothing from elsewhere."""
    from bokeh.resources import Resources

    resources: Any = Resources(mode="inline", components=["bokeh"], log_level="error")
    return str(resources.render_js())


def draw(charts: Sequence[Chart], runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Draw charts whose steps are zoomed together, and so are their seconds.

    Each curve is tagged with the indices of chart, run and series, by which the page shows and hides it.

    Args:
        charts: The charts.
        runs: The runs that they are of.

    Returns:
        The script of all charts, and the element of each.
    """
    from bokeh.embed import components
    from bokeh.models import Range1d

    last = max((run.steps for run in runs), default=1)
    longest = max((p[2] for c in charts if c.axis == "seconds" for line in c.lines for p in line.points), default=1.0)
    shared = {
        "step": Range1d(start=-0.01 * last, end=max(1.01 * last, 1)),
        "seconds": Range1d(start=-0.01 * longest, end=1.01 * longest),
    }
    figures = tuple(_figure(number, chart, runs, shared[chart.axis]) for number, chart in enumerate(charts))
    script, elements = components(figures, wrap_script=True, wrap_plot_info=True)
    return script, list(elements)


def _figure(number: int, chart: Chart, runs: Sequence[Run], steps: Any) -> Any:
    from bokeh.models import BasicTickFormatter, DataRange1d, HoverTool, NumeralTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        height=400 if chart.wide else 280,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=_range(chart) or DataRange1d(only_visible=True),
        y_axis_type="log" if chart.log else "linear",
        tools="box_zoom,pan,wheel_zoom,reset,save",
        active_drag="box_zoom",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        output_backend="canvas",
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    # Seconds of a short run are fractions.
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0" if chart.axis == "step" else "0,0.[0]")
    plot.xaxis.axis_label = chart.axis
    if not chart.log:
        plot.yaxis.formatter = BasicTickFormatter(power_limit_low=-5)
    series = chart.series
    renderer: Any
    curves: list[Any] = []
    events: list[Any] = []
    for line in chart.clipped:
        renderer = plot.line(*_steps_and_values(thinned(line.points)), color=colour_of(line.run), line_width=9)
        renderer.glyph.line_alpha = 0.25
        renderer.tags = [number, line.run, -1]
    for band in chart.bands:
        low, high = thinned(band.low, MOST_POINTS * 2), thinned(band.high, MOST_POINTS * 2)
        if len(low) != len(high):  # Thinned at different steps.
            low, high = band.low, band.high
        x, edges = _places(low, chart.axis), [np.asarray([value for _, value, _ in edge]) for edge in (low, high)]
        place = series.index(band.series)
        renderer = plot.varea(x, *edges, color=colour_of(band.run if len(runs) > 1 else place), alpha=0.16)
        renderer.tags, renderer.visible = [number, band.run, place], band.series in chart.shown
    for line in chart.lines:
        place = series.index(line.series)
        points = thinned(line.points)
        x, y = _steps_and_values(points)
        name = short(runs[line.run].name if len(runs) > 1 else line.series)
        label = f"{name}: {short(line.series)}" if len(runs) > 1 and len(series) > 1 else name
        source = {"step": x, "value": y, "seconds": _places(points, "seconds")}
        colour = colour_of(line.run if len(runs) > 1 else place)
        glyph: dict[str, Any] = {"source": source, "color": colour, "visible": line.series in chart.shown}
        renderer = plot.line(chart.axis, "value", line_dash=line.dash, line_width=1.8, **glyph)
        several: list[Any] = [renderer]
        if len(points) <= 30:  # One point alone makes no line.
            several.append(plot.scatter(chart.axis, "value", size=5, **glyph))
        for one in several:
            one.name, one.tags = label, [number, line.run, place]
        curves.append(several[-1])
    for mark in chart.marks:
        source = {"step": [mark.step], "value": [mark.value], "text": [mark.text]}
        renderer = plot.scatter(
            "step", "value", source=source, marker=_MARKERS[mark.kind], size=11, line_width=2.5, color="#d62728",
        )  # fmt: skip
        renderer.name, renderer.tags = short(runs[mark.run].name), [number, mark.run, -1]
        events.append(renderer)
    printf: Any = {"@{step}": "printf", "@{value}": "printf"}
    plot.add_tools(HoverTool(renderers=curves, tooltips=_TIP, formatters=printf, mode="mouse", line_policy="nearest"))
    if events:
        plot.add_tools(HoverTool(renderers=events, tooltips=_EVENT, formatters=printf))
    return plot


def _range(chart: Chart) -> Any:
    """Return a fixed range of values if some are so far outside that they would hide all others; else None."""
    from bokeh.models import Range1d

    values = np.array([value for line in chart.lines for _, value, _ in finite(line.points)])
    if chart.log or len(values) < 20:
        return None
    low, high = np.quantile(values, [0.02, 0.98])
    margin = 0.25 * (high - low)
    if values.max() - values.min() <= 8 * (high - low) or margin == 0:
        return None
    return Range1d(start=float(max(low - margin, values.min())), end=float(min(high + margin, values.max())))


def _places(points: Sequence[tuple[int, float, float]], axis: str) -> Any:
    """Return where points are on an axis: their steps or seconds."""
    return np.asarray([point[0 if axis == "step" else 2] for point in points], dtype=np.float64)


def _steps_and_values(points: Sequence[tuple[int, float, float]]) -> tuple[Any, Any]:
    steps, values, _ = zip(*points, strict=True)
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
