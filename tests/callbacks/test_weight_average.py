"""Averages of the weights under a Trainer: used for validation and checkpoints, and without an effect on the run."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lightning_optim as lo
from lightning_optim.divergence import Rollback
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

EMA = [0.9, "power 0.1"]
pytestmark = pytest.mark.filterwarnings("ignore:lr=0.1 of")


class Watched(SeesWeights):
    """May have batch norm."""

    def __init__(self, raise_in="", batch_norm=False, nan_batches=()):
        super().__init__(raise_in, nan_batches)
        if batch_norm:
            setattr(self, "norm", nn.BatchNorm1d(8))  # noqa: B010 - of another type than in `Net`


def parts(optimizer="adamw", which=0, **kwargs):
    return [
        lo.ConfigureOptimizers(optimizer, lr=0.1, schedule="constant", optimizer_kwargs={"ema": EMA, **kwargs}),
        lo.WeightAverage(which),
    ]


def expected(steps, which=0, count=4):
    """Weights and their average after each step, by the closed form in float64, from the weights of a plain run."""
    recorder, model = Recorder(), Watched()
    start = [w.double() for w in weights(model)]
    configure = lo.ConfigureOptimizers("adamw", lr=0.1, schedule="constant")
    make_trainer([configure, recorder], max_steps=steps).fit(model, batches(count))
    averages, average = [], start
    for t, now in enumerate(recorder.weights, 1):
        # γ = 6.94... solves (γ + 1)/((γ + 2)²(γ + 3)) = 0.1²
        beta = min(0.9, (1 + t) / (10 + t)) if which == 0 else (1 - 1 / t) ** (1 + 6.9371)
        average = [beta * a + (1 - beta) * w.double() for a, w in zip(average, now, strict=True)]
        averages.append(average)
    return recorder.weights, averages


def close(found, wanted):
    torch.testing.assert_close([[w.double() for w in some] for some in found], wanted, rtol=1e-4, atol=2e-6)
    return True


@pytest.mark.parametrize("which", [0, 1])
def test_validation_uses_the_average_and_does_not_change_training(which):
    points, averages = expected(8, which)
    model, recorder = Watched(), Recorder()
    trainer = make_trainer([recorder, *parts(which=which)], max_epochs=2, val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(model, batches(4), batches(1))
    assert bit_equal(recorder.weights, points)
    assert close(model.seen[1:], averages[1::2])
    assert close([weights(model)], averages[-1:])
    final = weights(model)
    trainer.test(model, batches(1), verbose=False)
    trainer.validate(model, batches(1), verbose=False)
    trainer.predict(model, batches(1))
    assert bit_equal(model.seen[-3:], [final] * 3)
    assert bit_equal(list(lo.optim.ema_state_dict(model, trainer.optimizers[0], which).values()), final)
    other = expected(8, 1 - which)[1][-1]
    assert close([list(lo.optim.ema_state_dict(model, trainer.optimizers[0], 1 - which).values())], [other])


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_average_and_saving_changes_nothing(tmp_path, weights_only):
    points, averages = expected(8)
    save = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=weights_only
    )
    model, recorder = Watched(), Recorder()
    trainer = make_trainer([recorder, *parts(), save], max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, batches(4), batches(1))
    assert bit_equal(recorder.weights, points)
    for step in (3, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert close([list(checkpoint["state_dict"].values())], averages[step - 1 : step])


@pytest.mark.parametrize(
    ("optimizer", "precision", "batch_norm"),
    [
        ("adamw", "32-true", False),
        ("adamw", "bf16-true", False),
        ("muon", "32-true", False),
        ("adamw", "32-true", True),
    ],
)
@pytest.mark.parametrize("at", [4, 5])
def test_a_resumed_run_ends_bit_equal(tmp_path, at, optimizer, precision, batch_norm):
    def fit(*extra, ckpt_path=None):
        model = Watched(batch_norm=batch_norm)
        callbacks = [*parts(optimizer), *extra]
        trainer = make_trainer(callbacks, max_epochs=2, val_check_interval=2, precision=precision)
        trainer.fit(model, StatefulLoader(4, [], batch_size=8), batches(1), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert batch_norm == ("lightning_optim.weight_average" in saved)
        return weights(model), saved["optimizer_states"], saved.get("lightning_optim.weight_average")

    whole = fit(SaveAt(at, tmp_path / f"{at}.ckpt"))
    assert bit_equal(fit(ckpt_path=tmp_path / f"{at}.ckpt"), whole)


def test_weights_of_sixteen_bits_train_as_without_the_callback():
    def fit(*extra):
        model, recorder = Watched(), Recorder()
        configure = parts()[0]
        trainer = make_trainer([configure, recorder, *extra], max_epochs=1, val_check_interval=2, precision="bf16-true")
        trainer.fit(model, batches(4), batches(1))
        if extra:
            lo.optim.swap_out_average(trainer.optimizers[0])
        states = [dict(state) for state in trainer.optimizers[0].state.values()]
        return recorder.weights, weights(model), states

    alone = fit()
    assert alone[2][0]["ema_0"].dtype == torch.float32
    assert bit_equal(fit(lo.WeightAverage()), alone)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_after_an_exception_the_module_has_the_average(where):
    _, averages = expected(2)
    model = Watched(raise_in=where)
    trainer = make_trainer(parts(), max_epochs=2, val_check_interval=2)
    with pytest.raises(ArithmeticError):
        trainer.fit(model, batches(4), batches(1))
    assert close([weights(model)], averages[-1:])
    assert "save_checkpoint" not in vars(trainer)


def test_skipped_steps_and_accumulated_batches_do_not_move_it():
    def fit(nan_batches, count, **options):
        model = Watched(nan_batches=nan_batches)
        trainer = make_trainer([*parts(), lo.DivergenceGuard(rollback=None)], max_epochs=1, **options)
        trainer.fit(model, batches(count))
        lo.optim.swap_out_average(trainer.optimizers[0])
        return [{k: v.clone() for k, v in state.items()} for state in trainer.optimizers[0].state.values()]

    with pytest.warns(UserWarning, match="skipped"):
        skipped = fit((1, 3), 4)
    assert [state["ema_step"].item() for state in skipped] == [2.0] * len(skipped)
    assert [state["ema_step"].item() for state in fit((), 4, accumulate_grad_batches=2)] == [2.0] * len(skipped)
    # Of the steps that were taken, one by one.
    model = Watched()
    optimizer = lo.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, ema=EMA)
    before, moved = [p.detach().clone() for p in model.parameters()], []
    for index, batch in enumerate(batches(4)):
        if index in (0, 2):
            optimizer.zero_grad()
            Net.training_step(model, batch, 0).backward()
            optimizer.step()
            moved.append([p.detach().clone() for p in model.parameters()])
    for index, state in enumerate(optimizer.state.values()):
        average = before[index]
        for t, now in enumerate(moved, 1):
            average = average + (1 - (1 + t) / (10 + t)) * (now[index] - average)
        torch.testing.assert_close(state["ema_0"], average)


class Explode(L.Callback):
    """Makes the weights not finite behind one batch, once."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.at = -1
            with torch.no_grad():
                for tensor in (pl_module.head.weight, pl_module.norm.running_mean):
                    tensor.fill_(float("nan"))


