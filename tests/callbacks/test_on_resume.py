"""What a resumed run takes from its checkpoint and what from a configuration that has changed since."""

from __future__ import annotations

import copy
import logging
import re

import lightning.pytorch as L
import pytest
import torch

import lightning_optim as lo
from lightning_optim import schedules as s
from tests.callbacks.test_schedules import Hyperparameters
from tests.helpers import (
    Net,
    Recorder,
    SaveAt,
    StatefulLoader,
    batches,
    bit_equal,
    make_trainer,
)

COUNT = 8

KINDS = {"ours": "adamw", "torch": "torch.optim.AdamW"}
OLD = {"lr": 0.1, "weight_decay": 0.2, "schedule": "linear"}


def _fit(options, *extra, epochs=2, model=None, **more):
    recorder = Recorder()
    trainer = make_trainer([lo.ConfigureOptimizers(**options), recorder, *extra], max_epochs=epochs)
    trainer.fit(model or Net(), StatefulLoader(COUNT, []), **more)
    return trainer, recorder


def _rates(recorder, group=-1):
    return [rates[group] for rates in recorder.rates]


class AtStart(Hyperparameters):
    """What the optimizer is when training starts: the moments, and the groups."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.state = copy.deepcopy(trainer.optimizers[0].state_dict())
        self.global_step = trainer.global_step


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def middle(kind, tmp_path):
    """A checkpoint in the middle of the second epoch."""
    path = tmp_path / "middle.ckpt"
    _fit({"optimizer": kind, **OLD}, SaveAt(11, path))
    return path


@pytest.fixture
def printed(caplog):
    """What Lightning's logger, which keeps its records to itself, has printed."""
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def _moments(state):
    return [{k: v for k, v in entry.items() if k != "step"} for entry in state["state"].values()]


def test_the_configuration_is_honoured_when_it_has_the_say_and_moments_are_kept(kind, middle, printed):
    new = {"lr": 0.5, "weight_decay": 0.3, "optimizer_kwargs": {"betas": (0.8, 0.95)}, "schedule": "cosine"}
    start = AtStart("weight_decay", "betas")
    _, recorder = _fit({"optimizer": kind, **new, "on_resume": "config"}, start, epochs=3, ckpt_path=middle)
    saved = torch.load(middle, weights_only=True)["optimizer_states"][0]
    assert start.global_step == 11
    assert bit_equal(_moments(start.state), _moments(saved))
    assert [float(e["step"]) for e in start.state["state"].values()] == [11] * len(saved["state"])
    assert start.rows == [[[0.0, (0.8, 0.95)], [0.3, (0.8, 0.95)]]] * 13
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 24, dtype=torch.float64)).item()) / 2 for k in range(24)]
    assert _rates(recorder) == pytest.approx(cosine[11:], rel=1e-6)
    for piece in ("lr 0.1 → 0.5", "weight_decay 0.2 → 0.3", "betas", "Linear() → Cosine()", "step 16, this run at 24"):
        assert piece in printed.text


def test_by_default_the_checkpoint_holds_and_what_differs_is_warned_of(kind, middle):
    new = {**OLD, "lr": 0.5, "weight_decay": 0.3}
    start = AtStart("weight_decay")
    with pytest.warns(UserWarning, match=r"lr 0\.1 → 0\.5.*weight_decay 0\.2 → 0\.3.*on_resume=\"config\""):
        _, recorder = _fit({"optimizer": kind, **new}, start, ckpt_path=middle)
    assert _rates(recorder) == pytest.approx([0.1 * (1 - k / 16) for k in range(11, 16)])
    assert [row[1] for row in start.rows] == [[0.2]] * 5


def test_nothing_is_said_where_nothing_differs(kind, middle, recwarn, printed):
    _fit({"optimizer": kind, **OLD}, ckpt_path=middle)
    _fit({"optimizer": kind, **OLD, "on_resume": "config"}, ckpt_path=middle)
    assert "replaces" in printed.text
    assert not [str(w.message) for w in recwarn if "esumed" in str(w.message)]
    assert "Resumed with" not in printed.text


def test_a_configuration_that_has_not_changed_goes_on_bit_for_bit_either_way(kind, middle):
    ends = []
    for say in ("checkpoint", "config"):
        model = Net()
        trainer, recorder = _fit({"optimizer": kind, **OLD, "on_resume": say}, model=model, ckpt_path=middle)
        ends.append((dict(model.state_dict()), trainer.optimizers[0].state_dict(), recorder.rates))
    assert bit_equal(*ends)


