"""Muon: orthogonalised momentum."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.rules import Like, MatrixRule, Scalar, TensorRule
from lightning_optim.optim.hidden_matrices import HiddenMatrixOptimizer
from lightning_optim.optim.newton_schulz import COEFFICIENTS, orthogonalize_stack
from lightning_optim.optim.shared_options import SharedOptions


class MuonRule(MatrixRule):
    """Muon's update: the orthogonal matrix nearest to the momentum."""

    state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    local_state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    counts_steps: ClassVar[bool] = False
    first_moment: ClassVar[str | None] = "momentum_buffer"

    def why_not(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Implement `Rule.why_not`."""
        if param.dim() < 2:
            return f"it has {param.dim()} dimensions, and only matrices can be orthogonalised. Give it rule='adamw'."
        if param.dim() == 3 and group["flatten"] is None:
            return (
                f"its shape {tuple(param.shape)} may be a stack of matrices or the kernel of a 1-d convolution. Set "
                "flatten=False or flatten=True in its group, use the groups of muon_param_groups(model), which "
                "inspects the modules, or give it rule='adamw'."
            )
        return None

    def together(self, param: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return a key that is equal for matrices of one shape or its transpose with equal settings."""
        _, rows, columns = matrix_shape(param, group)
        settings = (tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])
        return min(rows, columns), max(rows, columns), settings

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros."""
        return {"momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate and momentum."""
        return {"lr": group["lr"], "momentum": group["momentum"], "one_minus_momentum": 1 - group["momentum"]}

    def cost(self, param: Tensor, group: Mapping[str, Any]) -> float:
        """Return the multiplications and additions of the iterations."""
        lead, rows, columns = matrix_shape(param, group)
        small, large = sorted((rows, columns))
        return float(math.prod(lead) * group["ns_steps"] * (4 * small * small * large + 2 * small**3))

    def advance(
        self, grad: Tensor, state: Mapping[str, Tensor], scalars: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Implement `MatrixRule.advance`: return M."""
        return {"momentum_buffer": state["momentum_buffer"].lerp(grad, scalars["one_minus_momentum"])}

    def prepare(
        self, grad: Tensor, state: Mapping[str, Tensor], scalars: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> Tensor:
        """Implement `MatrixRule.prepare`: return N."""
        buffer = state["momentum_buffer"]
        return grad.lerp(buffer, scalars["momentum"]) if group["nesterov"] else buffer

    def whole(
        self,
        tensors: Iterable[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Implement `MatrixRule.whole`: return O."""
        directions = self.orthogonalized(tensors, groups, groups[0]["eps"])
        return [({"direction": direction}, {}) for direction in directions]

    def orthogonalized(
        self, tensors: Iterable[Tensor], groups: Sequence[Mapping[str, Any]], eps: float
    ) -> list[Tensor]:
        """Return O of each N of any shape in `sent_dtype`, [rows, columns] or [matrices, rows, columns].

        Args:
            tensors: N in the shapes of the parameters.
            groups: Parameter group of each.
            eps: Smallest norm that the Newton-Schulz iteration divides by.
        """

        def matrices() -> Iterator[Tensor]:
            for tensor, group in zip(tensors, groups, strict=True):
                lead, rows, columns = matrix_shape(tensor, group)
                yield tensor.reshape(*lead, rows, columns)

        coefficients = tuple(groups[0]["ns_coefficients"])
        return orthogonalize_stack(matrices(), coefficients, groups[0]["ns_steps"], eps, self.sent_dtype)

    def returned(self, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Like]:
        """Implement `MatrixRule.returned`."""
        return {"direction": (tuple(param.shape), self.sent_dtype)}

    def after(
        self,
        results: Sequence[dict[str, Tensor]],
        params: Sequence[Tensor],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Iterator[Tensor]:
        """Implement `MatrixRule.after`: yield O times the learning rate for its shape."""
        ratios: dict[tuple[int, torch.Size], float] = {}
        for result, param, numbers, group in zip(results, params, scalars, groups, strict=True):
            kind = id(group), param.shape
            if kind not in ratios:
                ratios[kind] = step_ratio(matrix_like(param, group), group["adjust_lr_fn"])
            step_size = numbers["lr"] * ratios[kind]
            rows_first = result["direction"].to(step_size.dtype, memory_format=torch.contiguous_format)
            yield rows_first.mul_(step_size)


def matrix_like(param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a tensor without memory in the shape as which a parameter is orthogonalised, [..., rows, columns]."""
    lead, rows, columns = matrix_shape(param, group)
    return torch.empty(*lead, rows, columns, device="meta")


def matrix_shape(param: Tensor, group: Mapping[str, Any]) -> tuple[tuple[int, ...], int, int]:
    """Return the shape as which a parameter is orthogonalised: (matrices,) or () for a single one, rows, columns.

    Convolution kernels, and other tensors that the group flattens, are output channels × the rest.
    """
    if param.dim() == 2 or group["flatten"] is not False:
        return (), param.shape[0], param.shape[1:].numel()
    *lead, rows, columns = param.shape
    return (math.prod(lead),), rows, columns


def step_ratio(matrix: Tensor, adjust_lr_fn: str | None) -> float:
    """Return the factor of the learning rate for the shape of ``matrix``, [..., rows, columns]."""
    rows, columns = matrix.shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral_unclamped":
        return math.sqrt(rows / max(columns, 1))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


class Muon(HiddenMatrixOptimizer):
    """Muon: steps of equal size in all directions of each weight matrix; AdamW for everything else.

    With gradient G of a matrix of A rows and B columns:

        M ← μ·M + (1 − μ)·G,   N = (1 − μ)·G + μ·M   (N = M without Nesterov's momentum)
        O = N with its singular values brought close to 1, by Newton-Schulz iteration in bfloat16
        W ← (1 − lr·λ)·W
        W ← W − lr·√max(1, A/B)·O,   or with `match_rms_adamw`   W ← W − lr·0.2·√max(A, B)·O

    This is the reference implementation of the first paper below and `torch.optim.Muon`, with interchangeable state
    dicts.

    Only hidden matrices should be orthogonalised. They include convolution kernels, flattened to output channels × the
    rest. The constructor puts vectors, embeddings and other tables, depthwise kernels and output layers into separate
    groups with ``rule="adamw"``. It recognises embeddings and output layers by their names, so pass
    `model.named_parameters()` rather than `model.parameters()`, or better `muon_param_groups(model)`, which also
    inspects the modules. The key `rule` of a group, "muon" or the name of another optimizer, overrides this for all its
    parameters.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate of the hidden matrices; a float or a one-element tensor. With `original`, 0.02 is usual, and
            torch's default of 1e-3 hardly trains.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        momentum: μ in [0, 1); 0.95 averages over about twenty steps.
        nesterov: Whether to use Nesterov momentum.
        ns_coefficients: (a, b, c) of the iteration's quintic.
        eps: Smallest norm of N that is divided by.
        ns_steps: Iterations, 1 to 99; five bring singular values to between about 0.7 and 1.2.
        adjust_lr_fn: Dependence of the step on the shape of the matrix: None or `original`, or `match_rms_adamw`,
            which suits learning rate and weight decay tuned for AdamW (the second paper), so that one lr suits all
            groups; or `spectral_unclamped`, √(A/B) (torch's from 2.14 on).
        flatten: Meaning of parameters with more than two dimensions: True for convolution kernels, flattened to output
            channels × the rest; False for stacks of matrices, such as experts, each orthogonalised separately. None
            treats four and more dimensions as kernels and refuses three, which are ambiguous; `muon_param_groups`
            inspects the modules.
        adamw_lr: Learning rate of the groups for AdamW; None for AdamW's own default, 1e-3, or with `match_rms_adamw`,
            whose scale is AdamW's, for ``lr``.
        adamw_betas: Betas of the groups for AdamW; β₂ = 0.95 rather than 0.999, as with Muon in language models.
        adamw_eps: ε of the groups for AdamW.
        adamw_weight_decay: Weight decay of the groups for AdamW; None for ``weight_decay``.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: A value is out of its range, values contradict each other, or a parameter cannot be updated.
        TypeError: An option is unknown.

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM Training, 2025,
        https://arxiv.org/abs/2502.16982 (`match_rms_adamw`)

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> optimizer = Muon(model.named_parameters(), lr=0.02, adamw_lr=3e-4)
        >>> [(group.get("rule", "muon"), group["param_names"]) for group in optimizer.param_groups]
        [('muon', ['0.weight', '2.weight']), ('adamw', ['0.bias', '2.bias'])]
    """

    when_to_use = "Hidden matrices of transformers and convolutional networks; fewer steps than AdamW."
    memory = "1 value (2 in groups for AdamW)"
    paper = "https://kellerjordan.github.io/posts/muon"
    usual_lr = (5e-3, 5e-2)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool | None = None,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "flatten": flatten,
            },
            {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay},
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> TensorRule:
        """Implement `FusedOptimizer.rule`."""
        return MuonRule()
