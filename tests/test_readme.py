"""Every code block of the README and the documentation runs."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import yaml

import lightning_optim as lo
from tests.pages import FENCE, FOLLOWED, PAGES, ROOT, blocks_of


def _blocks(language: str) -> list[Any]:
    """Every block of a language that is no file of `test_followed_pages`; ``data-notest="REASON"`` leaves one out."""
    found = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language != language or "notest" in block.options:
                continue
            if block.title is None or page not in FOLLOWED:
                found.append(pytest.param(block.body, id=f"{page.relative_to(ROOT)}:{block.line}"))
    return found


def test_every_fence_is_one_for_the_documentation_too():
    known = re.compile(r"\w*|\w+( title=\"[^\"]+\")|\{\.\w+ data-notest=\"[^\"]+\"\}")
    for page in (page for page in PAGES if page.is_relative_to(ROOT / "docs")):
        for fence in FENCE.finditer(page.read_text()):
            assert known.fullmatch(fence["info"].strip()), f"{page}: {fence['info']} would be shown as text"


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


ROOMS = [
    "callbacks",
    "clipping",
    "diagnostics",
    "divergence",
    "factory",
    "kernels",
    "optim",
    "param_groups",
    "schedules",
    "step",
]


@pytest.mark.parametrize("package", ["lightning_optim", *(f"lightning_optim.{room}" for room in ROOMS)])
def test_every_public_name_has_a_place_in_the_reference(package):
    pages = (page for folder in ("reference", "internals") for page in (ROOT / "docs" / folder).glob("*.md"))
    text = "".join(page.read_text() for page in pages)
    shown = dict(re.findall(r"^::: (\S+)\n((?: +\S.*\n)*)", text, re.MULTILINE))
    whole = tuple(f"{name}." for name, options in shown.items() if not re.search(r"\bmembers: false", options))
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        thing = getattr(module, name)
        called = getattr(thing, "__qualname__", name)  # a former name leads to the present one
        places = {f"{where}.{called}" for where in ("lightning_optim", package, getattr(thing, "__module__", package))}
        assert places & set(shown) or any(place.startswith(whole) for place in places), f"{package}.{name}"


def test_on_a_package_index_every_link_of_the_readme_has_a_whole_address(monkeypatch):
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # of the build's environment, not of the tests'
    vars(sys.modules["hatchling.metadata.plugin.interface"])["MetadataHookInterface"] = object
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)

    text = (ROOT / "README.md").read_text()
    hook = hatch_build.ReadmeHook()
    hook.root = str(ROOT)
    metadata = {"urls": {"Repository": "https://example.org/it/"}}
    hook.update(metadata)
    shown = metadata["readme"]["text"]
    before, after = (re.findall(r"\]\(([^)]*)\)", each) for each in (text, shown))
    relative = [target for target in before if not target.startswith("https://")]
    assert relative
    assert len(after) == len(before)
    assert all(target.startswith("https://") for target in after)
    assert all((ROOT / target).exists() for target in relative)
    assert (
        "![The TensorBoard page of the demo run](https://example.org/it/raw/main/docs/images/tensorboard.png)" in shown
    )
    hook.update(without := {})
    assert without["readme"]["text"] == text


def test_every_figure_of_cost_in_the_readme_is_one_of_the_benchmarks():
    section = re.search(r"^## What it costs\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [row for row in section.splitlines() if row.startswith("| `")]
    assert rows
    for row in rows:
        command, *figures = re.findall(r"`tests\.([^`]*)`|\b(\d\.\d\d)\b", row)
        assert figures, row
        assert command[0].split()[-1] in measured, row
        for _, figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured), row
