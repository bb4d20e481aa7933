from __future__ import annotations

import itertools
from math import cos, pi, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim import schedules
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
    MultiStepDecay,
    OneCycle,
    Polynomial,
    Schedule,
    StepDecay,
    Warmup,
    get_schedule,
    list_schedules,
)
from tests.schedules.cases import CASES

ALL = [get_schedule(name) for name in list_schedules()]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("total", [10, 11, 24, 107])
def test_the_closed_form_at_every_step_and_beyond_the_end(case, total):
    for step in range(total + 20):
        assert case.schedule(step, total) == pytest.approx(case.expected(step, total), abs=1e-12), step


def test_every_schedule_has_a_case():
    assert {type(case.schedule) for case in CASES} == set(ALL)


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
def test_the_default_warmup_never_uses_zero_nor_all_of_it_at_once(cls):
    schedule = cls(warmup=Warmup(7))
    assert [schedule(step, 50) for step in range(8)] == pytest.approx([k / 7 for k in range(1, 8)] + [1], abs=1e-5)


@given(st.integers(10, 5000), st.floats(0, 0.75), st.floats(0, 1), st.sampled_from([Cosine, Linear, Polynomial, REX]))
def test_ends_are_exact(total, share, final, cls):
    warmup = int(share * total)
    schedule = cls(warmup=warmup, final=final)
    assert schedule(total, total) == schedule(2 * total, total) == pytest.approx(final, abs=1e-12)
    assert schedule(0, total) == (pytest.approx(1 / warmup) if warmup else 1.0)


@given(st.integers(10, 1000), st.floats(0, 0.75), st.sampled_from([cls for cls in ALL if cls is not CosineRestarts]))
def test_warmup_rises_and_the_rest_never_does(total, share, cls):
    warmup = int(share * total)
    multiplier = cls(warmup=Warmup(warmup)).over(Horizon(total))
    values = [multiplier(step) for step in range(total + 20)]
    assert all(0 <= value <= 1 for value in values)
    assert all(a < b for a, b in itertools.pairwise(values[:warmup]))
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(values[warmup:]))
    assert values[0] > 0 or warmup == 0


@given(st.data())
def test_any_composition_stays_between_its_ends_in_any_run(data):
    total = data.draw(st.integers(20, 400))
    per_epoch = data.draw(st.integers(1, 50))
    share = st.integers(0, 30)

    def duration():
        percent = data.draw(share)
        steps = percent * total // 100
        return data.draw(st.sampled_from([f"{percent}%", steps, f"{steps} steps", f"{steps / per_epoch} epochs"]))

    shape = data.draw(st.sampled_from(["linear", "cosine", "exponential"]))
    start = data.draw(st.sampled_from([None, 0.1, 0.5]))
    final = data.draw(st.floats(0, 1))
    schedule = data.draw(st.sampled_from([Cosine, Linear, REX]))(
        Warmup(duration(), shape, start), final, duration(), Cooldown(duration(), "linear", final / 2)
    )
    values = [schedule(step, total, per_epoch) for step in range(total + 5)]
    phases = schedule.phases(Horizon(total, per_epoch))
    assert phases.warmup + phases.hold + phases.shape + phases.cooldown == total
    assert all(final / 2 - 1e-12 <= v or step < phases.warmup for step, v in enumerate(values))
    assert max(values) <= 1
    peak = range(phases.warmup, phases.warmup + phases.hold)
    assert all(values[step] == 1 for step in peak)
    assert values[total] == pytest.approx(final / 2 if phases.cooldown else final, abs=1e-12)


# Warmup, hold and cooldown.


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (Warmup(4), [0.25, 0.5, 0.75, 1]),
        (Warmup(4, start=0), [0, 0.25, 0.5, 0.75]),
        (Warmup(4, start=0.2), [0.2, 0.4, 0.6, 0.8]),
        (Warmup(4, "cosine"), [(1 - cos(pi * k / 4)) / 2 for k in (1, 2, 3, 4)]),
        (Warmup(4, "cosine", start=0.5), [0.5 + 0.5 * (1 - cos(pi * k / 4)) / 2 for k in range(4)]),
        (Warmup(4, "exponential"), [0.01**0.75, 0.1, 0.01**0.25, 1]),
        (Warmup(4, "exponential", start=1 / 16), [1 / 16, 1 / 8, 1 / 4, 1 / 2]),
        (Warmup(4, "constant", start=0.3), [0.3] * 4),
    ],
    ids=repr,
)
def test_each_warmup_rises_in_its_way(warmup, expected):
    schedule = Linear(warmup=warmup, hold=3, final=0.5)
    assert [schedule(step, 17) for step in range(4)] == pytest.approx(expected, abs=1e-15)
    assert [schedule(step, 17) for step in range(4, 18)] == pytest.approx([1] * 3 + [1 - 0.05 * k for k in range(11)])


