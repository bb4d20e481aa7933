"""Steps whose gradients are known from before give the same as steps that look at each of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_optim import optim
from lightning_optim.clipping import BlockRMS, GlobalNorm, Value
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import EarlyWarning, SpikeWindow, StepGuard
from lightning_optim.step import StepPipeline, gradients, known_gradients
from tests.optim.test_watched_batches import calls_of

pytest.importorskip("numba")
from lightning_optim.kernels.cpu import object_layout

pytestmark = pytest.mark.skipif(object_layout.layout() is None, reason="objects lie elsewhere in this version")


def steps(change: Callable[[list[nn.Parameter]], object], clip: str, optimizer_class: type) -> list[torch.Tensor]:
    """Results of 8 steps with a change before the sixth: norms before and after clipping, numel and weights."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(4, 3), (5,), (70_000,), (2, 2)]]
    optimizer = optimizer_class([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)
    records: list[StepRecord] = []
    rules = {"norm": GlobalNorm(1.0), "each": BlockRMS(0.1), "value": Value(0.5)}
    guard = StepGuard(SpikeWindow(2, warmup=2), early_warning=EarlyWarning(warmup=2))
    StepPipeline(
        optimizer,
        clip=rules[clip],
        detectors=[guard],
        on_report=records.append,
        report_due=lambda: len(records) != 5,
    )
    for step in range(8):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        if step == 5:
            change(parameters)
        optimizer.step()
    seen = [tensor for r in records for tensor in (r.grad.norm_sq, r.clipped_norm_sq, r.update.sums, r.counts)]
    numbers = [torch.tensor([list(r.update.numel)[-1], len(r.update.numel), *r.grad.group_sizes]) for r in records]
    rows = [torch.tensor([*seen.worst, *seen.group_norms, seen.step]) for seen in guard.read()]
    return [*seen, *numbers, *rows, *(p.detach() for p in parameters)]


def drop(parameters: list[nn.Parameter]) -> None:
    parameters[1].grad = None


def infinite(parameters: list[nn.Parameter]) -> None:
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = torch.inf


def strided(parameters: list[nn.Parameter]) -> None:
    parameters[0].grad = torch.ones(3, 4).t()


def narrow(parameters: list[nn.Parameter]) -> None:
    parameters[0].data = parameters[0].data.bfloat16()
    parameters[0].grad = torch.ones(4, 3, dtype=torch.bfloat16)


def memory(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("clip", ["norm", "each", "value"])
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("change", [bool, drop, infinite, strided, narrow, memory])
def test_known_gradients_give_the_same(
    change: Callable[[list[nn.Parameter]], object],
    clip: str,
    optimizer_class: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change is narrow and optimizer_class is torch.optim.AdamW:
        pytest.skip("its state does not follow")
    asked: list[object] = []
    norm_sq = known_gradients.KnownGradients.norm_sq
    monkeypatch.setattr(known_gradients.KnownGradients, "norm_sq", lambda self: (asked.append(self), norm_sq(self))[1])
    results = []
    for after, many in ((10**6, 32), (1, 1)):
        monkeypatch.setattr(known_gradients, "_AFTER", after)
        monkeypatch.setattr(gradients, "MANY", many)
        asked.clear()
        results.append(steps(change, clip, optimizer_class))
    assert asked, "or nothing was tested"
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_nothing_of_a_model_is_kept_after_its_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_gradients, "_AFTER", 1)
    monkeypatch.setattr(gradients, "MANY", 1)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([parameter])
    pipeline = StepPipeline(optimizer, clip=GlobalNorm(1.0))
    for _ in range(4):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert known_gradients.MEMORIES[optimizer].known is not None
    pipeline.close()
    assert optimizer not in known_gradients.MEMORIES
    gone = weakref.ref(parameter)
    del optimizer, pipeline, parameter
    gc.collect()
    assert gone() is None


def test_a_guarded_step_calls_no_more_functions_for_more_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for number in (40, 400):
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.ones(4)
        optimizer = optim.AdamW(parameters)
        guard = StepGuard(SpikeWindow(2), early_warning=EarlyWarning())
        StepPipeline(optimizer, clip=GlobalNorm(1.0), detectors=[guard])
        for _ in range(20):
            optimizer.step()
        counts.append(calls_of(optimizer.step))
    assert counts[1] - counts[0] < 10
    assert counts[1] < 700
