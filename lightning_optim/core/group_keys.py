"""The keys of parameter groups that are no hyperparameters of an optimizer: one table for all who handle groups."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from lightning_optim.core.ranges import NON_NEGATIVE, Range


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What is known of one key of parameter groups.

    Args:
        about: What it holds.
        range: The numbers it may be; None where it is no number, or is checked by what reads it.
        identity: Whether it says which parameters the group has; then a group keeps its own when a run is resumed.
        configured: Whether the configuration may overrule the saved value when a run is resumed.
        scheduled: Whether a scheduler keeps its own number there.
        option: Whether the options of a `ParamGroupRule` may set it.
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
        "rule": GroupKey("Name of the optimizer whose update the group has.", configured=True),
        "weight_decay_kind": GroupKey("See `WeightDecayKind`; of any optimizer.", configured=True, option=True),
        "lr_multiplier": GroupKey("Factor that the learning rate has been multiplied by.", configured=True),
        "frozen_until": GroupKey("End of the time for which the group is frozen, a duration.", configured=True),
        "not_hidden": GroupKey("By parameter name, what else it is than a hidden matrix.", configured=True),
        "rounding_seed": GroupKey("Seed of stochastic rounding.", Range(whole=True), configured=True, option=True),
        "initial_lr": GroupKey("Learning rate that a scheduler starts from.", NON_NEGATIVE, scheduled=True),
        "max_lr": GroupKey("Highest learning rate of torch's cyclic schedulers.", scheduled=True),
        "min_lr": GroupKey("Lowest learning rate of torch's cyclic schedulers.", scheduled=True),
        "peak_lr": GroupKey("Highest learning rate of the run, which some kinds of decay refer to.", NON_NEGATIVE),
        "peak_lr_from": GroupKey("Where `peak_lr` is from."),
        "calls": GroupKey("Number of calls of `step`, for rules that count them on the host."),
    }
)
"""Every such key by its name. Schedulers also write ``initial_<hyperparameter>``; see `is_scheduled`."""

PARAMS = frozenset({"params", "param_names"})
"""The keys whose value is no single setting: parameters and their names."""
IDENTITY = frozenset(name for name, key in GROUP_KEYS.items() if key.identity)
"""The keys that say which parameters a group has."""
CONFIGURED = frozenset(name for name, key in GROUP_KEYS.items() if key.configured)
"""The keys that the configuration sets, in addition to the optimizer's arguments."""
RESERVED = frozenset(name for name, key in GROUP_KEYS.items() if not key.option)
"""The keys that are no option of a `ParamGroupRule`."""


def is_scheduled(key: str) -> bool:
    """Whether a scheduler, ours or torch's, keeps its own number under ``key`` of a group."""
    return key.startswith("initial_") or (key in GROUP_KEYS and GROUP_KEYS[key].scheduled)
