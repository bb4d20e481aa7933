"""The Triton backend: all tensors of a batch in one launch, on CUDA and ROCm devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import Backend, Batch, arithmetic_dtype
from lightning_optim.kernels.compiled import DTYPES, ElementwiseSteps, KernelArgs, measure_args, split
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.sizes import Sizes
from lightning_optim.kernels.triton.codegen import build, build_measure
from lightning_optim.kernels.triton.functions import add_blocks, add_squares
from lightning_optim.kernels.triton.launch import address_table, current_device, flag, launch, stream_of
from lightning_optim.kernels.triton.scalars import DeviceColumns, device_scalars


class TritonBackend(Backend):
    """Backend with one launch and one pass over memory for elementwise rules: divide, update, write and sum.

    If the pass computes sums, a second, small launch adds the block sums. The host never waits for the device.
    """

    name = "triton"
    reads_skip = True
    takes_addresses = True

    @property
    def watch(self) -> Any:
        """See `Backend`; it is that of the CPU backend, where numba is installed, because the host does the looking."""
        return _watch()

    def __init__(self) -> None:
        self._elementwise = ElementwiseSteps(run, device_scalars)

    def why_not(self, device: torch.device) -> str | None:
        """Implement `Backend`: it needs a device for which Triton can compile and launch kernels."""
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
        """Implement `Backend`: it runs elementwise rules over dtypes that kernels support."""
        return self._elementwise.supports(batch)

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Implement `Backend`."""
        args, kept = measure_args(grads)
        return _measure(args, kept[0].dtype)

    def measure_at(
        self, addresses: npt.NDArray[np.int64], sizes: Sizes, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Implement `Backend`."""
        return _measure(KernelArgs(device, arithmetic_dtype(dtype), sizes, addresses[:, None]), dtype)

    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Implement `Backend`."""
        with current_device(batch.device):
            return self._elementwise.sums(batch, divisor)

    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Implement `Backend`."""
        with current_device(batch.device):
            return self._elementwise.apply(batch, divisor=divisor, skip=skip, collect=collect)


@lru_cache(maxsize=1)
def _watch() -> Any:
    try:
        from lightning_optim.kernels.cpu.objects import Watch
    except ImportError:
        return None
    return Watch


def _measure(args: KernelArgs, dtype: torch.dtype) -> Tensor:
    with current_device(args.device):
        zero = flag(None, args.device)
        return _run(build_measure(DTYPES[dtype], _aligned(args)), args, zero, zero, squares=True)[:, 0]


def run(
    spec: KernelSpec, args: KernelArgs, columns: Mapping[str, Tensor], skip: Tensor | None
) -> tuple[tuple[str, ...], Tensor]:
    """Implement `compiled.Run`."""
    kernel = build(spec, _aligned(args))
    if isinstance(columns, DeviceColumns):
        table = columns.table(kernel.scalars, args.dtype)
    else:
        table = kernel.table(columns, args.dtype)
    return kernel.sums, _run(kernel, args, table, flag(skip, args.device))


def _run(kernel: Kernel, args: KernelArgs, scalars: Tensor, skip: Tensor, squares: bool = False) -> Tensor:
    """Launch over all blocks and add the block sums of each tensor.

    Returns:
        The sums, float64, [tensors, sums]; with ``squares``, [tensors, 1].
    """
    device = args.device
    tensors, width = len(args.numel), len(kernel.sums)
    blocks, offsets = _block_table(args.numel, device, stream_of(device))
    sums = torch.empty(len(blocks), width, dtype=args.dtype, device=device)
    totals = torch.empty(tensors, 1 if squares else width, dtype=torch.float64, device=device)
    if len(blocks):
        addresses = address_table(args.addresses.tobytes(), device, stream_of(device))
        launch(kernel.function, len(blocks), device, blocks, addresses, scalars, skip, sums)
    if squares:
        launch(add_squares, tensors, device, sums, offsets, totals)
    elif width:
        launch(add_blocks, tensors, device, sums, offsets, totals, width)
    return totals


@lru_cache(maxsize=64)
def _block_table(numel: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Return blocks, int64, [blocks, 3], and the first block of each tensor, int64, [tensors + 1], on the device."""
    # A block must be long enough to amortise the setup of its program, and short enough to keep all cores busy to the
    # end. Very large batches use longer blocks, so that there are fewer sums to add.
    blocks = split(numel, 4096 if sum(numel) < 2**28 else 16384)
    offsets = np.searchsorted(blocks[:, 0], np.arange(len(numel) + 1))
    return upload(blocks, device), upload(offsets.astype(np.int64), device)


def _aligned(args: KernelArgs) -> bool:
    return not (args.addresses % 16).any()


@lru_cache(maxsize=1)
def _driver_problem() -> str | None:
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Triton raises errors of many types: no C compiler, headers or driver.
        return f"Triton cannot launch kernels here: {error}"
    return None
