"""A schedule and an optimizer from outside the package, by name: in YAML, in a group, in plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_optim as lo
from lightning_optim.callbacks.planning import make_plan
from tests.helpers import Data, Net, Recorder, make_trainer

pytestmark = pytest.mark.usefixtures("own_names")


class Staircase(lo.schedules.Schedule):
    """Half of the peak from one third of the run on."""

    def shape(self, at):
        return 1.0 if at.progress < 1 / 3 else 0.5


class SignDescent(lo.optim.SGD):
    """One of ours, in another package."""


class Outsider(torch.optim.SGD):
    """One of torch's kind, in another package."""


@pytest.fixture(autouse=True)
def _registered(own_names):
    lo.register(Staircase, name="my_schedule")
    lo.register(SignDescent, name="my_optimizer")
    lo.register(Outsider)


CALLBACKS = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args:
    optimizer: {optimizer}
    lr: 0.4
    schedule: my_schedule
    param_groups:
      - {{name: head, part: head, schedule: {own}}}
      - no_decay
- tests.helpers.Recorder
"""


def _config(folder, optimizer="sgd", own="cosine"):
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = yaml.safe_load(CALLBACKS.format(optimizer=optimizer, own=own))
    trainer = {**quiet, "enable_model_summary": False, "max_epochs": 1, "callbacks": callbacks}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer, "data": {"count": 24}}))
    return str(path)


@pytest.mark.parametrize("cls", [LightningCLI, lo.OptimCLI])
@pytest.mark.parametrize("optimizer", ["my_optimizer", "outsider"])
def test_yaml_takes_the_names(cls, optimizer, tmp_path):
    cli: Any = cls(Net, Data, args=["fit", "--config", _config(tmp_path, optimizer)], save_config_callback=None)
    (made,) = cli.trainer.optimizers
    recorder = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder))
    names = [group["name"] for group in made.param_groups]
    assert type(made) is {"my_optimizer": SignDescent, "outsider": Outsider}[optimizer]
    rates = [step[names.index("default")] for step in recorder.rates]
    assert rates == [0.4 if step < len(rates) / 3 else 0.2 for step in range(len(rates))]
    assert len(rates) > 3


def test_a_groups_own_schedule_takes_the_name_from_yaml(tmp_path):
    args = ["--config", _config(tmp_path, own="my_schedule")]
    cli: Any = LightningCLI(Net, Data, args=args, save_config_callback=None, run=False)
    configure = next(c for c in cli.trainer.callbacks if isinstance(c, lo.ConfigureOptimizers))
    _, scheduler = configure.build(cli.model, lo.Horizon(total_steps=9))
    assert type(scheduler.group_schedules["head"]) is Staircase


def test_plan_shows_them(tmp_path, capsys):
    args = ["plan", "--config", _config(tmp_path, "my_optimizer", "my_schedule")]
    lo.OptimCLI(Net, Data, args=args, save_config_callback=None)
    text = capsys.readouterr().out
    assert "No conflicts." in text
    assert "signdescent" in text
    assert "lr of group 'head'" in text


def test_python_takes_the_names_in_the_groups_and_for_other_hyperparameters():
    configure = lo.ConfigureOptimizers(
        "adamw",
        lr=0.1,
        schedule="my_schedule",
        param_groups=[lo.ParamGroupRule(name="head", part="head", rule="my_optimizer", schedule="my_schedule")],
        schedules={"weight_decay": "my_schedule"},
    )
    plan = make_plan(make_trainer([configure], max_epochs=1), Net(), Data(24))
    assert not plan.conflicts
    assert [(group.name, group.rule) for group in plan.groups] == [("head", "my_optimizer"), ("default", "adamw")]
    assert [curve.label for curve in plan.curves] == ["lr of group 'default'", "lr of group 'head'", "weight_decay"]
    for curve in plan.curves:
        assert curve.values(23) == pytest.approx(0.5 * curve.values(0))


@pytest.mark.parametrize("name", ["my_optimizer", "sgd"])
def test_a_group_is_updated_by_the_optimizer_it_names(name):
    model = nn.Linear(2, 2)
    rules = [lo.ParamGroupRule(name="matrices", min_ndim=2, rule=name, weight_decay=0)]
    optimizer, _ = lo.OptimizerFactory("adamw", lr=0.1, param_groups=rules).build(model)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 2), 3.0)
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full((2, 2), 0.3))  # SGD's step, not Adam's
    rules = [lo.ParamGroupRule(name="matrices", min_ndim=2, rule=name, betas=[0.9, 0.95])]
    with pytest.raises(ValueError, match=rf"sets betas=\[0.9, 0.95\], but {name} has no betas"):
        lo.OptimizerFactory("adamw", lr=0.1, param_groups=rules)
