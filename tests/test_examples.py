"""The examples run, a few steps each."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from lightning_optim.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
BRIEF = ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """In a folder of its own, where runs leave their files, from which the examples can be imported."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES.parent), str(EXAMPLES), *sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "brief"),
    [
        ("char_lm", ["--trainer.max_steps=3"]),
        ("digits", ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2"]),
        ("gan", ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2"]),
    ],
)
def test_configurations_run(name, brief, elsewhere, capsys):
    main(["fit", "--config", str(EXAMPLES / f"{name}.yaml"), *BRIEF, *brief])
    out = capsys.readouterr().out
    assert "steps per second" in out
    assert "tensorboard --logdir" in out
    assert list(elsewhere.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("name", ["callbacks", "fabric", "plain_torch"])
def test_scripts_run(name, elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "3"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_an_optimizer_of_ones_own_is_looked_at_and_trained(elsewhere, monkeypatch, capsys, own_names):
    monkeypatch.setattr(sys, "argv", ["own_optimizer", "1"])
    runpy.run_path(str(EXAMPLES / "own_optimizer.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "11 of 11 tensors moved, and was put back" in out
    assert float(out.split("accuracy ")[1]) > 0.5  # 0.8 after one epoch, 0.1 without training


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric_recognises_digits(precision, elsewhere):
    assert runpy.run_path(str(EXAMPLES / "fabric.py"))["main"](precision=precision) > 0.97


@pytest.mark.slow
def test_digits_reach_their_accuracy(elsewhere, capsys):
    main(["fit", "--config", str(EXAMPLES / "digits.yaml"), "--trainer.enable_progress_bar=false"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert float(line.split("│")[2]) > 0.97


@pytest.mark.slow
def test_the_generator_learns_to_draw(elsewhere, capsys):
    main(["fit", "--config", str(EXAMPLES / "gan.yaml"), "--trainer.enable_progress_bar=false"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "energy distance" in line]
    assert float(line.split("│")[2]) < 1.5  # 3.5 before training


def test_modules_of_the_examples_do_not_know_us():
    for name in ("char_lm", "digits", "gan"):
        source = (EXAMPLES / f"{name}.py").read_text()
        assert "import lightning_optim" not in source
        assert "from lightning_optim" not in source
        assert yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["trainer"]["callbacks"]
