"""Muon: orthogonalised momentum."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.kernels.matrix_rule import Like, MatrixRule, StepOnCpu
from lightning_optim.kernels.rules import Scalar, TensorRule
from lightning_optim.optim.hidden_matrices import HiddenMatrixOptimizer
from lightning_optim.optim.matrix_form import AUTO, MatrixForm, matrix_form
from lightning_optim.optim.matrix_scale import step_ratio
from lightning_optim.optim.muon_in_place import StepInPlace
from lightning_optim.optim.newton_schulz import orthogonalize_stack
from lightning_optim.optim.ns_coefficients import COEFFICIENTS, Coefficients, iterations
from lightning_optim.optim.shared_options import SharedOptions


class MuonRule(MatrixRule):
    """Muon's update: the orthogonal matrix nearest to the momentum."""

    state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    local_state: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    compressible: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}
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
        try:
            matrix_form(param, group)
        except ValueError as error:
            return str(error)
        return None

    def form(self, param: Tensor, group: Mapping[str, Any]) -> str:
        """Implement `Rule.form`."""
        kernel = "kernel as " if param.dim() > 2 and group["flatten"] is not False else ""
        return f"{kernel}{matrix_form(param, group)}"

    def together(self, param: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return a key that is equal for matrices of one shape with equal settings."""
        settings = (iterations(group["ns_coefficients"], group["ns_steps"]), group["eps"])
        return matrix_form(param, group).shapes, settings

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros."""
        return {"momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Learning rate and momentum."""
        return {"lr": group["lr"], "momentum": group["momentum"], "one_minus_momentum": 1 - group["momentum"]}

    def cost(self, param: Tensor, group: Mapping[str, Any]) -> float:
        """Return the multiplications and additions of the iterations."""
        return float(group["ns_steps"] * matrix_form(param, group).products)

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
        """Implement `MatrixRule.whole`: return O, and the factors of its pieces if they differ."""
        results: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        orthogonal = self.orthogonalized(tensors, groups, groups[0]["eps"])
        for (form, pieces), numbers, group in zip(orthogonal, scalars, groups, strict=True):
            result = {"direction": form.put(pieces)}
            ratios = _ratios(form, group["adjust_lr_fn"])
            if len(ratios) > 1:
                line = form.of_line
                factors = [
                    numbers["lr"].new_full((*piece.shape[:-2], *shape), ratio)
                    for piece, shape, ratio in zip(pieces, line.shapes, ratios, strict=True)
                ]
                result["ratio"] = line.put(factors)
            results.append((result, {}))
        return results

    def on_cpu(self, batch: Any, columns: Mapping[str, Tensor], rows: Sequence[int]) -> StepOnCpu | None:
        """Implement `MatrixRule.on_cpu`, with what `sent_dtype` is unless a test changes it."""
        step = StepInPlace(batch, columns, rows, batch.groups[0]["eps"])
        return step if self.sent_dtype is torch.bfloat16 and step.fits() else None

    def orthogonalized(
        self, tensors: Iterable[Tensor], groups: Sequence[Mapping[str, Any]], eps: float
    ) -> list[tuple[MatrixForm, list[Tensor]]]:
        """Return the form of each N, and O of each of its matrices, in `sent_dtype`, as `MatrixForm.take` cuts them.

        Args:
            tensors: N in the shapes of the parameters.
            groups: Parameter group of each; their matrices belong together.
            eps: Smallest norm that the Newton-Schulz iteration divides by.
        """
        forms: list[MatrixForm] = []

        def taken() -> Iterator[list[Tensor]]:
            for tensor, group in zip(tensors, groups, strict=True):
                forms.append(matrix_form(tensor, group))
                yield forms[-1].take(tensor)

        schedule = iterations(groups[0]["ns_coefficients"], groups[0]["ns_steps"])
        # Each has as many pieces (`together`), and shapes at one place are alike. One piece needs no second list.
        split = groups[0].get("split")
        if split is None or isinstance(split, str):
            single = (matrices for (matrices,) in taken())
            directions = orthogonalize_stack(single, schedule, eps, self.sent_dtype)
            return [(form, [direction]) for form, direction in zip(forms, directions, strict=True)]
        places = list(zip(*taken(), strict=True))
        done = [orthogonalize_stack(matrices, schedule, eps, self.sent_dtype) for matrices in places]
        return [(form, list(pieces)) for form, pieces in zip(forms, zip(*done, strict=True), strict=True)]

    def returned(self, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Like]:
        """Implement `MatrixRule.returned`."""
        result: dict[str, Like] = {"direction": (tuple(param.shape), self.sent_dtype)}
        form = matrix_form(param, group)
        if len(_ratios(form, group["adjust_lr_fn"])) > 1:
            result["ratio"] = (line_shape(param, form), dtype)
        return result

    def after(
        self,
        results: Sequence[dict[str, Tensor]],
        params: Sequence[Tensor],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> Iterator[Tensor]:
        """Implement `MatrixRule.after`: yield O times the learning rate for its shape."""
        for result, param, numbers, group in zip(results, params, scalars, groups, strict=True):
            ratio: Any = result.get("ratio")
            if ratio is None:
                ratio = _ratios(matrix_form(param, group), group["adjust_lr_fn"])[0]
            step_size = numbers["lr"] * ratio
            rows_first = result["direction"].to(step_size.dtype, memory_format=torch.contiguous_format)
            yield rows_first.mul_(step_size)


def line_shape(param: Tensor, form: MatrixForm) -> tuple[int, ...]:
    """Return the shape of one number for each line, row or column, along which ``param`` is cut; 1 elsewhere."""
    rows = form.dim == -2
    if form.lead:
        return (*param.shape[:-1], 1) if rows else (*param.shape[:-2], 1, param.shape[-1])
    return (param.shape[0], *(1,) * (param.dim() - 1)) if rows else (1, *param.shape[1:])


@lru_cache(maxsize=4096)
def _ratios(form: MatrixForm, adjust_lr_fn: str | None) -> tuple[float, ...]:
    """Return the factors of the learning rate of each piece; a single one if they are equal."""
    ratios = [step_ratio(rows, columns, adjust_lr_fn) for rows, columns in form.shapes]
    return tuple(ratios) if len(set(ratios)) > 1 else (ratios[0],)


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
        ns_coefficients: Coefficients of the iteration's quintics: `keller`, `polar_express` or `you`
            (`lightning_optim.optim.NS_COEFFICIENTS`, with sources); (a, b, c) for all iterations, the default, which is
            `keller`'s and torch's; or a list of triples, one per iteration, whose last one is repeated.
        eps: Smallest norm of N that is divided by.
        ns_steps: Iterations, 1 to 99; five bring singular values to between about 0.7 and 1.2.
        adjust_lr_fn: Factor of the step for the shape of the matrix: None, `original` or `keller`, √max(1, A/B);
            `match_rms_adamw`, 0.2·√max(A, B), which suits learning rate and weight decay tuned for AdamW (the second
            paper), so that one lr suits all groups; `spectral` or `spectral_unclamped`, √(A/B) (the third paper).
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
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM Training, 2025,
        https://arxiv.org/abs/2502.16982 (`match_rms_adamw`); Yang et al., A Spectral Condition for Feature Learning,
        2023, https://arxiv.org/abs/2310.17813 (`spectral`)

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
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
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
        return MuonRule()
