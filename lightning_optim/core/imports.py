"""Import of objects by their full path."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_optim.core.suggest import nearest


def import_object(path: str, what: str, base: type | tuple[type, ...]) -> Any:
    """Import the object with the full path ``path``.

    Args:
        path: A full import path, such as ``torch.optim.AdamW``.
        what: Role of the object, for messages.
        base: Classes whose subclasses are suggested if the name is unknown.

    Raises:
        ValueError: The module cannot be imported or has no such name; the message suggests the nearest one.

    Example:
        >>> import_object("math.pi", "number", object)
        3.141592653589793
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"Cannot import the {what} {path!r}: {error}.") from error
    try:
        return getattr(module, name)
    except AttributeError as error:  # The module's own message may say where the name is.
        options = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        options += getattr(module, "__all__", ())  # of which some may be imported on first use
        own = str(error)
        advice = f"It says: {own}" if "Did you mean" in own or not options else nearest(name, options)
        raise ValueError(f"{module_name} has no {name!r}. {advice}") from error
