"""Runs the tests of the Triton backend that need its interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run_interpreted(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_triton_agrees_with_reference_under_its_interpreter() -> None:
    run_interpreted("tests/kernels/interpreted.py")


def test_a_step_is_decided_as_on_the_cpu_and_a_rule_of_ones_own_runs() -> None:
    own = "tests/optim/test_own_rules.py"  # in the same process, which takes seconds to start
    chosen = "global_norm or zclip_max_norm or adagc- or fewer or ones_own"
    run_interpreted("tests/step/test_fused.py", own, "-k", f"triton and ({chosen})")


@pytest.mark.slow
def test_so_it_is_with_every_clip_rule() -> None:
    run_interpreted("tests/step/test_fused.py", "-k", "triton")


@pytest.mark.slow
def test_so_it_does_in_every_setting() -> None:
    run_interpreted("tests/kernels/interpreted.py", "-m", "slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_asked_of_backends_holds_under_the_interpreter() -> None:
    # The interpreter cuts bfloat16 off instead of rounding it; `interpreted` has that right, and tests it.
    run_interpreted("tests/optim", "-k", "triton and not low_precision", "--timeout", "900")
