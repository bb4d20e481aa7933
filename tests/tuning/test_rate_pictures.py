"""Pictures of what sweeps and trials told, and the schedule under which trials run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.core.block_plot import block_rows
from lightning_optim.tuning.rates.found import FoundRate
from lightning_optim.tuning.rates.picture import draw_in_terminal, pixels, save_picture
from lightning_optim.tuning.rates.rate_trials import try_rates
from lightning_optim.tuning.rates.suggestion import suggest
from lightning_optim.tuning.trials import rates as trial_rates
from tests.helpers import Net, make_trainer
from tests.tuning.test_halving import Quadratic
from tests.tuning.test_suggestion import RATES, ended, losses

SWEEP = FoundRate("AdamW", 1e-3, suggest(RATES, [ended(losses(noise=0.05))]))
TRIALS = FoundRate("SGD", 0.1, try_rates(Quadratic(0.02), 1e-3, 10.0, 40))
FLAT = FoundRate("Lion", 1e-4, suggest(RATES, [np.random.default_rng(0).standard_normal(140)]))
NOTHING = FoundRate("Muon", 0.02, try_rates(lambda *_: [], 0.1, 1.0, 40))


def test_blocks():
    assert block_rows([0.0, 0.5, 1.0, 1 / 16], 2) == ["  █ ", " ██▁"]
    assert block_rows([2.0, -1.0], 1) == ["█ "]


@pytest.mark.parametrize("found", [SWEEP, TRIALS], ids=["sweep", "trials"])
@pytest.mark.parametrize("width", [1, 40, 72])
def test_in_a_terminal(found, width):
    lines = draw_in_terminal(found, width).splitlines()
    assert lines[0].startswith(f"{found.name}: ")
    assert len(lines) == 12
    assert max(map(len, lines[1:-1])) <= max(width, 20) + 12
    marks = lines[9]
    margin = lines[1].index("|") + 1
    where = (marks.index("^") - margin) / (max(width, 20) - 1)
    rates = found.evidence.rates if found is SWEEP else [t.value for t in found.evidence.trials if not t.diverged]
    expected = np.log(found.lr / min(rates)) / np.log(max(rates) / min(rates))
    assert where == pytest.approx(expected, abs=1 / max(width, 20))
    assert "█" in lines[8]


def test_what_tells_nothing_is_drawn_without_a_mark():
    assert "^" not in draw_in_terminal(FLAT)
    assert draw_in_terminal(NOTHING).endswith("(nothing to draw)")


@pytest.mark.parametrize("found", [[SWEEP, FLAT], [TRIALS, NOTHING], []], ids=["sweeps", "trials", "nothing"])
def test_as_pixels(found):
    picture = pixels(found)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert (picture != 255).any()


def test_on_disk(tmp_path):
    save_picture([SWEEP], tmp_path / "new" / "lr.png")
    assert (tmp_path / "new" / "lr.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-optim\[plot\]"):
        pixels([SWEEP])


def test_trials_before_the_first_step_have_the_schedule_of_the_whole_run(monkeypatch):
    class Own(Net):
        # A scheduler that no callback has asked to look at the run.
        def configure_optimizers(self):
            return lo.OptimizerFactory("sgd", lr=0.1, schedule="cosine", warmup="20%")(self)

    data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 2)), batch_size=8)
    seen, set_rates = [], trial_rates.Peaks.set_rates

    def watched(peaks, factors):
        seen.append(factors[0])
        if len(seen) > 40:  # set when a batch begins, and before the step
            raise RuntimeError("One trial is enough.")
        set_rates(peaks, factors)

    monkeypatch.setattr(trial_rates.Peaks, "set_rates", watched)
    trainer = make_trainer([], max_steps=400, max_epochs=-1)
    lo.find_lr(trainer, Own(), data, method="trials", steps=80, low=1e-4, high=1e-3)
    first = np.array(seen[:40:2]) / 1e-3
    assert np.argmax(first) in (3, 4)
    assert first[-1] < 0.02
    assert np.all(np.diff(first[5:]) < 0)
