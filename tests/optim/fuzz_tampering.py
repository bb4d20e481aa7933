"""What may happen to a parameter, its gradient and its state between two steps, each by its name.

Some of it is legal (a gradient of another layout, weights moved elsewhere), some is not. What torch itself refuses to
do is left undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.canaries import Memory, has_memory
from tests.optim.memory_cells import laid_out, numbers

Generator = torch.Generator


class Scene:
    """What tampering takes from: new numbers, in memory that is watched.

    Args:
        memory: For all tensors that are made.
        seed: Of their numbers.
    """

    def __init__(self, memory: Memory, seed: int = 3) -> None:
        self._memory = memory
        self._generator = torch.Generator().manual_seed(seed)
        self.previous: Tensor | None = None
        """The parameter before this one."""

    def new(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, name: str = "tampered") -> Tensor:
        """Numbers in row-major order."""
        wide = numbers(tuple(shape), torch.float64, self._generator)
        return self.put(wide.mul(50).to(dtype) if not dtype.is_floating_point else wide.to(dtype), name)

    def put(self, tensor: Tensor, name: str = "tampered", *, read_only: bool = False) -> Tensor:
        """``tensor``, watched."""
        return self._memory.home(name, tensor, read_only=read_only)


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _larger(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] + 3) if shape else (3,)


def _smaller(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if shape else (0,)


def _emptied(tensor: Tensor) -> Tensor:
    """As FSDP leaves what it has freed: shape without memory."""
    result = tensor.detach().clone()
    result.untyped_storage().resize_(0)
    return result


def _imaginary(values: Tensor) -> Tensor:
    if values.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(-values)
    return torch.imag(torch.complex(torch.zeros_like(values), -values).conj())


def _marked(values: Tensor, value: float) -> Tensor:
    if values.numel():
        values.view(-1)[values.numel() // 2] = value
    return values


Values = Callable[[Scene, Tensor], Tensor | None]

GRADIENTS: dict[str, Values] = {
    "plain": lambda scene, p: scene.new(p.shape, p.dtype),
    "none": lambda scene, p: None,
    "like_parameter": lambda scene, p: scene.put(torch.empty_like(p).copy_(scene.new(p.shape, p.dtype))),
    "transposed": lambda scene, p: scene.put(laid_out(scene.new(p.shape, p.dtype), "transposed")),
    "strided": lambda scene, p: scene.put(laid_out(scene.new(p.shape, p.dtype), "strided"), read_only=True),
    "negated": lambda scene, p: torch._neg_view(scene.new(p.shape, p.dtype)),
    "imaginary": lambda scene, p: _imaginary(scene.new(p.shape, p.dtype)),
    "expanded": lambda scene, p: scene.new((), p.dtype).expand(p.shape),
    "expanded_row": lambda scene, p: scene.new(p.shape[-1:], p.dtype).expand(p.shape),
    "sparse": lambda scene, p: scene.new(p.shape, p.dtype).to_sparse(),
    "sparse_rows": lambda scene, p: scene.new(p.shape, p.dtype).to_sparse_csr(),
    "nan": lambda scene, p: scene.put(_marked(scene.new(p.shape, p.dtype), torch.nan)),
    "infinite": lambda scene, p: scene.put(_marked(scene.new(p.shape, p.dtype), torch.inf)),
    "zero": lambda scene, p: scene.put(torch.zeros_like(p)),
    "parameter_itself": lambda scene, p: p.detach(),
    "of_previous": lambda scene, p: None if scene.previous is None else scene.previous.grad,
    "part_of_previous": lambda scene, p: scene.previous.grad.view(-1)[: p.numel()].view(p.shape),
    "emptied": lambda scene, p: _emptied(scene.new(p.shape, p.dtype)),
    "requires_grad": lambda scene, p: scene.new(p.shape, p.dtype).requires_grad_() * 1.0,
    "other_dtype": lambda scene, p: scene.new(p.shape, _other(p.dtype)),
    "narrow": lambda scene, p: scene.new(p.shape, torch.bfloat16),
    "subclass": lambda scene, p: scene.new(p.shape, p.dtype).as_subclass(Named),
}


class Named(Tensor):
    """A subclass that adds nothing."""


PARAMETERS: dict[str, Callable[[Scene, Tensor], Tensor]] = {
    "moved": lambda scene, p: scene.put(p),
    "larger": lambda scene, p: scene.new(_larger(p.shape), p.dtype),
    "smaller": lambda scene, p: scene.new(_smaller(p.shape), p.dtype),
    "flat": lambda scene, p: scene.put(p.reshape(-1)),
    "turned": lambda scene, p: scene.put(p.reshape(tuple(reversed(p.shape)))),
    "deeper": lambda scene, p: scene.put(p[None]),
    "transposed": lambda scene, p: scene.put(laid_out(p, "transposed")),
    "strided": lambda scene, p: scene.put(laid_out(p, "strided")),
    "emptied": lambda scene, p: _emptied(p),
    "expanded": lambda scene, p: scene.new((), p.dtype).expand(p.shape),
    "expanded_row": lambda scene, p: scene.new(p.shape[-1:], p.dtype).expand(p.shape),
    "window": lambda scene, p: scene.new((p.numel() + 2,), p.dtype).as_strided(p.shape, [1] * p.dim()),
    "previous": lambda scene, p: scene.previous.detach(),
    "part_of_previous": lambda scene, p: scene.previous.detach().view(-1)[: p.numel()].view(p.shape),
    "end_of_previous": lambda scene, p: scene.previous.detach().view(-1)[1 : p.numel() + 1].view(p.shape),
    "wide": lambda scene, p: scene.new(p.shape, _other(p.dtype)),
    "narrow": lambda scene, p: scene.new(p.shape, torch.bfloat16),
    "subclass": lambda scene, p: p.detach().as_subclass(Named),
}

STATES: dict[str, Callable[[Scene, Tensor, Any], Any]] = {
    "moved": lambda scene, p, s: scene.put(s),
    "larger": lambda scene, p, s: scene.new(_larger(s.shape), s.dtype),
    "smaller": lambda scene, p, s: scene.new(_smaller(s.shape), s.dtype),
    "scalar": lambda scene, p, s: scene.new((), s.dtype),
    "one": lambda scene, p, s: scene.new((1,), s.dtype),
    "column": lambda scene, p, s: scene.new((*s.shape[:-1], 1), s.dtype),
    "flat": lambda scene, p, s: scene.put(s.reshape(-1)),
    "turned": lambda scene, p, s: scene.put(s.reshape(tuple(reversed(s.shape)))),
    "transposed": lambda scene, p, s: scene.put(laid_out(s, "transposed")),
    "strided": lambda scene, p, s: scene.put(laid_out(s, "strided")),
    "broadcast": lambda scene, p, s: scene.new((), s.dtype).expand(s.shape),
    "broadcast_row": lambda scene, p, s: scene.new(s.shape[-1:], s.dtype).expand(s.shape),
    "window": lambda scene, p, s: scene.new((s.numel() + 2,), s.dtype).as_strided(s.shape, [1] * s.dim()),
    "emptied": lambda scene, p, s: _emptied(s),
    "meta": lambda scene, p, s: s.to("meta"),
    "sparse": lambda scene, p, s: s.to_sparse(),
    "negated": lambda scene, p, s: torch._neg_view(scene.put(s)),
    "other": lambda scene, p, s: scene.new(s.shape, s.dtype),
    "nan": lambda scene, p, s: scene.put(_marked(s.clone().contiguous(), torch.nan)),
    "negative": lambda scene, p, s: scene.put(-s.abs()),
    "huge": lambda scene, p, s: scene.put(torch.full_like(s, 1e30)),
    "parameter_itself": lambda scene, p, s: p.detach(),
    "gradient": lambda scene, p, s: p.grad,
    "number": lambda scene, p, s: 1.5,
    "none": lambda scene, p, s: None,
    "text": lambda scene, p, s: "exp_avg",
    "requires_grad": lambda scene, p, s: s.clone().requires_grad_(),
    "parameter": lambda scene, p, s: torch.nn.Parameter(scene.put(s)),
    "subclass": lambda scene, p, s: s.as_subclass(Named),
    "list": lambda scene, p, s: s.tolist(),
    "wide": lambda scene, p, s: scene.put(s.to(_other(s.dtype))),
    "narrow": lambda scene, p, s: scene.put(s.to(torch.bfloat16)),
    "other_dtype": lambda scene, p, s: scene.put(s.to(torch.int64)),
    "missing": lambda scene, p, s: None,
    "surplus": lambda scene, p, s: None,
    "swapped": lambda scene, p, s: None,
    "tied": lambda scene, p, s: None,
}
"""The last four are about keys; see `tamper_state`."""

LEGAL: dict[str, set[str | None]] = {
    "gradient": {
        *("plain", "none", "like_parameter", "transposed", "strided", "negated", "imaginary", "expanded"),
        *(
            "expanded_row",
            "nan",
            "infinite",
            "zero",
            "of_previous",
            "requires_grad",
            "other_dtype",
            "narrow",
            "subclass",
        ),
    },
    "parameter": {None, "moved", "transposed", "strided"},
    "state": {"moved", "transposed", "strided", "requires_grad", "parameter", "surplus"},
}
"""What must not be refused."""


def tamper_state(scene: Scene, param: Tensor, state: dict[str, Any], number: int, how: str) -> None:
    """Do ``how`` to the state in place ``number``, counted round and round, of ``param``."""
    keys = sorted(state, key=str)
    if not keys:
        return
    key = keys[number % len(keys)]
    other = keys[(number + 1) % len(keys)]
    if how == "missing":
        del state[key]
    elif how == "surplus":
        state[f"{key}_of_old"] = scene.new((3,), torch.float32)
    elif how == "swapped":
        state[key], state[other] = state[other], state[key]
    elif how == "tied":
        state[key] = state[other]
    elif how in ("number", "none", "text") or has_memory(state[key]):
        state[key] = STATES[how](scene, param, state[key])
