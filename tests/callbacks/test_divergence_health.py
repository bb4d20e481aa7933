"""Parameters that do not learn, in real runs."""

from __future__ import annotations

import warnings

import pytest
import torch

import lightning_optim as lo
from lightning_optim.divergence import Health
from lightning_optim.divergence.health import COLUMNS
from tests.helpers import ADAMWS, Net, batches, make_trainer


@pytest.fixture(autouse=True)
def _expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step ")
        yield


def _told(model, steps=60, every=50, kind="ours", lr=1e-3, **more):
    guard = lo.DivergenceGuard()
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=lr, **more)
    make_trainer([configure, guard], log_every_n_steps=every).fit(model, batches(steps, batch_size=16))
    return {entry.kind: entry for entry in guard.report.entries}


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_dead_layer_is_told_of_at_the_first_logging_step(kind):
    class Dead(Net):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.body.bias.fill_(-100.0)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    told = _told(Dead(), kind=kind)
    assert told["dead"].step == 49
    assert {name.split()[0] for name in told["dead"].names} >= {"body.weight", "body.bias"}
    assert not any(name.startswith("head.bias") for name in told["dead"].names)


def test_parameters_frozen_by_mistake_are_told_of():
    class Frozen(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_train_start(self):
            self.body.requires_grad_(False)

    guard = lo.DivergenceGuard()
    make_trainer([guard], log_every_n_steps=50).fit(Frozen(), batches(60))
    (entry,) = guard.report.entries
    assert (entry.kind, entry.step, entry.names) == ("no_gradient", 49, ["body.weight", "body.bias"])


def test_a_group_that_is_frozen_on_purpose_is_not():
    rules = [lo.ParamGroupRule(name="late", pattern="^body", frozen_until="1000 steps")]
    assert "no_gradient" not in _told(Net(), param_groups=rules)


def test_a_second_moment_below_eps_is_told_of():
    guard = lo.DivergenceGuard()
    configure = lo.ConfigureOptimizers(optimizer="adamw", optimizer_kwargs={"eps": 1e3}, lr=1e-3)
    make_trainer([configure, guard], log_every_n_steps=50).fit(Net(), batches(60))
    assert "stalled" in {entry.kind for entry in guard.report.entries}


def test_a_rate_too_high_or_too_low_is_told_of_once_and_a_good_one_is_not():
    def looks(ratio, cosine, count=8):
        health, alarms = Health(), []
        numbers = {"grad_sq": 1.0, "param_sq": 1.0, "update_sq": ratio**2, "grad_exp_avg": cosine, "momentum_sq": 1.0}
        row = [numbers.get(column, 0.0) for column in COLUMNS]
        for look in range(count):
            alarms += health.update(50 * (look + 1), row, ["w"], [1], [("all", 0.1, 1)], [])
        return [alarm.kind for alarm in alarms]

    assert looks(0.3, 0.1) == ["lr_too_high"]
    assert looks(0.01, -0.8) == ["lr_too_high"]
    assert looks(1e-9, 0.1) == ["lr_too_low"]
    assert looks(0.3, 0.1, count=4) == []
    assert looks(1e-3, 0.1) == []


def test_a_healthy_run_is_told_nothing():
    assert _told(Net(), every=5, steps=200) == {}
