"""Clip rules with a fixed limit: on the global norm, each group's norm, each tensor's RMS, each element.

The pipeline calls a rule once a step, and divides the gradients by the result (`step/pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_optim.clipping.base import STATELESS, Clamp, ClipRule, State, above_zero
from lightning_optim.core.fragment import Fragment
from lightning_optim.core.stats import GradStats
from lightning_optim.core.suggest import nearest
from lightning_optim.core.transfer import upload
from lightning_optim.core.typed import typed


@typed
class GlobalNorm(ClipRule):
    """Scale all gradients together so that their norm as one vector is at most ``max_norm``.

    The divisor is max(1, (‖g‖ + 1e-6) / max_norm): the reciprocal of what torch's ``clip_grad_norm_`` multiplies by.

    Args:
        max_norm: Largest norm of the gradients that the optimizer sees, above 0; 1.0 is usual for transformers.

    Raises:
        ValueError: ``max_norm`` is not a finite number above 0.

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks, 2013, https://arxiv.org/abs/1211.5063

    Example:
        >>> import torch
        >>> GlobalNorm(max_norm=2.0)(GradStats(torch.tensor([9.0, 16.0]), group_sizes=(2,)))
        tensor(2.5000)
    """

    spans = "norm"

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = above_zero("max_norm", max_norm, 1.0)

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of all gradients, at least 1, shape []."""
        return ((stats.total_norm() + 1e-6) / (self.max_norm * limit)).clamp(min=1.0)

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision as lines of a program."""
        return Fragment(("divisor = maximum((norm + 1e-06) / bound, 1.0)", "clipped = divisor > 1.0"), ("bound",))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the limit."""
        return (self.max_norm * limit,)


@typed
class GroupNorm(ClipRule):
    """Scale the gradients of each parameter group so that their norm is at most the group's limit.

    A group that explodes (an embedding, a fresh head) then does not shrink the steps of the others. Each group's
    divisor is `GlobalNorm`'s of the group alone.

    Args:
        max_norm: Limit of the groups that are not in ``groups``; None for no clipping of those.
        groups: Limit of each group by its name, or by its index if it has no name; None for no clipping of the group.

    Raises:
        ValueError: A limit is not a finite number above 0, or no group has a limit; later, if a group does not exist.

    Example:
        >>> import torch
        >>> stats = GradStats(torch.tensor([9.0, 16.0]), group_sizes=(1, 1), group_names=("body", "head"))
        >>> GroupNorm(max_norm=1.0, groups={"head": 8.0})(stats)
        tensor([3.0000, 1.0000])
    """

    def __init__(self, max_norm: float | None = 1.0, groups: Mapping[str, float | None] | None = None) -> None:
        instead = "give None"
        self.max_norm = None if max_norm is None else above_zero("max_norm", max_norm, 1.0, instead)
        self.groups = {
            str(name): None if value is None else above_zero(f"groups[{name!r}]", value, 1.0, instead)
            for name, value in (groups or {}).items()
        }
        if all(value is None for value in (self.max_norm, *self.groups.values())):
            raise ValueError(f"{self!r} has no limit for any group. Give max_norm, or groups={{'head': 1.0}}.")

    def check(self, group_names: Collection[str], names: Collection[str]) -> None:
        """Check that every group with a limit exists.

        Args:
            group_names: Names of the parameter groups.
            names: Names of the parameters.

        Raises:
            ValueError: A group does not exist; the message suggests the nearest name.
        """
        for name in self.groups:
            if name not in group_names:
                raise ValueError(f"{self!r}: there is no parameter group {name!r}. {nearest(name, group_names)}")

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of each tensor, which is its group's, at least 1, shape [tensors]."""
        limits = [self.groups.get(name, self.max_norm) for name in stats.group_names]
        sizes = stats.group_sizes
        norms = stats.group_norms()
        infinite = float("inf")  # A norm divided by it is 0, so that the divisor is 1.
        bounds = upload([infinite if value is None else value * limit for value in limits], norms.device, norms.dtype)
        divisors = ((norms + 1e-6) / bounds).clamp(min=1.0)
        return torch.cat([divisor.expand(size) for divisor, size in zip(divisors.unbind(), sizes, strict=True)])

    per_tensor = True

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision as lines of a program."""
        lines = (
            "divisor = ones(norm_sq)",
            f"for number in range({len(group_names)}):",
            "    mine = group == number",
            "    own = sqrt(total(where(mine, norm_sq, 0.0)))",
            "    divisor = where(mine, maximum((own + 1e-06) / (bounds * factor), 1.0), divisor)",
            "clipped = some(has & (divisor > 1.0))",
        )
        return Fragment(lines, ("factor",), ("group", "bounds"))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the factor on all limits."""
        return (limit,)

    def vectors(self, numel: Sequence[int], group_names: Sequence[str], groups: Sequence[int]) -> list[list[float]]:
        """Return the index of each parameter's group, and the limit of that."""
        limits = [self.groups.get(name, self.max_norm) for name in group_names]
        bounds = [float("inf") if value is None else value for value in limits]
        return [list(map(float, groups)), [bounds[group] for group in groups]]


