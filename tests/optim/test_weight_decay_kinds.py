"""Every kind of weight decay that acts beside the update, on every optimizer, against arithmetic of its own.

What an optimizer would do without decay is taken from a twin that is given its weights and state before every step.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.core.stats import STEP_SUMS
from tests.optim.cases import BACKENDS, CASES, Case, copies, give, gradients, parameters, run

LR, WEIGHT_DECAY, STEPS = 0.02, 0.3, 4
KINDS = ("l1", "l2_sp", "cautious", "norm")


def expected(kind: str, before: Tensor, moved: Tensor, first: Tensor, c: float) -> Tensor:
    """The weight after a step from ``before`` that without decay would have ended at ``moved``."""
    if kind == "l1":
        return moved.sign() * (moved.abs() - c).clamp(min=0)
    if kind == "l2_sp":
        return moved - c * (before - first)
    if kind == "cautious":
        return moved - c * before * ((before - moved) * before >= 0)
    return moved * (WEIGHT_DECAY / moved.square().mean().sqrt())


def options(case: Case) -> dict[str, Any]:
    name = case.optimizer.__name__
    return (
        {"lr": LR}
        | ({"always_adapt": True} if name in ("LAMB", "LARS") else {})
        | ({"d0": 1.0} if name == "Prodigy" else {})
    )


def coefficient(case: Case, optimizer: optim.FusedOptimizer, step: int) -> float:
    """lr·λ; nothing at a first step that only takes measure."""
    if case.optimizer.__name__ in ("ADOPT", "SOAP") and step == 0:
        return 0.0
    scale = float(optimizer.param_groups[0]["d"]) if case.optimizer.__name__ == "Prodigy" and step else 1.0
    return LR * WEIGHT_DECAY * scale


def stability(case: Case, grad: Tensor, state: dict[str, Any]) -> float:
    """By what StableAdamW divides its steps."""
    if case.optimizer is not optim.StableAdamW:
        return 1.0
    return max(1.0, (grad.square() / state["exp_avg_sq"]).nan_to_num(0).mean().sqrt().item())


OF_EACH_SORT = (
    optim.AdamW,
    optim.SGD,
    optim.LAMB,
    optim.StableAdamW,
    optim.Prodigy,
    optim.Adan,
    optim.Muon,
    optim.SOAP,
)


def everything() -> list[Any]:
    """Each optimizer on each backend; compiling kernels for all of them takes a minute."""
    cases = [case for case in CASES if case.optimizer is not optim.ScheduleFreeAdamW]
    return [
        pytest.param(
            case,
            backend,
            id=f"{case.optimizer.__name__}-{backend}",
            marks=[] if backend == "reference" or case.optimizer in OF_EACH_SORT else [pytest.mark.slow],
        )
        for case in cases
        for backend in BACKENDS
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "backend"), everything())
def test_each_kind_on_each_optimizer(case: Case, kind: str, backend: str) -> None:
    params = parameters(case, torch.float64)
    optimizer = case.optimizer(
        params, weight_decay=WEIGHT_DECAY, weight_decay_kind=kind, backend=backend, **options(case)
    )
    first = [p.detach().clone() for p in params]
    for step, grads in enumerate(gradients(params, STEPS)):
        before = [p.detach().clone() for p in params]
        twins = copies(params)
        twin = case.optimizer(twins, weight_decay=0.0, backend=backend, **options(case))
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group["weight_decay"] = 0.0
        twin.load_state_dict(saved)
        c = coefficient(case, optimizer, step)
        # Kernels that collect sums are further ones to compile.
        optimizer.collect_step_stats = step > 1 and (backend == "reference" or case.optimizer is optim.AdamW)
        give(params, grads)
        give(twins, grads)
        optimizer.step()
        twin.step()
        for was, param, moved, start in zip(before, params, twins, first, strict=True):
            if c or kind != "norm":
                own = c / stability(case, moved.grad, twin.state[moved])
                wanted = expected(kind, was, moved.detach(), start, own)
                torch.testing.assert_close(param.detach(), wanted, rtol=1e-10, atol=1e-12)
        if optimizer.collect_step_stats and case.optimizer is not optim.StableAdamW:  # whose twin divides otherwise
            parts = [(param - moved).detach().square().sum() for param, moved in zip(params, twins, strict=True)]
            sums = optimizer.step_stats.sums[:, STEP_SUMS.index("decay_sq")].double()
            torch.testing.assert_close(sums, torch.stack(parts), rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("kind", ["decoupled", *KINDS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_measured_is_bit_for_bit_one_that_is_not(kind: str, backend: str) -> None:
    finals = []
    for collect in (False, True):
        torch.manual_seed(0)
        weight = torch.randn(5000, requires_grad=True)
        optimizer = optim.AdamW([weight], lr=LR, weight_decay=WEIGHT_DECAY, weight_decay_kind=kind, backend=backend)
        for _ in range(3):
            weight.grad = torch.randn(5000)
            optimizer.collect_step_stats = collect
            optimizer.step()
        finals.append(weight.detach())
    assert torch.equal(*finals)


@pytest.mark.parametrize("cautious", [False, True])
def test_norm_keeps_the_root_mean_square(cautious: bool) -> None:
    params = [torch.randn(30, 20, requires_grad=True), torch.randn(7, requires_grad=True)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = optim.AdamW(groups, lr=0.1, weight_decay=0.02, weight_decay_kind="norm", cautious=cautious)
    run(optimizer, params, 3)
    assert params[0].square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
    assert params[1].square().mean().sqrt().item() > 0.1  # a group without decay is left alone


def test_weights_of_zero_stay_finite_under_norm() -> None:
    weight = torch.zeros(5, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1, weight_decay=0.02, weight_decay_kind="norm")
    weight.grad = torch.zeros(5)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.zeros(5))


def test_l1_makes_exact_zeros() -> None:
    weight = torch.tensor([0.05, -0.05, 1.0], requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1, weight_decay=1.0, weight_decay_kind="l1")
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0, pytest.approx(0.9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.Muon])
def test_initial_weights_are_in_the_checkpoint(optimizer_class: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 4).to(dtype).requires_grad_()
    start = weight.detach().clone()
    arguments = {"lr": 0.1, "weight_decay": 0.5, "weight_decay_kind": "l2_sp"}
    optimizer = optimizer_class([weight], **arguments)
    run(optimizer, [weight], 3)
    resumed = weight.detach().clone().requires_grad_()
    other = optimizer_class([resumed], **arguments)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[resumed]["initial_param"], start)
    run(optimizer, [weight], 2)
    run(other, [resumed], 2)
    assert torch.equal(weight, resumed)


def test_low_precision_and_initial_weights_together() -> None:
    weight = torch.ones(5000).bfloat16().requires_grad_()
    optimizer = optim.AdamW(
        [weight], lr=1e-3, weight_decay=0.1, weight_decay_kind="l2_sp", kahan_sum=True, state_bits=8
    )
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    weight.data.mul_(2)  # away from where it was
    for _ in range(500):
        optimizer.step()
    kept = (weight.float() + 0).mean().item() - 1
    assert kept == pytest.approx((1 - 1e-4) ** 500, abs=4e-3)


def test_a_kind_that_a_rule_cannot_honour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay_kind='l1' is not offered.*decoupled"):
        optim.ScheduleFreeAdamW([torch.ones(2, requires_grad=True)], weight_decay=0.1, weight_decay_kind="l1")


def test_a_change_of_kind_between_steps_counts() -> None:
    weight = torch.full((3,), 2.0, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1, weight_decay=0.1, weight_decay_kind="decoupled")
    weight.grad = torch.zeros(3)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay_kind"] = "l1"
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 2.0 * 0.99 - 0.01))
