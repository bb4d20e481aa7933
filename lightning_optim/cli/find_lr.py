"""`lightning-optim find-lr`: the learning rate of a configuration, by short trials of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L

from lightning_optim.cli.merge import set_path
from lightning_optim.tuning.rates.find import find_lr
from lightning_optim.tuning.rates.found import FoundRates, write_override

if TYPE_CHECKING:
    _Trainer = L.Trainer
else:
    _Trainer = object


class FindsLR(_Trainer):
    """A Trainer that can also find the learning rate of a fit."""

    def find_lr(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        method: str = "trials",
        steps: int | None = None,
        repeats: int = 2,
        low: float | None = None,
        high: float | None = None,
        weight_decays: list[float] | None = None,
        batches: list[int] | None = None,
        out: str = "found_lr",
        width: int = 72,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Find a learning rate by short trials of the fit, and write it as a configuration; nothing is trained.

        Args:
            model: The module.
            datamodule: The data module.
            method: Trials of several rates, ``trials``; a sweep of rates, ``sweep``, quicker and less reliable;
                or ``check``, whether the configured rate diverges or is slow.
            steps: Steps of a trial of the last round, by default 100, or of a sweep, by default 200.
            repeats: Number of sweeps of each optimizer.
            low: Lowest rate to try; by default well below what is usual for the optimizer.
            high: Highest rate to try; by default well above it.
            weight_decays: Values of weight decay to try with the rate that is found.
            batches: Multiples of the batch to try, by accumulation, with that rate and those of the scaling rules.
            out: Folder for lr.yaml, lr.png and a TensorBoard log.
            width: Number of columns of the picture in the terminal.
            ckpt_path: A checkpoint from which the run goes on.
            weights_only: Accepted because configurations of a fit contain it.

        Raises:
            SystemExit: The losses do not tell; the exit code is 1.
        """
        found = find_lr(
            self,
            model,
            datamodule=datamodule,
            method=method,
            steps=steps,
            repeats=repeats,
            low=low,
            high=high,
            weight_decays=weight_decays or (),
            batches=batches or (),
            ckpt_path=ckpt_path,
        )
        if not self.is_global_zero:
            return
        from lightning_optim.tuning.rates.picture import draw_in_terminal

        for rate in found:
            print(draw_in_terminal(rate, width), end="\n\n")
        print(found)
        self._save(found, Path(out))
        if all(rate.lr is None for rate in found):
            raise SystemExit(1)

    def _save(self, found: FoundRates, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        written = save_override(found, folder / "lr.yaml", getattr(self, "configured_callbacks", ()))
        try:
            from lightning_optim.tuning.rates.picture import save_picture

            save_picture(found, folder / "lr.png")
            _log(found, folder)
        except ModuleNotFoundError as error:
            print(f"No picture: {error}")
        if written is not None:
            print(f"\nTrain with it: lightning-optim fit --config run.yaml --config {written}")
        elif flags := found.flags:
            print(f"\nTrain with it: {' '.join(flags)}")


def save_override(found: FoundRates, path: Path, callbacks: Sequence[Any]) -> Path | None:
    """Write a configuration that sets what has been found.

    Args:
        found: What has been found.
        path: The file.
        callbacks: The callbacks as they are configured, as plain data: a later file replaces a list as a whole, so that
            of several optimizers all are written.

    Returns:
        The path; None if there is nothing to set.
    """
    config = found.override()
    if "optimizers" in config.get("optim", {}):
        entries = [_arguments(each) for each in callbacks if isinstance(each, dict)]
        own = next((copy.deepcopy(each) for each in entries if each.get("optimizers")), None)
        if own is None:
            return None
        for name, values in config["optim"]["optimizers"].items():
            set_path(own, ["optimizers", name, "lr"], values["lr"])
        config = {"optim": {"optimizers": own["optimizers"]}}
    return write_override(config, str(found), path)


def _arguments(entry: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = entry.get("init_args") or {}
    return arguments


def _log(found: FoundRates, folder: Path) -> None:
    """Write the picture to a log of TensorBoard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_optim.tuning.rates.picture import pixels

    logger: Any = TensorBoardLogger(folder, name="", version="")
    logger.experiment.add_image("optim_lr", pixels(found), 0, dataformats="HWC")
    logger.experiment.add_text("optim_lr", str(found), 0)
    logger.experiment.close()
