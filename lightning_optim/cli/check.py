"""`lightning-optim check`: put an optimizer to the conformance checks."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim.core.suggest import nearest


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``check``; those of the optimizer follow as flags.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument(
        "optimizer",
        metavar="OPTIMIZER",
        help="import path of a class, or of a function from parameters to an optimizer, as my_package.MyOptimizer; or "
        "a name that `lightning-optim list optimizers` shows. Its arguments follow as flags: --lr 0.1",
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a check, a file of checks or a group; repeatable"
    )
    parser.add_argument("--skip", action="append", metavar="NAME", help="what to leave out; repeatable")
    parser.add_argument("--device", default="cpu", help="device of the parameters (default: cpu)")


def run_check(args: Sequence[str]) -> None:
    """Check an optimizer and print the report.

    Args:
        args: The command line after ``check``.

    Raises:
        SystemExit: With code 1 if a check has failed, with 2 if the command line is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-optim check",
        description="Check whether an optimizer keeps what torch, trainers and checkpoints rely on.",
        epilog="Example: lightning-optim check torch.optim.AdamW --lr 0.01 --betas '(0.9, 0.99)'",
        allow_abbrev=False,
    )
    add_check_arguments(parser)
    options, rest = parser.parse_known_args(args)
    if (here := str(Path.cwd())) not in sys.path:  # as with `python -m`
        sys.path.insert(0, here)
    from lightning_optim.testing import check_optimizer

    try:
        report = check_optimizer(
            _found(options.optimizer),
            only=options.only,
            skip=options.skip,
            device=options.device,
            **_hyperparameters(rest),
        )
    except (ImportError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report)
    if not report.passed:
        raise SystemExit(1)


def _found(path: str) -> Any:
    """Return what an import path, or the name of an optimizer, stands for.

    Raises:
        ModuleNotFoundError: The module imports one that is missing.
        ValueError: There is nothing of that name.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        from lightning_optim.optim import get_optimizer_class

        return get_optimizer_class(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # The module is there, and itself imports one that is not.
        raise ValueError(f"Invalid OPTIMIZER={path!r}: there is no module {error.name!r} here.") from None
    if not hasattr(module, name):
        known = [n for n, thing in vars(module).items() if isinstance(thing, type) and not n.startswith("_")]
        raise ValueError(f"Invalid OPTIMIZER={path!r}: {module_name} has no {name!r}. {nearest(name, known)}")
    return getattr(module, name)


def _hyperparameters(flags: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of the optimizer from its flags, ``--name value``, ``--name=value`` or ``--name``.

    Raises:
        ValueError: There is a value without a name.
    """
    found: dict[str, Any] = {}
    name: str | None = None
    for flag in flags:
        if flag.startswith("--"):
            name, sign, text = flag[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _value(text) if sign else True
            name = None if sign else name
        elif name is not None:
            found[name], name = _value(flag), None
        else:
            raise ValueError(f"Invalid argument {flag!r}: must be a flag of the optimizer, as --lr 0.1.")
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return tuple(value) if isinstance(value, list) else value
