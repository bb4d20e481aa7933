"""Learning rates named as such, where groups have peaks of their own: every group gets to just that rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as t

import lightning_optim as lo
from lightning_optim.core.durations import Horizon
from lightning_optim.schedules import (
    REX,
    WSD,
    Constant,
    Cooldown,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Polynomial,
    ReduceOnPlateau,
    Scheduler,
    Tanh,
    Warmup,
)
from lightning_optim.schedules.plateau import Plateau
from tests.schedules.cases import optimizer_of

PEAKS = (0.4, 0.02)


def _rates(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(final_lr=1e-3),
        Cosine(warmup=3, final_lr=1e-3),
        Polynomial(power=2, final_lr=1e-3),
        Exponential(final_lr=1e-3),
        REX(final_lr=1e-3),
        Tanh(final_lr=1e-3),
        OneCycle(final_lr=1e-3),
        OneCycle(three_phase=True, final_lr=1e-3),
        CosineRestarts(cycles=2, final_lr=1e-3),
        WSD(cooldown=Cooldown(5, "linear", final_lr=1e-3)),
        InverseSqrt(warmup=3, cooldown=Cooldown(5, final_lr=1e-3)),
    ],
    ids=lambda schedule: repr(schedule).split("(")[0] + ("3" if "three" in repr(schedule) else ""),
)
def test_all_groups_end_at_the_rate_named(schedule):
    optimizer = optimizer_of(*PEAKS)
    rates = _rates(optimizer, Scheduler(optimizer, schedule, Horizon(20)), 25)
    assert [max(of_group) for of_group in zip(*rates, strict=True)] == pytest.approx(PEAKS)
    for late in rates[20:]:
        assert late == pytest.approx([1e-3, 1e-3], rel=1e-14)


def test_a_cosine_to_a_rate_is_torchs():
    theirs, ours = optimizer_of(*PEAKS), optimizer_of(*PEAKS)
    expected = _rates(theirs, t.CosineAnnealingLR(theirs, 20, eta_min=1e-3), 21)
    for step, rates in enumerate(_rates(ours, Scheduler(ours, Cosine(final_lr=1e-3), Horizon(20)), 21)):
        assert rates == pytest.approx(expected[step], rel=1e-12)


def test_a_warmup_starts_at_the_rate_named():
    optimizer = optimizer_of(*PEAKS)
    scheduler = Scheduler(optimizer, Constant(warmup=Warmup(4, start_lr=0.01)), Horizon())
    assert _rates(optimizer, scheduler, 5) == [
        pytest.approx([0.01 + (peak - 0.01) * step / 4 for peak in PEAKS]) for step in range(5)
    ]


def test_a_late_group_follows_to_the_same_rate():
    optimizer = optimizer_of(0.4)
    scheduler = Scheduler(optimizer, Linear(final_lr=0.1), Horizon(10))
    _rates(optimizer, scheduler, 5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.125})
    optimizer.step()
    scheduler.step()
    rates = _rates(optimizer, scheduler, 5)
    assert rates[0] == pytest.approx([0.22, 0.14])  # of the peak 0.2, as 0.125 was of 0.25
    assert rates[-1] == pytest.approx([0.1, 0.1])


def test_the_rate_of_a_tensor_group_is_read_once(monkeypatch):
    rate = torch.tensor(0.4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = Scheduler(optimizer, Linear(final_lr=0.1), Horizon(10))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("waits for the device"))
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    monkeypatch.undo()
    assert float(rate) == pytest.approx(0.4 - 0.3 * 0.4)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Cosine(final=0.1, final_lr=1e-3), r"Cosine takes final=0.1.*or final_lr=0.001.*not both"),
        (lambda: Cooldown(5, final=0.1, final_lr=1e-3), r"Cooldown takes final=0.1.*not both"),
        (lambda: Warmup(5, start=0.1, start_lr=1e-3), r"Warmup takes start=0.1.*or start_lr=0.001.*not both"),
        (lambda: Linear(final_lr=-1.0), r"final_lr=-1.0 of Linear: must be a learning rate"),
        (lambda: Warmup(5, start_lr=float("nan")), r"start_lr=nan of Warmup"),
        (lambda: Warmup(5, "exponential", start_lr=0.0), r"start_lr=0 of an exponential warmup"),
        (lambda: Exponential(final_lr=0.0), r"final_lr=0 of Exponential"),
        (lambda: Cosine(final_lr=1e-3)(5, 10), r"names a learning rate.*for_peak"),
        (
            lambda: Scheduler(optimizer_of(0.4, 1e-4), Cosine(final_lr=1e-3), Horizon(9)),
            r"final_lr=0.001 is not below the peak learning rate of group 1, 0.0001",
        ),
        (
            lambda: Scheduler(optimizer_of(0.4), Constant(warmup=Warmup(4, start_lr=0.4)), Horizon(9)),
            r"start_lr of the warmup=0.4 is not below.*group 0, 0.4",
        ),
        (
            lambda: Scheduler(
                optimizer_of(0.4, momentum=0.9), Linear(), Horizon(9), {"momentum": Linear(final_lr=0.1)}
            ),
            r"names a learning rate, and is to drive momentum.*final",
        ),
        (
            lambda: lo.OptimizerFactory("adamw", lr=1e-3, schedules={"weight_decay": Cosine(final_lr=0.1)}),
            r"is to drive weight_decay",
        ),
        (lambda: lo.GradientClipping(1.0, schedule=Cosine(final_lr=0.1)), r"drive the limit of the gradients"),
    ],
)
def test_invalid_rates_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# Plateaus.


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"grace": 3}, {"cooldown": 3}),
        ({"threshold": 0.2, "threshold_mode": "abs"}, {"threshold": 0.2, "threshold_mode": "abs"}),
        ({"threshold": 0.2}, {"threshold": 0.2}),
        ({"min_lr": 0.015}, {"min_lr": 0.015}),
        ({"min_lr": [0.1, 0.001], "grace": 1}, {"min_lr": [0.1, 0.001], "cooldown": 1}),
        ({"min_lr": {"1": 0.003}}, {"min_lr": [0.0, 0.003]}),
        ({"eps": 0.01}, {"eps": 0.01}),
        ({"eps": 0.004, "min_lr": 0.01}, {"eps": 0.004, "min_lr": 0.01}),
    ],
    ids=repr,
)
def test_a_plateau_is_torchs_look_by_look(mode, ours, theirs):
    generator = torch.Generator().manual_seed(3)
    values = (torch.rand(60, generator=generator) + 0.05).tolist()
    other = optimizer_of(*PEAKS)
    reference = t.ReduceLROnPlateau(other, mode, 0.5, 2, **theirs)
    optimizer = optimizer_of(*PEAKS)
    scheduler = Scheduler(optimizer, ReduceOnPlateau(mode=mode, factor=0.5, patience=2, **ours), Horizon())
    for value in [*values[:30], float("nan"), float("inf"), *values[30:]]:
        reference.step(value)
        scheduler.observe(value)
        rates, expected = ([group["lr"] for group in o.param_groups] for o in (optimizer, other))
        assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[0] < PEAKS[0]


def test_a_plateau_with_a_warmup_from_start_lr_and_another_schedule_in_one_group():
    optimizer = optimizer_of(*PEAKS, 0.1)
    optimizer.param_groups[2] |= {"schedule": Linear(warmup=2, final_lr=0.01), "name": "own"}
    schedule = ReduceOnPlateau(warmup=Warmup(2, start_lr=0.01), factor=0.5, patience=0)
    scheduler = Scheduler(optimizer, schedule, Horizon(11))
    assert [rates[:2] for rates in _rates(optimizer, scheduler, 2)] == [[0.01, 0.01], pytest.approx([0.205, 0.015])]
    for _ in range(2):
        scheduler.observe(1.0)
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.01, 0.1])
    assert _rates(optimizer, scheduler, 10)[-1] == pytest.approx([0.2, 0.01, 0.01])


@pytest.mark.parametrize(("floor", "level", "reductions"), [(0.0, 1.0, 0), (0.0, 0.3 * 0.3 * 0.3, 3), (0.2, 0.2, 2)])
def test_a_plateaus_state_of_0_1_had_its_level(floor, level, reductions):
    plateau = Plateau(ReduceOnPlateau(factor=0.3, floor=floor))
    plateau.load_state_dict({"level": level, "best": 0.5, "bad": 2})
    assert (plateau.reductions, plateau.best, plateau.bad, plateau.grace) == (reductions, 0.5, 2, 0)
    assert plateau.level == pytest.approx(level)


def test_a_plateau_continues_from_its_state():
    def make():
        schedule = ReduceOnPlateau(factor=0.5, patience=0, grace=2, min_lr=[0.15, 0.0])
        return Scheduler(optimizer_of(*PEAKS), schedule, Horizon())

    scheduler = make()
    for value in (1.0, 1.0, 1.0):  # reduced once, and one of two looks of grace is left
        scheduler.observe(value)
    restored = make()
    restored.load_state_dict(scheduler.state_dict())
    for value in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        scheduler.observe(value)
        restored.observe(value)
        assert restored.get_last_lr() == scheduler.get_last_lr()
    assert restored.get_last_lr() == pytest.approx([0.15, 0.0025])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold_mode": "absolute"}, r"threshold_mode='absolute'.*'abs'"),
        ({"grace": -1}, r"grace=-1"),
        ({"min_lr": -0.1}, r"min_lr=-0.1"),
        ({"min_lr": [0.1, float("nan")]}, r"min_lr=\[0.1, nan\]"),
        ({"eps": float("inf")}, r"eps=inf"),
        ({"min_lr": [0.1]}, r"min_lr has 1 learning rates, but there are 2 groups"),
        ({"min_lr": {"hed": 0.1}}, r"min_lr names 'hed', which is not a group"),
    ],
)
def test_an_invalid_plateau_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        Scheduler(optimizer_of(*PEAKS), ReduceOnPlateau(**options), Horizon())
