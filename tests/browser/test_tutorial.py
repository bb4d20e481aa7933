"""The tutorial in full, and what one sees. With SCREENSHOTS=docs/images it renews its pictures."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.browser.chromium import EXECUTABLE, Chromium
from tests.browser.tensorboard import tensorboard
from tests.pages import TUTORIAL, follow

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]


def test_the_tutorial_shows_what_its_pictures_show(tmp_path, monkeypatch):
    folder, pictures = tmp_path / "project", Path(os.environ.get("SCREENSHOTS", tmp_path)).resolve()
    folder.mkdir()
    monkeypatch.chdir(folder)
    browser = Chromium(tmp_path / "profile", width=1300, height=900)
    try:
        for command, _ in follow(TUTORIAL, folder, ["--trainer.enable_progress_bar=false"]):
            if command[0] == "tensorboard":
                with tensorboard(folder / command[2], "digits") as url:
                    browser.emulate(1300, 900)
                    browser.open(f"{url}/?darkMode=false#custom_scalars")
                    browser.wait_for("loss: training and validation", "learning rate", "gradient norm")
                    time.sleep(3)  # lines are drawn after their titles
                    browser.screenshot(pictures / "tutorial_tensorboard.png")
            elif command[1] == "report":
                browser.emulate(1300, 1150)
                browser.open((folder / "report" / "report.html").as_uri())
                seen = browser.wait_for("lr_3e-4", "lr_1e-3", "lr_3e-3", "lr_1e-2", "val_acc")
                time.sleep(2)
                browser.screenshot(pictures / "tutorial_report.png")
                browser.emulate(1300, 900)
                browser.evaluate("document.querySelector('section.charts').scrollIntoView()")
                time.sleep(2)
                browser.screenshot(pictures / "tutorial_charts.png")
        assert "best" in seen
    finally:
        browser.close()
