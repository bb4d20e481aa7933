"""How many optimizer steps a Lightning Trainer will take; reads its public attributes, and imports nothing of it."""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch.optim import Optimizer

from lightning_optim.core.durations import Horizon
from lightning_optim.schedules.run import Ahead, EpochEnds


def horizon_of(trainer: Any) -> Horizon:
    """Compute the length of a whole run, from its first epoch to its last, for one optimizer.

    Lightning's own ``estimated_stepping_batches`` is -1 for an ``IterableDataset`` with ``max_epochs``, infinite for
    ``max_time``, wrong with a ``GradientAccumulationScheduler``, and makes a resumed stateful dataloader replay batches
    when it is read in ``configure_optimizers``.

    Args:
        trainer: The Trainer, from ``on_train_start`` on, when its dataloaders are set up.
    """
    batches, epochs = trainer.num_training_batches, _epochs(trainer)
    lengths: tuple[int, ...] = ()
    if math.isfinite(batches):
        lengths = tuple(_windows(trainer, epoch, batches) for epoch in range(1 if epochs is None else epochs))
    max_steps = _max_steps(trainer)
    bounds = [] if max_steps is None else [math.ceil(max_steps / max(len(trainer.optimizers), 1))]
    if lengths and epochs is not None:
        bounds.append(sum(lengths))
    elif epochs == 0:
        bounds.append(0)
    return EpochEnds().horizon(0, Ahead(min(bounds) if bounds else None, 0, 0, lengths, _is_trial(trainer)))


