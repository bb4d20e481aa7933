"""The command `inspect`, on examples and on modules that nobody has prepared for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_optim.cli import main

ROOT = Path(__file__).parents[2]

MODULES = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Own(L.LightningModule):
    def __init__(self, first_label: int = 0, width: int = 3):
        super().__init__()
        self.layer, self.first_label = nn.Linear(4, width), first_label

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1] + self.first_label)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), 16)


class Manual(Own):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Broken(Own):
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0][:, :2])
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    (tmp_path / "own_modules.py").write_text(MODULES)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    sys.modules.pop("own_modules", None)

    def command(*args):
        code = 0
        try:
            main(["inspect", *args, "--trainer.accelerator=cpu", "--trainer.logger=false"])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err[err.index("error:") :] if "error:" in err else ""

    return command


def test_an_example_has_no_finding_and_a_picture(run):
    code, out, _ = run("--config", "examples/digits.yaml", "--png", "it.png", "--batches", "2")
    assert code == 0
    assert out.endswith("Nothing stands against training.\n")
    assert out.startswith("Batches: 2 of 64")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert Path("it.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in Path().iterdir()) == ["examples", "it.png", "own_modules.py"]


@pytest.mark.parametrize("name", ["Own", "Manual"])
def test_a_module_of_ones_own_without_an_optimizer(run, name):
    code, out, _ = run("--model", f"own_modules.{name}")
    assert (code, "Nothing stands against training." in out) == (0, True)
    assert "chance gives 1.099" in out


def test_findings_do_not_change_the_exit_code(run):
    code, out, _ = run("--model", "own_modules.Own", "--model.width", "3", "--trainer.precision", "bf16-mixed")
    assert code == 0
    code, out, _ = run("--model", "own_modules.Own", "--model.first_label", "-1")
    assert code == 1  # the batch cannot be run
    assert "target-range" in out
    assert "targets from -1 to 1 for 3 classes" in out


def test_a_batch_that_raises_shows_where(run):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run("--model", "own_modules.Broken")


@pytest.mark.parametrize(
    ("flags", "told"), [(("--batches", "0"), "batches=0"), (("--batchs", "1"), "--batches"), (("--png",), "png")]
)
def test_a_wrong_flag_is_told_in_a_few_lines(run, flags, told):
    code, _, err = run("--model", "own_modules.Own", *flags)
    assert code
    assert told in err
    assert len(err.splitlines()) <= 6
