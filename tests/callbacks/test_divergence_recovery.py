"""Runs on real data that go wrong slowly, with the guard and without."""

from __future__ import annotations

import warnings

import lightning.pytorch as L
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from tests.helpers import make_trainer, precision

CASES = {"sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 3e-3})}


class Digits(L.LightningModule):
    """Learns well at first; from step ``at`` on its rate is ``too_high`` times as high."""

    def __init__(self, kind: str, too_high: float, at: int):
        super().__init__()
        self.at = at
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        self.net, self.kind, self.too_high, self.losses = nn.Sequential(*layers), kind, too_high, []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        cls, options = CASES[self.kind]
        optimizer = cls(self.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: self.too_high if k >= self.at else 1.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _fit(kind, too_high, callbacks, name="32-true", at=300, steps=700):
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    model = Digits(kind, too_high, at)
    loader = DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(1))
    trainer = make_trainer(callbacks, max_epochs=-1, max_steps=steps, log_every_n_steps=50, **precision(name))
    trainer.fit(model, loader)
    return sum(model.losses[-50:]) / 50


@pytest.fixture(autouse=True)
def _expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step ")
        yield


def _did(guard):
    return [(entry.step, entry.text) for entry in guard.report.entries if entry.kind == "did"]


@pytest.mark.parametrize(("kind", "name"), [("sgd", "32-true"), ("adamw", "bf16-mixed")])
def test_a_rate_30_times_too_high_is_found_within_150_steps_and_corrected(kind, name):
    guard = lo.DivergenceGuard()
    guarded, unguarded = _fit(kind, 30.0, [guard], name), _fit(kind, 30.0, [], name)
    assert 300 <= _did(guard)[0][0] <= 330
    assert all(text.startswith("back to the state after step 199") for _, text in _did(guard))
    assert guarded < 0.5 * unguarded


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_the_same_from_the_first_step_on(name):
    guard = lo.DivergenceGuard()
    guarded, unguarded = (_fit("sgd", 30.0, parts, name, at=0, steps=450) for parts in ([guard], []))
    assert _did(guard)[0][0] <= 150
    assert guarded < 0.3 * unguarded


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
def test_a_healthy_run_is_left_alone(kind, name):
    guard = lo.DivergenceGuard()
    guarded = _fit(kind, 1.0, [guard], name, steps=350)
    assert len(guard.report.entries) <= 1
    assert not _did(guard)
    if not guard.report.entries and name == "32-true":
        assert guarded == _fit(kind, 1.0, [], name, steps=350)