class RunLength:
    """How many steps an optimizer of a Trainer will still take, by the best present knowledge.

    In automatic optimization that is what the batches to come and the accumulation say. In manual optimization the
    optimizer steps when the module says so: the steps of the last whole epoch are taken as those of the next ones, and
    before there is one, the steps per batch so far; before there are two steps, one per batch.

    Args:
        trainer: The Trainer.
        module: Its module, of which ``automatic_optimization`` is asked.
        optimizer: The optimizer.
    """

    def __init__(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        self._trainer, self._module, self._optimizer = weakref.ref(trainer), weakref.ref(module), weakref.ref(optimizer)
        self._rhythm = _Rhythm()

    def move_to(self, optimizer: Optimizer) -> None:
        """Go on with another optimizer, which has come in the place of this one."""
        self._optimizer = weakref.ref(optimizer)

    def moved_by(self, scheduler: Any) -> str | None:
        """Return who moves the scheduler: the Trainer (``"caller"``), its optimizer, or None if it is not in use."""
        trainer, module, optimizer = self._trainer(), self._module(), self._optimizer()
        if trainer is None or module is None:
            return None
        present = [config.scheduler for config in trainer.lr_scheduler_configs]
        for config in trainer.lr_scheduler_configs:
            if config.scheduler is scheduler:
                # Lightning moves schedulers that a module returns in a list once per epoch, and none in manual
                # optimization.
                by_step = (config.interval, config.frequency) == ("step", 1) or scheduler.has_own_length
                return "caller" if module.automatic_optimization and by_step else "optimizer"
        others = any(getattr(each, "optimizer", None) is optimizer for each in present)
        known = any(optimizer in (each, getattr(each, "optimizer", None)) for each in trainer.optimizers)
        return "optimizer" if known and not others else None  # The module has returned the optimizer alone.

    def mark(self) -> object:
        """Return what `ahead` depends on: epoch, batches, bounds, accumulation, and the rhythm of manual steps."""
        trainer = self._trainer()
        if trainer is None:
            return None
        rhythm = (self._rhythm.per_batch, self._rhythm.all_per_batch, tuple(self._rhythm.last_epoch.items()))
        return (
            trainer.current_epoch,
            trainer.fit_loop.epoch_progress.current.started,  # and the epoch that has begun
            trainer.num_training_batches,
            trainer.max_epochs,
            trainer.max_steps,
            trainer.accumulate_grad_batches,
            rhythm,
        )

    def ahead(self) -> Ahead:
        """Return the steps to come."""
        trainer = self._trainer()
        assert trainer is not None, "only while the Trainer lives"
        module = self._module()
        by_hand = module is not None and not module.automatic_optimization
        return self._ahead_by_hand(trainer) if by_hand else _ahead(trainer)

    def counted(self) -> int | None:
        """Return the Trainer's count of the steps of all optimizers."""
        trainer = self._trainer()
        return None if trainer is None else int(trainer.global_step)

    def before_step(self) -> None:
        """Record that the optimizer is about to step in the present batch."""
        trainer, module = self._trainer(), self._module()
        if trainer is not None and module is not None and not module.automatic_optimization:
            loop = trainer.fit_loop
            self._rhythm.begin(trainer.current_epoch, loop.batch_idx, loop.total_batch_idx, trainer.global_step)

    def after_step(self) -> None:
        """Record that it has stepped."""
        self._rhythm.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the rhythm of a manual optimizer, and the place in the run at which it has been noted."""
        return {**self._rhythm.state_dict(), "batch": self._batch()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`; not that of another place, as in a rollback: data go on."""
        if state.get("batch", self._batch()) == self._batch():
            self._rhythm.load_state_dict(state)

    def _batch(self) -> int:
        trainer = self._trainer()
        return -1 if trainer is None else int(trainer.fit_loop.total_batch_idx)

    def _ahead_by_hand(self, trainer: Any) -> Ahead:
        rhythm, batches = self._rhythm, trainer.num_training_batches
        epoch, epochs = _epoch(trainer), _epochs(trainer)
        done = _processed(trainer)
        per_batch = 1.0 if rhythm.per_batch is None else rhythm.per_batch
        taken = rhythm.in_epoch if rhythm.epoch == epoch else 0
        lengths: tuple[int, ...] = ()
        bounds = []
        if math.isfinite(batches):
            whole = rhythm.last_epoch.get(batches)
            left = rhythm.left(batches - done, per_batch) if whole is None else max(whole - taken, 0)
            each = max(round(batches * per_batch), 1) if whole is None else whole
            lengths = (taken + left, *[each] * max((epochs or 0) - epoch - 1, 0))
            if epochs is not None:
                bounds.append(sum(lengths) - taken)
        elif epochs is not None and epoch >= epochs:
            bounds.append(0)
        if (max_steps := _max_steps(trainer)) is not None:
            left, optimizers = max(max_steps - trainer.global_step, 0), max(len(trainer.optimizers), 1)
            if optimizers == 1 or rhythm.all_per_batch is None:  # Without a rhythm, an equal share for each.
                bounds.append(math.ceil(left / optimizers))
            else:
                bounds.append(rhythm.left(math.ceil(left / rhythm.all_per_batch), per_batch))
        return Ahead(min(bounds) if bounds else None, epoch, taken, lengths, _is_trial(trainer))


class _Rhythm:
    """How often an optimizer of manual optimization steps: per batch, and per epoch."""

    def __init__(self) -> None:
        self.per_batch: float | None = None
        self.all_per_batch: float | None = None
        """Steps of all optimizers together."""
        self.last_epoch: dict[int | float, int] = {}
        """Steps of the last whole epoch, by its number of batches."""
        self.epoch, self.in_epoch = -1, 0
        self.is_whole = True
        """Whether the present epoch has been seen from its beginning."""
        self._steps = self._in_batch = 0
        self._batch = self._began = 0
        self._first: tuple[int, int] | None = None  # batch of the first step, and the steps of all before it

    def begin(self, epoch: int, batch_in_epoch: int, batch: int, steps_of_all: int) -> None:
        """The optimizer is about to step.

        Args:
            epoch: Number of the epoch.
            batch_in_epoch: Number of the batch in it.
            batch: Number of the batch in the run.
            steps_of_all: Steps that all optimizers have taken together.
        """
        if epoch != self.epoch:
            began = batch - batch_in_epoch
            if self.epoch == epoch - 1 and self.is_whole:
                self.last_epoch = {began - self._began: self.in_epoch}
            self.is_whole |= self.epoch != -1
            self.epoch, self.in_epoch, self._began = epoch, 0, began
        if self._first is None:
            self._first = (batch, steps_of_all)
            if self.per_batch is None and batch_in_epoch > 0:
                self.per_batch = 1 / (batch_in_epoch + 1)  # accumulated by hand until now
        elif batch > self._batch:
            first, all_before = self._first
            self.per_batch = self._steps / (batch - first)
            self.all_per_batch = (steps_of_all - all_before) / (batch - first)
        if batch != self._batch:
            self._batch, self._in_batch = batch, 0

    def end(self) -> None:
        """It has stepped."""
        self._steps += 1
        self._in_batch += 1
        self.in_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what has been learned, as plain numbers."""
        last = [[batches, steps] for batches, steps in self.last_epoch.items()]
        return {
            "per_batch": self.per_batch,
            "all_per_batch": self.all_per_batch,
            "last_epoch": last,
            "epoch": self.epoch,
            "in_epoch": self.in_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.per_batch, self.all_per_batch = state["per_batch"], state["all_per_batch"]
        self.last_epoch = dict(state["last_epoch"])
        self.epoch, self.in_epoch = state.get("epoch", -1), state.get("in_epoch", 0)
        self.is_whole = False

    def left(self, batches: int, per_batch: float) -> int:
        """Steps in the ``batches`` to come, the present one included, in which a step is about to be taken."""
        if batches <= 0:
            return 0
        return max(round(per_batch) - self._in_batch, 1) + math.floor((batches - 1) * per_batch + 1e-6)


def _ahead(trainer: Any) -> Ahead:
    batches, epoch, epochs = trainer.num_training_batches, _epoch(trainer), _epochs(trainer)
    lengths: tuple[int, ...] = ()
    bounds, taken = [], 0
    if math.isfinite(batches):
        last = epoch + 1 if epochs is None else epochs
        lengths = tuple(_windows(trainer, each, batches) for each in range(epoch, last))
        done, accumulation = _processed(trainer), _accumulation(trainer, epoch)
        if done and lengths:
            # What applies in a batch: a callback that sets it when epochs begin has not, if a resume is within one.
            accumulation = int(trainer.accumulate_grad_batches)
            lengths = (math.ceil(batches / accumulation), *lengths[1:])
        taken = lengths[0] if done >= batches and lengths else done // accumulation
        if epochs is not None:
            bounds.append(max(sum(lengths) - taken, 0))
    elif epochs is not None and epoch >= epochs:
        bounds.append(0)
    if (max_steps := _max_steps(trainer)) is not None:
        bounds.append(max(max_steps - trainer.global_step, 0))
    return Ahead(min(bounds) if bounds else None, epoch, taken, lengths, _is_trial(trainer))


def _epoch(trainer: Any) -> int:
    """The present epoch, or the next one where the checkpoint was saved when all batches of its epoch were behind.

    With ``max_steps``, Lightning's ``current_epoch`` is then still the one that has ended.
    """
    return int(max(trainer.current_epoch, trainer.fit_loop.epoch_progress.current.processed))


def _processed(trainer: Any) -> int:
    """Batches of the present epoch that are behind, asked within a batch or when a fit begins.

    Between two epochs, and when a second fit begins, Lightning's count is still that of the last epoch. After a resume
    from the end of an epoch, it does not count epochs as started before they are processed.
    """
    loop = trainer.fit_loop
    epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    in_epoch = batch.ready > batch.processed or (epoch.started > epoch.processed and loop.restarting)
    return int(batch.processed) if in_epoch else 0


def _windows(trainer: Any, epoch: int, batches: float) -> int:
    """Optimizer steps of an epoch; a window of accumulation that the end of the epoch cuts short still steps."""
    return math.ceil(batches / _accumulation(trainer, epoch))


def _epochs(trainer: Any) -> int | None:
    """Number of epochs in which optimizers step; None if nothing bounds it."""
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return None
    # StochasticWeightAveraging adds an epoch in which it only measures the statistics of BatchNorm.
    return int(
        min([trainer.max_epochs, *(_last_epoch(c) + 1 for c in trainer.callbacks if hasattr(type(c), "swa_end"))])
    )


def _last_epoch(averaging: Any) -> float:
    try:
        return float(averaging.swa_end)
    except AttributeError:  # The fit has not started.
        return math.inf


def _max_steps(trainer: Any) -> int | None:
    return None if trainer.max_steps in (None, -1) else int(trainer.max_steps)


def _is_trial(trainer: Any) -> bool:
    """Whether the run is cut short: for a smoke test, by a finder, or by ``max_steps``."""
    return bool(
        trainer.fast_dev_run
        or trainer.overfit_batches
        or trainer.limit_train_batches not in (None, 1.0)
        or _max_steps(trainer) is not None
    )


def _accumulation(trainer: Any, epoch: int) -> int:
    for callback in trainer.callbacks:
        # Duck-typed: lightning.pytorch.callbacks.GradientAccumulationScheduler, the one callback with this method.
        if hasattr(type(callback), "get_accumulate_grad_batches"):  # of the type: a mock has any
            return int(callback.get_accumulate_grad_batches(epoch))
    return int(trainer.accumulate_grad_batches)
