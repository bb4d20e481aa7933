"""The version of the state that this package adds to checkpoints, and what is said of one that it cannot read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

VERSION = 2
"""Written as ``version``. Version 1, of 0.1, had none, and no names of parameters; it is still read."""


def check_version(state: Mapping[str, Any], of: str, known: Collection[str]) -> None:
    """Check that a saved state can be read, and warn of parts that cannot.

    Args:
        state: The state; empty if there is none.
        of: What it is the state of, for messages.
        known: Its keys, ``version`` aside.

    Raises:
        ValueError: It is of a later version.

    Example:
        >>> check_version({"version": 9, "counts": []}, "the step counts", ["counts"])
        Traceback (most recent call last):
        ValueError: The checkpoint has the step counts in version 9, and this lightning_optim reads up to version 2. ...
    """
    version = state.get("version", 1)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"The checkpoint has {of} in version {version}, and this lightning_optim reads up to version {VERSION}. "
            "Install the release that saved it, or a later one; or delete its key from the checkpoint to begin afresh."
        )
    if unknown := sorted(map(str, state.keys() - {*known, "version"})):
        warnings.warn(
            f"The checkpoint has {of} with {', '.join(map(repr, unknown))}, which this lightning_optim does not know "
            f"and leaves out; it knows {', '.join(map(repr, sorted(known)))}.",
            stacklevel=2,
        )
