"""Values of schedules that cannot be multipliers."""

from __future__ import annotations

import math
import warnings

import pytest

from lightning_optim import Horizon
from lightning_optim.schedules import get_schedule, list_schedules
from lightning_optim.schedules.checks import check_value, check_values
from lightning_optim.schedules.function import FromFunction

RUN = Horizon(total_steps=200, steps_per_epoch=20)


def silent(function, peak=1e-3, horizon=RUN):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(FromFunction(function), horizon, "lr", peak)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
def test_a_value_that_is_no_multiplier_is_refused(value):
    schedule = FromFunction(abs)
    with pytest.raises(ValueError, match=rf"Invalid value {value:g} of the schedule FromFunction\(.*at step 7"):
        check_value(value, schedule, 7)
    for good in (0.0, 1.0, 3.0):
        check_value(good, schedule, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("at", [0, 100, 199])
def test_it_is_found_before_the_run(value, at):
    with pytest.raises(ValueError, match=f"Schedule of weight_decay: Invalid value .* at step {at}"):
        check_values(FromFunction(lambda step: value if step >= at else 1.0), RUN, "weight_decay")


def test_what_lies_beyond_the_run_is_not_looked_at():
    silent(lambda step: 1 - step / 200)  # 0 after the last update, and negative later


def test_a_table_as_long_as_the_run_is_enough():
    silent(([1.0] * 200).__getitem__)
    silent(([1.0] * 50).__getitem__)  # The run may be stopped before its end; the step that has no value says so.
    silent(([1.0] * 5).__getitem__, horizon=Horizon())


def test_learning_rates_for_multipliers_are_warned_about():
    with pytest.warns(UserWarning, match=r"0.001 at most, so the learning rate stays at or below 1e-06.*give lr=1"):
        check_values(FromFunction(lambda step: 1e-3 * 0.99**step), RUN, "lr", 1e-3)
    silent(lambda step: 0.3 * 0.99**step, 0.3)  # which may well be a multiplier
    with pytest.warns(UserWarning, match="multipliers of lr, not learning rates"):
        check_values(FromFunction(lambda step: 2e-3 * math.cos(step / 200) ** 2, warmup=0), RUN, "lr", 1e-3)


@pytest.mark.parametrize("peak", [1.0, None])
def test_rates_over_a_peak_of_1_are_a_way_to_write_it(peak):
    silent(lambda step: 1e-3, peak)


def test_a_warmup_that_is_longer_than_the_run_is_no_learning_rate():
    silent(lambda step: min(1.0, (step + 1) / 10_000))


@pytest.mark.parametrize("name", list_schedules())
def test_every_schedule_of_ours_is_good(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(get_schedule(name)(warmup="5%"), RUN, "lr", 1e-3)
