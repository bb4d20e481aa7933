"""The peak that `independent` and `corrected` weight decay refer to, whoever drives the learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from lightning_optim import optim
from lightning_optim.factory import OptimizerFactory
from lightning_optim.step.foreign_decay import ForeignDecay

STEPS, DECAY = 12, 0.1
KINDS = ("independent", "corrected")
each_kind = pytest.mark.parametrize("kind", KINDS)


def sequence(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.01, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


# Name: lr at construction, the scheduler, and the largest rate it reaches.
DRIVEN: dict[str, tuple[float, Callable[[Optimizer], Any], float]] = {
    "none": (0.1, lambda o: None, 0.1),
    "OneCycleLR": (1e-3, lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS, cycle_momentum=False), 0.1),
    "OneCycleLR below": (1.0, lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS, cycle_momentum=False), 0.1),
    "CosineAnnealingWarmRestarts": (0.1, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), 0.1),
    "LambdaLR": (0.1, lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)), 0.1),
    "SequentialLR": (0.1, sequence, 0.1),
    "ReduceLROnPlateau": (0.1, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1), 0.1),
}
# These say nothing of a peak before they reach it.
UNANNOUNCED: dict[str, tuple[float, Callable[[Optimizer], Any], float]] = {
    "CyclicLR": (1e-3, lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 4, cycle_momentum=False), 0.1),
    "CyclicLR from 0": (1.0, lambda o: lr_scheduler.CyclicLR(o, 0.0, 0.1, 4, cycle_momentum=False), 0.1),
    "LambdaLR": (1e-6, lambda o: lr_scheduler.LambdaLR(o, lambda step: 1e5 * (1 - abs(step - 5) / 6)), 0.1),
}


def decays(kind: str, rates: list[float], peaks: list[float], start: float = 1.0) -> list[float]:
    """What is left of a weight after each step that only decays it."""
    left = []
    for lr, peak in zip(rates, peaks, strict=True):
        start *= 1 - (lr / peak * DECAY if kind == "independent" else lr * lr / peak * DECAY if peak else 0.0)
        left.append(start)
    return left


def step(optimizer: Optimizer, weight: torch.Tensor, scheduler: Any, rates: list[float]) -> float:
    rates.append(float(optimizer.param_groups[0]["lr"]))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    if scheduler is not None:
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return weight.item()


def sgd(weight: torch.Tensor, kind: str, **arguments: Any) -> Any:
    return optim.SGD([weight], weight_decay=DECAY, weight_decay_kind=kind, **arguments)


@each_kind
@pytest.mark.parametrize("own", [True, False], ids=["ours", "torch"])
@pytest.mark.parametrize("name", DRIVEN)
def test_decay_refers_to_the_peak_that_the_scheduler_announces(name: str, kind: str, own: bool) -> None:
    lr, make, peak = DRIVEN[name]
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = sgd(weight, kind, lr=lr) if own else torch.optim.SGD([weight], lr=lr)
    scheduler = make(optimizer)
    if not own:
        ForeignDecay(optimizer, DECAY, kind)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = [step(optimizer, weight, scheduler, rates) for _ in range(STEPS)]
    assert left == pytest.approx(decays(kind, rates, [peak] * STEPS), rel=1e-12)
    assert left[-1] > (1 - DECAY) ** STEPS * 0.99


@each_kind
@pytest.mark.parametrize("name", UNANNOUNCED)
def test_a_peak_that_nobody_announces_is_the_largest_rate_so_far_and_that_is_said(name: str, kind: str) -> None:
    lr, make, peak = UNANNOUNCED[name]
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = sgd(weight, kind, lr=lr)
    scheduler = make(optimizer)
    rates: list[float] = []
    with pytest.warns(UserWarning, match=r"above the peak known so far.*give the group .*'peak_lr'") as told:
        left = [step(optimizer, weight, scheduler, rates) for _ in range(STEPS)]
    assert len(told) == 1
    peaks = [max(rates[: i + 1]) or 1.0 for i in range(STEPS)]
    assert max(rates) == pytest.approx(peak)
    assert left == pytest.approx(decays(kind, rates, peaks), rel=1e-12)


@each_kind
@pytest.mark.parametrize("name", [*DRIVEN, *UNANNOUNCED])
def test_a_peak_that_is_given_holds_whoever_drives_the_rate(name: str, kind: str) -> None:
    lr, make, _ = (DRIVEN | UNANNOUNCED)[name]
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    group = {"params": [weight], "peak_lr": 2.0}
    optimizer = optim.SGD([group], lr=lr, weight_decay=DECAY, weight_decay_kind=kind)
    scheduler = make(optimizer)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = [step(optimizer, weight, scheduler, rates) for _ in range(STEPS)]
    assert left == pytest.approx(decays(kind, rates, [2.0] * STEPS), rel=1e-12)


@each_kind
@pytest.mark.parametrize("name", [*DRIVEN, *UNANNOUNCED])
@pytest.mark.filterwarnings("ignore:.*above the peak", "ignore:Detected call of")
def test_a_resume_knows_the_peak(name: str, kind: str) -> None:
    lr, make, _ = (DRIVEN | UNANNOUNCED)[name]

    def start() -> tuple[Any, Any, Any]:
        weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = sgd(weight, kind, lr=lr)
        return weight, optimizer, make(optimizer)

    weight, optimizer, scheduler = start()
    rates: list[float] = []
    for _ in range(7):
        step(optimizer, weight, scheduler, rates)
    other, resumed, again = start()
    resumed.load_state_dict(optimizer.state_dict())
    if again is not None:
        again.load_state_dict(scheduler.state_dict())
    other.data.copy_(weight.data)
    left = [step(optimizer, weight, scheduler, rates) for _ in range(5)]
    assert [step(resumed, other, again, rates) for _ in range(5)] == left


def test_a_tensor_rate_and_one_that_somebody_writes_are_followed_too() -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = sgd(weight, "independent", lr=torch.tensor(0.1, dtype=torch.float64))
    rates: list[float] = []
    for lr in (0.01, 0.1):  # a warmup by hand: the rate at construction is the peak
        optimizer.param_groups[0]["lr"].fill_(lr)
        step(optimizer, weight, None, rates)
    assert weight.item() == pytest.approx((1 - 0.1 * DECAY) * (1 - DECAY))
    optimizer.param_groups[0]["lr"].fill_(0.4)
    with pytest.warns(UserWarning, match=r"SGD: lr=0.4 is above the peak"):
        step(optimizer, weight, None, rates)
    optimizer.param_groups[0]["lr"].fill_(0.1)
    step(optimizer, weight, None, rates)
    assert weight.item() == pytest.approx((1 - 0.1 * DECAY) * (1 - DECAY) ** 2 * (1 - DECAY / 4))


def test_a_scheduler_that_moves_its_peak_takes_the_decay_along() -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = sgd(weight, "independent", lr=0.1)
    group = optimizer.param_groups[0]
    rates: list[float] = []
    step(optimizer, weight, None, rates)
    for key in ("initial_lr", "max_lr"):
        for peak in (0.4, 0.05):
            group[key], group["lr"] = peak, peak / 2
            weight.data.fill_(1.0)
            assert step(optimizer, weight, None, rates) == pytest.approx(1 - DECAY / 2)


def test_the_rates_of_a_device_are_never_read_on_the_host() -> None:
    from lightning_optim.kernels.peak_lr import follow_peak

    group: dict[str, Any] = {"lr": torch.full((), 0.2, device="meta"), "peak_lr": 0.1, "peak_lr_from": None}
    assert not follow_peak(group)
    assert group["peak_lr"].device.type == "meta"
    group["lr"] = 0.3
    assert not follow_peak(group)


def test_a_resume_with_another_configuration_takes_its_peak() -> None:
    def build(max_lr: float) -> tuple[Any, Any]:
        return OptimizerFactory(
            optimizer="sgd",
            lr=1e-3,
            weight_decay=DECAY,
            optimizer_kwargs={"weight_decay_kind": "independent"},
            schedule=lambda o: lr_scheduler.OneCycleLR(o, max_lr, STEPS, cycle_momentum=False),
            on_resume="config",
        ).build(torch.nn.Linear(3, 2, bias=False))

    optimizer, scheduler = build(0.1)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    resumed, again = build(0.2)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    resumed.step()
    (group,) = resumed.param_groups
    assert (group["peak_lr"], group["lr"]) == (0.2, pytest.approx(2 * optimizer.param_groups[0]["lr"]))