@pytest.mark.filterwarnings("ignore")
def test_a_rollback_restores_the_averages_of_weights_and_statistics():
    callbacks = [*parts(), lo.DivergenceGuard(lr_cut=None, patience=1, rollback=Rollback(every=2, clean=0))]
    model = Watched(batch_norm=True)
    states = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            state = trainer.optimizers[0].state[pl_module.head.weight]
            statistics = callbacks[1].averages()[0]
            states.append((state["ema_0"].clone(), float(state["ema_step"]), statistics.average.clone()))

    trainer = make_trainer([*callbacks, Explode(8), Note()], max_steps=16)
    trainer.fit(model, batches(40, batch_size=8))
    counts = [count for _, count, _ in states]
    back = next(i for i in range(1, len(counts)) if counts[i] < counts[i - 1])
    earlier = counts.index(counts[back])
    assert bit_equal(states[back], states[earlier])
    assert all(tensor.isfinite().all() for at in states[back:] for tensor in (at[0], at[2]))
    assert counts[-1] > counts[back]


@pytest.mark.filterwarnings("ignore:Step .* skipped")
def test_running_statistics_are_averaged_by_the_same_decay_at_the_same_steps():
    model, seen = Watched(batch_norm=True, nan_batches=(2,)), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.norm.running_mean.double().clone())

    make_trainer([Note(), *parts(), lo.DivergenceGuard()], max_epochs=1).fit(model, batches(5, batch_size=8))
    average = torch.zeros(8, dtype=torch.float64)
    for t, now in enumerate(seen[:2] + seen[3:], 1):
        beta = min(0.9, (1 + t) / (10 + t))
        average = beta * average + (1 - beta) * now
    torch.testing.assert_close(model.norm.running_mean.double(), average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(model.norm.running_mean.double(), seen[-1])


@pytest.mark.parametrize("callback", [lo.WeightAverage, lo.ScheduleFree])
def test_running_statistics_are_reported(callback, caplog, recwarn):
    name = "adamw" if callback is lo.WeightAverage else "schedulefreeadamw"
    options = {"ema": 0.9} if callback is lo.WeightAverage else {}
    configure = lo.ConfigureOptimizers(name, lr=1e-3, schedule="constant", optimizer_kwargs=options)
    for batch_norm in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            trainer = make_trainer([configure, callback()], max_steps=1)
            trainer.fit(Watched(batch_norm=batch_norm), batches(1, batch_size=8))
        said = caplog.text + "".join(str(warning.message) for warning in recwarn)
        assert ("Running statistics of batch norm (norm)" in said) == batch_norm


def test_what_it_cannot_do_is_refused():
    def fit(callbacks, model=None, **options):
        make_trainer(callbacks, max_steps=1, **options).fit(model or Watched(), batches(1))

    for optimizer in ("adamw", torch.optim.AdamW):
        configure = lo.ConfigureOptimizers(optimizer, lr=1e-3, schedule="constant")
        with pytest.raises(MisconfigurationException, match=r"option ema, such as ema=0.9999.*this run has AdamW"):
            fit([configure, lo.WeightAverage()])
    with pytest.raises(MisconfigurationException, match=r"Invalid which=2.*one has ema=\[0.9, 'power 0.1'\]"):
        fit(parts(which=2))
    with pytest.raises(MisconfigurationException, match="cannot exchange float16 weights"):
        fit(parts(), Watched().half())
    with pytest.raises(MisconfigurationException, match="Two WeightAverage callbacks"):
        fit([*parts(), lo.WeightAverage()])
    for which in (-1, 0.5, True):
        with pytest.raises(ValueError, match="must be the number of an average"):
            lo.WeightAverage(which)
    for other in (EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)):
        for callbacks in ([*parts(), other], [other, *parts()]):
            with pytest.raises(MisconfigurationException, match=f"{type(other).__name__} puts another average"):
                fit(callbacks)


