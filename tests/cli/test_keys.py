"""The keys optim, clip, guard and monitor: every hyperparameter from the command line, whatever form the file has."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_optim as lo
from lightning_optim.cli import OptimKeys
from tests.helpers import Data, Net

BASE = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "max_epochs": 1,
}

NAMES = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args: {optimizer: adamw, lr: 3.0e-4, schedule: cosine, warmup: 5%}
- class_path: lightning_optim.GradientClipping
  init_args: {max_norm: 1.0}
- class_path: lightning_optim.DivergenceGuard
  init_args: {cooldown: 7, spikes: {threshold: 6, window: 64}}
- lightning_optim.OptimizerMonitor
"""
CLASSES = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args:
    optimizer: {class_path: lightning_optim.optim.AdamW, init_args: {lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1}}
    schedule: {class_path: lightning_optim.schedules.Cosine, init_args: {warmup: 5%, final: 0.1}}
    param_groups:
      - {name: head, pattern: ^head, lr_multiplier: 10}
- class_path: lightning_optim.GradientClipping
  init_args: {method: {class_path: lightning_optim.clipping.GlobalNorm, init_args: {max_norm: 1.0}}}
"""
TORCH = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args: {optimizer: torch.optim.SGD, lr: 0.1, optimizer_kwargs: {momentum: 0.9}}
"""
SEVERAL = """
- class_path: lightning_optim.ConfigureOptimizers
  init_args:
    optimizers:
      - {name: body, part: body, optimizer: adam, lr: 2.0e-3, betas: [0.5, 0.999], schedule: linear}
      - {name: head, part: head, optimizer: adam, lr: 5.0e-4, schedule: linear}
- class_path: lightning_optim.GradientClipping
  init_args: {max_norm: {body: 1.0, head: 1.0}}
"""


class Mine(OptimKeys, LightningCLI):
    pass


def _cli(tmp_path, callbacks, *flags, cls=Mine, keys=None, more=None):
    """A CLI that has made its objects and not run."""
    config = {"trainer": {**BASE, "callbacks": yaml.safe_load(callbacks) if callbacks else None}, **(keys or {})}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    files = ["--config", str(tmp_path / "run.yaml")]
    if more is not None:
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
        files += ["--config", str(tmp_path / "more.yaml")]
    return cls(Net, Data, run=False, args=[*files, *flags], save_config_callback=None)


def _one(cli, cls):
    (found,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, cls)]
    return found


def _settings(cli):
    return _one(cli, lo.ConfigureOptimizers).settings


@pytest.mark.parametrize("cls", [Mine, lo.OptimCLI])
@pytest.mark.parametrize("callbacks", [NAMES, CLASSES, TORCH, None], ids=["names", "classes", "torch", "none"])
def test_a_flag_sets_the_rate_of_every_documented_form(cls, callbacks, tmp_path):
    cli = _cli(tmp_path, callbacks, "--optim.lr=1e-3", cls=cls)
    (optimizer,) = [_one(cli, lo.ConfigureOptimizers).build(cli.model, lo.Horizon(total_steps=100))[0]]
    assert optimizer.param_groups[-1]["lr"] <= 1e-3
    assert optimizer.param_groups[-1]["initial_lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("callbacks", "flags", "shown"),
    [
        (NAMES, ["--optim.optimizer.betas", "[0.8, 0.9]"], "betas=[0.8, 0.9]"),
        (NAMES, ["--optim.optimizer.eps=1e-6"], "eps=1e-06"),
        (NAMES, ["--optim.schedule.final", "0.2"], "Cosine(warmup='5%', final=0.2)"),
        (NAMES, ["--optim.schedule", "linear", "--optim.schedule.final=0.2"], "Linear(warmup='5%', final=0.2)"),
        (NAMES, ["--optim.schedule=wsd"], "WSD(warmup='5%'"),
        (NAMES, ["--optim.warmup=10"], "Cosine(warmup=10"),
        (CLASSES, ["--optim.optimizer.betas=[0.8, 0.9]"], "'betas': (0.8, 0.9)"),
        (CLASSES, ["--optim.optimizer.init_args.eps=1e-6"], "'eps': 1e-06"),
        (CLASSES, ["--optim.weight_decay", "0.2"], "'weight_decay': 0.2"),
        (CLASSES, ["--optim.warmup", "10%"], "Cosine(warmup='10%', final=0.1)"),
        (CLASSES, ["--optim.schedule.init_args.final", "0.5"], "final=0.5"),
        (CLASSES, ["--optim.schedule", "linear"], "Linear(warmup='5%')"),
        (TORCH, ["--optim.optimizer.momentum=0.5"], "momentum=0.5"),
        (TORCH, ["--optim.optimizer_kwargs.nesterov=true"], "nesterov=True"),
    ],
)
def test_flags_reach_into_optimizer_and_schedule(callbacks, flags, shown, tmp_path):
    callback = _one(_cli(tmp_path, callbacks, *flags), lo.ConfigureOptimizers)
    assert shown in f"{callback!r} {callback.schedule!r} {callback.settings}"


