"""`LRRangeTest`: finds the learning rate of a run before its first step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lightning_optim.callbacks._boards import Boards, boards_of
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.tuning.rates.apply import rate_of, set_rate
from lightning_optim.tuning.rates.found import FoundRates
from lightning_optim.tuning.rates.measure import METHODS, NoTrialError, Search, measure
from lightning_optim.tuning.trials.fit import FitTrials
from lightning_optim.tuning.trials.private import leave_fit

TAG = "optim_lr"
"""Tag of the picture and the text in loggers."""


@typed
class LRRangeTest(L.Callback):
    """Finds the learning rate of each optimizer before the first step of a fit, and sets it.

    Short trials run from the point where the fit begins, under its real configuration: parameter groups, which keep
    their ratios, clipping, precision, accumulation, skipped steps. Afterwards everything is as it was, bit for bit: the
    module, the optimizers, loaders, random numbers, counters and callbacks; only the rates are others.

    ``"sweep"`` is the range test of Smith (2015, https://arxiv.org/abs/1506.01186): one step at each rate, growing by a
    factor, until the loss rises; repeated on data in other orders, so that the suggestion comes with an interval.
    ``"trials"`` trains a number of steps at each of a few rates, under the shape of the real schedule, on the same
    batches, and goes on with the better half: it costs about twice as much, some 800 steps, and is more reliable.
    ``"check"`` asks of the configured rate whether it diverges, or is slow compared with three times and a third of it,
    and, if so, goes on in that direction until neither is better.

    A fit that resumes from a checkpoint keeps the rates that were found then.

    Args:
        method: ``"sweep"``, ``"trials"`` or ``"check"``.
        steps: Steps of a sweep, or of a trial of the last round; by default 200 and 100.
        repeats: Number of sweeps of each optimizer.
        low: Lowest rate to try; by default well below what is usual for the optimizer.
        high: Highest rate to try; by default well above it.
        apply: Whether to set what has been found, or only to suggest it. Where the losses do not tell, the configured
            rate stays.
        png: File for the picture, which needs matplotlib; None for none on disk. Loggers that take pictures get it in
            either case.
        yaml: File for a configuration that sets what has been found: ``fit --config run.yaml --config found.yaml``.
        without: Names of classes of callbacks to leave out of the trials. Lightning's own that show, save or end a run
            are left out always; others take part, because they may change how training goes.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> from lightning_optim import ConfigureOptimizers
        >>> callbacks = [ConfigureOptimizers("adamw"), LRRangeTest(steps=50)]
    """

    finds_rates: ClassVar[bool] = True

    def __init__(
        self,
        method: str = "sweep",
        steps: int | None = None,
        repeats: int = 2,
        low: float | None = None,
        high: float | None = None,
        apply: bool = True,
        png: str | None = None,
        yaml: str | None = None,
        without: Collection[str] = (),
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Unknown method={method!r}. {nearest(method, METHODS)}")
        steps = METHODS[method] if steps is None else steps
        if steps < 20:
            raise ValueError(f"Invalid steps={steps!r}: must be at least 20, for a curve out of noise.")
        if repeats < 1:
            raise ValueError(f"Invalid repeats={repeats!r}: must be at least 1.")
        for name, rate in (("low", low), ("high", high)):
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"Invalid {name}={rate!r}: must be a finite rate above 0, or None.")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"Invalid low={low!r}: must be below high={high!r}.")
        self.method, self.steps, self.repeats, self.low, self.high = method, steps, repeats, low, high
        self.apply, self.png, self.yaml, self.without = apply, png, yaml, tuple(without)
        self.found: FoundRates | None = None
        """What has been found; None before the fit."""
        self._applied: list[tuple[float, float]] = []
        self._is_done = self._is_resumed = False
        self._leaves = self._draws = False
        """Whether the fit ends with the trials."""
        self._weight_decays: Sequence[float] = ()
        self._batches: Sequence[int] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew, unless a checkpoint is restored after this; before all others, which see the rates found."""
        if stage == "fit":
            present: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            self._draws = self._draws or trainer.progress_bar_callback is not None
            # A new list: Lightning is going through the old one.
            trainer.callbacks = [self, *(each for each in present if each is not self)]  # type: ignore[attr-defined]
            self._is_done, self._is_resumed, self._applied = False, False, []

    def state_dict(self) -> dict[str, Any]:
        """Return the rates that were configured, and those that were set."""
        return {"applied": [list(each) for each in self._applied], "done": self._is_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`: the run goes on at the rates that were found."""
        self._applied = [(configured, lr) for configured, lr in state_dict["applied"]]
        self._is_done = self._is_resumed = bool(state_dict["done"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Run the trials before the first batch of the fit; all hooks of its start have passed by now."""
        if self._is_done:
            if self._is_resumed:
                self._is_resumed = False
                self._set_again(trainer)
            return
        self._is_done = True
        if self._leaves:
            self.found = self._find(trainer)
            leave_fit()
        try:
            self.found = self._find(trainer)
        except NoTrialError as error:
            rank_zero_warn(f"{type(self).__name__} leaves the learning rate as it is: {error}")
            return
        self._show(trainer, self.found)
        if self.apply:
            self._set(trainer, self.found)

    def _find(self, trainer: L.Trainer) -> FoundRates:
        trials = FitTrials(trainer, self.without)
        silent = not (self._draws and trainer.is_global_zero)
        with tqdm(desc="Learning rate", disable=silent, unit=" trials", leave=False) as bar:

            def progress(what: str) -> None:
                bar.set_postfix_str(what)
                bar.update()

            ranges = self.low, self.high, self._weight_decays, self._batches
            search = Search(self.method, self.steps, self.repeats, *ranges)
            return measure(trials, trainer, search, progress)

    def _show(self, trainer: L.Trainer, found: FoundRates) -> None:
        """Write what has been found wherever it is wanted; what cannot be written costs a warning."""
        rank_zero_info(f"{type(self).__name__} ({self.method}): {found}")
        if not trainer.is_global_zero:
            return
        from lightning_optim.tuning.rates.picture import pixels, save_picture  # which needs matplotlib

        boards = Boards(boards_of(trainer))
        try:
            if self.yaml is not None:
                found.save_override(self.yaml)
            if self.png is not None:
                save_picture(found, self.png)
            if boards:
                boards.text(TAG, str(found), trainer.global_step)
                boards.image(TAG, pixels(found), trainer.global_step)
        except (ModuleNotFoundError, OSError) as error:
            rank_zero_warn(f"What {type(self).__name__} has found cannot be written: {type(error).__name__}: {error}")

    def _set(self, trainer: L.Trainer, found: FoundRates) -> None:
        for place, rate in enumerate(found):
            lr = rate.configured if rate.lr is None else rate.lr
            self._applied.append((rate.configured, lr))
            set_rate(trainer, place, lr)

    def _set_again(self, trainer: L.Trainer) -> None:
        """Set what was found before a resume, where the configuration has taken precedence over the checkpoint."""
        for place, (configured, lr) in enumerate(self._applied[: len(trainer.optimizers)]):
            if math.isclose(rate_of(trainer, place), configured) and lr != configured:
                set_rate(trainer, place, lr)
