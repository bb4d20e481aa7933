"""LightningCLI for modules whose optimizer is set by the configuration."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_optim import __version__
from lightning_optim.callbacks import RunSummary
from lightning_optim.callbacks.configure_optimizers import attach_first
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.cli.batch_size import add_batch_size_arguments
from lightning_optim.cli.check import add_check_arguments
from lightning_optim.cli.compare import add_compare_arguments
from lightning_optim.cli.diagnosis import explain
from lightning_optim.cli.errors import ShortErrors, short_errors
from lightning_optim.cli.fail import fail
from lightning_optim.cli.find_lr import FindsLR
from lightning_optim.cli.inspecting import Inspects
from lightning_optim.cli.keys import OptimKeys
from lightning_optim.cli.listing import add_list_arguments
from lightning_optim.cli.merge import plain
from lightning_optim.cli.recipe import add_recipe_arguments
from lightning_optim.cli.report import add_report_arguments
from lightning_optim.cli.search import add_search_arguments
from lightning_optim.core.suggest import nearest
from lightning_optim.factory.plan_text import format_plan, save_plot
from lightning_optim.tuning.recipes.recommendation import in_brief, recommend


class PlanningTrainer(FindsLR, Inspects, L.Trainer):
    """Trainer that can also show the plan of a fit, and look into what comes before it."""

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        parameters: bool = False,
        png: str | None = None,
        width: int = 72,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print the parameter groups, the schedule, the length and all conflicts of a fit, without training.

        A line names the recipe that the module calls for (`lightning_optim.recommend`).

        Args:
            model: The module.
            datamodule: The data module.
            parameters: Whether to list every parameter of each group.
            png: Path of a picture of the schedules, which needs matplotlib; None for none.
            width: Number of columns of the plot in the terminal.
            ckpt_path: Accepted because configurations of a fit contain it; the plan is that of a fit from the start.
            weights_only: Accepted for the same reason.

        Raises:
            SystemExit: The fit has conflicts; the exit code is 1.
        """
        plan = make_plan(self, model, datamodule=datamodule)
        plan.notes = [*getattr(self, "plan_notes", ()), *plan.notes]
        if recommended := recommend(model):
            plan.facts["Recommended"] = in_brief(recommended)
        if ckpt_path is not None:
            plan.notes.append(f"The plan is that of a run from its start; {ckpt_path} was not read.")
        print(format_plan(plan, parameters, width))
        if png is not None:
            save_plot(plan.curves, plan.horizon, png)
        if plan.conflicts:
            raise SystemExit(1)


# LightningCLI calls the Trainer's method that has the name of the command.
setattr(PlanningTrainer, "find-lr", PlanningTrainer.find_lr)


