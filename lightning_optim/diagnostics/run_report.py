"""A self-contained page about one run, or several side by side, from their event files; to attach to an issue."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[int, float, float]]
"""Points of a curve: step, value, and seconds since the start of the run."""


@dataclass(frozen=True)
class Run:
    """Contents of the event files of one run.

    Args:
        name: Name of the run: the parts of its folder's path by which it differs from other runs.
        scalars: Points by tag, in order of their steps.
        alarms: Alarms and advice of monitor and guard, in Markdown.
        heat_maps: The monitor's last heat maps as PNG, by quantity.
        incidents: The guard's pictures of incidents as PNG, by their first step.
    """

    name: str
    scalars: Mapping[str, Points]
    alarms: tuple[str, ...] = ()
    heat_maps: Mapping[str, bytes] = field(default_factory=dict)
    incidents: Mapping[int, bytes] = field(default_factory=dict)


_HEAT_MAP = r"^optim/(\d+\.)?tensors/"
_INCIDENT = "optim_health/incident_at_step_"

_RATES = ("optim_lr/[group]",)

FIGURES: dict[str, tuple[str, ...]] = {
    "Learning curves": ("loss",),
    "Learning rate": _RATES,
    "Gradient norm": ("optim_grad_norm/total", "optim_grad_norm/interval_max", "optim_grad_norm_clipped/total"),
    "Gradient norm of each group": ("optim_grad_norm/[group]",),
    "Update over parameters": ("optim_update_ratio/[group]",),
    "Effective learning rate": ("optim_lr/effective/[group]",),
    "Cosine of gradient and momentum": ("optim_grad/cosine/[group]",),
    "Gradient over second moment": ("optim_grad/over_second_moment/[group]",),
    "Clipped, skipped": (
        "optim_health/clip_rate",
        "optim_health/skipped_steps",
        "optim_health/rollbacks",
        "optim_health/lr_cuts",
    ),
    "Spike score": ("optim_health/spike_score_loss", "optim_health/spike_score_grad_norm"),
}
"""Figures in order, with the tags of each; `[group]` stands for one part of a tag, `loss` for all losses of a run."""


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read the event files in a folder.

    Args:
        folder: Folder that a logger has written to.
        name: Name of the run; None for the folder's name.

    Returns:
        The run.

    Raises:
        FileNotFoundError: The folder contains no event file.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(folder)
    if not any(folder.glob("*tfevents*")):
        below = sorted({str(path.parent) for path in folder.rglob("*tfevents*")})
        hint = f" There are some in {', '.join(below[:3])}." if below else ""
        raise FileNotFoundError(f"No event files of TensorBoard in {folder}.{hint}")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    start = min((e.wall_time for tag in tags["scalars"] for e in events.Scalars(tag)[:1]), default=0.0)
    scalars = {
        tag: sorted((e.step, e.value, e.wall_time - start) for e in events.Scalars(tag)) for tag in tags["scalars"]
    }
    texts = [f"{tag}/text_summary" for tag in ("optim/alarms", "optim/advice", "optim_health/divergence")]
    alarms = [
        e.tensor_proto.string_val[0].decode() for tag in texts if tag in tags["tensors"] for e in events.Tensors(tag)
    ]
    images = [tag for tag in tags["images"] if re.match(_HEAT_MAP, tag)]
    heat_maps = {re.sub(_HEAT_MAP, r"\1", tag): events.Images(tag)[-1].encoded_image_string for tag in images}
    incidents = {
        int(tag.removeprefix(_INCIDENT)): events.Images(tag)[-1].encoded_image_string
        for tag in tags["images"]
        if tag.startswith(_INCIDENT)
    }
    return Run(name or folder.name, scalars, tuple(alarms), heat_maps, dict(sorted(incidents.items())))


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the event files of several runs, each named by the parts of its folder's path that differ."""
    parts = [Path(folder).resolve().parts for folder in folders]
    shared = 0
    while len(parts) > 1 and len({part[: shared + 1] for part in parts}) == 1:
        shared += 1
    names = ["/".join(part[shared:]) if len(parts) > 1 else part[-1] for part in parts]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def loss_tags(run: Run) -> list[str]:
    """Return the tags of a run's losses: the monitor's, and those of the module that contain "loss"."""
    own = [tag for tag in run.scalars if "loss" in tag.lower() and not tag.startswith("optim_")]
    return [tag for tag in ("optim_loss/mean", "optim_loss/max") if tag in run.scalars] + sorted(own)


def reached(points: Points, target: float) -> tuple[int, float] | None:
    """Return step and seconds at which the values first were at or below ``target``; None if they never were.

    Example:
        >>> reached([(0, 2.0, 0.0), (10, 0.9, 5.0), (20, 0.7, 10.0)], 1.0)
        (10, 5.0)
    """
    return next(((step, seconds) for step, value, seconds in points if value <= target), None)


def convergence(runs: Iterable[Run], targets: Sequence[float] | None = None) -> list[list[str]]:
    """Return when each run first reached each target.

    Args:
        runs: The runs.
        targets: Losses; None for those with a half, a quarter and a tenth of the way left from the worst first loss to
            the best loss.

    Returns:
        Rows of run, target, step and seconds.
    """
    runs = list(runs)
    curves = {run.name: run.scalars[tags[0]] for run in runs if (tags := loss_tags(run))}
    values = [value for points in curves.values() for _, value, _ in points if math.isfinite(value)]
    if not values:
        return []
    if targets is None:
        first, best = max(points[0][1] for points in curves.values()), min(values)
        targets = [best + (first - best) * share for share in (0.5, 0.25, 0.1)]
    rows = []
    for target in targets:
        for name, points in curves.items():
            found = reached(points, target)
            rows.append([name, f"{target:.4g}", *((f"{found[0]:,}", f"{found[1]:.1f}") if found else ("never", "-"))])
    return rows


