"""Clipping that is the Trainer's or the module's own, with an optimizer that is fused because we made it so."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_optim.core.operands_flag import hide_operands


def let_others_clip(optimizer: Optimizer, module: Any) -> None:
    """See to it that ``Trainer(gradient_clip_val=...)`` and ``self.clip_gradients`` work in mixed precision.

    Lightning refuses to clip for an optimizer that unscales gradients in its kernel. In bf16-mixed there is no scale,
    so nothing is lost by hiding that it could; in 16-mixed it is hidden where the Trainer or the module clips: then the
    GradScaler unscales the gradients before, and the kernel stays fused.

    Args:
        optimizer: The optimizer.
        module: The LightningModule; one without a Trainer needs nothing.
    """
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # Lightning's property raises the latter
        return
    precision: Any = getattr(trainer, "precision_plugin", None)
    if not hasattr(precision, "scaler"):
        return  # no mixed precision
    if precision.scaler is None or (module.automatic_optimization and _clips(trainer, module)):
        hide_operands(optimizer)


def _clips(trainer: Any, module: Any) -> bool:
    hook = getattr(module.configure_gradient_clipping, "__module__", "")
    return bool(trainer.gradient_clip_val) or not hook.startswith(("lightning.", "pytorch_lightning."))
