"""Learning rates that depend on the model, by depth or by width; they split every group, and multiply its rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.param_groups.depth import parameter_depths
from lightning_optim.param_groups.parts import NamedParameter


class Scale(NamedTuple):
    """Effect of a scaling on a parameter."""

    order: int
    """Sort key among the groups of one rule."""
    label: str
    """Prefix of the group's name; empty if the parameter stays in its group."""
    lr_multiplier: float


@typed
@dataclass(frozen=True)
class LayerDecay:
    r"""Layer-wise learning-rate decay: each layer has a lower rate than the layer above it, by a constant factor.

    It is usual when a pretrained model is fine-tuned, to preserve the layers close to the input. The head, and all
    other parameters after the last layer, have the full rate; embeddings have the lowest. Every group of the rules is
    split by depth, so that `no_decay` gives two groups per depth: ``layer_03`` and ``layer_03_no_decay``.

    Args:
        layer_decay: Factor from one layer to the next below, in (0, 1]. 0.65 to 0.9 are usual, less for larger models.
        pattern: A regular expression whose groups capture the number of the layer in a parameter's name; None to
            recognise layers automatically (`lightning_optim.param_groups.parameter_depths`).
        min_multiplier: Lowest fraction of the full rate that a layer has, in [0, 1].

    Raises:
        ValueError: A value is out of range, or the pattern is not a regular expression or has no group.

    References:
        Clark et al., ELECTRA, 2020, https://arxiv.org/abs/2003.10555; Bao et al., BEiT, 2021,
        https://arxiv.org/abs/2106.08254.

    Example:
        >>> from lightning_optim import build_param_groups
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for group in build_param_groups(model, [LayerDecay(0.5), "no_decay"]):
        ...     print(group["name"], group["lr_multiplier"], [name for name, _ in group["params"]])
        layer_0_no_decay 0.5 ['0.bias']
        layer_1_no_decay 1.0 ['2.bias']
        layer_0 0.5 ['0.weight']
        layer_1 1.0 ['2.weight']
    """

    layer_decay: float
    pattern: str | None = None
    min_multiplier: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"Invalid layer_decay={self.layer_decay!r}: must be in (0, 1], a factor from a layer to the one below."
            )
        if not 0 <= self.min_multiplier <= 1:
            raise ValueError(f"Invalid min_multiplier={self.min_multiplier!r} of layer_decay: must be in [0, 1].")
        try:
            catches = self.pattern is None or re.compile(self.pattern).groups > 0
        except re.error as error:
            raise ValueError(f"Invalid pattern={self.pattern!r} of layer_decay: {error}.") from None
        if not catches:
            raise ValueError(
                f"Invalid pattern={self.pattern!r} of layer_decay: must capture the number of the layer in "
                r"parentheses, for instance 'tower\.(\d+)\.'."
            )

    def scales(self, model: nn.Module, parameters: Sequence[NamedParameter]) -> dict[str, Scale]:
        """Compute the scale of each parameter, by name."""
        depths = parameter_depths(model, parameters, self.pattern)
        top = max(depths.values())
        digits = len(str(top))
        return {
            name: Scale(depth, f"layer_{depth:0{digits}d}", max(self.layer_decay ** (top - depth), self.min_multiplier))
            for name, depth in depths.items()
        }


