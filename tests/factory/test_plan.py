"""`lightning-optim plan`: what a fit would do, compared with what it does; and everything that stands against it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import TensorDataset

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.cli import main
from lightning_optim.factory.plan import Curve, Plan, plan_groups
from lightning_optim.factory.plan_text import format_plan, save_plot
from lightning_optim.factory.state_sizes import bytes_per_parameter
from lightning_optim.optim.base import OPTIMIZERS
from tests.helpers import BareNet, Data, Net, NetWith, Recorder, make_trainer

ROOT = Path(__file__).parents[2]


class Silent(Data):
    """Its batches must not be loaded."""

    def train_dataloader(self):
        dataset: Any = super().train_dataloader().dataset

        class Dataset(TensorDataset):
            def __getitem__(self, index):
                raise AssertionError("a batch was loaded")

        return torch.utils.data.DataLoader(Dataset(*dataset.tensors), batch_size=2, num_workers=1)


def _configure(**options):
    rules = ["no_decay", lo.ParamGroupRule(name="head", part="head", lr_multiplier=10, overlay=True)]
    return lo.ConfigureOptimizers(
        "adamw", lr=0.01, weight_decay=0.1, **{"schedule": "cosine", "warmup": "10%", "param_groups": rules, **options}
    )


def _run(callbacks, model=None, **trainer) -> tuple[Any, Net]:
    return make_trainer([*callbacks, Recorder()], **{"max_epochs": 3, **trainer}), model or Net()


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"limit_train_batches": 5},
        {"limit_train_batches": 0.5, "max_epochs": 2},
        {"max_steps": 7},
        {"overfit_batches": 4},
        {"fast_dev_run": 3},
        {"accumulation": {0: 4, 1: 1}},
    ],
    ids=str,
)
def test_the_plan_is_what_the_fit_does(trainer):
    def run():
        options = dict(trainer)
        extra = [GradientAccumulationScheduler(options.pop("accumulation"))] if "accumulation" in options else []
        return _run([_configure(), lo.GradientClipping(1.0), *extra], **options)

    planned, model = run()
    plan = make_plan(planned, model, Silent(11))
    assert plan.conflicts == []
    assert planned.global_step == 0

    fitted, model = run()
    fitted.fit(model, datamodule=Data(11))
    assert plan.horizon.total_steps == fitted.global_step
    (optimizer,) = fitted.optimizers
    names = [group["name"] for group in optimizer.param_groups]
    assert [group.name for group in plan.groups] == names
    rates = next(callback for callback in fitted.callbacks if isinstance(callback, Recorder)).rates
    (curve,) = plan.curves
    column = names.index(re.search(r"'(.*)'", curve.label)[1])
    assert [curve.values(step) for step in range(len(rates))] == pytest.approx([row[column] for row in rates])
    for group, planned_group in zip(optimizer.param_groups, plan.groups, strict=True):
        state = [value for p in group["params"] for value in optimizer.state[p].values()]
        assert planned_group.state_bytes == sum(value.numel() * value.element_size() for value in state)
        assert [name for name, _ in planned_group.parameters] == group["param_names"]
        assert planned_group.numel == sum(p.numel() for p in group["params"])
        assert planned_group.weight_decay == group["weight_decay"]
        assert planned_group.lr == pytest.approx(group["initial_lr"])


def test_nothing_is_left_behind_and_the_same_objects_can_be_fitted():
    trainer, model = _run([_configure(), lo.GradientClipping(1.0), lo.OptimizerMonitor()], max_epochs=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_plan(trainer, model, Silent(4))
    assert "configure_optimizers" not in vars(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    trainer.fit(model, datamodule=Data(4))
    assert trainer.global_step == 4


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_the_state_of_every_optimizer_is_what_it_keeps(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, _ = lo.OptimizerFactory(name, lr=0.01).build(model)
    planned = plan_groups(optimizer)
    model(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    for group, plan in zip(optimizer.param_groups, planned, strict=True):
        state = [value for p in group["params"] for value in optimizer.state[p].values()]
        kept = sum(value.numel() * value.element_size() for value in state if isinstance(value, torch.Tensor))
        assert plan.state_bytes == kept


TORCHS: dict[type[torch.optim.Optimizer], list[dict[str, Any]]] = {
    torch.optim.Adadelta: [{}],
    torch.optim.Adafactor: [{}],
    torch.optim.Adagrad: [{}],
    torch.optim.Adam: [{}, {"amsgrad": True}],
    torch.optim.AdamW: [{}, {"amsgrad": True, "fused": False}],
    torch.optim.Adamax: [{}],
    torch.optim.NAdam: [{}],
    torch.optim.RAdam: [{}],
    torch.optim.RMSprop: [{}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    torch.optim.Rprop: [{}],
    torch.optim.SGD: [{}, {"momentum": 0.9}],
}


@pytest.mark.parametrize(("cls", "options"), [(cls, one) for cls, several in TORCHS.items() for one in several])
def test_the_state_of_torchs_optimizers_is_known_from_shapes(cls, options):
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Linear(3, 2, dtype=torch.float64))
    optimizer = cls(model.parameters(), lr=0.01, **options)
    planned = sum(group.state_bytes for group in plan_groups(optimizer))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    kept = sum(value.numel() * value.element_size() for value in state if isinstance(value, torch.Tensor))
    assert planned == kept
    assert sum(group.state_bytes for group in plan_groups(optimizer)) == kept


class Counted(torch.optim.SGD):
    """Counts its instances and their steps, and steps only where it has been given its model."""

    made = steps = 0

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.model = None
        Counted.made += 1

    def step(self, closure=None):
        assert self.model is not None
        Counted.steps += 1
        return super().step(closure)


class OwnOptimizer(Net):
    def configure_optimizers(self):
        optimizer = Counted(self.parameters())
        optimizer.model = self
        return optimizer


@pytest.mark.parametrize("logs", [True, False])
def test_no_optimizer_of_the_users_is_made_or_stepped_by_a_fit_or_a_plan(logs, tmp_path):
    logger = TensorBoardLogger(tmp_path) if logs else False
    parts = [lo.OptimizerMonitor(), lo.DivergenceGuard(), lo.GradientClipping(1.0), lo.RunSummary()]
    Counted.made = Counted.steps = 0
    trainer = make_trainer(parts, max_epochs=1, logger=logger)
    trainer.fit(OwnOptimizer(), datamodule=Data(3))
    assert (Counted.made, Counted.steps) == (1, 3)
    plan = make_plan(make_trainer(parts, max_epochs=1), OwnOptimizer(), Data(3))
    assert plan.conflicts == []
    assert (Counted.made, Counted.steps) == (2, 3)  # the module's own, asked for what it would train with
    assert [group.state_bytes for group in plan.groups] == [None]


def test_the_configuration_is_shown_without_making_an_optimizer():
    class Once(torch.optim.SGD):
        made = 0

        def __init__(self, params, lr=0.1):
            super().__init__(params, lr)
            Once.made += 1

    factory = lo.OptimizerFactory(Once, lr=0.5)
    made = Once.made
    assert factory.settings["lr"] == 0.5
    assert Once.made == made


def _conflicts(callbacks, model=None, data=None, **trainer):
    return make_plan(*_run(callbacks, model, **trainer), data or Silent(4)).conflicts


def test_all_conflicts_are_listed_at_once():
    rules = [lo.ParamGroupRule(name="haed", pattern="^haed"), lo.ParamGroupRule(name="bdoy", pattern="^bdoy")]
    conflicts = _conflicts(
        [
            _configure(param_groups=rules, warmup="100 steps"),
            lo.GradientClipping(1.0),
            lo.GradientClipping(2.0),
            lo.DivergenceGuard(),
        ],
        gradient_clip_val=0.5,
    )
    told = "\n".join(conflicts)
    for piece in ("'haed'", "'bdoy'", "gradient_clip_val=0.5", "Two GradientClipping", "100"):
        assert piece in told
    assert len(conflicts) == 5


def test_a_group_that_would_never_thaw_is_a_conflict():
    rules = [lo.ParamGroupRule(name="body", pattern="^body", frozen_until="5 epochs")]
    (conflict,) = _conflicts([_configure(param_groups=rules)])
    assert "'body'" in conflict
    assert "step 20" in conflict
    assert "12" in conflict


def test_a_module_without_optimizer_is_a_conflict():
    conflicts = _conflicts([lo.GradientClipping(1.0)], BareNet())
    assert any("configure_optimizers" in conflict for conflict in conflicts)


def test_two_schedules_are_a_conflict():
    def configure(module):
        config = lo.OptimizerFactory("sgd", lr=0.1)(module)
        other = torch.optim.lr_scheduler.ConstantLR(config["optimizer"])
        return [config["optimizer"]], [config["lr_scheduler"], other]

    (conflict,) = _conflicts([lo.GradientClipping(1.0)], NetWith(configure))
    assert "Two schedules" in conflict


def test_a_run_without_end_and_a_schedule_that_needs_one_are_a_conflict():
    assert any("length of the run" in conflict for conflict in _conflicts([_configure()], max_epochs=-1))
    plan = make_plan(*_run([_configure(schedule=None, warmup=3)], max_epochs=-1), Silent(4))
    assert plan.conflicts == []
    assert "unbounded" in format_plan(plan)


def test_modules_with_their_own_optimizer_have_a_plan():
    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    plan = make_plan(*_run([], NetWith(configure)), Silent(4))
    assert [(group.name, group.lr, group.rule) for group in plan.groups] == [("0", 0.5, "adam")]
    assert not plan.conflicts


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedulers_of_torch_are_run_through(interval):
    def configure(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    trainer, model = _run([], NetWith(configure))
    plan = make_plan(trainer, model, Silent(4))
    trainer, model = _run([], NetWith(configure))
    trainer.fit(model, datamodule=Data(4))
    rates = next(callback for callback in trainer.callbacks if isinstance(callback, Recorder)).rates
    assert [plan.curves[0].values(step) for step in range(12)] == pytest.approx([row[0] for row in rates])
    assert "CosineAnnealingLR" in plan.curves[0].label
    assert plan.groups[0].lr == 0.5


def test_what_cannot_be_run_through_is_named():
    def plateau(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "val_loss"}]

    (note,) = [n for n in make_plan(*_run([], NetWith(plateau)), Silent(4)).notes if "is usual" not in n]
    assert "ReduceLROnPlateau follows a metric" in note
    configure = _configure(
        schedule={"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 5}},
        warmup=None,
    )
    (note,) = [n for n in make_plan(*_run([configure]), Silent(4)).notes if "is usual" not in n]
    assert "OneCycleLR cannot be drawn" in note


def test_several_devices_share_the_batches():
    plan = make_plan(*_run([_configure()], devices=2, strategy="ddp"), Data(11))
    assert plan.horizon == lo.Horizon(total_steps=18, steps_per_epoch=6)
    assert plan.conflicts == []


def test_a_plateau_of_ours_is_drawn_without_its_drops():
    plan = make_plan(*_run([_configure(schedule="reduce_on_plateau")]), Silent(4))
    assert plan.conflicts == []
    assert len(plan.curves) == 1


def test_what_lightning_freezes_is_in_no_group():
    class Backbone(Net):
        def __init__(self):
            super().__init__()
            self.backbone = self.body

    plan = make_plan(*_run([_configure(), BackboneFinetuning(1)], Backbone()), Silent(4))
    assert not any("body" in name or "backbone" in name for group in plan.groups for name, _ in group.parameters)


def test_the_text():
    plan = make_plan(*_run([_configure(param_groups=["no_decay"])], max_epochs=2), Silent(10))
    text = format_plan(plan, parameters=True, width=40)
    assert "Optimizer steps: 20 (10 per epoch)" in text
    assert re.search(r"no_decay +4 +26 +0\.01 +0 +adamw", text)
    assert "    head.weight  [2, 8]" in text
    assert re.search(r"total +6 +74 +\d", text)
    assert "No conflicts." in text
    assert max(map(len, text.splitlines())) < 100
    plot = text.split("lr of group")[1].splitlines()
    assert plot[1].startswith("0.01 |")
    assert any(line.endswith("step 19") for line in plot)


def test_a_curve_of_nothing_can_be_drawn():
    text = format_plan(Plan(horizon=lo.Horizon(total_steps=1), curves=[Curve("flat", lambda step: 0.0)]))
    assert "flat:" in text


def test_a_picture_needs_matplotlib_and_says_so(tmp_path, monkeypatch):
    curves = [Curve("lr", float), Curve("momentum", lambda step: 0.9)]
    save_plot(curves, lo.Horizon(total_steps=100), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-optim\[plot\]"):
        save_plot(curves, lo.Horizon(total_steps=100), tmp_path / "plan.png")


# The command.


def _config(tmp_path, callbacks, **trainer):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 2}
    config = {
        "model": {"class_path": "tests.helpers.BareNet"},
        "data": {"class_path": "tests.factory.test_plan.Silent", "init_args": {"count": 5}},
        "trainer": {**quiet, "callbacks": yaml.safe_load(callbacks), **trainer},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "run.yaml")]


CALLBACKS = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args: {optimizer: adamw, lr: 0.3, schedule: cosine, warmup: 10%}
- {class_path: lightning_optim.GradientClipping, init_args: {max_norm: 1.0}}
"""


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    args = _config(tmp_path, CALLBACKS)
    main(["plan", *args, "--parameters=true", f"--png={tmp_path / 'plan.png'}"])
    out = capsys.readouterr().out
    assert "Optimizer steps: 10 (5 per epoch)" in out
    assert "body.weight  [8, 4]" in out
    assert (tmp_path / "plan.png").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_command_fails_on_conflicts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit) as caught:
        main(["plan", *_config(tmp_path, CALLBACKS, gradient_clip_val=0.5)])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "1 conflict:" in out
    assert "gradient_clip_val=0.5" in out


