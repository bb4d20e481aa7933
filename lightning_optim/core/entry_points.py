"""Classes that installed packages bring along: entry points by kind and name, found once and loaded on first use."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Offer:
    """One entry point of an installed package.

    Args:
        name: Name of the entry.
        target: `module:attribute` of the class.
        package: Name of the distribution.
        entry_point: Its object from `importlib.metadata`.
    """

    name: str
    target: str
    package: str
    entry_point: Any = field(repr=False)

    @property
    def owner(self) -> str:
        """The class and its package, for messages."""
        return f"{self.target.replace(':', '.')} of the installed package {self.package!r}"

    def is_of(self, cls: type) -> bool:
        """Return whether this is the entry point of ``cls`` itself, which its module may also register."""
        return self.target == f"{cls.__module__}:{cls.__qualname__}"

    def load(self, kind: str, base: type) -> type | None:
        """Import the class; None with a warning if the package is broken.

        Args:
            kind: Name of the kind, for the message.
            base: Base class that it must have.
        """
        try:
            cls = self.entry_point.load()
        except Exception as error:  # An import of somebody else's package may fail in any way.
            problem = f"{type(error).__name__}: {error}"
        else:
            if isinstance(cls, type) and issubclass(cls, base):
                return cls
            problem = f"{self.target} is {cls!r}, but must be a {base.__name__} class"
        warnings.warn(
            f"The installed package {self.package!r} offers the {kind} {self.name!r}, which cannot be used "
            f"({problem}). Everything else works; update or remove the package to end this warning.",
            stacklevel=2,
        )
        return None


def offers(group: str) -> list[Offer]:
    """Return the entry points of a group, of the distributions on `sys.path` as it is now.

    Args:
        group: Name of the group, such as `lightning_optim.optimizers`.
    """
    from importlib import metadata

    found = {}
    for each in metadata.entry_points(group=group):
        package = each.dist.name if each.dist is not None else "?"
        found[(each.name, each.value, package)] = Offer(each.name, each.value, package, each)
    return list(found.values())
