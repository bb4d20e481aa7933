"""The divergence report: Markdown to read, JSON to compute with."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.divergence.alarms import ALARM_KINDS
from lightning_optim.divergence.files import write_file
from lightning_optim.divergence.watch import StepObservation


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
    """Entries and the last steps of a run, and the files that show them.

    Args:
        keep: Number of last steps that are shown with all their numbers.
        most: Largest number of entries; the first ones, which show how the problem began, and the last ones are kept.

    Example:
        >>> report = DivergenceReport()
        >>> report.add(Entry(3, 0, [3], 0, "nonfinite", "its loss is not finite"))
        >>> "| 3 | 0 | 3 | nonfinite | its loss is not finite |" in report.markdown()
        True
    """

    def __init__(self, keep: int = 64, most: int = 1000) -> None:
        self.entries: list[Entry] = []
        self._left_out = 0
        self._most = most
        self._steps: deque[tuple[int, int, StepObservation]] = deque(maxlen=keep)

    def see(self, step: int, optimizer: int, seen: StepObservation) -> None:
        """Add the observation of a step.

        Args:
            step: Position of the step on the loggers' axis.
            optimizer: Index of the optimizer.
            seen: The observation of the step.
        """
        self._steps.append((step, optimizer, seen))

    def add(self, entry: Entry) -> None:
        """Add an entry."""
        self.entries.append(entry)
        if len(self.entries) > self._most:
            del self.entries[self._most // 2]
            self._left_out += 1

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON, with None for numbers that are not finite."""
        return {
            "entries": [asdict(entry) for entry in self.entries],
            "entries_left_out": self._left_out,
            "last_steps": [_finite({"at": at, "optimizer": index, **asdict(seen)}) for at, index, seen in self._steps],
        }

    def markdown(self) -> str:
        """Return the report as Markdown, with advice on what to change."""
        lines = ["# Divergence report", "", "| step | epoch | batches | kind | what |", "|---|---|---|---|---|"]
        lines += [
            f"| {e.step} | {e.epoch} | {', '.join(map(str, e.batches))} | {e.kind} | {e.text} |" for e in self.entries
        ]
        if self._left_out:
            lines.append(f"\n{self._left_out} entries in the middle are left out.")
        kinds = list(dict.fromkeys(entry.kind for entry in self.entries))
        lines += ["", "## What to change", ""]
        lines += [f"- **{kind}**: {ALARM_KINDS[kind].advice}" for kind in kinds if kind in ALARM_KINDS]
        lines += ["", "## The last steps", ""]
        lines += [
            "| step | optimizer | loss | gradient norm | median norm | groups' norms | update to come | skipped |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for at, index, seen in self._steps:
            groups, update = (
                ", ".join(f"{value:.3g}" for value in of_groups)
                for of_groups in (seen.group_norms, seen.update_to_come)
            )
            values = f"{seen.values['loss']:.4g} | {seen.values['grad_norm']:.4g} | {seen.medians['grad_norm']:.4g}"
            lines.append(f"| {at} | {index} | {values} | {groups} | {update} | {'yes' if seen.skipped else ''} |")
        return "\n".join(lines) + "\n"

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
        content = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        write_file(folder, f"{name}.json", content.encode())
        return write_file(folder, f"{name}.md", self.markdown().encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
