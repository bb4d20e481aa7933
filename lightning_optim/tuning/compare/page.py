"""The page of a comparison."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning_optim.diagnostics.run_report import Run
from lightning_optim.diagnostics.run_report.charts import Band, Chart, Line
from lightning_optim.diagnostics.run_report.elements import (
    Pictures,
    chart_element,
    draw_charts,
    library_note,
    made_folder,
    require_plots,
    run_chips,
    section,
    table,
    write_page,
)
from lightning_optim.tuning.compare.curves import Spread, levels, spread_of, training_curves, validation_curves
from lightning_optim.tuning.compare.outcome import Comparison, label
from lightning_optim.tuning.compare.rates import Trial

PAGE = "compare.html"
_SPREAD = "Band: one standard deviation over seeds."


def write_comparison(comparison: Comparison, folder: str | Path | None = None) -> Path:
    """Write ``compare.html``, which needs no other file, ``results.csv``, and each chart as a PNG file.

    Args:
        comparison: The results.
        folder: Folder to write to; None for that of the runs.

    Returns:
        The path of the page.

    Raises:
        ModuleNotFoundError: Neither Bokeh nor matplotlib is installed; ``results.csv`` is there nevertheless.
    """
    target = made_folder(comparison.folder if folder is None else folder)
    comparison.write_csv(target / "results.csv")
    require_plots()
    charts, runs = charts_of(comparison)
    saved = Pictures(target)
    script, elements = draw_charts(charts, runs, saved)
    settings = [[name, text] for name, text in comparison.settings.items()]
    head = summary(comparison)
    parts = [
        _header(comparison),
        library_note(),
        section("Results", table(head[0], head[1:])),
        section("What was compared", table(["variant", "sets"], settings)),
        run_chips(runs),
        '<section class="charts">',
        *map(partial(chart_element, max(len(runs), 2)), range(len(charts)), charts, elements),
        "</section>",
        _levels(comparison),
        _rates(comparison),
        _runs(comparison),
    ]
    return write_page(target / PAGE, f"Comparison of {', '.join(comparison.results)}", parts, script)


def summary(comparison: Comparison) -> list[list[str]]:
    """Return the table of results, the header first, the best variant on top."""
    name = comparison.metric.name if comparison.metric.of_validation else "training loss"
    best = f"best {name}" if comparison.metric.of_validation else name
    header = [
        "variant", f"{best} (mean ± sd)", "against the best", "gap to training", "finished", "skipped", "spikes",
        "ms per step", "optimizer state", "peak lr",
    ]  # fmt: skip
    rows = [header]
    for variant in comparison.ranking:
        results = comparison.results[variant]
        gap = comparison.average(variant, "gap")
        speed = comparison.average(variant, "ms_per_step")
        size = comparison.average(variant, "state_bytes")
        rows.append(
            [
                variant,
                comparison.shown(variant),
                _against(comparison, variant),
                "-" if math.isnan(gap) else f"{gap:+.3g}",
                f"{sum(result.ok for result in results.values())} of {len(results)}",
                str(sum(result.skipped for result in results.values())),
                str(sum(result.spikes for result in results.values())),
                "-" if math.isnan(speed) else f"{speed:.2f}",
                "-" if math.isnan(size) else _bytes(size),
                _peaks(comparison, variant),
            ]
        )
    return rows


def _against(comparison: Comparison, variant: str) -> str:
    if variant == comparison.ranking[0]:
        return "the best" if comparison.bests(variant) else "-"
    gap = comparison.differences[variant]
    if not comparison.bests(variant) or math.isnan(gap.mean):
        return "-"
    width = "" if math.isnan(gap.half_width) else f" ± {gap.half_width:.2g}"
    verdict = "one seed cannot tell" if gap.verdict == "cannot tell" else gap.verdict
    return f"{-gap.mean if comparison.metric.higher else gap.mean:+.3g}{width}: {verdict}"


def _peaks(comparison: Comparison, variant: str) -> str:
    rates: dict[str, float] = next(
        (r.facts["lr"] for r in comparison.results[variant].values() if r.facts.get("lr")), {}
    )
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):.3g}"
    return ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()) or "-"


def _bytes(size: float) -> str:
    """Format a size.

    Example:
        >>> _bytes(120), _bytes(3_500_000)
        ('120 B', '3.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def charts_of(comparison: Comparison) -> tuple[list[Chart], list[Run]]:
    """Return the charts of a comparison, over steps and over seconds, and a run for each variant."""
    metric = comparison.metric
    validated = {name: spread_of(validation_curves(r, metric)) for name, r in comparison.results.items()}
    trained = {name: spread_of(training_curves(r)) for name, r in comparison.results.items()}
    runs = [
        Run(name, {metric.name: validated[name].middle, "training loss": trained[name].middle})
        for name in comparison.results
    ]
    better = "Higher is better." if metric.higher else "Lower is better."
    charts = []
    if metric.of_validation:
        charts += [
            _chart(f"{metric.name} by steps", list(validated.values()), f"{better} {_SPREAD}", "step"),
            _chart(f"{metric.name} by seconds of training", list(validated.values()), f"{better} {_SPREAD}", "seconds"),
        ]
    charts += [
        _chart("Training loss by steps", list(trained.values()), f"Means over spans of steps. {_SPREAD}", "step"),
        _chart(
            "Training loss by seconds of training",
            list(trained.values()),
            "Validation and the first step, in which kernels are compiled, do not count.",
            "seconds",
        ),
    ]
    return [chart for chart in charts if chart.lines], runs


def _chart(title: str, spreads: Sequence[Spread], note: str, axis: str) -> Chart:
    name = title.partition(" by ")[0]
    chart = Chart(title, [], note, axis=axis, shown=[name])
    for index, spread in enumerate(spreads):
        if spread.middle:
            chart.lines.append(Line(index, name, spread.middle))
        if spread.low:
            chart.bands.append(Band(index, name, spread.low, spread.high))
    values = sorted(value for line in chart.lines for _, value, _ in line.points)
    lows = [value for band in chart.bands for _, value, _ in band.low]
    if values and values[0] > 0 and min(lows, default=1.0) > 0:
        chart.log = values[-1 - len(values) // 50] > 10 * values[len(values) // 50]
    return chart


def _header(comparison: Comparison) -> str:
    items = "".join(f'<li><span class="{k}">{html.escape(text)}</span></li>' for k, text in comparison.verdict())
    title = f"Comparison of {len(comparison.results)} variants"
    budget = f'<p class="note">{html.escape(comparison.budget)}. Metric: {html.escape(label(comparison.metric))}.</p>'
    return f'<header><h1>{title}</h1>{budget}<ul class="verdict">{items}</ul></header>'


def _levels(comparison: Comparison) -> str:
    rows = levels(comparison)
    note = '<p class="note">Median step, and seconds of training, at which the seeds first reached each level.</p>'
    name = label(comparison.metric)
    return section(f"Steps and time to levels of {name}", note + table(rows[0], rows[1:]) if rows else "")


def _rates(comparison: Comparison) -> str:
    if comparison.rates is None:
        return ""
    factors = sorted({trial.factor for rate in comparison.rates.values() for trial in rate.trials})
    rows = []
    for name, rate in comparison.rates.items():
        for steps in sorted({trial.steps for trial in rate.trials}):
            values = {trial.factor: trial for trial in rate.trials if trial.steps == steps}
            cells = [_trial(values.get(factor)) for factor in factors]
            rows.append([name, f"{steps:,}", *cells, f"{rate.factor:.3g}x"])
    note = (
        f'<p class="note">{html.escape(label(comparison.metric))} at the end of short runs, by the factor on the rates '
        "of a variant: each with a whole schedule, with a seed that is not among those compared. The best ones got "
        "longer runs, which decided.</p>"
    )
    header = ["variant", "steps", *(f"{factor:.3g}x" for factor in factors), "taken"]
    return section("How the rates were tuned", note + table(header, rows))


def _trial(trial: Trial | None) -> str:
    if trial is None:
        return ""
    return f"{trial.value:.4g}" if math.isfinite(trial.value) else trial.status


def _runs(comparison: Comparison) -> str:
    header = ["variant", "seed", "status", "best", "at step", "last", "training loss", "steps", "seconds", "error"]
    rows = [
        [
            row["variant"], row["seed"], row["status"], *map(_number, (row["best"],)), row["best_step"] or "-",
            *map(_number, (row["last"], row["train_loss"])), row["steps"], f"{row['seconds']:.1f}", row["error"],
        ]
        for row in comparison.rows()
    ]  # fmt: skip
    return section("All runs", table(header, rows))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
