"""Callback objects that serve one fit after the other: each fit is as with new ones, and keeps its own state."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.divergence import LRCut, Rollback
from tests.helpers import Net, SaveAt, StatefulLoader, batches, bit_equal, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Step ")


class Points(DummyLogger):
    """Keeps every point but those about time."""

    def __init__(self):
        super().__init__()
        self.points = []

    def log_metrics(self, metrics, step=None):
        self.points.append((step, {k: v for k, v in metrics.items() if not k.startswith("optim_speed")}))


class Fold(Net):
    """Weights and data of a fold of its own, with bad batches that the guard, the clip rule and the ladder act on."""

    def __init__(self, fold, optimizer=None):
        super().__init__(nan_batches=[3 + fold, 4 + fold, 5 + fold], seed=fold)
        self.fold, self.error = fold, None

    def training_step(self, batch, batch_idx):
        if self.error is not None and batch_idx == 6:
            raise self.error
        loss = super().training_step(batch, batch_idx)
        return loss * (1e6 if 8 <= batch_idx < 11 else 1.0 + self.fold)


METHODS = ["adagc", "autoclip", "zclip", "momentum_ratio"]


def _parts(method="adagc", optimizer="adamw", **options):
    guard = lo.DivergenceGuard(
        lr_cut=LRCut(steps=3, budget=1), rollback=Rollback(every=2, clean=1, budget=2), patience=2, cooldown=1
    )
    return [
        lo.ConfigureOptimizers(optimizer, lr=0.01, schedule="cosine", warmup=3, **options),
        lo.GradientClipping(method=method),
        guard,
        lo.OptimizerMonitor(),
        lo.RunSummary(),
    ]


def _fit(parts, model, loader=None, extra=(), ckpt_path=None, **options):
    logger = Points()
    trainer = make_trainer([*parts, *extra], logger=logger, **{"max_epochs": 1, **options})
    trainer.fit(model, loader or batches(12), ckpt_path=ckpt_path)
    return trainer, logger.points


def _result(parts, fitted, model):
    trainer, points = fitted
    guard, monitor = parts[2], parts[3]
    entries = [(entry.step, entry.kind, entry.text) for entry in guard.report.entries]
    numbers = (guard.skipped_steps, guard.rollback_count, guard.overflow_steps, guard.ladder.used)
    latest = {tag: value for tag, value in monitor.latest.items() if not tag.startswith("optim_speed")}
    counts = parts[4]._counts
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return [weights, state_of_last_fit(trainer), entries, numbers, points, latest, monitor.alarms, counts]


def _same(one, other):
    return all(
        bit_equal(a, b) if i < 2 else repr(a) == repr(b) for i, (a, b) in enumerate(zip(one, other, strict=True))
    )


def test_four_folds_with_the_same_callbacks_are_four_fits_with_new_ones():
    parts = _parts()
    responses = 0
    for fold in range(4):
        model, alone = Fold(fold), Fold(fold)
        again = _result(parts, _fit(parts, model), model)
        new = _parts()
        assert _same(again, _result(new, _fit(new, alone), alone))
        responses += new[2].ladder.used["lr_cut"] + new[2].rollback_count
    assert responses > 0  # there was something to forget


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_a_fit_begins_anew_however_the_last_one_ended(method, error):
    parts = _parts(method)
    first = Fold(1)
    if error is None:
        trainer, _ = _fit(parts, first)
        trainer.test(_Tested(), batches(2), verbose=False)
    else:
        first.error = error("mine")
        with pytest.raises((error, SystemExit)):
            _fit(parts, first)
    model, alone, new = Fold(2), Fold(2), _parts(method)
    assert _same(_result(parts, _fit(parts, model), model), _result(new, _fit(new, alone), alone))


class _Tested(Fold):
    def __init__(self):
        super().__init__(0)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


def test_the_second_fit_may_resume_from_a_checkpoint(tmp_path):
    _fit(_parts(), Fold(3), StatefulLoader(12, []), [SaveAt(7, tmp_path / "a.ckpt")])
    parts = _parts()
    _fit(parts, Fold(1))
    model, alone, new = Fold(3), Fold(3), _parts()
    again = _result(parts, _fit(parts, model, StatefulLoader(12, []), ckpt_path=tmp_path / "a.ckpt"), model)
    assert again[7].steps == 12
    assert _same(again, _result(new, _fit(new, alone, StatefulLoader(12, []), ckpt_path=tmp_path / "a.ckpt"), alone))


def test_state_that_was_loaded_for_a_fit_that_never_began_is_not_the_next_ones(tmp_path):
    class Stops(L.Callback):
        def on_load_checkpoint(self, *args):
            raise RuntimeError("mine")

    _fit(_parts(), Fold(3), extra=[SaveAt(7, tmp_path / "a.ckpt")])
    parts = _parts()
    with pytest.raises(RuntimeError, match="mine"):
        _fit(parts, Fold(3), extra=[Stops()], ckpt_path=tmp_path / "a.ckpt")
    model, alone, new = Fold(2), Fold(2), _parts()
    assert _same(_result(parts, _fit(parts, model), model), _result(new, _fit(new, alone), alone))


def test_a_trainer_that_fits_twice_starts_the_callbacks_anew():
    parts = _parts()
    trainer, model = make_trainer(parts, max_epochs=1), Fold(0)
    trainer.fit(model, batches(12))
    first = copy.deepcopy(state_of_last_fit(trainer))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(12))
    second = state_of_last_fit(trainer)["lightning_optim"]
    assert first["lightning_optim"]["counts"][0][0] == second["counts"][0][0] == 12
    assert parts[2].skipped_steps == second["counts"][0][2]
    assert parts[4]._counts.steps == 12


def test_a_checkpoint_saved_by_hand_has_the_state_of_its_trainers_fit(tmp_path):
    parts = _parts()
    trainers, states = [], []
    for fold in range(2):
        trainers.append(_fit(parts, Fold(fold))[0])
        states.append(copy.deepcopy(state_of_last_fit(trainers[-1])))
    assert not bit_equal(*states)
    trainers[1].test(_Tested(), batches(2), verbose=False)
    for trainer, state in zip(trainers, states, strict=True):
        trainer.save_checkpoint(tmp_path / "late.ckpt")
        checkpoint = torch.load(tmp_path / "late.ckpt", weights_only=True)
        assert bit_equal({key: checkpoint[key] for key in state}, state)


def test_a_fit_that_fails_before_it_has_optimizers_leaves_the_state_of_the_one_before():
    trainer, model = make_trainer(parts := _parts(), max_epochs=1), Fold(0)
    trainer.fit(model, batches(4))
    before = copy.deepcopy(state_of_last_fit(trainer))
    trainer.fit_loop.max_epochs = 2
    trainer.callbacks.append(lo.GradientClipping(1.0))  # type: ignore[attr-defined] # a second one
    with pytest.raises(Exception, match="Two GradientClipping"):
        trainer.fit(model, batches(4))
    assert parts[1]._hub is None
    assert bit_equal(state_of_last_fit(trainer), before)


def test_callbacks_of_a_fit_that_is_over_can_be_copied_and_pickled():
    parts = _parts()
    trainer, _ = _fit(parts, Fold(0))
    assert state_of_last_fit(trainer)
    for copies in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        model, alone, new = Fold(1), Fold(1), _parts()
        assert _same(_result(copies, _fit(copies, model), model), _result(new, _fit(new, alone), alone))


@pytest.mark.parametrize(
    ("name", "options", "callback"),
    [("schedulefreeadamw", {}, lo.ScheduleFree), ("adamw", {"ema": 0.9}, lo.WeightAverage)],
)
def test_the_average_of_the_weights_is_anew_too(name, options, callback):
    def parts():
        return [lo.ConfigureOptimizers(name, lr=0.05, optimizer_kwargs=options), callback()]

    same, ends = parts(), []
    for callbacks in (same, same, parts()):
        model = Fold(1)
        make_trainer(callbacks, max_epochs=1).fit(model, batches(8), batches(1))
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert bit_equal(ends[1], ends[2])
    assert bit_equal(ends[0], ends[2])
