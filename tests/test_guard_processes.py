"""The guard on two ranks, and in a process that is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.guard_script import BAD, CASES, SPIKE
from tests.helpers import bit_equal

ROOT = Path(__file__).parents[1]


def _start(what: str, folder: Path) -> subprocess.Popen[str]:
    ignored = ("SLURM", "PL_", "LOCAL_RANK", "MASTER_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ignored)}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "guard_script.py", what, folder],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    process = _start("ranks", folder)
    try:
        _, errors = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize(("name", "accumulate"), CASES)
def test_ranks_of_which_one_is_bad_decide_alike_and_roll_back_together(folder, name, accumulate):
    first, second = (torch.load(folder / f"{name}-{accumulate}-rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["told"] == second["told"]
    assert first["skipped"] == second["skipped"] == 6
    assert bit_equal(first["weights"], second["weights"])
    assert all(tensor.isfinite().all() for tensor in first["weights"].values())
    kinds = [(step, kind) for step, kind, _ in first["told"]]
    assert kinds == [(SPIKE, "spike"), *((step, "nonfinite") for step in BAD), (BAD[-1], "did")]
    assert first["told"][-1][2].startswith("back to the state after step")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = _start("survivor", whole)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    chance = random.Random(kills)
    for _ in range(kills):
        process = _start("survivor", killed)
        for _ in range(chance.randint(1, 60 // kills)):
            if not process.stdout.readline():
                break
        time.sleep(0.05 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
    process = _start("survivor", killed)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    expected, found = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed))
    assert expected["skipped"] == 5
    assert bit_equal(expected, found)