@pytest.mark.parametrize("example", ["digits", "char_lm"])
def test_the_examples_have_a_plan(example, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path[:])
    main(["plan", "--config", f"examples/{example}.yaml"])
    out = capsys.readouterr().out
    assert "No conflicts." in out
    if example == "char_lm":
        assert out[out.index("Optimizer steps") :].rstrip() in (ROOT / "docs/concepts/plan.md").read_text()


@pytest.mark.parametrize(("bits", "shown"), [(32, "8"), (16, "4"), (8, "2.03")])
def test_bytes_per_parameter_are_in_the_plan_and_those_that_steps_make(bits, shown):
    weight = torch.nn.Parameter(torch.zeros(256, 512))
    optimizer = lo.optim.AdamW([weight], state_bits=bits)
    rows = format_plan(Plan(groups=plan_groups(optimizer))).splitlines()
    (header,) = (row.split() for row in rows if row.startswith("group "))
    (total,) = (row.split() for row in rows if row.startswith("total "))
    assert header[-1] == "B/param"
    assert total[-1] == shown
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values() if value.dim())
    assert kept / weight.numel() == bytes_per_parameter(lo.optim.AdamW, bits)


def test_bytes_per_parameter_of_every_optimizer_are_known_in_32_bits():
    sizes = {cls: bytes_per_parameter(cls) for _, cls in OPTIMIZERS.items() if issubclass(cls, lo.optim.FusedOptimizer)}
    assert all(sizes.values())
    assert bytes_per_parameter(lo.optim.SGD) == 4  # with momentum
    assert bytes_per_parameter(lo.optim.Adafactor, 8) is None
