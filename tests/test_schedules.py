from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_optim import schedules
from lightning_optim.durations import Horizon
from lightning_optim.schedules import Constant, Cosine, Linear, Schedule, Scheduler, get_schedule, list_schedules

ALL = [Constant, Cosine, Linear]


def _cosine(step, total, warmup, final):
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (min(step, total) - warmup) / (total - warmup))) / 2


def _optimizer(*rates, **options):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=1.0, **options)


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (Constant(), {0: 1, 1: 1, 10**6: 1}),
        (Constant(warmup=4), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 999: 1}),
        (Linear(), {0: 1, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0, 101: 0, 500: 0}),
        (Linear(warmup=20, final=0.5), {0: 0.05, 19: 1, 20: 1, 60: 0.75, 100: 0.5, 500: 0.5}),
        (Cosine(), {0: 1, 50: 0.5, 100: 0, 500: 0}),
        (Cosine(warmup="10%"), {0: 0.1, 9: 1, 10: 1, 55: 0.5, 100: 0, 500: 0}),
        (Cosine(warmup=10, final=0.1), {0: 0.1, 10: 1, 55: 0.55, 100: 0.1, 101: 0.1}),
        (Cosine(warmup="100%"), {0: 0.01, 98: 0.99, 99: 1, 100: 0}),
    ],
    ids=repr,
)
def test_multiplier_at_both_ends_between_and_beyond(schedule, table):
    for step, expected in table.items():
        assert schedule(step, 100) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("cls", ALL)
def test_first_step_after_warmup_is_the_peak(cls):
    schedule = cls(warmup=7)
    assert schedule(6, 50) == 1.0
    assert schedule(7, 50) == 1.0


@given(st.data())
def test_cosine_equals_the_closed_form_at_every_step(data):
    total = data.draw(st.integers(2, 5000))
    warmup = data.draw(st.integers(0, total - 1))
    final = data.draw(st.floats(0, 1))
    step = data.draw(st.integers(0, 2 * total))
    assert Cosine(warmup=warmup, final=final)(step, total) == pytest.approx(
        _cosine(step, total, warmup, final), abs=1e-12
    )


@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(0, 1), st.sampled_from([Cosine, Linear]))
def test_ends_are_exact(total, warmup, final, cls):
    warmup = min(warmup, total)
    schedule = cls(warmup=warmup, final=final)
    assert schedule(total, total) == pytest.approx(final, abs=1e-12)
    assert schedule(0, total) == (pytest.approx(1 / warmup) if warmup else 1.0)


@given(st.integers(1, 1000), st.integers(0, 1000), st.sampled_from(ALL))
def test_warmup_rises_and_the_rest_never_does(total, warmup, cls):
    warmup = min(warmup, total)
    values = [cls(warmup=warmup)(step, total) for step in range(total + 1)]
    assert all(0 <= value <= 1 for value in values)
    assert all(a < b for a, b in itertools.pairwise(values[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(values[warmup:]))
    assert values[0] > 0 or warmup == 0


@pytest.mark.parametrize("cls", [Cosine, Linear])
def test_needs_a_length_and_says_how_to_give_one(cls):
    assert cls().needs_total
    with pytest.raises(ValueError, match=r"length of the run.*max_steps.*max_epochs.*constant"):
        cls()(0, None)


def test_constant_needs_a_length_only_for_a_relative_warmup():
    assert not Constant().needs_total
    assert not Constant(warmup=10).needs_total
    assert Constant(warmup="5%").needs_total


@pytest.mark.parametrize("cls", ALL)
def test_warmup_longer_than_the_run_is_refused_with_both_lengths(cls):
    with pytest.raises(ValueError, match=r"warmup of 101 steps.*run of 100 optimizer steps"):
        cls(warmup=101)(0, 100)


def test_warmup_in_epochs():
    assert Cosine(warmup="2 epochs")(0, 100, 10) == 1 / 20


@pytest.mark.parametrize("name", list_schedules())
def test_every_name_makes_a_schedule_that_is_public(name):
    cls = get_schedule(name.upper())
    assert issubclass(cls, Schedule)
    assert getattr(schedules, cls.__name__) is cls
    assert name in repr(cls()).lower()


@pytest.mark.parametrize("schedule", [Constant(warmup="5%"), Cosine(warmup=3, final=0.1), Linear()], ids=repr)
def test_repr_is_how_it_was_written(schedule):
    assert eval(repr(schedule), vars(schedules))(1, 50) == schedule(1, 50)


# The scheduler.


def test_scheduler_keeps_the_ratio_of_the_groups():
    optimizer = _optimizer(0.4, 0.04)
    scheduler = Scheduler(optimizer, Cosine(warmup=4, final=0.1), Horizon(total_steps=20))
    for step in range(25):
        expected = _cosine(step, 20, 4, 0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4 * expected, 0.04 * expected])
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()


def test_scheduler_without_a_length_keeps_the_peak_until_it_is_resolved():
    optimizer = _optimizer(0.4)
    scheduler = Scheduler(optimizer, Linear(warmup=4))
    assert optimizer.param_groups[0]["lr"] == 0.4
    scheduler.resolve(Horizon(total_steps=10))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_scheduler_refuses_a_run_that_its_schedule_does_not_fit():
    with pytest.raises(ValueError, match="longer than the run"):
        Scheduler(_optimizer(0.4), Linear(warmup=11), Horizon(total_steps=10))
    scheduler = Scheduler(_optimizer(0.4), Linear(warmup=11))
    with pytest.raises(ValueError, match="longer than the run"):
        scheduler.resolve(Horizon(total_steps=10))


def test_tensor_rates_are_written_in_place():
    rate = torch.tensor(0.4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.3)
    first = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    assert first.item() == pytest.approx(0.3)
    assert rate.item() == pytest.approx(0.2)


def test_a_group_added_later_follows_at_its_own_peak():
    optimizer = _optimizer(0.4)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.08})
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.04])


def test_skipped_steps_do_not_advance_it():
    skipped = 3
    scheduler = Scheduler(_optimizer(1.0), Linear(), Horizon(total_steps=10))
    scheduler.hold_on(lambda: skipped)
    positions = []
    for skips in (3, 4, 4, 6, 6, 6):  # an accelerator may tell of two skips at once
        skipped = skips
        scheduler.optimizer.step()
        scheduler.step()
        positions.append(scheduler.last_epoch)
    assert positions == [1, 1, 2, 1, 2, 3]


def test_state_is_the_position_alone_and_restores_the_rate():
    def make():
        optimizer = _optimizer(0.4)
        return Scheduler(optimizer, Cosine(warmup=3), Horizon(total_steps=20))

    scheduler = make()
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())
    assert state == {"last_epoch": 7}
    restored = make()
    restored.load_state_dict(state)
    for _ in range(10):
        assert restored.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]
        for each in (scheduler, restored):
            each.optimizer.step()
            each.step()


def test_an_epoch_is_refused():
    scheduler = Scheduler(_optimizer(1.0), Linear(), Horizon(total_steps=10))
    with pytest.raises(ValueError, match="epoch=3"):
        scheduler.step(3)
