"""Schedules move with their optimizer's own steps in manual optimization; rates that others write are taken over."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader

import lightning_optim as lo
from tests.helpers import PRECISIONS, Net, NetWith, Recorder, Stream, batches, make_trainer, precision

PEAK = 0.05
OURS = pytest.mark.parametrize("ours", [[], [lo.GradientClipping, lo.DivergenceGuard]], ids=len)


def _cosine(total):
    return [PEAK * (1 + math.cos(math.pi * k / total)) / 2 for k in range(total)]


def _made(callbacks):
    return [callback() for callback in callbacks]


class Manual(Net):
    """Manual optimization in one of the ways that Lightning's documentation shows.

    Args:
        way: Which one.
        where: Whether the optimizer is the factory's, in the module, or a callback's.
    """

    def __init__(self, way, where="module", **options):
        super().__init__()
        self.automatic_optimization, self.way, self.where = False, way, where
        self.options = {"schedule": "cosine", **options}

    def configure_optimizers(self):
        if self.where == "module":
            return lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], **self.options)(self)
        if self.where == "build":
            optimizer, scheduler = lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], **self.options).build(self)
            return [optimizer], [scheduler]
        if self.where == "alone":
            return lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], **self.options)(self)["optimizer"]
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        every = {"each": 1, "accumulate": 4, "rarely": 4}.get(self.way, 1)
        if self.way == "closure":
            optimizer.zero_grad()
            optimizer.step(closure=closure)
            return
        for _ in range(3 if self.way == "thrice" else 1):
            closure()
            if self.way == "rarely" and batch_idx % every:
                continue
            if self.way == "accumulate" and (batch_idx + 1) % every:
                continue
            if self.way == "toggled":
                self.toggle_optimizer(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            if self.way == "toggled":
                self.untoggle_optimizer(optimizer)
            if self.way == "user":
                self.lr_schedulers().step()


STEPS = {"each": 48, "closure": 48, "toggled": 48, "user": 48, "thrice": 144, "accumulate": 12, "rarely": 12}


@pytest.mark.filterwarnings("ignore:The schedule moves with the steps")
@pytest.mark.parametrize("where", ["module", "alone", "callback"])
@pytest.mark.parametrize("way", STEPS)
@pytest.mark.parametrize("name", PRECISIONS)
@OURS
def test_the_schedule_moves_with_the_steps_of_its_optimizer_and_ends_where_training_ends(way, where, name, ours):
    if way == "closure" and name == "16-mixed":
        pytest.skip("Lightning refuses it")
    if way == "user" and where == "alone":
        pytest.skip("there is no scheduler to step")
    if name == "bf16-mixed" and where != "callback":
        pytest.skip("the others are enough")
    supplier = [lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule="cosine")]
    recorder = Recorder()
    callbacks = [*(supplier if where == "callback" else []), *_made(ours), recorder]
    trainer = make_trainer(callbacks, max_epochs=3, **precision(name))
    trainer.fit(Manual(way, where), batches(16))
    rates = [rates[0] for rates in recorder.rates]
    assert len(rates) == STEPS[way]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert rates[-1] > 0
    if way not in ("thrice", "rarely"):  # whose rhythm only the second batch or step shows
        assert rates == pytest.approx(_cosine(STEPS[way]))
    else:
        assert all(a > b for a, b in itertools.pairwise(rates))


def test_a_scheduler_that_build_has_made_follows_too_where_a_callback_of_ours_is_there():
    recorder = Recorder()
    make_trainer([lo.GradientClipping(), recorder], max_epochs=3).fit(Manual("each", "build"), batches(16))
    assert [rates[0] for rates in recorder.rates] == pytest.approx(_cosine(48))


class Returns(NetWith):
    """Returns what `build` has made in one of the ways that Lightning accepts."""

    def __init__(self, how):
        def configure(module):
            optimizer, scheduler = lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], schedule="cosine").build(module)
            by_epoch = {"scheduler": scheduler, "interval": "epoch"}
            return {
                "optimizer": optimizer,
                "lists": ([optimizer], [scheduler]),
                "epoch": {"optimizer": optimizer, "lr_scheduler": by_epoch},
                "step": {"optimizer": optimizer, "lr_scheduler": {**by_epoch, "interval": "step"}},
            }[how]

        super().__init__(configure)


@pytest.mark.filterwarnings("ignore:The schedule moves with the steps")
@pytest.mark.parametrize("how", ["optimizer", "lists", "epoch", "step"])
@OURS
def test_whatever_is_returned_of_build_the_schedule_moves_once_per_step(how, ours):
    recorder = Recorder()
    trainer = make_trainer([*_made(ours), recorder], max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Returns(how), batches(8))
    assert [rates[0] for rates in recorder.rates] == pytest.approx(_cosine(12))


def test_a_scheduler_of_build_needs_no_callback_of_ours():
    recorder = Recorder()
    make_trainer([recorder], max_epochs=3).fit(Manual("each", "build"), batches(16))
    assert [rates[0] for rates in recorder.rates] == pytest.approx(_cosine(48))


def test_a_second_step_by_the_user_is_noticed_once(capsys):
    with pytest.warns(UserWarning, match=r"moves with the steps of its optimizer.*is ignored"):
        make_trainer([lo.ConfigureOptimizers("sgd", lr=PEAK, schedule="cosine")]).fit(
            Manual("user", "callback"), batches(4)
        )


def test_an_overflow_under_a_grad_scaler_does_not_move_the_schedule():
    class Overflows(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                batch = [batch[0] * float("inf"), batch[1]]
            return super().training_step(batch, batch_idx)

    trainer = make_trainer([lo.GradientClipping()], max_epochs=1, **precision("16-mixed"))
    trainer.fit(Overflows("each"), batches(8))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 7


class Gan(L.LightningModule):
    """A critic that steps three times per batch, and a generator that steps in each second one."""

    def __init__(self, ours):
        super().__init__()
        self.automatic_optimization, self.ours = False, ours
        self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self):
        factory = lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], schedule="cosine")
        made = [factory(self.generator), factory(self.critic)]
        return [each["optimizer"] for each in made], [each["lr_scheduler"] for each in made]

    def training_step(self, batch, batch_idx):
        optimizers: Any = self.optimizers()
        generator, critic = optimizers
        for _ in range(3):
            critic.zero_grad()
            self.manual_backward(self.critic(batch[0]).mean())
            critic.step()
        if batch_idx % 2 == 0:
            generator.zero_grad()
            self.manual_backward(self.critic(self.generator(batch[0])).mean())
            generator.step()


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_steps": 168}], ids=str)
@pytest.mark.parametrize("ours", [False, True])
def test_each_of_two_optimizers_has_a_length_of_its_own(ours, options):
    trainer = make_trainer([lo.GradientClipping(), lo.OptimizerMonitor()] if ours else [], **options)
    trainer.fit(Gan(ours), batches(16))
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    assert [scheduler.last_epoch for scheduler in schedulers] == [24, 144]
    for optimizer in trainer.optimizers:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=PEAK * 2e-3)


def test_max_steps_counts_the_steps_of_all_optimizers():
    class Both(Gan):
        def training_step(self, batch, batch_idx):
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
                self.manual_backward(self.critic(self.generator(batch[0])).mean())
                optimizer.step()

    recorder = Recorder()
    make_trainer([recorder], max_steps=40).fit(Both(False), batches(30))
    assert [rates[0] for rates in recorder.rates[::2]] == pytest.approx(_cosine(20))
    assert [rates[0] for rates in recorder.rates[1::2]] == pytest.approx(_cosine(20))


@pytest.mark.parametrize("schedule", ["cosine", lo.schedules.WSD(warmup=4, cooldown=6)], ids=repr)
@pytest.mark.parametrize("way", ["each", "accumulate", "thrice", "rarely"])
def test_max_steps_are_the_steps_of_the_only_optimizer_from_the_first_one_on(way, schedule, capsys):
    """Whatever its rhythm is, which the first step does not show yet."""
    recorder = Recorder()
    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule=schedule)
    make_trainer([configure, recorder], max_steps=12).fit(Manual(way, "callback"), batches(16))
    curve = (lo.schedules.Cosine() if schedule == "cosine" else schedule).over(lo.Horizon(total_steps=12))
    assert [rates[0] for rates in recorder.rates] == pytest.approx([PEAK * curve(step) for step in range(12)])
    assert "stretched" not in capsys.readouterr().out


@pytest.mark.parametrize("way", ["accumulate", "each", "rarely"])
def test_a_manual_run_is_resumed_on_its_curve(tmp_path, way):
    path = tmp_path / "a.ckpt"

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    def fit(callbacks=(), ckpt_path=None):
        recorder = Recorder()
        supplier = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule="cosine")
        trainer = make_trainer([supplier, recorder, *callbacks], max_epochs=4)
        trainer.fit(Manual(way, "callback"), batches(16), ckpt_path=ckpt_path)
        return [rates[0] for rates in recorder.rates]

    whole = fit([Saves()])
    assert fit(ckpt_path=path) == pytest.approx(whole[len(whole) // 2 :], abs=1e-12)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("batch", [7, 23])
def test_a_manual_run_is_resumed_within_an_epoch(tmp_path, batch, recwarn):
    path = tmp_path / "a.ckpt"

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.fit_loop.total_batch_idx == batch:
                trainer.save_checkpoint(path)

    def fit(callbacks=(), ckpt_path=None):
        recorder = Recorder()
        supplier = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule="cosine")
        trainer = make_trainer([supplier, recorder, *callbacks], max_epochs=3)
        trainer.fit(Manual("accumulate", "callback"), batches(16), ckpt_path=ckpt_path)
        return [rates[0] for rates in recorder.rates]

    whole = fit([Saves()])
    assert fit(ckpt_path=path) == pytest.approx(whole[(batch + 1) // 4 :], abs=1e-12)
    assert not [warning for warning in recwarn if "old curve" in str(warning.message)]


# Rates that others write.


class Halves(L.Callback):
    def __init__(self, key="lr"):
        self.key = key

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            for group in trainer.optimizers[0].param_groups:
                group[self.key] *= 0.5


@pytest.mark.parametrize("schedule", [None, "linear"])
@pytest.mark.parametrize("lr", [0.4, torch.tensor(0.4)], ids=["float", "tensor"])
@pytest.mark.parametrize("where", ["callback", "module"])
def test_a_rate_that_a_callback_sets_is_a_factor_on_the_schedule_from_then_on(schedule, lr, where):
    recorder = Recorder()
    options = {"optimizer_kwargs": {"lr": lr}, "param_groups": [], "schedule": schedule}
    factory = lo.OptimizerFactory("sgd", **options)
    callbacks = [lo.ConfigureOptimizers("sgd", **options)] if where == "callback" else []
    model = Net() if where == "callback" else NetWith(lambda module: factory(module))
    make_trainer([*callbacks, Halves(), recorder], max_epochs=3).fit(model, batches(4))
    curve = [1.0] * 12 if schedule is None else [1 - k / 12 for k in range(12)]
    expected = [0.4 * value * 0.5 ** (k // 4) for k, value in enumerate(curve)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


def test_it_is_said_once(capsys):
    optimizer, scheduler = lo.OptimizerFactory("sgd", lr=0.4).build(nn.Linear(2, 2))
    for _ in range(3):
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        scheduler.step()
    said = capsys.readouterr().out
    assert said.count("set by others") == 1
    assert "no_decay: 0.2" in said
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.4]


def test_a_rate_set_where_the_schedule_is_0_stays():
    optimizer, scheduler = lo.OptimizerFactory("sgd", lr=0.4, schedule="linear", param_groups=[]).build(
        nn.Linear(2, 2), lo.Horizon(4)
    )
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_factor_is_resumed(tmp_path):
    def fit(ckpt_path=None, *callbacks):
        recorder = Recorder()
        configure = lo.ConfigureOptimizers("sgd", lr=0.4, schedule="linear", param_groups=[])
        trainer = make_trainer([configure, *callbacks, recorder], max_epochs=3)
        trainer.fit(Net(), batches(4), ckpt_path=ckpt_path)
        return [rates[0] for rates in recorder.rates]

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    class HalvesOnce(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.optimizers[0].param_groups[0]["lr"] *= 0.5

    whole = fit(None, HalvesOnce(), Saves())
    with pytest.warns(UserWarning, match="Resumed with the checkpoint's hyperparameters.*lr 0.2 → 0.4"):
        assert fit(tmp_path / "a.ckpt") == pytest.approx(whole[8:])


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
def test_another_scheduled_hyperparameter_is_taken_over_too(key, monkeypatch):
    seen, told = [], []
    monkeypatch.setattr(lo.ConfigureOptimizers, "_tell", lambda self, message, warn: told.append(message))

    class Sees(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.optimizers[0].param_groups[0][key])

    configure = lo.ConfigureOptimizers(
        "sgd", lr=0.1, optimizer_kwargs={key: 0.8}, param_groups=[], schedules={key: "linear"}
    )
    make_trainer([configure, Halves(key), Sees()], max_epochs=2).fit(Net(), batches(4))
    halved = [1.0] * 4 + [0.5] * 4  # the schedule's value for the step after that batch
    expected = [0.8 * factor * (1 - (k + 1) / 8) for k, factor in enumerate(halved)]
    assert seen == pytest.approx(expected)
    assert [message.partition(" was set by others")[0] for message in told] == [f"{key} of group default"]


class Backbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone = self.body

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _ramp(*callbacks):
    recorder = Recorder()
    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 2.0, backbone_initial_ratio_lr=0.1, verbose=False
    )
    make_trainer([finetuning, *callbacks, recorder], max_epochs=6).fit(Backbone(), batches(4))
    return [rates[1] for rates in recorder.rates if len(rates) > 1]


def test_the_ramp_of_backbone_finetuning_is_lightnings_without_a_schedule():
    assert _ramp(lo.ConfigureOptimizers("adamw", lr=0.1, param_groups=[])) == pytest.approx(_ramp())


def test_the_ramp_of_backbone_finetuning_times_a_schedule_never_jumps_back_within_an_epoch():
    rates = _ramp(lo.ConfigureOptimizers("adamw", lr=0.1, param_groups=[], schedule="cosine"))
    epochs = [rates[k : k + 4] for k in range(0, len(rates), 4)]
    for epoch in epochs[:4]:
        assert all(b <= a and b > 0.5 * a for a, b in itertools.pairwise(epoch))


def test_the_cut_of_a_guard_is_none_of_these():
    """The guard cuts rates for the time of a step; in manual optimization the schedule moves within that time."""
    said: list[Any] = []
    recorder = Recorder()
    guard = lo.DivergenceGuard(rollback=None)

    class Cuts(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                guard._guarded[0].cut.lower(0.5)

    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule="cosine")
    configure._tell = lambda message, warn: said.append(message)
    trainer = make_trainer([configure, guard, Cuts(), recorder], max_epochs=1)
    trainer.fit(Manual("each", "callback"), batches(16))
    assert not said
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == PEAK


# A schedule that looks at a metric.


class Logs(Net):
    """Logs a metric that never improves, in validation or in training."""

    def __init__(self, where="validation"):
        super().__init__()
        self.where = where

    def training_step(self, batch, batch_idx):
        if self.where == "training":
            self.log("level", 1.0, on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.where == "validation":
            self.log("level", 1.0)


def _plateau(**options):
    schedule = lo.schedules.ReduceOnPlateau(monitor="level", factor=0.5, patience=0, **options)
    return lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule=schedule)


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({}, [8, 16]),
        ({"val_check_interval": 0.5}, [4, 8, 12, 16]),
        ({"val_check_interval": 2}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6, 9, 12, 15]),
        ({"check_val_every_n_epoch": 2}, [16]),
        ({"val_check_interval": 0.5, "num_sanity_val_steps": 1}, [4, 8, 12, 16]),
    ],
    ids=str,
)
@pytest.mark.parametrize("manual", [False, True])
def test_a_plateau_looks_at_every_validation(options, looks, manual):
    model = Logs()
    if manual:

        class ByHand(Logs):
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        model = ByHand()
        model.automatic_optimization = False
    recorder = Recorder()
    trainer = make_trainer([_plateau(), recorder], max_epochs=2, **options)
    trainer.fit(model, batches(8), batches(1))
    # The first look only gives the value to compare with.
    expected = [PEAK * 0.5 ** max(sum(look <= k for look in looks) - 1, 0) for k in range(16)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


@pytest.mark.parametrize("validates", [True, False])
def test_a_plateau_of_a_metric_of_training_looks_once_per_epoch(validates):
    recorder = Recorder()
    options = {"val_check_interval": 2} if validates else {"limit_val_batches": 0}
    trainer = make_trainer([_plateau(), recorder], max_epochs=4, **options)
    trainer.fit(Logs("training"), batches(4), batches(1))
    expected = [PEAK * 0.5 ** max(k // 4 - 1, 0) for k in range(16)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


def test_a_plateau_over_a_stream():
    recorder = Recorder()
    trainer = make_trainer(
        [_plateau(), recorder], max_steps=8, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1
    )
    trainer.fit(Logs(), DataLoader(Stream(40), batch_size=2), batches(1))
    expected = [PEAK * 0.5 ** max(k // 2 - 1, 0) for k in range(8)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"val_check_interval": 2}], ids=str)
def test_a_misspelt_monitor_is_named_with_the_nearest_key(options):
    schedule = lo.schedules.ReduceOnPlateau(monitor="levle")
    where = "training" if "limit_val_batches" in options else "validation"
    trainer = make_trainer([lo.ConfigureOptimizers("sgd", lr=PEAK, schedule=schedule)], max_epochs=3, **options)
    with pytest.raises(MisconfigurationException, match=r"monitor='levle', and nothing logs it.*'level'"):
        trainer.fit(Logs(where), batches(4), batches(1))


@pytest.mark.parametrize("validates", [True, False])
def test_a_plateau_of_a_metric_that_the_module_logs_at_the_end_of_an_epoch(validates):
    class AtTheEnd(Logs):
        def on_train_epoch_end(self):
            self.log("level", 1.0 if self.current_epoch else 2.0)

    recorder = Recorder()
    trainer = make_trainer([_plateau(), recorder], max_epochs=5)
    trainer.fit(AtTheEnd("nowhere"), batches(2), batches(1) if validates else None)
    expected = [PEAK * 0.5 ** max(k // 2 - 2, 0) for k in range(10)]  # The second look finds an improvement.
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


# A module that is left to itself.


class Inside(L.LightningModule):
    """Optimizes another LightningModule by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.inner = Net()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.inner.training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return lo.OptimizerFactory("sgd", lr=PEAK, schedule="cosine")(self.inner)


