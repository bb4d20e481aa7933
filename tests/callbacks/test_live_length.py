"""The length of a run is asked for live: resumes, second fits, finders, trials, epochs of unequal length, rollbacks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner.tuning import Tuner
from torch import nn
from torch.utils.data import DataLoader

import lightning_optim as lo
from tests.helpers import Net, Recorder, SaveAt, Stream, batches, make_trainer, samples

PEAK = 0.5


class InModule(Net):
    """Makes its optimizer itself, by the factory, with no callback of ours on the Trainer."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def configure_optimizers(self):
        return lo.OptimizerFactory("sgd", lr=PEAK, param_groups=[], **self.options)(self)


def _setup(where, **options):
    """The module and the callbacks that give it plain SGD with a schedule."""
    if where == "module":
        return InModule(**options), []
    more = [lo.GradientClipping(1e9)] if where == "all" else []
    return Net(), [lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], **options), *more]


WHERE = pytest.mark.parametrize("where", ["callback", "module", "all"])


def _cosine(total, start=0, end=None):
    return [PEAK * (1 + math.cos(math.pi * k / total)) / 2 for k in range(start, total if end is None else end)]


def _rates(recorder):
    return [rates[0] for rates in recorder.rates]


# Resume with other data.


@WHERE
@pytest.mark.parametrize(
    ("count", "accumulate", "total"), [(5, 1, 75), (20, 1, 150), (5, 2, 65), (10, 1, 100), (3, 1, 65)]
)
def test_a_resume_trains_the_steps_done_and_the_epochs_left(tmp_path, where, count, accumulate, total):
    def fit(count, options, **trainer_options):
        model, callbacks = _setup(where, schedule="cosine", **options)
        recorder = Recorder()
        trainer = make_trainer([*callbacks, recorder], max_epochs=10, **trainer_options)
        return trainer, model, recorder, count

    trainer, model, _, _ = fit(10, {})
    trainer.fit_loop.max_epochs = 5
    trainer.fit(model, batches(10))
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    scheduler_state = torch.load(path, weights_only=True)["lr_schedulers"][0]
    assert scheduler_state["total_steps"] == 50

    trainer, model, recorder, _ = fit(count, {"on_resume": "config"}, accumulate_grad_batches=accumulate)
    trainer.fit(model, batches(count), ckpt_path=path)
    assert _rates(recorder) == pytest.approx(_cosine(total, 50))
    assert trainer.lr_scheduler_configs[0].scheduler.horizon.total_steps == total
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_longer_run_on_the_old_curve_is_told_how_many_steps_change_nothing(tmp_path):
    model, callbacks = _setup("callback", schedule="cosine")
    trainer = make_trainer(callbacks, max_epochs=2)
    trainer.fit(model, batches(10))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, callbacks = _setup("callback", schedule="cosine")
    recorder = Recorder()
    trainer = make_trainer([*callbacks, recorder], max_epochs=4)
    with pytest.warns(UserWarning, match=r"learning rate is 0 from here on: 20 steps .* nothing.*on_resume=\"config\""):
        trainer.fit(model, batches(10), ckpt_path=tmp_path / "end.ckpt")
    assert _rates(recorder) == pytest.approx([0.0] * 20)


@pytest.mark.parametrize("max_steps", [-1, 100])
def test_an_epoch_that_has_ended_in_the_checkpoint_is_not_to_come(tmp_path, max_steps):
    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    def fit(*more, ckpt_path=None):
        model, callbacks = _setup("callback", schedule="cosine")
        trainer = make_trainer([*callbacks, *more], max_epochs=3, max_steps=max_steps)
        trainer.fit(model, batches(10), ckpt_path=ckpt_path)

    lengths = []

    class Length(L.Callback):
        def on_train_start(self, trainer, pl_module):
            lengths.append(trainer.lr_scheduler_configs[0].scheduler.horizon.total_steps)

    fit(Saves(), Length())
    fit(Length(), ckpt_path=tmp_path / "one.ckpt")  # without a warning that the curve is too short
    assert lengths == [30, 30]


