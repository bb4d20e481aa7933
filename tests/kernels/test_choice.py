"""Which backend runs, what an impossible wish is told, and what is kept on disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from lightning_optim import kernels, optim


def test_automatic_choice_is_by_device() -> None:
    assert kernels.choose("auto", torch.device("cpu")).name == "cpu"
    assert kernels.choose("auto", torch.device("meta")).name == "reference"


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot run on meta: it updates tensors in the CPU's memory"):
        optim.AdamW([torch.ones(1, device="meta", requires_grad=True)], backend="cpu")


def test_everything_works_without_numba() -> None:
    code = """
import sys
sys.modules["numba"] = None
import torch
from lightning_optim import optim, kernels
weight = torch.ones(4, requires_grad=True)
weight.grad = torch.ones(4)
optim.AdamW([weight]).step()
print(kernels.measure([weight.grad]).tolist(), weight[0].item() < 1)
try:
    optim.AdamW([weight], backend="cpu")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "[4.0] True"
    assert "backend='cpu' cannot run on cpu: it needs a package" in done.stdout
    assert "pip install 'lightning-optim[cpu]'" in done.stdout


def test_a_large_model_without_numba_says_so_once_and_a_small_one_does_not() -> None:
    code = """
import sys, warnings
sys.modules["numba"] = None
import torch
from lightning_optim import optim
warnings.simplefilter("always")
for size in (10, 1000, 1000):
    weight = torch.ones(size, 1000, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    for backend in ("auto", "reference"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = optim.AdamW([weight], backend=backend)
            optimizer.step()
            optimizer.step()
        print(size, backend, len(caught), *[f"{one.filename} {one.message}" for one in caught])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(" ")[:3] for line in lines] == [
        ["10", "auto", "0"],
        ["10", "reference", "0"],
        ["1000", "auto", "1"],
        ["1000", "reference", "0"],
        ["1000", "auto", "0"],
        ["1000", "reference", "0"],
    ]
    assert lines[2].endswith("pip install 'lightning-optim[cpu]'")
    assert "numba" in lines[2]


TIMED = """
import time, torch
from lightning_optim.kernels.cpu.codegen import build
from lightning_optim.kernels.kernel_spec import KernelSpec
from lightning_optim.optim.adam import AdamRule
import numba
start = time.perf_counter()
kernel = build(KernelSpec(AdamRule, ("float32",) * 4))
print(len(kernel.function.dispatcher.stats.cache_hits))
"""


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TIMED], capture_output=True, text=True, check=True, env=environment
        )
        hits.append(done.stdout.strip())
    assert hits == ["0", "1"]
    assert list((tmp_path / "lightning_optim").glob("AdamRule*.nbc"))
    for file in (tmp_path / "lightning_optim").glob("*.nbc"):
        file.write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(blocked)}
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0"


def test_what_takes_long_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    from lightning_optim.kernels.cpu.disk_cache import LogIfSlow

    with caplog.at_level(logging.WARNING):
        with LogIfSlow(lambda: "quick", seconds=5.0):
            pass
        with LogIfSlow(lambda: "slow", seconds=0.01):
            time.sleep(0.2)
    assert [record.message for record in caplog.records] == ["slow"]


def test_low_precision_without_a_kernel_says_once_that_it_is_slow() -> None:
    kernels._warn_of_low_precision.cache_clear()
    slow, gpu = kernels.get_backend("reference"), torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warn_if_slow(slow, gpu, kernels.SLOW_FROM, low_precision=False)
        kernels.warn_if_slow(slow, gpu, kernels.SLOW_FROM - 1, low_precision=True)
        kernels.warn_if_slow(slow, torch.device("cpu"), kernels.SLOW_FROM, low_precision=True)
    with pytest.warns(UserWarning, match="state_bits below 32 have no kernel in the backend 'triton'"):
        kernels.warn_if_slow(slow, gpu, kernels.SLOW_FROM, low_precision=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warn_if_slow(slow, gpu, kernels.SLOW_FROM, low_precision=True)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, False), ({"state_bits": 8}, True), ({"state_bits": 16}, True)], ids=str
)
def test_what_is_low_precision_is_reported_as_such(options, expected, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(kernels, "warn_if_slow", lambda *args: seen.append(args))
    weight = torch.ones(8192, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optim.AdamW([weight], **options).step()
    assert [(numel, low) for _, _, numel, low in seen] == [(8192, expected)]
