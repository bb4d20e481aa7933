"""The command line: LightningCLI for modules whose optimizer is set by the configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The command line needs jsonargparse and rich: pip install 'lightning-optim[cli]'"
    ) from error

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.callbacks import ConfigureOptimizers, RunSummary, attach
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.diagnostics.run_report import read_runs, write_report
from lightning_optim.factory.plan_text import format_plan, save_plot


class PlanningTrainer(L.Trainer):
    """Trainer that can also show the plan of a fit."""

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
        plan = make_plan(self, model, datamodule)
        if ckpt_path is not None:
            plan.notes.append(f"The plan is that of a run from its start; {ckpt_path} was not read.")
        print(format_plan(plan, parameters, width))
        if png is not None:
            save_plot(plan.curves, plan.horizon, png)
        if plan.conflicts:
            raise SystemExit(1)


class OptimCLI(LightningCLI):
    """LightningCLI that also runs modules without ``configure_optimizers``, and prints a summary after ``fit``.

    The configuration is that of LightningCLI, with the callbacks of this package under ``trainer.callbacks``. A
    `ConfigureOptimizers` among them is attached to a module that defines no ``configure_optimizers``. The key
    ``run_summary`` takes the arguments of `RunSummary`.

    The command ``plan`` takes the configuration of ``fit`` and shows, without training, the parameter groups, the
    schedule, the number of steps and all conflicts; the exit code is 1 if there are any.

    Example:
        ```console
        $ lightning-optim plan --config run.yaml
        $ lightning-optim fit --config run.yaml
        ```
    """

    def __init__(self, *args: Any, trainer_class: Any = L.Trainer, **kwargs: Any) -> None:
        if isinstance(trainer_class, type) and not issubclass(trainer_class, PlanningTrainer):
            trainer_class = type(trainer_class.__name__, (PlanningTrainer, trainer_class), {})
        super().__init__(*args, trainer_class=trainer_class, **kwargs)  # type: ignore[misc]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands, and ``plan``."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of `RunSummary`."""
        parser.add_lightning_class_args(RunSummary, "run_summary")

    def instantiate_classes(self) -> None:
        """Create module, data and Trainer, then attach the optimizer if the module has none."""
        super().instantiate_classes()
        if not is_overridden("configure_optimizers", self.model):
            for callback in getattr(self.trainer, "callbacks", ()):
                if isinstance(callback, ConfigureOptimizers):
                    attach(self.model, callback)
                    break


def report(args: list[str]) -> None:
    """Write one page about runs that were logged to TensorBoard: ``lightning-optim report RUN_DIR...``.

    Args:
        args: The command line after ``report``.
    """
    parser = argparse.ArgumentParser(prog="lightning-optim report", description=report.__doc__)
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


def main(args: list[str] | None = None) -> None:
    """Run the ``lightning-optim`` command: `OptimCLI`, or `report`.

    Args:
        args: The command line after the program's name; None for that of the process.
    """
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["report"]:
        report(given[1:])
        return
    # As with `python -m`, class paths such as `examples.char_lm.CharLM` start in the current directory.
    sys.path.insert(0, str(Path.cwd()))
    OptimCLI(args=args)


if __name__ == "__main__":
    main()
