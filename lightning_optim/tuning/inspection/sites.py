"""What was seen of each place of a model where something is computed, summed over calls and batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optim.tuning.inspection.operations import RECTIFIERS, SIGMOIDAL, SMOOTH, Fans

NEAR_THE_END = 0.01
"""Distance from an end, in units of the whole range, within which a sigmoid or tanh counts as saturated."""


def numbers_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor without its gradient: of a sparse one those that it stores, [count]."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout is torch.strided else tensor.values()


@dataclass
class Sums:
    """Sums over the numbers of some tensors."""

    squares: float = 0.0
    count: int = 0
    zeros: int = 0
    largest: float = 0.0
    bad: int = 0
    nans: int = 0

    def add(self, values: Tensor) -> None:
        """Add the numbers of a tensor of any shape and floating dtype; what is not finite is only counted."""
        values = numbers_of(values).float()
        if not values.numel():
            return
        finite = torch.isfinite(values)
        self.count += values.numel()
        bad = values.numel() - int(finite.sum())
        if bad:
            self.bad += bad
            self.nans += int(values.isnan().sum())
            values = torch.where(finite, values, 0.0)
        largest = float(values.abs().max())
        self.largest = max(self.largest, largest)
        # Squares of float32 overflow above 1e19, and are lost below 1e-23.
        if largest > 0:
            self.squares += float((values / largest).square().mean()) * values.numel() * largest**2
        self.zeros += int((values == 0).sum()) - bad

    @property
    def rms(self) -> float:
        """Root of the mean square; NaN of nothing."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    @property
    def zero_share(self) -> float:
        """Share of exact zeros."""
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True)
class Weight:
    """A weight as it is before training.

    Args:
        name: Name of the parameter, or that of the module if it is computed from parameters.
        shape: Its shape.
        fans: Its numbers of inputs and outputs.
        rms: Root of the mean square of its elements.
        trainable: Whether a gradient is asked for.
        parameter: Whether it is a parameter itself.
        repeated: Number of its units that are exactly equal to an earlier one, other than zero.
        depthwise: Whether each unit has a single input channel.
    """

    name: str
    shape: tuple[int, ...]
    fans: Fans
    rms: float
    trainable: bool
    parameter: bool
    repeated: int = 0
    depthwise: bool = False

    @property
    def gain(self) -> float:
        """The factor by which it scales uncorrelated inputs: rms · √fan_in. He has √2, Xavier about 1."""
        return self.rms * math.sqrt(self.fans.inputs)

    @property
    def units(self) -> int:
        """Number of its units."""
        return self.shape[self.fans.rows]


@dataclass
class Site:
    """One place in the order of execution.

    Args:
        name: Name of the module, with the function behind a colon if the module does more than that.
        module: Name of the module.
        kind: Kind of the function, as `operations.kind_of`.
        operation: Name of the function, or class of the module.
        order: Place in the order of the first execution.
    """

    name: str
    module: str
    kind: str
    operation: str
    order: int
    shape: tuple[int, ...] = ()
    calls: int = 0
    output: Sums = field(default_factory=Sums)
    gradient: Sums = field(default_factory=Sums)
    entered: Sums = field(default_factory=Sums)
    """The inputs."""
    constant_input: bool = True
    """Whether the inputs were one and the same number."""
    input_requires_grad: bool = False
    bad_from_good: bool = False
    """Whether something not finite came out of finite inputs and weights."""
    variation: float = 0.0
    """Sum over calls of the mean square of what differs between samples, unit by unit."""
    varied: int = 0
    samples: int = 0
    """Rows that a unit has seen."""
    rows: set[int] = field(default_factory=set)
    dead: Tensor | None = None
    """Units that have been zero, or flat, for each sample so far: [units], bool."""
    saturated: int = 0
    weight: Weight | None = None
    bias: str | None = None
    followed_by: set[str] = field(default_factory=set)
    """What the outputs go into, by kind and name: ``"norm:batch_norm"``; reshapes are looked through."""
    cancelled_by: str | None = None
    """The module whose normalisation takes the mean of each of its channels away."""
    last: bool = True
    """Whether nothing with a weight follows."""

    @property
    def signal(self) -> float:
        """RMS of what differs between samples; NaN where there was one sample."""
        return math.sqrt(self.variation / self.varied) if self.varied else math.nan

    @property
    def dead_share(self) -> float:
        """Share of units that were flat for each sample."""
        return float(self.dead.float().mean()) if self.dead is not None and self.dead.numel() else 0.0

    @property
    def saturated_share(self) -> float:
        """Share of numbers near an end of a sigmoid or tanh."""
        return self.saturated / self.output.count if self.output.count else 0.0

    @property
    def gradient_norm(self) -> float:
        """Root of the sum of squares of the gradient of the output, of one batch on the average."""
        return math.sqrt(self.gradient.squares)

    def see(self, output: Tensor, axis: int, before: Tensor | None, count_dead: bool = True) -> None:
        """Add one output.

        Args:
            output: The output: [..., units, ...].
            axis: Dimension of the units.
            before: What an activation got: the shape of ``output``, or another; None for others.
            count_dead: Whether units are told apart.
        """
        self.calls += 1
        self.shape = tuple(output.shape)
        bad = self.output.bad
        self.output.add(output)
        if self.output.bad > bad or output.ndim == 0:
            return
        units = output.detach().float().movedim(axis, -1).reshape(-1, output.shape[axis])
        self.samples += len(units)
        self.rows.add(len(units))
        if len(units) > 1:
            # Scaled, for the reason given in `Sums`.
            largest = float(units.abs().max()) or 1.0
            self.variation += float((units / largest).var(0, unbiased=False).mean()) * largest**2
            self.varied += 1
        if self.operation in SIGMOIDAL:
            low, high = SIGMOIDAL[self.operation]
            margin = NEAR_THE_END * (high - low)
            self.saturated += int(((units < low + margin) | (units > high - margin)).sum())
        if not count_dead:
            return
        flat: Tensor | None = None
        if self.operation in RECTIFIERS:
            flat = (units == 0).all(0)
        elif self.operation in SMOOTH and before is not None and before.shape == output.shape:
            inputs = before.detach().float().movedim(axis, -1).reshape(-1, output.shape[axis])
            flat = (inputs < SMOOTH[self.operation]).all(0)
        if flat is not None:
            self.dead = flat if self.dead is None or self.dead.shape != flat.shape else self.dead & flat