def test_no_word_of_a_rate_of_zero_where_the_schedule_ends_above_it(tmp_path):
    schedule = lo.schedules.Cosine(final=0.5)
    model, callbacks = _setup("callback", schedule=schedule)
    trainer = make_trainer(callbacks, max_epochs=2)
    trainer.fit(model, batches(10))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, callbacks = _setup("callback", schedule=schedule)
    with pytest.warns(UserWarning, match="ends at step 20, this run at 40. Say"):
        make_trainer(callbacks, max_epochs=4).fit(model, batches(10), ckpt_path=tmp_path / "end.ckpt")


def test_no_word_of_a_curve_where_the_schedule_has_no_length(tmp_path, recwarn):
    model, callbacks = _setup("callback", warmup=5)
    trainer = make_trainer(callbacks, max_epochs=2)
    trainer.fit(model, batches(10))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model, callbacks = _setup("callback", warmup=5)
    make_trainer(callbacks, max_epochs=4).fit(model, batches(10), ckpt_path=tmp_path / "end.ckpt")
    assert not [warning for warning in recwarn if "curve" in str(warning.message)]


# A second fit.


@WHERE
@pytest.mark.parametrize("second", [10, 2, 30])
def test_a_second_fit_is_a_run_of_its_own_length(where, second):
    model, callbacks = _setup(where, schedule="cosine")
    recorder = Recorder()
    trainer = make_trainer([*callbacks, recorder], max_epochs=5)
    trainer.fit(model, batches(10))
    first = len(recorder.rates)
    trainer.fit_loop.max_epochs = 10
    trainer.fit(model, batches(second))
    assert _rates(recorder)[first:] == pytest.approx(_cosine(5 * second))


def test_the_schedule_of_the_clip_limit_ends_with_the_second_fit_too():
    limits = []

    class Limits(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pipeline = clipping.hub.pipelines[0]
            limits.append(pipeline.clipper._limit(pipeline.steps - 1))

    clipping = lo.GradientClipping(1.0, schedule=lo.schedules.Linear(final=0.1))
    trainer = make_trainer([clipping, Limits()], max_epochs=2)
    model = Net()
    trainer.fit(model, batches(10))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, batches(5))
    assert limits[:20] == pytest.approx([1 - 0.9 * k / 20 for k in range(20)])
    assert limits[20:] == pytest.approx([1 - 0.9 * k / 10 for k in range(10)])


# Finders.


class Sized(InModule):
    """Has what finders look for: a rate and a batch size."""

    def __init__(self, use_lr=True, **options):
        super().__init__(**options)
        self.lr, self.batch_size, self.use_lr = PEAK, 2, use_lr

    def configure_optimizers(self):
        lr = self.lr if self.use_lr else PEAK
        return lo.OptimizerFactory("sgd", lr=lr, param_groups=RULES, **self.options)(self)

    def train_dataloader(self):
        return batches(80 // self.batch_size, self.batch_size)

    def val_dataloader(self):
        return batches(2)


RULES = [lo.ParamGroupRule(name="head", pattern="^head", lr_multiplier=10.0)]
WARMUPS = pytest.mark.parametrize("warmup", [None, 20, "10%"])


@WARMUPS
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_the_rate_that_a_finder_sets_is_the_peak_and_groups_keep_their_ratios(tmp_path, warmup, ours, how):
    recorder = Recorder()
    model = Sized(schedule="linear", warmup=warmup)
    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=RULES, schedule="linear", warmup=warmup)
    callbacks = [configure, lo.GradientClipping(1e9)] if ours else []
    finder = LearningRateFinder(num_training_steps=30, min_lr=1e-4, max_lr=0.4, early_stop_threshold=None)
    trainer = make_trainer(
        [*([finder] if how == "callback" else []), *callbacks, recorder], default_root_dir=tmp_path, max_epochs=2
    )
    if how == "tuner":
        Tuner(trainer).lr_find(model, num_training=30, min_lr=1e-4, max_lr=0.4, early_stop_threshold=None)
    trainer.fit(model)
    assert model.lr != PEAK
    multiplier = lo.schedules.Linear(warmup=warmup or 0).over(lo.Horizon(80))
    expected = [[10 * model.lr * multiplier(k), model.lr * multiplier(k)] for k in range(80)]
    assert recorder.rates[-80:] == [pytest.approx(rates) for rates in expected]


