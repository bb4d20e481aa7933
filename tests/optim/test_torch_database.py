"""torch's own table of optimizer inputs, valid and not, for the optimizers that torch has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.optim.cases import CASES, copies, give, gradients

pytest.importorskip("expecttest", reason="torch's own tests want it")
from torch.testing._internal.common_optimizers import optim_db

TWINS = {case.torch_twin: case for case in CASES if case.torch_twin}
INFOS = [pytest.param(info, id=info.optim_cls.__name__) for info in optim_db if info.optim_cls in TWINS]
# How torch runs an optimizer, not what it computes.
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


@pytest.fixture
def _double() -> Iterator[None]:
    """float64 for torch's own 0-d state, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("info", INFOS)
def test_valid_inputs_do_what_torch_does(info: Any) -> None:
    case = TWINS[info.optim_cls]
    ours = case.optimizer
    other_shape = () if any(len(shape) < 2 for shape in case.shapes) else (2, 5)  # matrices only, for Muon
    for entry in info.optim_inputs_func(device="cpu"):
        arguments = {k: v for k, v in entry.kwargs.items() if k not in IMPLEMENTATION}
        if any(isinstance(beta, torch.Tensor) for beta in arguments.get("betas", ())):
            continue  # for capturing CUDA graphs
        if isinstance(arguments.get("lr"), torch.Tensor):
            arguments["lr"] = arguments["lr"].double()  # torch's Muon decays in the precision of lr
        first = [
            torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
            torch.ones(other_shape, dtype=torch.float64),
        ]
        second = copies(first)
        optimizer, twin = ours(copies(first), **arguments), info.optim_cls(second, **arguments)
        own = [p for g in optimizer.param_groups for p in g["params"]]
        for grads in gradients(own, 4):
            give(own, grads)
            give(second, grads)
            optimizer.step()
            twin.step()
        for a, b in zip(own, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=entry.desc)


@pytest.mark.parametrize("info", INFOS)
def test_what_torch_refuses_is_refused(info: Any) -> None:
    ours = TWINS[info.optim_cls].optimizer
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        kwargs = entry.optimizer_error_input.kwargs
        if "only support 2D" in entry.optimizer_error_input.desc:
            continue  # to ours it is a convolution kernel
        if kwargs.keys() & IMPLEMENTATION:
            continue
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ours(entry.optimizer_error_input.params, **kwargs)
