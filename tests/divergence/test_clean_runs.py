"""Real trainings that go well: the guard, as it comes, has next to nothing to say, and changes nothing."""

from __future__ import annotations

import pytest

import lightning_optim as lo
from tests.divergence.trainings import TRAININGS, train

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_run_that_goes_well_gives_at_most_one_false_alarm(tmp_path, name, steps):
    guard = lo.DivergenceGuard(report_dir=str(tmp_path))
    losses = train(TRAININGS[name], [guard], steps)
    assert sum(losses[-30:]) / 30 < 0.7 * sum(losses[:3]) / 3  # it does go well
    told = [(entry.step, entry.kind, entry.text) for entry in guard.report.entries]
    assert len(told) <= 1, told
    assert not any(kind == "did" for _, kind, _ in told)


def test_a_run_without_alarms_is_the_one_without_a_guard(tmp_path):
    guard = lo.DivergenceGuard(report_dir=str(tmp_path))
    training = TRAININGS["perceptron, SGD"]
    assert train(training, [guard], 150) == train(training, [], 150)
    assert guard.report.entries == []
