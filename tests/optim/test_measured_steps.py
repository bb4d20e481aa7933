"""A step that is measured, reported or watched is bit for bit the step that is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.clipping import GlobalNorm
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.divergence.spikes import SpikeWindow
from lightning_optim.divergence.watch import StepGuard
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.step import StepPipeline
from lightning_optim.step.histograms import KINDS
from tests.optim.cases import BACKENDS
from tests.optim.test_special_values import FLAGS

USUAL = {
    "SGD": ("plain", "decay_l2", "decay_l2_sp"),
    "AdamW": ("plain", "decay_l2", "decay_l2_sp", "kahan", "bits8", "bfloat16"),
    "Lion": ("decay_cautious_masked",),
    "Adafactor": ("plain", "bfloat16"),
}
"""What is tried by default; the rest is slow."""


def each_kind() -> list[Any]:
    kinds = []
    for cls in optim._classes().values():
        for flags in FLAGS:
            if optimizer_of(cls, flags, "reference") is not None:
                marks = [] if flags in USUAL.get(cls.__name__, ()) else [pytest.mark.slow]
                kinds.append(pytest.param(cls, flags, id=f"{cls.__name__}-{flags}", marks=marks))
    return kinds


def optimizer_of(cls: type[FusedOptimizer], flags: str, backend: str) -> FusedOptimizer | None:
    """Over tensors of several blocks, and small ones; None if the optimizer has no such flag."""
    given = {"weight_decay": 0.1} | FLAGS[flags]
    generator = torch.Generator().manual_seed(0)
    dtype = given.pop("dtype", torch.float32)
    params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((66, 130), (7, 5), (9, 1))]
    if "momentum" in cls.hyperparameters():
        given["momentum"] = 0.9
    try:
        return cls(params, lr=0.01, backend=backend, **given)  # type: ignore[call-arg]
    except (ValueError, TypeError):
        return None


def train(optimizer: Any, steps: int = 4) -> list[Any]:
    """Everything that training leaves behind."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params_of(optimizer):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-3]).to(param.dtype)
        optimizer.step()
    return [*(p.detach() for p in params_of(optimizer)), *(optimizer.state[p] for p in params_of(optimizer))]


def assert_same_bits(first: Any, second: Any) -> None:
    """The sign of a zero counts."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    elif isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))
    else:
        assert first == second


def params_of(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cls", "flags"), each_kind())
def test_collecting_changes_nothing(cls: type[FusedOptimizer], flags: str, backend: str) -> None:
    results = []
    for collect in (False, True):
        optimizer = optimizer_of(cls, flags, backend)
        assert optimizer is not None
        optimizer.collect_step_stats = collect
        results.append(train(optimizer))
        assert (optimizer.step_stats is not None) == collect
    assert_same_bits(*results)


TORCH = {"torch_adamw": torch.optim.AdamW, "torch_sgd": torch.optim.SGD}


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", *TORCH, "torch_fused"])
def test_watching_changes_nothing(name: str, clip: float | None) -> None:
    """Reports with histograms at every step, a detector and a watch of spikes: on or off."""

    def make() -> Any:
        ours = optimizer_of(
            optim.get_optimizer_class(name.removeprefix("torch_").replace("fused", "adamw")), "decay_l2", "cpu"
        )
        assert ours is not None
        if not name.startswith("torch"):
            return ours
        cls = TORCH.get(name, torch.optim.AdamW)
        return cls(params_of(ours), lr=0.01, weight_decay=0.1, fused=name == "torch_fused")

    results = []
    for watched in (False, True):
        optimizer = make()
        rule = None if clip is None else GlobalNorm(clip)
        extras: dict[str, Any] = {}
        records: list[Any] = []
        if watched:
            extras = {
                "detectors": [NonFiniteGradient(), StepGuard(SpikeWindow(2))],
                "on_report": records.append,
                "histograms": lambda: KINDS,
            }
        pipeline = StepPipeline(optimizer, clip=rule, **extras)
        results.append(train(optimizer))
        assert len(records) == 4 * watched
        pipeline.close()
    assert_same_bits(*results)
