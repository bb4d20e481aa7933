from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch

from lightning_optim.clipping.base import STATELESS, ClipRule, State, UnitDivisor, above_zero
from lightning_optim.core.stats import GradStats
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed


@typed(own=("exclude",))
class AGC(ClipRule):
    r"""Adaptive gradient clipping: the gradient of each output unit is limited to a fraction of the unit's weights.

    A unit is a row of a matrix, a filter of a convolution, or a whole vector. The norm of its gradient is limited to
    clip_factor · max(‖w‖, eps). The rule is designed for networks without normalisation layers. The kernels of the
    optimizers do not support a factor per unit, so the gradients are rewritten in one pass; gradients and weights are
    read once each for their norms.

    Args:
        clip_factor: λ, above 0: 0.01 in the paper, more for small batches.
        eps: Lower bound of the norm of weights, above 0, so that weights which start at zero can train.
        exclude: Patterns (``re.search``) of names of parameters that are not clipped. The paper excludes the
            classifier, so give its name: ``["^head\."]``.

    Raises:
        ValueError: An argument is out of range, or not a valid pattern; later, if a pattern matches no parameter.

    References:
        Brock et al., High-performance large-scale image recognition without normalization, 2021,
        https://arxiv.org/abs/2102.06171
    """

    reads_units = True
    spans = "tensor"

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Sequence[str] = ()) -> None:
        self.clip_factor = above_zero("clip_factor", clip_factor, 0.01)
        self.eps = above_zero(
            "eps", eps, 1e-3, "leave gradient clipping out; at 0, weights that start at zero would never change"
        )
        if not isinstance(exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in exclude):
            example = [exclude] if isinstance(exclude, str) else ["head"]
            raise ValueError(f"Invalid exclude={exclude!r}: it must be a list of patterns, such as {example}.")
        self.exclude = tuple(exclude)
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Invalid pattern {pattern!r} in exclude: {error}.") from error

    def check(self, group_names: Collection[str], names: Collection[str]) -> None:
        """Check that every pattern of ``exclude`` matches a parameter.

        Args:
            group_names: Names of the parameter groups.
            names: Names of the parameters.

        Raises:
            ValueError: A pattern matches no parameter, or the parameters have no names.
        """
        for pattern in self.exclude:
            if not names:
                raise ValueError(
                    f"{self!r} needs names, and the parameters have none. Give the optimizer named_parameters(), or "
                    "the pipeline their names."
                )
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(f"exclude={pattern!r} matches no parameter. {nearest(pattern, names)}")

    def __call__(self, stats: GradStats, state: State = STATELESS, limit: float = 1.0) -> UnitDivisor:
        """Return the divisor of each output unit."""
        units = stats.units
        bound = units.params.clamp(min=self.eps).mul_(self.clip_factor * limit)
        divisors = torch.div(units.grads, bound, out=bound).clamp_(min=1.0)
        if self.exclude:
            excluded = [any(name and re.search(p, name) for p in self.exclude) for name in stats.names]
            parts = zip(torch.split(divisors, units.counts), excluded, strict=True)
            divisors = torch.cat([torch.ones_like(part) if out else part for part, out in parts])
        return UnitDivisor(units.shaped(divisors), stats.norm_sq, units.norm_sq(divisors))
