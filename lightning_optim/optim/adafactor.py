"""Adafactor: Adam's second moment, factored into one row and one column per matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.ranges import NON_NEGATIVE, Range
from lightning_optim.kernels.base import largest
from lightning_optim.kernels.pieces import norm
from lightning_optim.kernels.rules import Scalar, TensorRule, minimum, sqrt
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.matrix_form import refuse_split
from lightning_optim.optim.shared_options import SharedOptions


class AdafactorRule(TensorRule):
    """Adafactor's update: the gradient over the root of a factored second moment, clipped, relative to the weights."""

    divides_on_cpu: ClassVar[bool] = True

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return zeros: a row and a column for each matrix, or the whole second moment of a vector."""
        if param.dim() < 2:
            return {"variance": torch.zeros_like(param, memory_format=torch.preserve_format)}
        *batch, rows, columns = param.shape
        return {"row_var": param.new_zeros(*batch, rows, 1), "col_var": param.new_zeros(*batch, 1, columns)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Relative step size, and the weight of the newest square in the second moment."""
        return {
            "relative_step": minimum(group["lr"], 1 / sqrt(step)),
            "one_minus_beta2": step ** group["beta2_decay"],
            "eps": 0.0,
        }

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Implement `TensorRule.update`."""
        deltas, new_states = [], []
        for param, grad, state, numbers, group in zip(params, grads, states, scalars, groups, strict=True):
            eps1 = _eps1(param, group)
            weight = numbers["one_minus_beta2"]
            most = largest(grad.dtype)
            if grad.dim() < 2:
                variance = state["variance"].lerp(grad.square().clamp_(max=most), weight)
                new_states.append({"variance": variance})
                inverse_root = variance.rsqrt()
            else:
                row_var = state["row_var"].lerp(_mean_square(grad, -1).clamp_(max=most), weight)
                col_var = state["col_var"].lerp(_mean_square(grad, -2).clamp_(max=most), weight)
                new_states.append({"row_var": row_var, "col_var": col_var})
                inverse_root = _row_factor(row_var, eps1).rsqrt() * col_var.rsqrt()
            delta = inverse_root.clamp_(max=1 / eps1 if eps1 else math.inf).mul_(grad)
            scale = _scale(
                _rms(param),
                _rms(delta),
                numbers["relative_step"],
                group["eps"][1],
                group["d"],
            )
            deltas.append(delta.mul_(scale))
        return deltas, new_states

    def update_on_cpu(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[Iterable[Tensor], list[dict[str, Tensor]]]:
        """Compute `update` in three passes; vectors are matrices of one row, whose column factor is the second moment.

        g/√max(r·c, ε²) equals g·min(1/√r · 1/√c, 1/ε), which needs a root for each row and column but none per element.
        """
        from lightning_optim.kernels import measure
        from lightning_optim.kernels.cpu import factored

        shapes = [grad.shape for grad in grads]
        grads = [(grad if grad.dim() >= 2 else grad.reshape(1, -1)).contiguous() for grad in grads]
        inverse_divisors = torch.stack([numbers["inverse_divisor"] for numbers in scalars]).tolist()
        weights = [numbers["one_minus_beta2"] for numbers in scalars]
        row_means, col_means = factored.mean_squares(grads, inverse_divisors)
        new_states, rows, columns, ceilings = [], [], [], []
        for i, state in enumerate(states):
            eps1 = _eps1(params[i], groups[i])
            ceilings.append(1 / eps1 if eps1 else math.inf)
            if "variance" in state:
                variance = state["variance"].reshape(1, -1).lerp(col_means[i], weights[i])
                rows.append(torch.ones_like(row_means[i]))
                columns.append(variance.rsqrt())
                new_states.append({"variance": variance.view(shapes[i])})
            else:
                row_var = state["row_var"].lerp(row_means[i], weights[i])
                col_var = state["col_var"].lerp(col_means[i], weights[i])
                rows.append(_row_factor(row_var, eps1).rsqrt().contiguous())
                columns.append(col_var.rsqrt().contiguous())
                new_states.append({"row_var": row_var, "col_var": col_var})
        delta_sq = factored.scaled_squares(grads, inverse_divisors, rows, columns, ceilings)
        numel = delta_sq.new_tensor([max(param.numel(), 1) for param in params])
        eps2, d = delta_sq.new_tensor([[group["eps"][1], group["d"]] for group in groups]).unbind(1)
        relative_step = torch.stack([numbers["relative_step"] for numbers in scalars])
        scales = _scale((measure(params) / numel).sqrt(), (delta_sq / numel).sqrt(), relative_step, eps2, d)
        scaled = factored.Scaled(shapes, grads, inverse_divisors, rows, columns, ceilings, scales.tolist())
        return scaled, new_states


def _eps1(param: Tensor, group: Mapping[str, Any]) -> float:
    given = group["eps"][0]
    return torch.finfo(param.dtype).eps if given is None else given


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    """Return the mean of g² over ``dim``, which is kept; it can be finite even if the square of an element is not."""
    wide = widest_dtype(grad.device)
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=wide)
    mean: Tensor = norm.square_() / grad.shape[dim]
    return mean.to(grad.dtype)


def _rms(tensor: Tensor) -> Tensor:
    """Return the root mean square, shape [], finite if the tensor is, and 0 for an empty tensor."""
    root = norm(tensor, widest_dtype(tensor.device)) / math.sqrt(max(tensor.numel(), 1))
    return root.to(tensor.dtype)


def _row_factor(row_var: Tensor, eps1: float) -> Tensor:
    """Divide row means by their mean, so that the product of row and column is the second moment."""
    mean = row_var.mean(-2, keepdim=True, dtype=widest_dtype(row_var.device))
    factor: Tensor = row_var / mean.clamp(min=eps1).to(row_var.dtype)
    return factor


def _scale(param_rms: Tensor, delta_rms: Tensor, relative_step: Tensor, eps2: Any, d: Any) -> Tensor:
    """Return the factor of g/√v: the step size divided by max(1, RMS/d)."""
    scale: Tensor = relative_step * param_rms.clamp(min=eps2) / (delta_rms / d).clamp(min=1.0)
    return scale


class Adafactor(FusedOptimizer):
    """Adafactor: adaptive steps with the memory of plain SGD.

    With gradient g at step t, where the last two dimensions are matrices, and vectors keep the whole of v:

        ρ = min(lr, 1/√t),   α = max(ε₂, RMS(w))·ρ,   β̂ = 1 − t^τ
        w ← (1 − lr·λ)·w
        R ← β̂·R + (1 − β̂)·row means of g²,   C ← β̂·C + (1 − β̂)·column means of g²
        v = R·C / max(mean(R), ε₁)
        u = g / max(√v, ε₁)
        w ← w − α · u / max(1, RMS(u)/d)

    This is `torch.optim.Adafactor`, with interchangeable state dicts and the same documented differences from the
    paper: lr bounds ρ, and ε₁ bounds v from below instead of being added to g². Steps are relative to the RMS of the
    weights. For bf16 parameters ε₁ and the state are those of float32.

    Each matrix of a stack, such as experts, has rows and columns of its own, and RMS(w) and RMS(u) are those of the
    whole tensor. Convolution kernels have a row and a column for each pair of channels, as in torch, which saves little
    memory.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: The largest relative step size ρ; the paper's is 0.01. A float or a one-element tensor.
        beta2_decay: τ ≤ 0, by which the second moment averages over more and more steps.
        eps: (ε₁, ε₂): the smallest √v, None for the precision of the dtype; and the smallest RMS of weights.
        d: Largest RMS of u, at least 1.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
        https://arxiv.org/abs/1804.04235

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([[0.9000, 0.9000, 0.9000],
                [0.9000, 0.9000, 0.9000]])
    """

    when_to_use = "Where memory does not suffice for Adam's moments: large language models, the T5 family."
    memory = "rows + columns of each matrix"
    paper = "https://arxiv.org/abs/1804.04235"
    usual_lr = (1e-3, 3e-2)
    ranges: ClassVar[Mapping[str, Range]] = {
        "beta2_decay": Range(high=0),
        "eps": replace(NON_NEGATIVE, optional=True),
        "d": Range(1),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        refuse_split(cls.__name__, group, "its rows, columns and step size are those of the whole tensor, as in torch")
        if group["eps"][1] is None:
            raise ValueError("Adafactor: Invalid eps[1]=None: must be a number of at least 0. Only eps[0] may be None.")

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> TensorRule:
        """Implement `FusedOptimizer.rule`."""
        return AdafactorRule()
