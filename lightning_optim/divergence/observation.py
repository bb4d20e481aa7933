"""The observation of one step: its signals, and what was found in its gradients and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optim.divergence.early_warning import EarlySign

SIGNALS = ("grad_norm", "loss")
"""Names of the signals in which spikes are detected."""


@dataclass(frozen=True)
class StepObservation:
    """One step, as the guard observed it.

    Args:
        step: Number of optimizer steps so far, this one included.
        skipped: Whether the step did not happen, for any reason.
        bad_tensors: Number of gradients with a NaN or an infinity.
        bad_loss: Whether the loss was not finite.
        spikes: Those of `SIGNALS` that were spikes; such a step may have been taken.
        detected: Findings of further detectors, a clause for each that requested a skip.
        levels: Factor by which the baseline of a signal moved at this step, for each signal whose baseline moved.
        values: Gradient norm and loss; NaN for a loss that is unknown.
        medians: Medians of the values accepted before; infinite before the first.
        worst: Indices in the optimizer of the parameters with the worst gradients, those that are not finite first,
            then the largest; empty if nothing was wrong.
        group_norms: Gradient norm of each group.
        rate: Highest learning rate of the groups, as the step used it; NaN if it is not known.
        new_rate: Whether it, or one of the last ones, is far above all before them (`RateHistory.has_risen`).
        limits: Values above which a signal alone is a spike; infinite while too few are known.
        grad_over_second_moment: Root mean square of the gradient over that of its second moment, the largest of each
            group's tensors; empty if it was not asked for.
        update_to_come: The same of the last gradients, which stands for the update in units of the learning rate.
        early: Signs of groups whose update to come is too large.
    """

    step: int
    skipped: bool
    bad_tensors: int
    bad_loss: bool
    spikes: tuple[str, ...]
    detected: tuple[str, ...]
    levels: dict[str, float]
    values: dict[str, float]
    medians: dict[str, float]
    worst: tuple[int, ...]
    group_norms: tuple[float, ...]
    rate: float = math.nan
    new_rate: bool = False
    limits: dict[str, float] = field(default_factory=dict)
    grad_over_second_moment: tuple[float, ...] = ()
    update_to_come: tuple[float, ...] = ()
    early: tuple[EarlySign, ...] = ()


def single_value(loss: Tensor) -> Tensor:
    """Return a loss as one real number.

    Args:
        loss: Any shape and dtype: [], [1] and [1, 1] alike, or a value for each sample, of which the mean counts. Of
            complex values the absolute values count.

    Returns:
        Shape [], at least float32; 0 if there is no element.
    """
    loss = loss.detach()
    if loss.dim() == 0 and loss.dtype in (torch.float32, torch.float64):  # nearly always
        return loss
    loss = loss.abs() if loss.is_complex() else loss
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # The mean of large values may overflow 16 bits.
    if loss.numel() == 1:
        return loss.reshape(())
    return loss.mean() if loss.numel() else loss.sum()
