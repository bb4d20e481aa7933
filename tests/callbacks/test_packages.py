"""`import pytorch_lightning as pl`: the same code in other classes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

import lightning_optim as lo
from lightning_optim.callbacks._packages import callback_overrides, is_lightning, module_overrides
from tests.helpers import Net, batches, read_events

pl = pytest.importorskip("pytorch_lightning")
loggers = pytest.importorskip("pytorch_lightning.loggers")
plugins = pytest.importorskip("pytorch_lightning.plugins")

LIMIT = 1e-3


class Twin(pl.LightningModule):  # type: ignore[name-defined]
    """A module of the other package.

    Args:
        nan_batch: Batch whose loss is NaN.
    """

    def __init__(self, nan_batch=-1):
        super().__init__()
        self.net, self.nan_batch, self.moved = Net(), nan_batch, []

    def training_step(self, batch, batch_idx):
        self.before = nn.utils.parameters_to_vector(self.parameters()).detach().clone()
        loss = self.net.training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == self.nan_batch else loss

    def on_train_batch_end(self, *args):
        now = nn.utils.parameters_to_vector(self.parameters()).detach()
        self.moved.append((now - self.before).norm().item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=123.0)


class Bare(Twin):
    configure_optimizers = pl.LightningModule.configure_optimizers


class Overrides(lo.GradientClipping):
    """All of Lightning's hooks that a callback of ours needs are the user's."""

    def setup(self, trainer, pl_module, stage):
        pass


def trainer_of(callbacks, scaled=False, **options):
    plugin = plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1, **quiet, **options}
    return pl.Trainer(callbacks=callbacks, plugins=[plugin] if scaled else [], **options)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipping", [lo.GradientClipping, Overrides])
def test_ours_act_on_the_other_package(clipping, scaled, tmp_path, capsys):
    model = Twin(nan_batch=2)
    guard = lo.DivergenceGuard(report_dir=str(tmp_path))
    logger = loggers.TensorBoardLogger(tmp_path, default_hp_metric=False)
    configure = lo.ConfigureOptimizers("sgd", lr=1.0, schedule="linear", param_groups=[])
    callbacks = [configure, clipping(LIMIT), guard, lo.OptimizerMonitor(), lo.RunSummary()]
    with pytest.warns(UserWarning, match="Step 2 skipped"):
        trainer_of(callbacks, scaled, logger=logger).fit(model, batches(4))
    # The rate stands still on the skipped step.
    assert model.moved == pytest.approx([LIMIT, 0.75 * LIMIT, 0.0, 0.5 * LIMIT], rel=1e-2)
    assert guard.skipped_steps == 1
    events = read_events(logger.log_dir)
    assert [value for _, value in events["optim_lr/default"]] == [1.0, 0.75, 0.5, 0.5]
    assert any((tmp_path / "lightning_logs").rglob("events*"))
    out = capsys.readouterr().out
    assert "tensorboard --logdir" in out
    assert "1" in next(line for line in out.splitlines() if "steps skipped" in line)


def test_a_module_without_the_method_is_explained():
    with pytest.raises(Exception, match="defines no configure_optimizers, and Lightning checks that"):
        trainer_of([lo.ConfigureOptimizers("sgd", lr=1.0)]).fit(Bare(), batches(2))
    model = Bare()
    lo.attach(model, lo.OptimizerFactory("sgd", lr=0.1))
    trainer_of([]).fit(model, batches(2))
    assert len(model.moved) == 2


def test_what_is_asked_of_lightnings_classes():
    for module in (Twin(), Net()):
        assert is_lightning(module, "LightningModule")
        assert module_overrides(module, "training_step")
        assert not module_overrides(module, "configure_gradient_clipping")
    assert not is_lightning(nn.Linear(1, 1), "LightningModule")
    with pytest.raises(ValueError, match="Expected a parent"):
        is_overridden("training_step", Twin())  # why it is not asked this way

    class Looks(pl.Callback):  # type: ignore[name-defined]
        def on_before_optimizer_step(self, *args):
            pass

    assert callback_overrides(Looks(), "on_before_optimizer_step")
    assert not callback_overrides(pl.Callback(), "on_before_optimizer_step")
    assert not callback_overrides(pl.callbacks.LearningRateMonitor(), "on_before_optimizer_step")
