"""What a callback of ours contributes to the step pipeline, and what it is told of a fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as L
from torch import Tensor

from lightning_optim.clipping import ClipRule
from lightning_optim.core.durations import Horizon
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import Detector


class Hears(L.Callback):
    """What hears Lightning's hooks in place of the contributors."""


class Contributor(L.Callback):
    """The protocol between a hub and its members; here nothing is contributed and nothing done.

    What a member does during a fit it does in the methods named ``_at_...``, which the Trainer's `Hub` calls.
    Lightning's own hooks are left to users: a subclass may override any of them and need not call ``super()``.
    """

    role: ClassVar[str | None] = None
    """What only one callback of a Trainer may be; subclasses have it, too."""

    # What a subclass contributes.

    def clip_rule(self) -> ClipRule | None:
        """How gradients are clipped; asked once per optimizer."""
        return None

    def clip_limit(self, horizon: Horizon) -> Callable[[int], float] | None:
        """By what the rule's limit is multiplied at each step of a run that long; None for 1."""
        return None

    def detectors(self) -> Sequence[Detector]:
        """What makes a step be skipped; asked once per optimizer."""
        return ()

    def report_due(self, trainer: L.Trainer) -> bool:
        """Whether it wants a report of each optimizer's step in the present batch.

        An optimizer that does not step in this batch is reported at its next step, one that steps more than once is
        reported once.
        """
        return False

    def histograms_due(self, trainer: L.Trainer) -> Collection[str]:
        """Kinds of magnitudes (`step.histograms.KINDS`) to count in the step that is about to be reported."""
        return ()

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Receives a step that it asked for, still on the device."""

    def health_points(self) -> Mapping[str, float]:
        """Numbers about the run that the host knows, for a monitor to show as ``optim_health/<name>``."""
        return {}

    def writes_skip_count(self, trainer: L.Trainer) -> bool:
        """Whether it writes ``optim_health/skipped_steps`` at this step, so that nobody else has to."""
        return False

    # A fit as the hub passes it on; as Lightning's hooks of these names, unless told otherwise.

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None: ...
    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All pipelines stand."""

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The pipelines are others than before, in the middle of the run."""

    def _at_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None: ...
    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None: ...
    def _at_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Lightning has announced the step of an optimizer, whose gradients are ready."""

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None: ...

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None: ...

    def _at_close(self) -> None:
        """The fit is over, however it ended: undoes what is its own."""


def is_ours(callback: Any) -> bool:
    """Whether it is one of our callbacks, and no mock that says it were."""
    return issubclass(type(callback), Contributor)
