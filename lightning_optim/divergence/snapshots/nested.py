"""Tensors in nested containers: their sizes, and copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.sharding import local


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; those of the elements that it stores, if it is sparse."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    return int(tensor._nnz()) * (tensor.element_size() + 8 * tensor.dim())


def copied(value: Any, old: Any, memory: str) -> Any:
    """Copy nested containers, into the tensors of an older copy where they fit."""
    if isinstance(value, Tensor):
        value = local(value.detach())
        if not (isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype):
            away = memory != "device" and value.device.type == "cuda"
            old = torch.empty_like(value, device="cpu", pin_memory=True) if away else torch.empty_like(value)
        return old.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        olds = old if isinstance(old, dict) else {}
        return {key: copied(item, olds.get(key), memory) for key, item in value.items()}
    if isinstance(value, list | tuple):
        before = old if isinstance(old, list | tuple) and len(old) == len(value) else [None] * len(value)
        return type(value)([copied(item, was, memory) for item, was in zip(value, before, strict=True)])
    return copy.deepcopy(value)


def placed(saved: Any, live: Any, memory: str) -> Any:
    """Copy a state from a checkpoint to where a snapshot of ``live`` has its tensors."""
    if isinstance(saved, Tensor):
        if not isinstance(live, Tensor) or live.device.type == "cpu":
            return saved.detach().clone()
        away = memory != "device" and live.device.type == "cuda"
        return saved.detach().cpu().pin_memory() if away else saved.detach().to(live.device, copy=True)
    if isinstance(saved, dict):
        lives = live if isinstance(live, dict) else {}
        return {key: placed(item, lives.get(key), memory) for key, item in saved.items()}
    if isinstance(saved, list | tuple):
        there = live if isinstance(live, list | tuple) and len(live) == len(saved) else [None] * len(saved)
        return type(saved)([placed(item, now, memory) for item, now in zip(saved, there, strict=True)])
    return copy.deepcopy(saved)


def on_host(value: Any) -> Any:
    """Return nested containers with their tensors in the memory of the host, where they are not copied."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    return type(value)(map(on_host, value)) if type(value) in (list, tuple) else value
