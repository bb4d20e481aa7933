from __future__ import annotations

import math

import pytest
import torch

from lightning_optim.diagnostics import ClippedGradNorm, GradNorm, ParamNorm, Report, UpdateRatio
from lightning_optim.stats import STEP_SUMS, GradStats, StepCounts, StepRecord, StepStats


def _record(steps=1, clipped=0, skipped=0, lr=0.1, divisor=2.0):
    """Two groups, of two tensors and of one: gradients of norms 3, 4 and 12, parameters of 6, 8 and 2."""
    sums = torch.full((3, len(STEP_SUMS)), math.nan)
    sums[:, STEP_SUMS.index("param_sq")] = torch.tensor([36.0, 64.0, 4.0])
    sums[:, STEP_SUMS.index("update_sq")] = torch.tensor([0.09, 0.16, 0.01])
    return StepRecord(
        group_names=("a", "b"),
        hyperparameters=({"lr": lr, "weight_decay": 0.5, "betas": (0.9, 0.99)}, {"lr": 0.3}),
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
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_quantities(diagnostic, values):
    assert diagnostic.compute(_record()).tolist() == pytest.approx(values)


def test_a_report_is_one_transfer_with_every_tag(monkeypatch):
    from lightning_optim import diagnostics

    packed = []
    original = diagnostics.PendingValues
    monkeypatch.setattr(diagnostics, "PendingValues", lambda values: (packed.append(values), original(values))[1])
    report = Report(_record(lr=torch.tensor(0.1)), [GradNorm(), ParamNorm()], StepCounts(), at=7)
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
            "optim_health/clip_rate": 0.0,
            "optim_health/skipped_steps": 0.0,
        }
    )
    assert [values.dim() for values in packed] == [1]


def test_clip_rate_is_over_the_steps_since_the_previous_report():
    first = Report(_record(steps=10, clipped=4), [], StepCounts(), at=9)
    second = Report(_record(steps=20, clipped=9, skipped=3), [], first, at=19)
    resumed = Report(_record(steps=40, clipped=10), [], StepCounts(steps=38, clipped=9), at=39)
    assert first.read()["optim_health/clip_rate"] == pytest.approx(0.4)
    values = second.read()
    assert values["optim_health/clip_rate"] == pytest.approx(0.5)
    assert values["optim_health/skipped_steps"] == 3
    assert resumed.read()["optim_health/clip_rate"] == pytest.approx(0.5)
