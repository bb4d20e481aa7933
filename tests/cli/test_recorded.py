"""What the documentation shows of the command line is what it prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_optim import __version__
from lightning_optim.cli import main
from lightning_optim.cli.listing import KINDS, Entry
from lightning_optim.cli.optim_cli import _COMMANDS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "command_line.md"
SHOWN = re.compile(r"```console\n\$ lightning-optim ([^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)


def run(args, capfd):
    """The exit code, and what is on stdout, or on stderr from the error on."""
    code = 0
    try:
        main(args)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capfd.readouterr()
    return code, err[err.index("error:") :] if code else out


@pytest.mark.parametrize(("command", "shown"), SHOWN.findall(PAGE.read_text()), ids=lambda text: text[:60])
def test_the_documentation_shows_what_is_printed(command, shown, tmp_path, monkeypatch, capfd):
    (wrong,) = re.findall(r"```{\.yaml data-notest[^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(wrong)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    _, printed = run(shlex.split(command), capfd)
    assert printed.split() == shown.split()
    assert "error" not in shown or len(shown.splitlines()) <= 6


def test_every_command_has_one_line_in_the_help(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    _, out = run(["--help"], capfd)
    for command in _COMMANDS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"    {command} ")]
        assert len(line) <= 80
        assert not re.search(rf"^    {command} .*\n {{24}}\S", out, re.MULTILINE)


def test_version(capfd):
    assert run(["--version"], capfd) == (0, f"lightning-optim {__version__}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_fits_into_80_columns_and_says_what_each_is_for(kind, capfd):
    code, out = run(["list", kind], capfd)
    assert code == 0
    assert all(len(line) <= 80 or "://" in line for line in out.splitlines())
    assert "\x1b" not in out
    entries = KINDS[kind][0]()
    assert len(entries) == len({entry.name for entry in entries}) > 3
    assert all(entry.use for entry in entries)
    assert [line for line in out.splitlines() if line and line[0] != " "] == [entry.name for entry in entries]
    assert run([kind], capfd) == (0, out)


def test_optimizers_have_rates_state_and_paper():
    for entry in KINDS["optimizers"][0]():
        assert re.match(r"lr [\d.e-]+ \(usual [\d.e-]+ to [\d.e-]+\)", entry.facts[0]), entry
        assert entry.facts[1].startswith("state ")
        assert entry.paper.startswith("https://")


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["optimizers", "muon"], ["muon", "normuon"]),
        (["optimizers", "AdaM*"], ["adam", "adamw"]),
        (["weight-decay", "l2"], ["l2", "l2_sp"]),
        (["weight_decay", "L2"], ["l2", "l2_sp"]),
        (["schedules", "cosine-restarts"], ["cosine_restarts"]),
        (["recipes", "gpt_muon"], ["gpt-muon"]),
    ],
)
def test_a_pattern_selects(args, names, capfd):
    _, out = run(["list", *args], capfd)
    assert [line for line in out.splitlines() if line and line[0] != " "] == names


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["list", "optimisers"], "'optimizers'"),
        (["list", "optimizers", "adamx"], "'adam'"),
        (["fti"], "'fit'"),
        ([], "--help"),
        (["fit"], "No model"),
        (["fit", "run.yaml"], "run.yaml"),
        (["plan", "--config"], "--config"),
        (["fit", "--model", "tests.helpers.Nett"], "Nett"),
        (["fit", "--model", "tests.helpers.Net", "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["fit", "--model", "tests.helpers.Net", "--max_epochs", "3"], "--trainer.max_epochs"),
        (["fit", "--model", "tests.helpers.Net", "--trainer.callback", "3"], "--trainer.callbacks"),
        (["report", "nowhere"], "nowhere"),
        (["recipe", "nme"], "recipe"),
        (["completion", "fish"], "fish"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_few_lines(args, told, capfd, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    code, err = run(args, capfd)
    assert code
    assert told in err
    assert len(err.splitlines()) <= 6


def test_entries_of_users_need_no_facts():
    assert Entry("mine").format(80) == "mine"


def test_debug_shows_the_traceback(tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text("model: tests.helpers.Net\noptim: {lr: -1}\n")
    with pytest.raises(ValueError, match="Invalid lr=-1"):
        main(["plan", "--config", str(config), "--debug"])
    code, err = run(["plan", "--config", str(config)], capfd)
    assert code == 1
    assert re.search(r"run.yaml, line 2, optim.lr: Invalid lr=-1", err)


def test_an_error_of_the_users_own_module_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(
        "import lightning as L\nclass Broken(L.LightningModule):\n"
        "    def __init__(self):\n        super().__init__()\n        raise ValueError('mine')\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match="mine"):
        main(["fit", "--model", "own_module.Broken"])


def test_without_the_extra_one_line_says_what_to_install():
    code = "import sys; sys.modules['jsonargparse'] = None; from lightning_optim.cli import main; main(sys.argv[1:])"

    def started(*args):
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=100)

    fit = started("fit")
    assert fit.returncode == 1
    assert fit.stderr == "The command line needs jsonargparse and rich: pip install 'lightning-optim[cli]'\n"
    listed = started("list", "optimizers", "lion")
    assert (listed.returncode, listed.stdout[:4]) == (0, "lion")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--model", "examples.digits.DigitsNet", "--model.widht", "3"],
            "--model.widht: examples.digits.DigitsNet takes no 'widht'. Did you mean 'width'?",
        ),
        (
            ["--model=examples.digits.DigitsNet", "--model.init_args.widht=3"],
            "--model.init_args.widht: examples.digits.DigitsNet takes no 'widht'. Did you mean 'width'?",
        ),
        (
            ["--model", "examples.digits.DigitNet"],
            "--model: examples.digits has no 'DigitNet'. Did you mean 'DigitsNet'?",
        ),
        (
            ["--data", "examples.digits.DigitsNet"],
            "--data: examples.digits.DigitsNet is no LightningDataModule.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_a_wrong_class_or_argument_of_it_in_a_flag_is_named(flags, expected, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(ROOT)
    code, printed = run(["fit", "--config", "examples/digits.yaml", *flags], capfd)
    assert (code, printed) == (2, f"error: {expected}\n")
