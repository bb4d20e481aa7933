"""Runs whose length changes, in a plain loop; and schedulers without a length."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.schedules import Constant, Cosine, Linear, MultiStepDecay, Scheduler
from lightning_optim.schedules.clock import RunClock
from lightning_optim.schedules.live import LiveCurve
from tests.schedules.cases import optimizer_of
from tests.schedules.runs import LoopRun


def _train(scheduler, run, epochs=None):
    rates = []
    for index, length in enumerate(run.epochs if epochs is None else epochs):
        if epochs is not None:
            run.epochs[index] = length
        for _ in range(run.epochs[index]):
            scheduler.optimizer.step()
            rates.append(scheduler.optimizer.param_groups[0]["lr"])
            run.taken += 1
            scheduler.step()
    return rates


# Horizon.


@pytest.mark.parametrize(
    "options", [{"total_steps": -1}, {"steps_per_epoch": -0.5}, {"total_steps": float("inf")}], ids=str
)
def test_a_negative_or_infinite_length_is_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"Invalid {name}={value}"):
        Horizon(**options)


@pytest.mark.parametrize(("epochs", "step"), [(0, 0), (0.5, 2.5), (1, 5), (1.5, 10), (3, 30), (4, 45)])
def test_epochs_and_steps_by_real_boundaries(epochs, step):
    horizon = Horizon(30, 10, (5, 15, 30))
    assert horizon.steps_at(epochs) == step
    assert horizon.epochs_at(step) == pytest.approx(epochs)
    assert Horizon(30, 10).steps_at(epochs) == 10 * epochs
    assert Horizon(30, 10).epochs_at(10 * epochs) == epochs
    assert Horizon(30).steps_at(epochs) is None


def test_an_empty_epoch_has_no_length_to_divide_by():
    assert Horizon(10, 5, (5, 5, 10)).epochs_at(5) in (1.0, 2.0)
    assert Duration.parse("2 epochs").steps(Horizon(10, 5, (5, 5, 10))) == 5


# Clock.


def test_a_clock_that_is_bent_twice_still_reaches_the_end():
    clock = RunClock()
    clock.restart(Horizon(100))
    assert [clock.at(step) for step in (0, 50)] == [0, 50]
    assert not clock.is_bent
    clock.bend(50, 60)
    assert clock.at(55) == 75.0
    clock.bend(55, 155)
    assert clock.at(55) == 75.0
    assert clock.at(155) == 100.0
    twin = RunClock()
    twin.load_state_dict(pickle.loads(pickle.dumps(clock.state_dict())))
    assert [twin.at(step) for step in (55, 100, 155)] == [clock.at(step) for step in (55, 100, 155)]


def test_a_clock_at_its_end_stays_there():
    clock = RunClock()
    clock.restart(Horizon(10))
    clock.bend(10, 30)
    assert clock.at(20) == 10.0


# Schedulers that follow a run.


@pytest.mark.parametrize("schedule", [Linear(), Cosine("10%"), Linear(hold="1 epoch")], ids=repr)
@pytest.mark.parametrize("lengths", [(10, 10, 10, 10), (10, 5, 20, 2), (2, 20, 5, 10)], ids=str)
def test_the_rate_is_continuous_and_ends_with_the_run(schedule, lengths):
    run = LoopRun(*[lengths[0]] * 4)
    scheduler = Scheduler(optimizer_of(1.0), schedule)
    scheduler.follow(run)
    rates = _train_live(scheduler, run, lengths)
    assert len(rates) == sum(lengths)
    assert scheduler.get_last_lr() == [pytest.approx(0, abs=1e-12)]
    assert max(rates) == pytest.approx(1.0)


def _train_live(scheduler, run, lengths):
    """As Lightning goes: an epoch's length is known when it begins, and taken as that of all further ones."""
    rates = []
    for index, length in enumerate(lengths):
        run.epochs[index:] = [length] * (len(lengths) - index)
        for _ in range(length):
            scheduler.optimizer.step()
            rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
            run.taken += 1
            scheduler.step()
    return rates


def test_a_run_of_constant_length_is_the_closed_form_and_is_asked_once_per_epoch():
    run = LoopRun(10, 10, 10)
    scheduler = Scheduler(optimizer_of(1.0), Linear())
    scheduler.follow(run)
    assert _train(scheduler, run) == pytest.approx([1 - k / 30 for k in range(30)], abs=0)
    assert run.asked == 3


@pytest.mark.parametrize(("schedule", "is_bent"), [(Constant(warmup=4), False), (Linear(), True)], ids=repr)
def test_where_the_rate_would_not_jump_the_schedule_is_that_of_the_new_length(schedule, is_bent):
    run = LoopRun(10, 10)
    scheduler = Scheduler(optimizer_of(1.0), schedule)
    scheduler.follow(run)
    _train_live(scheduler, run, (10, 4))
    assert ("clock" in scheduler.state_dict()) is is_bent
    assert scheduler.horizon.total_steps == 14


