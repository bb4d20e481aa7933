"""What the reference shows beyond docstrings: facts of the optimizers, all arguments, nothing of third parties."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import griffe
import pytest

import lightning_optim as lo
from lightning_optim.cli import listing

DOCS = Path(__file__).parents[1] / "docs"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


optimizer_facts = _module("optimizer_facts")
no_third_parties = _module("no_third_parties")
NAMES = list(optimizer_facts.classes())


def test_the_table_of_optimizers_says_what_list_says():
    page = optimizer_facts.on_page_markdown((DOCS / "reference" / "optim.md").read_text(), page=None)
    listed = {entry.name: entry for entry in listing.optimizers()}
    rows = [row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith("| [`")]
    assert [row[0].split("`")[1] for row in rows] == NAMES
    for (_, use, default, usual, state, *sizes), name in zip(rows, NAMES, strict=True):
        assert listed[name].use == use
        low = [f"{size} in {bits} bits" for bits, size in zip((16, 8), sizes[1:], strict=True) if size != "-"]
        size = ", ".join([f"{sizes[0]} bytes per parameter", *low])
        lr = f"lr {default}" + (f" (usual {usual})" if usual != "-" else "")
        assert listed[name].facts == (lr, f"state {state}", size)


def test_a_page_without_the_marker_is_left_alone():
    assert optimizer_facts.on_page_markdown("# Schedules\n", page=None) == "# Schedules\n"


@pytest.mark.parametrize("name", ["lion", "muon", "rmsprop"])
def test_each_optimizer_shows_its_facts_below_its_first_line(name):
    cls = optimizer_facts.classes()[name]
    extensions = griffe.load_extensions(str(DOCS / "optimizer_facts.py"))
    path = Path(inspect.getfile(cls))
    module = griffe.visit(cls.__module__, filepath=path, code=path.read_text(), extensions=extensions)
    shown = module[cls.__name__].docstring.value
    first = inspect.getdoc(cls).partition("\n\n")[0]
    assert shown.startswith(f"{first}\n\n")
    use, head, rule, row, *_ = re.split(r"\n+", shown.removeprefix(first).lstrip())
    assert cls.when_to_use in use
    assert head.count("|") == rule.count("|") == row.count("|")
    assert cls.memory in row
    assert cls.paper in row
    assert f"| {inspect.signature(cls).parameters['lr'].default:g} |" in row


def _arguments(thing: type) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.getdoc(thing), re.M)[1]
    entries = re.findall(r"^    (\w+): ((?:.*\n)(?:     .*\n)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def test_the_callback_describes_the_arguments_of_the_factory_in_full():
    factory, callback = _arguments(lo.OptimizerFactory), _arguments(lo.ConfigureOptimizers)
    assert list(callback) == [*factory, "optimizers"]
    for name, text in factory.items():
        assert callback[name].startswith(text)


@pytest.mark.parametrize(
    "html",
    [
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
        '<script src="//cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>',
        '<img alt="" src="http://example.org/badge.svg">',
        "<style>@import url('https://fonts.example.org/a.css')</style>",
        '<pre class="mermaid"><code>graph LR</code></pre>',
    ],
)
def test_what_loads_from_another_server_is_found(html):
    assert no_third_parties.loads_from_elsewhere(f"<p>before</p>{html}<p>after</p>")


def test_links_to_follow_and_local_files_are_fine():
    assert not no_third_parties.loads_from_elsewhere(
        '<link rel="canonical" href="https://example.org/"><link href="../assets/a.css" rel="stylesheet">'
        '<a href="https://arxiv.org/abs/1711.05101">paper</a><img src="../images/tensorboard.png">'
    )
