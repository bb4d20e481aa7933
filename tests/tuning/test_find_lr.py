"""`find_lr`, `LRRangeTest` and the command: what they find, what they set, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.cli import main
from tests.helpers import RULES, Net, make_trainer
from tests.tuning.learner import Learner, groups
from tests.tuning.test_trials import ByHand, Noisy, Warms, assert_equal, everything, fit, loader_of, samples

METHODS = ("sweep", "trials")
INDEPENDENT = {"weight_decay_kind": "independent"}


def _quick(method: str = "sweep", **options):
    return lo.LRRangeTest(method, **{"steps": 20, "repeats": 1, **options})


class Never(lo.LRRangeTest):
    """Takes part in the fit, and looks for nothing."""

    def on_train_batch_start(self, *_):
        pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("precision_", "loader", "trainer"),
    [
        ("32-true", "stateful", {"accumulate_grad_batches": 2}),
        ("bf16-mixed", "shuffled", {}),
        ("16-mixed", "stream", {}),
    ],
)
def test_a_fit_with_a_suggestion_alone_is_bit_equal_to_one_without(method, precision_, loader, trainer, tmp_path):
    def callbacks():
        return [
            lo.ConfigureOptimizers("lion", 1e-3, schedule="cosine", warmup=3, param_groups=RULES),
            lo.DivergenceGuard(),
        ]

    fits = []
    for trying in ([], [_quick(method, apply=False)]):
        fits.append(fit(Noisy(), callbacks(), loader_of(loader), trying, tmp_path, precision=precision_, **trainer))
    assert_equal(*fits)
    assert trying[0].found is not None


def test_two_optimizers_each_get_theirs(tmp_path):
    trying = [_quick(apply=False)]
    fits = [fit(ByHand(), [], loader_of("shuffled"), each, tmp_path) for each in ([], trying)]
    assert_equal(*fits)
    assert [rate.name for rate in trying[0].found] == ["0", "1"]
    assert [rate.configured for rate in trying[0].found] == [0.1, 0.01]
    with pytest.raises(ValueError, match="2 optimizers"):
        trying[0].found.lr  # noqa: B018


class Adversaries(Learner):
    """Two optimizers, whose schedules of ours move with their steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_schedules_that_move_with_their_optimizers_stand_still_in_trials(capsys):
    parts = [
        {"name": name, "part": name, "optimizer": "adam", "lr": 0.01, "schedule": "linear"} for name in ("body", "head")
    ]

    def run(callbacks):
        model, trainer = Adversaries(), make_trainer(callbacks, max_steps=20, max_epochs=-1)
        L.seed_everything(0, verbose=False)
        trainer.fit(model)
        return [*model.parameters()], [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]

    test = _quick("trials", apply=False)
    weights, schedules = run([lo.ConfigureOptimizers(optimizers=parts), test])
    others, same = run([lo.ConfigureOptimizers(optimizers=parts)])
    assert all(map(torch.equal, weights, others))
    assert schedules == same
    printed = capsys.readouterr()
    assert "set by others" not in printed.out
    assert "Learning rate" not in printed.err  # no progress bar where the Trainer has none
    assert "opponents" in str(test.found)
    assert [rate.flag for rate in test.found] == ["optim.optimizers.body.lr", "optim.optimizers.head.lr"]


@pytest.mark.parametrize("method", METHODS)
def test_afterwards_the_same_objects_can_be_fitted_as_if_nothing_had_been(method, tmp_path):
    ends = []
    for finds in (False, True):
        L.seed_everything(0, verbose=False)
        model, loader = Noisy(), loader_of("stateful")
        trainer: Any = make_trainer(
            [lo.ConfigureOptimizers("adamw", 1e-3, schedule="cosine"), lo.GradientClipping(1.0), lo.OptimizerMonitor()],
            max_steps=20,
            max_epochs=-1,
            logger=TensorBoardLogger(tmp_path / str(finds), name=""),
        )
        before = trainer.callbacks
        if finds:
            found = lo.find_lr(trainer, model, loader, method=method, steps=20, repeats=2)
            assert found.method == method
            assert not (tmp_path / "True").exists()  # nothing is logged
        assert trainer.callbacks is before
        assert len(before) == 3
        trainer.fit(model, loader)
        ends.append(everything(trainer, model))
    assert_equal(*ends)


