"""What the runs of a report were trained with, as rows of a table: the important settings first, by names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_optim.diagnostics.run_report.run import Run
from lightning_optim.diagnostics.run_report.verdict import duration

_NAMES = {
    "lr": "learning rate",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "schedule": "schedule",
    "clipping": "clipping",
    "guard": "guard",
    "groups": "parameter groups",
}
_OF_THE_RUN = {
    "trainer/batch_size": "batch size",
    "trainer/precision": "precision",
    "trainer/world_size": "devices",
}
_VERSIONS = "versions/"


def main_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows of what was trained: name, and value of each run."""
    keys = _keys(runs)
    rows = [[_label(key), *_values(runs, key)] for key in keys if _of_optimizer(key)]
    rows += [[label, *_values(runs, key)] for key, label in _OF_THE_RUN.items() if key in keys]
    rows.append(["steps", *(f"{run.steps:,}" for run in runs)])
    rows.append(["time", *(duration(run.seconds) for run in runs)])
    if versions := [key for key in keys if key.startswith(_VERSIONS)]:
        texts = [
            ", ".join(f"{key.removeprefix(_VERSIONS)} {run.settings[key]}" for key in versions if key in run.settings)
            for run in runs
        ]
        rows.append(["versions", *(text or "-" for text in texts)])
    return rows


def other_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows of all other settings, those first in which the runs differ."""
    keys = [k for k in _keys(runs) if not (_of_optimizer(k) or k in _OF_THE_RUN or k.startswith(_VERSIONS))]
    rows = [[_label(key), *_values(runs, key)] for key in keys]
    return sorted(rows, key=lambda row: not differs(row[1:]))


def differs(cells: Iterable[str]) -> bool:
    """Return whether the runs differ."""
    return len(set(cells)) > 1


def _keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.settings))


def _values(runs: Sequence[Run], key: str) -> list[str]:
    return [str(run.settings.get(key, "-")) for run in runs]


def _of_optimizer(key: str) -> bool:
    family, _, name = key.partition("/")
    return family == "optim" and name.rpartition("/")[2] in _NAMES


def _label(key: str) -> str:
    """Return the name of a setting, without the family that its key begins with.

    Example:
        >>> _label("optim/generator/lr"), _label("optim_options/betas"), _label("width")
        ('generator: learning rate', 'betas', 'width')
    """
    rest = re.sub(r"^(optim|optim_options|trainer)/", "", key)
    owner, _, name = rest.rpartition("/")
    name = _NAMES.get(name, name) if key.startswith("optim/") else name
    return f"{owner}: {name}" if owner else name