class OptimCLI(OptimKeys, LightningCLI):
    """LightningCLI that also runs modules without ``configure_optimizers``, and prints a summary after ``fit``.

    The configuration is that of LightningCLI, with the callbacks of this package under ``trainer.callbacks``. A
    `ConfigureOptimizers` among them is attached to a module that defines no ``configure_optimizers``. The key
    ``run_summary`` takes the arguments of `RunSummary`. Keys and flags for the callbacks are those of `OptimKeys`:
    ``--optim.lr 1e-3``.

    At the shell, a mistake in the configuration ends in a few lines with file, line and key; with ``--debug`` it ends
    in its traceback, as does an error in the user's own code always.

    The command ``plan`` takes the configuration of ``fit`` and shows, without training, the parameter groups, the
    schedule, the number of steps and all conflicts; the exit code is 1 if there are any. ``inspect`` runs some batches
    of it forward and backward, without an update, and says what stands against training.

    Example:
        ```console
        $ lightning-optim plan --config run.yaml
        $ lightning-optim fit --config run.yaml
        ```
    """

    _at_shell = False
    """Whether errors are printed, in a few lines, rather than raised."""

    def __init__(
        self,
        *args: Any,
        trainer_class: Any = L.Trainer,
        parser_class: type[LightningArgumentParser] = ShortErrors,
        **kwargs: Any,
    ) -> None:
        if isinstance(trainer_class, type) and not issubclass(trainer_class, PlanningTrainer):
            trainer_class = type(trainer_class.__name__, (PlanningTrainer, trainer_class), {})
        self._debug = False
        with short_errors(self._explain, lambda: self._debug or not self._at_shell):
            super().__init__(*args, trainer_class=trainer_class, parser_class=parser_class, **kwargs)  # type: ignore[misc]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands, ``plan``, ``inspect`` and ``find-lr``."""
        own = {command: {"model", "datamodule"} for command in ("plan", "inspect", "find-lr")}
        return {**LightningCLI.subcommands(), **own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of `RunSummary`."""
        parser.add_lightning_class_args(RunSummary, "run_summary")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; without ``args``, that is at the shell, errors are short, and ``--debug`` makes them long."""
        self._at_shell = self._at_shell or args is None
        self._given = sys.argv[1:] if args is None else args
        self._home = os.getcwd()
        if isinstance(self._given, list) and "--debug" in self._given:
            self._debug, self._given = True, [arg for arg in self._given if arg != "--debug"]
            if args is None:
                sys.argv[1:] = self._given
            else:
                args = self._given
        if isinstance(parser, ShortErrors):
            parser.explain, parser.debug = self._explain, self._debug
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Create module, data and Trainer, then attach the optimizer if the module has none."""
        super().instantiate_classes()
        trainer = self._get(self.config, "trainer", default={})
        self.trainer.configured_callbacks = plain(trainer.get("callbacks")) or []  # type: ignore[attr-defined]
        attach_first(self.model, getattr(self.trainer, "callbacks", ()))

    def before_plan(self) -> None:
        """Tell the plan what the configuration files replace in each other."""
        self.trainer.plan_notes = self.replaced  # type: ignore[attr-defined]

    def _explain(self, message: str) -> str | None:
        """The message, with the file, line and key that it is about."""
        if not isinstance(getattr(self, "_given", None), list):
            return None
        config = getattr(self, "config", None)
        there = os.getcwd()
        os.chdir(self._home)  # jsonargparse is in the folder of the file that it reads; the others are not.
        try:
            return explain(message, self._given, config, getattr(self, "_subcommand_parsers", {}), self.parser)
        finally:
            os.chdir(there)


_COMMANDS = {
    "fit": "train, and validate between epochs",
    "validate": "run one epoch over the validation data",
    "test": "run one epoch over the test data",
    "predict": "compute predictions",
    "plan": "show a fit before it runs: groups, schedule, conflicts",
    "inspect": "look at the model before training: no update",
    "find-lr": "find a learning rate by short trials of a fit",
    "list": "show optimizers, schedules, clipping methods and more",
    "recipe": "print published settings for a kind of model",
    "report": "write a page about a run, or several side by side",
    "compare": "compare variants of a run over several seeds",
    "batch-size": "find the largest batch that fits, and the rate for it",
    "search": "search hyperparameters, with Optuna",
    "check": "check an optimizer of your own",
    "completion": "print completions for bash, zsh or tcsh",
}
"""All commands, each with a line for `--help`."""


class Command(OptimCLI):
    """The command `lightning-optim`."""

    _at_shell = True
    _shell: str | None = None
    """The shell for which to print a completion script."""

    @classmethod
    def run(cls, args: Sequence[str]) -> None:
        """Run one command.

        Args:
            args: The command line after the program's name.

        Raises:
            SystemExit: The command line is wrong.
        """
        command = args[0] if args else None
        if command is None:
            fail(f"Which command? One of {', '.join(_COMMANDS)}. See lightning-optim --help.", code=2)
        if not command.startswith("-") and command not in _COMMANDS:
            fail(f"Unknown command {command!r}. {nearest(command, _COMMANDS)}", code=2)
        needed = {command: cls.subcommands()[command]} if command in cls.subcommands() else cls.subcommands()
        # The parser of a command takes a fifth of a second to build, so the others are left out.
        shell = _shell(args[1:]) if command == "completion" else None
        one = type(cls.__name__, (cls,), {"subcommands": staticmethod(lambda: needed), "_shell": shell})
        description = "Train with PyTorch Lightning: optimizer, schedule, clipping and guard from a configuration."
        kwargs = {"prog": "lightning-optim", "version": __version__, "description": f"{description}\n\n{_DEBUG}"}
        # The arguments are given because `python -m` and tests have others; they are those of the command line.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        # Without a logger all runs save their configuration to the same place.
        one(args=list(args), parser_kwargs=kwargs, save_config_kwargs={"overwrite": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; for ``completion`` print the script and exit."""
        if self._shell is not None:
            if not hasattr(parser, "get_completion_script"):
                fail("Completion needs a newer jsonargparse: pip install -U 'jsonargparse[signatures]'", code=2)
            print(parser.get_completion_script(f"shtab-{self._shell}"))
            raise SystemExit(0)
        super().parse_arguments(parser, args)

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Build the parser, with a line for each command."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        action = self.parser._subcommands_action
        assert action is not None
        others = {
            "list": add_list_arguments,
            "recipe": add_recipe_arguments,
            "report": add_report_arguments,
            "batch-size": add_batch_size_arguments,
            "compare": add_compare_arguments,
            "search": add_search_arguments,
            "check": add_check_arguments,
            "completion": add_completion_arguments,
        }
        for command, add in others.items():
            other = ArgumentParser(description=_COMMANDS[command])
            add(other)
            action.add_subcommand(command, other, help=_COMMANDS[command])
        for choice in action._choices_actions:
            choice.help = _COMMANDS[choice.dest]


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of ``completion``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def _shell(args: Sequence[str]) -> str:
    """The shell of ``completion``, for which jsonargparse needs shtab."""
    parser = argparse.ArgumentParser(
        prog="lightning-optim completion", description="Print a script that completes commands and options."
    )
    add_completion_arguments(parser)
    shell: str = parser.parse_args(args).shell
    if find_spec("shtab") is None:
        fail("Completion needs shtab: pip install shtab", code=2)
    return shell


_DEBUG = "Errors are a few lines; with --debug, each has its traceback."
