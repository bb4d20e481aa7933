"""Backends, which run a rule over many tensors; the module of each is imported only when it is chosen."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype
from lightning_optim.core.placements import PLAIN, added_up
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.suggest import nearest
from lightning_optim.core.transfer import upload
from lightning_optim.core.user_frame import depth_outside
from lightning_optim.kernels import plain
from lightning_optim.kernels.base import Backend, Batch

_DTYPE, _DEVICE = map(operator.attrgetter, ("dtype", "device"))

logger = logging.getLogger(__name__)

__all__ = ["Backend", "Batch", "choose", "get_backend", "measure"]

NAMES = ("reference", "cpu", "triton")
AUTOMATIC = {
    "cpu": "cpu",
    "cuda": "triton",
}
"""Backend by device type; `reference` for other devices, and where the backend named here cannot run."""


@cache
def get_backend(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        ImportError: The backend needs a package that is not installed.
        ValueError: No backend has that name; the message suggests the nearest one.
    """
    if name == "reference":
        from lightning_optim.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from lightning_optim.kernels.cpu.backend import CpuBackend

        return CpuBackend()
    if name == "triton":
        from lightning_optim.kernels.triton.backend import TritonBackend

        return TritonBackend()
    raise ValueError(f"Invalid backend={name!r}: must be the name of a backend. {nearest(name, ('auto', *NAMES))}")


def why_not(name: str, device: torch.device) -> str | None:
    """Return the reason why backend ``name`` cannot run on ``device``, as a clause; None if it can."""
    try:
        return get_backend(name).why_not(device)
    except ImportError as error:
        return f"it needs a package that cannot be imported: {error}. Try `pip install 'lightning-optim[{name}]'`."


def choose(name: str, device: torch.device) -> Backend:
    """Return the backend for tensors on ``device``.

    Args:
        name: Name of a backend, or `auto` for the fastest one that can run on ``device``.
        device: Device of the parameters.

    Raises:
        ValueError: The named backend does not exist, or cannot run on ``device``; the message gives the reason.
    """
    if name == "auto":
        return _automatic(device.type)
    if name not in NAMES:
        get_backend(name)
    reason = why_not(name, device)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run on {device}: {reason}")
    return get_backend(name)


SLOW_FROM = 1_000_000
"""Number of elements from which the time of the step is felt, where it runs in torch's operations."""


def warn_if_slow(backend: Backend, device: torch.device, numel: int, low_precision: bool) -> None:
    """Warn, once in a process, that a large model is updated slowly: a package is missing, or there is no kernel.

    Args:
        backend: The backend that was chosen for the parameters on ``device``.
        device: Their device.
        numel: Their number of elements.
        low_precision: Whether parameters or state are stored with fewer bits than they are computed with.
    """
    if numel >= SLOW_FROM and backend.name == "reference" and (wanted := AUTOMATIC.get(device.type)) is not None:
        _warn_of_missing(wanted)
        if low_precision:
            _warn_of_low_precision(wanted)


@cache
def _warn_of_missing(name: str) -> None:
    try:
        get_backend(name)
    except ImportError as error:
        warnings.warn(
            "The optimizer runs in plain torch operations, several times slower than its kernel would, because of a "
            f"package that cannot be imported: {error}. Install it: pip install 'lightning-optim[{name}]'",
            stacklevel=depth_outside(),
        )


@cache
def _warn_of_low_precision(name: str) -> None:
    with suppress(ImportError):
        if not get_backend(name).low_precision:
            warnings.warn(
                f"kahan_sum, stochastic_rounding and state_bits below 32 have no kernel in the backend {name!r}, which "
                "this device has. Parameters with them are updated in plain torch operations, many times slower.",
                stacklevel=depth_outside(),
            )


@cache
def _automatic(device_type: str) -> Backend:
    name = AUTOMATIC.get(device_type, "reference")
    reason = why_not(name, torch.device(device_type))
    if reason is not None:
        logger.info(
            "On %s the backend is the slower 'reference', because '%s' cannot run: %s", device_type, name, reason
        )
    return get_backend("reference" if reason else name)


def measure(grads: Sequence[Tensor]) -> Tensor:
    """Compute the square sum of each gradient, in one read and without host synchronisation.

    Accepts the gradients of any optimizer: strided or sparse, real or complex, DTensors (the sum is over all shards),
    and several dtypes and devices at once.

    Args:
        grads: Gradients of any shapes.

    Returns:
        Square sums, shape [tensors], on the device of the first gradient. The dtype is float64 where the device
        supports it (float32 on MPS), because the square of a float32 can overflow float32. An entry is not finite
        exactly where its gradient is not.

    Raises:
        RuntimeError: A gradient has no memory that can be read; the message names its shape and index.

    Example:
        >>> measure([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        tensor([25.,  0.], dtype=torch.float64)
    """
    if not grads:
        return torch.zeros(0, device="cpu")
    if len(set(map(_DEVICE, grads))) > 1:
        return _measure_devices(grads)
    sharded = not set(map(type, grads)).issubset(PLAIN)
    if sharded:
        grads = [added_up(grad) for grad in grads]
    tensors = [_numbers(grad) for grad in grads]
    device = tensors[0].device
    automatic = _automatic(device.type)
    dtypes = set(map(_DTYPE, tensors))
    if len(dtypes) == 1 and dtypes <= plain.FLOATS and plain.all_usual(tensors):
        norm_sq = automatic.measure(tensors)
        return sum_over_shards(norm_sq, grads) if sharded else norm_sq
    kinds: dict[tuple[torch.dtype, Backend], list[int]] = {}
    tensors = list(map(plain.resolved, tensors))
    for i, tensor in enumerate(tensors):
        backend = automatic if _for_kernels(tensor, i) else get_backend("reference")
        kinds.setdefault((tensor.dtype, backend), []).append(i)
    sums = torch.empty(len(tensors), dtype=widest_dtype(device), device=device)
    for (_, backend), indices in kinds.items():
        sums[upload(indices, device)] = backend.measure([tensors[i] for i in indices]).to(sums.dtype)
    return sum_over_shards(sums, grads)


def _measure_devices(grads: Sequence[Tensor]) -> Tensor:
    """As `measure`, device by device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, grad in enumerate(grads):
        by_device.setdefault(grad.device, []).append(index)
    parts = [measure([grads[i] for i in indices]) for indices in by_device.values()]
    order = [i for indices in by_device.values() for i in indices]
    device = grads[0].device
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    measured = torch.cat([part.to(device, dtype, non_blocking=True) for part in parts])
    return measured[torch.tensor(order, device=device).argsort()]


def _numbers(grad: Tensor) -> Tensor:
    """Return the values of a gradient as one dense, real, local tensor."""
    if type(grad) is Tensor and grad.layout is torch.strided and not grad.is_complex():
        return grad  # This is by far the most common case.
    grad = local(grad.detach())
    if grad.layout != torch.strided:
        # Duplicate indices of an uncoalesced gradient add before they are squared.
        grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()
    return plain.as_real(grad)


def _for_kernels(tensor: Tensor, index: int) -> bool:
    """Return whether kernels may read ``tensor``, lazily negated or not; raise RuntimeError if no operation may."""
    reason = plain.why_unsafe(tensor, written=False)
    if reason is not None:
        raise RuntimeError(f"The gradient of shape {tuple(tensor.shape)} at index {index} {reason}.")
    return tensor.dtype in plain.FLOATS and plain.is_plain(tensor)
