"""Which values hyperparameters may take, by their names, which mean the same in every optimizer."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.core.suggest import nearest

NON_NEGATIVE = (
    "lr",
    "peak_lr",
    "eps",
    "weight_decay",
    "momentum",
    "momentum_decay",
    "lr_decay",
    "initial_accumulator_value",
    "alpha",
    "alpha_warmup",
    "beta3_warmup",
    "warmup_steps",
    "r",
    "weight_lr_power",
    "trust_coeff",
    "d_coef",
)
FRACTIONS = ("betas", "beta2", "beta3", "shampoo_beta", "inner_momentum")
# Each in [0, 1): an average that never takes anything in, or never forgets, is a mistake.
FLAGS = (
    "maximize",
    "cautious",
    "amsgrad",
    "nesterov",
    "centered",
    "decoupled_weight_decay",
    "no_prox",
    "train_mode",
    "kahan_sum",
    "stochastic_rounding",
    "bias_correction",
    "trust_clip",
    "always_adapt",
    "decoupled_decay",
    "use_bias_correction",
    "safeguard_warmup",
    "precondition_1d",
)
BEYOND = (
    "name",
    "params",
    "param_names",
    "rule",
    "peak_lr",
    "peak_lr_from",
    "initial_lr",
    "max_lr",
    "min_lr",
    "lr_multiplier",
    "weight_decay_multiplier",
    "rounding_seed",
    "not_hidden",
)
"""Group keys that are not hyperparameters but are known, and so never taken for misspelt ones."""


def plain_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every real scalar, numpy's or a fraction, as the int or float that checkpoints can hold."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_plain(part) for part in value)
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def own_tensors(groups: Sequence[dict[str, Any]], names: Iterable[str]) -> None:
    """Give the last of ``groups`` a copy of each tensor among ``names`` that one before it has, too."""
    last = groups[-1]
    for name in names:
        value = last.get(name)
        if isinstance(value, Tensor) and any(group.get(name) is value for group in groups[:-1]):
            last[name] = value.detach().clone()


def check_lengths(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError if a hyperparameter that is a tuple by default is none, or one of another length."""
    for name, default in defaults.items():
        if not isinstance(default, tuple):
            continue
        given = group[name]
        if not isinstance(given, tuple | list):
            raise ValueError(f"{_where(owner, group)}{name}={given!r}; needed are {len(default)} numbers.")
        if len(given) != len(default):
            have = f"{len(given)} number" + "s" * (len(given) != 1)
            raise ValueError(f"{_where(owner, group)}{name}={given} has {have}; needed are {len(default)}.")


def number(owner: str, group: Mapping[str, Any], name: str) -> float:
    """The hyperparameter ``name``, a number or a one-element tensor, as a float."""
    value = group[name]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(
                f"{_where(owner, group)}{name} has shape {shape}; needed is a number or a one-element tensor."
            )
        return float(value.detach())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{_where(owner, group)}{name}={value!r} is a {type(value).__name__}; needed is a number.")
    return float(value)


def check_values(owner: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what was given and what is needed, if a hyperparameter is out of its range."""
    where = _where(owner, group)
    for name, given in _parts(group, NON_NEGATIVE):
        value = number(owner, {**group, name: given}, name)
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{where}{name}={value} is out of range; needed is a finite number of at least 0.")
    for name, given in _parts(group, FRACTIONS):
        if isinstance(given, Tensor):
            raise ValueError(f"{where}{name} is a {type(given).__name__}; needed is a number.")
        value = number(owner, {**group, name: given}, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{where}{name}={value} is out of range; needed is 0 <= {name} < 1.")
    for name in FLAGS:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{where}{name}={group[name]!r}; needed is True or False.")
    if group["weight_decay_kind"] in ("independent", "corrected") and group["weight_decay"] and not group["peak_lr"]:
        raise ValueError(
            f"{where}weight_decay_kind={group['weight_decay_kind']!r} divides by the peak learning rate, which is "
            "lr at construction, here 0, unless something else is known. Give the group its 'peak_lr'."
        )


def refuse_typos(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError if a key of a parameter group is nearly, but not quite, the name of a hyperparameter.

    Groups may hold keys of the user's own, so what is unlike every hyperparameter stays.
    """
    known = [name for name in known if name not in ("params", "param_names")]
    for key in given:
        if key not in known and key not in BEYOND and difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise ValueError(f"{owner}: parameter group has an unknown key {key!r}. {nearest(key, known)}")


def _parts(group: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Hyperparameters of these names; of a tuple each part by itself (`betas[0]`), None left out."""
    for name in names:
        value = group.get(name)
        if isinstance(value, tuple | list):
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(value) if part is not None)
        elif value is not None:
            yield name, value


def _where(owner: str, group: Mapping[str, Any]) -> str:
    return f"{owner}, group {group['name']!r}: " if "name" in group else f"{owner}: "
