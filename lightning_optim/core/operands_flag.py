"""The mark by which torch's GradScaler and Lightning tell an optimizer that takes a loss scale in its kernel.

An optimizer with ``_step_supports_amp_scaling`` gets gradients that still carry the loss scale, and Lightning clips
none of these in mixed precision, also where there is no scale. Where something else is to clip, the mark is hidden:
then the gradients are unscaled first, as for any other optimizer. That the kernel takes operands all the same is kept.
"""

from __future__ import annotations

from torch.optim import Optimizer

_MARK = "_step_supports_amp_scaling"
_HIDDEN = "_lightning_optim_takes_operands"


def takes_operands(optimizer: Optimizer) -> bool:
    """Whether the optimizer takes ``grad_scale`` and ``found_inf`` in its kernel, hidden or not."""
    return bool(getattr(optimizer, _MARK, False) or vars(optimizer).get(_HIDDEN, False))


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether its gradients still carry the loss scale when it steps under a GradScaler."""
    return bool(getattr(optimizer, _MARK, False))


def drop_operands(optimizer: Optimizer) -> None:
    """Mark an optimizer as one that takes no operands, because it uses another kernel from now on."""
    vars(optimizer).pop(_HIDDEN, None)
    setattr(optimizer, _MARK, False)


def hide_operands(optimizer: Optimizer) -> None:
    """Have its gradients unscaled before it steps, and let anything clip them.

    Args:
        optimizer: The optimizer; nothing is changed about one that takes no operands.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, fused=True)
        >>> hide_operands(optimizer)
        >>> takes_operands(optimizer), unscales_itself(optimizer)
        (True, False)
    """
    if unscales_itself(optimizer):
        setattr(optimizer, _HIDDEN, True)
        setattr(optimizer, _MARK, False)
