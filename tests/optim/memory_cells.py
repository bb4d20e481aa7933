"""The matrix of what a kernel is built and called for, each cell an optimizer over tensors of every odd size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels import quantization
from lightning_optim.optim import FusedOptimizer, get_optimizer_class, low_precision
from tests.canaries import Memory, bits, move_into, temporaries_in
from tests.optim.cases import CASES

# Sizes around what is done at a time: vectors, a block of 8-bit state, a kernel's chunk, a program of Triton's. The
# state of more than 4096 elements is what `state_bits=8` keeps in 8 bits.
SIZES = (
    *(((n,), "plain") for n in (0, 1, 2, 255, 256, 257, 4095, 4096, 4097)),
    ((), "plain"),
    ((3, 0, 2), "plain"),
    ((16, 17), "plain"),
    ((16, 17), "transposed"),
    ((17, 15), "strided"),
    ((257,), "strided"),
    ((2, 3, 5, 7), "channels_last"),
    ((2, 3, 4), "permuted"),
    ((65, 64), "transposed"),
    ((4097,), "strided"),
)
LARGE = (((65535,), "plain"), ((65537,), "plain"), ((300, 257), "plain"))
"""More than one block of the CPU's."""
assert low_precision.SMALL == 4096
assert quantization.BLOCK == 256


@dataclass(frozen=True)
class Cell:
    """One optimizer as it is built, and one step as it is asked for.

    Args:
        optimizer: Its name.
        arguments: For its constructor.
        dtype: Name of the parameters' dtype.
        backend: Its name.
        collect: Whether steps are measured.
        divisor: None, `one` for all, or `each`.
    """

    optimizer: str
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    backend: str = "cpu"
    collect: bool = False
    divisor: str | None = None

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.backend}-{self.optimizer}-{options}-{self.dtype}-{self.collect}-{self.divisor}"


def laid_out(values: Tensor, layout: str) -> Tensor:
    """``values`` with the memory that ``layout`` says: dense in another order, or with gaps."""
    if layout == "transposed" and values.dim() == 2:
        return values.t().contiguous().t()
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "permuted" and values.dim() == 3:
        return values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "strided" and values.dim():
        return torch.stack([values, values], dim=-1)[..., 0]
    return values.contiguous()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of either sign, and of sizes so alike that no weighted sum of two comes near 0, where its sign is by chance."""
    size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size).to(dtype)


def make(cell: Cell, sizes: tuple[Any, ...] = SIZES) -> tuple[FusedOptimizer, list[Tensor]]:
    """The cell's optimizer, and its parameters."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    params = [laid_out(numbers(shape, dtype, generator), layout).requires_grad_() for shape, layout in sizes]
    named = [(f"layers.{i}.weight", param) for i, param in enumerate(params)]
    kind: Any = get_optimizer_class(cell.optimizer)
    # Of three dimensions Muon asks what they are.
    flatten = {"flatten": True} if "flatten" in kind.hyperparameters() else {}
    optimizer: FusedOptimizer = kind(named, backend=cell.backend, **flatten, **cell.arguments)
    return optimizer, params


def run(cell: Cell, memory: Memory, sizes: tuple[Any, ...] = SIZES) -> list[Tensor]:
    """Three steps of tensors in ``memory``; returns what they made of parameters and state, bit by bit.

    Raises:
        AssertionError: Something was written that is not part of a parameter or its state.
    """
    optimizer, params = make(cell, sizes)
    generator = torch.Generator().manual_seed(1)
    optimizer.collect_step_stats = cell.collect
    if cell.divisor is not None:
        optimizer.divisor = memory.home(
            "divisor", torch.tensor(2.0) if cell.divisor == "one" else torch.linspace(1, 3, len(params)), read_only=True
        )
    for step in range(3):
        # With another layout than the parameter's where the step is odd.
        for param, (_, layout) in zip(params, sizes, strict=True):
            grad = numbers(tuple(param.shape), param.dtype, generator)
            param.grad = laid_out(grad, layout) if step % 2 == 0 else grad
        if step == 0:
            optimizer.make_state(params)
            move_into(memory, optimizer)
        else:  # sorted already: only the gradients are looked at
            for i, param in enumerate(params):
                assert param.grad is not None
                param.grad = memory.home(f"gradient {i}", param.grad, read_only=True)
        with temporaries_in(memory):
            optimizer.step()
    memory.check()
    states = [value for param in params for value in optimizer.state[param].values()]
    sums = [optimizer.step_stats.sums] if optimizer.step_stats is not None else []
    return [bits(tensor).clone() for tensor in (*params, *states, *sums) if isinstance(tensor, Tensor)]