def test_phases_that_are_still_to_come_move_with_the_end():
    """The cooldown of the last 20 % is that of the run as it is, while nothing has decayed yet."""
    run = LoopRun(10, 10)
    scheduler = Scheduler(optimizer_of(1.0), lo.schedules.WSD(cooldown=lo.schedules.Cooldown("20%", "linear")))
    scheduler.follow(run)
    rates = _train_live(scheduler, run, (10, 40))
    assert rates == pytest.approx([1.0] * 40 + [1 - k / 10 for k in range(10)])


def test_what_changed_is_said_once():
    said = []
    run = LoopRun(10, 10, 10)
    scheduler = Scheduler(optimizer_of(1.0), Linear(), tell=lambda message, warn: said.append(message))
    scheduler.follow(run)
    _train_live(scheduler, run, (10, 5, 20))
    assert len(said) == 1
    assert "20 optimizer steps long now, not 30" in said[0]


def test_a_run_that_somebody_else_schedules_is_left_alone():
    run = LoopRun(10, mover=None)
    scheduler = Scheduler(optimizer_of(1.0), Linear())
    scheduler.follow(run)
    optimizer = scheduler.optimizer
    for rate in (0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
    assert run.asked == 0


def test_a_limit_over_a_run_that_changes():
    run = LoopRun(10, 10)
    curve = LiveCurve(Linear(), run)
    values = []
    for step in range(15):
        if step == 10:
            run.epochs[1] = 5
        values.append(curve(step))
        run.taken += 1
    assert values == pytest.approx([1 - k / 20 for k in range(10)] + [0.5 - 0.1 * k for k in range(5)])


def test_a_limit_that_is_asked_for_twice_in_one_step_counts_one_step():
    class Counts(LoopRun):
        begun = ended = 0

        def before_step(self):
            self.begun += 1

        def after_step(self):
            self.ended += 1

    run = Counts(10)
    curve = LiveCurve(Linear(), run)
    assert [curve(step) for step in (0, 0, 1, 1, 1)] == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.9])
    assert (run.begun, run.ended) == (2, 2)


def test_a_copy_follows_no_run_and_the_original_still_does():
    run = LoopRun(10)
    scheduler = Scheduler(optimizer_of(1.0), Linear())
    scheduler.follow(run)
    scheduler.optimizer.step()
    twin = copy.deepcopy(scheduler)
    assert not twin.is_following
    assert scheduler.is_following
    assert twin.horizon == scheduler.horizon


# Without a length.


def _loop(steps=6, **options):
    optimizer, scheduler = lo.OptimizerFactory("sgd", lr=1.0, param_groups=[], **options).build(nn.Linear(2, 2))
    rates = []
    for _ in range(steps):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def test_a_schedule_that_needs_no_length_works_without_one():
    assert _loop(warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert _loop() == [1.0] * 6
    assert _loop(schedule=lo.schedules.StepDecay(every=2, factor=0.5)) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "options",
    [{"schedule": "cosine"}, {"warmup": "5%"}, {"warmup": "1 epoch"}, {"schedules": {"weight_decay": "linear"}}],
)
def test_a_schedule_that_needs_one_refuses_its_first_step(options):
    with pytest.raises(RuntimeError, match=r"needs the length of the run, which is not known.*Horizon"):
        _loop(**options)


def test_milestones_beyond_the_end():
    said = []
    Scheduler(
        optimizer_of(1.0),
        MultiStepDecay(milestones=[5, 20]),
        Horizon(10),
        tell=lambda message, warn: said.append(message),
    ).resolve(Horizon(10))
    assert len(said) == 1
    assert "beyond the run of 10 optimizer steps: '20 steps'" in said[0]
    with pytest.raises(ValueError, match="no milestone lies within the run of 10"):
        Scheduler(optimizer_of(1.0), MultiStepDecay(milestones=[15, 20]), Horizon(10))


def test_a_rate_that_is_a_tensor_is_compared_without_reading_it(monkeypatch):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    scheduler = Scheduler(optimizer, Linear(), Horizon(10))
    reads = []
    real = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or real(self))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert not reads
    optimizer.param_groups[0]["lr"].mul_(0.5)
    optimizer.step()
    scheduler.step()
    assert reads
    assert real(optimizer.param_groups[0]["lr"]) == pytest.approx(0.5 * 0.5 * 0.6)


def test_a_checkpoint_without_epochs_began_with_the_first():
    scheduler = Scheduler(optimizer_of(1.0), Linear(), on_resume="config")
    run = LoopRun(5, 5, 5)
    scheduler.follow(run)
    run.taken = 10
    state = {"last_epoch": 10, "total_steps": 10, "steps_per_epoch": 5.0, "schedules": {"lr": "Linear()"}}
    scheduler.load_state_dict(state)
    scheduler.refresh()
    assert scheduler.horizon == Horizon(total_steps=15, steps_per_epoch=5.0)


def test_a_length_of_ones_own_is_the_configurations_on_resume():
    scheduler = Scheduler(optimizer_of(1.0), Linear(), Horizon(total_steps=20), on_resume="config")
    scheduler.follow(LoopRun(20))
    scheduler.load_state_dict(
        {"last_epoch": 10, "total_steps": 10, "steps_per_epoch": None, "schedules": {"lr": "Linear()"}}
    )
    assert scheduler.horizon == Horizon(total_steps=20)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
