"""Trials by successive halving, and the learning rate that they suggest, on trainings whose best rate is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_optim as lo
from lightning_optim.tuning.rates.halving import Trial, halve, indistinguishable, paired_difference
from lightning_optim.tuning.rates.horizon import EXPONENT, exponent_of, horizon_factor
from lightning_optim.tuning.rates.rate_trials import around, try_rates

BATCHES = np.random.default_rng(0).standard_normal(1000)


class Quadratic:
    """Gradient descent with curvatures that span a decade; batches differ in difficulty and in their gradients."""

    def __init__(self, noise=0.0, seed=0, unit=1.0):
        self.noise, self.seed, self.unit, self.calls = noise, seed, unit, []

    def __call__(self, lr, steps):
        self.calls.append((lr, steps))
        curvatures, weights = np.logspace(-1, 0, 8), np.ones(8)
        generator, losses = np.random.default_rng(self.seed), []
        for step in range(steps):
            losses.append(float(np.sum(curvatures * weights**2) / 2 + self.noise * BATCHES[step]))
            if losses[-1] > 100:
                break  # given up
            weights -= lr / self.unit * (curvatures * weights + self.noise * generator.standard_normal(8))
        return losses


# Trials and their comparison.


def test_a_trial_knows_its_score_and_whether_it_diverged():
    assert Trial(0.1, 10, tuple(range(10))).score == 8.5
    assert not Trial(0.1, 10, (math.nan, *range(9))).diverged  # a single one, long ago
    for losses in ((1.0,) * 9, (), (*range(9), math.inf)):
        assert Trial(0.1, 10, losses).diverged
        assert Trial(0.1, 10, losses).score == math.inf


def test_what_batches_have_in_common_cancels():
    a, b = BATCHES[:40] + 0.01, BATCHES[:40] + 0.001 * BATCHES[40:80]
    mean, half = paired_difference(a, b)
    assert mean == pytest.approx(0.01, abs=0.001)
    assert half < 0.005
    assert paired_difference(a, b, paired=False)[1] > 0.1
    assert paired_difference(a[:3], b)[1] > 0.1  # of other lengths they cannot be paired
    assert paired_difference([1.0], [2.0]) == (-1.0, math.inf)


@pytest.mark.parametrize("seed", range(5))
def test_differences_by_chance_are_told_from_others_nine_times_of_ten(seed):
    generator = np.random.default_rng(seed)
    alike = sum(
        mean <= half for mean, half in (paired_difference(generator.normal(size=20), np.zeros(20)) for _ in range(200))
    )
    assert 170 <= alike <= 200


# Successive halving of anything.


def test_the_better_half_goes_on_with_twice_the_steps():
    run = Quadratic()
    found = halve(run, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0], 40)
    assert run.calls[:6] == [(value, 10) for value in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
    assert [steps for _, steps in run.calls] == sorted(steps for _, steps in run.calls)
    assert found.best == 1.0
    assert found.ranking[0] == 1.0
    assert set(found.ranking) == {0.01, 0.03, 0.1, 0.3, 1.0, 3.0}
    assert found.ranking[-1] == 3.0  # diverged
    assert found.trial(1.0).steps == 40
    assert found.trial(0.01).steps == 10
    assert sum(steps for _, steps in run.calls) < 6 * 40


def test_pairs_and_other_things_can_be_tried():
    def run(pair, steps):
        batch_size, lr = pair
        return [abs(math.log(lr / batch_size)) + 1 / (step + 1) for step in range(steps)]

    found = halve(run, [(batch, lr) for batch in (1, 2) for lr in (1.0, 2.0, 4.0)], 32, paired=False)
    assert set(found.alike) == {(1, 1.0), (2, 2.0)}
    assert "cannot be told apart" in found.reason


def test_what_is_alike_goes_on():
    found = halve(lambda _, steps: list(BATCHES[:steps]), ["a", "b", "c", "d"], 40)
    assert found.alike == ("a", "b", "c")  # three of four survived the first round


def test_all_diverge():
    found = halve(lambda *_: [math.nan], [1, 2], 8)
    assert (found.best, found.alike, found.reason) == (None, (), "every trial diverged")
    assert len(found.trials) == 2


def test_one_that_diverges_late_does_not_win():
    def run(lr, steps):
        return [1.0 / (lr * (step + 1)) for step in range(min(steps, 15 if lr == 2.0 else steps))]

    found = halve(run, [0.5, 1.0, 2.0], 40)
    assert found.ranking[0] == 1.0


@pytest.mark.parametrize(
    ("values", "steps", "given"), [([], 40, {}), ([1], 40, {"keep": 1.0}), ([1], 40, {"rounds": 0}), ([1], 4, {})]
)
def test_what_is_no_plan_is_refused(values, steps, given):
    with pytest.raises(ValueError, match="Invalid"):
        halve(lambda *_: [0.0], values, steps, **given)


def test_values_that_cannot_be_told_apart_are_alike():
    trials = [Trial(v, 40, tuple(d + BATCHES[:40])) for v, d in (("a", 0.0), ("b", 0.0), ("c", 0.1))]
    assert indistinguishable(trials) == {"a", "b"}
    assert indistinguishable([]) == set()


# The learning rate.


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (1e-5, 1e-3), (3.0, 30.0), (0.5, 0.5)])
@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_the_best_rate_is_found_from_wherever_one_begins(low, high, noise):
    found = try_rates(Quadratic(noise), low, high, 60)
    rates = np.geomspace(0.05, 1.99, 40)
    losses = [Trial(rate, 60, tuple(Quadratic(noise)(rate, 60))).score for rate in rates]
    best = rates[np.argmin(losses)]
    assert found.lr is not None, found.reason
    assert 1 / 1.8 < found.lr / best < 1.8
    assert found.low <= found.lr <= found.high
    start = Quadratic(noise)(0.1, 1)[0]
    assert Trial(0, 60, tuple(Quadratic(noise)(found.lr, 60))).score - min(losses) < 0.005 * (start - min(losses))


def test_no_rate_is_tried_twice_and_few_for_long():
    run = Quadratic()
    try_rates(run, 1e-3, 1.0, 80)
    assert len(set(run.calls)) == len(run.calls)
    assert sum(steps == 80 for _, steps in run.calls) <= 5
    assert sum(steps for _, steps in run.calls) < 12 * 80


@settings(max_examples=12, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), unit=st.sampled_from([1e-3, 0.1, 10.0]))
def test_scale_and_zero_of_the_loss_do_not_matter_and_the_unit_of_the_rate_is_passed_on(scale, shift, unit):
    plain = try_rates(Quadratic(0.01), 1e-2, 1.0, 40)
    inner = Quadratic(0.01, unit=unit)
    other = try_rates(lambda lr, steps: [scale * loss + shift for loss in inner(lr, steps)], 1e-2 * unit, unit, 40)
    assert [other.lr, other.low, other.high] == pytest.approx(
        [plain.lr * unit, plain.low * unit, plain.high * unit], rel=0.02
    )


def test_where_the_rate_does_not_matter_there_is_none():
    found = try_rates(lambda _, steps: list(BATCHES[:steps]), 1e-4, 1.0, 40)
    assert found.lr is None
    assert found.high > 10 * found.low
    assert found.reason.startswith("cannot tell rates from")
    assert "take more than 40 steps (160)" in found.reason


def test_where_all_diverge_there_is_none_and_an_end():
    found = try_rates(lambda *_: [1.0], 0.1, 1.0, 40)
    assert (found.lr, found.low, found.high) == (None, None, None)
    assert "begin with lower rates" in found.reason
    assert len(found.trials) <= 30


def test_a_rate_that_only_a_long_trial_shows_to_diverge_is_left():
    def run(lr, steps):
        return Quadratic()(lr, steps)[: 30 if lr > 0.5 else steps]

    found = try_rates(run, 1e-3, 1.0, 80)
    assert found.lr <= 0.5
    assert any(trial.steps > 20 and trial.diverged for trial in found.trials)


def test_single_spikes_and_a_lost_loss_early_on_change_nothing():
    def run(lr, steps):
        losses = Quadratic(0.01)(lr, steps)
        losses[1:3] = [1e6, math.nan][: len(losses[1:3])]
        return losses

    assert try_rates(run, 1e-2, 1.0, 60).lr == try_rates(Quadratic(0.01), 1e-2, 1.0, 60).lr


@pytest.mark.parametrize("given", [(0.0, 1.0, 40), (1.0, 0.5, 40), (0.1, math.inf, 40), (0.1, 1.0, 19)])
def test_what_is_no_range_is_refused(given):
    with pytest.raises(ValueError, match="Invalid"):
        try_rates(Quadratic(), *given)


def test_the_range_to_begin_with():
    assert around((1e-5, 1e-3), 1e-4) == (1e-5, 1e-3)
    assert around((1e-5, 1e-3), 1.0) == (1e-5, 1.0)
    assert around(None, 0.5) == (0.05, 5.0)


# The length of the run.


def test_a_longer_run_gets_a_lower_rate():
    plain = try_rates(Quadratic(), 1e-3, 1.0, 40)
    assert try_rates(Quadratic(), 1e-3, 1.0, 40, total_steps=20).lr == plain.lr
    long = try_rates(Quadratic(), 1e-3, 1.0, 40, total_steps=4000)
    assert long.lr == pytest.approx(plain.lr * 100**-0.32, rel=0.01)
    assert "4000 steps need a lower rate" in long.reason
    assert long.low <= long.lr <= long.high


def test_the_exponent_is_the_optimizers():
    class Lion8bit(lo.optim.Lion):
        pass

    assert exponent_of(None) == exponent_of(lo.optim.AdamW) == exponent_of(lo.optim.Muon) == EXPONENT
    assert exponent_of(lo.optim.Lion) == exponent_of(Lion8bit) == 1.0
    assert exponent_of(lo.optim.RMSprop) == exponent_of(lo.optim.get_optimizer_class("rmsprop")) == 0.0
    assert horizon_factor(100, 400, lo.optim.Lion) == 0.25
    assert horizon_factor(100, 400, lo.optim.RMSprop) == 1.0
    # Beyond what was measured all fall alike.
    for optimizer in (lo.optim.Lion, lo.optim.RMSprop):
        further = horizon_factor(100, 40_000, optimizer) / horizon_factor(100, 400, optimizer)
        assert further == pytest.approx(100**-EXPONENT)
