from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_optim.core.durations import Duration, Horizon

RUN = Horizon(total_steps=1000, steps_per_epoch=120)


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (0, 0),
        (500, 500),
        ("500", 500),
        ("500 steps", 500),
        ("1 step", 1),
        (" 7steps ", 7),
        ("2 epochs", 240),
        ("1 epoch", 120),
        ("0.5 epochs", 60),
        (".5 EPOCHS", 60),
        ("5%", 50),
        ("5 percent", 50),
        ("0.25%", 2),
        ("100%", 1000),
        ("0%", 0),
        ("0 epochs", 0),
    ],
)
def test_every_notation_becomes_steps(written, steps):
    assert Duration.parse(written).steps(RUN) == steps


def test_a_share_above_zero_is_at_least_one_step():
    assert Duration.parse("0.001%").steps(RUN) == 1
    assert Duration.parse("0.001 epochs").steps(RUN) == 1


def test_parsing_a_duration_returns_it():
    duration = Duration(2, "epochs")
    assert Duration.parse(duration) is duration


@pytest.mark.parametrize(
    "written", ["", "5 %%", "ten steps", "-5", "-5%", "5 days", "1e3", "1_000", "nan", "5,5%", "%"]
)
def test_unreadable_text_is_refused_with_the_forms_that_are_read(written):
    with pytest.raises(ValueError, match="Cannot read the duration") as caught:
        Duration.parse(written)
    message = str(caught.value)
    assert repr(written) in message
    assert "'500 steps'" in message
    assert "'2 epochs'" in message
    assert "'5%'" in message


@pytest.mark.parametrize("value", [None, True, False, [5], 1.5, math.nan])
def test_other_types_are_refused(value):
    with pytest.raises(ValueError, match="Cannot read the duration"):
        Duration.parse(value)


def test_a_fraction_is_refused_with_the_percentage_it_probably_means():
    with pytest.raises(ValueError, match="'5%'"):
        Duration.parse(0.05)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ((-1,), "at least 0"),
        ((math.nan, "percent"), "finite"),
        ((math.inf, "epochs"), "finite"),
        ((1.5, "steps"), "whole"),
        ((101, "percent"), "at most 100%"),
        ((1, "days"), "'days'"),
    ],
)
def test_impossible_amounts_are_refused(arguments, needed):
    with pytest.raises(ValueError, match=needed):
        Duration(*arguments)


@pytest.mark.parametrize("written", ["120%", "1.5 steps"])
def test_text_with_impossible_amounts_is_refused(written):
    with pytest.raises(ValueError, match="Invalid duration"):
        Duration.parse(written)


@pytest.mark.parametrize(
    ("written", "horizon", "missing"),
    [
        ("5%", Horizon(), "length of the run"),
        ("5%", Horizon(steps_per_epoch=10), "length of the run"),
        ("2 epochs", Horizon(total_steps=10), "length of an epoch"),
    ],
)
def test_a_missing_length_is_named(written, horizon, missing):
    with pytest.raises(ValueError, match=missing):
        Duration.parse(written).steps(horizon)


@pytest.mark.parametrize(("written", "relative"), [(5, False), ("2 epochs", False), ("5%", True)])
def test_only_percentages_depend_on_the_whole_run(written, relative):
    assert Duration.parse(written).is_relative is relative


def test_truth_is_whether_it_lasts():
    assert not Duration.parse(0)
    assert not Duration.parse("0%")
    assert Duration.parse("0.1%")


@given(st.integers(0, 10**9))
def test_whole_steps_survive_every_spelling(steps):
    assert all(Duration.parse(w).steps(Horizon()) == steps for w in (steps, str(steps), f"{steps} steps"))


@given(st.integers(0, 10**4), st.sampled_from(["steps", "epochs", "percent"]))
def test_text_form_reads_back_as_the_same_duration(amount, unit):
    duration = Duration(min(amount, 100) if unit == "percent" else amount, unit)
    assert Duration.parse(str(duration)) == duration


@given(st.floats(0, 100), st.integers(1, 10**7))
def test_a_share_of_the_run_is_within_half_a_step_of_it_and_never_longer(percent, total):
    steps = Duration(percent, "percent").steps(Horizon(total_steps=total))
    exact = percent / 100 * total
    assert 0 <= steps <= total
    assert abs(steps - exact) <= 0.5 + 1e-9 * total or (steps == 1 and exact < 0.5)


@given(st.floats(0, 100), st.floats(0, 100), st.integers(1, 10**6))
def test_a_longer_share_is_never_fewer_steps(one, other, total):
    horizon = Horizon(total_steps=total)
    short, long = sorted((one, other))
    assert Duration(short, "percent").steps(horizon) <= Duration(long, "percent").steps(horizon)
