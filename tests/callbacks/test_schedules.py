"""Schedules in real fits: the rates used at every step, for every shape and however a schedule is given."""

from __future__ import annotations

import random

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_optim as lo
from lightning_optim import schedules as s
from tests.helpers import Net, NetWith, Ramp, Recorder, SaveAt, StatefulLoader, batches, make_trainer
from tests.schedules.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore:Step .* skipped")


class Logs(Net):
    """Logs what a plateau may look at: a validation loss that is given."""

    def __init__(self, losses=(1.0,)):
        super().__init__()
        self.losses = list(losses)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses[min(self.current_epoch, len(self.losses) - 1)])


def _rates(rows):
    return [rates[0] for rates in rows]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_rates_equal_the_closed_form_over_accumulation_a_skip_and_a_resume(case, accumulate, tmp_path):
    chance = random.Random(f"{case.name} {accumulate}")
    count = 8 if accumulate == 1 else 16
    per_epoch = -(-count // accumulate)
    total = 2 * per_epoch
    bad = chance.randrange(count)  # of each epoch
    at = chance.randrange(1, total)

    def fit(ckpt_path=None, extra=()):
        model, recorder = Logs(), Recorder()
        model.nan_batches = {bad}
        configure = lo.ConfigureOptimizers("sgd", lr=0.5, schedule=case.schedule, param_groups=[])
        trainer = make_trainer(
            [configure, lo.DivergenceGuard(), recorder, *extra], max_epochs=2, accumulate_grad_batches=accumulate
        )
        trainer.fit(model, StatefulLoader(count, []), batches(1), ckpt_path=ckpt_path)
        assert trainer.global_step == total
        return recorder.rates, trainer.lr_scheduler_configs[0].scheduler.last_epoch

    whole, end = fit(extra=[SaveAt(at, tmp_path / "middle.ckpt")])
    rest, end_of_rest = fit(tmp_path / "middle.ckpt")
    positions, position = [], 0
    for step in range(total):
        positions.append(position)
        position += step % per_epoch != bad // accumulate
    assert _rates(whole) == pytest.approx([0.5 * case.expected(k, total) for k in positions], rel=1e-12)
    assert rest == whole[at:]
    assert end == end_of_rest == position == total - 2


# However it is given.


def _constructed(**options):
    """As LightningCLI makes a callback from YAML."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(lo.ConfigureOptimizers, "it")
    return parser.instantiate_classes(parser.parse_object({"it": options})).it


def _fit(configure, model=None, count=12, val=False, **options):
    recorder = Recorder()
    trainer = make_trainer([configure, recorder], **options)
    trainer.fit(model or Ramp(), batches(count), batches(1) if val else None)
    return recorder, trainer


_STEP_LR = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3, "gamma": 0.5}}


def halving(step):
    return 0.5 ** (step // 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "linear", "warmup": "4 steps"}, lambda k: (k + 1) / 4 if k < 4 else 1 - (k - 4) / 8),
        (
            {"schedule": "linear", "warmup": {"length": "4 steps", "shape": "linear", "start": 0.2}},
            lambda k: 0.2 + 0.8 * k / 4 if k < 4 else 1 - (k - 4) / 8,
        ),
        (
            {
                "schedule": {
                    "class_path": "lightning_optim.schedules.WSD",
                    "init_args": {"warmup": 2, "cooldown": {"length": "50%", "shape": "linear", "final": 0.1}},
                }
            },
            lambda k: (k + 1) / 2 if k < 2 else 1 if k < 6 else 0.1 + 0.9 * (1 - (k - 6) / 6),
        ),
        (
            {
                "schedule": {
                    "class_path": "lightning_optim.schedules.MultiStep",
                    "init_args": {"milestones": [3, "50%"], "factor": 0.5},
                }
            },
            lambda k: 1 if k < 3 else 0.5 if k < 6 else 0.25,
        ),
        ({"schedule": _STEP_LR}, halving),
        ({"schedule": "tests.callbacks.test_schedules.halving"}, halving),
        ({"schedule": "lightning_optim.schedules.Linear"}, lambda k: 1 - k / 12),
    ],
    ids=["name", "warmup", "nested", "list", "torch", "function", "path"],
)
@pytest.mark.parametrize("yaml", [True, False])
def test_a_schedule_can_be_written_in_any_way(options, expected, yaml):
    if not yaml and isinstance(options.get("warmup"), dict):
        options = {**options, "warmup": s.Warmup(**options["warmup"])}
    if not yaml and isinstance(options["schedule"], dict) and "WSD" in options["schedule"]["class_path"]:
        options = {"schedule": s.WSD(2, s.Cooldown("50%", "linear", 0.1))}
    make = _constructed if yaml else lo.ConfigureOptimizers
    recorder, _ = _fit(make(optimizer="sgd", lr=0.5, **options))
    assert _rates(recorder.rates) == pytest.approx([0.5 * expected(k) for k in range(12)], rel=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        halving,
        s.FromFunction(halving),
    ],
)
def test_a_schedule_can_be_a_callable(schedule):
    recorder, trainer = _fit(lo.ConfigureOptimizers("sgd", lr=0.5, schedule=schedule), accumulate_grad_batches=2)
    assert _rates(recorder.rates) == pytest.approx([0.5 * halving(k) for k in range(6)], rel=1e-12)
    assert trainer.lr_scheduler_configs[0].interval == "step"


def test_a_schedule_class_of_torch_takes_its_defaults():
    _, trainer = _fit(lo.ConfigureOptimizers("sgd", lr=0.5, schedule=torch.optim.lr_scheduler.ConstantLR))
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "ConstantLR"


def test_a_warmup_goes_before_a_function():
    recorder, _ = _fit(lo.ConfigureOptimizers("sgd", lr=0.5, schedule=halving, warmup=2))
    assert _rates(recorder.rates)[:6] == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.25])


# Other hyperparameters and groups.


class Hyperparameters(L.Callback):
    """Notes what each update used."""

    def __init__(self, *keys):
        self.keys, self.rows = keys, []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(
            lambda optimizer, *_: self.rows.append([[g[key] for key in self.keys] for g in optimizer.param_groups])
        )


@pytest.mark.parametrize("optimizer", ["adamw", "torch.optim.AdamW"])
@pytest.mark.parametrize("yaml", [True, False])
def test_weight_decay_and_momentum_follow_schedules_and_groups_their_own(optimizer, yaml, tmp_path):
    rising = {"class_path": "lightning_optim.schedules.Linear", "init_args": {"final": 3}}
    head = {"name": "head", "pattern": "^head", "weight_decay": 0.3, "schedule": "linear"}
    options = {
        "optimizer": optimizer,
        "lr": 0.1,
        "weight_decay": 0.1,
        "schedule": "constant",
        "schedules": {"weight_decay": rising, "momentum": "linear"},
        "param_groups": [head, "no_decay"],
    }

    def make():
        if yaml:
            return _constructed(**options)
        schedules = {"weight_decay": s.Linear(final=3), "momentum": "linear"}
        groups = [lo.ParamGroupRule(**head), "no_decay"]
        return lo.ConfigureOptimizers(**{**options, "schedules": schedules, "param_groups": groups})

    def fit(seen, **more):
        trainer = make_trainer([make(), seen, SaveAt(5, tmp_path / "a.ckpt")])
        trainer.fit(Net(), StatefulLoader(10, []), **more)
        return trainer

    seen = Hyperparameters("lr", "weight_decay", "betas")
    trainer = fit(seen)
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["head", "no_decay", "default"]
    for k, (of_head, undecayed, rest) in enumerate(seen.rows):
        rising_by, left = 1 + 2 * k / 10, 1 - k / 10
        assert [*of_head[:2], of_head[2][0]] == pytest.approx([0.1 * left, 0.3 * rising_by, 0.9 * left])
        assert [*undecayed[:2], undecayed[2][0]] == pytest.approx([0.1, 0, 0.9 * left])
        assert [*rest[:2], *rest[2]] == pytest.approx([0.1, 0.1 * rising_by, 0.9 * left, 0.999])
    again = Hyperparameters("lr", "weight_decay", "betas")
    fit(again, ckpt_path=tmp_path / "a.ckpt")
    assert again.rows == seen.rows[5:]


# Plateaus.


@pytest.mark.parametrize("inside", [False, True], ids=["callback", "module"])
def test_a_plateau_behind_a_warmup_needs_no_special_case(inside, tmp_path):
    options = {
        "optimizer": "sgd",
        "lr": 0.8,
        "schedule": {
            "class_path": "lightning_optim.schedules.ReduceOnPlateau",
            "init_args": {"warmup": "1 epoch", "monitor": "val_loss", "patience": 0, "factor": 0.5},
        },
    }
    losses = [5, 3, 2, 2, 1, 1]  # of epoch 1 on: the first counts as the warmup has just ended

    class Own(Logs):
        def configure_optimizers(self):
            return lo.OptimizerFactory(**options)(self)

    def fit(**more):
        recorder = Recorder()
        parts = [recorder, SaveAt(17, tmp_path / "a.ckpt")] + ([] if inside else [_constructed(**options)])
        trainer = make_trainer(parts, max_epochs=6)
        trainer.fit((Own if inside else Logs)(losses), StatefulLoader(4, []), batches(1), **more)
        return recorder.rates

    rates = fit()
    assert _rates(rates) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [0.8] * 12 + [0.4] * 8)
    assert fit(ckpt_path=tmp_path / "a.ckpt") == rates[17:]


def test_a_metric_that_is_not_logged_is_named():
    schedule = s.ReduceOnPlateau(monitor="val_acc")
    with pytest.raises(MisconfigurationException, match=r"val_acc.*val_loss"):
        _fit(lo.ConfigureOptimizers("sgd", lr=0.1, schedule=schedule), Logs(), val=True)


# Lengths.


def test_the_estimate_of_lightning_that_harms_resumes_is_never_asked_for(monkeypatch, tmp_path):
    def refuse(self):
        raise AssertionError("estimated_stepping_batches")

    monkeypatch.setattr(L.Trainer, "estimated_stepping_batches", property(refuse))
    configure = lo.ConfigureOptimizers("sgd", lr=0.5, schedule="cosine", warmup="10%")
    _fit(configure)

    make_trainer([]).fit(NetWith(lo.OptimizerFactory("sgd", lr=0.1, schedule="wsd")), batches(4))
