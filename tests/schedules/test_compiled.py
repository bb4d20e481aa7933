"""A schedule is compiled once for a run; each step then evaluates it once, however many groups follow it."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.schedules import (
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    ReduceOnPlateau,
    Schedule,
    Scheduler,
    StepDecay,
)
from lightning_optim.schedules.live import LiveCurve
from tests.schedules.cases import CASES
from tests.schedules.runs import standing

RUN = Horizon(total_steps=60, steps_per_epoch=20)
CALLS: Counter[str] = Counter()


class Counted(Cosine):
    """Counts how often its shape is evaluated."""

    def shape(self, at):
        CALLS["shape"] += 1
        return super().shape(at)


class CountedPlateau(ReduceOnPlateau):
    def shape(self, at):
        CALLS["shape"] += 1
        return 1.0


@pytest.fixture
def calls(monkeypatch):
    CALLS.clear()
    parse = Duration.parse.__func__  # type: ignore[attr-defined]

    def counted(cls, value):
        CALLS["parse"] += 1
        return parse(cls, value)

    monkeypatch.setattr(Duration, "parse", classmethod(counted))
    return CALLS


def _optimizer(groups):
    return torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], **group} for group in groups], lr=0.5)


def _named(count, **options):
    return [{"name": f"group {index}", **options} for index in range(count)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_compiled_schedule_is_the_schedule(case):
    multiplier = case.schedule.over(RUN)
    values = [multiplier(step) for step in range(75)]
    assert values == [case.schedule(step, 60, 20) for step in range(75)]
    assert values == pytest.approx([case.expected(step, 60) for step in range(75)])


OWN = Counted()


@pytest.mark.parametrize(
    ("groups", "schedule", "schedules", "evaluations"),
    [
        (_named(40), Counted(warmup="5%"), {}, 1),
        (_named(40, lr=torch.tensor(0.5)), Counted(), {}, 1),
        (_named(40), Counted(final_lr=0.01), {}, 1),
        (_named(20, lr=0.5) + [{"lr": 0.1}] * 20, Counted(final_lr=0.01), {}, 2),  # two peaks, so two multipliers
        (_named(40, schedule=OWN), Counted(), {}, 2),
        (_named(40, schedule=Counted(final_lr=0.01)), Counted(final_lr=0.02), {}, 2),
        (_named(40), Counted(), {"weight_decay": Counted(final=2.0), "beta2": Counted(final=0.9)}, 3),
        (_named(40, schedule=OWN), OWN, {"momentum": OWN}, 1),
        (_named(40), CountedPlateau(patience=0), {}, 1),
    ],
    ids=["one", "tensors", "absolute", "two-peaks", "own", "own-absolute", "others", "one-for-all", "plateau"],
)
def test_a_step_evaluates_each_schedule_once_and_parses_nothing(calls, groups, schedule, schedules, evaluations):
    optimizer = _optimizer(groups)
    scheduler = Scheduler(optimizer, schedule, RUN, schedules)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    for _ in range(2 if isinstance(schedule, ReduceOnPlateau) else 0):
        scheduler.observe(1.0)
    before = [float(group["lr"]) for group in optimizer.param_groups]
    calls.clear()
    optimizer.step()
    scheduler.step()
    assert calls == {"shape": evaluations}
    assert isinstance(schedule, ReduceOnPlateau) or all(
        float(group["lr"]) < rate for group, rate in zip(optimizer.param_groups, before, strict=True)
    )


@pytest.mark.parametrize(
    "limit",
    [
        Linear(warmup="10%").over(RUN),
        InverseSqrt(5, 10, hold=2),  # called as it is, without a length
        LiveCurve(Cosine("1 epoch"), standing(RUN)),
    ],
    ids=["compiled", "called", "live"],
)
def test_nothing_of_ours_parses_a_duration_in_a_warm_step(calls, limit):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    rules = [
        lo.ParamGroupRule(name="later", pattern=r"^0\.", frozen_until="10%"),
        lo.ParamGroupRule(name="head", pattern=r"^2\.weight", schedule=StepDecay(every="20%")),
    ]
    decay = {"weight_decay": Linear(warmup="1 epoch", final=2.0)}
    factory = lo.OptimizerFactory(
        "adamw", lr=0.1, schedule=InverseSqrt("5%", "10%"), param_groups=rules, schedules=decay
    )
    optimizer, scheduler = factory.build(model, RUN)
    pipeline = lo.StepPipeline(optimizer, clip=GlobalNorm(1.0), clip_limit=limit)
    for step in range(30):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        if step == 0:
            calls.clear()
    assert not calls
    assert pipeline.counts().steps == 30


# A schedule of a user's own.


class Halving(Schedule):
    """Overrides the call, as one could before schedules were compiled."""

    def shape(self, at):
        raise AssertionError("never asked")

    def __call__(self, step, total_steps=None, steps_per_epoch=None):
        return 0.5**step


class Damped(Linear):
    """Wraps the call."""

    def __call__(self, step, total_steps=None, steps_per_epoch=None):
        return 0.5 * super().__call__(step, total_steps, steps_per_epoch)


class Compiled(Linear):
    """Overrides what compiles it."""

    def over(self, horizon):
        multiplier = super().over(horizon)
        return lambda step: 0.5 * multiplier(step)


class Both(Damped):
    """Overrides the one over the other."""

    def over(self, horizon):
        multiplier = super().over(horizon)
        return lambda step: 0.5 * multiplier(step)


class Squared(Linear):
    """Overrides the shape."""

    def shape(self, at):
        return super().shape(at) ** 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Halving(), lambda step: 0.5**step),
        (Damped(), lambda step: 0.5 * (1 - step / 60)),
        (Compiled(), lambda step: 0.5 * (1 - step / 60)),
        (Both(), lambda step: 0.25 * (1 - step / 60)),
        (Squared(), lambda step: (1 - step / 60) ** 2),
    ],
)
def test_what_a_subclass_overrides_is_what_happens(schedule, expected):
    optimizer = _optimizer([{}])
    scheduler = Scheduler(optimizer, schedule, RUN)
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * expected(step))
        assert schedule.over(RUN)(step) == pytest.approx(expected(step))
        if not isinstance(schedule, Both):
            assert schedule(step, 60, 20) == pytest.approx(expected(step))
        optimizer.step()
        scheduler.step()


# When it is compiled again.


def _rates(scheduler, steps=3):
    rates = []
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        rates += [scheduler.optimizer.param_groups[0]["lr"]]
    return rates


def test_another_length_or_another_schedule_is_compiled_anew():
    scheduler = Scheduler(_optimizer([{}]), Linear(), Horizon(total_steps=10))
    assert _rates(scheduler, 2) == pytest.approx([0.45, 0.4])
    scheduler.resolve(Horizon(total_steps=20))
    assert _rates(scheduler, 1) == pytest.approx([0.5 * 17 / 20])
    scheduler.resolve(Horizon(total_steps=40))
    assert _rates(scheduler, 1) == pytest.approx([0.5 * 36 / 40])
    scheduler.schedule = Constant()
    assert _rates(scheduler, 1) == [0.5]
    scheduler.schedule.cooldown = lo.schedules.Cooldown(20, "linear")
    scheduler.resolve(scheduler.horizon)
    assert _rates(scheduler, 25)[-1] == pytest.approx(0.25)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_continues_independently(duplicate):
    scheduler = Scheduler(_optimizer(_named(2, schedule=Linear(final_lr=0.1))), Linear(), Horizon(total_steps=10))
    _rates(scheduler)
    twin = duplicate(scheduler)
    next(iter(twin.group_schedules.values())).final_lr = 0.2
    twin.resolve(Horizon(total_steps=20))
    assert _rates(twin, 17)[-1] == pytest.approx(0.2)
    assert _rates(scheduler, 7)[-1] == pytest.approx(0.1)


def test_rates_of_a_new_group_may_be_asked_before_the_next_step():
    optimizer = _optimizer([{}])
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=10))
    _rates(scheduler, 5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})
    assert scheduler.get_lr() == pytest.approx([0.25, 0.1])
    _rates(scheduler, 1)
    assert math.isclose(optimizer.param_groups[1]["lr"], 0.08)


def test_a_learning_rate_is_no_multiplier():
    with pytest.raises(ValueError, match=r"names a learning rate.*for_peak"):
        Cosine(final_lr=1e-4).over(RUN)
