"""Every code block of the README and the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_optim as lo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[Any]:
    """Every fenced block of a language, with the page and line it is on; ``notest REASON`` after it leaves it out."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            name, _, rest = match["info"].strip().partition(" ")
            if name != language or rest.startswith("notest"):
                assert rest != "notest", f"{page}: say why this block is not tested"
                continue
            body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
            where = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
            found.append(pytest.param(body, id=where))
    return found


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize("code", _blocks("python"))
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("text", _blocks("yaml"))
def test_yaml_is_accepted_by_the_command_line(text, tmp_path, monkeypatch):
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or "trainer" not in config:
        pytest.skip("not a run's configuration")
    model = [] if "model" in config else ["--model=tests.helpers.Net"]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    monkeypatch.chdir(ROOT)  # as the examples' class paths want it

    class Stops(lo.OptimCLI):
        def _run_subcommand(self, subcommand):
            raise _Parsed

    with pytest.raises(_Parsed):
        Stops(args=["fit", "--config", str(path), *model, "--trainer.accelerator=cpu", "--trainer.logger=false"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target
