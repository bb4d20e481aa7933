"""One step under observation: each way in which a step does nothing, or harm, is found, and nothing else is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import lightning_optim as lo
from lightning_optim.step.debug_report import DebugReport
from tests.optim.cases import assert_same


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module) -> None:
    torch.manual_seed(1)
    model(torch.randn(16, 4, dtype=next(model.parameters()).dtype)).square().mean().backward()


def plain(model: nn.Module, **settings: Any) -> SGD:
    return SGD(model.parameters(), **{"lr": 0.1, **settings})


class Step(SGD):
    """An optimizer whose step is a function of the parameters."""

    def __init__(self, model: nn.Module, update: Callable[[list[Any]], None], **settings: Any) -> None:
        super().__init__(model.parameters(), **{"lr": 0.1, **settings})
        self.update = update

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.update([param for group in self.param_groups for param in group["params"]])


def away(params: list[Any]) -> None:
    for param in params:
        param.add_(param.grad, alpha=0.1)


def in_gradient(params: list[Any]) -> None:
    for param in params:
        param.sub_(param.grad.mul_(0.1))


def elsewhere(params: list[Any]) -> None:
    for param in params:
        param.data = param - 0.1 * param.grad


def nothing(params: list[Any]) -> None:
    pass


def divided(params: list[Any]) -> None:
    for param in params:
        param.sub_(param.grad / 0)


def look(kind: str) -> DebugReport:
    """The report of a step that has the fault of that kind."""
    model = net()
    if kind == "another-model":
        optimizer: Optimizer = plain(net())
        backward(model)
        return lo.debug_step(optimizer, model=model)
    if kind == "replaced":
        optimizer = plain(model)
        model[2] = nn.Linear(8, 2)
        backward(model)
        return lo.debug_step(optimizer, model=model)
    if kind == "in-no-optimizer":
        optimizer = SGD(model[0].parameters(), lr=0.1)
        backward(model)
        return lo.debug_step(optimizer, model=model)
    if kind == "in-two-optimizers":
        backward(model)
        return lo.debug_step(plain(model), model=model, others=[SGD([model[2].weight], lr=1)])
    if kind == "closure-not-called":
        return lo.debug_step(Step(model, nothing), lambda: backward(model))
    if kind == "nothing-trainable":
        model.requires_grad_(False)
        return lo.debug_step(plain(model))
    if kind == "below-resolution":
        model.bfloat16()
        for param in model.parameters():
            param.data.fill_(1)
            param.grad = torch.full_like(param, 1e-3)
        return lo.debug_step(torch.optim.AdamW(model.parameters(), lr=1e-5))
    if kind == "below-resolution-float32":
        backward(model)
        return lo.debug_step(plain(model, lr=1e-9))
    if kind == "found-inf":
        backward(model)
        ours = lo.optim.SGD(model.parameters(), lr=0.1)
        ours.found_inf = torch.ones(())
        return lo.debug_step(ours)
    if kind == "update-too-small":
        model.double()
    if kind != "no-gradient":
        backward(model)
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    if kind == "gradient-not-finite":
        grads[0].view(-1)[0] = torch.nan
    if kind == "zero-gradient":
        for grad in grads:
            grad.zero_()
    if kind == "some-without-gradient":
        model[2].bias.grad = None
    made: dict[str, Callable[[], Optimizer]] = {
        "lr-zero": lambda: plain(model, lr=0.0),
        "not-moved": lambda: Step(model, nothing),
        "wrong-direction": lambda: Step(model, away),
        "gradient-changed": lambda: Step(model, in_gradient),
        "storage-replaced": lambda: Step(model, elsewhere),
        "weights-not-finite": lambda: Step(model, divided),
        "update-too-large": lambda: plain(model, lr=1e4),
        "update-too-small": lambda: plain(model, lr=1e-8),
        "mostly-decay": lambda: lo.optim.SGD(
            model.parameters(), lr=1e-3, weight_decay=100.0, weight_decay_kind="decoupled"
        ),
    }
    return lo.debug_step(made.get(kind, lambda: plain(model))(), model=model)


@pytest.mark.parametrize(
    "kind",
    [
        "another-model",
        "replaced",
        "in-no-optimizer",
        "in-two-optimizers",
        "closure-not-called",
        "nothing-trainable",
        "no-gradient",
        "some-without-gradient",
        "gradient-not-finite",
        "zero-gradient",
        "lr-zero",
        "found-inf",
        "not-moved",
        "below-resolution",
        "wrong-direction",
        "weights-not-finite",
        "gradient-changed",
        "storage-replaced",
        "update-too-large",
        "update-too-small",
        "mostly-decay",
    ],
)
def test_each_fault_is_found_by_its_name(kind: str) -> None:
    report = look(kind)
    follows = {
        "another-model": {"no-gradient"},
        "replaced": {"some-without-gradient"},
        "gradient-not-finite": {"weights-not-finite"},
        "zero-gradient": set(),
    }
    assert kind in report.kinds, str(report)
    assert set(report.kinds) - {kind} == follows.get(kind, set()), str(report)
    text = str(report)
    assert all(len(line) <= 80 for line in text.splitlines()), text
    finding = next(each for each in report.findings if each.kind == kind)
    assert finding.seen
    assert finding.advice
    harmless = kind in ("some-without-gradient", "found-inf")
    assert report.ok is harmless
    assert harmless or report.findings[0].seen in report.verdict


@pytest.mark.parametrize(
    "make",
    [
        lambda model: plain(model, momentum=0.9, weight_decay=0.1),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        lambda model: lo.optim.AdamW(model.parameters(), lr=1e-2),
        lambda model: lo.optim.Muon(lo.optim.muon_param_groups(model), lr=1e-2),
        lambda model: lo.optim.LAMB(model.parameters(), lr=1e-3, weight_decay=0.01),
        lambda model: torch.optim.Adafactor(model.parameters()),
        lambda model: lo.optim.Lion(model.parameters(), lr=1e-3, backend="reference"),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, maximize=True),
    ],
    ids=["sgd", "adamw", "ours", "muon", "lamb", "adafactor", "lion", "maximize"],
)
def test_a_good_step_is_taken_as_it_is_and_passes(make: Callable[[nn.Module], Optimizer]) -> None:
    models = [net(), net()]
    optimizers = [make(model) for model in models]
    reports = []
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            backward(model)
        optimizers[0].step()
        reports.append(lo.debug_step(optimizers[1], model=models[1]))
    assert_same(*(list(model.state_dict().values()) for model in models))
    assert_same(*(optimizer.state_dict() for optimizer in optimizers))
    assert [report.kinds for report in reports] == [[], [], []], str(reports[-1])
    assert "Nothing stands against training." in reports[0].verdict


@pytest.mark.parametrize("ours", [False, True])
def test_undone_it_changes_nothing_bit_for_bit(ours: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = (lo if ours else torch).optim.AdamW(model.parameters(), lr=1e-2)
    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        return loss

    for steps in range(2):
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
        given = [(param, param.grad, param.data_ptr()) for param in model.parameters()]
        report = lo.debug_step(optimizer, closure, model=model, undo=True)
        assert report.undone
        assert "and was put back" in report.verdict
        assert_same(before[0], (model.state_dict(), optimizer.state_dict()))
        assert torch.equal(before[1], torch.get_rng_state())
        for (param, grad, address), content in zip(given, grads, strict=True):
            assert param.grad is grad
            assert param.data_ptr() == address
            assert content is None or torch.equal(content, param.grad)
        assert len(hooked) == steps
        optimizer.step(closure)


def test_a_step_that_raises_is_put_back() -> None:
    model = net()
    backward(model)

    def half(params: list[Any]) -> None:
        params[0].zero_()
        raise RuntimeError("in the middle")

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="in the middle"):
        lo.debug_step(Step(model, half), undo=True)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("kind", ["l2", "decoupled"])
def test_the_share_of_decay_is_measured(kind: str) -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0))
    weight.grad = torch.full((2, 2), 1.0)
    optimizer = lo.optim.SGD([weight], lr=0.01, weight_decay=1.0, weight_decay_kind=kind)
    (row,) = lo.debug_step(optimizer).rows
    assert row.decay_share == pytest.approx(0.75)
    assert (row.update_norm, row.ratio) == pytest.approx((0.08, 0.08 / 6))
    assert row.against_grad == pytest.approx(1)


def test_rows_say_what_the_state_was_and_is() -> None:
    model = net()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "name": "first"}, {"params": model[2].parameters()}]
    )
    backward(model)
    lo.debug_step(optimizer)
    rows = lo.debug_step(optimizer).rows
    assert [(row.name, row.group, row.shape) for row in rows] == [
        ("first[0]", "first", (8, 4)),
        ("first[1]", "first", (8,)),
        ("group 1[0]", "1", (2, 8)),
        ("group 1[1]", "1", (2,)),
    ]
    assert {(row.step_before, row.step_after, row.state_after) for row in rows} == {
        (1.0, 2.0, ("step", "exp_avg", "exp_avg_sq"))
    }
    assert all(row.state_changed and row.grad == "fine" and row.lr == 1e-3 for row in rows)


def test_closures_that_are_called_again_are_judged_by_the_first_gradient() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    calls = []

    def closure() -> Any:
        calls.append(1)
        optimizer.zero_grad()
        backward(model)
        return torch.tensor(1.0)

    report = lo.debug_step(optimizer, closure, model=model)
    assert len(calls) > 1
    assert report.kinds == [], str(report)


def test_sparse_gradients_and_empty_tensors() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    empty = nn.Parameter(torch.zeros(0, 2))
    report = lo.debug_step(SGD([table.weight, empty], lr=0.1))
    assert [row.grad for row in report.rows] == ["sparse", "none"]
    assert report.rows[1].skipped == "it has no elements"
    assert report.ok


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"(?s)Invalid optimizer=.*must be a torch\.optim\.Optimizer"):
        lo.debug_step(net())


def test_a_rate_that_no_weight_can_follow_is_seen() -> None:
    report = look("below-resolution-float32")
    assert report.kinds == ["below-resolution"], str(report)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_divides_the_gradients_and_skips_an_overflow(unscaled):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    (row,) = lo.debug_step(optimizer, scaler=scaler).rows
    assert row.grad_norm == pytest.approx(2**0.5)
    assert row.update_norm == pytest.approx(0.1 * 2**0.5)
    scaler.update()
    weight.grad = torch.full((2,), float("inf"))
    scaler.scale(torch.ones(()))
    report = lo.debug_step(optimizer, scaler=scaler)
    assert report.rows[0].skipped == "a gradient is not finite: the step was skipped"
    assert "gradient-not-finite" in report.kinds
    scaler.update()
    assert scaler.get_scale() == 512


@pytest.mark.parametrize(("options", "told"), [({"undo": True}, "unscale_"), ({"closure": lambda: None}, "no closure")])
def test_what_a_scaler_cannot_do_is_refused(options, told):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=told):
        lo.debug_step(optimizer, scaler=torch.amp.GradScaler("cpu"), **options)


def test_the_verdict_of_a_skipped_step_gives_the_reason() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = lo.optim.SGD([weight], lr=0.1)
    optimizer.found_inf = torch.ones(())
    report = lo.debug_step(optimizer)
    assert report.ok
    assert report.verdict.endswith("did not move: found_inf is set: the step was skipped.")
