"""Reading of event files: what a report knows of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Points = list[tuple[int, float, float]]
"""Points of a curve: step, value, and seconds since the start of the run."""

_HEAT_MAP = r"^optim/(\d+\.)?tensors/"
_INCIDENT = "optim_health/incident_at_step_"
_LONGEST = 80
_NOT_METRICS = {"epoch", "hp_metric"}


@dataclass(frozen=True)
class Run:
    """Contents of the event files of one run.

    Args:
        name: Name of the run: the parts of its folder's path by which it differs from other runs.
        scalars: Points by tag, in order of their steps.
        alarms: Alarms and advice of monitor and guard, in Markdown.
        heat_maps: The monitor's last heat maps as PNG, by quantity.
        incidents: The guard's pictures of incidents as PNG, by their first step.
        settings: What it was trained with, by name, as the monitor and Lightning have logged it.
        groups: Rows of the monitor's table of parameter groups, the header first; empty without one.
    """

    name: str
    scalars: Mapping[str, Points]
    alarms: tuple[str, ...] = ()
    heat_maps: Mapping[str, bytes] = field(default_factory=dict)
    incidents: Mapping[int, bytes] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Tags of the metrics that the module logs."""
        ours = ("optim", "lr-")  # the second are those of Lightning's LearningRateMonitor
        return sorted(tag for tag in self.scalars if tag not in _NOT_METRICS and not tag.startswith(ours))

    @property
    def steps(self) -> int:
        """The last step that anything was logged at."""
        return max((points[-1][0] for points in self.scalars.values() if points), default=0)

    @property
    def seconds(self) -> float:
        """Seconds from the first to the last point."""
        return max((points[-1][2] for points in self.scalars.values() if points), default=0.0)


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

    def texts(tag: str) -> list[str]:
        tag = f"{tag}/text_summary"
        return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] if tag in tags["tensors"] else []

    images = [tag for tag in tags["images"] if re.match(_HEAT_MAP, tag)]
    incidents = {
        int(tag.removeprefix(_INCIDENT)): events.Images(tag)[-1].encoded_image_string
        for tag in tags["images"]
        if tag.startswith(_INCIDENT)
    }
    written = dict(row for text in texts("optim/configuration")[-1:] for row in table_rows(text)[1:] if len(row) == 2)
    return Run(
        name or folder.name or str(folder.resolve().name),
        scalars,
        tuple(text for tag in ("optim/alarms", "optim/advice", "optim_health/divergence") for text in texts(tag)),
        {re.sub(_HEAT_MAP, r"\1", tag): events.Images(tag)[-1].encoded_image_string for tag in images},
        dict(sorted(incidents.items())),
        {**written, **{key: value for key, value in _hyperparameters(events).items() if key not in written}},
        tuple(row for text in texts("optim/groups")[-1:] for row in table_rows(text)),
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the event files of several runs, each named by the parts of its folder's path that differ."""
    parts = [Path(folder).resolve().parts for folder in folders]
    shared = 0
    while len(set(parts)) > 1 and len({part[: shared + 1] for part in parts}) == 1:
        shared += 1
    names = ["/".join(part[shared:]) if len(set(parts)) > 1 else _name_in(part) for part in parts]
    runs = [read_run(folder, name or _name_in(part)) for folder, name, part in zip(folders, names, parts, strict=True)]
    return with_own_names(runs)


def _name_in(parts: Sequence[str]) -> str:
    """Return the name of a run among the parts of its path: with the folder above a mere number or version."""
    return "/".join(parts[-2:]) if re.fullmatch(r"(version_)?\d+", parts[-1]) else parts[-1]


def with_own_names(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, those that share a name with an earlier one numbered."""
    taken: set[str] = set()
    found = []
    for run in runs:
        name, number = run.name, 1
        while name in taken:
            number += 1
            name = f"{run.name} ({number})"
        taken.add(name)
        found.append(run if name == run.name else replace(run, name=name))
    return found


def short(text: str) -> str:
    """Return a text whose middle is left out if it is long.

    Example:
        >>> len(short("x" * 240))
        80
    """
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def loss_tags(run: Run) -> list[str]:
    """Return the tags of a run's losses: the monitor's, and those of the module that contain "loss"."""
    own = [tag for tag in run.scalars if "loss" in tag.lower() and not tag.startswith("optim_")]
    return [tag for tag in ("optim_loss/mean", "optim_loss/max") if tag in run.scalars] + sorted(own)


def table_rows(markdown: str) -> list[tuple[str, ...]]:
    r"""Return the rows of a table as `tensorboard.markdown_table` writes it, the header first.

    Example:
        >>> table_rows("| a | b |\n|---|---|\n| 1 | x \\| y |")
        [('a', 'b'), ('1', 'x | y')]
    """
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not re.fullmatch(r"[|\-: ]+", line)]
    cells = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines]
    return [tuple(cell.strip().replace("\\|", "|") for cell in row) for row in cells]


def _hyperparameters(events: Any) -> dict[str, str]:
    """Return the hyperparameters that Lightning has written; with the monitor they contain its own."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    try:
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    except KeyError:
        return {}
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    kinds = {name: getattr(value, value.WhichOneof("kind")) for name, value in sorted(found.items())}
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in kinds.items()}
