"""What is relied on beyond Lightning's documentation. If one of these fails, a release of Lightning has moved."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler

from lightning_optim.callbacks import _lightning as lightning_private
from tests.helpers import BareNet, Net, batches, make_trainer, precision, read_events


class Probe(L.Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, bool]] = []
        self.hooks: list[str] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rows.append((lightning_private.logging_step(trainer), lightning_private.logging_due(trainer)))
        self.hooks.append("before_step")

    def on_train_batch_end(self, trainer, pl_module, *args):
        assert self.rows[-1][0] == lightning_private.logging_step(trainer)
        self.hooks.append("batch_end")


class Logs(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def lr_scheduler_step(self, scheduler, metric):
        self.trainer.callbacks[0].hooks.append("scheduler")  # type: ignore[attr-defined]
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("every", [1, 3])
def test_step_and_dueness_are_those_of_module_log(logger, every):
    probe = Probe()
    make_trainer([probe], logger=logger, log_every_n_steps=every, max_epochs=2).fit(Logs(), batches(5))
    written = [step for step, _ in read_events(logger.log_dir)["train_loss"]]
    assert [step for step, due in probe.rows if due] == written
    assert [step for step, _ in probe.rows] == list(range(10))


@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
def test_the_scheduler_steps_before_the_batch_ends(name):
    probe = Probe()
    make_trainer([probe], **precision(name)).fit(Logs(), batches(2))
    assert probe.hooks == ["before_step", "scheduler", "batch_end"] * 2


def test_gradient_accumulation_scheduler_tells_its_factor_by_epoch():
    assert [GradientAccumulationScheduler({0: 4, 1: 1}).get_accumulate_grad_batches(epoch) for epoch in (0, 1, 2)] == [
        4,
        1,
        1,
    ]


def test_a_module_without_configure_optimizers_is_refused_before_setup_and_reported_to_on_exception():
    calls = []

    class Spy(L.Callback):
        def setup(self, trainer, pl_module, stage):
            calls.append("setup")

        def on_exception(self, trainer, pl_module, exception):
            calls.append(type(exception))

    with pytest.raises(MisconfigurationException, match="configure_optimizers"):
        make_trainer([Spy()]).fit(BareNet(), batches(1))
    assert calls == [MisconfigurationException]


def test_an_instance_attribute_overrides_configure_optimizers():
    class Patch(L.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.configure_optimizers = lambda: torch.optim.SGD(pl_module.parameters(), lr=0.25)

    trainer = make_trainer([Patch()])
    trainer.fit(Net(), batches(1))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_teardown_is_not_called_after_an_exception():
    calls = []

    class Spy(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("mine")

        def teardown(self, *args):
            calls.append("teardown")

        def on_exception(self, *args):
            calls.append("on_exception")

    with pytest.raises(RuntimeError, match="mine"):
        make_trainer([Spy()]).fit(Net(), batches(1))
    assert calls == ["on_exception"]


@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 3}, {"limit_train_batches": 0.5}, {"overfit_batches": 2}]
)
@pytest.mark.parametrize("several", [False, True])
def test_batches_are_counted_as_fit_does_and_none_is_loaded(options, several):
    class Module(Net):
        def train_dataloader(self):
            return {"a": batches(7), "b": batches(4)} if several else batches(7)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"] if several else batch, batch_idx)

    trainer = make_trainer(**options)
    lightning_private.enter_fit(trainer, model := Module(), None)
    lightning_private.verify(trainer)
    lightning_private.configure_optimizers(trainer, model)
    assert len(lightning_private.count_training_batches(trainer)) == 1 + several
    counted = trainer.num_training_batches
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    fitted = make_trainer(**options)
    fitted.fit(Module())
    assert fitted.num_training_batches == counted


def test_the_loss_scale_is_a_tensor_on_the_device():
    scales = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            scales.append(lightning_private.loss_scale(trainer))

    make_trainer([Looks()], **precision("16-mixed")).fit(Net(), batches(1))
    make_trainer([Looks()]).fit(Net(), batches(1))
    assert scales[0].item() == 1024.0
    assert scales[1] is None


def test_averages_beside_the_model_are_found():
    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            (average,) = lightning_private.averaged_models(trainer)
            names = {name for name, _ in average.named_parameters()}
            assert names == {f"module.{name}" for name, _ in pl_module.named_parameters()}
            self.looked = True

    looks = Looks()
    make_trainer([EMAWeightAveraging(), looks]).fit(Net(), batches(2))
    assert looks.looked
