"""Textbook networks that train well: nothing is reported of parameters without a gradient by construction."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest

import lightning_optim as lo
from tests.divergence import textbook, trainings
from tests.helpers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = {
    ("CNN", "AdamW", "bf16-mixed", 5),
    ("CNN", "SGD", "32-true", 1),
    ("ResNet", "SGD", "32-true", 5),
    ("ViT", "AdamW", "32-true", 1),
    ("transformer", "AdamW", "32-true", 5),
    ("GRU", "Muon", "32-true", 5),
    ("functional norms", "SGD", "32-true", 1),
    ("experts", "SGD", "32-true", 5),
    ("low rank", "AdamW", "32-true", 1),
}
"""Those of the default tests."""


def _cells() -> list[Any]:
    cells = [
        (network, optimizer, precision, every)
        for network in textbook.NETWORKS
        for optimizer in textbook.OPTIMIZERS
        for precision in ("32-true", "bf16-mixed")
        for every in (1, 5, 50)
    ]
    assert set(cells) >= QUICK
    return [pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.slow]) for cell in cells]


def _trainer(every: int, parts: Any, **options: Any) -> L.Trainer:
    return make_trainer(parts, **{**options, "log_every_n_steps": every})


@pytest.mark.parametrize(("network", "optimizer", "precision", "every"), _cells())
def test_a_good_run_of_a_textbook_network_has_no_alarm(tmp_path, monkeypatch, network, optimizer, precision, every):
    monkeypatch.setattr(trainings, "make_trainer", partial(_trainer, every))
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), rollback=None)
    training = textbook.training(network, optimizer, precision)
    steps = 45 if (network, optimizer, precision, every) in QUICK else 110
    losses = trainings.train(training, [guard], steps)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert [(entry.step, entry.kind, entry.text) for entry in guard.report.entries] == []