@pytest.mark.filterwarnings("ignore:lr=")
def test_flags_reach_the_optimizers_of_parts_and_groups_by_name(tmp_path):
    cli = _cli(tmp_path, SEVERAL, "--optim.optimizers.head.lr=0.1", "--optim.optimizers.body.betas=[0.6, 0.9]",
               "--clip.max_norm.head=0.5")  # fmt: skip
    settings = _settings(cli)
    assert settings["head/lr"] == pytest.approx(0.1)
    assert settings["body/lr"] == pytest.approx(2e-3)
    assert _one(cli, lo.GradientClipping).rules["head"].max_norm == 0.5
    cli = _cli(tmp_path, CLASSES, "--optim.param_groups.head.lr_multiplier=3")
    optimizer, _ = _one(cli, lo.ConfigureOptimizers).build(cli.model, lo.Horizon(total_steps=100))
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(9e-4)


def test_flags_of_clipping_guard_and_monitor(tmp_path):
    flags = [
        "--clip.max_norm=0.5",
        "--guard.patience",
        "3",
        "--guard.spikes.threshold=8",
        "--monitor.progress_bar=false",
    ]
    cli = _cli(tmp_path, NAMES, *flags)
    assert _one(cli, lo.GradientClipping).rule.max_norm == 0.5
    guard = _one(cli, lo.DivergenceGuard)
    assert (guard._patience, guard._cooldown) == (3, 7)
    assert (guard.spikes.threshold, guard.spikes.window) == (8, 64)
    assert _one(cli, lo.OptimizerMonitor).progress_bar is False
    cli = _cli(tmp_path, CLASSES, "--clip.method.max_norm=0.25", "--monitor", "true")
    assert _one(cli, lo.GradientClipping).rule.max_norm == 0.25
    assert _one(cli, lo.OptimizerMonitor)


def test_keys_in_yaml_are_the_callbacks(tmp_path):
    keys = {"optim": {"optimizer": "lion", "lr": 1e-4, "schedule": "linear"}, "clip": {"max_norm": 2.0}, "guard": {}}
    cli = _cli(tmp_path, None, keys={**keys, "monitor": True})
    assert _settings(cli)["lr"] == pytest.approx(1e-4)
    assert _one(cli, lo.GradientClipping).rule.max_norm == 2
    assert _one(cli, lo.DivergenceGuard)
    assert _one(cli, lo.OptimizerMonitor)


def test_without_keys_there_are_no_callbacks(tmp_path):
    cli = _cli(tmp_path, None)
    assert not [c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_optim.callbacks.")]


def test_false_takes_a_callback_out(tmp_path):
    cli = _cli(tmp_path, NAMES, "--guard", "false", "--monitor=false")
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert "DivergenceGuard" not in names
    assert "OptimizerMonitor" not in names
    assert "GradientClipping" in names


def test_two_owners_in_one_file_are_refused_and_a_later_file_changes_the_list(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _cli(tmp_path, NAMES, keys={"optim": {"lr": 0.1}}, cls=lo.OptimCLI)
    error = capsys.readouterr().err
    assert "Two owners of one role: the key `optim`" in error
    assert "lightning_optim.ConfigureOptimizers under trainer.callbacks" in error
    assert "--optim.lr" in error
    cli = _cli(tmp_path, NAMES, more={"optim": {"lr": 0.1}, "guard": {"patience": 3}})
    assert _settings(cli)["lr"] == pytest.approx(0.1)
    assert _one(cli, lo.DivergenceGuard)._patience == 3
    cli = _cli(tmp_path, None, "--optim.lr=0.2", keys={"optim": {"lr": 0.1, "optimizer": "lion"}})
    assert _settings(cli)["lr"] == pytest.approx(0.2)
    assert "Lion" in repr(_one(cli, lo.ConfigureOptimizers))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--optim.schedule.fnal=0.1"], "'final'"),
        (["--optim.optimizer.beta=0.9"], "betas"),
        (["--optim.optimizers.gen.lr=0.1"], "optimizers"),
        (["--optim.param_groups.haed.lr=0.1"], "param_groups"),
        (["--guard.spikes.treshold=3"], "threshold"),
        (["--optim.learning_rate=3"], "--optim.lr"),
        (["--optim.lr=-1"], "Invalid lr=-1"),
        (["--guard=maybe"], "guard"),
    ],
)
def test_a_wrong_flag_is_refused_by_its_name(flags, told, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        _cli(tmp_path, NAMES, *flags, cls=lo.OptimCLI)
    assert told in str(caught.value) + capsys.readouterr().err


def test_what_is_printed_and_saved_runs_again_and_has_the_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _cli(tmp_path, NAMES, "--optim.lr=0.125", "--print_config", cls=lo.OptimCLI)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert "optim" not in printed
    assert printed["trainer"]["callbacks"][0]["init_args"]["lr"] == 0.125
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    args = ["--config", str(tmp_path / "again.yaml")]
    cli = LightningCLI(Net, Data, run=False, args=_stock(tmp_path, args), save_config_callback=None)
    assert _settings(cli)["lr"] == 0.125


def _stock(tmp_path, args):
    """The same without the key that only OptimCLI has."""
    path = tmp_path / "again.yaml"
    config = yaml.safe_load(path.read_text())
    config.pop("run_summary", None)
    path.write_text(yaml.safe_dump(config))
    return args


def test_the_help_shows_every_argument_with_its_default(capsys):
    with pytest.raises(SystemExit):
        Mine(Net, Data, args=["fit", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr LR Peak learning rate of the groups without a multiplier, above 0." in out
    assert "which bring their own. (default: null) (type: float | null)" in out
    for flag in ("--optim.schedule", "--clip.max_norm", "--guard.patience", "--monitor.progress_bar"):
        assert flag in out
    assert "SUPPRESS" not in out