def test_the_optimizer_of_an_inner_lightning_module_is_the_outer_ones():
    recorder = Recorder()
    make_trainer([recorder], max_epochs=2).fit(Inside(), batches(5))
    assert [rates[0] for rates in recorder.rates] == pytest.approx(_cosine(10))


@pytest.mark.parametrize("ours", [False, True])
def test_a_batch_that_the_module_leaves_out_does_not_move_the_schedule(ours):
    class LeavesOut(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 and batch_idx == leave_at else None

        def configure_optimizers(self):
            return lo.OptimizerFactory("sgd", lr=PEAK, schedule="cosine")(self)

    for leave_at, total in ((0, 8), (2, 10)):
        recorder = Recorder()
        trainer = make_trainer([lo.GradientClipping(1e9), recorder] if ours else [recorder], max_epochs=3)
        trainer.fit(LeavesOut(), batches(4))
        rates = [rates[0] for rates in recorder.rates]
        assert len(rates) == total
        assert rates[:3] == pytest.approx(_cosine(total if leave_at == 0 else 12)[:3], abs=0.02)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("horizon", [None, lo.Horizon(total_steps=10)])
def test_a_list_of_what_build_makes_moves_by_steps_or_is_warned_of(horizon, recwarn):
    class Lists(Net):
        def configure_optimizers(self):
            optimizer, scheduler = lo.OptimizerFactory("sgd", lr=PEAK, schedule="cosine").build(self, horizon)
            return [optimizer], [scheduler]

    recorder = Recorder()
    make_trainer([lo.GradientClipping(1e9), recorder], max_epochs=2).fit(Lists(), batches(5))
    warned = any("moves once per epoch" in str(warning.message) for warning in recwarn)
    followed = [rates[0] for rates in recorder.rates] == pytest.approx(_cosine(10))
    assert warned == (horizon is not None)
    assert followed == (horizon is None)
