"""Table of the keys of parameter groups that are not hyperparameters of an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from lightning_optim.core.ranges import NON_NEGATIVE, Range


@dataclass(frozen=True, slots=True)
class GroupKey:
    """Properties of one key of parameter groups.

    Args:
        about: Description of the value.
        range: Range of the value; None if it is not a number, or if it is checked where it is used.
        identity: Whether the key identifies the parameters of the group; resuming a run does not change such keys.
        configured: Whether the configuration takes precedence over the saved value when a run is resumed.
        scheduled: Whether a scheduler stores a value of its own under the key.
        option: Whether the options of a `ParamGroupRule` may set the key.
    """

    about: str
    range: Range | None = None
    identity: bool = False
    configured: bool = False
    scheduled: bool = False
    option: bool = False


GROUP_KEYS = MappingProxyType(
    {
        "params": GroupKey("The parameters.", identity=True),
        "param_names": GroupKey("Their names, in order.", identity=True),
        "name": GroupKey("The group's name in messages, plans and logs.", identity=True),
        "rule": GroupKey("Name of the optimizer whose update rule the group uses.", configured=True),
        "weight_decay_kind": GroupKey("Kind of weight decay, see `WeightDecayKind`.", configured=True, option=True),
        "lr_multiplier": GroupKey("Factor by which the learning rate has been multiplied.", configured=True),
        "frozen_until": GroupKey("Duration for which the group is frozen.", configured=True),
        "not_hidden": GroupKey("Reason, by parameter name, why it is not a hidden matrix.", configured=True),
        "fused_projections": GroupKey(
            "Kind, by parameter name, of fused projections found by themselves.", configured=True
        ),
        "rounding_seed": GroupKey("Seed of stochastic rounding.", Range(whole=True), configured=True, option=True),
        "initial_lr": GroupKey("Learning rate from which a scheduler starts.", NON_NEGATIVE, scheduled=True),
        "max_lr": GroupKey("Highest learning rate of torch's cyclic schedulers.", scheduled=True),
        "min_lr": GroupKey("Lowest learning rate of torch's cyclic schedulers.", scheduled=True),
        "peak_lr": GroupKey("Highest learning rate of the run, used by some kinds of weight decay.", NON_NEGATIVE),
        "peak_lr_from": GroupKey("Source of `peak_lr`."),
        "averaged": GroupKey("Number of the average that the parameters are at, and their dtypes; or empty."),
        "calls": GroupKey("Number of calls of `step`, for rules that count them on the host."),
    }
)
"""All such keys by name. Schedulers also write ``initial_<hyperparameter>``; see `is_scheduled`."""

PARAMS = frozenset({"params", "param_names"})
"""The keys of the parameters and their names, which are not settings."""
IDENTITY = frozenset(name for name, key in GROUP_KEYS.items() if key.identity)
"""The keys that identify the parameters of a group."""
CONFIGURED = frozenset(name for name, key in GROUP_KEYS.items() if key.configured)
"""The keys that the configuration sets, in addition to the optimizer's arguments."""
RESERVED = frozenset(name for name, key in GROUP_KEYS.items() if not key.option)
"""The keys that the options of a `ParamGroupRule` must not set."""


def is_scheduled(key: str) -> bool:
    """Return whether a scheduler, ours or torch's, stores a value of its own under ``key`` of a group."""
    return key.startswith("initial_") or (key in GROUP_KEYS and GROUP_KEYS[key].scheduled)
