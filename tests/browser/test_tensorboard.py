"""A real TensorBoard in a real browser. With SCREENSHOTS=docs/images it renews the pictures of the documentation."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lightning_optim as lo
from lightning_optim.diagnostics import Histograms, PerTensor
from tests.browser.chromium import EXECUTABLE, Chromium
from tests.browser.tensorboard import tensorboard
from tests.helpers import Net, batches, make_trainer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium: apt-get install chromium"),
]


class Deep(Net):
    """Tanh in its first layers, sigmoids in its last, through which gradients vanish; a bad batch."""

    def __init__(self):
        super().__init__(nan_batches=[150])
        del self.norm, self.head
        sizes = [8] + [16] * 6
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.body(x)
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if number < 3 else torch.sigmoid(layer(x))
        return self.head(x)


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
        lo.DivergenceGuard(report_dir=str(folder / "guard")),
        lo.OptimizerMonitor(per_tensor=PerTensor(worst=5, every=100), histograms=Histograms(every=20)),
    ]
    logger = TensorBoardLogger(folder, name="run", version="0")
    with pytest.warns(UserWarning, match="Step 75 skipped"):
        make_trainer(parts, logger=logger, accumulate_grad_batches=2).fit(Deep(), batches(400, batch_size=8))
    with tensorboard(folder, "run") as url:
        yield url


def _save(browser: Chromium, name: str, tmp_path: Path) -> None:
    time.sleep(3)  # lines are drawn after their titles
    path = Path(os.environ.get("SCREENSHOTS", tmp_path)) / name
    browser.screenshot(path)
    assert path.stat().st_size > 30_000  # an empty page is far smaller


def test_the_screen_of_charts(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#custom_scalars")
    browser.wait_for("loss: training and validation", "learning rate", "gradient norm", "update over parameters")
    _save(browser, "tensorboard_screen.png", tmp_path)


def test_the_sections_of_scalars(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#timeseries")
    browser.wait_for("optim_grad", "optim_grad_norm")
    _save(browser, "tensorboard_scalars.png", tmp_path)


def test_tables_and_alarms(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#text")
    browser.wait_for("optim/groups", "optim/configuration", "optim/alarms", "optim/tensors", "no_decay")
    _save(browser, "tensorboard_text.png", tmp_path)


def test_images_of_tensors_over_time(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#images")
    browser.wait_for("optim/schedule", "optim/tensors/update_ratio", "optim/tensors/grad_norm")
    _save(browser, "tensorboard_images.png", tmp_path)
    listed = f"{address}/data/plugin/images/images?tag=optim/tensors/grad_norm&run=run/0&sample=0"
    query = json.load(urllib.request.urlopen(listed))[-1]["query"]
    picture = urllib.request.urlopen(f"{address}/data/plugin/images/individualImage?{query}").read()
    (Path(os.environ.get("SCREENSHOTS", tmp_path)) / "heat_map.png").write_bytes(picture)


def test_histograms_of_magnitudes(address, browser, tmp_path):
    browser.open(f"{address}/?darkMode=false#histograms")
    browser.wait_for("optim_grad/histogram/default", "optim_grad/histogram/head")
    _save(browser, "tensorboard_histograms.png", tmp_path)
