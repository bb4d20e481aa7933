"""Sweeps of learning rates: where they end, and what their losses suggest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.tuning.rates.horizon import horizon_factor
from lightning_optim.tuning.rates.suggestion import suggest
from lightning_optim.tuning.rates.sweep import Divergence, exponential

RATES = exponential(1e-6, 10.0, 140)


def losses(optimum=1e-2, noise=0.0, seed=0, rates=RATES, start=2.3, depth=1.5):
    """A plateau, a descent that ends at about ``optimum``, and a rise; ``noise`` is a standard deviation."""
    place = np.log10(np.asarray(rates) / optimum)
    fall = 1 / (1 + np.exp(-(place + 0.8) / 0.2))
    rise = np.minimum(0.05 * np.expm1(np.maximum(3 * place, 0)), 1e3)
    return start - depth * fall + depth * rise + noise * np.random.default_rng(seed).standard_normal(len(place))


def ended(curve):
    """The losses up to where a sweep ends."""
    divergence = Divergence()
    for index, loss in enumerate(curve):
        if divergence.update(float(loss)):
            return curve[: index + 1]
    return curve


# The rates and the end of a sweep.


def test_rates_grow_by_one_factor():
    rates = exponential(1e-5, 1.0, 11)
    assert (rates[0], rates[-1]) == (1e-5, 1.0)
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.5, rtol=1e-9)


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 5), (1.0, 1.0, 5), (0.1, math.inf, 5), (0.1, 1.0, 1), (math.nan, 1, 5)])
def test_a_range_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="Invalid"):
        exponential(*wrong)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, -50.0), (1e-4, 0.0), (1e3, -1e3)])
def test_a_sweep_ends_after_its_minimum_and_before_all_is_lost(noise, scale, shift):
    curve = scale * losses(noise=noise) + shift
    assert 1e-2 < RATES[len(ended(curve)) - 1] < 1.0


def test_noise_and_single_spikes_do_not_end_a_sweep():
    noise = np.random.default_rng(1).standard_normal(2000)
    assert len(ended(noise)) == 2000
    noise[::97] = 1e6
    assert len(ended(noise)) == 2000
    assert len(ended(np.full(300, 0.7))) == 300


def test_two_losses_that_are_not_finite_end_it_and_one_does_not():
    divergence = Divergence()
    told = [divergence.update(loss) for loss in (1.0, math.nan, 1.0, math.inf, math.nan)]
    assert told == [None] * 4 + ["two losses in a row are not finite"]


def test_a_sweep_that_begins_too_high_ends_soon():
    assert len(ended(2.0 ** np.arange(100.0))) <= 16


# The suggestion.


@pytest.mark.parametrize("optimum", [1e-4, 1e-2])
@pytest.mark.parametrize(("noise", "seed"), [(0.0, 0), (0.05, 0), (0.2, 0), (0.2, 1), (0.2, 2)])
def test_the_least_loss_is_found_under_noise(optimum, noise, seed):
    found = suggest(RATES, [ended(losses(optimum, noise, seed))])
    least = RATES[int(np.argmin(losses(optimum)))]
    assert found.lr is not None, found.reason
    assert 1 / 2.5 < found.lr / least < 2.5
    assert found.low <= found.lr <= found.high
    assert len(found.rates) == len(found.losses) == len(found.smoothed)


def test_noise_on_the_plateau_is_no_suggestion():
    # A finder that takes the steepest of the raw losses is lost here.
    curve = losses(noise=0.15, seed=5)
    curve[3], curve[4] = 4.0, 0.5
    assert 2e-3 < suggest(RATES, [ended(curve)]).lr < 3e-2


@pytest.mark.parametrize("spike", [1e4, -1e4, math.nan, math.inf])
def test_single_spikes_change_nothing_much(spike):
    curve = losses(noise=0.03)
    plain = suggest(RATES, [ended(curve)]).lr
    curve[[20, 50, 77]] = spike
    assert suggest(RATES, [ended(curve)]).lr == pytest.approx(plain, rel=0.25)


def test_a_tail_that_is_not_finite_is_where_the_sweep_ended():
    curve = losses(noise=0.03)
    curve[95:] = math.nan
    found = suggest(RATES, [curve])
    assert found.lr == pytest.approx(suggest(RATES, [curve[:95]]).lr)
    assert len(found.rates) == 95


def test_losses_below_zero():
    curve = ended(losses(noise=0.05))
    assert suggest(RATES, [curve - 100]).lr == suggest(RATES, [curve]).lr


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_scale_and_zero_of_the_loss_do_not_matter_and_the_unit_of_the_rate_is_passed_on(scale, shift, factor, seed):
    curve = ended(losses(noise=0.1, seed=seed))
    plain = suggest(RATES, [curve], resamples=50)
    other = suggest([rate * factor for rate in RATES], [scale * (curve + shift)], resamples=50)
    assert plain.lr is not None
    assert [other.lr, other.low, other.high] == pytest.approx(
        [plain.lr * factor, plain.low * factor, plain.high * factor], rel=0.011
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_flat_loss_tells_nothing(seed):
    noise = np.random.default_rng(seed).standard_normal((3, 140))
    for repeats in (noise[:1], noise):
        found = suggest(RATES, list(repeats))
        assert found.lr is None
        assert "use more steps (280) or repeats" in found.reason


def test_a_constant_loss_tells_nothing():
    assert "cannot tell" in suggest(RATES, [np.full(140, 0.7)]).reason


def test_too_few_losses_tell_nothing():
    rates = exponential(1e-4, 1.0, 12)
    found = suggest(rates, [losses(rates=rates)])
    assert found.lr is None
    assert "use more steps (100)" in found.reason
    assert found.reason.startswith("cannot tell from 12 losses")


@pytest.mark.parametrize("curve", [[math.nan] * 5, [2.3, 1e9, math.inf], 2.3 * 4.0 ** np.arange(8)])
def test_diverging_at_once(curve):
    found = suggest(RATES, [curve])
    assert found.lr is None
    assert "lower the first rate" in found.reason


def test_a_loss_that_only_rises():
    rates = exponential(0.1, 10.0, 60)
    found = suggest(rates, [losses(1e-2, 0.02, rates=rates)[:45]])
    assert found.lr is None
    assert found.reason == "the loss only rises: lower the first rate"


def test_a_loss_that_still_falls_at_the_end():
    rates = exponential(1e-6, 2e-3, 80)
    found = suggest(rates, [losses(1e-2, 0.02, rates=rates)])
    assert found.lr is None
    assert found.reason == "the loss still falls at the highest rate, 0.002: raise it"


def test_repeats_of_unequal_lengths():
    repeats = [ended(losses(noise=0.3, seed=seed))[:cut] for seed, cut in enumerate((None, 90, 85))]
    repeats[2][80:] = 1e12  # diverged earlier than the others
    found = suggest(RATES, repeats)
    assert 3e-3 < found.lr < 3e-2


def test_repeats_make_the_interval_narrower():
    def width(count):
        found = [
            suggest(RATES, [ended(losses(noise=0.4, seed=10 * seed + n)) for n in range(count)]) for seed in range(4)
        ]
        return float(np.mean([math.log(one.high / one.low) for one in found if one.low is not None]))

    assert width(8) < 0.8 * width(1)


def test_the_interval_holds_the_least_loss_most_of_the_time():
    least = RATES[int(np.argmin(losses()))]
    found = [suggest(RATES, [ended(losses(noise=0.1, seed=seed))]) for seed in range(30)]
    held = [one.low / 1.15 <= least <= one.high * 1.15 for one in found if one.lr is not None]
    assert len(held) > 26
    assert np.mean(held) > 0.75


def test_where_rates_are_too_far_apart_the_reason_has_them():
    # Two valleys alike, three decades from each other.
    curve = np.minimum(losses(1e-4, depth=1.5), losses(1e-1, depth=1.5))
    curve[: len(RATES)] += 0.3 * np.random.default_rng(0).standard_normal(len(RATES))
    found = [
        suggest(RATES, [curve + 0.3 * np.random.default_rng(seed).standard_normal(len(RATES))]) for seed in range(5)
    ]
    wide = [one for one in found if one.lr is None]
    assert wide
    assert all("apart: use more steps (280) or repeats" in one.reason and one.high > 10 * one.low for one in wide)


def test_a_longer_run_gets_a_lower_rate():
    curve = ended(losses(noise=0.05))
    plain = suggest(RATES, [curve])
    assert plain.lr == plain.minimum
    assert suggest(RATES, [curve], total_steps=10).lr == plain.lr
    long = suggest(RATES, [curve], total_steps=40_000)
    assert long.minimum == plain.lr
    # 19.9 steps per decade, and half as many as the run has would be 20,000.
    assert long.lr == pytest.approx(plain.lr * (139 / 7 / 20_000) ** 0.32, rel=0.01)
    assert "40000 steps need a lower rate" in long.reason


def test_the_horizon():
    assert horizon_factor(100, None) == horizon_factor(100, 100) == horizon_factor(100, 50) == 1.0
    assert horizon_factor(100, 10_000) == pytest.approx(100**-0.32)


def test_the_same_losses_suggest_the_same():
    curve = ended(losses(noise=0.2))
    one, two = suggest(RATES, [curve]), suggest(RATES, [curve])
    assert (one.lr, one.low, one.high, one.reason) == (two.lr, two.low, two.high, two.reason)


@pytest.mark.parametrize(
    ("rates", "curves"),
    [([0.1], [[1.0]]), ([0.1, 0.05], [[1.0]]), ([0.0, 0.1], [[1.0]]), ([0.1, 0.2], []), ([0.1, 0.2], [[1.0] * 3])],
)
def test_what_is_no_sweep_is_refused(rates, curves):
    with pytest.raises(ValueError, match=r"Invalid (rates|losses)"):
        suggest(rates, curves)
