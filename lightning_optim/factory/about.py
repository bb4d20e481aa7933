"""What the configuration says of an optimizer beyond its groups: its name, and notes for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

_ATTRIBUTE = "_lightning_optim_about"
"""Where an optimizer has its `About`: torch saves no attribute of an optimizer in a state dict."""


@dataclass
class About:
    """What is known of one optimizer.

    Args:
        name: Its name among several; None if it has none.
        notes: Sentences about its groups that a plan shows.
    """

    name: str | None = None
    notes: list[str] = field(default_factory=list)


def about(optimizer: Optimizer) -> About:
    """Return what is known of an optimizer, which may be changed in place.

    Args:
        optimizer: The optimizer itself, no wrapper.
    """
    found: About = vars(optimizer).setdefault(_ATTRIBUTE, About())
    return found


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Return the names of a Trainer's optimizers: what the configuration calls them, else their numbers.

    Args:
        optimizers: The optimizers themselves, no wrappers.

    Example:
        >>> import torch
        >>> one, other = (torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
        >>> about(other).name = "discriminator"
        >>> optimizer_names([one, other])
        ['0', 'discriminator']
    """
    names = [about(optimizer).name for optimizer in optimizers]
    return [name if name is not None and names.count(name) == 1 else str(i) for i, name in enumerate(names)]
