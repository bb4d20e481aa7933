"""The same numbers as torch's own schedulers, transformers' get_scheduler and timm's, where the shape is the same.

Where theirs starts its warmup at zero, ours is told to (``start=0``); where theirs reaches its end with the last update
instead of after it, theirs is given one step more.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as t

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
    StepDecay,
    Tanh,
    Warmup,
)
from tests.optim.published import timm

TOTAL, WARMUP, PEAK = 60, 12, 0.3
FROM_ZERO = Warmup(WARMUP, start=0)
STEPS = range(TOTAL + 1)


def _optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)


def _of_torch(make):
    optimizer = _optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        rates = []
        for step in STEPS:
            rates.append(optimizer.param_groups[0]["lr"])
            if step < TOTAL:
                optimizer.step()
                scheduler.step()
    return rates


def _of_transformers(name, **options):
    from transformers import get_scheduler

    warmup = options.pop("warmup", WARMUP)
    return _of_torch(
        lambda optimizer: get_scheduler(name, optimizer, warmup, TOTAL, scheduler_specific_kwargs=options or None)
    )


def _of_timm(name, **options):
    optimizer = _optimizer()
    scheduler = getattr(timm(f"{name.lower()}_lr", "scheduler"), f"{name}LRScheduler")(
        optimizer, t_in_epochs=False, **options
    )
    rates = []
    for step in STEPS:
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


TORCH = {
    "ConstantLR": (Constant(Warmup(WARMUP, "constant", start=0.25)), lambda o: t.ConstantLR(o, 0.25, WARMUP)),
    "LinearLR": (Constant(Warmup(WARMUP, start=0.25)), lambda o: t.LinearLR(o, 0.25, 1.0, WARMUP)),
    "LinearLR-down": (Linear(final=0.25), lambda o: t.LinearLR(o, 1.0, 0.25, TOTAL)),
    "PolynomialLR": (Polynomial(power=2), lambda o: t.PolynomialLR(o, TOTAL, 2)),
    "CosineAnnealingLR": (Cosine(final=0.1), lambda o: t.CosineAnnealingLR(o, TOTAL, 0.1 * PEAK)),
    "ExponentialLR": (Exponential(final=0.95**TOTAL), lambda o: t.ExponentialLR(o, 0.95)),
    "StepLR": (StepDecay(every=7, factor=0.5), lambda o: t.StepLR(o, 7, 0.5)),
    "MultiStepLR": (MultiStepDecay(milestones=[20, 45], factor=0.5), lambda o: t.MultiStepLR(o, [20, 45], 0.5)),
    "LambdaLR": (InverseSqrt(timescale=9), lambda o: t.LambdaLR(o, lambda k: (1 + k / 9) ** -0.5)),
    "CosineAnnealingWarmRestarts": (
        CosineRestarts(cycle=8, length_multiplier=2, final=0.1),
        lambda o: t.CosineAnnealingWarmRestarts(o, 8, 2, 0.1 * PEAK),
    ),
    "OneCycleLR": (
        OneCycle(WARMUP, final=1 / 25e4),
        lambda o: t.OneCycleLR(o, PEAK, TOTAL + 1, pct_start=(WARMUP + 1) / (TOTAL + 1), cycle_momentum=False),
    ),
    "OneCycleLR-three-phases": (
        OneCycle(WARMUP, final=1 / 25e4, three_phase=True),
        lambda o: t.OneCycleLR(
            o, PEAK, TOTAL + 1, pct_start=(WARMUP + 1) / (TOTAL + 1), three_phase=True, cycle_momentum=False
        ),
    ),
    "OneCycleLR-three-phases-divided": (
        OneCycle(Warmup(WARMUP, "cosine", start=0.1), final_lr=0.1 * PEAK / 50, three_phase=True).for_peak(PEAK),
        lambda o: t.OneCycleLR(
            o,
            PEAK,
            TOTAL + 1,
            pct_start=(WARMUP + 1) / (TOTAL + 1),
            div_factor=10,
            final_div_factor=50,
            three_phase=True,
            cycle_momentum=False,
        ),
    ),
    "SequentialLR": (
        Linear(Warmup(WARMUP, start=0.25), final=0.2, hold=8),
        lambda o: t.SequentialLR(
            o,
            [
                t.LinearLR(o, 0.25, 1.0, WARMUP),
                t.ConstantLR(o, 1.0, 1),
                t.LinearLR(o, 1.0, 0.2, TOTAL - WARMUP - 8),
            ],
            [WARMUP, WARMUP + 8],
        ),
    ),
}

TRANSFORMERS = {
    "constant": (Constant(), {}),
    "constant_with_warmup": (Constant(FROM_ZERO), {}),
    "linear": (Linear(FROM_ZERO), {}),
    "cosine": (Cosine(FROM_ZERO), {}),
    "cosine_with_restarts": (CosineRestarts(FROM_ZERO, cycles=3), {"num_cycles": 3}),
    "polynomial": (Polynomial(FROM_ZERO, power=2, final=0.1), {"power": 2, "lr_end": 0.1 * PEAK}),
    "inverse_sqrt": (InverseSqrt(FROM_ZERO), {}),
    "cosine_with_min_lr": (Cosine(FROM_ZERO, final=0.1), {"min_lr_rate": 0.1}),
    "warmup_stable_decay-linear": (
        WSD(FROM_ZERO, Cooldown(20, "linear")),
        {"num_decay_steps": 20, "decay_type": "linear"},
    ),
    "warmup_stable_decay-cosine": (
        WSD(FROM_ZERO, Cooldown(20, "cosine")),
        {"num_decay_steps": 20, "decay_type": "cosine"},
    ),
    "warmup_stable_decay-1-sqrt": (
        WSD(Warmup(WARMUP, "cosine", start=0), 20),
        {"num_decay_steps": 20, "decay_type": "1-sqrt", "warmup_type": "cosine"},
    ),
}

_PREFIXED = {"warmup_t": WARMUP, "warmup_prefix": True}
TIMM = {
    "Cosine": (Cosine(FROM_ZERO, final=0.1), {"t_initial": TOTAL - WARMUP, "lr_min": 0.1 * PEAK, **_PREFIXED}),
    "Cosine-restarts": (
        CosineRestarts(FROM_ZERO, cycle=6, length_multiplier=2, peak_multiplier=0.5, final=0.1),
        {"t_initial": 6, "cycle_mul": 2, "cycle_decay": 0.5, "cycle_limit": 9, "lr_min": 0.1 * PEAK, **_PREFIXED},
    ),
    "Poly": (
        Polynomial(Warmup(WARMUP, start=0.1), power=0.5, final=0.1),
        {
            "t_initial": TOTAL - WARMUP,
            "power": 0.5,
            "lr_min": 0.1 * PEAK,
            "warmup_lr_init": 0.1 * PEAK,
            **_PREFIXED,
        },
    ),
    "Step": (StepDecay(FROM_ZERO, every=7, factor=0.5), {"decay_t": 7, "decay_rate": 0.5, **_PREFIXED}),
    # A milestone of timm's is one step earlier, and counts from the end of its prefix.
    "MultiStep": (
        MultiStepDecay(FROM_ZERO, milestones=[20, 45], factor=0.5),
        {"decay_t": [21 - WARMUP, 46 - WARMUP], "decay_rate": 0.5, **_PREFIXED},
    ),
    "Tanh": (Tanh(FROM_ZERO, final=0.1), {"t_initial": TOTAL - WARMUP, "lr_min": 0.1 * PEAK, **_PREFIXED}),
    "WSD": (WSD(FROM_ZERO, Cooldown(20, "1-sqrt", final=0.1)), {"decay_t": 20, "lr_min": 0.1 * PEAK}),
    "WSD-rsqrt": (
        InverseSqrt(FROM_ZERO, cooldown=Cooldown(20, "linear")),
        {"decay_t": 20, "stable_fn": "rsqrt", "decay_fn": "linear"},
    ),
}


def _assert_same(schedule, rates):
    ours = [PEAK * schedule(step, TOTAL) for step in STEPS]
    assert len(ours) == len(rates) == TOTAL + 1
    assert max(abs(a - b) for a, b in zip(ours, rates, strict=True)) <= 1e-12


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    schedule, make = TORCH[name]
    _assert_same(schedule, _of_torch(make))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_transformers(name):
    schedule, options = TRANSFORMERS[name]
    _assert_same(schedule, _of_transformers(name.split("-")[0], **options))


def test_equals_transformers_where_its_warmup_is_ours():
    theirs = _of_transformers("cosine_warmup_with_min_lr", min_lr_rate=0.1)
    ours = [PEAK * Cosine(WARMUP, final=0.1)(step, TOTAL) for step in STEPS]
    assert theirs[:WARMUP] == pytest.approx(ours[:WARMUP], abs=1e-12)
    # After it, theirs is a step ahead: the peak is used once, and the end is reached with the last update.
    assert theirs[WARMUP:TOTAL] == pytest.approx(ours[WARMUP + 1 : TOTAL + 1], abs=1e-12)


@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name):
    schedule, options = TIMM[name]
    if name.startswith("WSD"):  # its warmup is a prefix always
        options = {"t_initial": TOTAL - WARMUP, "warmup_t": WARMUP, **options}
    _assert_same(schedule, _of_timm(name.split("-")[0], **options))


def test_rex_is_the_papers():
    # Chen et al. 2021, algorithm 1 with its rho = 1/2.
    z = [1 - step / TOTAL for step in STEPS]
    _assert_same(REX(), [PEAK * x / (0.5 + 0.5 * x) for x in z])
