"""Who runs the blocks of a kernel: one thread, torch's OpenMP threads, or a pool; nothing is lost or done twice."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim import optim

pytest.importorskip("numba")

from lightning_optim.kernels.cpu import disk_cache, openmp, threads
from lightning_optim.kernels.cpu.launch import BlockLoop, compile_loop, kernel_text, names

MANY = 10**6
"""Elements that are worth several threads."""

team_only = pytest.mark.skipif(openmp.team() is None, reason="torch's OpenMP threads are not found here")


def loop(block: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> BlockLoop:
    """A kernel with one table of sums, which is not kept on disk."""
    monkeypatch.setattr(disk_cache, "keep_on_disk", lambda dispatcher, name: None)
    text = kernel_text(("sums",), (), block.splitlines())
    return compile_loop("test", text, {"__name__": __name__, **names({"sums": "float64"}), **more}, "test")


LIBRARY = ctypes.CDLL(None)


def region(what: str) -> Any:
    """A function of torch's OpenMP library that compiled code may call."""
    function = getattr(LIBRARY, f"omp_get_{what}")
    function.argtypes, function.restype = (), ctypes.c_int
    return function


@pytest.fixture(params=["one", pytest.param("team", marks=team_only), "pool"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`run_blocks` with each kind of threads."""
    torch.set_num_threads(1 if request.param == "one" else 3)
    if request.param == "pool":
        monkeypatch.setattr(openmp, "team", lambda: None)
    return threads.run_blocks


def test_blocks_are_each_run_once(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = loop("sums[block, 0] += block + 1", monkeypatch)
    for blocks in (1, 2, 7, 100, 1001):
        sums = np.zeros((blocks, 1))
        run(kernel, blocks, MANY, sums)
        assert sums[:, 0].tolist() == list(range(1, blocks + 1))


@team_only
def test_threads_that_take_blocks_at_the_same_time_take_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "RUNS_PER_THREAD", 10**6)  # one block at a time
    torch.set_num_threads(2)
    sums = np.zeros((1_000_000, 1))
    kernel = loop("sums[block, 0] += size()", monkeypatch, size=region("num_threads"))
    (text,) = kernel.dispatcher.inspect_llvm().values()
    assert "atomicrmw add" in text  # as a busy machine may run one thread after the other
    for times in range(1, 6):
        threads.run_blocks(kernel, len(sums), MANY, sums)
        assert (sums == 2 * times).all()


def test_an_error_in_a_thread_is_raised(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda args: None)
    kernel = loop("if block == 3:\n    raise MemoryError", monkeypatch)
    team = torch.get_num_threads() > 1 and openmp.team() is not None
    with pytest.raises(MemoryError, match=r"Only \d of 10 blocks of a step were computed" if team else None):
        run(kernel, 10, MANY, np.zeros((10, 1)))
    run(kernel, 3, MANY, np.zeros((3, 1)))


@team_only
def test_as_many_threads_as_torch_at_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = loop("sums[block, 0] = size()", monkeypatch, size=region("num_threads"))

    def sizes(blocks: int, elements: int) -> list[float]:
        sums = np.zeros((blocks, 1))
        threads.run_blocks(kernel, blocks, elements, sums)
        return sorted(set(sums[:, 0]))

    for count in (2, 3, 1, 2):
        torch.set_num_threads(count)
        assert sizes(100, MANY) == [count]
    assert sizes(100, 1000) == [1], "little work needs no team"
    assert sizes(1, MANY) == [1]
    torch.set_num_threads(4)
    assert sizes(2, MANY) == [4], "a smaller team would end threads of torch's"


@team_only
def test_inside_a_parallel_region_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the user lets regions be nested."""
    kernel = loop("sums[block, 0] = level()", monkeypatch, level=region("level"))
    team = openmp.team()
    assert team is not None
    torch.set_num_threads(2)
    levels: list[float] = []

    def step() -> None:
        sums = np.zeros((10, 1))
        threads.run_blocks(kernel, 10, MANY, sums)
        levels.extend(sums[:, 0])

    step()
    assert set(levels) == {1}
    levels.clear()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: step())
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    LIBRARY.omp_set_max_active_levels(3)
    try:
        team.run(address, 0, 2)
    finally:
        LIBRARY.omp_set_max_active_levels(1)
    assert levels == [1] * 20


OF_TORCH = """
import os, threading, time
{imports}
import torch
from lightning_optim import optim
def count():
    return len(os.listdir("/proc/self/task"))
def libraries():
    with open("/proc/self/maps") as maps:
        return len({{line.split()[-1] for line in maps if "libgomp" in line}})
torch.set_num_threads(1)
weight = torch.ones(1_000_000, requires_grad=True)
weight.grad = torch.ones(1_000_000)
optimizer = optim.SGD([weight], lr=1.0)
optimizer.step()  # loads the kernel, with a timer, whose thread ends a moment later
for thread in threading.enumerate()[1:]:
    thread.join()
time.sleep(0.1)
first = count()
torch.set_num_threads(4)
weight.detach().exp()
before = count()
optimizer.step()
print(libraries(), before - first, count() - before, weight.detach().sum().item())
"""


@team_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize("imports", ["", "import sklearn.cluster", "import torch, sklearn.cluster"])
def test_the_threads_are_those_of_torch(imports: str) -> None:
    """A step starts none, although another package has brought an OpenMP library of its own, before torch or after."""
    if imports and importlib.util.find_spec("sklearn") is None:
        pytest.skip("needs scikit-learn")
    code = OF_TORCH.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["2" if imports else "1", "3", "0", "-1000000.0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_steps_in_a_forked_process() -> None:
    """A data loader's worker, say, is forked after training has begun, without the threads of its parent."""
    code = """
import os, torch
torch.set_num_threads(2)
from lightning_optim.kernels import measure
grads = [torch.ones(1_000_000)]
def ended(child):
    return os.waitpid(child, 0)[1]
assert measure(grads).item() == 1e6
child = os.fork()
if child == 0:
    first = measure(grads).item() == 1e6
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if measure(grads).item() == 1e6 else 1)
    os._exit(0 if first and ended(grandchild) == 0 else 1)
print(ended(child), measure(grads).item() == 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.parametrize("count", [1, 2])
def test_two_threads_may_step_at_once(count: int) -> None:
    torch.set_num_threads(count)
    params = [torch.ones(300_000, requires_grad=True) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizers = [optim.SGD([param], lr=0.1) for param in params]

    def work(optimizer: optim.SGD) -> None:
        for _ in range(20):
            optimizer.step()

    workers = [threading.Thread(target=work, args=(o,)) for o in optimizers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full_like(param, 1 - 2.0))
