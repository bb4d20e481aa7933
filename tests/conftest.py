from __future__ import annotations

import logging
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """One seed; one thread, because the models are too small for more and the machine may be shared."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def logger(tmp_path) -> TensorBoardLogger:
    """Writes real event files, to be read with `tests.helpers.read_events(logger.log_dir)`."""
    return TensorBoardLogger(tmp_path, name="run", version="0")
