"""The command `check`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_optim.cli import main


class Needs(torch.optim.SGD):
    """A class with arguments that have no default."""

    def __init__(self, params, lr, total):
        super().__init__(params, lr)


def made(params):
    """Make an optimizer."""
    return torch.optim.SGD(params, lr=0.1)


ONLY = ["--only", "closures", "--only", "maximize"]


def test_a_class_that_passes(capsys):
    main(["check", "tests.testing.correct.Correct", "--lr", "0.1", "--betas=[0.8, 0.9]", *ONLY])
    assert "Correct: 5 checks passed, 0 failed, 0 skipped" in capsys.readouterr().out


def test_a_class_that_fails(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "tests.testing.defects_of_steps.IgnoresMaximize", *ONLY])
    assert ended.value.code == 1
    assert "FAILED maximize" in capsys.readouterr().out


def test_a_name_of_ours_and_a_flag(capsys):
    main(["check", "adamw", "--weight-decay", "0.3", "--cautious", "--only", "closure_loss"])
    assert "AdamW: 1 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["torch.optim.AdmW"], "Did you mean 'AdamW'"),
        (["no_such_package.AdamW"], "no module 'no_such_package'"),
        (["admw"], "Did you mean 'adamw'"),
        (["torch.optim.AdamW", "--learningrate", "1"], "has no argument 'learningrate'"),
        (["torch.optim.AdamW", "--weight_decai", "1"], "Did you mean 'weight_decay'"),
        (["torch.optim.AdamW", "--only", "maximise"], "Did you mean 'maximize'"),
        (["torch.optim.AdamW", "0.1"], "--lr 0.1"),
        (["torch.optim.AdamW", "--betas", "0.9", "0.99"], "--betas '(0.9, 0.99)'"),
        (["torch.optimm.AdamW"], "Did you mean 'optim'"),
        (["lightningoptim.optim.AdamW"], "Did you mean 'lightning_optim'"),
        ([".AdamW"], "must be an import path"),
        (["torch/optim.py"], "must be an import path"),
        (["my_module"], "as my_package.MyOptimizer"),
        (["tests.nothing"], "It has no classes"),
        (["torch.optim.AdamW", "--lr", "--only", "closures"], "Invalid --lr: needs a value"),
        (["torch.optim.AdamW", "--device", "cudaa"], "Invalid device='cudaa'"),
        (["torch.optim.AdamW", "--only", "maximize", "--skip", "descent"], "no check is left"),
        (["tests.cli.test_check.Needs"], "--lr VALUE --total VALUE"),
        (["tests.cli.test_check.Needs", "--lr", "1"], "it needs total as well"),
        (["tests.cli.test_check.Needs", "--lrr", "1"], "Did you mean 'lr'"),
        (["tests.cli.test_check.made", "--lr", "1"], "It takes parameters alone"),
    ],
)
def test_a_wrong_command_line(args, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *args])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) <= 6


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("raise RuntimeError('of its own')", "raises RuntimeError: of its own (broken_module.py, line 1)"),
        ("import no_such_package", "raises ModuleNotFoundError: No module named 'no_such_package' (broken_module.py"),
        ("def f(:", "raises SyntaxError: invalid syntax (broken_module.py, line 1)"),
        ("raise SystemExit(9)", "raises SystemExit: 9 (broken_module.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported(content, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["check", "broken_module.Mine"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_path_with_a_colon_as_in_entry_points(capsys):
    main(["check", "tests.cli.test_check:made", "--only", "closure_loss"])
    assert "made: 1 checks passed" in capsys.readouterr().out


def test_the_list_of_checks(capsys):
    main(["check", "--list"])
    out = capsys.readouterr().out
    assert "maximize (descent): `maximize=True` does" in out
    assert "ddp (distributed):" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_module_of_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    code = "from lightning_optim.cli import main; main(['check', 'mine.Mine', '--only', 'closures'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Mine: 4 checks passed" in done.stdout


def test_without_the_checks_of_the_pipeline_it_loads_torch_alone():
    code = (
        "import sys; from lightning_optim.cli import main; "
        "main(['check', 'torch.optim.SGD', '--skip', 'compile', '--skip', 'pipeline']); "
        "print([n for n in ('lightning', 'pytorch_lightning', 'numba', 'jsonargparse') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
