"""From a model and a configuration to parameter groups, an optimizer and a scheduler."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_optim.core.durations import Horizon
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import checked, typed
from lightning_optim.core.user_frame import depth_outside
from lightning_optim.core.wrappers import unwrap_module
from lightning_optim.factory.about import about
from lightning_optim.factory.added_groups import track_added_groups
from lightning_optim.factory.division import divide_work
from lightning_optim.factory.freezing import Freezing, freezing_of
from lightning_optim.factory.optimizer_spec import OptimizerSpec
from lightning_optim.factory.owner import owner_of
from lightning_optim.factory.resume import OptimizerResume
from lightning_optim.factory.resume_scheduler import resume_scheduler
from lightning_optim.factory.run_length import RunLength, horizon_of
from lightning_optim.factory.trainer_clipping import let_others_clip
from lightning_optim.optim.fused_groups import FUSED, fused_note
from lightning_optim.param_groups import Entry, ParamGroupRule, build_param_groups, check_rules, lost_matches
from lightning_optim.schedules import Schedule, Scheduler, Warmup
from lightning_optim.schedules.plateau import Observer, ReduceOnPlateau
from lightning_optim.schedules.resolve import resolve_hyperparameter_schedules, resolve_schedule

__all__ = ["OptimizerFactory"]

_ON_RESUME = ("checkpoint", "config")


@typed(own=("optimizer", "schedule", "schedules"))
class OptimizerFactory:
    r"""Makes the optimizer of a model: groups by rules, fused where it can be, and a schedule per optimizer step.

    Args:
        optimizer: Which optimizer: a name (`lightning_optim.optim.list_optimizers`), an import path, a class, a mapping
            with ``class_path`` and ``init_args`` as in YAML, or any callable from parameter groups to an optimizer.
        lr: Peak learning rate of the groups without a multiplier, above 0. None for the optimizer's default. Not with a
            callable or ``init_args``, which bring their own.
        weight_decay: Weight decay of the groups without their own, at least 0. None for the optimizer's default.
        optimizer_kwargs: Further arguments of the optimizer, for instance ``{"betas": (0.9, 0.95)}``.
        schedule: A name (`lightning_optim.schedules.list_schedules`), a `Schedule`, a function from the step to a
            multiplier, or a torch ``LRScheduler``: a class, a mapping with ``class_path`` and ``init_args``, or a
            callable from the optimizer to one. None keeps the rate constant, after the warmup if there is one.
        warmup: Length of the warmup for a schedule given by name: ``500``, ``"500 steps"``, ``"2 epochs"``, ``"5%"``;
            or a `Warmup`, which has a shape and a start, too.
        param_groups: Rules and presets, the first match wins. None means the preset ``no_decay``: no weight decay on
            biases, norms and embeddings, which is nearly always what is wanted. An empty list means one group,
            which is all that LBFGS takes.
        schedules: Schedules of other hyperparameters by name, each a name or a `Schedule`: a key of the optimizer's
            groups (``weight_decay``), or ``momentum``, ``beta1``, ``beta2``. They multiply each group's own value.
        on_resume: Resume policy: whether checkpoint or configuration takes precedence. ``"checkpoint"``: the run
            continues bit for bit, and a warning names what differs in the configuration. ``"config"``: learning rate,
            weight decay, schedule, its length, ``fused`` and all else are the configuration's; moments and steps stay,
            and what changed is printed.

    Raises:
        ValueError: An argument is unknown, out of range or given twice; the message names the nearest.
        TypeError: ``optimizer`` or ``schedule`` is of no kind that is accepted.

    Example:
        In a module, ``return OptimizerFactory("adamw", lr=3e-4, schedule="cosine", warmup="5%")(self)`` in
        ``configure_optimizers``. In a plain loop:

        >>> factory = OptimizerFactory("sgd", lr=0.1, schedule="cosine", warmup=10)
        >>> optimizer, scheduler = factory.build(nn.Linear(2, 2), Horizon(total_steps=100))
        >>> [(group["name"], round(group["lr"], 3)) for group in optimizer.param_groups]
        [('no_decay', 0.01), ('default', 0.01)]
    """

    _found_lr: float | None = None
    """A learning rate to take in place of the configured one: a finder's."""

    def __init__(
        self,
        optimizer: str | Callable[[Iterable[Any]], Optimizer] | Mapping[str, Any] = "adamw",
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        schedule: str | Schedule | Callable[[Any], Any] | Mapping[str, Any] | None = None,
        warmup: int | str | Warmup | None = None,
        param_groups: Sequence[Entry] | None = None,
        schedules: Mapping[str, str | Schedule] | None = None,
        on_resume: str = "checkpoint",
    ) -> None:
        if on_resume not in _ON_RESUME:
            raise ValueError(f"Unknown on_resume={on_resume!r}. {nearest(str(on_resume), _ON_RESUME)}")
        self._on_resume = on_resume
        self._saved_names: Sequence[str] = ()  # of a checkpoint's weights, in their order then
        given = {"lr": lr, "weight_decay": weight_decay}
        given = {key: value for key, value in given.items() if value is not None}
        self._optimizer = OptimizerSpec(optimizer, optimizer_kwargs or {}, given)
        preset = () if self._optimizer.why_one_group else ("no_decay",)
        self._rules: Sequence[Entry] = preset if param_groups is None else param_groups
        check_rules(self._rules)
        self._optimizer.check_rules(self._rules)
        for text in self._optimizer.odd_rates(self._rules):
            self._tell(text, True)
        trial = self._optimizer.trial()
        self._schedule = resolve_schedule("constant" if schedule is None else schedule, warmup, trial)
        of_groups = {rule.name: rule.schedule for rule in self._rules if isinstance(rule, ParamGroupRule)}
        if schedules is not None and not isinstance(schedules, Mapping):
            raise TypeError(
                f"Invalid schedules={schedules!r}: must be a mapping from hyperparameters to schedules, for instance "
                "{'weight_decay': 'cosine'}."
            )
        own = {name: own for name, own in of_groups.items() if isinstance(own, Schedule)}
        self._schedules = resolve_hyperparameter_schedules(self._schedule, schedules or {}, own, trial)

    @property
    def schedule(self) -> Any:
        """The `Schedule`, or what makes another scheduler from the optimizer."""
        return self._schedule

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's class and its hyperparameters, defaults included, and the schedule, for tables of runs."""
        name, defaults = self._optimizer.cls.__name__, self._optimizer.defaults
        return {"optimizer": name, **defaults, "schedule": repr(self._schedule)}

    @checked
    def build(
        self, model: nn.Module, horizon: Horizon | None = None, owner: nn.Module | None = None
    ) -> tuple[Optimizer, Any]:
        """Make the optimizer and its scheduler, in a plain loop or wherever the length of the run is known.

        Args:
            model: The model to optimize, or what Fabric's ``setup`` or ``setup_module`` makes of it.
            horizon: Length of the run. None within ``configure_optimizers``, where the scheduler follows the run of the
                Trainer and moves with the optimizer's steps, or if `Scheduler.resolve` will be called before the first.
            owner: The module that ``model`` is a part of and that has the same names for its parameters, if it outlives
                ``model``.

        Returns:
            The optimizer, and a `Scheduler` or whatever scheduler the callable given as ``schedule`` has made.

        Raises:
            ValueError: The rules do not fit the model, or the schedule the length of the run.
        """
        model = unwrap_module(model)
        # Muon, for one, treats parts of a group differently, and sees which from the modules.
        groups_of = getattr(self._optimizer.cls, "groups_of", build_param_groups)
        groups = groups_of(model, self._rules)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{FUSED}")  # It is said below, and by the plan.
            optimizer = self._optimizer.make_for(model, groups)
        for group in optimizer.param_groups:
            found = 1.0 if self._found_lr is None else self._found_lr / float(optimizer.defaults["lr"])
            for key in {"lr", "peak_lr"} & group.keys():
                group[key] = group[key] * found * group["lr_multiplier"]
        scheduler: Any
        if isinstance(self._schedule, Schedule):
            scheduler = Scheduler(optimizer, self._schedule, horizon, self._schedules, self._on_resume, self._tell)
        else:
            scheduler = self._schedule(optimizer)
            resume_scheduler(scheduler, self._on_resume == "config", self._tell)
        fused = fused_note(optimizer.param_groups)
        for note in [*lost_matches(model, self._rules), *([fused] if fused else [])]:
            about(optimizer).notes.append(note)
            self._tell(note, False)
        track_added_groups(optimizer, model if owner is None else owner)
        if any(group.get("frozen_until") is not None for group in optimizer.param_groups):
            Freezing(optimizer, steps=lambda: scheduler.last_epoch, horizon=lambda: _length_of(scheduler, horizon))
        OptimizerResume(optimizer, self._on_resume == "config", self._tell, model, lambda: self._saved_names)
        if isinstance(scheduler, Scheduler) and horizon is None and (module := owner_of(owner or model)) is not None:
            scheduler.follow(RunLength(module.trainer, module, optimizer))
        return optimizer, scheduler

    def __call__(self, module: Any, owner: Any = None) -> Any:
        """Return what Lightning expects of ``configure_optimizers``; the Trainer is asked for the run's length later.

        Args:
            module: The LightningModule.
            owner: The LightningModule, if ``module`` is a part of it (`OptimizerFactories`).

        Raises:
            ValueError: The rules do not fit the model, or ``frozen_until`` is combined with a scheduler per epoch.
        """
        optimizer, scheduler = self.build(module) if owner is None else self.build(module, owner=owner)
        owner = owner_of(module) if owner is None else owner
        let_others_clip(optimizer, module if owner is None else owner)
        divide_work(optimizer, module if owner is None else owner)
        config = {"scheduler": scheduler, "interval": "step"}
        freezing = freezing_of(optimizer)
        if not isinstance(scheduler, Scheduler):
            if monitor := getattr(scheduler, "monitor", None):  # Lightning's ReduceLROnPlateau
                config |= {"interval": "epoch", "monitor": monitor}
            if freezing is not None:
                if monitor:
                    raise ValueError(
                        f"frozen_until counts the schedule's steps, and {type(scheduler).__name__} takes none but at "
                        "the end of an epoch. Needed is a schedule per step, for instance ReduceOnPlateau of ours."
                    )
                if owner is not None:
                    freezing.horizon = _length_of_run(owner, optimizer)
            return {"optimizer": optimizer, "lr_scheduler": config}
        if owner is None or not isinstance(scheduler.schedule, ReduceOnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": config}
        observer: dict[str, Any] = {"scheduler": Observer(scheduler)}
        if owner.automatic_optimization:  # In manual optimization Lightning moves nothing, and warns of the rest.
            observer |= {
                "interval": "epoch",
                "frequency": owner.trainer.check_val_every_n_epoch or 1,
                "reduce_on_plateau": True,
                "monitor": scheduler.schedule.monitor,
            }
        return [optimizer], [config, observer]

    def _tell(self, message: str, warn: bool) -> None:
        """Report what differs between a checkpoint and the configuration."""
        if warn:
            warnings.warn(message, stacklevel=depth_outside())
        else:
            print(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._optimizer!r}, {self._schedule!r})"


def _length_of_run(owner: Any, optimizer: Optimizer) -> Callable[[], Horizon]:
    """What returns the length of the run of a LightningModule's Trainer, of which it keeps neither alive.

    It is asked before each step, and gives the same object as long as nothing has changed.
    """
    of_trainer, run = weakref.ref(owner.trainer), RunLength(owner.trainer, owner, optimizer)
    known: dict[object, Horizon] = {}

    def length() -> Horizon:
        mark = run.mark()
        if mark not in known:
            trainer = of_trainer()
            assert trainer is not None, "a run whose Trainer is gone"
            known.clear()
            known[mark] = horizon_of(trainer)
        return known[mark]

    return length


def _length_of(scheduler: Any, given: Horizon | None) -> Horizon | None:
    """The length of the run, by the best present knowledge."""
    if not isinstance(scheduler, Scheduler):
        return given
    scheduler.refresh()
    return scheduler.horizon
