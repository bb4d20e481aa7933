"""Digests of weights and batches, by which runs show that they began from the same point."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


def digest_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a digest of dtype, shape and values of tensors of any shape, bit for bit.

    Example:
        >>> digest_of_tensors([torch.zeros(2)]) == digest_of_tensors([torch.zeros(2)])
        True
    """
    found = hashlib.sha256()
    for tensor in tensors:
        _add(found, tensor)
    return found.hexdigest()[:16]


def digest_of_module(module: nn.Module) -> str:
    """Return a digest of all parameters and buffers of a module, by their names."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found.update(name.encode())
        _add(found, tensor)
    return found.hexdigest()[:16]


def digest_of_batch(batch: Any) -> str:
    """Return a digest of all tensors in a batch, which may be nested in sequences, mappings and dataclasses."""
    return digest_of_tensors(_tensors(batch))


def _add(found: Any, tensor: Tensor) -> None:
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        found.update(b"uninitialized")
        return
    found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    plain = tensor.detach()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_quantized:
        plain = plain.int_repr()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    flat = plain.resolve_neg().cpu().contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
