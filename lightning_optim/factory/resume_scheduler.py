"""Resume policy of schedulers that are not ours: torch restores all attributes of one, whatever is configured."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_optim.factory.differences import HINT, Tell, differ, shown

_POSITION = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
_METRICS = {"best", "num_bad_epochs", "cooldown_counter", "mode_worse"}


def resume_scheduler(scheduler: LRScheduler, from_config: bool, tell: Tell) -> None:
    """Apply the resume policy to a scheduler that is not ours.

    If the configuration takes precedence, the scheduler is stepped from its start to the saved position, so that no
    number of the old schedule is left in it.

    Args:
        scheduler: As it was configured, at its start.
        from_config: Whether the configuration takes precedence.
        tell: Reports what differs.

    Raises:
        ValueError: When the state of another kind of scheduler is loaded, unless the configuration takes precedence.
    """
    cls = type(scheduler)

    def load_state_dict(self: LRScheduler, state_dict: dict[str, Any]) -> None:
        if from_config and not isinstance(self, ReduceLROnPlateau):
            with warnings.catch_warnings():  # torch's, that the optimizer has not stepped
                warnings.simplefilter("ignore")
                for _ in range(state_dict["last_epoch"]):
                    self.step()
            return
        mine = cls.state_dict(self)
        if mine.keys() != state_dict.keys():
            raise ValueError(
                f"The checkpoint's scheduler is no {cls.__name__}: it has {', '.join(sorted(state_dict))}. {HINT}"
            )
        differing = sorted(
            f"{key} {shown(state_dict[key])} (configured: {shown(mine[key])})"
            for key in mine.keys() - _POSITION - _METRICS
            if differ(mine[key], state_dict[key])
        )
        if differing:
            hint = "" if from_config else f" {HINT}"
            tell(f"Resumed with the checkpoint's {cls.__name__}: {', '.join(differing)}.{hint}", True)
        cls.load_state_dict(self, state_dict)

    # torch has no hook for this method of a scheduler, and saves all attributes of an instance in its state dict; so
    # the method is overridden in a subclass of its class.
    scheduler.__class__ = type(cls.__name__, (cls,), {"load_state_dict": load_state_dict, "__module__": cls.__module__})
