"""`lightning-optim inspect`: a look at a configuration's model before it is trained."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import lightning.pytorch as L

from lightning_optim.tuning.inspection import inspect_model
from lightning_optim.tuning.inspection.text import styled

if TYPE_CHECKING:
    _Trainer = L.Trainer
else:
    _Trainer = object

_WIDEST = 120


class Inspects(_Trainer):
    """A Trainer that can also look at a model before it is trained."""

    def inspect(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        batches: int = 3,
        png: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run some batches forward and backward, without an update, and print what stands against training.

        The exit code is 0, whatever is found; it is 1 if a batch cannot be run at all.

        Args:
            model: The module.
            datamodule: The data module.
            batches: Number of batches.
            png: Path of a picture of activations and gradients by depth, which needs matplotlib; None for none.
            ckpt_path: Accepted because configurations of a fit contain it; the look is at the model as it is made.
            weights_only: Accepted for the same reason.

        Raises:
            SystemExit: A batch cannot be run; the exit code is 1.
        """
        inspection = inspect_model(model, datamodule, self, batches=batches)
        if not self.is_global_zero:
            return
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        text = inspection.text(width)
        if sys.stdout.isatty():
            from rich.console import Console

            Console(highlight=False, soft_wrap=True).print(styled(text))
        else:
            print(text)
        if ckpt_path is not None:
            print(f"\nThe look is at the model as it is made; {ckpt_path} was not read.")
        if png is not None:
            inspection.picture(png)
        if inspection.error is not None:
            raise SystemExit(1)
