"""The configured rate put to the test: when it is left alone, lowered or raised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_optim.tuning.rates.check import check_rate


def valley(best, noise=0.0, diverges=math.inf):
    """Trainings whose loss falls to a valley over the logarithm of the rate, on the same batches each."""
    batches = np.random.default_rng(0).normal(size=1000)

    def run(rate, steps):
        if rate > diverges:
            return [1.0, math.nan]
        level = 1 + math.log10(rate / best) ** 2
        return list(level + noise * batches[:steps] + 0.01 * noise * batches[-steps:])

    return run


@pytest.mark.parametrize(
    ("configured", "ends", "verdict"),
    [
        (0.1, 0.1, "neither a third of 0.1 nor three times"),
        (0.001, 0.081, "0.001 is slow: after 50 steps"),
        (3.0, 0.1111, "3 is too high"),
    ],
)
def test_it_goes_on_until_neither_neighbour_is_better(configured, ends, verdict):
    found = check_rate(valley(0.1, noise=1.0), configured, 50)
    assert found.lr == pytest.approx(ends)
    assert found.reason.startswith(verdict)


def test_a_rate_that_diverges_is_lowered_until_it_does_not():
    found = check_rate(valley(0.1, diverges=0.2), 5.0, 50)
    assert found.lr == pytest.approx(5 / 81, rel=1e-3)  # 5 / 27 does not diverge, and this is better
    assert found.reason == "5 diverges, 0.06173 does not"


def test_if_all_diverge_there_is_no_rate():
    found = check_rate(valley(0.1, diverges=0.0), 5.0, 50, limit=3)
    assert (found.lr, len(found.trials)) == (None, 3)
    assert "all rates from 0.556 to 5 diverge" in found.reason


def test_noise_alone_moves_nothing():
    random = np.random.default_rng(1)
    found = check_rate(lambda rate, steps: list(1 + random.normal(size=steps)), 0.1, 100)
    assert found.lr == 0.1
    assert found.low <= 0.1 <= found.high
