"""NorMuon: Muon with equal step sizes of all rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, Range
from lightning_optim.kernels.rules import Like, Scalar, TensorRule
from lightning_optim.optim.hidden_matrices import HiddenMatrixOptimizer
from lightning_optim.optim.muon import MuonRule, matrix_shape, step_ratio
from lightning_optim.optim.newton_schulz import COEFFICIENTS
from lightning_optim.optim.shared_options import SharedOptions

NEWTON_SCHULZ_EPS = 1e-7  # The argument `eps` is that of the rows.


class NorMuonRule(MuonRule):
    """NorMuon's update: Muon's orthogonal matrix with each row divided by its running root mean square."""

    state = ("momentum_buffer", "second_momentum_buffer")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros, and a mean square of zero for each row."""
        lead, rows, _ = matrix_shape(param, group)
        return super().init_state(param, group) | {"second_momentum_buffer": param.new_zeros(*lead, rows, 1)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Scalars of Muon, and the weight of the newest squares in those of the rows."""
        return super().scalars(group, step) | {"one_minus_beta2": 1 - group["beta2"]}

    def whole(
        self,
        tensors: Iterable[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Implement `MatrixRule.whole`: return O, the divisors of its rows, and the factors of its matrices."""
        results = []
        directions = self.orthogonalized(tensors, groups, NEWTON_SCHULZ_EPS)
        for result, state, group, numbers in zip(directions, states, groups, scalars, strict=True):
            direction = result.to(numbers["lr"].dtype)
            squares = direction.square().mean(-1, keepdim=True)
            rows = state["second_momentum_buffer"].lerp(squares, numbers["one_minus_beta2"])
            divisor = rows.sqrt() + group["eps"]
            if group["adjust_lr_fn"] == "match_rms_adamw":
                size: Any = 0.2 * math.sqrt(direction.shape[-2:].numel())
            else:
                size = _norm(direction) * step_ratio(direction, group["adjust_lr_fn"])
            normalized = direction / divisor
            scale = numbers["lr"] * size / (_norm(normalized) + group["eps"])
            found = {"direction": result, "divisor": divisor, "scale": scale, "normalized": normalized}
            results.append((found, {"second_momentum_buffer": rows}))
        return results

    def returned(self, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Like]:
        """Implement `MatrixRule.returned`."""
        lead, _, _ = matrix_shape(param, group)
        rows = (*param.shape[:-1], 1) if lead else (param.shape[0], *(1,) * (param.dim() - 1))
        matrices = (*param.shape[:-2], 1, 1) if lead else (1,) * param.dim()
        return super().returned(param, group, dtype) | {"divisor": (rows, dtype), "scale": (matrices, dtype)}

    def after(
        self,
        results: Sequence[dict[str, Tensor]],
        params: Sequence[Tensor],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Iterator[Tensor]:
        """Implement `MatrixRule.after`: yield O with its rows divided, times the factor of its matrix."""
        for result in results:
            normalized = result.pop("normalized", None)  # It is not sent, because the rest is smaller.
            if normalized is None:
                normalized = result["direction"].to(result["scale"].dtype) / result["divisor"]
            yield normalized.mul_(result["scale"]).contiguous()


def _norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm of a matrix, shape [], or of each matrix of a stack, [matrices, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return norm if matrix.dim() > 2 else norm.view(())


class NorMuon(HiddenMatrixOptimizer):
    """NorMuon: Muon in which all neurons, the rows of each matrix, change by similar amounts.

    With gradient G of a matrix of A rows and B columns:

        M ← μ·M + (1 − μ)·G,   N = (1 − μ)·G + μ·M   (N = M without Nesterov's momentum)
        O = N with its singular values brought close to 1, by Newton-Schulz iteration in bfloat16
        r ← β₂·r + (1 − β₂)·row means of O²,   U = O / (√r + ε)
        W ← (1 − lr·λ)·W
        W ← W − lr·√max(1, A/B)·‖O‖/‖U‖·U,   or with `match_rms_adamw`   W ← W − lr·0.2·√(A·B)/‖U‖·U

    This is `pytorch_optimizer.NorMuon`: `original` is its ``update_scale="preserve_norm"`` and the authors' code, and
    `match_rms_adamw` is its `match_rms` and Algorithm 1 of the paper.

    Hidden matrices are recognised as in `Muon`, and the other parameters are updated by AdamW.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate; a float or a one-element tensor.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        momentum: μ in [0, 1); 0.95 averages over about twenty steps.
        beta2: β₂ in [0, 1), the decay rate of the rows' mean squares.
        nesterov: Whether to use Nesterov momentum.
        ns_coefficients: (a, b, c) of the iteration's quintic.
        eps: ε, added to the root mean square of rows, which is about 1/√B.
        ns_steps: Iterations, 1 to 99; five bring singular values to between about 0.7 and 1.2.
        adjust_lr_fn: Dependence of the step on the shape of the matrix: None or `original`, or `match_rms_adamw`,
            an RMS of 0.2·lr, which suits learning rate and weight decay tuned for AdamW, so that one lr suits all
            groups.
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
        Li et al., NorMuon: Making Muon more efficient and scalable, 2025, https://arxiv.org/abs/2510.05491

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> optimizer = NorMuon(model.named_parameters(), lr=0.02, adamw_lr=3e-4)
        >>> [(group.get("rule", "normuon"), group["param_names"]) for group in optimizer.param_groups]
        [('normuon', ['0.weight', '2.weight']), ('adamw', ['0.bias', '2.bias'])]
    """

    when_to_use = "Like Muon, where some neurons would otherwise get most of the update."
    memory = "1 value and 1 per row (2 in groups for AdamW)"
    paper = "https://arxiv.org/abs/2510.05491"
    usual_lr = (5e-3, 5e-2)
    ranges: ClassVar[Mapping[str, Range]] = {
        "beta2": FRACTION,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-2,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-10,
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
                "beta2": beta2,
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
        return NorMuonRule()