def test_a_cooldown_begins_where_the_shape_ends():
    schedule = Cosine(final=0.5, cooldown=Cooldown(10, "linear", final=0.1))
    assert [schedule(step, 30) for step in (0, 10, 20, 25, 30, 99)] == pytest.approx([1, 0.75, 0.5, 0.3, 0.1, 0.1])


def test_a_shape_without_a_length_continues_during_its_cooldown():
    schedule = InverseSqrt(timescale=10, cooldown=Cooldown(10, "linear"))
    expected = [1 / sqrt(1 + k / 10) * (1 if k <= 20 else (30 - k) / 10) for k in range(31)]
    assert [schedule(step, 30) for step in range(31)] == pytest.approx(expected)


def test_cycles_of_a_given_length_go_on_without_an_end():
    schedule = CosineRestarts(warmup=2, cycle="10 steps", length_multiplier=2, final=0.1)
    assert not schedule.needs_total
    assert [schedule(step) for step in (2, 7, 12, 22, 32, 52)] == pytest.approx([1, 0.55, 1, 0.55, 1, 0.55])


def test_one_cycle_takes_a_length_for_its_way_up():
    assert OneCycle(warmup="50%")(0, 100) == OneCycle()(0, 100) == pytest.approx(0.04)
    assert OneCycle(warmup="50%")(50, 100) == 1


# Lengths.


@pytest.mark.parametrize("cls", [Cosine, Linear])
def test_a_schedule_that_needs_a_length_is_refused_with_the_ways_to_give_one(cls):
    assert cls().needs_total
    with pytest.raises(ValueError, match=r"length of the run.*max_steps.*max_epochs.*constant"):
        cls()(0, None)


def test_constant_needs_a_length_only_for_a_relative_warmup():
    assert not Constant().needs_total
    assert not Constant(warmup=10).needs_total
    assert Constant(warmup="5%").needs_total
    assert Constant(cooldown=5).needs_total
    assert Constant(hold="5%").needs_total


@pytest.mark.parametrize(
    ("schedule", "needs"),
    [
        (StepDecay(every=5), False),
        (StepDecay(every="5%"), True),
        (MultiStepDecay(milestones=[5, "2 epochs"]), False),
        (MultiStepDecay(milestones=[5, "5%"]), True),
        (InverseSqrt(), False),
        (InverseSqrt(timescale="5%"), True),
        (WSD(), True),
        (Exponential(), True),
        (CosineRestarts(), True),
    ],
    ids=repr,
)
def test_a_length_is_needed_only_where_something_is_a_share_of_it(schedule, needs):
    assert schedule.needs_total is needs


@pytest.mark.parametrize("cls", ALL)
def test_warmup_longer_than_the_run_is_refused_with_both_lengths(cls):
    with pytest.raises(ValueError, match=r"warmup of 101 steps.*run of 100 optimizer steps"):
        cls(warmup=101)(0, 100)


def test_parts_longer_than_the_run_together_are_refused():
    with pytest.raises(ValueError, match=r"warmup, hold and cooldown of 40 \+ 41 \+ 20 steps.*run of 100"):
        WSD(warmup=40, hold=41)(0, 100)


def test_warmup_in_epochs():
    assert Cosine(warmup="2 epochs")(0, 100, 10) == 1 / 20


@pytest.mark.parametrize("name", list_schedules())
def test_every_name_makes_a_schedule_that_is_public(name):
    cls = get_schedule(name.upper())
    assert issubclass(cls, Schedule)
    assert getattr(schedules, cls.__name__) is cls
    assert name.replace("_", "") in repr(cls()).lower()


@pytest.mark.parametrize("alias", schedules.registry._ALIASES)
def test_every_alias_names_a_schedule(alias):
    assert issubclass(get_schedule(alias), Schedule)


WRITTEN = [
    'Constant(warmup="5%")',
    "Cosine(warmup=3, final=0.1)",
    "Linear()",
    'WSD(cooldown=Cooldown("10%", shape="linear", final=0.1))',
    'Linear(warmup=Warmup(5, shape="cosine", start=0.1), hold="2 epochs")',
    'MultiStepDecay(milestones=[5, "20%"], factor=0.5)',
    "CosineRestarts(cycle=7, length_multiplier=2)",
    "InverseSqrt(timescale=30)",
    'OneCycle(warmup="40%")',
]


@pytest.mark.parametrize("written", WRITTEN)
def test_repr_is_how_it_was_written(written):
    schedule = eval(written, vars(schedules))
    again = eval(repr(schedule), vars(schedules))
    assert repr(again) == repr(schedule)
    assert [again(step, 50, 10) for step in range(60)] == [schedule(step, 50, 10) for step in range(60)]


@pytest.mark.parametrize("written", WRITTEN[:3])
def test_what_has_its_default_is_not_written(written):
    assert repr(eval(written, vars(schedules))) == written.replace('"', "'")
