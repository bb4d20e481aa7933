"""The command `lightning-optim`: which part of it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

LISTED = ("optimizers", "schedules", "clipping", "weight-decay", "detectors", "diagnostics", "recipes")
"""Kinds of ``list``, each of which is a command as well."""

_OWN = {
    "check": ("check", "run_check", False),
    "list": ("listing", "run_list", False),
    "recipe": ("recipe", "run_recipe", False),
    "report": ("report", "run_report", False),
    "batch-size": ("batch_size", "run_batch_size", True),
    "compare": ("compare", "run_compare", True),
    "search": ("search", "run_search_command", True),
}
"""Commands with a parser of their own: module and function, and whether they read the configuration of a fit."""

NEEDED = "The command line needs jsonargparse and rich: pip install 'lightning-optim[cli]'"


def main(args: Sequence[str] | None = None) -> None:
    """Run the ``lightning-optim`` command.

    Args:
        args: The command line after the program's name; None for that of the process.

    Raises:
        SystemExit: The command is wrong, which one to six lines on stderr explain, or has found conflicts.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        _run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # The reader has seen enough: `lightning-optim list | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # Where a command has not caught it, as while it reads its configuration.
        print("error: Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def _run(given: list[str]) -> None:
    command = given[0] if given else ""
    if command == "--version":
        from lightning_optim import __version__

        print(f"lightning-optim {__version__}")
    elif command in LISTED:
        _run_own("list", given)
    elif command in _OWN:
        _run_own(command, given[1:])
    else:
        _run_cli(given)


def _run_own(command: str, given: list[str]) -> None:
    """Run a command with a parser of its own, which is loaded only now."""
    module, function, prepares = _OWN[command]
    if prepares:
        _prepare()
    getattr(importlib.import_module(f"lightning_optim.cli.{module}"), function)(given)


def _run_cli(given: list[str]) -> None:
    _prepare()
    from lightning_optim.cli.optim_cli import Command

    Command.run(given)


def _prepare() -> None:
    """Check the extra packages, and let class paths such as `examples.char_lm.CharLM` start where the user is."""
    try:
        require_extra()
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from None
    if (here := str(Path.cwd())) not in sys.path:  # as with `python -m`
        sys.path.insert(0, here)


def require_extra() -> None:
    """Check that the packages of the extra ``cli`` are there.

    Raises:
        ModuleNotFoundError: One is missing, or too old for Lightning.
    """
    try:
        import jsonargparse
        import rich  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDED) from error
    from lightning.pytorch.cli import LightningArgumentParser

    if not issubclass(LightningArgumentParser, jsonargparse.ArgumentParser):  # Lightning finds it too old.
        raise ModuleNotFoundError(NEEDED)
