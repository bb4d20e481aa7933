"""The path of a warm step through files stays as short as docs/architecture.md has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks.hops import CASES

pytest.importorskip("numba")

TABLE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("title", [title for title in CASES if "Lightning" not in title])
def test_a_warm_step_takes_no_more_hops_than_the_table_says(title: str) -> None:
    row = re.search(rf"^\| {re.escape(title)} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", TABLE, re.MULTILINE)
    assert row is not None
    trace = CASES[title]()
    # Later versions of Python enter no frame for a comprehension.
    assert 0 < len(trace.calls) <= int(row[1])
    assert 0 < trace.hops() <= int(row[4])
