"""YAML only: stock LightningCLI and ours, in the names that Python uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

import lightning_optim as lo
from lightning_optim.cli import main
from tests.helpers import BareNet, Data, Net, Recorder
from tests.schedules.cases import cosine

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}

# As in the README, with the fit's recorder at the end.
CALLBACKS = r"""
- class_path: lightning_optim.ConfigureOptimizers
  init_args:
    optimizer: {class_path: lightning_optim.optim.AdamW, init_args: {lr: 3.0e-4, betas: [0.9, 0.95], weight_decay: 0.1}}
    schedule: {class_path: lightning_optim.schedules.Cosine, init_args: {warmup: 10%, final: 0.1}}
    param_groups:
      - {name: head, pattern: "^head\\.", lr_multiplier: 10}
      - {name: no_decay, max_ndim: 1, weight_decay: 0}
- class_path: lightning_optim.GradientClipping
  init_args: {max_norm: 1.0}
- lightning_optim.DivergenceGuard
- lightning_optim.OptimizerMonitor
- tests.helpers.Recorder
"""

CONFIGURE = r"""
- class_path: lightning_optim.ConfigureOptimizers
  init_args: {optimizer: adamw, lr: 0.3, weight_decay: 0.1, schedule: cosine, warmup: 10%}
- tests.helpers.Recorder
"""


def _run(cls, model, callbacks, tmp_path, *args, command="fit", **trainer):
    config = {"trainer": {**QUIET, "callbacks": yaml.safe_load(callbacks), **trainer}, "data": {"count": 20}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return cls(model, Data, args=[command, "--config", str(path), *args], save_config_callback=None)


def _recorder(cli):
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, Recorder))


BOTH = pytest.mark.parametrize("cls", [LightningCLI, lo.OptimCLI])


@BOTH
def test_fused_adamw_with_warmup_and_cosine_uses_the_closed_form_at_every_step(cls, tmp_path):
    cli = _run(cls, Net, CALLBACKS, tmp_path)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is lo.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["head", "no_decay", "default"]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0, 0.1]
    rates = _recorder(cli).rates
    assert len(rates) == 20
    expected = [cosine(step, 20, 2, 0.1) * 3e-4 for step in range(20)]
    assert [row[2] for row in rates] == pytest.approx(expected)
    assert [row[1] for row in rates] == pytest.approx(expected)
    assert [row[0] for row in rates] == pytest.approx([10 * rate for rate in expected])
    assert rates[0][2] == pytest.approx(3e-4 / 2)


@BOTH
@pytest.mark.parametrize("quoted", [False, True])
def test_torchs_adamw_from_yaml_is_fused(cls, quoted, tmp_path):
    mapping = "{class_path: torch.optim.AdamW, init_args: {lr: 0.3, weight_decay: 0.1}}"
    changed = CONFIGURE.replace("optimizer: adamw, lr: 0.3, weight_decay: 0.1", f"optimizer: {mapping}")
    if quoted:
        changed = CONFIGURE.replace("optimizer: adamw", "optimizer: torch.optim.AdamW")
    (optimizer,) = _run(cls, Net, changed, tmp_path).trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["fused"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 0), (True, 0.1)]


@BOTH
def test_names_alone_do_the_same(cls, tmp_path):
    cli = _run(cls, Net, CONFIGURE, tmp_path)
    assert type(cli.trainer.optimizers[0]) is lo.optim.AdamW
    expected = [0.3 * cosine(step, 20, 2, 0) for step in range(20)]
    assert [row[0] for row in _recorder(cli).rates] == pytest.approx(expected)


@BOTH
def test_every_kind_of_rule_can_be_written_in_yaml(cls, tmp_path):
    rules = """[
      no_decay,
      {base_width: 4, width: 8},
      {name: head, part: head, lr_multiplier: 10, overlay: true},
      {name: body, glob: "body.*", rule: lion, betas: [0.8, 0.9], options: {cautious: true}, overlay: true}]"""
    callbacks = CONFIGURE.replace("init_args: {", f"init_args: {{param_groups: {rules}, ")
    (optimizer,) = _run(cls, Net, callbacks, tmp_path).trainer.optimizers
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {"no_decay", "body_no_decay", "head_no_decay", "head", "width_x2_body"}
    assert groups["head"]["initial_lr"] == pytest.approx(3)
    assert groups["width_x2_body"]["initial_lr"] == pytest.approx(0.15)
    assert (groups["width_x2_body"]["rule"], tuple(groups["width_x2_body"]["betas"])) == ("lion", (0.8, 0.9))
    assert groups["width_x2_body"]["cautious"]


@BOTH
def test_freezing_can_be_written_in_yaml(cls, tmp_path):
    rule = "{name: body, pattern: ^body, frozen_until: 25%, schedule: linear}"
    callbacks = CONFIGURE.replace("init_args: {", f"init_args: {{param_groups: [{rule}], ")
    cli = _run(cls, Net, callbacks, tmp_path)
    (optimizer,) = cli.trainer.optimizers
    assert optimizer.param_groups[0]["frozen_until"] == "25%"
    assert float(optimizer.state[cli.model.body.weight]["step"]) == 15
    assert float(optimizer.state[cli.model.head.weight]["step"]) == 20


@BOTH
def test_layer_decay_can_be_written_in_yaml(cls, tmp_path):
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.body: Any = torch.nn.Sequential(self.body, torch.nn.Tanh(), torch.nn.Linear(8, 8))

    callbacks = CONFIGURE.replace("init_args: {", "init_args: {param_groups: [no_decay, {layer_decay: 0.5}], ")
    (optimizer,) = _run(cls, Deep, callbacks, tmp_path).trainer.optimizers
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx(
        {
            "layer_0_no_decay": 0.075,
            "layer_1_no_decay": 0.15,
            "layer_2_no_decay": 0.3,
            "layer_0": 0.075,
            "layer_1": 0.15,
            "layer_2": 0.3,
        }
    )


def test_the_command_line_overrides_the_file(tmp_path):
    cli = _run(lo.OptimCLI, Net, CONFIGURE, tmp_path, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2")
    expected = [0.3 * cosine(step, 20, 2, 0) for step in range(20)]
    assert [row[0] for row in _recorder(cli).rates] == pytest.approx(expected)
    assert cli.trainer.global_step == 20


def test_a_module_without_configure_optimizers_runs_through_optimcli(tmp_path):
    cli = _run(lo.OptimCLI, BareNet, CONFIGURE, tmp_path)
    expected = [0.3 * cosine(step, 20, 2, 0) for step in range(20)]
    assert [row[0] for row in _recorder(cli).rates] == pytest.approx(expected)


def test_a_module_without_configure_optimizers_is_refused_by_stock_lightning_with_both_ways_out(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"(?s)lightning_optim\.attach.*OptimCLI"):
        _run(LightningCLI, BareNet, CONFIGURE, tmp_path)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("model", [Net, BareNet])
def test_the_other_commands_run(command, model, tmp_path):
    cli = _run(lo.OptimCLI, _with_steps(model), CONFIGURE, tmp_path, command=command)
    assert cli.trainer.global_step == 0


def _with_steps(model: Any):
    class Evaluated(model):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    return Evaluated


@BOTH
@pytest.mark.parametrize("model", [Net, BareNet])
def test_the_clis_own_optimizer_beside_the_callback_is_refused_and_both_are_named(cls, model, tmp_path):
    with pytest.raises(MisconfigurationException) as caught:
        _run(cls, model, CONFIGURE, tmp_path, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    assert "ConfigureOptimizers(AdamW(lr=0.3" in str(caught.value)
    assert "LightningCLI" in str(caught.value)


@BOTH
def test_the_clis_own_schedule_beside_the_callback_is_refused(cls, tmp_path):
    with pytest.raises(MisconfigurationException, match="LightningCLI"):
        _run(
            cls,
            Net,
            CONFIGURE,
            tmp_path,
            "--optimizer=torch.optim.SGD",
            "--optimizer.lr=0.1",
            "--lr_scheduler=ExponentialLR",
            "--lr_scheduler.gamma=0.9",
        )


def test_bare_names_of_torchs_optimizers_still_work_beside_ours(tmp_path):
    # In a process of its own: elsewhere the tests import published optimizers, whose names are torch's as well.
    code = (
        f"from pathlib import Path; from tests.test_cli import use_bare_names; use_bare_names(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=240)


def use_bare_names(folder: Path) -> None:
    parts = "- {class_path: lightning_optim.GradientClipping, init_args: {max_norm: 1.0}}"
    for cls in (LightningCLI, lo.OptimCLI):
        for name in ("SGD", "AdamW", "torch.optim.SGD"):
            cli = _run(cls, Net, parts, folder, f"--optimizer={name}", "--optimizer.lr=0.1")
            assert type(cli.trainer.optimizers[0]) is getattr(torch.optim, name.rpartition(".")[2])


def test_the_trainers_clipping_beside_ours_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=0\.5.*GradientClipping\(max_norm=1\.0\)"):
        _run(LightningCLI, Net, CALLBACKS, tmp_path, gradient_clip_val=0.5)


@BOTH
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("optimizer: adamw", "optimizer: admw"), "'adamw'"),
        (("schedule: cosine", "schedule: cosin"), "'cosine'"),
        (("warmup: 10%", "warmup: ten"), "'500 steps'"),
        (("lr: 0.3", "lr: -0.3"), "0.3"),
        (("lr: 0.3", "learning_rate: 0.3"), "learning_rate"),
    ],
)
def test_mistakes_in_the_configuration_are_reported_before_anything_runs(cls, change, told, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        _run(cls, Net, CONFIGURE.replace(*change), tmp_path)
    assert told in str(caught.value) + capsys.readouterr().err


def test_optimcli_prints_a_summary_after_fit(tmp_path, capsys):
    _run(lo.OptimCLI, Net, CONFIGURE, tmp_path, '--run_summary.metrics={"val_loss": "validation loss"}')
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "steps per second" in out


@pytest.mark.filterwarnings("ignore:Resumed on the old curve")
def test_the_command_runs_and_its_checkpoint_resumes(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    config = {
        "seed_everything": 0,
        "model": {"class_path": "tests.helpers.BareNet"},
        "data": {"class_path": "tests.helpers.Data", "init_args": {"count": 4}},
        "trainer": {
            **QUIET,
            "enable_checkpointing": True,
            "default_root_dir": str(tmp_path),
            "logger": True,
            "callbacks": yaml.safe_load(CALLBACKS),
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    script = Path(sys.executable).with_name("lightning-optim")
    command = ["fit", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run([script, *command], cwd=root, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "steps per second" in done.stdout
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert list(tmp_path.rglob("events.out.tfevents*"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        main([*command, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"])
    steps = [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")]
    assert max(steps) == 8


@pytest.mark.parametrize("cls", [LightningCLI, lo.OptimCLI])
@pytest.mark.parametrize(
    ("init_args", "shown"),
    [
        ({"max_norm": 0.5, "schedule": "constant"}, "GradientClipping(max_norm=0.5, schedule=Constant())"),
        ({"method": "zclip"}, "GradientClipping(ZClip(threshold=2.5, "),
        ({"method": "agc", "method_kwargs": {"exclude": ["^head"]}}, "GradientClipping(AGC(clip_factor=0.01, "),
        (
            {
                "method": {
                    "class_path": "lightning_optim.clipping.GroupNorm",
                    "init_args": {"max_norm": 1.0, "groups": {"no_decay": 0.5}},
                },
                "schedule": {"class_path": "lightning_optim.schedules.Linear", "init_args": {"final": 0.1}},
            },
            "GradientClipping(GroupNorm(max_norm=1.0, groups={'no_decay': 0.5}), schedule=Linear(",
        ),
    ],
)
def test_every_way_to_name_a_clipping_method_works_in_yaml(cls, init_args, shown, tmp_path):
    clipping = {"class_path": "lightning_optim.GradientClipping", "init_args": init_args}
    cli = _run(cls, Net, yaml.safe_dump([*yaml.safe_load(CONFIGURE), clipping]), tmp_path)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, lo.GradientClipping)]
    assert repr(callback).startswith(shown)
