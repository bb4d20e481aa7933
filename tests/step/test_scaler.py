"""The step pipeline under a GradScaler, which skips and scales by itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import StepCounts
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step import StepPipeline
from tests.helpers import bit_equal
from tests.optimizer_cases import FUSED_DAMPENED, FUSED_MOMENTUM, OURS, TORCH, TORCH_FUSED

CASES = [OURS, TORCH_FUSED, TORCH, FUSED_MOMENTUM, FUSED_DAMPENED]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)
SCALE = 1024.0


def _loss(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters)


def _run(case, factors, *, scaled, unscale=False, max_norm=0.7, detectors=()):
    """Steps with a pipeline; `expect_step` as a training loop that knows of scalers calls it."""
    parameters = case.parameters()
    optimizer = case.make(parameters)
    records = []
    pipe = StepPipeline(optimizer, clip=GlobalNorm(max_norm), detectors=detectors, on_report=records.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    for seed, factor in enumerate(factors):
        optimizer.zero_grad()
        scaler.scale(_loss(parameters, seed) * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        pipe.expect_step()
        scaler.step(optimizer)
        scaler.update()
        pipe.settle()
    return parameters, optimizer, pipe, records, scaler


@EVERY
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_scaled_run_equals_the_unscaled_one(case, unscale, guarded):
    detectors = [NonFiniteGradient()] if guarded else []
    ours, _, pipe, records, _ = _run(case, [1] * 4, scaled=True, unscale=unscale, detectors=detectors)
    plain, _, _, expected, _ = _run(case, [1] * 4, scaled=False, detectors=detectors)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert pipe.counts() == StepCounts(steps=4, clipped=4)
    norms = [[r.grad.total_norm().item() for r in each] for each in (records, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@EVERY
def test_logged_norms_are_without_the_loss_scale(case):
    _, _, _, records, _ = _run(case, [1], scaled=True)
    parameters = case.parameters()
    _loss(parameters, 0).backward()
    norm = nn.utils.get_total_norm([p.grad for p in parameters]).item()
    assert records[0].grad.total_norm().item() == pytest.approx(norm, rel=1e-5)


@EVERY
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [0, 2])
def test_an_overflow_is_skipped_exactly_and_counted_once(case, unscale, guarded, value, bad):
    detectors = [NonFiniteGradient()] if guarded else []
    factors = [1.0] * 5
    factors[bad] = value
    parameters, optimizer, pipe, records, scaler = _run(
        case, factors, scaled=True, unscale=unscale, detectors=detectors
    )
    assert pipe.counts() == StepCounts(steps=5, clipped=4, skipped=1)
    assert [record.skip.item() for record in records] == [float(step == bad) for step in range(5)]
    assert scaler.get_scale() == SCALE / 2
    assert all(p.isfinite().all() for p in parameters)
    # Without pipeline and guard a scaler skips the same step: the same five steps, clipped by hand.
    reference = case.parameters()
    other = case.make(reference)
    for seed, factor in enumerate(factors):
        if factor == 1:
            other.zero_grad()
            _loss(reference, seed).backward()
            nn.utils.clip_grad_norm_(reference, 0.7)
            other.step()
    for a, b in zip(parameters, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    steps = [float(state["step"]) for state in optimizer.state_dict()["state"].values() if "step" in state]
    assert steps in ([], [4.0] * len(steps))


@EVERY
def test_a_skip_under_a_scaler_leaves_everything_bit_equal(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    StepPipeline(optimizer, clip=GlobalNorm(0.7), detectors=[NonFiniteGradient()])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for seed, factor in enumerate((1.0, math.nan)):
        before = copy.deepcopy((parameters, optimizer.state_dict()))
        optimizer.zero_grad()
        scaler.scale(_loss(parameters, seed) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert bit_equal((parameters, optimizer.state_dict()), before)


def test_a_users_detector_skips_a_step_that_the_scaler_would_take():
    class Always(NonFiniteGradient):
        def __call__(self, stats):
            return stats.norm_sq.sum() > -1

    for case in CASES:
        parameters, _, pipe, _, scaler = _run(case, [1, 1], scaled=True, detectors=[Always()])
        assert bit_equal(parameters, case.parameters())
        assert pipe.counts() == StepCounts(steps=2, skipped=2)
        assert scaler.get_scale() == SCALE


@EVERY
def test_the_scaler_finds_its_attributes_as_it_left_them(case):
    _, optimizer, _, _, _ = _run(case, [1, math.nan, 1], scaled=True, detectors=[NonFiniteGradient()])
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