@WARMUPS
@pytest.mark.parametrize("ours", [True, False])
def test_the_trial_of_a_batch_size_finder_leaves_the_schedule_as_it_was(tmp_path, warmup, ours):
    recorder = Recorder()
    model = Sized(schedule="linear", warmup=warmup)
    callbacks = [lo.GradientClipping(1e9)] if ours else []
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=3, init_val=2)
    trainer = make_trainer([finder, *callbacks, recorder], default_root_dir=tmp_path, max_epochs=2)
    trainer.fit(model)
    steps = 2 * 80 // model.batch_size
    multiplier = lo.schedules.Linear(warmup=warmup or 0).over(lo.Horizon(steps))
    assert [rates[-1] for rates in recorder.rates[-steps:]] == pytest.approx(
        [PEAK * multiplier(k) for k in range(steps)]
    )


# Trials of a configuration for a long run.


LONG: dict[str, Any] = {
    "warmup": {"schedule": "cosine", "warmup": 500},
    "constant": {"warmup": 500},
    "wsd": {"schedule": lo.schedules.WSD(warmup=100, cooldown=300)},
    "percent": {"schedule": lo.schedules.WSD(warmup="2%", cooldown="20%")},
    "one_cycle": {"schedule": lo.schedules.OneCycle(warmup=400, three_phase=True)},
    "milestones": {"schedule": lo.schedules.MultiStepDecay(milestones=[300, 400])},
}


@pytest.mark.parametrize("where", ["module", "all"])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"overfit_batches": 1, "max_epochs": 3},
        {"max_steps": 4},
    ],
    ids=str,
)
def test_a_trial_of_a_long_run_runs_with_its_phases_scaled(where, name, options):
    model, callbacks = _setup(where, **LONG[name])
    recorder = Recorder()
    trainer = make_trainer([*callbacks, recorder], **options)
    trainer.fit(model, batches(8))
    rates = _rates(recorder)
    assert len(rates) == trainer.global_step > 0
    assert all(0 < rate <= PEAK for rate in rates[:-1])
    if "warmup" in LONG[name]:
        assert max(rates) == PEAK  # reached within the trial


def test_what_is_scaled_is_said_once(capsys):
    model, callbacks = _setup("module", schedule="cosine", warmup=500)
    make_trainer(callbacks, max_steps=4).fit(model, batches(8))
    said = capsys.readouterr().out
    assert said.count("are scaled to fit") == 1
    assert "Cosine(warmup=500)" in said


def test_a_whole_run_that_is_too_short_is_still_refused():
    model, callbacks = _setup("callback", schedule="cosine", warmup=500)
    with pytest.raises(ValueError, match="longer than the run of 8"):
        make_trainer(callbacks, max_epochs=1).fit(model, batches(8))


def test_a_group_frozen_beyond_the_end_is_refused_by_the_fit_and_runs_in_a_trial():
    rules = [lo.ParamGroupRule(name="body", pattern="^body", frozen_until=500)]

    def fit(**options):
        configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=rules)
        make_trainer([configure], **options).fit(Net(), batches(8))

    with pytest.raises(ValueError, match=r"'body' is frozen until '500'.*never be trained"):
        fit(max_epochs=2)
    fit(fast_dev_run=2)


# Epochs of unequal length.


class Reloads(InModule):
    """Has another number of batches in each epoch."""

    def __init__(self, counts, **options):
        super().__init__(**options)
        self.counts = counts

    def train_dataloader(self):
        return batches(self.counts[min(self.trainer.current_epoch, len(self.counts) - 1)])