def test_averages_of_a_checkpoint_are_checked_before_training(tmp_path):
    configure = lo.ConfigureOptimizers("adamw", lr=0.01, schedule="constant", optimizer_kwargs={"ema": 0.9})
    make_trainer([configure, lo.WeightAverage(), SaveAt(2, tmp_path / "a.ckpt")], max_steps=3).fit(
        Watched(), batches(3)
    )
    trainer = make_trainer(parts(which=1), max_steps=4)
    with (
        pytest.warns(UserWarning, match="Resumed with the checkpoint's hyperparameters"),
        pytest.raises(MisconfigurationException, match=r"Invalid which=1.*one has ema=\[0.9\]"),
    ):
        trainer.fit(Watched(), batches(4), ckpt_path=tmp_path / "a.ckpt")


def test_averages_begin_where_a_run_without_them_is_resumed(tmp_path, recwarn):
    configure = lo.ConfigureOptimizers("adamw", lr=0.1, schedule="constant")
    make_trainer([configure, SaveAt(2, tmp_path / "a.ckpt")], max_steps=3).fit(Watched(), StatefulLoader(4, []))
    trainer = make_trainer(parts(), max_steps=4)
    trainer.fit(Watched(), StatefulLoader(4, []), ckpt_path=tmp_path / "a.ckpt")
    assert [state["ema_step"].item() for state in trainer.optimizers[0].state.values()] == [2.0] * 6
    assert not any("Resumed with the checkpoint's" in str(warning.message) for warning in recwarn)


def test_a_checkpoint_of_an_average_is_not_trained_on_without_the_callback(tmp_path):
    make_trainer([*parts(), SaveAt(2, tmp_path / "a.ckpt")], max_steps=3).fit(Watched(), batches(3))
    trainer = make_trainer([parts()[0]], max_steps=4)
    with pytest.raises(RuntimeError, match=r"swap_out_average\(optimizer\).*the callback WeightAverage"):
        trainer.fit(Watched(), batches(4), ckpt_path=tmp_path / "a.ckpt")


def test_an_average_set_by_hand_before_the_first_step_is_read():
    model = Net()
    optimizer = lo.optim.SGD(model.parameters(), lr=0.1, ema=0.9)
    model.configure_optimizers = lambda: optimizer
    optimizer.param_groups[0]["ema"] = "power 0.05"
    with pytest.raises(MisconfigurationException, match=r"Invalid which=1 of WeightAverage.*ema=\['power 0.05'\]"):
        make_trainer([lo.WeightAverage(1)], max_epochs=1).fit(model, batches(1))
    make_trainer([lo.WeightAverage()], max_epochs=1).fit(model, batches(1))
    assert "ema_1" not in optimizer.state[next(model.parameters())]
