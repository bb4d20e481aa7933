"""Statistics of a step of an optimizer that measures none itself, from its parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.host import read, widest_dtype
from lightning_optim.core.placements import placed_as
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.stats import STEP_SUMS
from lightning_optim.kernels.plain import as_real
from lightning_optim.step.gradients import Gradients
from lightning_optim.step.measure import measure_update

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class ForeignUpdate:
    """Measurement of the `STEP_SUMS` around the update of an optimizer of torch or another package.

    It costs one copy of the parameters and one pass over gradients and state, on reported steps only. The momentum is
    found by its name in the optimizer's state, the second moment for those of torch's optimizers that are known here. A
    column is NaN where the optimizer has no such quantity.

    Args:
        optimizer: The optimizer.
        gradients: The gradients of the step.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self._optimizer = optimizer
        self._params, self._grads, self._sum_shards = gradients.params, list(gradients.grads), gradients.sum_shards
        sizes = zip(optimizer.param_groups, gradients.group_sizes, strict=True)
        self._groups = [group for group, size in sizes for _ in range(size)]
        self._before = [local(param.detach()).clone() for param in self._params]
        self._rows: dict[str, list[Tensor]] = {}

    def begin_with(self, earlier: ForeignUpdate) -> None:
        """Measure from the parameters of an earlier one: an optimizer moves them between two evaluations, and back."""
        known = dict(zip(earlier._params, earlier._before, strict=True))
        self._before = [known.get(p, now) for p, now in zip(self._params, self._before, strict=True)]

    @torch.no_grad()
    def before(self) -> None:
        """Measure what must be read before the update, such as the momentum, which the update changes.

        The gradients must be those that the update will find, up to a factor.
        """
        dots, squares, own = [], [], []
        for param, grad, group in zip(self._params, self._grads, self._groups, strict=True):
            momentum = self._momentum(param)
            wide = _wide(grad)
            if wide is not None and wide.numel() == 0:  # This rank holds an empty shard.
                dots.append(_zero(param))
                squares.append(_zero(param))
            elif wide is None or momentum is None:
                dots.append(_nan(param))
                squares.append(_nan(param))
            else:
                old = as_real(local(momentum)).to(widest_dtype(param.device))
                dots.append((wide * old).sum() * (-1 if group.get("maximize") else 1))
                squares.append(old.square().sum())
            own.append(_nan(param) if wide is None else _square_sum(wide))
        self._rows = {"grad_exp_avg": dots, "momentum_sq": squares, "grad_sq_before": own}

    @torch.no_grad()
    def sums(self, clipped_norm_sq: Tensor) -> Tensor:
        """Compute the sums after the update.

        Args:
            clipped_norm_sq: Square sum of each gradient as the update used it, shape [tensors]. The gradients in memory
                may differ by a factor, because loss scale and clipping may have been operands of the kernel.

        Returns:
            The `STEP_SUMS`, shape [tensors, columns], with dtype and device of ``clipped_norm_sq``.
        """
        device, dtype = clipped_norm_sq.device, clipped_norm_sq.dtype
        if not self._rows:  # The step was skipped before `before` was called.
            return torch.full((len(self._params), len(STEP_SUMS)), torch.nan, dtype=dtype, device=device)
        zeros, ratios, below, own = [], [], [], []
        for param, grad, group in zip(self._params, self._grads, self._groups, strict=True):
            wide, root = _wide(grad), self._second_moment_root(param, group)
            zeros.append(_nan(param) if wide is None else (wide == 0).sum())
            own.append(_nan(param) if wide is None else _square_sum(wide))
            if wide is not None and wide.numel() == 0:
                ratios.append(_zero(param))
                below.append(_zero(param))
            elif wide is None or root is None:
                ratios.append(_nan(param))
                below.append(_nan(param))
            else:
                root = root.to(wide.dtype)
                ratios.append((wide / root.clamp(min=1e-18)).square().sum())
                below.append((root < group["eps"]).sum())
        columns = {
            **self._rows,
            "zero_grad": zeros,
            "grad_sq_over_exp_avg_sq": ratios,
            "below_eps": below,
            "grad_sq_after": own,
        }
        packed = torch.stack(
            [torch.stack([v.to(device, dtype, non_blocking=True) for v in column]) for column in columns.values()], 1
        )
        sums = dict(zip(columns, self._sum_shards(sum_over_shards(packed, self._params)).unbind(1), strict=True))
        # torch's fused kernels divide the gradients in memory, so these may have changed since `before`.
        sums["grad_exp_avg"] = sums["grad_exp_avg"] * _ratio(clipped_norm_sq, sums["grad_sq_before"]).sqrt()
        after = _ratio(clipped_norm_sq, sums["grad_sq_after"])
        sums["grad_sq_over_exp_avg_sq"] = sums["grad_sq_over_exp_avg_sq"] * after
        effect = self._sum_shards(measure_update(self._before, self._params)).to(device, dtype)
        return torch.stack([sums.get(name, effect[:, i]) for i, name in enumerate(STEP_SUMS)], dim=1)

    def _momentum(self, param: Tensor) -> Tensor | None:
        state = self._optimizer.state.get(param, {})
        found = (state.get(name) for name in _FIRST_MOMENTS)
        momentum = next((m for m in found if isinstance(m, Tensor) and (m.is_floating_point() or m.is_complex())), None)
        # torch's SGD clones its buffer from the first gradient, whose placements may differ from the parameter's.
        return None if momentum is None else placed_as(momentum, param)

    def _second_moment_root(self, param: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """Return √v̂ as the update has just used it, shape of the local shard; None if it is not known."""
        state = self._optimizer.state.get(param, {})
        if isinstance(self._optimizer, torch.optim.RMSprop):
            second = None if group["centered"] else state.get("square_avg")
            return None if second is None else as_real(local(second)).sqrt()
        if isinstance(self._optimizer, torch.optim.Adagrad):
            return as_real(local(state["sum"])).sqrt() if "sum" in state else None
        if not isinstance(self._optimizer, torch.optim.Adam | torch.optim.NAdam | torch.optim.RAdam):
            return None  # torch's AdamW is a subclass of Adam, and so is not refused.
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if second is None:
            return None
        step = state["step"]
        step = read(step) if step.device.type == "cpu" else step
        correction: Any = 1 - group["betas"][1] ** step
        root = correction.sqrt() if isinstance(correction, Tensor) else correction**0.5
        return as_real(local(second)).sqrt() / root


def _wide(grad: Tensor) -> Tensor | None:
    """Return this rank's part of a gradient in at least float32, for the sake of its squares; None if it is sparse."""
    if grad.layout != torch.strided:
        return None
    part = as_real(local(grad.detach()))
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _square_sum(wide: Tensor) -> Tensor:
    """Return the square sum, shape []; where the device has float64, it is finite for every finite float32 tensor."""
    norm: Tensor = torch.linalg.vector_norm(wide, dtype=widest_dtype(wide.device))
    return norm.square()


def _ratio(used: Tensor, found: Tensor) -> Tensor:
    """Return used / found, shape [tensors], and 1 for a gradient of zeros."""
    return torch.where((used == 0) & (found == 0), 1.0, used / found)


def _zero(param: Tensor) -> Tensor:
    return torch.zeros((), device=param.device)


def _nan(param: Tensor) -> Tensor:
    return torch.full((), torch.nan, device=param.device)