def learn(callbacks, lr=1e-4, steps=20, path=None):
    L.seed_everything(0, verbose=False)
    model, trainer = Learner(lr), make_trainer(callbacks, max_steps=steps, max_epochs=-1)
    trainer.fit(model, ckpt_path=path)
    return trainer, model


@pytest.mark.parametrize(
    "configure",
    [
        lambda lr: lo.ConfigureOptimizers("adamw", lr, schedule="cosine", warmup=3, param_groups=groups()),
        lambda lr: lo.ConfigureOptimizers("sgd", lr, weight_decay=0.1, optimizer_kwargs=INDEPENDENT),
        lambda lr: lo.ConfigureOptimizers(torch.optim.Adam, lr, schedule="linear"),
    ],
    ids=["cosine", "independent decay", "torch"],
)
def test_what_is_set_is_what_a_configuration_with_that_rate_trains_with(configure):
    test = lo.LRRangeTest(steps=80)
    trainer, found = learn([configure(1e-3), test])
    assert not 0.9e-3 < test.found.lr < 1.1e-3
    _, configured = learn([configure(test.found.lr)])
    assert_close(found, configured)
    rates = {group.get("name"): group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates.get("head", 3 * test.found.lr) == pytest.approx(3 * test.found.lr)


def assert_close(a, b):
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rates_of_a_module_with_an_optimizer_and_a_scheduler_of_its_own():
    test = lo.LRRangeTest(steps=80)
    _, found = learn([test])
    assert test.found[0].flag == "model.lr"
    assert test.found.flags == [f"--model.lr={test.found.lr:.4g}"]
    _, configured = learn([], lr=test.found.lr)
    assert_close(found, configured)


@pytest.mark.parametrize("on_resume", ["checkpoint", "config"])
def test_a_resumed_run_keeps_the_rate_that_was_found(on_resume, tmp_path):
    def run(steps, path=None):
        test = lo.LRRangeTest(steps=80)
        return learn([lo.ConfigureOptimizers("adamw", 1e-5, on_resume=on_resume), test], steps=steps, path=path)[
            0
        ], test

    trainer, test = run(4)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    assert lr == pytest.approx(test.found.lr)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, again = run(8, tmp_path / "a.ckpt")
    assert again.found is None
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("place", [0, 2])
def test_loggers_get_the_rate_that_was_found_wherever_the_callback_stands(place, tmp_path):
    test, callbacks = lo.LRRangeTest(steps=60), [lo.ConfigureOptimizers("adamw", 1e-3), lo.OptimizerMonitor()]
    callbacks.insert(place, test)
    trainer = make_trainer(callbacks, max_steps=6, max_epochs=-1, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(Learner())
    hparams = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert hparams["optim/lr"] == pytest.approx(test.found.lr)
    assert test.found.lr != 1e-3


def test_a_trial_that_raises_leaves_the_others_and_the_fit(tmp_path):
    class Fragile(Noisy):
        def training_step(self, batch, batch_idx):
            if self.optimizers().param_groups[0]["lr"] > 0.02:
                raise torch.OutOfMemoryError("at this rate")
            return super().training_step(batch, batch_idx)

    fits = []
    for trying in ([], [_quick("trials", apply=False)]):
        fits.append(fit(Fragile(), [lo.ConfigureOptimizers("sgd", 0.01)], loader_of("shuffled"), trying, tmp_path))
    assert_equal(*fits)
    assert "trials failed, the last one with OutOfMemoryError: at this rate" in str(trying[0].found)
    assert (trying[0].found.lr or 0) < 0.02


def test_weight_decay_and_batch_are_tried_with_the_rate():
    trainer = make_trainer([lo.ConfigureOptimizers("adamw", 0.02, schedule="linear")], max_steps=40, max_epochs=-1)
    model = Learner()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lo.find_lr(trainer, model, method="check", steps=40, weight_decays=[0.0, 100.0], batches=[1, 2])
    decay, batch = found[0].grids
    assert {value for value, _ in decay.pairs.alike} == {0.0}
    assert {value for value, _ in batch.pairs.ranking} == {1.0, 2.0}
    assert len(batch.pairs.ranking) == 4  # at one batch, all three rates are the same
    assert "square root" in str(batch)
    assert "hurts" in str(found)
    assert trainer.accumulate_grad_batches == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="whole multiple"):
        lo.find_lr(trainer, model, method="check", steps=20, batches=[0])


def test_a_module_that_always_raises_is_an_error_with_its_cause():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    trainer = make_trainer([lo.ConfigureOptimizers("sgd", 0.01)])
    with pytest.raises(RuntimeError, match="No trial of SGD went through: KeyError: 'mine'") as error:
        lo.find_lr(trainer, Broken(), DataLoader(samples(), 4))
    assert isinstance(error.value.__cause__, KeyError)


def test_what_cannot_work_is_refused():
    loader = DataLoader(samples(), 4)
    with pytest.raises(ValueError, match="Unknown method='sweeps'"):
        lo.LRRangeTest("sweeps")
    with pytest.raises(ValueError, match="must be at least 20"):
        lo.LRRangeTest(steps=3)
    with pytest.raises(ValueError, match="must be below high"):
        lo.LRRangeTest(low=1.0, high=0.1)
    with pytest.raises(MisconfigurationException, match="that has steps to come"):
        lo.find_lr(make_trainer([lo.ConfigureOptimizers("sgd", 0.1)], max_epochs=0), Net(), loader)
    with pytest.raises(MisconfigurationException, match="can be read once"):
        lo.find_lr(make_trainer([lo.ConfigureOptimizers("sgd", 0.1)], max_steps=3), Net(), iter([1] * 9))


def test_names_of_callbacks_to_leave_out_are_checked(tmp_path):
    loader = DataLoader(samples(), 4)
    callbacks = [lo.ConfigureOptimizers("sgd", 0.01), lo.GradientClipping(1.0), ModelCheckpoint(tmp_path)]
    trainer = make_trainer(callbacks, max_steps=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"without='GradientCliping'.* Did you mean 'GradientClipping'"):
        lo.find_lr(trainer, Net(), loader, without=["GradientCliping"])
    names = ["GradientClipping", "ModelCheckpoint"]
    assert lo.find_lr(trainer, Net(), loader, method="sweep", steps=20, repeats=1, without=names).notes == ()


def test_a_checkpoint_of_the_last_fit_is_the_same_after_a_search():
    trainer = make_trainer([lo.ConfigureOptimizers("sgd", 0.01), lo.GradientClipping(1.0)], max_steps=5)
    model, loader = Net(), DataLoader(samples(), 4)
    trainer.fit(model, loader)
    before = copy.deepcopy(state_of_last_fit(trainer))
    trainer.fit_loop.epoch_loop.max_steps = 10
    lo.find_lr(trainer, model, loader, method="sweep", steps=20, repeats=1)
    assert_equal(before, state_of_last_fit(trainer))
    assert before["lightning_optim"]["counts"] == [[5, 5, 0]]


def test_a_module_that_sets_its_rates_is_told_of():
    found = lo.find_lr(make_trainer(max_steps=9), Warms(), loader_of("shuffled"), method="sweep", steps=20, repeats=1)
    assert "sets learning rates between the steps" in str(found)


def test_an_error_in_putting_back_is_not_taken_for_one_of_a_trial(monkeypatch):
    def fail(self):
        raise RuntimeError("cannot put back")

    monkeypatch.setattr("lightning_optim.tuning.trials.fit.ObjectSnapshot.put_back", fail)
    with pytest.raises(RuntimeError, match="cannot put back"):
        learn([lo.ConfigureOptimizers("sgd", 0.01), _quick()])


def test_the_command_writes_a_configuration_that_fit_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [
        *("--model=tests.tuning.learner.Bare", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *("--trainer.enable_checkpointing=false", "--trainer.logger=false", "--trainer.max_epochs=1"),
        *("--optim.optimizer=adamw", "--optim.lr=1e-5", "--trainer.enable_model_summary=false"),
    ]
    main(["find-lr", *args, "--method=sweep", "--steps=80"])
    out = capsys.readouterr().out
    assert "--config found_lr/lr.yaml" in out
    lr = yaml.safe_load((tmp_path / "found_lr" / "lr.yaml").read_text())["optim"]["lr"]
    assert (tmp_path / "found_lr" / "lr.png").stat().st_size > 1000
    main(["plan", *[arg for arg in args if "optim.lr" not in arg], "--config", "found_lr/lr.yaml"])
    assert f"{lr:.4g}"[:4] in capsys.readouterr().out
