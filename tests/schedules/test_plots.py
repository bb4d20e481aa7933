"""The plots in the documentation are what the code draws, and every schedule has one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lightning_optim.schedules import list_schedules
from lightning_optim.schedules.registry import _ALIASES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def plots():
    spec = importlib.util.spec_from_file_location("schedule_plots", DOCS / "schedule_plots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list_schedules())
def test_the_plot_is_the_codes(plots, name):
    assert (plots.FOLDER / f"{name}.svg").read_text() == plots.svg(plots.example(name))


def test_every_schedule_is_on_the_page_and_no_other():
    page = (DOCS / "concepts" / "schedules.md").read_text()
    assert re.findall(r"images/schedules/(\w+)\.svg", page) == list_schedules()
    assert {path.stem for path in (DOCS / "images" / "schedules").glob("*.svg")} == set(list_schedules())


def test_every_name_of_others_is_in_the_migration_table():
    page = (DOCS / "migration.md").read_text()
    assert all(f"`{alias}`" in page for alias in _ALIASES)
