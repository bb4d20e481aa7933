"""What rules may ask of backends, whether or not an optimizer here does: sums, 0-d state, tensors, kinds of decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.kernels.base import Batch
from lightning_optim.kernels.rules import NAMED_FUNCTIONS, Scalar, TensorRule, UpdateRule, rebind, sqrt, where
from lightning_optim.kernels.scalars import _device_columns, _host_columns
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.adam import AdamRule
from lightning_optim.optim.batches import Batches
from tests.optim.cases import (
    BACKENDS,
    CASES,
    Case,
    Setting,
    assert_same,
    copies,
    each_setting,
    give,
    gradients,
    parameters,
    run,
)


def averaged(grad: Any, exp_avg: Any, beta: Any, one_minus_beta: Any) -> Any:
    return beta * exp_avg + one_minus_beta * grad


class TrustRatioRule(UpdateRule):
    """Momentum whose step is as long as the weights, with a count of its own."""

    state = ("exp_avg",)
    sums = ("param_sq", "direction_sq")
    scalar_state: ClassVar = {"travelled": 0.5}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        return {
            "lr": group["lr"] / sqrt(step),
            "beta": 0.9,
            "one_minus_beta": where(step == 1, 1.0, 0.1),
            "travelled": scalar_state["travelled"],
        }

    @staticmethod
    def sums_update(param: Any, grad: Any, exp_avg: Any, beta: Any, one_minus_beta: Any) -> Any:
        direction = averaged(grad, exp_avg, beta, one_minus_beta)
        return param * param, direction * direction

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        lr = scalars["lr"] * (sums["param_sq"] / sums["direction_sq"]).sqrt()
        return {"lr": lr, "travelled": scalars["travelled"] + lr}

    @staticmethod
    def update(param: Any, grad: Any, exp_avg: Any, lr: Any, beta: Any, one_minus_beta: Any) -> Any:
        exp_avg = averaged(grad, exp_avg, beta, one_minus_beta)
        return lr * exp_avg, exp_avg


class RowRule(TensorRule):
    """Steps of unit length per row, and a state of another shape."""

    state = ("row_norm",)

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"row_norm": torch.zeros(param.shape[0], dtype=torch.float32)}

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        return {"lr": group["lr"]}

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        norms = [grad.flatten(1).norm(dim=1) for grad in grads]
        deltas = [
            row["lr"] * (grad.flatten(1) / norm[:, None]).view_as(grad)
            for grad, norm, row in zip(grads, norms, scalars, strict=True)
        ]
        return deltas, [{"row_norm": state["row_norm"] + norm} for state, norm in zip(states, norms, strict=True)]


class Custom(FusedOptimizer):
    def __init__(self, params: Any, lr: float, rule: Any, *, weight_decay: float = 0.0, **flags: Any) -> None:
        self.custom_rule = rule
        defaults = {"lr": lr, "weight_decay": weight_decay, "weight_decay_kind": "decoupled"}
        backend = flags.pop("backend", "auto")
        super().__init__(params, {**defaults, "maximize": False, "cautious": False, **flags}, backend=backend)

    def rule_of(self, group: Mapping[str, Any]) -> Any:
        return self.custom_rule


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_may_depend_on_sums_over_each_tensor(backend: str) -> None:
    param = torch.randn(300, 7, dtype=torch.float64, requires_grad=True)
    w, m, travelled = param.detach().clone(), torch.zeros(300, 7, dtype=torch.float64), 0.5
    optimizer = Custom([param], 0.1, TrustRatioRule(), weight_decay=0.2, backend=backend)
    for t, (grad,) in enumerate(gradients([param], 5), start=1):
        give([param], [grad])
        optimizer.step()
        m = grad if t == 1 else 0.9 * m + 0.1 * grad
        lr = 0.1 / math.sqrt(t) * float(w.norm() / m.norm())
        w = w - 0.1 * 0.2 * w - lr * m
        travelled += lr
    torch.testing.assert_close(param.detach(), w, rtol=0, atol=1e-12)
    assert float(optimizer.state[param]["travelled"]) == pytest.approx(travelled, rel=1e-6)
    assert set(optimizer.state[param]) == {"step", "exp_avg", "travelled"}


@pytest.mark.parametrize("cautious", [False, True])
def test_a_tensor_rule_gets_decay_caution_skip_and_sums_from_outside(cautious: bool) -> None:
    param = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    before = param.detach().clone()
    optimizer = Custom([param], 0.1, RowRule(), weight_decay=0.2, cautious=cautious)
    (grads,) = gradients([param], 1)
    give([param], grads)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state[param]["row_norm"].any()
    optimizer.found_inf = torch.zeros(())
    optimizer.divisor = torch.tensor(2.0)
    optimizer.collect_step_stats = True
    optimizer.step()
    delta = 0.1 * grads[0] / grads[0].norm(dim=1, keepdim=True)
    if cautious:
        delta = delta * ((grads[0] != 0) / (grads[0] != 0).double().mean())
    torch.testing.assert_close(param.detach(), before * (1 - 0.02) - delta)
    torch.testing.assert_close(optimizer.state[param]["row_norm"].double(), grads[0].norm(dim=1) / 2, rtol=1e-6, atol=0)
    assert optimizer.step_stats is not None
    sums = optimizer.step_stats.groups("update_sq")
    assert float(sums[0]) == pytest.approx(float((param.detach() - before).square().sum()), rel=1e-6)


@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_numbers_computed_on_the_device_are_those_of_the_host(case: Case, setting: Setting) -> None:
    """`scalars` is written once; a device evaluates it on float64 tensors, because only it knows what was skipped."""
    params = parameters(case)
    optimizer = case.optimizer(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], **setting.arguments, backend="reference"
    )
    run(optimizer, params, 2)
    optimizer.state[params[1]].get("step", torch.zeros(())).fill_(7.0)
    for batch in Batches(optimizer).batches:
        host, device = _host_columns(batch), _device_columns(batch)
        assert set(host) == set(device)
        for name in host:
            torch.testing.assert_close(device[name], host[name], rtol=1e-13, atol=0)


def test_numbers_of_the_device_are_in_the_order_of_the_tensors() -> None:
    groups: list[dict[str, Any]] = [
        {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "peak_lr": 1.0}
        | {"weight_decay_kind": "decoupled"}
        for lr in (1.0, 2.0)
    ]
    tensors = [torch.zeros(1)] * 3
    steps = [{"step": torch.tensor(float(i))} for i in range(3)]
    states: list[dict[str, Tensor]] = [{}] * 3
    batch = Batch(AdamRule(), tensors, tensors, states, steps, [groups[0], groups[1], groups[0]], tensors, False)
    host, device = _host_columns(batch), _device_columns(batch)
    for name in host:
        torch.testing.assert_close(device[name], host[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.elementwise], ids=lambda c: c.optimizer.__name__)
def test_no_literal_makes_a_compiled_rule_compute_in_float64(case: Case) -> None:
    numba = pytest.importorskip("numba")
    from lightning_optim.kernels.cpu.memory import compiled, named_functions

    for setting in case.settings:
        group = case.optimizer.hyperparameters() | setting.arguments
        rule = case.optimizer.rule(group)
        assert isinstance(rule, UpdateRule)
        functions = [(rule.update, rule.update_scalars())]
        if rule.sums:
            functions.append((rule.sums_update, rule.sums_scalars()))
        for function, names in functions:
            bound = rebind(function, named_functions("float32"), compiled)
            bound.compile((numba.float32,) * (2 + len(rule.state) + len(names)))
            (signature,) = bound.nopython_signatures
            assert set(signature.return_type) == {numba.float32}


def test_a_rule_that_uses_more_than_the_named_functions_is_refused() -> None:
    def update(param: Any, grad: Any) -> Any:
        return (torch.tanh(grad),)

    with pytest.raises(TypeError, match=r"uses 'torch'.*sqrt"):
        rebind(update, dict.fromkeys(NAMED_FUNCTIONS, abs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "coefficient"),
    [("decoupled", 0.5 * 0.1), ("independent", 0.5 / 2 * 0.1), ("corrected", 0.5 * 0.5 * 0.1 / 2)],
)
def test_kinds_of_weight_decay(kind: str, coefficient: float, backend: str) -> None:
    for optimizer in (optim.AdamW, optim.Lion, optim.SGD):
        weight = torch.full((5,), 3.0, dtype=torch.float64, requires_grad=True)
        weight.grad = torch.zeros_like(weight)
        o = optimizer([weight], lr=2.0, weight_decay=0.1, weight_decay_kind=kind, backend=backend)
        o.param_groups[0]["lr"] = 0.5
        o.step()
        o.step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 3.0) * (1 - coefficient) ** 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_l2_is_the_same_as_adding_to_the_gradient(backend: str) -> None:
    first = [torch.randn(9, dtype=torch.float64, requires_grad=True)]
    second = copies(first)
    one = optim.AdamW(first, weight_decay=0.3, weight_decay_kind="l2", backend=backend)
    other = optim.AdamW(second, weight_decay=0.0, backend=backend)
    for (grad,) in gradients(first, 4):
        give(first, [grad])
        give(second, [grad + 0.3 * second[0].detach()])
        one.step()
        other.step()
    torch.testing.assert_close(first[0], second[0], rtol=1e-13, atol=1e-13)


def test_peak_lr_follows_a_group_into_a_checkpoint() -> None:
    weight = [torch.ones(1, requires_grad=True)]
    first = optim.AdamW(weight, lr=2.0)
    first.param_groups[0]["lr"] = 0.1
    second = optim.AdamW(weight, lr=0.5)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["peak_lr"] == 2.0
    assert_same(first.state_dict(), second.state_dict())
