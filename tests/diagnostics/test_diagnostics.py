from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_optim.core.stats import STEP_SUMS, GradStats, StepCounts, StepRecord, StepStats
from lightning_optim.diagnostics import (
    BelowEps,
    ClipCoefficient,
    ClippedGradNorm,
    EffectiveLR,
    GradCosine,
    GradNorm,
    GradOverSecondMoment,
    NonFinite,
    ParamNorm,
    ParamRMS,
    StepReport,
    UpdateNorm,
    UpdateRatio,
    WeightDecayShare,
    ZeroGrad,
)
from lightning_optim.diagnostics import report as report_module
from lightning_optim.diagnostics.advice import BatchAdvice
from lightning_optim.diagnostics.clock import StepClock
from lightning_optim.diagnostics.local_gradient import LocalGradient
from lightning_optim.diagnostics.loss import WINDOW, LossHistory
from lightning_optim.diagnostics.noise_scale import NoiseScale


def _record(steps=1, clipped=0, skipped=0, lr=0.1, divisor=2.0):
    """Two groups, of two tensors and of one: gradients of norms 3, 4 and 12, parameters of 6, 8 and 2."""
    sums = torch.full((3, len(STEP_SUMS)), math.nan)
    sums[:, STEP_SUMS.index("param_sq")] = torch.tensor([36.0, 64.0, 4.0])
    sums[:, STEP_SUMS.index("update_sq")] = torch.tensor([0.09, 0.16, 0.01])
    sums[:, STEP_SUMS.index("grad_exp_avg")] = torch.tensor([3.0, -18.0, 3.0])
    sums[:, STEP_SUMS.index("momentum_sq")] = torch.tensor([10.0, 15.0, 1.0])
    sums[:, STEP_SUMS.index("grad_sq_over_exp_avg_sq")] = torch.tensor([30.0, 10.0, 5.0])
    sums[:, STEP_SUMS.index("below_eps")] = torch.tensor([1.0, 1.0, 5.0])
    sums[:, STEP_SUMS.index("zero_grad")] = torch.tensor([0.0, 5.0, 0.0])
    sums[:, STEP_SUMS.index("decay_sq")] = torch.tensor([0.09, 0.16, math.nan])
    return StepRecord(
        group_names=("a", "b"),
        hyperparameters=(
            {"lr": lr, "weight_decay": 0.5, "betas": (0.9, 0.99), "weight_decay_kind": "decoupled", "peak_lr": 1.0},
            {"lr": 0.3},
        ),
        grad=GradStats(torch.tensor([9.0, 16.0, 144.0]), (2, 1)),
        clipped_norm_sq=torch.tensor([9.0, 16.0, 144.0]) / divisor**2,
        skip=torch.tensor(0.0),
        update=StepStats(sums, (2, 1), (5, 5, 5)),
        steps=steps,
        counts=torch.tensor([clipped, skipped]),
    )


