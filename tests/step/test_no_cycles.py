"""A step leaves no tensor in a reference cycle, and keeps no gradient beyond the step.

Python's collector of cycles starts by the number of objects, not by their bytes: gradients in a cycle stay for many
steps, each as large as the model.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm, get_clip_rule, list_clip_rules
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step.histograms import KINDS

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda params: lo.optim.AdamW(params, backend="cpu"),
    "adamw, reference": lambda params: lo.optim.AdamW(params, backend="reference"),
    "muon": lambda params: lo.optim.Muon(params),
    "soap": lambda params: lo.optim.SOAP(params),
    "adafactor": lambda params: lo.optim.Adafactor(params),
    "torch, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch, no operands": lambda params: torch.optim.NAdam(params),
}


@pytest.fixture
def collected() -> Iterator[Callable[[], list[Any]]]:
    """Collect by hand; return the tensors that only the collector of cycles has freed."""

    def collect() -> list[Any]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            return [tuple(thing.shape) for thing in gc.garbage if isinstance(thing, Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    gc.collect()
    gc.freeze()  # What is there already need not be looked at each time.
    gc.disable()
    yield collect
    gc.enable()
    gc.unfreeze()


def check(collected: Callable[[], list[Any]], make: Callable[[Any], Optimizer], **options: Any) -> None:
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    optimizer = make(params)
    records: list[object] = []
    pipeline = lo.StepPipeline(optimizer, **{"on_report": records.append, **options})

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.stack([(param**2).sum() for param in params]).sum()
        total.backward()
        return total

    for step in range(4):
        with_closure = step % 2 == 1
        if not with_closure:
            loss()
        optimizer.step(loss if with_closure else None)
        if step < 2:  # What is made once, such as compiled code and its tables, may be in cycles.
            gc.collect()
            continue
        gradients = [weakref.ref(param.grad) for param in params]
        optimizer.zero_grad()
        assert [ref() for ref in gradients] == [None] * 3
        assert collected() == []
    pipeline.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_of_a_step_that_is_clipped_guarded_and_measured_stays(name: str, collected: Any) -> None:
    check(collected, OPTIMIZERS[name], clip=GlobalNorm(), detectors=[NonFiniteGradient()], histograms=lambda: KINDS)


@pytest.mark.parametrize("name", list_clip_rules())
def test_nothing_of_a_step_stays_with_any_method_of_clipping(name: str, collected: Any) -> None:
    check(collected, OPTIMIZERS["adamw"], clip=get_clip_rule(name)())
