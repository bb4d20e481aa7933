"""Mistakes in a configuration as a few lines at the shell, in place of a traceback or of the help."""

from __future__ import annotations

import re
import sysconfig
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_optim.cli.fail import MOST_LINES, capped, fail

_USERS = (ValueError, TypeError, RuntimeError, OSError, ImportError, MisconfigurationException, NotImplementedError)
"""Exceptions by which this package and Lightning refuse a configuration; others are errors of a program."""

_OTHERS = (
    "fsspec",
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "numpy",
    "pytorch_lightning",
    "tensorboard",
    "torch",
    "torchmetrics",
    "yaml",
)
"""Packages whose frames do not make an error one of the user's program."""


class ShortErrors(LightningArgumentParser):
    """A parser that explains a mistake in at most six lines, with file, line and key."""

    explain: Callable[[str], str | None] | None = None
    """What makes a message of jsonargparse a short one; None if it cannot."""
    debug = False
    """Whether errors are raised, for their traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with code 2.

        Args:
            message: The message of jsonargparse.
            ex: The exception it comes from.

        Raises:
            ArgumentError: With ``--debug``, or if the parser is not to exit.
        """
        top = self if self.explain is not None else getattr(self, "parent_parser", self)
        if not self.exit_on_error or top.debug:
            raise ArgumentError(None, message) from ex
        fail((top.explain(message) if top.explain is not None else None) or condense(message), code=2)


def condense(message: str) -> str:
    """Return what matters of a message of jsonargparse: the key, and the innermost reasons.

    Example:
        >>> print(condense('''Parser key "trainer.max_epochs":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'int'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Expected a <class 'int'>
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'str'>
        ...   Given value: many'''))
        Invalid trainer.max_epochs: expected int or null, got 'many'.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    values = re.findall(r"^\s*Given value: (.*)", message, re.MULTILINE)
    if not keys:
        return message
    key = keys[-1] if keys[-1].startswith(keys[0]) else ".".join(dict.fromkeys(keys))
    if reasons := sentences(message):
        return f"Invalid {key}: {reasons[0]}"
    kinds = list(dict.fromkeys(_kind(kind) for kind in re.findall(r"Expected an? (?:<class ')?([\w.]+)", message)))
    got = f", got {values[0]!r:.80}" if values else ""
    return f"Invalid {key}: expected {' or '.join(kinds) or 'another type'}{got}."


def _kind(kind: str) -> str:
    """What jsonargparse expects, in the words of a configuration."""
    name = kind.rpartition(".")[2]
    words = {"NoneType": "null", "Iterable": "list", "Sequence": "list", "Literal": "one of its names"}
    return "the path of a class" if kind in ("path", "dot") else words.get(name, name)


def sentences(message: str) -> list[str]:
    r"""Return what constructors say in a message of jsonargparse, which tries every type that an argument may have.

    Args:
        message: The message.

    Example:
        >>> sentences("Errors:\n  - Invalid lr=-1: it must be above 0.\n  - Expected a <class 'int'>")
        ['Invalid lr=-1: it must be above 0.']
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    found = [line for line in dict.fromkeys(lines) if not _NOISE.match(line)]
    # What the other types lack says nothing about the one that was meant.
    return [line for line in found if "got an unexpected keyword argument" not in line] or found


_NOISE = re.compile(
    r"Parser key|Does not validate against|Subtypes: |Errors:$|Given value|Expected an? |Problem with given class_path"
    r"|Not a valid subclass|Subclass types expect|- Expected|Unable to load config|Option '\w+' is not accepted"
    r"|a class path|a dict with|a dict without|Problems parsing|Got value|$"
)


@contextmanager
def short_errors(explain: Callable[[str], str | None], raises: Callable[[], bool]) -> Iterator[None]:
    """Print what this package, Lightning or jsonargparse refuses as a short error, and exit with code 1.

    Exceptions that come through code of the user keep their traceback, which shows where.

    Args:
        explain: What adds file and key to a message; it returns None if it cannot.
        raises: Whether to raise every exception as it is.

    Raises:
        SystemExit: For an exception of a configuration.
    """
    try:
        yield
    except _USERS as error:
        if raises() or _through_users_code(error):
            raise
        message = str(error).strip() or type(error).__name__
        explained = explain(message)
        fail(explained or f"{capped(message, MOST_LINES - 1)}\n(--debug shows the traceback.)")


def _through_users_code(error: BaseException | None) -> bool:
    """Whether a frame between this package and the place of the error is of a program that uses it.

    jsonargparse raises an error of its own from that of a constructor, so the causes count, too.
    """
    stdlib = str(Path(sysconfig.get_path("stdlib")))
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        trace: Any = error.__traceback__
        while trace is not None:
            package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
            name = trace.tb_frame.f_code.co_filename
            in_stdlib = name.startswith(("<", stdlib)) and "site-packages" not in name
            if not in_stdlib and package not in (*_OTHERS, "lightning_optim"):
                return True
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return False
