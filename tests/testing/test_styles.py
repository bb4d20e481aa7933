"""Correct optimizers in other styles pass, and broken ones leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from lightning_optim.testing import check_optimizer
from lightning_optim.testing.subject import Subject, needs_closure
from tests.testing.correct import Correct, formula


class Noisy(Correct):
    """Draws random numbers from torch's generator at each step."""

    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return grad * (1 + 0.01 * torch.rand(grad.shape).to(grad.dtype))


class Twice(Correct):
    """Looks ahead, as SAM does, so that its step needs a closure, and calls it twice."""

    @torch.no_grad()
    def step(self, closure):  # type: ignore[override]
        loss = self.evaluate(closure)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in params:
            param.add_(param.grad.sign().to(param.dtype), alpha=1e-3)
        before = [p.grad.sign().to(p.dtype) for p in params]
        self.evaluate(closure)
        for param, way in zip(params, before, strict=True):
            param.sub_(way, alpha=1e-3)
        for group in self.param_groups:
            self.update_group(group, [p for p in group["params"] if p.grad is not None])
        return loss


class WithIntegers(Correct):
    def __init__(self, params, lr=1, weight_decay=0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def lr(self, group):
        return group["lr"] * 0.05


class Warm(Correct):
    """A rate that rises for some steps, whose number is a hyperparameter."""

    def __init__(self, params, lr=0.05, warmup=4):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.setdefault("warmup", warmup)
        self.defaults["warmup"] = warmup

    def update(self, group, param, grad):
        count = self.state[param].get("step", 0) + 1
        super().update({**group, "lr": group["lr"] * min(1.0, count / group["warmup"])}, param, grad)


class WithOthers(Correct):
    def __init__(self, params, lr=0.05, **others):
        super().__init__(params, lr=lr, **others)


@pytest.mark.parametrize("cls", [Noisy, WithIntegers, Warm, WithOthers])
def test_it_passes(cls):
    report = check_optimizer(cls, skip=["memory_flat", "descent_curved"])
    assert report.passed, str(report)


def test_a_step_that_needs_a_closure_gets_it_under_clipping():
    report = check_optimizer(Twice, only=["clipping", "monitor"])
    assert report.passed, str(report)
    optimizer = Twice([torch.nn.Parameter(torch.ones(2))])
    optimizer.step = lambda *args: None  # as schedulers and pipelines do
    assert needs_closure(optimizer)


def test_a_rate_of_one_is_a_rate():
    report = check_optimizer(WithIntegers, only=["state_groups", "lr_schedulers", "weight_decay"])
    assert [r.status for r in report.results] == ["passed"] * 3
    assert report.facts["weight decay"] == "decoupled, scaled by lr"


def test_named_arguments_beside_any_others_are_given():
    class Negative(WithOthers):
        def validate(self, lr):
            pass

    (failure,) = check_optimizer(Negative, only="negative_lr").failures
    assert failure.seen == "lr=-0.05 is accepted"
    assert not Subject(WithOthers, {"betas": (0.8, 0.9)}).has("betass")


@pytest.mark.parametrize(("momentum", "kind"), [(0.0, "L2, which is the same as decoupled here"), (0.9, "L2")])
def test_l2_under_momentum_is_not_decoupled(momentum, kind):
    facts = check_optimizer(torch.optim.SGD, lr=0.05, momentum=momentum, only="weight_decay").facts
    assert facts["weight decay"] == kind


def test_what_an_optimizer_sets_for_the_process_is_put_back():
    class Global(Correct):
        def write(self, param, value):
            super().write(param, value)
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)

    names = ["closures", "sparse_gradients"]
    try:
        failures = check_optimizer(Global, only=names, reference=formula).failures
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    assert not failures, "no_grad() around the step has put it back"


def test_an_optimizer_that_exits_fails_one_check():
    class Exits(Correct):
        def __deepcopy__(self, memo):
            raise SystemExit(3)

    (failure,) = check_optimizer(Exits, only="deepcopy").failures
    assert failure.seen.startswith("SystemExit: 3 (test_styles.py")
