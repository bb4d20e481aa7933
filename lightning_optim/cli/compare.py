"""`lightning-optim compare`: variants of a configuration, side by side."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_optim.cli.fail import fail, said_of
from lightning_optim.cli.own_parser import OwnParser


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare``, all of which come in addition to those of ``fit``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("--variants", required=True, help="YAML file: name of each variant, and the keys that it sets")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: those of the configuration)")
    parser.add_argument("--seconds", type=float, help="seconds of training of each run, in place of --steps")
    parser.add_argument("--tune-lr", action="store_true", help="give each variant its own tuned rate first")
    parser.add_argument("--tune-steps", type=int, help="steps of a run for tuning (default: half of the budget)")
    parser.add_argument("--metric", help="metric to compare (default: the loss of validation)")
    parser.add_argument("--mode", choices=("min", "max"), help="which way it is better (default: by its name)")
    parser.add_argument("--validations", type=int, default=10, help="validations of each run (default: 10)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one per GPU or core)")
    parser.add_argument("--out", default="compare", help="folder of runs, page and results.csv (default: compare)")
    parser.add_argument("--rerun", action="store_true", help="replace runs of another configuration in the folder")


def run_compare(args: Sequence[str]) -> None:
    """Compare variants of a configuration.

    Args:
        args: The command line after ``compare``: its own arguments, and any of ``fit``.

    Raises:
        SystemExit: The command line, the configuration or a variant is wrong, or no run could train.
    """
    parser = OwnParser(
        "compare",
        "Compare variants of a run: same weights and data for each seed, several seeds, one page.",
        "All options of fit are taken as well: lightning-optim compare --config run.yaml --variants variants.yaml "
        "--steps 500 --tune-lr --model my.Module",
    )
    add_compare_arguments(parser)
    options, rest = parser.split(args)
    from lightning_optim.cli.job import PRELOAD, fit_job, hidden_by, note_on_loggers, refuse_hidden
    from lightning_optim.tuning.compare.page import write_comparison
    from lightning_optim.tuning.compare.study import Settings, check_names, run_comparison

    variants = read_variants(Path(options.variants))
    try:
        check_names(list(variants))
        settings = Settings(
            options.seeds, options.steps, options.seconds, options.tune_lr, options.tune_steps, options.metric,
            options.mode, options.validations, options.workers, rerun=options.rerun, preload=PRELOAD,
        )  # fmt: skip
        budget = "--steps" if options.seconds is None else "--seconds"
        hidden = hidden_by(options.steps or options.seconds, budget) | {"seed_everything": "--seeds"}
        for name, overrides in variants.items():
            refuse_hidden(hidden, rest, overrides, f"variant {name!r}")
    except ValueError as error:
        fail(str(error), code=2)
    configs = {
        name: checked(rest, overrides, f"variant {name!r} of {options.variants}")
        for name, overrides in variants.items()
    }
    settings = replace(settings, devices=_devices(configs))
    changed = [name for name, overrides in variants.items() if {"model", "data"} & overrides.keys()]
    for note in {note_on_loggers(config["trainer"].get("logger")) for config in configs.values()} - {""}:
        print(note)
    if not options.tune_lr:
        print("Each variant runs at the rate that it is given. With --tune-lr each gets its own, which is fair.")

    def make(name: str, variant: str, seed: int, **arguments: Any) -> Any:
        depends = sources_of(configs[variant])
        return fit_job(
            name, rest, variants[variant], seed=seed, reseed=bool(changed), depends=depends, **arguments
        )  # fmt: skip

    texts = {name: _text(overrides) for name, overrides in variants.items()}
    try:
        found = run_comparison(settings, texts, make, options.out, changed)
    except (OSError, ValueError, RuntimeError) as error:
        fail(said_of(error))
    except KeyboardInterrupt:
        fail(f"Interrupted. The same command continues with the runs in {options.out} that have not finished.", 130)
    show(found)
    try:
        print(write_comparison(found))
    except ModuleNotFoundError as error:
        fail(f"{error}\n{found.folder / 'results.csv'} has the results.")
    except OSError as error:
        fail(f"No page: {said_of(error)}\nThe runs are kept in {found.folder}: the same command writes it.")


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """Read the file of variants: a mapping of names to keys and values of a configuration.

    Args:
        path: The file.

    Raises:
        SystemExit: It is missing or no such mapping.
    """
    from jsonargparse import get_loader

    from lightning_optim.cli.sources import SourceError, read_mapping

    try:
        source = read_mapping(str(path), "names of variants, each with its keys: `lion: {optim: {optimizer: lion}}`")
    except SourceError as error:
        fail(str(error), code=2)
    found: dict[str, dict[str, Any]] = {}
    values = get_loader("yaml")(path.read_text(encoding="utf-8")) or {}  # to which 1e-3 is a number
    for name, value in values.items():
        if value is not None and not isinstance(value, dict):
            fail(
                f"{path}, line {source.line([name])}: variant {name!r} is {value!r:.60}; it must be a mapping of keys "
                "as in a configuration, for instance\n  lion: {optim: {optimizer: lion, lr: 1e-4}}",
                code=2,
            )
        found[str(name)] = value or {}
    return found


def checked(args: Sequence[str], overrides: Mapping[str, Any], where: str) -> Any:
    """Parse the configuration of a variant, and construct its callbacks, so that what is wrong is known before a run.

    Args:
        args: Command line after ``fit``.
        overrides: What the variant sets.
        where: What to call the variant in a message.

    Returns:
        The configuration of the fit.

    Raises:
        SystemExit: Something is wrong.
    """
    from lightning_optim.cli.job import with_overrides

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(io.StringIO()),
                warnings.catch_warnings(),
            ):
                # The command line is given because it is not that of the process.
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                return _parsed(with_overrides(args, overrides, Path(folder)))
        except SystemExit as exit_:
            text = said.getvalue().rpartition("error: ")[2]
            path = f"{Path(folder) / 'overrides.yaml'}"
            named = path in text
            text = re.sub(rf"{re.escape(path)}(, line \d+)?", lambda _: where, text)
            of_all = named or text.startswith("Unknown option")
            fail(text if of_all else f"{where}: {text}", int(exit_.code or 1))


class _ParsedError(Exception):
    """The end of a command line that is only parsed."""


def _parsed(args: Sequence[str]) -> Any:
    from lightning_optim.cli.optim_cli import OptimCLI

    found: list[Any] = []

    class Check(OptimCLI):
        """A command line that constructs the callbacks of a fit, and nothing else."""

        _at_shell = True

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": OptimCLI.subcommands()["fit"]}

        def _set_seed(self) -> None:
            """Leave the random numbers of this process alone."""

        def before_instantiate_classes(self) -> None:
            config = self.config["fit"].clone()
            found.append(self.config["fit"])
            for key in ("model", "data"):
                config.pop(key, None)
            self._parser("fit").instantiate_classes(config)
            raise _ParsedError

    with contextlib.suppress(_ParsedError):
        Check(args=["fit", *args])
    return found[0]


def sources_of(config: Any) -> list[str]:
    """Return the files of the classes of model and data: after a change in them a run is another one.

    Args:
        config: The configuration of a fit.
    """
    found = []
    for key in ("model", "data"):
        path = (config.get(key) or {}).get("class_path")
        module = sys.modules.get(str(path).rpartition(".")[0])
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_file():
            found.append(os.path.relpath(file))
    return sorted(set(found))


def _devices(configs: Mapping[str, Any]) -> list[int]:
    """Return the GPUs that runs are spread over; none if the configuration wants the CPU.

    Raises:
        SystemExit: A run wants several devices.
    """
    import torch

    trainers = [config["trainer"] for config in configs.values()]
    for trainer in trainers:
        devices = trainer.get("devices", "auto")
        if devices not in ("auto", 1, "1") or trainer.get("num_nodes", 1) != 1:
            fail(
                f"Invalid trainer.devices={devices!r}: each run of a comparison is on one device, and several run side "
                "by side (--workers). Set it to 1.",
                code=2,
            )
    if any(trainer.get("accelerator") == "cpu" for trainer in trainers):
        return []
    return list(range(torch.cuda.device_count()))


def _text(overrides: Mapping[str, Any]) -> str:
    """Return what a variant sets, in one line."""
    import yaml

    parts = [f"{key}: {yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in overrides.items()]
    return "; ".join(part.removesuffix("\n...") for part in parts) or "the configuration as it is"


def show(comparison: Any, print_: Callable[..., None] | None = None) -> None:
    """Print the table of results and the verdict.

    Args:
        comparison: The results.
        print_: What prints; None for a console of rich.
    """
    from rich.console import Console
    from rich.table import Table

    from lightning_optim.tuning.compare.page import summary

    header, *rows = summary(comparison)
    # What fits into a terminal; the page has the rest.
    shown = [header.index(name) for name in (*header[:4], "ms per step", "optimizer state")]
    found = Table(*(header[i] for i in shown), title=f"Comparison: {comparison.budget}", title_justify="left")
    for row in rows:
        found.add_row(*(row[i] for i in shown))
    say = print_ or partial(Console().print, markup=False, highlight=False)
    say(found)
    for _, sentence in comparison.verdict():
        say(f"- {sentence}")
