"""Healthy runs of many kinds: the guard at its defaults neither cuts, rolls back nor stops, and costs nothing."""

from __future__ import annotations

import statistics

import pytest

import lightning_optim as lo
from tests.benchmarks.healthy import HELD_OUT, KINDS, TUNING, run

QUICK = ("GAN, hinge", "REINFORCE", "a term joins")
"""One of two optimizers, one whose loss is not expected to fall, and one whose loss jumps."""


def test_figures_are_of_seeds_on_which_nothing_was_tuned():
    assert len(KINDS) >= 14
    assert not set(TUNING) & set(HELD_OUT)


def test_a_run_in_which_the_guard_does_nothing_is_the_one_without_it():
    guarded = run("overfitted", 7, lo.DivergenceGuard(), observe=True)
    assert guarded.steps == len(guarded.observed[0]) == KINDS["overfitted"].steps
    assert (guarded.harmed, guarded.skipped) == (False, 0)
    assert guarded.metric == run("overfitted", 7, None).metric


@pytest.mark.parametrize("kind", QUICK)
def test_the_guard_leaves_a_healthy_run_alone(kind):
    outcome = run(kind, 0, lo.DivergenceGuard())
    assert not outcome.harmed, outcome.entries


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_costs_a_healthy_run_nothing(kind):
    guarded = [run(kind, seed, lo.DivergenceGuard()) for seed in TUNING]
    unguarded = [run(kind, seed, None).metric for seed in TUNING]
    assert [outcome.seed for outcome in guarded if outcome.harmed] == []
    skipped, steps = sum(outcome.skipped for outcome in guarded), sum(outcome.steps for outcome in guarded)
    assert 1000 * skipped <= steps, f"{skipped} of {steps}"
    metric = statistics.fmean(outcome.metric for outcome in guarded)
    assert metric >= statistics.fmean(unguarded) - statistics.stdev(unguarded)
