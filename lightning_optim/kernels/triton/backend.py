"""The Triton backend: every tensor of a batch in one launch, on CUDA and ROCm devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import Backend, Batch
from lightning_optim.kernels.compiled import DTYPES, ElementwiseSteps, KernelArgs, measure_args, split
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.triton.codegen import OPTIONS, THREADS, build, build_measure
from lightning_optim.kernels.triton.functions import add_blocks, add_squares


class TritonBackend(Backend):
    """One launch, one pass over memory for elementwise rules: divide, update, write and sum.

    A second, small launch adds block sums where a pass takes any. The host waits for nothing.
    """

    name = "triton"
    reads_skip = True

    def __init__(self) -> None:
        self._elementwise = ElementwiseSteps(run)

    def why_not(self, device: torch.device) -> str | None:
        """It needs a device that Triton has a compiler for, and what Triton needs to launch on it."""
        if triton.knobs.runtime.interpret:
            return (
                None if device.type == "cpu" else "TRITON_INTERPRET is set, and the interpreter runs on the CPU only."
            )
        if device.type != "cuda":
            return "it runs on CUDA and ROCm devices; on the CPU only under Triton's interpreter (TRITON_INTERPRET=1)."
        if not torch.cuda.is_available():
            return "torch finds no CUDA device."
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton needs compute capability 8.0 (Ampere) or later."
        return _driver_problem()

    def supports(self, batch: Batch) -> bool:
        """Elementwise rules over dtypes that kernels have loads and stores for."""
        return self._elementwise.supports(batch)

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """See `Backend`."""
        args, kept = measure_args(grads)
        with _current(args.device):
            kernel = build_measure(DTYPES[kept[0].dtype], _aligned(args))
            zero = _flag(None, args.device)
            return _run(kernel, args, zero, zero, squares=True)[:, 0]

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """See `Backend`."""
        with _current(batch.device):
            return self._elementwise.sums(batch, divisor)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """See `Backend`."""
        with _current(batch.device):
            return self._elementwise.apply(batch, divisor=divisor, skip=skip, collect=collect)


def run(
    spec: KernelSpec, args: KernelArgs, columns: Mapping[str, Tensor], skip: Tensor | None
) -> tuple[tuple[str, ...], Tensor]:
    """See `compiled.Run`."""
    kernel = build(spec, _aligned(args))
    return kernel.sums, _run(kernel, args, kernel.table(columns, args.dtype), _flag(skip, args.device))


def launch(function: Any, programs: int, device: torch.device, *arguments: Any) -> None:
    """Run ``programs`` instances of a jit function on the current device."""
    function[(programs,)](*arguments, num_warps=THREADS // _threads_per_warp(device), **OPTIONS)


@lru_cache(maxsize=16)
def _threads_per_warp(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


def _run(kernel: Kernel, args: KernelArgs, scalars: Tensor, skip: Tensor, squares: bool = False) -> Tensor:
    """Launch over all blocks, and add each tensor's block sums: [tensors, sums], float64; of ``squares``, one."""
    device = args.device
    tensors, width = len(args.numel), len(kernel.sums)
    blocks, offsets = _block_table(args.numel, device, _stream(device))
    sums = torch.empty(len(blocks), width, dtype=args.dtype, device=device)
    totals = torch.empty(tensors, 1 if squares else width, dtype=torch.float64, device=device)
    if len(blocks):
        addresses = _address_table(args.addresses.tobytes(), device, _stream(device))
        launch(kernel.function, len(blocks), device, blocks, addresses, scalars, skip, sums)
    if squares:
        launch(add_squares, tensors, device, sums, offsets, totals)
    elif width:
        launch(add_blocks, tensors, device, sums, offsets, totals, width)
    return totals


@lru_cache(maxsize=64)
def _address_table(addresses: bytes, device: torch.device, stream: int) -> Tensor:
    """Addresses on the device; uploaded again only if one of them has changed.

    Per stream, because memory freed on one stream may be handed out again on it while another still reads.
    """
    return upload(np.frombuffer(addresses, dtype=np.int64), device)


@lru_cache(maxsize=64)
def _block_table(numel: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Blocks [blocks, 3], and the first block of each tensor [tensors + 1], on the device."""
    # A program sets up once and then streams: long enough to make up for that, short enough to keep all cores busy to
    # the end. Very large batches take longer ones, so that there are fewer sums to add.
    blocks = split(numel, 4096 if sum(numel) < 2**28 else 16384)
    offsets = np.searchsorted(blocks[:, 0], np.arange(len(numel) + 1))
    return upload(blocks, device), upload(offsets.astype(np.int64), device)


def _aligned(args: KernelArgs) -> bool:
    return not (args.addresses % 16).any()


def _flag(skip: Tensor | None, device: torch.device) -> Tensor:
    """A float32 to read in the kernel: non-zero means skip."""
    if skip is None:
        return _zero(device, _stream(device))
    return skip if skip.dtype == torch.float32 else (skip != 0).float()


@lru_cache(maxsize=16)
def _zero(device: torch.device, stream: int) -> Tensor:
    return torch.zeros((), device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=1)
def _driver_problem() -> str | None:
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no C compiler, no Python headers, no driver library: Triton raises whatever it meets
        return f"Triton cannot launch kernels here: {error}"
    return None
