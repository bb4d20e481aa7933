from __future__ import annotations

import contextlib
import warnings

import lightning.pytorch as L
import pytest
import schedulefree
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

import lightning_optim as lo
from tests.helpers import (
    Net,
    Recorder,
    SaveAt,
    SeesWeights,
    StatefulLoader,
    batches,
    bit_equal,
    make_trainer,
    weights,
)


class Watched(SeesWeights):
    """Trains with the optimizer that is tried."""

    def configure_optimizers(self):
        return lo.optim.ScheduleFreeAdamW(self.parameters(), lr=0.1, weight_decay=0.1, warmup_steps=3)


def expected(steps):
    """Training point and average after each of ``steps`` steps, from a plain loop."""
    model = Watched()
    optimizer = model.configure_optimizers()
    points, averages = [], []
    batch = [list(b) for b in batches(4)]
    for step in range(steps):
        optimizer.zero_grad()
        Net.training_step(model, batch[step % 4], 0).backward()
        optimizer.step()
        points.append(weights(model))
        optimizer.eval()
        averages.append(weights(model))
        optimizer.train()
    return points, averages


@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_uses_the_average_and_does_not_change_training(sanity):
    points, averages = expected(8)
    model, recorder = Watched(), Recorder()
    trainer = make_trainer(
        [recorder, lo.ScheduleFree()], max_epochs=2, val_check_interval=2, num_sanity_val_steps=sanity
    )
    trainer.fit(model, batches(4), batches(1))
    assert bit_equal(recorder.weights, points)
    assert bit_equal(model.seen[sanity:], averages[1::2])
    assert bit_equal(weights(model), averages[-1])
    trainer.test(model, batches(1), verbose=False)
    trainer.validate(model, batches(1), verbose=False)
    assert bit_equal(model.seen[-2:], [averages[-1]] * 2)
    assert bit_equal(weights(model), averages[-1])


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_average_and_saving_changes_nothing(tmp_path, weights_only):
    points, averages = expected(8)
    save = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=weights_only
    )
    model, recorder = Watched(), Recorder()
    trainer = make_trainer([recorder, lo.ScheduleFree(), save], max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, batches(4), batches(1))
    assert bit_equal(recorder.weights, points)
    for step in (3, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert bit_equal(list(checkpoint["state_dict"].values()), averages[step - 1])


@pytest.mark.parametrize("at", [2, 4, 5])
@pytest.mark.parametrize("via_configure", [False, True])
def test_a_resumed_run_ends_bit_equal(tmp_path, at, via_configure):
    parts = [lo.ConfigureOptimizers("schedulefreeadamw", lr=0.1)] if via_configure else []

    def fit(*extra, ckpt_path=None):
        model = Watched()
        trainer = make_trainer([*parts, *extra, lo.ScheduleFree()], max_epochs=2, val_check_interval=2)
        trainer.fit(model, StatefulLoader(4, []), batches(1), ckpt_path=ckpt_path)
        return weights(model), trainer.optimizers[0].state_dict()

    whole = fit(SaveAt(at, tmp_path / f"{at}.ckpt"))
    assert bit_equal(fit(ckpt_path=tmp_path / f"{at}.ckpt"), whole)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_after_an_exception_the_module_has_the_average_and_can_go_on(tmp_path, where):
    points, averages = expected(2)
    save = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, monitor=None)
    model = Watched(raise_in=where)
    trainer = make_trainer(
        [lo.ScheduleFree(), save], max_epochs=2, enable_checkpointing=True, val_check_interval=2, limit_val_batches=1
    )
    with pytest.raises(ArithmeticError):
        trainer.fit(model, batches(4), batches(1) if where == "validation" else None)
    assert "save_checkpoint" not in vars(trainer)
    assert bit_equal(weights(model), averages[1])
    (file,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert bit_equal(list(checkpoint["state_dict"].values()), averages[1])
    again = Watched()
    optimizer = again.configure_optimizers()
    again.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    optimizer.train()
    assert bit_equal(weights(again), points[1])


@pytest.mark.parametrize(
    "hook", [None, "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "teardown"]
)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_save_checkpoint_is_what_it_was_however_a_fit_ends(hook, wrapped, first):
    def save(*args, **kwargs):
        pass

    def raises(*args, **kwargs):
        raise ArithmeticError

    other = L.Callback()
    if hook is not None:
        setattr(other, hook, raises)
    trainer = make_trainer([lo.ScheduleFree(), other] if first else [other, lo.ScheduleFree()])
    if wrapped:
        trainer.save_checkpoint = save
    with contextlib.nullcontext() if hook is None else pytest.raises(ArithmeticError):
        trainer.fit(Watched(), batches(2))
    assert vars(trainer).get("save_checkpoint") is (save if wrapped else None)


def test_a_wrapper_around_ours_stays():
    class Wraps(L.Callback):
        def on_train_start(self, trainer, pl_module):
            inner = trainer.save_checkpoint

            def wrapper(*args, **kwargs):
                calls.append(args)
                inner(*args, **kwargs)

            trainer.save_checkpoint = self.wrapper = wrapper

    calls, wraps = [], Wraps()
    trainer = make_trainer([wraps, lo.ScheduleFree()])
    trainer.fit(Watched(), batches(2))
    assert trainer.save_checkpoint is wraps.wrapper


def test_a_save_that_fails_leaves_training_where_it_was(tmp_path):
    class Attempt(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            with pytest.raises(TypeError):
                trainer.save_checkpoint()

    points, _ = expected(4)
    recorder = Recorder()
    make_trainer([Attempt(), recorder, lo.ScheduleFree()]).fit(Watched(), batches(4))
    assert bit_equal(recorder.weights, points)


def test_a_checkpoint_saved_after_the_fit_resumes(tmp_path):
    _, averages = expected(8)
    trainer = make_trainer([lo.ScheduleFree()])
    trainer.fit(Watched(), batches(4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    model = Watched()
    make_trainer([lo.ScheduleFree()], max_epochs=2).fit(model, batches(4), ckpt_path=tmp_path / "end.ckpt")
    assert bit_equal(weights(model), averages[-1])


def test_it_works_with_the_authors_own_optimizer():
    class Theirs(Watched):
        def configure_optimizers(self):
            return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.1, weight_decay=0.1, warmup_steps=3)

    _, averages = expected(8)
    model = Theirs()
    make_trainer([lo.ScheduleFree()], max_epochs=2).fit(model, batches(4), batches(1))
    torch.testing.assert_close(model.seen[-1], averages[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(model), averages[-1], rtol=1e-4, atol=1e-5)


def test_a_resumed_step_without_the_callback_is_refused_naming_it(tmp_path):
    make_trainer([lo.ScheduleFree(), SaveAt(4, tmp_path / "4.ckpt")]).fit(Watched(), batches(4))
    with pytest.raises(RuntimeError, match="the callback ScheduleFree"):
        make_trainer(max_epochs=2).fit(Watched(), batches(4), ckpt_path=tmp_path / "4.ckpt")


def test_a_run_is_told_once_what_goes_with_a_schedule_free_optimizer():
    def told(*callbacks, schedule="constant"):
        configure = lo.ConfigureOptimizers("schedulefreeadamw", lr=0.01, schedule=schedule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer([configure, *callbacks]).fit(Net(), batches(2))
        return [str(one.message) for one in caught if "ScheduleFree" in str(one.message)]

    (told_once,) = told()
    assert "Without the callback lightning_optim.ScheduleFree, validation and checkpoints have the weights" in told_once
    assert not told(lo.ScheduleFree())
    (told_once,) = told(lo.ScheduleFree(), schedule="cosine")
    assert "does without a decay of the learning rate, and Cosine lowers it" in told_once


def test_an_optimizer_without_modes_is_refused():
    with pytest.raises(MisconfigurationException, match=r"needs an optimizer with train\(\) and eval\(\).* has SGD"):
        make_trainer([lo.ScheduleFree()]).fit(Net(), batches(1))


@pytest.mark.parametrize(
    "other", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]
)
def test_another_average_of_the_same_weights_is_refused(other):
    for callbacks in ([lo.ScheduleFree(), other], [other, lo.ScheduleFree()]):
        with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} puts another average"):
            make_trainer(callbacks).fit(Watched(), batches(1))


def test_it_goes_with_clipping_guard_and_monitor():
    parts = [lo.GradientClipping(0.5), lo.DivergenceGuard(), lo.ScheduleFree()]
    model = Watched()
    model.nan_batches = {1}
    before = Recorder()
    with pytest.warns(UserWarning, match="skipped"):
        make_trainer([*parts, before]).fit(model, batches(4), batches(1))
    assert bit_equal(before.weights[0], before.weights[1])
    assert all(weight.isfinite().all() for weight in weights(model))
