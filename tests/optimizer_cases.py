"""Every optimizer of torch, in every form that takes its operands in another way, and a few of other libraries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Case:
    """One row: how to make the optimizer, and what gradients it takes.

    Args:
        optimizer: The class, or its import path in a package that may be missing.
        options: Its arguments.
        shapes: Shapes of the parameters it can train.
        sparse: Whether its gradients are sparse.
    """

    optimizer: type[Optimizer] | str
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((3, 4), (5,), ())
    sparse: bool = False

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in self.shapes]

    def make(self, parameters: list[nn.Parameter]) -> Optimizer:
        cls = self.optimizer
        if isinstance(cls, str):
            module, _, name = cls.rpartition(".")
            cls = getattr(pytest.importorskip(module), name)
        return cls(parameters, **self.options)

    def __str__(self) -> str:
        name = self.optimizer if isinstance(self.optimizer, str) else self.optimizer.__name__
        return "-".join([name.rpartition(".")[2], *(f"{key}={value}" for key, value in self.options.items())])


_MATRICES = ((3, 4), (4, 2))
_ROWS = ((6, 2),)

OURS = Case("lightning_optim.optim.AdamW", {"weight_decay": 0.1})
TORCH_FUSED = Case(torch.optim.AdamW, {"fused": True, "weight_decay": 0.1})
TORCH = Case(torch.optim.AdamW, {"weight_decay": 0.1})
FUSED_MOMENTUM = Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True})
FUSED_DAMPENED = Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": True})

# These take divisor and skip in their kernel.
FUSED = [
    OURS,
    Case("lightning_optim.optim.SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    Case("lightning_optim.optim.Lion"),
    TORCH_FUSED,
    Case(torch.optim.AdamW, {"fused": True, "amsgrad": True, "maximize": True}),
    Case(torch.optim.Adam, {"fused": True}),
    Case(torch.optim.SGD, {"lr": 0.1, "fused": True}),
    FUSED_MOMENTUM,
    Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "fused": True}),
    Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "fused": True}),
    Case(torch.optim.Adagrad, {"fused": True}),
]
# These have their gradients scaled and their call left out.
AROUND = [
    FUSED_DAMPENED,
    Case(torch.optim.SGD, {"lr": 0.1}),
    Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    TORCH,
    Case(torch.optim.AdamW, {"foreach": True}),
    Case(torch.optim.Adam),
    Case(torch.optim.Adam, {"capturable": False, "lr": 0.01, "amsgrad": True}),
    Case(torch.optim.Adadelta),
    Case(torch.optim.Adafactor),
    Case(torch.optim.Adagrad),
    Case(torch.optim.Adamax),
    Case(torch.optim.ASGD),
    Case(torch.optim.Muon, shapes=_MATRICES),
    Case(torch.optim.NAdam),
    Case(torch.optim.RAdam),
    Case(torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    Case(torch.optim.Rprop),
    Case("lion_pytorch.Lion"),
    Case("schedulefree.AdamWScheduleFree"),
    Case("prodigyopt.Prodigy"),
]
SPARSE = [
    Case(torch.optim.SparseAdam, shapes=_ROWS, sparse=True),
    Case(torch.optim.SGD, {"lr": 0.1}, _ROWS, sparse=True),
    Case(torch.optim.Adagrad, {}, _ROWS, sparse=True),
]
ALL = FUSED + AROUND + SPARSE


def set_gradients(parameters: list[nn.Parameter], seed: int, factor: float = 1.0, sparse: bool = False) -> None:
    """Gives the parameters gradients that depend on ``seed`` alone; a NaN ``factor`` makes one element NaN."""
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(parameters):
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if factor == factor:
            grad = grad * factor
        elif index == len(parameters) - 1:
            grad.view(-1)[-1] = factor
        parameter.grad = grad.to_sparse(1) if sparse else grad