@pytest.mark.parametrize(
    ("diagnostic", "values"),
    [
        (GradNorm(), [5.0, 12.0, 13.0]),
        (ClippedGradNorm(), [2.5, 6.0, 6.5]),
        (ParamNorm(), [10.0, 2.0]),
        (UpdateRatio(), [0.05, 0.05]),
        (UpdateNorm(), [0.5, 0.1]),
        (ParamRMS(), [10.0**0.5, 0.8**0.5]),
        (EffectiveLR(), [0.025**0.5, 0.002**0.5]),
        (ClipCoefficient(), [0.5, 0.5]),
        (NonFinite(), [0.0]),
        (ZeroGrad(), [0.5, 0.0]),
        (BelowEps(), [0.2, 1.0]),
        (GradCosine(), [-15 / (2.5 * 5), 0.5]),
        (GradOverSecondMoment(), [2.0, 1.0]),
        (WeightDecayShare(), [0.05 * 10 / 0.5, math.nan]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_quantities(diagnostic, values):
    assert diagnostic.compute(_record()).tolist() == pytest.approx(values, nan_ok=True)


def test_a_report_is_one_transfer_with_every_tag(monkeypatch):
    packed = []
    original = report_module.PendingValues  # type: ignore[attr-defined]
    monkeypatch.setattr(report_module, "PendingValues", lambda values: (packed.append(values), original(values))[1])
    report = StepReport(
        _record(lr=torch.tensor(0.1)), [GradNorm(), ParamNorm(), WeightDecayShare()], StepCounts(), at=7
    ).send()
    assert report.at == 7
    assert report.ready()
    assert report.read() == pytest.approx(
        {
            "optim_grad_norm/a": 5.0,
            "optim_grad_norm/b": 12.0,
            "optim_grad_norm/total": 13.0,
            "optim_param_norm/a": 10.0,
            "optim_param_norm/b": 2.0,
            "optim_lr/a": 0.1,
            "optim_lr/b": 0.3,
            "optim_weight_decay/a": 0.5,
            "optim_weight_decay/share/a": 1.0,
            "optim_health/clip_rate": 0.0,
            "optim_health/skipped_steps": 0.0,
        }
    )
    assert [values.dim() for values in packed] == [1]


def test_clip_rate_is_over_the_steps_since_the_previous_report():
    first = StepReport(_record(steps=10, clipped=4), [], StepCounts(), at=9).send()
    second = StepReport(_record(steps=20, clipped=9, skipped=3), [], first, at=19).send()
    resumed = StepReport(_record(steps=40, clipped=10), [], StepCounts(steps=38, clipped=9), at=39).send()
    assert first.read()["optim_health/clip_rate"] == pytest.approx(0.4)
    values = second.read()
    assert values["optim_health/clip_rate"] == pytest.approx(0.5)
    assert values["optim_health/skipped_steps"] == 3
    assert resumed.read()["optim_health/clip_rate"] == pytest.approx(0.5)


def test_a_report_names_the_first_gradient_that_is_not_finite():
    record = dataclasses.replace(
        _record(), grad=GradStats(torch.tensor([9.0, math.inf, math.nan]), (2, 1)), param_names=("x", "y", "z")
    )
    report = StepReport(record, [NonFinite(), GradNorm()]).send()
    values = report.read()
    assert report.culprit == "y"
    assert values["optim_health/nonfinite_gradients"] == 2
    assert math.isnan(values["optim_grad_norm/b"])


def test_missing_quantities_are_not_logged_and_host_numbers_are_not_transferred():
    report = StepReport(_record(), [WeightDecayShare()])
    report.add(("optim_x/host",), (3.0,))
    values = report.send().read()
    assert "optim_weight_decay/share/b" not in values
    assert values["optim_x/host"] == 3.0


def test_noise_scale_of_known_noise():
    """Gradients of mean 1 in each of 4 components, with variance 2 in each: tr(Σ)/|G|² = 2."""
    generator = torch.Generator().manual_seed(5)
    noise = NoiseScale(torch.device("cpu"))
    estimates = []
    for _ in range(3000):
        samples = 1 + 2**0.5 * torch.randn(64, 4, generator=generator)
        small, large = samples[:8].mean(0).square().sum(), samples.mean(0).square().sum()
        estimates.append(noise.add(small, large, 8, 64).item())
    assert torch.tensor(estimates).nanmean().item() == pytest.approx(2.0, rel=0.1)


def test_an_average_survives_a_gradient_that_is_not_finite():
    noise = NoiseScale(torch.device("cpu"))
    first = noise.add(torch.tensor(5.0), torch.tensor(2.0), 2, 8).item()
    assert noise.add(torch.tensor(math.nan), torch.tensor(2.0), 2, 8).item() == first


def test_a_parameter_with_several_gradients_has_no_local_gradient():
    weight, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    local = LocalGradient([weight, other, torch.ones(1)])
    (3 * weight).sum().backward()
    (other * 2).sum().backward()
    found = {id(p): v.item() for p, v in local.take().items()}
    assert found == pytest.approx({id(weight): 18.0, id(other): 8.0})
    weight.sum().backward()  # the hooks are gone
    assert local.take() == {}
    local = LocalGradient([weight])
    for _ in range(2):  # as reentrant checkpointing of parts that share a weight
        weight.sum().backward()
    assert local.take() == {}


def test_advice_is_given_once_after_long():
    advice = BatchAdvice(patience=3)
    values = [(500, 40), (500, 40), (None, 40), (500, 40), (500, 40), (300, 40), (3, 40), (3, 40), (3, 40), (3, 40)]
    said = [advice.update(noise, batch) for noise, batch in values]
    assert [index for index, sentence in enumerate(said) if sentence] == [3, 8]
    assert "far below the gradient noise scale (about 5e+02)" in said[3]
    assert "far above" in said[8]


def test_a_clock_leaves_pauses_out():
    times = iter([0.0, 3.0, 7.0, 8.0, 9.0, 9.5])
    clock = StepClock(now=lambda: next(times))  # starts at 0
    clock.pause()  # 3
    clock.resume()  # 7
    assert clock.take() == 4.0  # at 8
    clock.begin_update(torch.device("cpu"))  # 9
    assert clock.end_update(torch.device("cpu"))() == 0.5


def test_the_window_of_losses_forgets():
    history = LossHistory(torch.device("cpu"))
    values = [1.0 + 0.01 * (i % 7) for i in range(WINDOW)]
    for value in (100.0, *values):
        history.add(torch.tensor(value))
    history.take()
    history.add(torch.tensor(2.0))
    kept = sorted([*values[1:], 2.0])
    median = kept[(len(kept) - 1) // 2]
    mad = sorted(abs(value - median) for value in kept)[(len(kept) - 1) // 2]
    assert history.take().tolist() == pytest.approx([2.0, 2.0, (2.0 - median) / (1.4826 * mad)], rel=1e-4)
