"""Sets of parameters to step: shapes of a transformer, and one size cut into any number of tensors."""

from __future__ import annotations

import torch
from torch import nn


def transformer(layers: int = 12, dim: int = 384, vocab: int = 6000) -> list[nn.Parameter]:
    """23.5 M parameters in 74 tensors at the defaults."""
    shapes: list[tuple[int, ...]] = [(vocab, dim), (dim,)]
    for _ in range(layers):
        shapes += [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim), (dim,), (dim,)]
    return _parameters(shapes)


def matrices(layers: int = 12, dim: int = 384) -> list[nn.Parameter]:
    """The hidden matrices of that transformer alone, which is what Muon is for."""
    return _parameters(
        [shape for _ in range(layers) for shape in ((3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim))]
    )


def cut(total: int, tensors: int) -> list[nn.Parameter]:
    """``total`` parameters in ``tensors`` vectors of one size."""
    return _parameters([(total // tensors,)] * tensors)


def of_shape(shape: tuple[int, ...], count: int) -> list[nn.Parameter]:
    """``count`` parameters of one shape."""
    return _parameters([shape] * count)


def _parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    return parameters
