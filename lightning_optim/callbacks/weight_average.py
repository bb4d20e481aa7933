from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_optim.callbacks._running_statistics import RunningStatistics, describe_layers
from lightning_optim.callbacks._swapping import SwapsWeights
from lightning_optim.kernels.averages import STEP, kept_by
from lightning_optim.optim.averaged_weights import has_averages, swap_in_average, swap_out_average

CHECKPOINT_KEY = "lightning_optim.weight_average"


class WeightAverage(SwapsWeights):
    """Validate, save and finish with an average of the weights that the optimizer keeps (its option `ema`).

    The optimizer moves the average in the pass of its own step; this callback puts it in the place of the parameters
    for each validation and each checkpoint, whichever code saves it, and the weights of training back afterwards. The
    two are exchanged in place, without further memory, bit for bit: neither validation nor saving changes the run. A
    checkpoint has the average as its ``state_dict`` and the weights of training in the state of the optimizer, and a
    run resumes from it bit for bit. After the fit or an exception the parameters stay at the average, so that
    ``trainer.test`` and ``torch.save`` use it.

    Running statistics of batch norm are averaged by the same decay at the same steps, which is reported; other buffers
    are as in training.

    Args:
        which: Number of the average, in the order of the optimizer's option `ema`; the others are kept as well, and
            ``lightning_optim.optim.ema_state_dict`` returns them.

    Raises:
        MisconfigurationException: At the start of the fit, if no optimizer keeps such an average, or Lightning's
            `EMAWeightAveraging` or `StochasticWeightAveraging` takes part in it.

    Example:
        >>> from lightning_optim import ConfigureOptimizers
        >>> callbacks = [ConfigureOptimizers("adamw", lr=1e-3, optimizer_kwargs={"ema": 0.9999}), WeightAverage()]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    role = "WeightAverage"

    def __init__(self, which: int = 0) -> None:
        super().__init__()
        if isinstance(which, bool) or not isinstance(which, int) or which < 0:
            raise ValueError(f"Invalid which={which!r}: must be the number of an average, from 0.")
        self._which = which
        self._statistics: RunningStatistics | None = None
        self._restored: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return f"WeightAverage(which={self._which})"

    @property
    def which(self) -> int:
        """Number of the average that is used."""
        return self._which

    def averages(self) -> Sequence[nn.Module]:
        """Implement `Contributor`: the averaged statistics."""
        return [] if self._statistics is None else [self._statistics]

    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the averaged running statistics, and those of training, if there are any."""
        if self._statistics is not None:
            state = {name: tensor.clone() for name, tensor in self._statistics.state_dict().items()}
            checkpoint[CHECKPOINT_KEY] = {"statistics": state, "swapped": self._statistics.swapped}

    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the state until the fit starts; after that, as when a tuner undoes a trial, restore it now."""
        self._restored = checkpoint.get(CHECKPOINT_KEY, {})
        self._restore()

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._at_setup(trainer, pl_module)
        self._statistics, self._restored = None, {}

    def check(self, trainer: L.Trainer) -> None:
        """Check that the optimizers of a Trainer keep the average.

        Args:
            trainer: The Trainer, whose optimizers have been made.

        Raises:
            MisconfigurationException: None of them does, a group keeps fewer averages, weights are float16, or another
                callback exchanges the weights with an average of its own.
        """
        self._refuse_other_averages(
            trainer, "the option ema takes several averages, and lightning_optim.optim.ema_state_dict returns each"
        )
        optimizers = self._optimizers(trainer)
        if not optimizers:
            given = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise MisconfigurationException(
                "WeightAverage needs an optimizer of lightning_optim.optim with the option ema, such as ema=0.9999 "
                f'(ConfigureOptimizers: optimizer_kwargs={{"ema": 0.9999}}); this run has {given}. Set it, take the '
                "optimizer of that name of this package, or use Lightning's EMAWeightAveraging, which has no shards."
            )
        groups = [group for o in optimizers for group in o.param_groups if group.get("ema")]
        for group in groups:
            if self._which >= len(kept_by(group)):
                raise MisconfigurationException(
                    f"Invalid which={self._which} of WeightAverage: must be the number of one of the averages that "
                    f"each group keeps, and one has ema={list(kept_by(group))}."
                )
        if any(param.dtype == torch.float16 for group in groups for param in group["params"]):
            raise MisconfigurationException(
                "WeightAverage cannot exchange float16 weights with their average bit for bit. Train float32 or "
                "bfloat16 weights, or remove the callback and take lightning_optim.optim.ema_state_dict after the fit."
            )

    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is such an average, and wrap ``trainer.save_checkpoint``."""
        self.check(trainer)
        if layers := describe_layers(pl_module):
            self._statistics = RunningStatistics(pl_module, self._entry(trainer))
            rank_zero_info(
                f"Running statistics of batch norm ({layers}) are averaged like the weights, and used with them."
            )
            self._restore()
        self._wrap_save_checkpoint(trainer)

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check again, as a checkpoint may have brought other averages, and move to the weights of training."""
        self.check(trainer)
        super()._at_train_start(trainer, pl_module)

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average running statistics, if there are any and there has been a step that was not skipped."""
        if self._statistics is not None:
            states = (state for o in self._optimizers(trainer) for state in o.state.values())
            count = next((state[STEP] for state in states if STEP in state), None)
            if count is not None:
                self._statistics.update(count)

    def _at_close(self) -> None:
        """Unwrap ``trainer.save_checkpoint``, and let go of the model."""
        super()._at_close()
        self._statistics = None

    @staticmethod
    def _optimizers(trainer: L.Trainer) -> list[Optimizer]:
        return [optimizer for optimizer in trainer.optimizers if has_averages(optimizer)]

    def _entry(self, trainer: L.Trainer) -> float | str:
        """Return the decay of the average, as the first group has it."""
        groups = (group for optimizer in self._optimizers(trainer) for group in optimizer.param_groups)
        entry: float | str = next(kept_by(group) for group in groups if group.get("ema"))[self._which]
        return entry

    def _swap_in(self, trainer: L.Trainer) -> None:
        """Move to the average."""
        for optimizer in self._optimizers(trainer):
            swap_in_average(optimizer, self._which)
        if self._statistics is not None:
            self._statistics.swap_in()

    def _swap_out(self, trainer: L.Trainer) -> None:
        """Move to the weights of training."""
        for optimizer in self._optimizers(trainer):
            swap_out_average(optimizer)
        if self._statistics is not None:
            self._statistics.swap_out()

    def _restore(self) -> None:
        if self._statistics is not None and self._restored:
            self._statistics.load_state_dict(self._restored["statistics"])
            self._statistics.swapped = bool(self._restored["swapped"])
