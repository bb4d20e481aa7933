from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Processes that tests start have one thread, too: those of OpenMP spin while they wait, and where several processes
# share the cores, each waits for threads that do not run; a step was seen to take a hundred times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_optim.clipping.choice import CLIP_RULES
from lightning_optim.diagnostics import DIAGNOSTICS
from lightning_optim.divergence import DETECTORS
from lightning_optim.kernels.decay_kind import DECAY_KINDS
from lightning_optim.optim.base import OPTIMIZERS
from lightning_optim.schedules.registry import SCHEDULES

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """One seed; one thread, because the models are too small for more and the machine may be shared."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw an incident or a schedule takes longer than most of the tests in which there would be one."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("lightning_optim.callbacks._guard.reporter.can_draw", lambda: False)
        monkeypatch.setattr("lightning_optim.callbacks._monitor.page.schedule_image", lambda *args: None)


@pytest.fixture
def own_names() -> Iterator[None]:
    """Names that a test registers are forgotten at its end."""
    with contextlib.ExitStack() as stack:
        for registry in (SCHEDULES, CLIP_RULES, OPTIMIZERS, DETECTORS, DIAGNOSTICS, DECAY_KINDS):
            stack.enter_context(registry.scope())
        yield


@pytest.fixture
def logger(tmp_path) -> TensorBoardLogger:
    """Writes real event files, to be read with `tests.helpers.read_events(logger.log_dir)`."""
    return TensorBoardLogger(tmp_path, name="run", version="0")
