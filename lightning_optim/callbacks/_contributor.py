"""The protocol between the hub and our callbacks: what they contribute to a step, and the hooks of a fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as L
from torch import Tensor
from torch.nn import Module

from lightning_optim.clipping import ClipRule
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import Detector
from lightning_optim.schedules.run import Run
from lightning_optim.step import StepPipeline


class Hears(L.Callback):
    """A callback that receives Lightning's hooks in place of the contributors."""


class Contributor(L.Callback):
    """The protocol between a hub and its members; the defaults contribute nothing and do nothing.

    What a member does during a fit it does in the methods named ``_at_...``, which the Trainer's `Hub` calls.
    Lightning's own hooks are left to users: a subclass may override any of them and need not call ``super()``.
    """

    role: ClassVar[str | None] = None
    """The role, of which a Trainer has one callback at most; subclasses inherit it."""

    only_watches: ClassVar[bool] = False
    """Whether it reads what happens and responds, but contributes nothing to a step besides detectors: a trial does
    without it."""

    # What a subclass contributes.

    def clip_rule(self) -> ClipRule | None:
        """Return the clip rule, or None for no clipping; called more than once, also to find out who clips."""
        return None

    def clip_rule_of(self, name: str, names: Sequence[str]) -> ClipRule | None:
        """Return the clip rule of one of several optimizers.

        Args:
            name: Its name.
            names: The names of all.
        """
        return self.clip_rule()

    def pipeline(self) -> Callable[..., StepPipeline] | None:
        """Return what makes the pipeline of each optimizer in place of `StepPipeline`, with its arguments; or None."""
        return None

    def clip_limit(self, run: Run) -> Callable[[int], float] | None:
        """Return the factor on the clip limit as a function of the step, or None for 1; called once per optimizer."""
        return None

    def detectors(self) -> Sequence[Detector]:
        """Return detectors, which may ask for steps to be skipped; called once per optimizer."""
        return ()

    def report_due(self, trainer: L.Trainer) -> bool:
        """Return whether to report each optimizer's step in the present batch.

        An optimizer that does not step in this batch is reported at its next step, one that steps more than once is
        reported once.
        """
        return False

    def histograms_due(self, trainer: L.Trainer) -> Collection[str]:
        """Return the kinds of magnitudes (`step.histograms.KINDS`) to count in the step that is to be reported."""
        return ()

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Process the record of a step that `report_due` asked for; its tensors are on the device."""

    def health_points(self) -> Mapping[str, float]:
        """Return numbers about the run that the host knows, for a monitor to show as ``optim_health/<name>``."""
        return {}

    def writes_skip_count(self, trainer: L.Trainer) -> bool:
        """Return whether it writes ``optim_health/skipped_steps`` at this step, so that no other callback has to."""
        return False

    def writes_health(self, trainer: L.Trainer) -> bool:
        """Return whether it writes what `health_points` of all members return at this step."""
        return False

    def used_lrs(self) -> Sequence[Sequence[float]]:
        """Return the rates of each optimizer's groups in its last step, if it changes them for a step; else nothing."""
        return ()

    def averages(self) -> Sequence[Module]:
        """Return modules that hold averages of the model's tensors, which a rollback restores with the model."""
        return ()

    # The hooks of a fit, as the hub passes them on; they are Lightning's of these names unless documented otherwise.

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None: ...
    def _at_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start training; all pipelines exist."""

    def _at_new_optimizers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adapt to other pipelines than before, in the middle of the run."""

    def _at_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None: ...
    def _at_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None: ...
    def _at_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...

    def _at_step(self, trainer: L.Trainer, optimizer_index: int) -> None:
        """Prepare for the step of an optimizer, which Lightning has announced: its gradients are ready."""

    def _at_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None: ...

    def _at_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None: ...
    def _at_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None: ...

    def _at_close(self) -> None:
        """Release what this callback has set up; the fit is over, however it ended."""


class Hearing:
    """The members of a hub that a hook of every batch concerns: those that define it, not having the default.

    Most members define few of them, and a batch has many. Each list changes in place as members join and leave.
    """

    HOOKS = ("_at_batch_start", "_at_before_backward", "_at_after_backward", "_at_step", "_at_batch_end", "report_due")

    def __init__(self) -> None:
        self.batch_start: list[Contributor] = []
        self.before_backward: list[Contributor] = []
        self.after_backward: list[Contributor] = []
        self.step: list[Contributor] = []
        self.batch_end: list[Contributor] = []
        self.report_due: list[Contributor] = []

    def update(self, members: Sequence[Contributor]) -> None:
        """Sort ``members`` into the lists, each in their order."""
        for hook in self.HOOKS:
            default = getattr(Contributor, hook)
            hearing = [m for m in members if getattr(getattr(m, hook), "__func__", None) is not default]
            getattr(self, hook.removeprefix("_at_"))[:] = hearing


def is_ours(callback: Any) -> bool:
    """Return whether ``callback`` is one of ours, by its real type: a mock imitates the class."""
    return issubclass(type(callback), Contributor)
