"""The parser of a command that has options of its own, and mostly takes those of ``fit`` as well."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lightning_optim.cli.fail import fail
from lightning_optim.core.suggest import nearest

_OF_FIT = ("config", "data", "debug", "model", "optim", "optimizer", "seed_everything", "trainer")
"""Options of ``fit`` that a misspelled option may be as well."""


class OwnParser(argparse.ArgumentParser):
    """A parser of argparse whose errors are a line, and whose options are not abbreviated.

    Args:
        command: Name of the command.
        description: What it does.
        epilog: What its help ends with.
    """

    def __init__(self, command: str, description: str, epilog: str) -> None:
        prog = f"lightning-optim {command}"
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        sentence = message if message.endswith((".", "?")) else f"{message}."
        fail(f"{sentence} See {self.prog} --help.", code=2)

    def split(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the options of the command, and return those of ``fit`` as they are.

        Args:
            args: The command line after the command.

        Returns:
            The options of the command, and the rest of the command line.

        Raises:
            SystemExit: An option is wrong, or one that is left resembles one of the command.
        """
        options, rest = self.parse_known_args(list(args))
        own = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        of_fit = [f"--{name}" for name in _OF_FIT]
        for arg in rest:
            flag = arg.partition("=")[0]
            if not flag.startswith("--") or "." in flag or flag in of_fit:
                continue
            hint = nearest(flag, [*own, *of_fit])
            # `fit` knows its own options, and explains what resembles none of these.
            if hint.startswith("Did you mean") and any(f"'{name}'" in hint for name in own):
                self.error(f"Unknown option {flag}. {hint}")
        return options, rest
