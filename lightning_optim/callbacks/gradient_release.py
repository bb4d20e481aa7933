from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optim.callbacks._contributor import Hears
from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.callbacks._packages import callback_overrides, module_overrides
from lightning_optim.core.typed import typed
from lightning_optim.factory.freezing import freezing_of
from lightning_optim.step import ReleasedPipeline, StepPipeline

_SEES_NONE = ("on_after_backward", "on_before_optimizer_step")
_KEEP = "or remove GradientRelease."


@typed
class GradientRelease(HubCallback):
    """Update each parameter in the backward pass as soon as its gradient is there, and drop the gradient at once.

    Gradients of all parameters never exist together, so that their memory is that of the largest tensor. The weights
    are those of usual steps, bit for bit. `release_gradients` is the same for a plain loop, and describes what cannot
    be had. With `GradientClipping`, its rule has to limit each tensor by itself (``method="block_rms"``, ``"agc"``,
    ``"update_rms"``, ``"momentum_ratio"``, ``"value"``); with ``use_last_norm`` it may be ``"global_norm"`` or
    ``"adagc"``. `OptimizerMonitor` works, without histograms.

    Args:
        skip_nonfinite: Whether a tensor whose gradient is not finite is left out of the step, its state included;
            costs one read of each gradient. With `GradientClipping` this is always so.
        use_last_norm: Whether a rule that needs the norm of all gradients gets that of the step before, or that of the
            gradients of this step so far, if that is larger.

    Raises:
        MisconfigurationException: At the start of the fit: gradients are accumulated over batches, clipped by the
            Trainer or the module, scaled (``16-mixed``), reduced after the backward pass (DDP), or needed together by
            `DivergenceGuard` or histograms; there are several optimizers; or groups are frozen for a time.
        ValueError: At the start of the fit: the optimizer or the clip rule needs all gradients together.
        TypeError: At the start of the fit: the optimizer is not of `lightning_optim.optim`.

    Example:
        >>> import lightning_optim as lo
        >>> callbacks = [lo.ConfigureOptimizers("adamw"), GradientRelease(), lo.GradientClipping(method="agc")]
        >>> trainer = L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
    """

    role = "GradientRelease"

    def __init__(self, skip_nonfinite: bool = True, use_last_norm: bool = False) -> None:
        self.skip_nonfinite = skip_nonfinite
        self.use_last_norm = use_last_norm

    def pipeline(self) -> Callable[..., StepPipeline]:
        """Return what makes pipelines that update in the backward pass; refuse, as a plan asks only for these."""
        self._check(self.hub.trainer)
        return partial(ReleasedPipeline, skip_nonfinite=self.skip_nonfinite, use_last_norm=self.use_last_norm)

    def _at_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what needs the gradients of a step together, and warn of hooks that will see none."""
        self._check(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if not isinstance(callback, Hears)]
        for hook in _SEES_NONE:
            found = [pl_module] if module_overrides(pl_module, hook) else []
            found += [callback for callback in others if callback_overrides(callback, hook)]
            if found:
                names = ", ".join(type(one).__name__ for one in found)
                rank_zero_warn(
                    f"`{hook}` of {names} is called when all gradients have been used and dropped (GradientRelease): "
                    "it finds `grad` None everywhere."
                )

    def _check(self, trainer: L.Trainer) -> None:
        reasons = (
            _of_strategy(trainer),
            _of_precision(trainer),
            _of_accumulation(trainer),
            _of_clipping(trainer, trainer.lightning_module),
            _of_optimizers(trainer),
            self._of_members(),
        )
        if refused := next(filter(None, reasons), None):
            raise MisconfigurationException(refused)

    def _at_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Refuse that accumulation begins in mid-run."""
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(_of_accumulation(trainer))

    def _of_members(self) -> str:
        for member in self.hub.members:
            if member.detectors():
                return (
                    f"{type(member).__name__} decides from all gradients of a step whether it happens, and with "
                    "GradientRelease the first parameters have been updated before the last gradients exist. Without "
                    f"it, tensors with a gradient that is not finite are left out. Remove {type(member).__name__}, "
                    f"{_KEEP}"
                )
            if getattr(member, "histograms", None) is not None:
                return (
                    f"{type(member).__name__}(histograms=...) needs all gradients of a step, which never exist "
                    f"together with GradientRelease. Leave out `histograms`, {_KEEP}"
                )
        return ""

    def __repr__(self) -> str:
        return f"GradientRelease(skip_nonfinite={self.skip_nonfinite}, use_last_norm={self.use_last_norm})"


def _of_strategy(trainer: L.Trainer) -> str:
    strategy = trainer.strategy
    known = [cls.__name__ for cls in type(strategy).__mro__]
    if "ModelParallelStrategy" in known or "SingleDeviceStrategy" in known:
        return ""
    return (
        f"{type(strategy).__name__} handles gradients after the hooks of the backward pass, in which GradientRelease "
        "has used them. Use one device, or FSDP2 (ModelParallelStrategy), which averages gradients before, " + _KEEP
    )


def _of_precision(trainer: L.Trainer) -> str:
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return ""
    return (
        f"precision={trainer.precision!r} scales the loss, and whether a scaled gradient overflowed is known only when "
        f"all are there; GradientRelease uses each at once. Use precision='bf16-mixed', {_KEEP}"
    )


def _of_accumulation(trainer: L.Trainer) -> str:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [c for c in callbacks if hasattr(c, "going_to_accumulate_grad_batches")]
    now = trainer.accumulate_grad_batches
    given = (
        f"accumulate_grad_batches={now}"
        if now != 1
        else next((type(c).__name__ for c in schedulers if c.going_to_accumulate_grad_batches()), "")
    )
    if not given:
        return ""
    return (
        f"{given} adds up the gradients of several batches, and GradientRelease uses and drops those of each. Use "
        f"larger batches with activation checkpointing, or a smaller learning rate without accumulation, {_KEEP}"
    )


def _of_clipping(trainer: L.Trainer, module: L.LightningModule) -> str:
    way_out = f'Use GradientClipping(method="block_rms") or another rule for each tensor by itself, {_KEEP}'
    if trainer.gradient_clip_val:
        return (
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) clips after the backward pass, when "
            f"GradientRelease has used and dropped all gradients. {way_out}"
        )
    if module_overrides(module, "configure_gradient_clipping"):
        return (
            f"{type(module).__name__}.configure_gradient_clipping is called after the backward pass, when "
            f"GradientRelease has used and dropped all gradients. {way_out}"
        )
    return ""


def _of_optimizers(trainer: L.Trainer) -> str:
    if len(trainer.optimizers) > 1:
        return (
            f"There are {len(trainer.optimizers)} optimizers, and the backward pass of one loss may reach parameters "
            "of another optimizer, which GradientRelease would update with it. Use one optimizer, with groups "
            f"(a group may have a `rule` of its own), {_KEEP}"
        )
    for optimizer in map(bare, trainer.optimizers):
        if freezing_of(optimizer) is not None:
            return (
                "A group with `frozen_until` has gradients that are dropped before a step, and GradientRelease uses "
                f"them at once. Freeze by requires_grad=False, {_KEEP}"
            )
    return ""