@pytest.mark.parametrize(
    "schedule", ["cosine", "linear", lo.schedules.Cosine("10%"), lo.schedules.WSD(5, "30%")], ids=repr
)
@pytest.mark.parametrize("counts", [(40, 20, 10, 5), (5, 10, 20, 40), (10, 30, 5, 30)], ids=str)
@pytest.mark.parametrize("ours", [True, False])
def test_data_that_grow_or_shrink_bend_the_schedule_without_a_jump(schedule, counts, ours):
    model = Reloads(counts, schedule=schedule)
    recorder = Recorder()
    callbacks = [lo.GradientClipping(1e9)] if ours else []
    trainer = make_trainer([*callbacks, recorder], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    trainer.fit(model)
    rates = _rates(recorder)
    assert len(rates) == sum(counts)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # ends where training ends
    assert rates[-1] > 0
    assert max(rates) == pytest.approx(PEAK)
    smallest = min(counts)
    for one, other in itertools.pairwise(rates):  # no jump: within what the shortest epoch takes
        assert abs(one - other) < PEAK * 4.5 / smallest


@WHERE
def test_durations_in_epochs_end_where_epochs_do_while_the_accumulation_changes(where):
    schedule = lo.schedules.MultiStepDecay(warmup="1 epoch", milestones=["4 epochs", "6 epochs"], factor=0.1)
    model, callbacks = _setup(where, schedule=schedule)
    recorder = Recorder()
    accumulation = GradientAccumulationScheduler({0: 8, 4: 1})
    make_trainer([*callbacks, accumulation, recorder], max_epochs=8).fit(model, batches(16))
    # Epochs 0 to 3 take 2 steps each, the others 16.
    expected = [PEAK / 2, PEAK] + [PEAK] * 6 + [PEAK / 10] * 32 + [PEAK / 100] * 32
    assert _rates(recorder) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "falls"),
    [
        (lo.schedules.StepDecay(every="2 epochs", factor=0.5), {4, 8, 40}),
        (lo.schedules.CosineRestarts(cycle="2 epochs"), {4, 8, 40}),
    ],
    ids=repr,
)
def test_levels_and_cycles_in_epochs_begin_with_epochs(schedule, falls):
    model, callbacks = _setup("callback", schedule=schedule)
    recorder = Recorder()
    accumulation = GradientAccumulationScheduler({0: 8, 4: 1})
    make_trainer([*callbacks, accumulation, recorder], max_epochs=8).fit(model, batches(16))
    rates = _rates(recorder)
    if isinstance(schedule, lo.schedules.StepDecay):
        assert {k for k in range(1, len(rates)) if rates[k] < rates[k - 1]} == falls
    else:
        assert {k for k in range(1, len(rates)) if rates[k] > rates[k - 1]} == falls


def test_a_group_thaws_with_its_epoch_while_the_accumulation_changes():
    moved = []

    class Moved(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.before = pl_module.body.weight.detach().clone()

        def on_train_epoch_end(self, trainer, pl_module):
            moved.append(not torch.equal(self.before, pl_module.body.weight))

    rules = [lo.ParamGroupRule(name="body", pattern="^body", frozen_until="1 epoch")]
    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=rules)
    accumulation = GradientAccumulationScheduler({0: 8, 4: 1})
    make_trainer([configure, accumulation, Moved()], max_epochs=6).fit(Net(), batches(16))
    assert moved == [False, True, True, True, True, True]


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(1)


def test_the_virtual_epoch_of_weight_averaging_is_none_of_the_schedule():
    recorder = Recorder()
    configure = lo.ConfigureOptimizers("sgd", lr=PEAK, param_groups=[], schedule="linear")
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3)
    make_trainer([configure, averaging, recorder], max_epochs=4).fit(Normed(), batches(10))
    assert _rates(recorder)[:20] == pytest.approx([PEAK * (1 - k / 40) for k in range(20)])


def test_an_epoch_that_ends_early_leaves_less_of_the_run():
    class Skips(Reloads):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.trainer.current_epoch == 0 and batch_idx == 4 else None

    model = Skips((10,), schedule="linear")
    recorder = Recorder()
    trainer = make_trainer([recorder], max_epochs=3)
    trainer.fit(model)
    rates = _rates(recorder)
    assert len(rates) == 24, rates
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    # Lightning moves schedulers for the batch that is skipped, too: two steps of the schedule at once.
    assert all(0 < a - b < 0.034 for a, b in itertools.pairwise(rates))


def test_a_run_of_varying_epochs_is_resumed_as_it_would_have_gone_on(tmp_path):
    counts = (10, 20, 5, 15)

    def fit(ckpt_path=None):
        recorder = Recorder()
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        model = Reloads(counts, schedule="cosine")
        trainer = make_trainer(
            [lo.GradientClipping(1e9), recorder, *([] if ckpt_path else [saver])],
            max_epochs=4,
            reload_dataloaders_every_n_epochs=1,
            enable_checkpointing=ckpt_path is None,
        )
        trainer.fit(model, ckpt_path=ckpt_path)
        return _rates(recorder)

    whole = fit()
    assert fit(tmp_path / "epoch=1.ckpt") == pytest.approx(whole[30:], abs=1e-12)


