"""The page of a report in a real browser. With SCREENSHOTS=docs/images it renews its picture in the documentation."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lightning_optim.diagnostics.run_report import Run, write_report
from tests.browser.chromium import EXECUTABLE

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]

NAME = "</script><script>window.ran = true</script>"


def _run(name, speed):
    steps = range(0, 500, 5)
    scalars = {
        "optim_loss/mean": [(step, 2 / (1 + speed * step), step / 10) for step in steps],
        "val_loss": [(step, 2.2 / (1 + speed * step) + step * 1e-4, step / 10) for step in steps],
        "val_acc": [(step, 1 - 1 / (1 + speed * step), step / 10) for step in steps],
        "optim_health/skipped_steps": [(step, float(step > 200), step / 10) for step in steps],
    }
    return Run(name, scalars, settings={"optim/lr": str(speed), "optim/optimizer": "AdamW"})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report([_run("slow", 0.01), _run(NAME, 0.03), _run("fast", 0.1)], tmp_path_factory.mktemp("report"))


def test_charts_are_drawn_toggled_and_read_without_any_request(page, browser, tmp_path):
    browser.watch_requests()
    browser.emulate(1400, 1000)
    browser.open(page.as_uri())
    browser.until("typeof figures === 'function' && figures().length === 2")
    visible = "figures()[0].renderers.filter((each) => each.visible && each.tags[1] === 0).length"
    before = browser.until(visible)
    browser.evaluate("document.querySelector('button.run').click()")
    assert (before > 2, browser.evaluate(visible)) == (True, 0)
    browser.evaluate("document.querySelector('button.run').click()")
    sorted_rows = """document.querySelector('table.sorts th:nth-child(2)').click(),
        [...document.querySelector('table.sorts tbody').rows].map((row) => parseInt(row.cells[1].textContent))"""
    steps = browser.evaluate(sorted_rows)
    assert steps == sorted(steps)
    assert browser.evaluate("window.ran") is None
    assert [url for url in browser.requested if not url.startswith("data:")] == [page.as_uri()]
    name = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "report.png"
    browser.screenshot(name)


def test_a_curve_is_read_by_moving_over_it(page, browser):
    browser.emulate(1400, 1000)
    browser.open(page.as_uri())
    browser.until("typeof figures === 'function' && figures().length === 2")
    browser.evaluate("document.querySelector('article').scrollIntoView()")
    time.sleep(1)
    box = json.loads(browser.evaluate("JSON.stringify(document.querySelector('article').getBoundingClientRect())"))
    for y in range(int(box["top"]) + 90, int(box["bottom"]) - 60, 3):
        browser.move(box["left"] + box["width"] / 2, y)
        if "step 2" in browser.text():
            return
    pytest.fail("no tooltip on the way from top to bottom")


def test_dark_and_narrow_it_is_as_wide_as_the_window(page, browser):
    browser.emulate(400, 900, dark=True)
    browser.open(page.as_uri())
    browser.until("typeof figures === 'function' && figures().length === 2")
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    assert 380 < browser.evaluate(f"{root}.clientWidth") <= 400
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    browser.until("figures()[0].below[0].major_label_text_color === '#98a3b0'")