def generalisation(runs: Iterable[Run]) -> list[list[str]]:
    """Return rows of run, validation loss, step, training loss and their gap, at each run's best validation loss."""
    rows = []
    for run in runs:
        tags = loss_tags(run)
        held_out = next((tag for tag in tags if tag.lower().startswith("val")), None)
        if held_out is None or tags[0] == held_out:
            continue
        step, value, _ = min(run.scalars[held_out], key=lambda point: point[1])
        training = min(run.scalars[tags[0]], key=lambda point: abs(point[0] - step))[1]
        rows.append([run.name, f"{value:.4g}", f"{step:,}", f"{training:.4g}", f"{value - training:+.4g}"])
    return rows


_ACTS = {
    "steps skipped": "skipped_steps",
    "rollbacks": "rollbacks",
    "cuts of the rate": "lr_cuts",
    "spike score, loss": "spike_score_loss",
    "spike score, gradient norm": "spike_score_grad_norm",
}


def stability(runs: Iterable[Run]) -> list[list[str]]:
    """Return rows of run, skipped steps, rollbacks, cuts of the rate, spike scores, and the last rate of each group.

    The numbers are those of the last report. The rates are those that its step used, after schedule and cut.
    """
    rows = []
    for run in runs:
        values = {name: _last_of(run, name) for name in _ACTS.values()}
        if any(value is not None for value in values.values()):
            rates = [f"{tag.removeprefix('optim_lr/')} {run.scalars[tag][-1][1]:.3g}" for tag in _tags(run, _RATES)]
            cells = [
                "-" if v is None else f"{v:.3%}" if n.startswith("spike") else f"{v:.0f}" for n, v in values.items()
            ]
            rows.append([run.name, *cells, ", ".join(rates) or "-"])
    return rows


def _last_of(run: Run, name: str) -> float | None:
    """Return the last value of a tag of the run, else the sum of those of its optimizers; None if there is none."""
    if points := run.scalars.get(f"optim_health/{name}"):
        return points[-1][1]
    of_each = [points[-1][1] for tag, points in run.scalars.items() if re.fullmatch(rf"optim_health/.+\.{name}", tag)]
    return sum(of_each) if of_each else None


def write_report(runs: Sequence[Run], folder: str | Path, targets: Sequence[float] | None = None) -> Path:
    """Write ``report.html``, which needs no other file, and each figure as a PNG file.

    Args:
        runs: The runs to show.
        folder: Folder to write to; created if it does not exist.
        targets: Target losses, as for `convergence`.

    Returns:
        The path of the page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>"]
    rows = convergence(runs, targets)
    parts += _section("Convergence", _table(["run", "loss", "reached at step", "seconds"], rows) if rows else "")
    rows = generalisation(runs)
    header = ["run", "best validation loss", "at step", "training loss", "gap"]
    parts += _section("Generalisation", _table(header, rows) if rows else "")
    rows = stability(runs)
    parts += _section("Stability", _table(["run", *_ACTS, "last learning rates"], rows) if rows else "")
    for title, patterns in FIGURES.items():
        picture = _figure(title, runs, patterns)
        if picture is not None:
            parts += _section(title, _saved(picture, title, folder))
    for run in runs:
        for quantity, picture in run.heat_maps.items():
            title = f"{quantity} of each tensor in {run.name}"
            parts += _section(title, _saved(picture, title, folder))
        for step, picture in run.incidents.items():
            title = f"Incident at step {step} of {run.name}"
            parts += _section(title, _saved(picture, title, folder))
        lines = "".join(f"<li><pre>{html.escape(alarm)}</pre></li>" for alarm in run.alarms)
        parts += _section(f"Alarms of {run.name}", f"<ul>{lines}</ul>" if lines else "<p>None.</p>")
    page = folder / "report.html"
    page.write_text(_PAGE.format(body="\n".join(parts)), encoding="utf-8")
    return page


def _saved(picture: bytes, title: str, folder: Path) -> str:
    """Write a PNG file into a folder, and return the picture as HTML for the page."""
    (folder / f"{re.sub('[^a-z0-9]+', '_', title.lower())}.png").write_bytes(picture)
    encoded = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">'


def _tags(run: Run, patterns: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        if pattern == "loss":
            found += loss_tags(run)
        elif pattern.endswith("/[group]"):
            stem = pattern.removesuffix("[group]")
            rest = {tag: tag.removeprefix(stem) for tag in run.scalars if tag.startswith(stem)}
            found += [t for t, r in rest.items() if "/" not in r and r != "total" and not r.startswith("interval_")]
        elif pattern in run.scalars:
            found.append(pattern)
    return found


def _figure(title: str, runs: Sequence[Run], patterns: Sequence[str]) -> bytes | None:
    """Draw one panel for each run, side by side on one scale, as PNG; return None if no run has any of the tags."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A report needs matplotlib: pip install 'lightning-optim[plot]'") from error
    shown = [(run, _tags(run, patterns)) for run in runs]
    if not any(tags for _, tags in shown):
        return None
    figure = Figure(figsize=(max(7, 5 * len(runs)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for panel, (run, tags) in zip(panels, shown, strict=True):
        for tag in tags:
            steps, values, _ = zip(*run.scalars[tag], strict=True)
            panel.plot(steps, values, label=tag, marker="." if len(steps) < 20 else None)
        panel.set_title(f"{title}: {run.name}", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if tags:
            panel.legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _section(title: str, body: str) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>", body] if body else []


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }} pre {{ white-space: pre-wrap; margin: 0; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .2rem .8rem; text-align: left; }}
</style></head><body>
{body}
</body></html>
"""
