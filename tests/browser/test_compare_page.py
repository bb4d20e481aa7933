"""The page of a comparison in a real browser. With SCREENSHOTS=docs/images it renews its picture in the docs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_optim.tuning.compare.metric import Metric
from lightning_optim.tuning.compare.outcome import Comparison
from lightning_optim.tuning.compare.page import write_comparison
from lightning_optim.tuning.compare.rates import Trial, TunedRate
from lightning_optim.tuning.runs import JobResult
from lightning_optim.tuning.runs.records import CURVE_FILE, VALIDATION_FILE
from tests.browser.chromium import EXECUTABLE

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]

SPEEDS = {"slow": 0.01, "fast": 0.03, "<b>odd</b>": 0.02}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    results = {
        name: {seed: _result(root / f"{number}" / f"{seed}", speed, seed) for seed in range(3)}
        for number, (name, speed) in enumerate(SPEEDS.items())
    }
    trials = [
        Trial(0.3, 50, 1.2, "finished"),
        Trial(1.0, 50, float("inf"), "diverged"),
        Trial(0.3, 100, 1.0, "finished"),
    ]
    rates = {name: TunedRate(0.3, trials) for name in SPEEDS}
    settings = dict.fromkeys(SPEEDS, "optim: {lr: 0.1}")
    found = Comparison(results, Metric("val_loss"), settings, rates, "200 steps for each run; 3 seeds", root)
    return write_comparison(found)


def _result(folder: Path, speed: float, seed: int) -> JobResult:
    folder.mkdir(parents=True)
    steps = range(1, 201)
    level = 1 + seed / 20

    def loss(step: int) -> float:
        return 2 * level / (1 + speed * step)

    lines = [f"{step},{step * speed},{loss(step)}\n" for step in steps]
    (folder / CURVE_FILE).write_text("step,seconds,train_loss\n" + "".join(lines))
    looks = [
        {"step": s, "seconds": s * speed, "epoch": 0, "metrics": {"val_loss": loss(s) + 0.1}} for s in steps[19::20]
    ]
    (folder / VALIDATION_FILE).write_text("".join(json.dumps(look) + "\n" for look in looks))
    facts = {"weights": f"{seed}", "batches": [f"{seed}"], "lr": {"all": speed}}
    return JobResult(
        "", str(folder), "finished", steps=200, seconds=200 * speed, ms_per_step=speed * 1000, train_loss=loss(195),
        metrics={"val_loss": loss(200) + 0.1}, state_bytes=4096, facts=facts,
    )  # fmt: skip


def test_curves_with_their_spread_are_drawn_and_toggled_without_any_request(page, browser, tmp_path):
    browser.watch_requests()
    browser.emulate(1400, 1000)
    browser.open(page.as_uri())
    browser.until("typeof figures === 'function' && figures().length === 4")
    seen = browser.text()
    for text in (
        "fast has the lowest val_loss",
        "more than noise",
        "own tuned rate",
        "<b>odd</b>",
        "(checked)",
        "4.1 kB",
    ):
        assert text in seen
    # Of each variant a line and a band, in each chart.
    visible = "figures()[0].renderers.filter((each) => each.visible && each.tags[1] === 0).length"
    before = browser.until(visible)
    browser.evaluate("document.querySelector('button.run').click()")
    assert (before >= 2, browser.evaluate(visible)) == (True, 0)
    browser.evaluate("document.querySelector('button.run').click()")
    axes = "figures().map((each) => each.below[0].axis_label).join()"
    assert browser.evaluate(axes) == "step,seconds,step,seconds"
    # Charts of one axis are zoomed together, those of the other axis not.
    assert browser.evaluate("figures()[0].x_range.end === figures()[2].x_range.end") is True
    assert browser.evaluate("figures()[0].x_range.end > 4 * figures()[1].x_range.end") is True
    assert [url for url in browser.requested if not url.startswith("data:")] == [page.as_uri()]
    name = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "compare.png"
    browser.screenshot(name)


def test_narrow_it_is_as_wide_as_the_window(page, browser):
    browser.emulate(400, 900, dark=True)
    browser.open(page.as_uri())
    browser.until("typeof figures === 'function' && figures().length === 4")
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
