"""Our callbacks beside Lightning's own, under its tuner, and copied."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.tuner.tuning import Tuner

import lightning_optim as lo
from lightning_optim import callbacks
from lightning_optim.callbacks._hub import HubCallback
from tests.helpers import Net, Recorder, batches, bit_equal, make_trainer, read_events

PUBLIC = [getattr(callbacks, name) for name in callbacks.__all__]
REQUIRED = {callbacks.WeightDecay: {"weight_decay": 0.1}}  # arguments without a default
EVERY = [cls for cls in PUBLIC if inspect.isclass(cls) and issubclass(cls, HubCallback)]


class Modes(torch.optim.SGD):
    """With two modes that do not differ, which suits `ScheduleFree`, too."""

    def train(self):
        """Has nothing to do."""

    eval = train


class Own(Net):
    """With an optimizer that suits a callback of ours."""

    def __init__(self, cls):
        super().__init__()
        self.callback = cls

    def configure_optimizers(self):
        if self.callback is lo.WeightAverage:
            return lo.optim.SGD(self.parameters(), lr=0.1, ema=0.9)
        if self.callback is lo.GradientRelease:
            return lo.optim.SGD(self.parameters(), lr=0.1)
        return Modes(self.parameters(), lr=0.1)


def _all():
    configure = lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine", warmup=2)
    return [configure, lo.GradientClipping(0.5), lo.DivergenceGuard(), lo.OptimizerMonitor()]


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
@pytest.mark.parametrize("used", [False, True])
def test_every_callback_can_be_copied_and_pickled_and_then_fits(cls, copied, used):
    """And does what the original does."""
    callback = cls(**REQUIRED.get(cls, {}))
    if used:
        make_trainer([callback]).fit(Own(cls), batches(2))
    twin, finals = copied(callback), []
    for each in (twin, callback):
        model = Own(cls)
        make_trainer([each]).fit(model, batches(2))
        finals.append(dict(model.state_dict()))
    assert type(twin) is cls
    assert bit_equal(*finals)


@pytest.mark.parametrize("cls", EVERY)
def test_every_callback_alone_keeps_its_hands_off_the_rest(cls):
    model, recorder = Own(cls), Recorder()
    make_trainer([cls(**REQUIRED.get(cls, {})), recorder]).fit(model, batches(3))
    if cls is not lo.ConfigureOptimizers:
        assert recorder.rates == [[0.1]] * 3


@pytest.mark.parametrize(
    "other",
    [
        lambda: lightning_callbacks.EarlyStopping("val_loss"),
        lambda: lightning_callbacks.Timer(),
        lambda: lightning_callbacks.EMAWeightAveraging(),
        lambda: lightning_callbacks.LambdaCallback(),
        lambda: lightning_callbacks.TQDMProgressBar(),
        lambda: lightning_callbacks.RichProgressBar(),
        lambda: lightning_callbacks.DeviceStatsMonitor(cpu_stats=False),
        lambda: lightning_callbacks.ModelSummary(),
        lambda: lightning_callbacks.LearningRateMonitor("step", log_weight_decay=True),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_rates_are_the_same_beside_lightnings_own_callbacks(other, first, logger):
    alone, beside = Recorder(), Recorder()
    make_trainer([*_all(), alone]).fit(Net(), batches(6), batches(1))
    theirs = other()
    quiet = {"enable_progress_bar": isinstance(theirs, lightning_callbacks.ProgressBar)}
    trainer = make_trainer([theirs, *_all(), beside] if first else [*_all(), beside, theirs], logger=logger, **quiet)
    trainer.fit(Net(), batches(6), batches(1))
    assert beside.rates == alone.rates


def test_lightnings_monitor_shows_the_same_rates_under_the_same_names(logger):
    # Which notes them at the start of a batch, the first one included.
    make_trainer([lightning_callbacks.LearningRateMonitor("step"), *_all()], logger=logger).fit(Net(), batches(6))
    events = read_events(logger.log_dir)
    for group in ("no_decay", "default"):
        theirs = [
            value for tag, points in events.items() if tag.endswith(f"/{group}") and "lr-" in tag for _, value in points
        ]
        assert theirs == pytest.approx([value for _, value in events[f"optim_lr/{group}"]])
        assert len(theirs) == 6


def test_the_learning_rate_finder_leaves_schedule_and_module_as_they_were(tmp_path):
    model, alone, after = Net(), Recorder(), Recorder()
    make_trainer([*_all(), alone]).fit(Net(), batches(12))
    trainer = make_trainer([*_all(), after], default_root_dir=tmp_path)
    Tuner(trainer).lr_find(model, batches(12), num_training=4, update_attr=False)
    assert "configure_optimizers" not in vars(model)
    after.rates.clear()
    trainer.fit(model, batches(12))
    assert after.rates == alone.rates


def test_an_evaluation_between_two_fits_changes_nothing():
    model, recorder = Net(), Recorder()
    trainer = make_trainer([*_all(), recorder])
    trainer.fit(model, batches(4))
    trainer.validate(model, batches(2), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(4))
    assert recorder.rates[4:] == recorder.rates[:4]
