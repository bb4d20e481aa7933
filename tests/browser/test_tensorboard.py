"""A real TensorBoard in a real browser. With SCREENSHOTS=docs/images it renews the pictures of the documentation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo
from tests.browser.chromium import EXECUTABLE, Chromium
from tests.helpers import Net, batches, make_trainer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A TensorBoard server of a run with everything in it."""
    folder = tmp_path_factory.mktemp("runs")
    parts = [
        lo.ConfigureOptimizers(
            "adamw",
            lr=0.01,
            weight_decay=0.2,
            param_groups=[lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10), "no_decay"],
            schedule="cosine",
            warmup="10%",
        ),
        lo.GradientClipping(0.8),
        lo.OptimizerMonitor(),
    ]
    logger = TensorBoardLogger(folder, name="run", version="0")
    model = Net(nan_batches=[150])
    make_trainer(parts, logger=logger, accumulate_grad_batches=2).fit(model, batches(400, batch_size=8))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", ".", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                runs = urllib.request.urlopen(f"{url}/data/runs").read()
            except OSError:
                runs = b""
            if b"run" in runs:
                break
            time.sleep(0.5)
        else:
            pytest.fail("TensorBoard does not answer")
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def browser(tmp_path):
    chromium = Chromium(tmp_path)
    yield chromium
    chromium.close()


def _save(browser: Chromium, name: str, tmp_path: Path) -> None:
    time.sleep(3)  # lines are drawn after their titles
    path = Path(os.environ.get("SCREENSHOTS", tmp_path)) / name
    browser.screenshot(path)
    assert path.stat().st_size > 30_000  # an empty page is far smaller


def test_the_screen_of_charts(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#custom_scalars")
    browser.wait_for("loss: mean and max", "learning rate", "gradient norm", "update over parameters")
    _save(browser, "tensorboard_screen.png", tmp_path)


def test_the_sections_of_scalars(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#timeseries")
    browser.wait_for("optim_grad", "optim_grad_norm")
    _save(browser, "tensorboard_scalars.png", tmp_path)


def test_tables_and_alarms(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#text")
    browser.wait_for("optim/groups", "optim/configuration", "optim/alarms", "no_decay")
    _save(browser, "tensorboard_text.png", tmp_path)
