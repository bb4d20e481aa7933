"""The schedule ends where training ends, however the length of training is given."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

import lightning_optim as lo
from tests.helpers import Net, NetWith, Recorder, Stream, batches, make_trainer

PEAK, FINAL = 0.5, 0.05  # final = 0.1 of the peak


def _configure(**options):
    schedule = lo.schedules.Cosine(final=0.1, **options)
    return lo.ConfigureOptimizers("sgd", lr=PEAK, schedule=schedule, param_groups=[])


def _closed_form(total, steps):
    return [FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * min(k, total) / total)) / 2 for k in range(steps)]


@pytest.mark.parametrize(
    ("count", "options", "total"),
    [
        (16, {"accumulate_grad_batches": 3, "max_epochs": 2}, 12),
        (16, {"accumulate_grad_batches": 16, "max_epochs": 3}, 3),
        (5, {"accumulate_grad_batches": 7, "max_epochs": 2}, 2),
        (16, {"limit_train_batches": 5, "max_epochs": 2}, 10),
        (16, {"limit_train_batches": 0.5, "accumulate_grad_batches": 3, "max_epochs": 2}, 6),
        (16, {"max_steps": 7}, 7),
        (16, {"max_steps": 40}, 40),
        (16, {"max_steps": 7, "max_epochs": 3}, 7),
        (16, {"max_steps": 100, "max_epochs": 3}, 48),
        (16, {"max_steps": 5, "accumulate_grad_batches": 4, "max_epochs": 9}, 5),
        (16, {"overfit_batches": 3, "max_epochs": 4}, 12),
        (16, {"fast_dev_run": 3}, 3),
        (16, {"max_epochs": 1, "max_time": "00:01:00:00"}, 16),
        (16, {"max_epochs": 2, "barebones": True, "logger": None, "log_every_n_steps": None}, 32),
        (16, {"max_epochs": 2, "callbacks": [GradientAccumulationScheduler({0: 4, 1: 1})]}, 20),
        (16, {"max_epochs": 4, "callbacks": [GradientAccumulationScheduler({0: 4, 1: 1, 3: 5})]}, 4 + 16 + 16 + 4),
        (16, {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}, 48),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_every_step_uses_the_closed_form_and_the_last_rate_is_the_final_one(count, options, total):
    recorder = Recorder()
    extra = options.pop("callbacks", []) if "callbacks" in options else []
    trainer = make_trainer([_configure(), recorder, *extra], **options)
    trainer.fit(Net(), batches(count))
    assert trainer.global_step == total
    assert [rates[0] for rates in recorder.rates] == pytest.approx(_closed_form(total, total))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(FINAL)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == total


def test_warmup_in_epochs_counts_optimizer_steps():
    recorder = Recorder()
    trainer = make_trainer([_configure(warmup="1 epoch"), recorder], accumulate_grad_batches=3, max_epochs=3)
    trainer.fit(Net(), batches(16))
    assert [rates[0] for rates in recorder.rates[:7]] == pytest.approx([PEAK * k / 6 for k in (1, 2, 3, 4, 5, 6, 6)])


# Datasets and trainers without a length.


def _stream(count=12):
    return DataLoader(Stream(count), batch_size=2)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({"max_epochs": 2}, _stream),
        ({"max_time": "00:00:10:00"}, lambda: batches(4)),
        ({"max_epochs": -1}, lambda: batches(4)),
        ({"max_time": "00:00:10:00"}, _stream),
    ],
    ids=["stream", "max_time", "endless", "max_time-stream"],
)
@pytest.mark.parametrize("monitored", [True, False])
def test_a_schedule_that_needs_a_length_that_nobody_knows_is_refused_before_the_first_step(options, data, monitored):
    model, recorder = Net(), Recorder()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"Cosine.*length of the run.*max_steps.*constant"):
        make_trainer([_configure(), recorder, *([lo.OptimizerMonitor()] if monitored else [])], **options).fit(
            model, data()
        )
    assert recorder.rates == []
    assert all((p == q).all() for p, q in zip(before, model.parameters(), strict=True))


def test_inside_a_module_it_is_refused_as_well():
    model = NetWith(lo.OptimizerFactory("sgd", lr=PEAK, schedule="cosine"))
    with pytest.raises(ValueError, match="length of the run"):
        make_trainer(max_epochs=2).fit(model, _stream())


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_epochs": 2}, 12), ({"max_time": "00:00:10:00", "limit_train_batches": 6, "max_epochs": 2}, 12)],
)
def test_a_schedule_that_needs_no_length_runs_without(options, steps):
    recorder = Recorder()
    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, schedule="constant", warmup="4 steps")
    make_trainer([configure, recorder], **options).fit(Net(), _stream())
    expected = [PEAK * min(k + 1, 4) / 4 for k in range(steps)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)


def test_max_time_alone_runs_a_schedule_that_needs_no_length():
    recorder = Recorder()

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 6

    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, schedule="constant", warmup=4)
    make_trainer([configure, recorder, Stop()], max_time="00:00:10:00").fit(Net(), batches(4))
    assert [rates[0] for rates in recorder.rates] == pytest.approx([PEAK * min(k + 1, 4) / 4 for k in range(6)])


def test_a_stream_with_max_steps_has_a_length():
    recorder = Recorder()
    make_trainer([_configure(warmup="50%"), recorder], max_steps=8).fit(Net(), _stream())
    assert recorder.rates[0][0] == pytest.approx(PEAK / 4)
    assert len(recorder.rates) == 8


def test_a_warmup_longer_than_the_run_is_refused_before_the_first_step():
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"warmup of 50 steps is longer than the run of 16 optimizer steps"):
        make_trainer([_configure(warmup=50), recorder]).fit(Net(), batches(16))
    assert recorder.rates == []


# More than one fit.


def test_fitting_twice_with_fresh_trainers_repeats_the_schedule():
    model = Net()
    for _ in range(2):
        recorder = Recorder()
        make_trainer([_configure(), recorder]).fit(model, batches(8))
        assert [rates[0] for rates in recorder.rates] == pytest.approx(_closed_form(8, 8))


def test_fitting_on_with_the_same_trainer_ends_at_the_final_rate_again():
    model, recorder = Net(), Recorder()
    trainer = make_trainer([_configure(), recorder], max_epochs=1)
    trainer.fit(model, batches(8))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, batches(8))
    assert len(recorder.rates) == 24
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(FINAL)


def test_a_fit_that_has_nothing_left_to_do_is_harmless():
    model = Net()
    callbacks = [_configure(), lo.GradientClipping(), lo.DivergenceGuard(), lo.OptimizerMonitor(), lo.RunSummary()]
    trainer = make_trainer(callbacks)
    trainer.fit(model, batches(4))
    trainer.fit(model, batches(4))
    assert trainer.global_step == 4
    assert "configure_optimizers" not in vars(model)
