"""The command line: LightningCLI for modules that leave their optimizer to the configuration."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The command line needs jsonargparse and rich: pip install 'lightning-optim[cli]'"
    ) from error

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.callbacks import ConfigureOptimizers, RunSummary, attach


class OptimCLI(LightningCLI):
    """LightningCLI that also runs modules without ``configure_optimizers``, and prints a summary after ``fit``.

    The configuration is the one of stock LightningCLI, with our callbacks under ``trainer.callbacks``. A
    `ConfigureOptimizers` among them is attached to a module that defines no ``configure_optimizers``. The key
    ``run_summary`` takes the arguments of `RunSummary`.

    Example:
        ```console
        $ lightning-optim fit --config run.yaml
        ```
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the summary's arguments."""
        parser.add_lightning_class_args(RunSummary, "run_summary")

    def instantiate_classes(self) -> None:
        """Makes module, data and Trainer, then attaches the optimizer where the module has none."""
        super().instantiate_classes()
        if not is_overridden("configure_optimizers", self.model):
            for callback in getattr(self.trainer, "callbacks", ()):
                if isinstance(callback, ConfigureOptimizers):
                    attach(self.model, callback)
                    break


def main(args: list[str] | None = None) -> None:
    """The ``lightning-optim`` command.

    Args:
        args: The command line after the program's name; None for the process's own.
    """
    # As `python -m` does it: class paths such as `examples.char_lm.CharLM` start in the current directory.
    sys.path.insert(0, str(Path.cwd()))
    OptimCLI(args=args)


if __name__ == "__main__":
    main()
