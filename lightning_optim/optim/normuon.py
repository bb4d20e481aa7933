"""NorMuon: Muon with rows of equal step size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, Range
from lightning_optim.kernels.rules import Scalar, TensorRule
from lightning_optim.optim.hidden_matrices import HiddenMatrixOptimizer
from lightning_optim.optim.muon import MuonRule, directions_of, matrix_shape, step_ratio
from lightning_optim.optim.newton_schulz import COEFFICIENTS
from lightning_optim.optim.shared_options import SharedOptions

NEWTON_SCHULZ_EPS = 1e-7  # `eps` is for the rows


class NorMuonRule(MuonRule):
    """The orthogonal matrix nearest to the momentum, its rows over a running root mean square."""

    state = ("momentum_buffer", "second_momentum_buffer")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """No momentum, and zero for each row."""
        lead, rows, _ = matrix_shape(param, group)
        return super().init_state(param, group) | {"second_momentum_buffer": param.new_zeros(*lead, rows, 1)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """As for Muon, and how much of the newest squares the rows take in."""
        return super().scalars(group, step) | {"one_minus_beta2": 1 - group["beta2"]}

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """See `TensorRule.update`."""
        buffers, directions = directions_of(grads, states, scalars, groups, NEWTON_SCHULZ_EPS)
        deltas, new_states = [], []
        for i, (grad, group, numbers) in enumerate(zip(grads, groups, scalars, strict=True)):
            direction = directions[i].to(grad.dtype)
            squares = direction.square().mean(-1, keepdim=True)
            rows = states[i]["second_momentum_buffer"].lerp(squares, numbers["one_minus_beta2"])
            normalized = direction / (rows.sqrt() + group["eps"])
            if group["adjust_lr_fn"] == "match_rms_adamw":
                size: Any = 0.2 * math.sqrt(direction.shape[-2:].numel())
            else:
                size = _norm(direction) * step_ratio(direction, group["adjust_lr_fn"])
            scale = numbers["lr"] * size / (_norm(normalized) + group["eps"])
            deltas.append(normalized.mul_(scale).reshape(grad.shape))
            new_states.append({"momentum_buffer": buffers[i], "second_momentum_buffer": rows})
        return deltas, new_states


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm of a matrix, or of each of a stack."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    return norm if matrix.dim() > 2 else norm.view(())


class NorMuon(HiddenMatrixOptimizer):
    """NorMuon: Muon whose neurons, the rows of each matrix, all move by similar amounts.

    With gradient G of a matrix of A rows and B columns:

        M ← μ·M + (1 − μ)·G,   N = (1 − μ)·G + μ·M   (N = M without Nesterov's momentum)
        O = N with its singular values brought close to 1, by Newton-Schulz iteration in bfloat16
        r ← β₂·r + (1 − β₂)·row means of O²,   U = O / (√r + ε)
        W ← (1 − lr·λ)·W
        W ← W − lr·√max(1, A/B)·‖O‖/‖U‖·U,   or with `match_rms_adamw`   W ← W − lr·0.2·√(A·B)/‖U‖·U

    As `pytorch_optimizer.NorMuon`: `original` is its ``update_scale="preserve_norm"``, the authors' code, and
    `match_rms_adamw` its `match_rms`, Algorithm 1 of the paper.

    Which parameters are hidden matrices, and what becomes of the others, is as for `Muon`.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate; a float or a one-element tensor.
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        momentum: μ in [0, 1); 0.95 remembers about twenty steps.
        beta2: β₂ in [0, 1), the decay rate of the rows' mean squares.
        nesterov: Look one step ahead.
        ns_coefficients: (a, b, c) of the iteration's quintic.
        eps: ε, added to the root mean square of rows, which is about 1/√B.
        ns_steps: Iterations, 1 to 99; five bring singular values to between about 0.7 and 1.2.
        adjust_lr_fn: How the step depends on the shape: None or `original`, or `match_rms_adamw`, an RMS of 0.2·lr,
            with which learning rate and weight decay tuned for AdamW fit, and so one lr fits all groups.
        flatten: What parameters of more than two dimensions are: True for kernels, flattened to output channels × the
            rest; False for stacks of matrices, such as experts, each orthogonalised by itself. None takes four and more
            dimensions for kernels and refuses three, which may be either; `muon_param_groups` looks at the modules.
        adamw_lr: Learning rate of the groups that go to AdamW; None for ``lr``.
        adamw_betas: Their betas; 0.95 rather than 0.999, as with Muon in language models.
        adamw_eps: Their ε.
        adamw_weight_decay: Their weight decay; None for ``weight_decay``.
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

    when_to_use = "As Muon, where some neurons would otherwise get most of the update."
    memory = "1 value and 1 per row (2 for what goes to AdamW)"
    paper = "https://arxiv.org/abs/2510.05491"
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
        """See `FusedOptimizer.rule`."""
        return NorMuonRule()
