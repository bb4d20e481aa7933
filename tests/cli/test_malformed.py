"""Every mistake in a configuration ends in a few lines that name it, and in no traceback."""

from __future__ import annotations

import sys

import pytest

from lightning_optim.cli import main
from tests.cli.malformed import CHANGES, GOOD, WHOLE


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a command line on a file; return the exit code, and what is on stderr from the error on."""

    def run(content, command="plan", *flags):
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr("sys.path", sys.path[:])
        try:
            main([command, "--config", str(path), *flags])
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        out, err = capfd.readouterr()
        return code, out, err.replace(str(path), "run.yaml")

    return run


def _check(result, told):
    code, out, err = result
    assert code
    assert "Traceback" not in err
    lines = err[err.index("error:") :].strip().splitlines() if "error:" in err else []
    if not lines:  # The plan was made, and lists what stands against it.
        assert "conflict" in out
        assert told in out
        return
    assert len(lines) <= 6, err
    assert all(len(line) < 500 for line in lines)
    assert told in "\n".join(lines)


# A quarter of them by default, spread over all kinds; `make test-all` runs them all.
SPREAD = [pytest.param(name, marks=[pytest.mark.slow] if index % 4 else []) for index, name in enumerate(CHANGES)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", SPREAD)
def test_a_mistake_is_told_in_a_few_lines(mistake, run):
    before, after, told = CHANGES[mistake]
    assert before in GOOD
    _check(run(GOOD.replace(before, after, 1)), told)


@pytest.mark.parametrize("mistake", WHOLE)
def test_a_file_that_is_no_configuration_is_told_in_a_few_lines(mistake, run):
    content, told = WHOLE[mistake]
    _check(run(content), told)


def test_the_number_of_mistakes_and_that_the_file_without_any_is_accepted(run):
    assert len(CHANGES) + len(WHOLE) >= 125
    code, out, err = run(GOOD)
    assert (code, "No conflicts." in out) == (0, True), err