@pytest.mark.parametrize("say", ["checkpoint", "config"])
def test_a_finished_run_that_is_prolonged_continues_or_is_stretched(say, tmp_path):
    options = {"optimizer": "sgd", "lr": 0.1, "schedule": s.Linear(final=0.25), "on_resume": say}
    trainer, _ = _fit(options, epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    if say == "checkpoint":
        with pytest.warns(UserWarning, match="ends at step 8, this run at 16"):
            _, recorder = _fit(options, epochs=2, ckpt_path=tmp_path / "end.ckpt")
        assert _rates(recorder) == pytest.approx([0.025] * 8)
    else:
        _, recorder = _fit(options, epochs=2, ckpt_path=tmp_path / "end.ckpt")
        assert _rates(recorder) == pytest.approx([0.1 * (1 - 0.75 * k / 16) for k in range(8, 16)])


def test_a_cooldown_branches_off_from_a_checkpoint_of_the_stable_part(tmp_path):
    stable = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant"}
    _fit(stable, SaveAt(5, tmp_path / "stable.ckpt"), epochs=4)
    recorder = Recorder()
    branch = s.WSD(cooldown=s.Cooldown(4, "linear"))
    configure = lo.ConfigureOptimizers("sgd", lr=0.1, schedule=branch, on_resume="config")
    trainer = make_trainer([configure, recorder], max_steps=9)
    trainer.fit(Net(), StatefulLoader(COUNT, []), ckpt_path=tmp_path / "stable.ckpt")
    assert _rates(recorder) == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_fused_is_the_configurations_if_it_has_the_say(before, after, tmp_path):
    def options(fused, **more):
        return {"optimizer": torch.optim.AdamW, **OLD, "optimizer_kwargs": {"fused": fused}, **more}

    _fit(options(before), SaveAt(3, tmp_path / "a.ckpt"))
    for say, fused in (("config", after), ("checkpoint", before)):
        if say == "checkpoint":
            with pytest.warns(UserWarning, match=f"fused {before} → {after}"):
                trainer, _ = _fit(options(after), ckpt_path=tmp_path / "a.ckpt")
        else:
            trainer, _ = _fit(options(after, on_resume=say), ckpt_path=tmp_path / "a.ckpt")
        assert {group["fused"] for group in trainer.optimizers[0].param_groups} == {fused}


# Other groups.


@pytest.mark.filterwarnings("ignore:Resumed with the checkpoint's hyperparameters")
@pytest.mark.parametrize("say", ["checkpoint", "config"])
def test_regrouped_state_is_matched_by_name(kind, middle, say):
    rules = [lo.ParamGroupRule(name="head", pattern="^head", lr_multiplier=10), "no_decay"]
    start = AtStart()
    trainer, recorder = _fit(
        {"optimizer": kind, **OLD, "param_groups": rules, "on_resume": say}, start, ckpt_path=middle
    )
    saved = torch.load(middle, weights_only=True)["optimizer_states"][0]
    names = {i: n for g in saved["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    now = {i: n for g in start.state["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    assert len(start.state["param_groups"]) == 3
    assert list(names.values()) != list(now.values())
    theirs = {names[i]: entry for i, entry in saved["state"].items()}
    ours = {now[i]: entry for i, entry in start.state["state"].items()}
    assert bit_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    ratio = {g["name"]: g["initial_lr"] / 0.1 for g in trainer.optimizers[0].param_groups}
    if say == "config":
        assert ratio == pytest.approx({"head": 10, "no_decay": 1, "default": 1})
        last = {g["name"]: rate for g, rate in zip(trainer.optimizers[0].param_groups, recorder.rates[-1], strict=True)}
        assert last["head"] == pytest.approx(0.1 * 10 / 16)


class Frozen(Net):
    """Trains its head only."""

    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)


def test_parameters_that_only_one_side_has_are_named(kind, middle, tmp_path, printed):
    with pytest.raises(ValueError, match=r"does not have (body\.\w+, )?.*body\.\w+.*on_resume"):
        _fit({"optimizer": kind, **OLD}, model=Frozen(), ckpt_path=middle)
    options = {"optimizer": kind, **OLD, "on_resume": "config"}
    trainer, _ = _fit(options, model=Frozen(), ckpt_path=middle)
    assert re.search(r"does not have .*body\.weight", printed.text)
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    start = AtStart()
    printed.clear()
    trainer, _ = _fit(options, start, epochs=3, ckpt_path=tmp_path / "frozen.ckpt")
    assert re.search(r"no optimizer state of .*body\.weight", printed.text)
    assert len(start.state["state"]) == 4
    assert len(trainer.optimizers[0].state_dict()["state"]) == 6


# Schedulers that are not ours.


def _step_lr(size):
    return {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": size, "gamma": 0.5}}


def test_a_foreign_scheduler_is_the_checkpoints_with_a_warning_or_the_configurations(tmp_path):
    old = {"optimizer": "sgd", "lr": 0.8, "schedule": _step_lr(4)}
    _fit(old, SaveAt(6, tmp_path / "a.ckpt"))
    with pytest.warns(UserWarning, match=r"StepLR.*step_size 4 \(configured: 2\).*on_resume"):
        _, recorder = _fit({**old, "schedule": _step_lr(2)}, ckpt_path=tmp_path / "a.ckpt")
    assert _rates(recorder) == pytest.approx([0.8 * 0.5 ** (k // 4) for k in range(6, 16)])
    new = {**old, "lr": 0.4, "schedule": _step_lr(2), "on_resume": "config"}
    trainer, recorder = _fit(new, SaveAt(9, tmp_path / "b.ckpt"), ckpt_path=tmp_path / "a.ckpt")
    assert _rates(recorder) == pytest.approx([0.4 * 0.5 ** (k // 2) for k in range(6, 16)])
    _, recorder = _fit({**new, "on_resume": "checkpoint"}, ckpt_path=tmp_path / "b.ckpt")
    assert _rates(recorder) == pytest.approx([0.4 * 0.5 ** (k // 2) for k in range(9, 16)])
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "StepLR"


def test_one_can_change_to_another_kind_of_scheduler_and_back(tmp_path):
    old = {"optimizer": "sgd", "lr": 0.8, "schedule": _step_lr(4)}
    _fit(old, SaveAt(6, tmp_path / "a.ckpt"))
    ours = {**old, "schedule": "linear", "on_resume": "config"}
    _, recorder = _fit(ours, SaveAt(9, tmp_path / "b.ckpt"), ckpt_path=tmp_path / "a.ckpt")
    assert _rates(recorder) == pytest.approx([0.8 * (1 - k / 16) for k in range(6, 16)])
    with pytest.raises(ValueError, match=r"is no StepLR.*total_steps.*on_resume"):
        _fit(old, ckpt_path=tmp_path / "b.ckpt")
    _, recorder = _fit({**old, "on_resume": "config"}, ckpt_path=tmp_path / "b.ckpt")
    assert _rates(recorder) == pytest.approx([0.8 * 0.5 ** (k // 4) for k in range(9, 16)])


class Stock(Net):
    """The module anyone has, with torch's AdamW of all parameters in one group."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Reordered(Stock):
    """The same modules, made in another order since."""

    def __init__(self):
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))


def _stock(tmp_path):
    """A checkpoint of stock Lightning after one epoch, and the weights after a second one."""
    model = Stock()
    trainer = make_trainer([SaveAt(COUNT, tmp_path / "stock.ckpt")], max_epochs=2)
    trainer.fit(model, StatefulLoader(COUNT, []))
    return tmp_path / "stock.ckpt", {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("module", [Net, Reordered])
def test_a_checkpoint_of_stock_lightning_goes_on_in_our_groups(kind, module, tmp_path, printed):
    path, expected = _stock(tmp_path)
    model, options = module(), {"optimizer": kind, "lr": 0.02, "weight_decay": 0.01}
    with pytest.warns(UserWarning, match=r"group no_decay: weight_decay 0\.01 → 0"):
        trainer, _ = _fit(options, model=model, ckpt_path=path)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert printed.text.count("has no names of parameters: its 6 have been matched by the order") == 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=1e-6)


class Untrained(Net):
    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


@pytest.mark.parametrize("inside", [False, True])
def test_another_optimizer_is_refused_before_training_or_starts_afresh(kind, middle, inside, tmp_path, printed):
    stock, _ = _stock(tmp_path)
    for path in (middle, stock):
        if inside:

            class Own(Untrained):
                def configure_optimizers(self):
                    return lo.OptimizerFactory("lion", lr=0.1)(self)

            parts: list[L.Callback] = []
            model: Untrained = Own()
        else:
            parts, model = [lo.ConfigureOptimizers("lion", lr=0.1)], Untrained()
        with pytest.raises(ValueError, match=r'AdamW, and Lion is configured.*on_resume="config"'):
            make_trainer(parts, max_epochs=2).fit(model, StatefulLoader(COUNT, []), ckpt_path=path)
    start = AtStart("weight_decay", "betas")
    options = {"optimizer": "lion", "lr": 0.1, "weight_decay": 0.3, "schedule": "linear", "on_resume": "config"}
    _, recorder = _fit(options, start, ckpt_path=middle)
    assert start.global_step == 11
    assert start.state["state"] == {}
    assert start.rows == [[[0.0, (0.9, 0.99)], [0.3, (0.9, 0.99)]]] * 5
    assert _rates(recorder) == pytest.approx([0.1 * (1 - k / 16) for k in range(11, 16)])
    assert "Resumed with Lion and a checkpoint of AdamW" in printed.text


def test_a_schedule_that_would_not_fit_the_former_run_fits_the_longer_one(tmp_path):
    def fit(epochs, path=None, **options):
        callback = lo.ConfigureOptimizers("sgd", lr=0.5, schedule="cosine", on_resume="config", **options)
        recorder = Recorder()
        trainer = make_trainer([callback, recorder], max_epochs=epochs)
        trainer.fit(Net(), batches(5), ckpt_path=path)
        return trainer, [rates[0] for rates in recorder.rates]

    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    _, rates = fit(10, tmp_path / "short.ckpt", warmup=20)
    assert rates[:10] == pytest.approx([0.5 * k / 20 for k in range(11, 21)])
