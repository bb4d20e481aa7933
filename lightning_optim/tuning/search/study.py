"""A study of Optuna, which trials of one search only may join."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_optim.tuning.search.methods import require_optuna

_CONFIGURATION = "configuration"
"""Attribute of a study: what its trials have in common."""


def open_study(
    name: str, direction: str, storage: Any, sampler: Any, pruner: Any, configuration: Mapping[str, Any]
) -> Any:
    """Return a study of Optuna, new or as it was left.

    Args:
        name: Its name.
        direction: ``"minimize"`` or ``"maximize"``.
        storage: Its storage.
        sampler: The sampler.
        pruner: The pruner.
        configuration: What all its trials have in common, as data for JSON.

    Raises:
        ValueError: It was made with another configuration, or by another program.
    """
    optuna = require_optuna()

    def create() -> Any:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction,
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )

    study = create()
    before = study.user_attrs.get(_CONFIGURATION)
    if before is not None and before != configuration and _is_worthless(study):
        optuna.delete_study(study_name=name, storage=storage)
        study, before = create(), None
    if before is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"The study {name!r} has trials of another program. Give another name (--study).")
        study.set_user_attr(_CONFIGURATION, configuration)
    elif before != configuration:
        differs = sorted(key for key in {*before, *configuration} if before.get(key) != configuration.get(key))
        raise ValueError(
            f"The study {name!r} was made with another {' and '.join(differs)}, so that its trials cannot be "
            "compared with new ones. Give another name (--study), or the same configuration and space."
        )
    return study


def _is_worthless(study: Any) -> bool:
    """Whether a study has failed trials only, as one whose metric was misspelt."""
    return all(trial.state.name in ("FAIL", "WAITING") for trial in study.get_trials(deepcopy=False))
