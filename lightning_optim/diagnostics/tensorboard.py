"""Helpers for TensorBoard's event files: many scalars in one write, a layout of charts, histograms and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_optim.diagnostics.metric_names import quantity_of

SCREEN = "Optimizer"
"""First category of the Custom Scalars page."""

_BOTH = ": training and validation"
LOSS = f"loss{_BOTH}"
"""Title of its first chart."""

_MOST_GROUPS = 12
"""Number of charts in a category that still can be looked through."""


def screen(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the Custom Scalars layout: one page of charts, to be read from the top when a run goes wrong.

    Validation stands beside training, in the first charts. TensorBoard gives all curves of a run in one chart the same
    colour; so quantities of several groups have a category each, with a chart for each group.

    Args:
        tags: Tags of the reports so far, and of the module's metrics; charts without any of them are left out.

    Returns:
        The layout, in the form that `SummaryWriter.add_custom_scalars` takes.

    Example:
        >>> screen(["optim_lr/default", "optim_grad_norm/default"])["Optimizer"]["learning rate"]
        ['Multiline', ['^optim_lr/[^/]+$']]
        >>> screen(["optim_lr/body", "optim_lr/head"])["learning rate"]["head"]
        ['Multiline', ['^optim_lr/head$']]
    """
    tags = sorted(tags)
    charts, categories = _metric_charts(tags), {}
    for title, patterns in _CHARTS.items():
        found = [pattern for pattern in patterns if any(re.search(pattern, tag) for tag in tags)]
        groups = [tag for pattern in found for tag in tags if re.search(pattern, tag)] if title in _OF_GROUPS else []
        if 1 < len(groups) <= _MOST_GROUPS:
            categories[title] = {_group_of(tag): ["Multiline", [f"^{re.escape(tag)}$"]] for tag in groups}
        elif title == LOSS and title in charts:
            charts[title][1] += found
        elif found:
            charts[title] = ["Multiline", found]
    return {SCREEN: charts, **categories}


def _metric_charts(tags: Sequence[str]) -> dict[str, list[Any]]:
    """Return a chart of each of the module's metrics, training and validation together; the loss first."""
    quantities: dict[str, list[str]] = {}
    for tag in tags:
        if not tag.startswith("optim_") and not tag.endswith(("_step", "_epoch")):
            quantities.setdefault(quantity_of(tag), []).append(f"^{re.escape(tag)}$")
    loss = quantities.pop("loss", [])
    charts = {
        f"{name or 'metric'}: training and validation": ["Multiline", found] for name, found in quantities.items()
    }
    return {LOSS: ["Multiline", loss], **charts}


def _group_of(tag: str) -> str:
    """Return the group that a tag belongs to, with its optimizer.

    Example:
        >>> _group_of("optim_lr/effective/head"), _group_of("optim_lr/gen.effective/head")
        ('head', 'gen.head')
    """
    first, *rest = tag.split("/")[1:]
    optimizer, dot, _ = first.rpartition(".")
    return f"{optimizer}{dot}{'/'.join(rest)}" if rest else first


# With several optimizers a tag has the name or index of one before its second part.
_CHARTS = {
    LOSS: [r"^optim_loss/(mean|max)$"],
    "loss: how far it stands out": [r"^optim_loss/robust_z$"],
    "learning rate": [r"^optim_lr/[^/]+$"],
    "gradient norm": [
        r"^optim_grad_norm/([\w-]+\.)?(total|interval_max|interval_mean)$",
        r"^optim_grad_norm_clipped/([\w-]+\.)?total$",
    ],
    "gradient norm of each group": [r"^optim_grad_norm/(?!([\w-]+\.)?(total$|interval_))[^/]+$"],
    "clipped, skipped, not finite": [
        r"^optim_health/([\w-]+\.)?(clip_rate|skipped_steps|overflow_steps|nonfinite_gradients)$"
    ],
    "the guard: rollbacks, and its cut of the rate": [r"^optim_health/(rollbacks|lr_cuts?)$"],
    "spike score": [r"^optim_health/spike_score_(loss|grad_norm)$"],
    "early warning: the update to come": [r"^optim_health/update_to_come$"],
    "gap between validation and training": [r"^optim_generalization_gap/.+$"],
    "update over parameters": [r"^optim_update_ratio/.+$"],
    "effective rate": [r"^optim_lr/([\w-]+\.)?effective/.+$"],
    "cosine of gradient and momentum": [r"^optim_grad/([\w-]+\.)?cosine/.+$"],
    "gradient over second moment": [r"^optim_grad/([\w-]+\.)?over_second_moment/.+$"],
    "below eps, and exactly zero": [r"^optim_grad/([\w-]+\.)?(below_eps|zero)/.+$"],
    "parameter norm": [r"^optim_param_norm/[^/]+$"],
    "share of weight decay": [r"^optim_weight_decay/([\w-]+\.)?share/.+$"],
    "noise scale and batch size": [r"^optim_grad/(noise_scale|batch_size)$"],
    "loss scale": [r"^optim_health/loss_scale$"],
    "speed": [r"^optim_speed/steps_per_second$"],
    "the optimizer's share of it": [r"^optim_speed/optimizer_share$"],
}


_OF_GROUPS = {
    "learning rate",
    "gradient norm of each group",
    "update over parameters",
    "effective rate",
    "cosine of gradient and momentum",
    "gradient over second moment",
    "parameter norm",
    "share of weight decay",
}
"""Charts whose curves are of groups."""


def add_scalars(writer: Any, values: Mapping[str, float], step: int) -> None:
    """Write many scalars as one record, which takes a tenth of the time of one record each.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        values: Values by tag.
        step: Step of the values.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    writer._get_file_writer().add_summary(summary, step)


def add_histogram(writer: Any, tag: str, edges: Sequence[float], counts: Sequence[float], step: int) -> None:
    """Write a histogram whose elements have been counted already.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        tag: Tag of the histogram.
        edges: Edges of the columns, one more than there are columns.
        counts: Number of elements in each column; not 0 in the first and the last.
        step: Step of the histogram.
    """
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    total = sum(count * centre for count, centre in zip(counts, centres, strict=True))
    squares = sum(count * centre**2 for count, centre in zip(counts, centres, strict=True))
    writer.add_histogram_raw(tag, edges[0], edges[-1], sum(counts), total, squares, edges[1:], counts, step)


def purge_from(writer: Any, step: int) -> None:
    """Make TensorBoard hide this run's points from ``step`` on, because the run is resumed there.

    Without it, curves double back. The points stay in the files.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
        step: First step that will be written again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer._get_file_writer().add_event(Event(session_log=SessionLog(status=SessionLog.START), step=step), step)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table for TensorBoard's text plugin.

    Example:
        >>> print(markdown_table(["group", "lr"], [["head", 0.1]]))
        | group | lr |
        |---|---|
        | head | 0.1 |
    """
    return "\n".join([_row(header), "|" + "---|" * len(header), *map(_row, rows)])


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
