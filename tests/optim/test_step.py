"""The step pipeline's contract: divisor, skip, statistics, no host synchronisation, gradients untouched."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import optim
from lightning_optim.core.stats import STEP_SUMS
from tests.optim.cases import (
    BACKENDS,
    Case,
    Setting,
    assert_same,
    copies,
    each_kernel,
    give,
    gradients,
    groups_of,
    parameters,
    run,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each = pytest.mark.parametrize(("case", "setting"), each_kernel())


@each_backend
@each
def test_a_skipped_step_changes_nothing(case: Case, setting: Setting, backend: str) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **setting.arguments, backend=backend)
    run(optimizer, params, 3)
    before = deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.grad_scale = torch.tensor(math.inf)
    optimizer.collect_step_stats = True
    run(optimizer, params, 2, seed=9)
    assert_same(before, (optimizer.state_dict(), [p.detach() for p in params]))
    assert optimizer.step_stats is not None
    assert optimizer.step_stats.sums.isnan().all()


@each_backend
@each
def test_skipping_the_first_step_leaves_later_ones_as_if_it_had_not_been(
    case: Case, setting: Setting, backend: str
) -> None:
    first = parameters(case)
    second = copies(first)
    one = case.optimizer(first, **setting.arguments, backend=backend)
    other = case.optimizer(second, **setting.arguments, backend=backend)
    one.found_inf = torch.ones(())
    run(one, first, 1, seed=5)
    del one.found_inf
    run(one, first, 3)
    run(other, second, 3)
    assert_same(one.state_dict()["state"], other.state_dict()["state"])
    assert_same(first, second)


@each_backend
@pytest.mark.parametrize("per_tensor", [False, True])
@each
def test_gradients_are_divided_by_divisor_and_grad_scale(
    case: Case, setting: Setting, backend: str, per_tensor: bool
) -> None:
    first = parameters(case, torch.float64)
    second = copies(first)
    one = case.optimizer(groups_of(first, 0.1), **setting.arguments, backend=backend)
    other = case.optimizer(groups_of(second, 0.1), **setting.arguments, backend=backend)
    for grads in gradients(first, 3):
        give(first, grads)
        first[0].grad = None
        divisor = torch.arange(2.0, 1 + len(first)) if per_tensor else torch.tensor(3.0)
        one.divisor, one.grad_scale = divisor, torch.tensor([4.0])
        kept = [p.grad for p in first]
        values = [None if g is None else g.clone() for g in kept]
        one.step()
        assert all(p.grad is g for p, g in zip(first, kept, strict=True))
        assert all(v is None or torch.equal(v, g) for v, g in zip(values, kept, strict=True))
        scaled = [g / (4 * (divisor[i - 1] if per_tensor else divisor)) for i, g in enumerate(grads)]
        give(second, scaled)
        second[0].grad = None
        other.step()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@each_backend
@each
def test_nothing_is_read_on_the_host(case: Case, setting: Setting, backend: str) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **setting.arguments, backend=backend)
    optimizer.divisor, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.collect_step_stats = True
    (grads,) = gradients(params, 1)
    give(params, grads)
    with Operators() as operators:
        optimizer.step()
        optimizer.step()
    assert not {name for name in operators.seen if "_local_scalar_dense" in name or "nonzero" in name}


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each
def test_step_sums_are_what_independent_arithmetic_gives(
    case: Case, setting: Setting, backend: str, dtype: torch.dtype
) -> None:
    params = parameters(case, dtype, shapes=None if not case.elementwise else ((70001,), *case.shapes))
    optimizer = case.optimizer(groups_of(params, 0.1), **setting.arguments, backend=backend)
    run(optimizer, params, 2)
    params[1].grad = None
    for param in params[2:]:
        assert param.grad is not None
        param.grad.view(-1)[0] = 0.0
    active = [p for p in params if p.grad is not None]
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().double().clone() for p in active]
    states = [deepcopy({k: v.double() for k, v in optimizer.state[p].items()}) for p in active]
    optimizer.divisor = torch.tensor(2.0)
    optimizer.collect_step_stats = True
    optimizer.step()
    stats = optimizer.step_stats
    assert stats is not None
    assert stats.sums.shape == (len(active), len(STEP_SUMS))
    assert stats.sums.dtype == torch.float32
    assert stats.numel == tuple(p.numel() for p in active)
    assert stats.group_sizes == (len(params) // 2 - 1, len(params) - len(params) // 2)

    for i, param in enumerate(active):
        group, new = groups[id(param)], optimizer.state[param]
        rule = optimizer.rule_of(group)
        assert param.grad is not None
        grad = param.grad.double() / 2 * (-1 if group["maximize"] else 1)
        expected = dict.fromkeys(STEP_SUMS, math.nan)
        expected["param_sq"] = float((before[i] ** 2).sum())
        expected["update_sq"] = float(((param.detach().double() - before[i]) ** 2).sum())
        expected["zero_grad"] = float((grad == 0).sum())
        if rule.first_moment is not None:
            expected["grad_exp_avg"] = float((grad * states[i][rule.first_moment]).sum())
            expected["momentum_sq"] = float((states[i][rule.first_moment] ** 2).sum())
        if rule.second_moment is not None:
            old = {name: float(states[i][name]) for name in rule.scalar_state}
            numbers = rule.scalars(group, float(new.get("step", 1.0)), **old)
            root = new[rule.second_moment].double().sqrt() / numbers.get("bias_correction2_sqrt", 1.0)
            expected["grad_sq_over_exp_avg_sq"] = float((grad / root).nan_to_num().square().sum())
            expected["below_eps"] = float((root < group["eps"]).sum())
        got = dict(zip(STEP_SUMS, stats.sums[i].tolist(), strict=True))
        del got["decay_sq"], expected["decay_sq"]  # see test_weight_decay_kinds.py
        assert got == pytest.approx(expected, rel=2e-5 if dtype == torch.float64 else 1e-3, abs=1e-4, nan_ok=True)


def test_sums_are_the_same_every_time() -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        params = parameters(Case(optim.AdamW, torch.optim.AdamW, ()), shapes=((300_007,), (65536,), (5,)))
        optimizer = optim.AdamW(params)
        optimizer.collect_step_stats = True
        run(optimizer, params, 2)
        assert optimizer.step_stats is not None
        results.append(optimizer.step_stats.sums)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_a_divisor_of_the_wrong_shape_is_refused() -> None:
    params = [torch.ones(1, requires_grad=True) for _ in range(3)]
    optimizer = optim.AdamW(params)
    for param in params[:2]:
        param.grad = torch.ones(1)
    optimizer.divisor = torch.ones(3)
    with pytest.raises(ValueError, match=r"divisor has shape \(3,\), but must be \[\] or .*, \[2\]"):
        optimizer.step()


def test_operands_set_by_the_closure_are_honoured() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([param], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        optimizer.divisor = torch.tensor(2.0)
        return loss

    assert optimizer.step(closure) == 3.0
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


def test_works_under_grad_scaler() -> None:
    """Scaled gradients are unscaled inside the step, an overflow is skipped, and the scaler removes its attributes."""
    param = torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW([param], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 1.0):
        before = param.detach().clone()
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param.detach()) == (factor != 1.0)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    assert float(optimizer.state[param]["step"]) == 2.0


def test_a_group_may_have_a_rule_of_its_own() -> None:
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW(
        [{"params": [first]}, {"params": [second], "rule": "lion", "lr": 0.5}], lr=0.1, betas=(0.5, 0.6)
    )
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)  # Lion's own
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
    optimizer.collect_step_stats = True
    for param in (first, second):
        param.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[first]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[second]) == {"exp_avg"}
    assert optimizer.step_stats is not None
    assert optimizer.step_stats.sums.shape == (2, len(STEP_SUMS))
    assert torch.equal(second.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 0.01))
    fresh = optim.AdamW([{"params": [first]}, {"params": [second], "rule": "lion"}])
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_divisor_may_have_any_dtype(dtype: torch.dtype, backend: str) -> None:
    results = []
    for kind in (torch.float32, dtype):
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer = optim.SGD([parameter], lr=0.1, backend=backend)
        optimizer.divisor = torch.tensor(4.0, dtype=kind)
        optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)
