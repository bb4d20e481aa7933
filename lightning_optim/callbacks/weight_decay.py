from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as L
from torch.optim import Optimizer

from lightning_optim.callbacks._followed import bare
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.core.typed import typed
from lightning_optim.kernels.weight_decay import WeightDecayKind
from lightning_optim.step.foreign_decay import ForeignDecay, check_decay


@typed
class WeightDecay(HubCallback):
    """Decoupled weight decay for an optimizer of another package that has none or only L2.

    Right before each update the weights are multiplied by a factor, all in one foreach call. This is exactly AdamW's
    decay, for any optimizer. Skipped steps do not decay. The optimizers of `lightning_optim.optim` need no callback,
    because they have every kind built in.

    Args:
        weight_decay: λ, above 0, of all parameter groups except those in ``groups``.
        kind: `decoupled` (lr·λ per step), `independent` (lr/peak·λ) or `corrected` (lr²·λ/peak).
        groups: λ of individual parameter groups, by name. None means 0 for a group called ``no_decay``, if there is
            one; this is the factory's name for the group of biases, norms and embeddings.

    Raises:
        ValueError: A value is out of range; or, when training starts, weights would decay twice or a group is unknown.

    Example:
        >>> trainer = L.Trainer(callbacks=[WeightDecay(0.1)], logger=False, enable_checkpointing=False)
    """

    role = "WeightDecay"

    def __init__(
        self, weight_decay: float, kind: str | WeightDecayKind = "decoupled", groups: Mapping[str, float] | None = None
    ) -> None:
        self.weight_decay = weight_decay
        self.kind = check_decay(weight_decay, kind, groups)
        self.groups = groups
        self._decays: dict[Optimizer, ForeignDecay] = {}

    def _at_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the decay to every optimizer, after the hooks that decide whether a step is skipped."""
        optimizers = [bare(optimizer) for optimizer in trainer.optimizers]
        for gone in self._decays.keys() - set(optimizers):
            self._decays.pop(gone).close()
        for optimizer in optimizers:
            if optimizer not in self._decays:
                names = [group.get("name") for group in optimizer.param_groups]
                groups = {"no_decay": 0.0} if self.groups is None and "no_decay" in names else self.groups
                self._decays[optimizer] = ForeignDecay(optimizer, self.weight_decay, self.kind, groups)

    _at_new_optimizers = _at_train_start

    def _at_close(self) -> None:
        while self._decays:
            self._decays.popitem()[1].close()