@typed
@dataclass(frozen=True)
class WidthScaling:
    """Scaling of the learning rates of hidden matrices with width, which transfers a small model's rate to a large one.

    It is the Adam column of the maximal update parametrisation (muP): with n times as many inputs, a hidden matrix
    learns at 1/n of the rate, while vectors, embeddings and the head keep theirs. The other parts of muP belong in the
    model: initial variances of 1/fan_in, attention scores over d instead of √d, and outputs divided by the width
    multiplier, or initialised with variance 1/fan_in² and scaled here as well (`scale_head`).

    With decoupled weight decay, lr·λ falls with the rate; ``weight_decay_kind="independent"`` keeps it constant.

    Args:
        base_width: Width of the small model for which the learning rate was found, at least 1; requires `width`.
        width: Width of this model, at least 1.
        base_shapes: In place of both, the small model's shapes by parameter name (`shapes_of`). Each matrix is then
            scaled by its own number of inputs, so that several widths may grow by different factors.
        scale_head: Whether the head's matrix is scaled like hidden ones; not for a head that is tied to an embedding.

    Raises:
        ValueError: Neither or both of the two forms are given, a value is out of range, or shapes do not fit the model.

    References:
        Yang et al., Tensor Programs V, 2022, https://arxiv.org/abs/2203.03466, tables 3 and 8.

    Example:
        >>> from lightning_optim import build_param_groups
        >>> model = nn.ModuleDict({"up": nn.Linear(4, 64), "hidden": nn.Linear(64, 64), "head": nn.Linear(64, 2)})
        >>> base = nn.ModuleDict({"up": nn.Linear(4, 16), "hidden": nn.Linear(16, 16), "head": nn.Linear(16, 2)})
        >>> for group in build_param_groups(model, [WidthScaling(base_shapes=shapes_of(base))]):
        ...     print(group["name"], group["lr_multiplier"], [name for name, _ in group["params"]])
        default 1.0 ['up.weight', 'up.bias', 'hidden.bias', 'head.weight', 'head.bias']
        width_x4 0.25 ['hidden.weight']
    """

    base_width: int | None = None
    width: int | None = None
    base_shapes: Mapping[str, Sequence[int]] | None = None
    scale_head: bool = False

    def __post_init__(self) -> None:
        widths = (self.base_width, self.width)
        if (self.base_shapes is None) == (widths == (None, None)) or (None in widths and self.base_shapes is None):
            raise ValueError(
                f"WidthScaling got base_width={self.base_width}, width={self.width} and "
                f"{'no ' if self.base_shapes is None else ''}base_shapes. Give base_width and width, or base_shapes "
                "alone."
            )
        for key in ("base_width", "width"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"Invalid {key}={value!r} of WidthScaling: must be a whole number of at least 1.")

    def scales(self, model: nn.Module, parameters: Sequence[NamedParameter]) -> dict[str, Scale]:
        """Compute the scale of each parameter, by name."""
        if self.base_shapes is not None:
            self._check_shapes(model, {parameter.name for parameter in parameters})
        parts = {"hidden_matrix"} | ({"head"} if self.scale_head else set())
        result = {}
        for parameter in parameters:
            matrix = parameter.dim >= 2 and parts & parameter.parts
            ratio = self._ratio(parameter) if matrix else 1.0
            result[parameter.name] = Scale(0, "", 1.0) if ratio == 1 else Scale(1, f"width_x{ratio:g}", 1 / ratio)
        return result

    def _ratio(self, parameter: NamedParameter) -> float:
        """Return the number of inputs of the matrix over that in the base model."""
        if self.base_shapes is None:
            assert self.width is not None
            assert self.base_width is not None
            return self.width / self.base_width
        base, shape = self.base_shapes[parameter.name], tuple(parameter.parameter.shape)
        if len(base) != len(shape):
            raise ValueError(
                f"WidthScaling: {parameter.name!r} has shape {shape} and base shape {tuple(base)}, which must have the "
                "same number of dimensions."
            )
        # A matrix that has grown in its inputs only is not hidden: it makes the output.
        grown_inside = base[0] != shape[0] or "head" in parameter.parts
        return math.prod(shape[1:]) / math.prod(base[1:]) if grown_inside else 1.0

    def _check_shapes(self, model: nn.Module, names: set[str]) -> None:
        assert self.base_shapes is not None
        missing = sorted(names - set(self.base_shapes))
        if missing:
            raise ValueError(
                f"WidthScaling: base_shapes lacks {missing[0]!r} ({len(missing)} of {type(model).__name__}'s "
                f"{len(names)} parameters). {nearest(missing[0], self.base_shapes)}"
            )


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a model's parameters by name as plain numbers, for `WidthScaling.base_shapes` and YAML.

    Example:
        >>> shapes_of(nn.Linear(2, 3))
        {'weight': [3, 2], 'bias': [3]}
    """
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}
