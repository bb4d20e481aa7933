"""The divergence report: Markdown to read, JSON to compute with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.divergence.alarms import ALARM_KINDS
from lightning_optim.divergence.files import write_file
from lightning_optim.divergence.incidents import Incident, Incidents, SeenStep
from lightning_optim.divergence.observation import SIGNALS, StepObservation
from lightning_optim.divergence.spike_score import SpikeScore


@dataclass
class Entry:
    """One entry of the report: an alarm or a response.

    Args:
        step: Position on the loggers' axis.
        epoch: The epoch.
        batches: Indices of the batches of the epoch that made up the step.
        optimizer: Index of the optimizer.
        kind: Kind of the alarm, or ``did`` for a response.
        text: One sentence.
        names: Parameters or groups concerned.
    """

    step: int
    epoch: int
    batches: list[int]
    optimizer: int
    kind: str
    text: str
    names: list[str] = field(default_factory=list)


class DivergenceReport:
    """Entries, incidents and spike scores of a run, and the files that show them.

    Args:
        most: Largest number of entries; the first ones, which show how the problem began, and the last ones are kept.
        most_incidents: Largest number of incidents; see `Incidents`.

    Attributes:
        entries: Alarms and responses of this fit, in order.
        earlier: Those of the run before, if it was resumed.
        incidents: The steps around them.

    Example:
        >>> report = DivergenceReport()
        >>> report.add(Entry(3, 0, [3], 0, "nonfinite", "its loss is not finite"))
        >>> "| 3 | 0 | 3 | nonfinite | its loss is not finite |" in report.markdown()
        True
    """

    def __init__(self, most: int = 1000, most_incidents: int = 16) -> None:
        self.entries: list[Entry] = []
        self.earlier: list[Entry] = []
        self.incidents = Incidents(most_incidents)
        self._left_out = 0
        self._most = most
        self._scores: dict[int, SpikeScore] = {}

    def see(self, step: int, optimizer: int, seen: StepObservation) -> None:
        """Add the observation of a step, before the alarms about it.

        Args:
            step: Position of the step on the loggers' axis.
            optimizer: Index of the optimizer.
            seen: The observation of the step.
        """
        self.incidents.see(step, optimizer, seen)
        if optimizer not in self._scores:
            self._scores[optimizer] = SpikeScore()
        self._scores[optimizer].update(seen.values)

    def add(self, entry: Entry) -> None:
        """Add an entry, also to its incident."""
        self.entries.append(entry)
        if len(self.all_entries) > self._most and self.earlier[self._most // 2 :]:
            del self.earlier[self._most // 2]
            self._left_out += 1
        elif len(self.entries) > self._most:
            del self.entries[self._most // 2]
            self._left_out += 1
        self.incidents.mark(entry.step, entry.kind)

    @property
    def all_entries(self) -> list[Entry]:
        """The entries of the run before and of this fit."""
        return [*self.earlier, *self.entries]

    def entries_of(self, incident: Incident) -> list[Entry]:
        """Return the entries of an incident, of health as well."""
        return [entry for entry in self.all_entries if incident.first_step <= entry.step <= incident.last_step]

    def spike_scores(self) -> dict[str, float]:
        """Return the spike score of each of `SIGNALS` over the steps of all optimizers; empty before there is one."""
        steps = {signal: sum(score.steps[signal] for score in self._scores.values()) for signal in SIGNALS}
        return {
            signal: sum(score.spikes[signal] for score in self._scores.values()) / count
            for signal, count in steps.items()
            if count
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON, with None for numbers that are not finite."""
        report = {
            "entries": [asdict(entry) for entry in self.all_entries],
            "entries_left_out": self._left_out,
            "incidents": [incident.as_dict() for incident in self.incidents.kept],
            "incidents_left_out": self.incidents.left_out,
            "last_steps": [row.as_dict() for row in self.incidents.last_steps()],
            "spike_scores": self.spike_scores(),
        }
        finite: dict[str, Any] = _finite(report)
        return finite

    def markdown(self, as_file: bool = True) -> str:
        """Return the report as Markdown, with advice on what to change.

        Args:
            as_file: Whether it is for the folder of the report: with the pictures that are there, and the steps of all
                incidents instead of the last one.
        """
        lines = ["# Divergence report", "", "| step | epoch | batches | kind | what |", "|---|---|---|---|---|"]
        lines += [
            f"| {e.step} | {e.epoch} | {', '.join(map(str, e.batches))} | {e.kind} | {e.text} |"
            for e in self.all_entries
        ]
        if self._left_out:
            lines.append(f"\n{self._left_out} entries in the middle are left out.")
        if scores := self.spike_scores():
            shares = ", ".join(f"{signal} {share:.3%}" for signal, share in scores.items())
            lines += ["", f"Spike score (steps more than 6 robust standard deviations above the last ones): {shares}."]
        kinds = list(dict.fromkeys(entry.kind for entry in self.all_entries))
        lines += ["", "## What to change", ""]
        lines += [f"- **{kind}**: {ALARM_KINDS[kind].advice}" for kind in kinds if kind in ALARM_KINDS]
        incidents = self.incidents.kept
        if not incidents:
            return "\n".join([*lines, "", "## The last steps", "", *_table(self.incidents.last_steps())]) + "\n"
        lines += ["", "## The last steps before each incident, and those after it"]
        if self.incidents.left_out:
            lines += ["", f"{self.incidents.left_out} incidents in the middle are left out, skipped steps first."]
        for incident in incidents if as_file else incidents[-1:]:
            lines += ["", f"### {incident.title().capitalize()}", ""]
            if as_file and incident.picture is not None:
                lines += [f"![{incident.title()}]({incident.picture})", ""]
            if incident.left_out:
                lines += [f"{incident.left_out} steps in its middle are left out.", ""]
            lines += _table(incident.steps)
        return "\n".join(lines) + "\n"

    def state_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for a checkpoint."""
        return {
            "entries": [asdict(entry) for entry in self.all_entries],
            "left_out": self._left_out,
            "incidents": self.incidents.state_dict(),
            "scores": {index: score.state_dict() for index, score in self._scores.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.earlier, self.entries = [Entry(**entry) for entry in state["entries"]], []
        self._left_out = state["left_out"]
        self.incidents.load_state_dict(state["incidents"])
        self._scores = {}
        for index, saved in state["scores"].items():
            self._scores[index] = score = SpikeScore()
            score.load_state_dict(saved)

    def write(self, folder: str | Path, name: str = "divergence_report") -> Path | str:
        """Write the Markdown and the JSON file.

        Args:
            folder: Folder to write to, created if it does not exist; or a URL that fsspec knows, such as ``s3://...``.
            name: Name of the files, without suffix.

        Returns:
            The path of the Markdown file; of a remote one its URL.

        Raises:
            OSError: A file cannot be written; the former one is unchanged. A remote file system may raise other errors.
        """
        content = json.dumps(self.as_dict(), allow_nan=False)
        write_file(folder, f"{name}.json", content.encode())
        return write_file(folder, f"{name}.md", self.markdown().encode())


def _table(rows: Iterable[SeenStep]) -> list[str]:
    """Return the lines of a table of steps."""
    lines = [
        "| step | optimizer | loss | gradient norm | median norm | groups' norms | update to come | lr | skipped |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        seen = row.seen
        groups, update = (
            ", ".join(f"{x:.3g}" for x in of_groups) for of_groups in (seen.group_norms, seen.update_to_come)
        )
        values = f"{seen.values['loss']:.4g} | {seen.values['grad_norm']:.4g} | {seen.medians['grad_norm']:.4g}"
        skipped = "yes" if seen.skipped else ""
        rate = f"{seen.rate:.4g}"
        lines.append(f"| {row.at} | {row.optimizer} | {values} | {groups} | {update} | {rate} | {skipped} |")
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
