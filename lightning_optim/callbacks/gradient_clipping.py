from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._pipelines import has_engine
from lightning_optim.clipping import ClipRule, GlobalNorm, make_clip_rule
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.factory.run_length import horizon_of
from lightning_optim.schedules import Schedule, get_schedule
from lightning_optim.schedules.live import LiveCurve
from lightning_optim.schedules.run import Run


@typed
class GradientClipping(HubCallback):
    """Clip the gradients of every optimizer step, by their global norm or another rule, in every precision.

    The callback contributes one `ClipRule` to the `StepPipeline` of each optimizer; the pipeline calls the rule and
    hands its divisor to the update (`step/pipeline.py`). Nothing of the module or the Trainer is patched.

    Unlike ``Trainer(gradient_clip_val=...)`` it works with fused optimizers in 16-bit precision, in manual optimization
    and with sharded parameters, and it reports clipped steps. Gradients are measured without the loss scale. With an
    optimizer whose kernel takes a divisor (all fused ones) clipping costs one read of the gradients, otherwise one more
    write; nothing waits for the device. Steps with a gradient that is not finite are skipped, and do not enter the
    state of a rule.

    Args:
        max_norm: Largest norm of all gradients of one optimizer as one vector, above 0; 1.0 if neither this nor
            ``method`` is given. Other methods with a ``max_norm`` take it from here, too. For several optimizers it may
            be a mapping from the name of each (`ConfigureOptimizers`; else its number, ``"0"``) to its limit, or to
            None for no clipping.
        method: Name of a rule (`lightning_optim.clipping.list_clip_rules`) or a rule, such as
            ``lightning_optim.clipping.GroupNorm(groups={"head": 0.5})``.
        method_kwargs: Arguments of a method given by name.
        schedule: Schedule of the factor on the limit over the run, or None for a constant limit: a name
            (`lightning_optim.schedules.list_schedules`) or a `Schedule`, which must stay above 0. It counts all
            optimizer steps, skipped ones included.

    Raises:
        ValueError: A name is unknown, for which the message names the nearest, or a value is out of range or given
            twice.
        MisconfigurationException: At the start of the fit, if the Trainer clips as well, or if ``max_norm``
            names other optimizers than there are.

    Example:
        >>> trainer = L.Trainer(callbacks=[GradientClipping(max_norm=1.0)], logger=False, enable_checkpointing=False)
        >>> GradientClipping(method="block_rms", method_kwargs={"max_rms": 0.01})
        GradientClipping(BlockRMS(max_rms=0.01))
        >>> GradientClipping(max_norm={"generator": 1.0, "discriminator": 0.5})
        GradientClipping(max_norm={'generator': 1.0, 'discriminator': 0.5})
    """

    role = "GradientClipping"

    def __init__(
        self,
        max_norm: float | dict[str, float | None] | None = None,
        method: str | ClipRule = "global_norm",
        method_kwargs: dict[str, Any] | None = None,
        schedule: str | Schedule | None = None,
    ) -> None:
        kwargs = dict(method_kwargs or {})
        self.rules: dict[str, ClipRule | None] | None = None
        if isinstance(method, ClipRule):
            if given := {**({} if max_norm is None else {"max_norm": max_norm}), **kwargs}:
                raise ValueError(f"{given} is given in addition to method={method!r}. Set it in the rule.")
            self.rule = method
        else:
            if max_norm is not None and "max_norm" in kwargs:
                raise ValueError(f"max_norm={max_norm!r} is given in addition to method_kwargs={kwargs!r}. Give one.")
            if isinstance(max_norm, Mapping):
                self.rules = {
                    name: None if limit is None else make_clip_rule(method, {"max_norm": limit, **kwargs})
                    for name, limit in max_norm.items()
                }
                rules = [rule for rule in self.rules.values() if rule is not None]
                if not rules:
                    raise ValueError(f"Invalid max_norm={max_norm!r}: it must give a limit for at least one optimizer.")
                self.rule = rules[0]
            else:
                self.rule = make_clip_rule(method, kwargs if max_norm is None else {"max_norm": max_norm, **kwargs})
        self.schedule = get_schedule(schedule)() if isinstance(schedule, str) else schedule
        if isinstance(self.schedule, Schedule):
            self.schedule.check_no_rate("the limit of the gradients")

    def _at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the Trainer does not clip as well, and pass the limit to an engine that clips by itself."""
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"Gradients would be clipped twice: by Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) and by "
                f"{self!r}. Remove one; the callback also works with fused optimizers in 16-bit precision."
            )
        if has_engine(trainer):
            self._hand_to_engine(trainer)

    def _hand_to_engine(self, trainer: L.Trainer) -> None:
        """Let DeepSpeed clip, which supports one constant global norm."""
        rule = self.rule
        if not isinstance(rule, GlobalNorm) or self.schedule is not None or self.rules is not None:
            raise MisconfigurationException(
                f"{self!r} cannot be used with {type(trainer.strategy).__name__}: DeepSpeed's engine clips by itself, "
                "by a constant global norm only. Use GradientClipping(max_norm=...), or FSDP2 (ModelParallelStrategy)."
            )
        config: dict[str, Any] = trainer.strategy.config  # type: ignore[attr-defined]
        if (other := config.get("gradient_clipping")) not in (None, rule.max_norm):
            raise MisconfigurationException(
                f"Gradients would be clipped by two limits: gradient_clipping={other!r} in DeepSpeed's configuration, "
                f"and {self!r}. Remove one."
            )
        config["gradient_clipping"] = rule.max_norm

    def clip_rule(self) -> ClipRule:
        """Return the rule, which holds no state and serves all optimizers; of several rules the first."""
        return self.rule

    def clip_rule_of(self, name: str, names: Sequence[str]) -> ClipRule | None:
        """Return the rule of one of several optimizers.

        Args:
            name: Its name.
            names: The names of all.

        Raises:
            MisconfigurationException: Limits are given by name, and not for exactly these.
        """
        if self.rules is None:
            return self.rule
        for given in self.rules:
            if given not in names:
                raise MisconfigurationException(
                    f"{self!r} has a limit for an optimizer {given!r}, and there is none. {nearest(given, names)}"
                )
        if missing := [each for each in names if each not in self.rules]:
            raise MisconfigurationException(
                f"{self!r} has no limit for the optimizer {missing[0]!r}. To leave it unclipped, write "
                f"{missing[0]}: None in max_norm (null in YAML)."
            )
        return self.rules[name]

    @property
    def settings(self) -> dict[str, str]:
        """What clips, for tables of runs."""
        if self.rules is None:
            return {"clipping": repr(self.rule)}
        return {f"{name}/clipping": repr(rule) for name, rule in self.rules.items()}

    def clip_limit(self, run: Run) -> Callable[[int], float] | None:
        """Return the factor on the limit as a function of the optimizer step, or None for a constant limit.

        Args:
            run: The run of the optimizer, which is asked for its length.

        Raises:
            ValueError: The schedule does not fit into the run.
        """
        if self.schedule is None:
            return None
        self.schedule.phases(horizon_of(self.hub.trainer))
        return LiveCurve(self.schedule, run)

    def __repr__(self) -> str:
        plain = type(self.rule).__name__ == "GlobalNorm"
        if self.rules is not None and plain:
            rule = f"max_norm={ {name: getattr(one, 'max_norm', None) for name, one in self.rules.items()}!r}"
        elif self.rules is not None:
            rule = repr(self.rules)
        else:
            rule = f"max_norm={self.rule.max_norm!r}" if plain else repr(self.rule)  # type: ignore[attr-defined]
        return f"{type(self).__name__}({rule}{'' if self.schedule is None else f', schedule={self.schedule!r}'})"
