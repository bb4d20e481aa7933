"""The page about the checks."""

from __future__ import annotations

import re

import lightning_optim
from tests.benchmarks.conformance import PAGE, checks_table


def test_the_table_of_checks_is_the_registry():
    page = PAGE.read_text()
    found = page.split("<!-- checks -->\n")[1].split("<!-- end of checks -->")[0]
    assert found.strip() == checks_table()


def test_the_table_of_results_has_all_of_ours_and_names_checks_that_there_are():
    page = PAGE.read_text()
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (\d+) \| (.*) \|$", page.split("<!-- results -->")[1], re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert {n.rpartition(".")[2].lower() for n in names if n.startswith("lightning_optim.")} == set(
        lightning_optim.optim.list_optimizers()
    )
    assert len([n for n in names if not n.startswith(("lightning_optim.", "torch."))]) >= 40
    known = {check.name for check in lightning_optim.testing.checks()} | {"plain_step"}
    assert {name for _, _, failed in rows for name in re.findall(r"`(\w+)`", failed)} <= known
