"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.host import read
from lightning_optim.core.ranges import FRACTION, Range
from lightning_optim.kernels.base import largest
from lightning_optim.kernels.rules import Scalar, TensorRule, sqrt, where
from lightning_optim.kernels.weight_decay import WeightDecayKind, decay_coefficients, decay_form
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.matrix_form import check_form
from lightning_optim.optim.matrix_groups import stack_param_groups
from lightning_optim.optim.shared_options import SharedOptions
from lightning_optim.optim.soap_bases import (
    Bases,
    average_square,
    direction_in,
    eigenvectors,
    form_of,
    gram_matrix,
    name_of,
    parts_of,
    power_iteration,
    preconditioned,
    reordered,
    taken,
)


class SOAPRule(TensorRule):
    """SOAP's update: Adam in slowly rotating bases in which components of the gradient are nearly uncorrelated."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    compressible: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    counts_calls: ClassVar[bool] = True
    first_moment: ClassVar[str | None] = "exp_avg"
    reads_weights: ClassVar[bool] = False

    def why_not(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Implement `Rule.why_not`."""
        if param.dim() > 2 and group.get("split") is not None and group["flatten"] is None:
            return (
                f"its shape {tuple(param.shape)} may be a stack of matrices or a kernel, and split={group['split']!r} "
                "needs to know which. Set flatten=False or flatten=True in its group."
            )
        try:
            form_of(param, group)
        except ValueError as error:
            return str(error)
        return None

    def form(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Implement `Rule.form`."""
        if param.dim() < 2:
            return None
        form = form_of(param, group)
        sizes = param.shape if form is None else (size for shape in form.shapes for size in shape)
        large = sorted({size for size in sizes if size > group["max_precondition_dim"]})
        text = f"{'matrix' if param.dim() == 2 else 'tensor'} {list(param.shape)}" if form is None else str(form)
        return f"{text}, no basis for {', '.join(map(str, large))}" if large else text

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return zero moments, and `GG_<dim>` of zeros and `Q_<dim>` for each preconditioned dimension.

        For matrices in stacks they are [matrices, size, size]; the further sizes of unequal pieces have the names
        `GG_<dim>_<run>` and `Q_<dim>_<run>`.
        """
        state = {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in self.state}
        for run, (lead, sizes) in enumerate(parts_of(param, group)):
            for dim, size in preconditioned(sizes, group):
                eye = torch.eye(size, dtype=param.dtype, device=param.device)
                state[name_of("GG", dim, run)] = param.new_zeros(*lead, size, size)
                state[name_of("Q", dim, run)] = eye.repeat(*lead, 1, 1) if lead else eye
        return state

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Adam's scalars, delayed by one step, and zeros for the first step, which only computes the bases."""
        beta1, beta2 = group["betas"]
        first = step == 1
        adam_step = where(first, 1.0, step - 1)
        step_size = group["lr"] * sqrt(1 - beta2**adam_step) / (1 - beta1**adam_step)
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        kind = WeightDecayKind(group["weight_decay_kind"])
        decay, _ = decay_coefficients(kind, group["lr"], group["weight_decay"], group["peak_lr"])
        return {
            "step": step,
            "step_size": where(first, 0.0, step_size),
            "one_minus_beta1": where(first, 0.0, 1 - beta1),
            "one_minus_beta2": where(first, 0.0, 1 - beta2),
            "one_minus_shampoo_beta": 1 - shampoo_beta,
            "decay": where(first, 0.0, decay),
            # Weights decay after the update, so shrinking weights also shrinks the update.
            "kept": 1 - decay if decay_form(group) == "shrink" else 1.0,
        }

    def together(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Return None: each tensor has a call of its own, because nothing is batched and bases need much memory."""

    def is_elementwise(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether no dimension has a basis, so that the update is Adam's."""
        return not any(preconditioned(sizes, group) for _, sizes in parts_of(param, group))

    def cost(self, param: Tensor, group: Mapping[str, Any]) -> float:
        """Return the multiplications and additions of rotations and Gram matrices, and of a share of the refreshes."""
        total = 0.0
        for lead, sizes in parts_of(param, group):
            rotated = [size for _, size in preconditioned(sizes, group)]
            refreshes = sum(10.0 * size**3 for size in rotated) / group["precondition_frequency"]
            total += math.prod(lead) * (8.0 * math.prod(sizes) * sum(rotated) + refreshes)
        return total

    def divisible(self, param: Tensor, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return the operations of a refresh of the bases, and the bytes of the amount, the moments and the factors."""
        parts = [(lead, preconditioned(sizes, group)) for lead, sizes in parts_of(param, group)]
        sizes = [size for lead, rotated in parts for _, size in rotated for _ in range(math.prod(lead))]
        if not sizes:
            return None
        # A QR decomposition in float32 runs at about a twentieth of the speed of products in bfloat16.
        operations = 20 * 10 * sum(size**3 for size in sizes)
        return float(operations), float(12 * param.numel() + 8 * sum(size**2 for size in sizes))

    def divides_now(self, group: Mapping[str, Any], step: float | None) -> bool:
        """Return whether bases are refreshed: in other steps an update takes less time than to send it."""
        count = int(group["calls"]) if step is None else round(step)
        return _is_refresh(count, group)

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
        for grad, state, numbers, group in zip(grads, states, scalars, groups, strict=True):
            form = form_of(grad, group)
            exp_avg = state["exp_avg"].lerp(grad, numbers["one_minus_beta1"])
            new_state = {"exp_avg": exp_avg}
            of_parts = (taken(x, form) for x in (grad, exp_avg, state["exp_avg_sq"]))
            steps, squares = [], []
            for run, (part, average, square) in enumerate(zip(*of_parts, strict=True)):
                lead = 0 if form is None else part.dim() - 2
                step, square = _update_part(part, average, square, run, lead, state, new_state, numbers, group)
                steps.append(step)
                squares.append(square)
            new_state["exp_avg_sq"] = squares[0] if form is None else form.put(squares).reshape(grad.shape)
            delta = steps[0] if form is None else form.put(steps).reshape(grad.shape)
            deltas.append(delta.mul_(numbers["step_size"] * numbers["kept"]))
            new_states.append(new_state)
        return deltas, new_states


def _update_part(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    run: int,
    lead: int,
    state: Mapping[str, Tensor],
    new_state: dict[str, Tensor],
    numbers: Mapping[str, Tensor],
    group: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Update one tensor with a basis for each dimension, or a stack of matrices with bases of their own.

    Args:
        grad: Shape [..., one for each basis].
        exp_avg: New first moment, shape of ``grad``.
        exp_avg_sq: Second moment in the coordinates of the bases, shape of ``grad``.
        run: Index of the part within its parameter.
        lead: Number of dimensions in front that count matrices.
        state: State of the parameter.
        new_state: Its new state; `GG` and `Q` are added.
        numbers: Scalars of the rule, shape [] each.
        group: The parameter group.

    Returns:
        Adam's direction, and the new second moment, shape of ``grad``.
    """
    most = largest(grad.dtype)
    bases: Bases = [state.get(name_of("Q", dim, run)) for dim in range(grad.dim() - lead)]
    exp_avg_sq = average_square(grad, bases, exp_avg_sq, numbers["one_minus_beta2"], most)
    direction = direction_in(exp_avg, exp_avg_sq, bases, group["eps"])
    count = _count(numbers, group)
    for dim, basis in enumerate(bases):
        if basis is None:
            continue
        name = name_of("Q", dim, run)
        gram = gram_matrix(grad, dim, lead)
        # In the memory of the products, because these matrices are the largest tensors here.
        torch.lerp(state[name_of("GG", dim, run)], gram, numbers["one_minus_shampoo_beta"], out=gram)
        new_state[name_of("GG", dim, run)] = gram
        if count == 1:
            new_state[name] = eigenvectors(gram)
        elif _is_refresh(count, group):
            new_state[name], order = power_iteration(gram, basis)
            exp_avg_sq = reordered(exp_avg_sq, dim + lead, order)
        else:
            new_state[name] = basis
    return direction, exp_avg_sq


def _count(numbers: Mapping[str, Tensor], group: Mapping[str, Any]) -> int:
    """Return the number of the step on the CPU, and the number of calls on devices that the host must not read."""
    return round(read(numbers["step"])) if numbers["step"].device.type == "cpu" else int(group["calls"])


def _is_refresh(count: int, group: Mapping[str, Any]) -> bool:
    """Return whether the step with this number computes new bases; the first one does."""
    return bool((count - 1) % group["precondition_frequency"] == 0)


class SOAP(FusedOptimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient G, at step t > 1, k = t − 1:

        G' = Q_Lᵀ·G·Q_R
        m ← β₁·m + (1 − β₁)·G,   v ← β₂·v + (1 − β₂)·G'²
        W ← W − lr·√(1 − β₂ᵏ)/(1 − β₁ᵏ) · Q_L·[(Q_Lᵀ·m·Q_R) / (√v + ε)]·Q_Rᵀ
        W ← (1 − lr·λ)·W
        L ← β_s·L + (1 − β_s)·G·Gᵀ,   R ← β_s·R + (1 − β_s)·Gᵀ·G
        every `precondition_frequency` steps: Q_L, Q_R ← QR(L·Q_L), QR(R·Q_R), one power iteration

    The first step sets Q to the eigenvectors of L and R, and does not change weights. Tensors of more dimensions have a
    basis for each dimension; vectors have none and are updated by Adam. This is Algorithm 3 of the paper and
    `pytorch_optimizer.SOAP`. If the first L or R does not have full rank, its eigenvectors are not unique, and results
    depend on the last bit.

    The host decides when bases are refreshed, because that runs different code. On the CPU it reads the step count, and
    a skipped step has no effect. On other devices it must not read the count, and counts calls instead
    (``group["calls"]``, saved in checkpoints): a skipped call still leaves parameters and state unchanged bit for bit,
    but a refresh that was due in it happens only with the next one. If the first call is skipped, bases start as unit
    vectors, and the refreshes rotate them. The first call waits for the device, because `torch.linalg.eigh` does.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, about the size of each step; a float or a one-element tensor.
        betas: Decay rates (β₁, β₂) of the two averages, each in [0, 1).
        shampoo_beta: β_s, the decay rate of L and R; None for β₂.
        eps: ε, added to the denominator before its correction, in units of the gradient.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        precondition_frequency: Steps between refreshes of the bases; 10, as in the paper, costs little in quality.
        max_precondition_dim: Largest size of a dimension with a basis; larger ones, such as vocabularies, have none.
        precondition_1d: Whether vectors have a basis as well.
        flatten: Meaning of parameters with more than two dimensions: None for tensors with a basis for each dimension;
            True for convolution kernels, flattened to output channels × the rest, which merges the bases of the rest;
            False for stacks of matrices, such as experts, each with bases of its own. The factory sets it for stacks.
        split: Pieces of a fused projection, each with bases of its own: a number of equal blocks or a list of sizes, as
            for `Muon`; None for whole matrices, as published.
        split_dim: Dimension that is split, as for `Muon`.
        split_repeats: How often the blocks are repeated, as for `Muon`.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, 2024, https://arxiv.org/abs/2409.11321

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.square().sum() < 5)
        True
    """

    when_to_use = "Fewest steps at large batches, if time per step and memory allow; language models."
    memory = "2 values, and 2 per element of two square matrices as large as each side"
    paper = "https://arxiv.org/abs/2409.11321"
    usual_lr = (1e-4, 1e-2)
    ranges: ClassVar[Mapping[str, Range]] = {
        "shampoo_beta": replace(FRACTION, optional=True),
        "precondition_frequency": Range(1, whole=True),
        "max_precondition_dim": Range(1, whole=True),
        "split": Range(1, whole=True, optional=True, tensor=False),
        "split_dim": Range(whole=True, tensor=False),
        "split_repeats": Range(1, whole=True, tensor=False),
    }
    structured = frozenset({"split"})
    groups_of = staticmethod(stack_param_groups)
    """Function by which `OptimizerFactory` builds the parameter groups of a model for this class."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        precondition_1d: bool = False,
        *,
        flatten: bool | None = None,
        split: int | Sequence[int] | None = None,
        split_dim: int = -2,
        split_repeats: int = 1,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "shampoo_beta": shampoo_beta,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_precondition_dim": max_precondition_dim,
                "precondition_1d": precondition_1d,
                "flatten": flatten,
                "split": split,
                "split_dim": split_dim,
                "split_repeats": split_repeats,
            },
            **options,
        )

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        check_form(cls.__name__, group, auto=False)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> TensorRule:
        """Implement `FusedOptimizer.rule`."""
        return SOAPRule()
