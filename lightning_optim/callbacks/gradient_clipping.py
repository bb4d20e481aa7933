from __future__ import annotations

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_optim.callbacks.hub import HubCallback
from lightning_optim.clipping import GlobalNorm


class GradientClipping(HubCallback):
    """Clips the gradients of every optimizer step by their global norm, right in every precision.

    Unlike ``Trainer(gradient_clip_val=...)`` it works with fused optimizers in 16-bit precision and in manual
    optimization, and reports what it does. Gradients are measured without the loss scale. With an optimizer whose
    kernel takes a divisor (all fused ones) clipping costs one read of the gradients, else one more write; nothing waits
    for the device.

    Args:
        max_norm: Largest norm of all gradients of one optimizer together, above 0.

    Raises:
        ValueError: ``max_norm`` is not a finite number above 0.
        MisconfigurationException: At the start of the fit, if the Trainer clips as well.

    Example:
        >>> trainer = L.Trainer(callbacks=[GradientClipping(max_norm=1.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self._rule = GlobalNorm(max_norm)
        self.max_norm = self._rule.max_norm

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a second owner."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"Gradients would be clipped twice: by Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) and by "
                f"{self!r}. Remove one; the callback also works with fused optimizers in 16-bit precision."
            )

    def clip_rule(self) -> GlobalNorm:
        """The rule, which keeps no state and can serve several optimizers."""
        return self._rule

    def __repr__(self) -> str:
        return f"GradientClipping(max_norm={self.max_norm})"
