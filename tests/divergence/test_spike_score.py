"""The spike score against its definition, written down plainly."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lightning_optim.divergence.spike_score import SpikeScore


def _defined(values: list[float], window: int = 128, warmup: int = 64) -> list[int]:
    """Return the places of the spikes, from medians that are computed anew at each step."""
    spikes = []
    for place, value in enumerate(values):
        last = values[max(0, place - window) : place]
        if len(last) < warmup:
            continue
        scale = math.log if min(last) > 0 else float
        median = statistics.median_low(last)
        mad = statistics.median_low([abs(scale(each) - scale(median)) for each in last])
        rises = value > median + 0.1 * abs(median)
        if rises and scale(value) - scale(median) > 6 * 1.4826 * mad:
            spikes.append(place)
    return spikes


@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_as_defined(seed: int, shift: float) -> None:
    draw = random.Random(seed)
    values = [math.exp(draw.gauss(0, 0.2)) * 0.999**i * draw.choice([1] * 50 + [5, 30]) + shift for i in range(600)]
    score = SpikeScore(("loss",))
    found = []
    for place, value in enumerate(values):
        before = score.spikes["loss"]
        score.update({"loss": value})
        found += [place] * (score.spikes["loss"] - before)
    assert found == _defined(values)
    assert len(found) > 5
    assert score.shares() == {"loss": len(found) / (600 - 64)}


def test_spikes_do_not_hide_each_other_and_a_new_level_ends_to_count() -> None:
    draw = random.Random(0)
    calm = [math.exp(draw.gauss(0, 0.05)) for _ in range(200)]
    score = SpikeScore(("loss",))
    for place, value in enumerate(calm):
        score.update({"loss": value * (100 if place >= 100 and place % 10 == 0 else 1)})
    assert score.spikes["loss"] == 10
    for value in calm:
        score.update({"loss": value * 3})
    assert 10 + 40 < score.spikes["loss"] < 10 + 80


def test_a_constant_signal_and_values_that_are_not_finite_are_no_spikes() -> None:
    score = SpikeScore(("loss", "grad_norm"))
    for _ in range(80):
        score.update({"loss": 1.0, "grad_norm": 0.0})
    for value in (1.05, math.nan, math.inf, 1.0):
        score.update({"loss": value, "grad_norm": math.nan})
    assert score.shares() == {"loss": 0.0, "grad_norm": 0.0}
    assert score.steps == {"loss": 18, "grad_norm": 16}
    score.update({"loss": 1.2, "grad_norm": 1e300})
    assert score.spikes == {"loss": 1, "grad_norm": 1}


def test_it_goes_on_from_its_state() -> None:
    draw = random.Random(1)
    values = [math.exp(draw.gauss(0, 0.1)) * draw.choice([1] * 20 + [9]) for _ in range(300)]
    whole, first, second = SpikeScore(("loss",)), SpikeScore(("loss",)), SpikeScore(("loss",))
    for place, value in enumerate(values):
        whole.update({"loss": value})
        if place == 150:
            second.load_state_dict(first.state_dict())
        (first if place < 150 else second).update({"loss": value})
    assert second.state_dict() == whole.state_dict()
    assert whole.shares()["loss"] > 0.02
