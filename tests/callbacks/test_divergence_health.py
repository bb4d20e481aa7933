"""Parameters that do not learn, in real runs."""

from __future__ import annotations

import warnings

import pytest
import torch

import lightning_optim as lo
from lightning_optim.core.stats import TENSOR_COLUMNS
from lightning_optim.divergence import Inspection, ParameterHealth
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
def test_a_dead_layer_is_reported_at_the_first_logging_step(kind):
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


def test_parameters_frozen_by_mistake_are_reported():
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
    rules = [lo.ParamGroupRule(name="late", pattern="^body", frozen_until="99%")]
    assert "no_gradient" not in _told(Net(), param_groups=rules)


def test_a_second_moment_below_eps_is_reported():
    guard = lo.DivergenceGuard()
    configure = lo.ConfigureOptimizers(optimizer="adamw", optimizer_kwargs={"eps": 1e3}, lr=1e-3)
    make_trainer([configure, guard], log_every_n_steps=50).fit(Net(), batches(60))
    assert "stalled" in {entry.kind for entry in guard.report.entries}


GRADUALLY = {"ratio": 1e-3, "cosine": 0.1, "rate": 0.1}


def _looks(count=8, **quantities):
    """What is told of after so many looks, at each of which quantities are numbers or functions of the look."""
    health, alarms = ParameterHealth(), []
    for look in range(count):
        at = {key: q(look) if callable(q) else q for key, q in {**GRADUALLY, **quantities}.items()}
        numbers = {
            "grad_sq": 1.0,
            "clipped_sq": 0.25,  # as after clipping to half
            "param_sq": 1.0,
            "momentum_sq": 1.0,
            "update_sq": at["ratio"] ** 2,
            "grad_exp_avg": 0.5 * at["cosine"],
        }
        row = [numbers.get(column, 0.0) for column in TENSOR_COLUMNS]
        alarms += health.update(Inspection(50 * (look + 1), row, ["w"], [1], [("all", at["rate"], 1)]))
        other = ParameterHealth()
        other.load_state_dict(health.state_dict())
        health = other
    return [alarm.kind for alarm in alarms]


@pytest.mark.parametrize(
    ("quantities", "told"),
    [
        ({}, []),
        ({"ratio": 0.3}, ["lr_too_high"]),
        ({"ratio": 0.3, "count": 4}, []),
        ({"cosine": -0.8}, ["lr_too_high"]),
        ({"cosine": lambda look: -0.8 if look % 3 else -0.3}, ["lr_too_high"]),
        ({"cosine": lambda look: -0.8 if look % 3 else 0.0}, []),
        ({"cosine": -0.3}, []),
        ({"ratio": 1e-9}, ["lr_too_low"]),
        ({"cosine": 0.6}, ["lr_too_low"]),
        ({"cosine": 0.6, "ratio": 0.02}, []),
        ({"cosine": 0.6, "rate": lambda look: 0.1 * (look + 1)}, []),  # a warm-up
        ({"ratio": 1e-9, "rate": lambda look: 0.1 if look < 3 else 0.001, "cosine": 0.0}, []),  # the end of a schedule
    ],
)
def test_advice_on_the_learning_rate_is_given_once(quantities, told):
    assert _looks(**quantities) == told


def test_elements_without_a_gradient_are_not_those_that_eps_sets():
    def told(zero):
        sums = {"grad_sq": 1.0, "param_sq": 1.0, "update_sq": 1e-6, "below_eps": 98.0, "zero_grad": zero}
        row = [sums.get(column, 0.0) for column in TENSOR_COLUMNS]
        seen = Inspection(50, row, ["w"], [100], [("all", 0.1, 1)])
        return [alarm.kind for alarm in ParameterHealth().update(seen)]

    assert told(zero=0.0) == ["stalled"]
    assert told(zero=97.0) == []


def test_a_healthy_run_has_no_reports():
    assert _told(Net(), every=5, steps=200, lr=0.01) == {}


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_group_whose_gradient_explodes_is_named(kind):
    class Explodes(Net):
        def on_after_backward(self):
            if self.trainer.global_step == 40:
                self.head.weight.grad.mul_(1e4)

    rules = [lo.ParamGroupRule(name="first", pattern="^body"), lo.ParamGroupRule(name="last", pattern="^head")]
    guard = lo.DivergenceGuard(spikes=None)
    make_trainer([lo.ConfigureOptimizers(**ADAMWS[kind], lr=1e-3, param_groups=rules), guard]).fit(
        Explodes(), batches(60, batch_size=16)
    )
    (entry,) = (entry for entry in guard.report.entries if entry.kind == "exploding")
    assert (entry.step, entry.names) == (40, ["group last"])