def test_after_a_rollback_the_schedule_ends_where_training_ends():
    class Rolls(L.Callback):
        """What a guard's rollback does to the schedule, after 20 of 40 steps: back to step 10."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            if trainer.global_step == 10:
                self.state = scheduler.state_dict()
            if trainer.global_step == 20:
                scheduler.load_state_dict(self.state)

    model, callbacks = _setup("callback", schedule="linear")
    recorder = Recorder()
    trainer = make_trainer([*callbacks, Rolls(), recorder], max_epochs=4)
    trainer.fit(model, batches(10))
    rates = _rates(recorder)
    assert rates[19] == pytest.approx(PEAK * 21 / 40)
    assert rates[20] == pytest.approx(PEAK * 30 / 40)  # as at step 10
    assert rates[20:] == pytest.approx([PEAK * 30 / 40 * (1 - k / 20) for k in range(20)])


def test_a_resume_within_an_epoch_counts_the_accumulation_that_applies(tmp_path):
    def fit(path=None, *more):
        recorder = Recorder()
        model, callbacks = _setup("callback", schedule="cosine", on_resume="config")
        accumulation = GradientAccumulationScheduler({0: 5, 1: 2})
        trainer = make_trainer([*callbacks, accumulation, *more, recorder], max_epochs=2)
        trainer.fit(model, batches(10), ckpt_path=path)
        return trainer, _rates(recorder)

    fit(None, SaveAt(1, tmp_path / "half.ckpt"))
    # Lightning sets the accumulation when epochs begin, so the rest of this one steps after each batch.
    trainer, rates = fit(tmp_path / "half.ckpt")
    assert len(rates) == 10
    assert rates == pytest.approx(_cosine(11, 1))
    assert trainer.lr_scheduler_configs[0].scheduler.horizon.total_steps == 11


@pytest.fixture
def told(monkeypatch):
    """What factories have reported."""
    messages = []
    monkeypatch.setattr(lo.ConfigureOptimizers, "_tell", lambda self, message, warn: messages.append(message))
    return messages


def _first_then(first, then):
    class Reloads(Net):
        def train_dataloader(self):
            return first if self.trainer.current_epoch == 0 else then

    return Reloads()


def test_a_run_whose_end_is_not_known_any_more_keeps_its_schedule(told):
    recorder = Recorder()
    callbacks = _setup("callback", schedule="cosine")[1]
    trainer = make_trainer([*callbacks, recorder], max_epochs=3, reload_dataloaders_every_n_epochs=1)
    trainer.fit(_first_then(batches(5), DataLoader(Stream(10), batch_size=2)))
    assert _rates(recorder) == pytest.approx(_cosine(15))
    assert [message.partition(",")[0] for message in told] == ["Nothing bounds the run now"]


def test_a_length_that_no_schedule_needs_is_not_said_to_change_one(told):
    callbacks = _setup("callback", warmup=3)[1]
    trainer = make_trainer(callbacks, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(_first_then(DataLoader(Stream(10), batch_size=2), batches(5)))
    assert trainer.global_step == 10
    assert not told


def test_a_batch_size_finder_in_mid_run_leaves_a_schedule_that_ends_where_training_ends(tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)  # Lightning writes its checkpoint into the working directory.

    class InTheSecondEpoch(BatchSizeFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.scale_batch_size(trainer, pl_module)

    class Sized(Net):
        batch_size = 2
        validation_step = L.LightningModule.validation_step  # type: ignore[assignment]

        def train_dataloader(self):
            return DataLoader(samples(40), batch_size=self.batch_size)

    recorder = Recorder()
    finder = InTheSecondEpoch(max_trials=2, steps_per_trial=1)
    callbacks = _setup("callback", schedule="linear")[1]
    trainer = make_trainer([*callbacks, finder, recorder], max_epochs=3)
    trainer.fit(Sized())
    rates = _rates(recorder)
    assert rates[:20] == pytest.approx([PEAK * (1 - k / 60) for k in range(20)])
    # Lightning goes on with the last batch of the epoch, and 10 steps of the last epoch are left.
    assert rates[20] == pytest.approx(PEAK * 2 / 3)
    assert rates[21:] == pytest.approx([PEAK * 2 / 3 * 0.9 * (1 - k / 10) for k in range(10)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert [message for message in told if "old curve" in message] == []
