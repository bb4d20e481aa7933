"""`lightning-optim report`: one page about runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder with the event files of one run")
    parser.add_argument("--out", default="report", help="folder for report.html and its pictures (default: report)")
    parser.add_argument("--loss", type=float, action="append", help="show when this loss was reached; repeatable")
    parser.add_argument(
        "--level",
        type=_level,
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="show when this metric reached this value, as val_acc=0.9; repeatable",
    )


def run_report(args: Sequence[str]) -> None:
    """Write one page about runs that were logged to TensorBoard.

    Args:
        args: The command line after ``report``.
    """
    from lightning_optim.diagnostics.run_report import read_runs, write_report

    parser = argparse.ArgumentParser(
        prog="lightning-optim report",
        description="Write one page about a run, or several side by side, from their TensorBoard event files.",
        epilog="Example: lightning-optim report runs/digits/version_0 runs/digits/version_1 --out comparison",
    )
    add_report_arguments(parser)
    options = parser.parse_args(args)
    levels: dict[str, list[float]] = {}
    for name, value in options.level:
        levels.setdefault(name, []).append(value)
    try:
        print(write_report(read_runs(options.runs), options.out, options.loss, levels))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(str(error))


def _level(text: str) -> tuple[str, float]:
    name, sign, value = text.rpartition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not METRIC=VALUE, for instance val_acc=0.9")
    return name, float(value)
