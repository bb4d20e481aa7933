"""Tutorial and how-to pages are followed, command by command, with few batches; slowly, in full."""

from __future__ import annotations

import re

import pytest

from lightning_optim.cli import main
from lightning_optim.cli.search import check_space, read_space
from tests.pages import (
    DOCS,
    FOLLOWED,
    as_shell,
    blocks_of,
    commands_of,
    follow,
    importable,
    without_numbers,
    write_files,
)

BRIEF = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
OF_A_PAGE = {"pretrain.md": ["--trainer.max_steps=3"]}
"""Further flags."""
LONG = {"batch_size", "choose", "resume_extend", "search", "sweeps", "tune", "vision"}
"""Pages of many runs, or long ones; without `slow` their runs are planned only."""


pytestmark = pytest.mark.usefixtures("own_names")  # pages register classes


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def _follow(page, folder, capfd, brief, most=None):
    """What each command has printed, as far as the page shows it, is what it prints; numbers of a fit aside."""
    done = []
    for command, shown in follow(page, folder, brief, most):
        out = capfd.readouterr().out
        done.append((as_shell(command), out))
        if shown is None:
            continue
        if command[1] == "fit" or command[0] == "python":
            lines = [without_numbers(line) for line in out.splitlines()]
            for line in filter(None, shown.splitlines()):
                assert without_numbers(line) in lines, f"{page.name}: {line!r} is not what {command} prints:\n{out}"
        else:
            assert out.split() == shown.split(), f"{page.name}: {command}"
    return done


BRIEFLY = [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in FOLLOWED]


@pytest.mark.parametrize("page", BRIEFLY)
def test_each_command_of_a_page_runs(page, in_folder, capfd, monkeypatch):
    monkeypatch.setattr("lightning_optim.diagnostics.run_report.pictures.can_draw", lambda: False)  # takes seconds
    assert _follow(page, in_folder, capfd, [*BRIEF, *OF_A_PAGE.get(page.name, ())], most=1)


@pytest.mark.parametrize("page", [page for page in FOLLOWED if page.stem in LONG], ids=lambda page: page.stem)
def test_each_configuration_of_a_long_page_has_a_plan(page, in_folder, capfd):
    write_files(in_folder)
    shells = [block for block in blocks_of(page) if block.language in ("console", "bash")]
    commands = [each for block in shells if not block.options for each in commands_of(block, in_folder)]
    fits = [each for each in commands if each[1] in ("batch-size", "compare", "find-lr", "fit", "search")]
    files = {tuple(each[2 : each.index(flag)]) for each in fits if (flag := _flag(each))}
    files = {each for each in files if all((in_folder / name).exists() for name in each[1::2])}  # else found by a trial
    assert files
    with importable(in_folder):
        for configs in files:
            main(["plan", *configs])
            assert "No conflicts." in capfd.readouterr().out


def test_each_search_of_a_page_has_a_space_that_its_run_accepts(in_folder):
    write_files(in_folder)
    searched = []
    for page in FOLLOWED:
        for block in blocks_of(page):
            if block.language not in ("console", "bash") or block.options:
                continue
            for command in commands_of(block, in_folder):
                if command[1] == "search":
                    of_fit, space = command[2 : command.index("--space")], command[command.index("--space") + 1]
                    searched.append(space)
                    with importable(in_folder):
                        check_space(read_space(space, of_fit), of_fit)
    assert searched == ["space.yaml", "optimizers.yaml"]


def _flag(command):
    """The first flag of a command behind its configuration files."""
    return next((each for each in command[2:] if each.startswith("--") and each != "--config"), None)


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_every_file_of_a_page_is_used_by_a_command(page):
    text = page.read_text()
    for block in blocks_of(page):
        assert block.language in ("python", "yaml", "console", "bash", "text"), f"{page.name}:{block.line}"
        assert block.language != "yaml" or block.title, f"{page.name}:{block.line}: it is the file of no command"
        if block.title is not None:
            stem = block.title.removesuffix(".py")
            used = rf"(--config|--space|--variants|python) {re.escape(block.title)}\b|\b{stem}\.[A-Z]"
            assert re.search(used, text), f"{page.name}: {block.title}"
    assert page.relative_to(DOCS).as_posix() in (DOCS.parent / "mkdocs.yml").read_text()


def test_files_of_all_pages_have_names_of_their_own():
    titles = [block.title for page in FOLLOWED for block in blocks_of(page) if block.title is not None]
    assert sorted(titles) == sorted(set(titles))


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")  # guard and monitor may have something to say
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_in_full_a_page_keeps_what_it_says(page, in_folder, capfd):
    done = _follow(page, in_folder, capfd, ["--trainer.enable_progress_bar=false"])
    accuracies = [float(found) for _, out in done for found in re.findall(r"val_acc +│ ([\d.]+)", out)]
    assert all(accuracy > 0.9 for accuracy in accuracies), accuracies
