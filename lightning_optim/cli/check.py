"""`lightning-optim check`: put an optimizer to the conformance checks."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
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
    parser.add_argument("--list", action="store_true", help="print the checks, each with what it expects, and end")


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
    if "--list" in args:
        _print_checks()
        return
    options, rest = parser.parse_known_args(args)
    if (here := str(Path.cwd())) not in sys.path:  # as with `python -m`
        sys.path.insert(0, here)
    from lightning_optim.testing import check_optimizer

    try:
        factory = _found(options.optimizer)
        report = check_optimizer(
            factory,
            only=options.only,
            skip=options.skip,
            device=options.device,
            **_complete(factory, options.optimizer, _hyperparameters(rest, _defaults(factory))),
        )
    except (ImportError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report)
    if not report.passed:
        raise SystemExit(1)


def _print_checks() -> None:
    """Print the name, the file and the expectation of each check."""
    from lightning_optim.testing import checks
    from lightning_optim.testing.check import GROUPS

    for check in checks(only=GROUPS):
        group = "" if check.group in ("default", check.family) else f", {check.group}"
        head = f"{check.name} ({check.family}{group}): "
        print(textwrap.fill(head + check.expected, 80, subsequent_indent="    "))


def _found(path: str) -> Any:
    """Return what an import path, or the name of an optimizer, stands for.

    Raises:
        ValueError: There is nothing of that name, or its module cannot be imported.
    """
    path_of_dots = path.replace(":", ".")
    module_name, dot, name = path_of_dots.rpartition(".")
    if not dot:
        from lightning_optim.optim import get_optimizer_class

        try:
            return get_optimizer_class(name)
        except ValueError as error:
            raise ValueError(f"{error} A class of your own is an import path, as my_package.MyOptimizer.") from None
    if not all(part.isidentifier() for part in path_of_dots.split(".")):
        raise ValueError(f"Invalid OPTIMIZER={path!r}: must be an import path, as my_package.MyOptimizer.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"Invalid OPTIMIZER={path!r}: {_why_not(module_name, error)}") from None
    if not hasattr(module, name):
        known = [n for n, thing in vars(module).items() if isinstance(thing, type) and not n.startswith("_")]
        classes = nearest(name, known) if known else "It has no classes."
        raise ValueError(f"Invalid OPTIMIZER={path!r}: {module_name} has no {name!r}. {classes}")
    return getattr(module, name)


def _why_not(module_name: str, error: BaseException) -> str:
    """Return why a module could not be imported, with the line that has raised."""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and (module_name + ".").startswith(missing + "."):
        parent, _, last = missing.rpartition(".")
        if parent:
            known = [info.name for info in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))]
        else:
            known = [info.name for info in pkgutil.iter_modules() if not info.name.startswith("_")]
        alike = nearest(last, known) if known else ""
        return f"there is no module {missing!r} here.{' ' + alike if alike.startswith('Did') else ''}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    text = " ".join(str(error).split())
    return (
        f"importing {module_name} raises {type(error).__name__}: {text}{'' if isinstance(error, SyntaxError) else line}"
    )


def _defaults(factory: Any) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class or function besides the parameters; empty if they are not known."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())[1:]
    except (TypeError, ValueError):
        return {}
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _complete(factory: Any, path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the optimizer, if none is missing.

    Raises:
        ValueError: It needs others.
    """
    known = _defaults(factory)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing and not any(name not in known for name in given):  # a misspelt name is answered with the nearest
        flags = " ".join(f"--{name} VALUE" for name in missing)
        raise ValueError(f"Invalid OPTIMIZER={path!r}: it needs {', '.join(missing)} as well. Add {flags}.")
    return given


def _hyperparameters(flags: Sequence[str], known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the arguments of the optimizer from its flags, ``--name value``, ``--name=value`` or ``--name``.

    Raises:
        ValueError: There is a value without a name, or a name without a value that is no switch.
    """
    found: dict[str, Any] = {}
    name: str | None = None
    for flag in flags:
        if flag.startswith("--"):
            name, sign, text = flag[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = _value(text) if sign else _SWITCH
            name = None if sign else name
        elif name is not None:
            found[name], name = _value(flag), None
        else:
            raise ValueError(
                f"Invalid argument {flag!r}: must be a flag of the optimizer, as --lr 0.1 or --betas '(0.9, 0.99)'."
            )
    for name, value in found.items():
        if value is not _SWITCH:
            continue
        parameter = known.get(name)
        if (
            parameter is not None
            and not isinstance(parameter.default, bool)
            and "bool" not in str(parameter.annotation)
        ):
            raise ValueError(f"Invalid --{name}: needs a value, as --{name} 0.1.")
        found[name] = True
    return found


_SWITCH = object()
"""Value of a flag without one."""


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return tuple(value) if isinstance(value, list) else value