@typed
class BlockRMS(ClipRule):
    """Scale the gradient of each tensor so that its root mean square is at most ``max_rms``.

    The divisor of a tensor is max(1, RMS(g) / max_rms).

    Args:
        max_rms: Largest root mean square of a tensor's gradient, above 0. The default is that of the publications,
            which clip updates; gradients are usually much smaller, so inspect their RMS first.

    Raises:
        ValueError: ``max_rms`` is not a finite number above 0.

    References:
        Shazeer & Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235, section 6; optax's ``clip_by_block_rms``.

    Example:
        >>> import torch
        >>> BlockRMS(max_rms=1.0)(GradStats(torch.tensor([16.0, 1.0]), group_sizes=(2,), numel=(4, 4)))
        tensor([2., 1.])
    """

    spans = "tensor"

    def __init__(self, max_rms: float = 1.0) -> None:
        self.max_rms = above_zero("max_rms", max_rms, 1.0)

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Tensor:
        """Return the divisor of each tensor, at least 1, shape [tensors]."""
        norm_sq = stats.norm_sq
        numel = upload([max(n, 1) for n in stats.numel], norm_sq.device, norm_sq.dtype)
        return ((norm_sq / numel).sqrt() / (self.max_rms * limit)).clamp(min=1.0)

    per_tensor = True

    def fragment(self, group_names: Sequence[str]) -> Fragment:
        """Return the decision as lines of a program."""
        lines = ("divisor = maximum(sqrt(norm_sq / numel) / bound, 1.0)", "clipped = some(has & (divisor > 1.0))")
        return Fragment(lines, ("bound",), ("numel",))

    def numbers(self, limit: float) -> tuple[float, ...]:
        """Return the limit."""
        return (self.max_rms * limit,)

    def vectors(self, numel: Sequence[int], group_names: Sequence[str], groups: Sequence[int]) -> list[list[float]]:
        """Return the number of elements of each parameter."""
        return [[float(max(n, 1)) for n in numel]]


@typed
class Value(ClipRule):
    """Clamp each element of the gradients to [−max_value, max_value], as torch's ``clip_grad_value_`` does.

    For complex gradients, real and imaginary parts are clamped. This changes the direction of the gradient. The kernels
    of the optimizers do not support it, so the gradients are rewritten in place.

    Args:
        max_value: Largest absolute value of an element, above 0.

    Raises:
        ValueError: ``max_value`` is not a finite number above 0.
    """

    spans = "tensor"

    def __init__(self, max_value: float = 1.0) -> None:
        self.max_value = above_zero("max_value", max_value, 1.0)

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> Clamp:
        """Return the clamp of this step."""
        return Clamp(self.max_value * limit, stats.largest)
