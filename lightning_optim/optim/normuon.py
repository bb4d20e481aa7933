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
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.matrix_rule import Like, StepOnCpu
from lightning_optim.kernels.rules import Scalar, TensorRule
from lightning_optim.optim.hidden_matrices import HiddenMatrixOptimizer
from lightning_optim.optim.matrix_form import AUTO, matrix_form
from lightning_optim.optim.matrix_scale import step_ratio
from lightning_optim.optim.muon import MuonRule, line_shape
from lightning_optim.optim.muon_in_place import StepInPlace
from lightning_optim.optim.ns_coefficients import COEFFICIENTS, Coefficients
from lightning_optim.optim.shared_options import SharedOptions

NEWTON_SCHULZ_EPS = 1e-7  # The argument `eps` is that of the rows.
SMALLEST_EPS = 1e-16
"""Smallest ε: with zero, rows without a gradient would be 0/0. Its square is a number of float32."""


class NorMuonRule(MuonRule):
    """NorMuon's update: Muon's orthogonal matrix with each row divided by its running root mean square."""

    state = ("momentum_buffer", "second_momentum_buffer")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros, and a mean square of zero for each row of each piece."""
        of_rows = matrix_form(param, group).of_rows
        rows = param.new_zeros(*of_rows.lead, of_rows.rows, of_rows.columns)
        return super().init_state(param, group) | {"second_momentum_buffer": rows}

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
        """Implement `MatrixRule.whole`: return O, and the factors of its rows."""
        results = []
        orthogonal = self.orthogonalized(tensors, groups, NEWTON_SCHULZ_EPS)
        for (form, pieces), state, group, numbers in zip(orthogonal, states, groups, scalars, strict=True):
            means, factors = [], []
            for piece, old in zip(pieces, form.of_rows.take(state["second_momentum_buffer"]), strict=True):
                mean, factor = _row_factors(piece.to(numbers["lr"].dtype), old, numbers, group)
                means.append(mean)
                factors.append(factor if form.dim == -2 else factor.expand_as(piece))
            line = form.of_line if form.dim == -2 else form
            result = {"direction": form.put(pieces), "factor": line.put(factors)}
            results.append((result, {"second_momentum_buffer": form.of_rows.put(means)}))
        return results

    def on_cpu(self, batch: Any, columns: Mapping[str, Tensor], rows: Sequence[int]) -> StepOnCpu | None:
        """Implement `MatrixRule.on_cpu`, for groups that agree on the scale of steps."""
        alike = len({group["adjust_lr_fn"] for group in batch.groups}) == 1
        step = _StepInPlace(batch, columns, rows)
        return step if alike and self.sent_dtype is torch.bfloat16 and step.fits() else None

    def returned(self, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Like]:
        """Implement `MatrixRule.returned`."""
        form = matrix_form(param, group)
        shape = line_shape(param, form) if form.dim == -2 else tuple(param.shape)
        return {"direction": (tuple(param.shape), self.sent_dtype), "factor": (shape, dtype)}

    def after(
        self,
        results: Sequence[dict[str, Tensor]],
        params: Sequence[Tensor],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Iterator[Tensor]:
        """Implement `MatrixRule.after`: yield O times the factors of its rows."""
        for result in results:
            yield (result["direction"].to(result["factor"].dtype) * result["factor"]).contiguous()


class _StepInPlace(StepInPlace):
    """A step of matrices that belong together, with the mean squares of the rows of all of them at once."""

    is_shared = False  # An owner sends factors and means of the rows as well.

    def __init__(self, batch: Batch, columns: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        super().__init__(batch, columns, rows, NEWTON_SCHULZ_EPS)
        self._states = [state["second_momentum_buffer"] for state in batch.states]
        self._row_numbers = {name: columns[name][rows].float() for name in ("lr", "one_minus_beta2")}
        self._old: list[list[Tensor]] = []
        self._new: list[list[Tensor]] = []

    def step(self) -> None:
        """Implement `StepOnCpu`."""
        of_rows = [form.of_rows for form in self._forms]
        self._old = [form.take(state.float()) for form, state in zip(of_rows, self._states, strict=True)]
        self._new = [[] for _ in of_rows]
        super().step()
        for form, state, means in zip(of_rows, self._states, self._new, strict=True):
            state.copy_(form.put(means).view(state.shape))

    def _row_steps(self, number: int, directions: list[Tensor]) -> Tensor:
        old = [pieces[number] for pieces in self._old]
        counts = [len(piece) if piece.dim() == 3 else 1 for piece in old]
        sizes = list(map(len, directions))
        many = torch.tensor(counts, device="cpu")
        numbers = {name: value.repeat_interleave(many)[:, None, None] for name, value in self._row_numbers.items()}
        parts = {name: value.split_with_sizes(sizes) for name, value in numbers.items()}
        before = torch.cat([piece.reshape(-1, *piece.shape[-2:]) for piece in old]).split_with_sizes(sizes)
        means, factors = [], []
        for i, stack in enumerate(directions):
            own = {name: values[i] for name, values in parts.items()}
            mean, factor = _row_factors(stack.float(), before[i], own, self._groups[0])
            means.append(mean)
            factors.append(factor)
        after = torch.cat(means).split_with_sizes(counts)
        for kept, piece, mean in zip(self._new, old, after, strict=True):
            kept.append(mean.view(piece.shape))
        return torch.cat(factors).flatten(1)


def _row_factors(
    direction: Tensor, old: Tensor, numbers: Mapping[str, Tensor], group: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the new mean squares of the rows of O, and what each row is multiplied by, [..., rows, 1] each."""
    rows, columns = direction.shape[-2:]
    mean = old.lerp(direction.square().mean(-1, keepdim=True), numbers["one_minus_beta2"])
    eps = max(group["eps"], SMALLEST_EPS)
    divisor = mean.sqrt() + eps
    if group["adjust_lr_fn"] == "match_rms_adamw":
        size: Any = 0.2 * math.sqrt(rows * columns)
    else:
        size = _norm(direction) * step_ratio(rows, columns, group["adjust_lr_fn"])
    scale = numbers["lr"] * size / (_norm(direction / divisor) + eps)
    return mean, scale / divisor


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
        ns_coefficients: Coefficients of the iteration's quintics: `keller`, `polar_express` or `you`
            (`lightning_optim.optim.NS_COEFFICIENTS`, with sources); (a, b, c) for all iterations, the default, which is
            `keller`'s and torch's; or a list of triples, one per iteration, whose last one is repeated.
        eps: ε, added to the root mean square of rows, which is about 1/√B.
        ns_steps: Iterations, 1 to 99; five bring singular values to between about 0.7 and 1.2.
        adjust_lr_fn: Factor of the step for the shape of the matrix: None, `original` or `keller`, √max(1, A/B);
            `match_rms_adamw`, an RMS of 0.2·lr, which suits learning rate and weight decay tuned for AdamW, so that one
            lr suits all groups; `spectral` or `spectral_unclamped`, √(A/B).
        flatten: Meaning of parameters with more than two dimensions: True for convolution kernels, flattened to output
            channels × the rest; False for stacks of matrices, such as experts, each orthogonalised separately. None
            treats four and more dimensions as kernels and refuses three, which are ambiguous; `muon_param_groups`
            inspects the modules.
        split: Pieces of a fused projection, each orthogonalised separately and scaled by its own shape: a number of
            equal blocks, such as 3 for query, key and value; a list of sizes, such as (1024, 256, 256) with grouped
            queries; None for whole matrices. With `auto`, projections that `muon_param_groups` has found, or the
            constructor by their names, have a `split` of their own, and others are whole. A number or sizes must fit
            every matrix, so they are usually given per group.
        split_dim: Dimension that is split: -2 for the rows of each matrix (the outputs of `nn.Linear`), -1 for its
            columns; or counted from 0 as the dimensions of the parameter.
        split_repeats: How often the blocks are repeated, as in [heads, 3, head size]; blocks of the same place form one
            matrix.
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
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-10,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool | None = None,
        split: int | Sequence[int] | str | None = AUTO,
        split_dim: int = -2,
        split_repeats: int = 1,
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
                "split": split,
                "split_dim": split_dim,
                "split_repeats": split_repeats,
            },
            {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay},
            **options,
        )

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> TensorRule:
        """Implement `FusedOptimizer.rule`."""
        return NorMuonRule()
