"""SOAP: which matrices have bases of their own, which dimensions are merged, and which have no basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.factory.plan import plan_groups


def soap_steps(weight: Tensor, grads: Sequence[Tensor], limit: int = 10_000) -> Tensor:
    """Algorithm 3 of the paper for one matrix, with refreshes in every second step and lr = 0.1."""

    def power(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        order = (basis * (gram @ basis)).sum(0).argsort(descending=True)
        return torch.linalg.qr((gram @ basis)[:, order].float())[0].to(gram.dtype), order

    rows, columns = weight.shape
    gram = [torch.zeros(size, size, dtype=weight.dtype) for size in (rows, columns)]
    basis = [torch.eye(size, dtype=weight.dtype) for size in (rows, columns)]
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        if t > 1:
            m = 0.95 * m + 0.05 * grad
            v = 0.95 * v + 0.05 * (basis[0].T @ grad @ basis[1]).square()
            k = t - 1
            direction = (basis[0].T @ m @ basis[1]) / (v.sqrt() + 1e-8)
            weight = weight - 0.1 * (1 - 0.95**k) ** 0.5 / (1 - 0.95**k) * basis[0] @ direction @ basis[1].T
        for i, product in enumerate((grad @ grad.T, grad.T @ grad)):
            if weight.shape[i] > limit:
                continue
            gram[i] = 0.95 * gram[i] + 0.05 * product
            if t == 1:
                basis[i] = torch.linalg.eigh(gram[i] + 1e-30 * torch.eye(len(product)))[1].flip(1)
            elif (t - 1) % 2 == 0:
                basis[i], order = power(gram[i], basis[i])
                v = v.index_select(i, order)
    return weight


def rows_of_heads(x: Tensor) -> list[Tensor]:
    """[2 heads, (q, k, v), 2 rows]."""
    return [x.reshape(2, 3, 2, -1)[:, i].reshape(4, -1) for i in range(3)]


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], Callable[[Tensor], list[Tensor]]]] = {
    "a stack": ((3, 4, 5), {"flatten": False}, list),
    "a stack of stacks": ((2, 2, 4, 3), {"flatten": False}, lambda x: list(x.flatten(0, 1))),
    "a kernel": ((4, 3, 2), {"flatten": True}, lambda x: [x.flatten(1)]),
    "thirds": ((12, 5), {"split": 3}, lambda x: list(x.split(4))),
    "grouped queries": ((12, 5), {"split": (6, 3, 3)}, lambda x: list(x.split([6, 3, 3]))),
    "columns": ((4, 6), {"split": 2, "split_dim": -1}, lambda x: list(x.split(3, 1))),
    "heads of q, k, v": ((12, 5), {"split": 3, "split_repeats": 2}, rows_of_heads),
    "gate and up of a stack": (
        (3, 8, 4),
        {"flatten": False, "split": 2},
        lambda x: [half for matrix in x for half in matrix.split(4)],
    ),
}


@pytest.mark.parametrize("limit", [10_000, 4])
@pytest.mark.parametrize("case", CASES)
def test_each_matrix_has_bases_of_its_own(case: str, limit: int) -> None:
    shape, settings, matrices_of = CASES[case]
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64)
    # The first Gram matrix must have full rank, or its eigenvectors are not unique.
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
    param = nn.Parameter(start.clone())
    optimizer = optim.SOAP(
        [param], lr=0.1, weight_decay=0.0, precondition_frequency=2, max_precondition_dim=limit, **settings
    )
    alone = [nn.Parameter(matrix.clone()) for matrix in matrices_of(start)]
    single = optim.SOAP(alone, lr=0.1, weight_decay=0.0, precondition_frequency=2, max_precondition_dim=limit)
    for grad in grads:
        param.grad = grad
        for other, of_other in zip(alone, matrices_of(grad), strict=True):
            other.grad = of_other.clone()
        optimizer.step()
        single.step()
    for found, other, *of_matrix in zip(
        matrices_of(param.detach()), alone, matrices_of(start), *map(matrices_of, grads), strict=True
    ):
        torch.testing.assert_close(found, other.detach(), rtol=0, atol=1e-5)  # QR runs in float32
        if of_matrix[0].shape[0] == of_matrix[0].shape[1]:
            torch.testing.assert_close(found, soap_steps(of_matrix[0], of_matrix[1:], limit), rtol=0, atol=1e-5)


def test_a_dimension_above_the_limit_has_no_basis_and_the_other_has() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(3, 20, dtype=torch.float64), [torch.randn(3, 20, dtype=torch.float64) for _ in range(6)]
    param = nn.Parameter(start.clone())
    optimizer = optim.SOAP([param], lr=0.1, weight_decay=0.0, precondition_frequency=2, max_precondition_dim=10)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    assert {"GG_0", "Q_0"} <= optimizer.state[param].keys()
    assert not {"GG_1", "Q_1"} & optimizer.state[param].keys()
    torch.testing.assert_close(param.detach(), soap_steps(start, grads, limit=10), rtol=0, atol=1e-5)


def test_one_matrix_of_a_stack_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(3, 4, 4), [torch.randn(3, 4, 4) for _ in range(4)]
    results = []
    for bad in (False, True):
        param = nn.Parameter(start.clone())
        optimizer = optim.SOAP([param], lr=0.1, flatten=False, precondition_frequency=2)
        for grad in grads:
            param.grad = grad.clone()
            if bad:
                param.grad[1] = torch.nan
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[0][[0, 2]], results[1][[0, 2]], rtol=0, atol=1e-6)
    assert results[1][1].isnan().all()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.conv = nn.Conv2d(4, 4, 3)


def test_the_factory_tells_stacks_from_kernels_and_the_plan_shows_both() -> None:
    experts = Experts()
    model = nn.ModuleDict({"experts": experts, "head": nn.Linear(4, 2)})
    optimizer, _ = lo.OptimizerFactory("soap", optimizer_kwargs={"max_precondition_dim": 5}).build(model)
    forms = {name: form for group in plan_groups(optimizer) for name, form in group.forms.items()}
    assert forms == {
        "experts.up": "stack of 3, each [4, 6], no basis for 6",
        "experts.conv.weight": "tensor [4, 4, 3, 3]",
        "head.weight": "matrix [2, 4]",
    }
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[experts.up]["Q_0"].shape == (3, 4, 4)
    other, _ = lo.OptimizerFactory("soap", optimizer_kwargs={"max_precondition_dim": 5}).build(model)
    other.load_state_dict(optimizer.state_dict())
    other.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": 2}, r"'w': its shape \(4, 6, 2\) may be a stack .* split=2 needs to know which. Set flatten=False"),
        ({"split": 5, "flatten": True}, r"4 rows cannot be cut by split=5"),
        ({"split": "auto"}, r"SOAP: Invalid split"),
        ({"flatten": 1}, r"SOAP: Invalid flatten=1: must be None, True or False"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.SOAP([("w", nn.Parameter(torch.randn(4, 6, 2)))], **settings)


def test_groups_by_the_rules_of_each_other_have_the_values_of_the_rule() -> None:
    weight = nn.Parameter(torch.randn(6, 2))
    (group,) = optim.SOAP([{"params": [weight], "rule": "muon"}]).param_groups
    assert group["split"] == "auto"
    (group,) = optim.Muon([{"params": [weight], "rule": "soap"}]).param_groups
    assert group["split"] is None
    with pytest.raises(ValueError, match=r"SOAP: Invalid split='auto'"):
        optim.Muon([{"params": [weight], "rule": "soap", "split": "auto"}])


@pytest.mark.parametrize("optimizer_class", [optim.LAMB, optim.LARS, optim.Adafactor])
def test_optimizers_of_whole_tensors_refuse_a_split(optimizer_class: Any) -> None:
    weight = nn.Parameter(torch.randn(6, 2))
    with pytest.raises(ValueError, match=r"split=3 of a group is not offered: its .* whole tensor"):
        optimizer_class([{"params": [weight], "split": 3}])
    optimizer_class([{"params": [weight], "split": None}])


def test_adafactor_factors_each_matrix_of_a_stack() -> None:
    torch.manual_seed(0)
    stack, grad = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    param = nn.Parameter(stack.clone())
    param.grad = grad
    optimizer = optim.Adafactor([param])
    optimizer.step()
    for i in range(2):
        torch.testing.assert_close(optimizer.state[param]["row_var"][i], grad[i].square().mean(1, keepdim=True))
        torch.testing.assert_close(optimizer.state[param]["col_var"][i], grad[i].square().mean(0, keepdim=True))
