"""A finite gradient whose square is beyond float32 is a large gradient: not NaN, not an infinity, and clipped right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.clipping import list_clip_rules, make_clip_rule
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.divergence.watch import StepGuard
from lightning_optim.step import StepPipeline
from lightning_optim.step.histograms import ABOVE, KINDS, NOT_FINITE
from tests.optim.cases import BACKENDS

SHAPES = ((24, 40), (9,))
HUGE = (1e20, -1e30)


def start(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def train(optimizer: Any, params: list[Tensor], huge: float, scale: float = 1.0) -> None:
    """Eight steps, the fourth with one huge element in each gradient."""
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            if step == 3:
                grad.view(-1)[3] = huge
            param.grad = (grad * scale).to(param.dtype)
        optimizer.step()


def others(param: Tensor) -> Tensor:
    """All but the element whose gradient was huge."""
    keep = torch.arange(param.numel()) != 3
    return param.detach().flatten()[keep]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("name", sorted(optim._classes()))
def test_the_other_weights_go_on(name: str, huge: float, backend: str) -> None:
    """Unclipped: all remain finite, and in those that have no sums over the tensor the others are as without it."""
    params = start()
    cls: Any = optim.get_optimizer_class(name)
    train(cls(params, lr=0.01, backend=backend), params, huge)
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "adafactor"])
def test_a_matrix_of_huge_gradients_leaves_weights_and_state_finite(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    """Sums of their products have infinities of both signs."""
    params = start(dtype)[:1]
    cls: Any = optim.get_optimizer_class(name)
    optimizer = cls(params, lr=0.01, backend=backend)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * 1e30).to(dtype)
        optimizer.step()
    for param in params:
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values() if value.is_floating_point())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_variance_of_squares_beyond_float32(momentum: float, backend: str) -> None:
    """The weight stands still, as with squares alone; infinity less infinity would make it NaN."""
    params = start()
    train(optim.RMSprop(params, lr=0.01, centered=True, momentum=momentum, backend=backend), params, 1e32)
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "tolerance"), [("stableadamw", 4e-3), ("adafactor", 1e-2)])
def test_they_go_as_in_wider_arithmetic(name: str, tolerance: float, backend: str) -> None:
    """Where state cannot hold the square, what it can hold stands for it."""
    narrow, wide = start(), start(torch.float64)
    cls: Any = optim.get_optimizer_class(name)
    for params in (narrow, wide):
        train(cls(params, lr=0.01, backend=backend), params, 1e20)
    for got, expected in zip(narrow, wide, strict=True):
        torch.testing.assert_close(others(got).double(), others(expected), rtol=0, atol=tolerance)


def clip_arguments(rule: str) -> dict[str, Any]:
    warmup = {"warmup": 2} if rule in ("adagc", "autoclip", "momentum_ratio", "zclip") else {}
    return warmup | ({"max_norm": 1.0} if rule == "zclip" else {})


OPTIMIZERS = {
    "cpu": lambda params: optim.AdamW(params, lr=0.01, backend="cpu"),
    "reference": lambda params: optim.AdamW(params, lr=0.01, backend="reference"),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("rule", list_clip_rules())
def test_it_is_clipped_and_not_skipped(rule: str, huge: float, optimizer: str) -> None:
    """The same weights as in float64, whatever clips and whatever steps, with everything watching."""
    narrow, wide = start(), start(torch.float64)
    for params in (narrow, wide):
        own = OPTIMIZERS[optimizer](params)
        records: list[StepRecord] = []
        pipeline = StepPipeline(
            own,
            clip=make_clip_rule(rule, clip_arguments(rule)),
            detectors=[NonFiniteGradient(), watch := StepGuard()],
            on_report=records.append,
            histograms=lambda: KINDS,
        )
        train(own, params, huge)
        assert pipeline.counts().skipped == 0
        assert pipeline.counts().clipped > 0
        seen = watch.read(everything=True)
        assert [step.bad_tensors for step in seen] == [0] * 8
        assert seen[3].values["grad_norm"] == pytest.approx(abs(huge) * 2**0.5)
        assert records[3].grad.norm_sq.isfinite().all()
        assert records[3].clipped_norm_sq.isfinite().all()
        assert records[3].histograms["grad"][:, ABOVE].sum() == 2
        assert records[3].histograms["grad"][:, NOT_FINITE].sum() == 0
        pipeline.close()
    # That rule limits the whole, in which one element of many hardly counts: it reaches AdamW's second moment, which
    # cannot hold its square in float32. That weight stands still from there, and it alone.
    shown = others if rule == "update_rms" and huge**2 > torch.finfo(torch.float32).max else torch.flatten
    for got, expected in zip(narrow, wide, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(shown(got).double(), shown(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_infinite_one_is_skipped(optimizer: str) -> None:
    params = start()
    own = OPTIMIZERS[optimizer](params)
    pipeline = StepPipeline(own, clip=make_clip_rule("global_norm", {}), detectors=[NonFiniteGradient()])
    train(own, params, float("inf"))
    assert pipeline.counts().skipped == 1
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("rule", [name for name in list_clip_rules() if name != "agc"])
def test_under_a_loss_scale(rule: str) -> None:
    """A gradient of 1e20 times 65536."""
    results = []
    for scale in (1.0, 65536.0):
        params = start()
        own = optim.AdamW(params, lr=0.01, backend="cpu")
        own.grad_scale = torch.tensor(scale)
        pipeline = StepPipeline(own, clip=make_clip_rule(rule, clip_arguments(rule)))
        train(own, params, 1e20, scale)
        assert pipeline.counts().skipped == 0
        results.append(params)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