KINDS = ("independent", "corrected", "l2", "l1", "l2_sp", "cautious", "norm")
FLAGS: tuple[dict[str, Any], ...] = (
    {"maximize": True},
    {"cautious": True},
    {"kahan_sum": True},
    {"stochastic_rounding": True},
    {"state_bits": 8},
    {"state_bits": 16},
    *({"weight_decay": 0.1, "weight_decay_kind": kind} for kind in KINDS),
)


def accepted(cell: Cell) -> bool:
    """Whether the optimizer can be made at all."""
    try:
        make(cell, (((4,), "plain"), ((4, 4), "plain")))
    except (TypeError, ValueError):
        return False
    return True


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each optimizer in each of its settings; the first is the default one."""
    for case in CASES:
        for setting in case.settings:
            yield case.optimizer.__name__.lower(), setting.arguments


def quick() -> list[Cell]:
    """Those whose kernels other tests build, too."""
    cells = [
        Cell(name, arguments, divisor=(None, "one", "each")[i % 3]) for i, (name, arguments) in enumerate(settings())
    ]
    cells += [Cell("adamw", flags, collect=True) for flags in FLAGS if "weight_decay_kind" in flags]
    for i, flags in enumerate(FLAGS[2:6]):
        for name, extra in (("adamw", {}), ("lion", {}), ("sgd", {"momentum": 0.9})):
            decay = {"weight_decay_kind": "decoupled"} if name == "sgd" and i < 2 else {}
            cells.append(Cell(name, {**extra, **flags, **decay, "weight_decay": 0.1}, "bfloat16"))
    cells += [Cell("adamw", {"state_bits": 8, "amsgrad": True}, "bfloat16", collect=True)]
    cells += [Cell(name, {}, dtype) for name in ("adamw", "muon", "adafactor") for dtype in ("bfloat16", "float16")]
    cells += [Cell(name, {}, "float64") for name in ("adamw", "adafactor", "soap")]
    return [cell for cell in cells if accepted(cell)]


def full(backend: str) -> list[Cell]:
    """Each setting in each dtype, and each optimizer with each flag in two of them."""
    cells = []
    divisors = (None, "one", "each")
    for i, (name, arguments) in enumerate(settings()):
        for j, dtype in enumerate(("float32", "float64", "bfloat16", "float16")):
            cells.append(Cell(name, arguments, dtype, backend, (i + j) % 2 == 0, divisors[(i + j) % 3]))
    for i, case in enumerate(CASES):
        name, arguments = case.optimizer.__name__.lower(), case.settings[0].arguments
        for j, flags in enumerate(FLAGS):
            for k, dtype in enumerate(("float32", "bfloat16")):
                collect = (i + j + k) % 2 == 0
                cells.append(Cell(name, {**arguments, **flags}, dtype, backend, collect, divisors[(i + j + k) % 3]))
    pairs = [{**a, **b} for i, a in enumerate(FLAGS) for b in FLAGS[i + 1 :] if not a.keys() & b.keys()]
    for i, flags in enumerate(pairs):
        name = ("adamw", "lion", "stableadamw", "adafactor")[i % 4]
        cells.append(Cell(name, flags, ("bfloat16", "float32")[i // 4 % 2], backend, i % 3 == 0))
    return [cell for cell in cells if accepted(cell)]
