"""Ranges of hyperparameters that a space need not give: ``optim.lr: auto``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.core.suggest import nearest

Entry = dict[str, Any]


class KnownRanges:
    """The ranges that are usual with the optimizer of a configuration, or with each of several that are searched.

    Args:
        of_fit: The command line of the fit, after ``fit``.
    """

    def __init__(self, of_fit: Sequence[str]) -> None:
        self._of_fit = list(of_fit)

    def __call__(self, path: str, space: Mapping[str, Any]) -> list[Entry]:
        """Return the entries of a path, one for each optimizer that has a range of its own.

        Args:
            path: The path.
            space: The whole space, by paths.

        Raises:
            SpaceError: No range is known.
        """
        from lightning_optim.tuning.search.parameter import SpaceError

        fixed: dict[str, Entry] = {
            "clip.max_norm": {"low": 0.1, "high": 10.0, "log": True},
            "optim.warmup": {"choices": ["1%", "5%", "10%", "20%"]},
            "optim.schedule": {"choices": ["cosine", "linear", "wsd"]},
        }
        if path in fixed:
            return [fixed[path]]
        if path not in ("optim.lr", "optim.weight_decay"):
            known = [*fixed, "optim.lr", "optim.weight_decay"]
            raise SpaceError(f"{path}: no range is known for it: give low and high, or choices. {nearest(path, known)}")
        of = _lr if path == "optim.lr" else _weight_decay
        searched = _choices(space.get("optim.optimizer"))
        if not searched:
            return [of(path, self._settings(None))]
        entries: list[Entry] = []
        for choice in searched:
            entry = of(path, self._settings(choice))
            same = next((each for each in entries if {**each, "when": None} == {**entry, "when": None}), None)
            if same is None:
                entries.append({**entry, "when": {"optim.optimizer": [choice]}})
            else:
                same["when"]["optim.optimizer"].append(choice)
        if len(entries) == 1:
            del entries[0]["when"]
        return entries

    def _settings(self, optimizer: Any) -> Mapping[str, Any]:
        """The optimizer's class and hyperparameters in the configuration, or with another optimizer."""
        from lightning_optim.callbacks import ConfigureOptimizers
        from lightning_optim.cli.fit_config import read_fit
        from lightning_optim.tuning.search.parameter import SpaceError

        flags = [] if optimizer is None else [f"--optim.optimizer={optimizer}", "--optim.lr=null"]
        configure = read_fit([*self._of_fit, *flags]).only(ConfigureOptimizers)
        settings = {} if configure is None else configure.settings
        if not isinstance(settings.get("optimizer"), str):
            raise SpaceError("auto needs one optimizer in the configuration: `optim: {optimizer: adamw}`.")
        return settings


def _choices(entry: Any) -> list[Any]:
    if isinstance(entry, Mapping):
        entry = entry.get("choices")
    return list(entry) if isinstance(entry, list | tuple) else []


def _lr(path: str, settings: Mapping[str, Any]) -> Entry:
    """The learning rates of published recipes."""
    from lightning_optim.optim.base import OPTIMIZERS
    from lightning_optim.tuning.search.parameter import SpaceError

    name = settings["optimizer"]
    try:
        cls: Any = OPTIMIZERS.get(name)
        usual = cls.usual_lr_of({**cls.hyperparameters(), **settings})
    except (ValueError, AttributeError):
        usual = None
    if usual is None:
        from lightning_optim.optim import list_optimizers

        raise SpaceError(f"{path}: no range is known for {name}. {nearest(str(name).lower(), list_optimizers())}")
    return {"low": usual[0], "high": usual[1], "log": True}


def _weight_decay(path: str, settings: Mapping[str, Any]) -> Entry:
    """Shares per step and unit of rate where it is decoupled; far less where it is a part of the gradient."""
    kind = settings.get("weight_decay_kind", "decoupled" if settings["optimizer"].endswith("W") else "l2")
    low, high = {"decoupled": (1e-3, 0.3), "corrected": (1e-3, 0.3), "cautious": (1e-3, 0.3)}.get(kind, (1e-6, 1e-3))
    return {"low": low, "high": high, "log": True}
