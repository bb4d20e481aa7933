"""State in 16 and 8 bits of every optimizer that has it: bytes, error, resuming, skipping, agreement of backends."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import optim
from lightning_optim.kernels.quantization import dequantize
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.base import OPTIMIZERS
from tests.helpers import through_a_file
from tests.optim.cases import assert_same

SCALE = 4 / 256  # bytes of a scale per value

# Bytes per value with 32, 16 and 8 bits; largest error of 300 steps with 16 and with 8 bits, relative to the distance
# that the weights have moved. Measured, then rounded up by a fourth at most; docs/concepts/low_precision.md has both.
TABLE: dict[str, tuple[Callable[..., FusedOptimizer], tuple[float, float, float], tuple[float, float]]] = {
    "Adam": (lambda p, **k: optim.Adam(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.02)),
    "AdamW": (lambda p, **k: optim.AdamW(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.02)),
    "NAdamW": (lambda p, **k: optim.NAdamW(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.02)),
    "Lion": (lambda p, **k: optim.Lion(p, lr=1e-4, **k), (4, 2, 1 + SCALE), (0.007, 0.05)),
    "SGD": (lambda p, **k: optim.SGD(p, lr=1e-2, momentum=0.9, **k), (4, 2, 1 + SCALE), (0.002, 0.012)),
    "Muon": (lambda p, **k: optim.Muon(p, lr=0.02, **k), (4, 2, 1 + SCALE), (0.002, 0.012)),
    "NorMuon": (
        lambda p, **k: optim.NorMuon(p, lr=0.02, **k),
        (4 + SCALE, 2 + SCALE, 1 + 2 * SCALE),
        (0.004, 0.025),
    ),
    "ScheduleFreeAdamW": (lambda p, **k: optim.ScheduleFreeAdamW(p, lr=1e-3, **k), (8, 6, 5 + SCALE), (0.005, 0.015)),
    "InnerMomentum": (
        lambda p, **k: optim.ScheduleFreeAdamW(p, lr=1e-3, inner_momentum=0.9, **k),
        (12, 8, 6 + 2 * SCALE),
        (0.005, 0.02),
    ),
    "StableAdamW": (lambda p, **k: optim.StableAdamW(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.005, 0.017)),
    "ADOPT": (lambda p, **k: optim.ADOPT(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.03)),
    "LAMB": (lambda p, **k: optim.LAMB(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.02)),
    "LARS": (lambda p, **k: optim.LARS(p, lr=1.0, momentum=0.9, **k), (4, 2, 1 + SCALE), (0.006, 0.04)),
    "RMSprop": (lambda p, **k: optim.RMSprop(p, lr=1e-3, **k), (4, 2, 1 + SCALE), (0.004, 0.01)),
    "RMSpropMomentum": (
        lambda p, **k: optim.RMSprop(p, lr=1e-3, momentum=0.9, **k),
        (8, 4, 2 + 2 * SCALE),
        (0.003, 0.01),
    ),
    "RMSpropCentered": (
        lambda p, **k: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, **k),
        (12, 10, 9 + SCALE),
        (0.002, 0.008),
    ),
    "Adagrad": (
        lambda p, **k: optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1, **k),
        (4, 2, 1 + SCALE),
        (0.005, 0.0125),
    ),
    "RAdam": (lambda p, **k: optim.RAdam(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.007, 0.022)),
    "NAdam": (lambda p, **k: optim.NAdam(p, lr=1e-3, **k), (8, 4, 2 + 2 * SCALE), (0.006, 0.018)),
    "Adan": (lambda p, **k: optim.Adan(p, lr=1e-3, **k), (16, 8, 4 + 4 * SCALE), (0.008, 0.045)),
    "AdEMAMix": (lambda p, **k: optim.AdEMAMix(p, lr=1e-3, **k), (12, 8, 6 + 2 * SCALE), (0.0063, 0.02)),
    "Prodigy": (lambda p, **k: optim.Prodigy(p, **k), (16, 12, 10 + 2 * SCALE), (0.006, 0.02)),
    "SOAP": (
        lambda p, **k: optim.SOAP(p, lr=1e-3, **k),
        tuple(n + 2 * (48**2 + 256**2) * 4 / (48 * 256) for n in (8, 4, 2 + 2 * SCALE)),
        (0.009, 0.036),
    ),
}
each = pytest.mark.parametrize("name", TABLE)


def train(name: str, bits: int, steps: int, backend: str = "auto", size: tuple[int, int] = (48, 256)) -> Any:
    """Train on a noisy quadratic; return optimizer, weight and the way that the weights have gone."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(size, generator=generator))
    start, target = weight.detach().clone(), torch.randn(size, generator=generator)
    optimizer = TABLE[name][0]([weight], state_bits=bits, backend=backend)
    for _ in range(steps):
        weight.grad = (weight.detach() - target) * 0.3 + torch.randn(size, generator=generator)
        optimizer.step()
    return optimizer, weight, weight.detach() - start


def bytes_per_value(optimizer: FusedOptimizer, weight: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if t.dim()) / weight.numel()


@each
def test_bytes_resuming_and_skipping_on_reference(name: str) -> None:
    make, expected, (_, most) = TABLE[name]
    size = (48, 256) if name == "SOAP" else (16, 256)
    optimizer, weight, moved = train(name, 8, 6, "reference", size)
    assert bytes_per_value(optimizer, weight) == pytest.approx(expected[2])
    _, _, exact = train(name, 32, 6, "reference", size)
    assert float((moved - exact).norm() / exact.norm()) < 2 * most  # noise is a larger part of a short way
    grads = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))

    again = nn.Parameter(weight.detach().clone())
    fresh = make([again], backend="reference")  # state_bits comes with the state
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for grad in grads:
        weight.grad = again.grad = grad
        optimizer.step()
        fresh.step()
    assert_same(weight, again)
    assert_same(optimizer.state_dict(), fresh.state_dict())

    before = deepcopy((optimizer.state_dict(), weight.detach()))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(before, (optimizer.state_dict(), weight.detach()))


@pytest.mark.slow
@each
@pytest.mark.parametrize("bits", [16, 8])
def test_error_and_bytes_are_those_of_the_table(name: str, bits: int) -> None:
    _, expected, errors = TABLE[name]
    optimizer, weight, moved = train(name, bits, 300)
    full, full_weight, exact = train(name, 32, 300)
    error = float((moved - exact).norm() / exact.norm())
    print(name, bits, error)
    assert error < errors[bits == 8]
    assert abs(float(moved.norm() / exact.norm()) - 1) < 0.005  # unbiased
    assert bytes_per_value(full, full_weight) == pytest.approx(expected[0])
    assert bytes_per_value(optimizer, weight) == pytest.approx(expected[1 + (bits == 8)])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("Muon", "Adagrad") else pytest.mark.slow) for n in TABLE]
)
@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_backends_agree(name: str, bits: int) -> None:
    size = (48, 256) if name == "SOAP" else (64, 80)
    ours, weight, _ = train(name, bits, 3, "reference", size)
    other, other_weight, _ = train(name, bits, 3, "cpu", size)
    torch.testing.assert_close(weight, other_weight, rtol=1e-3, atol=1e-3)
    for key, value in ours.state[weight].items():
        found = other.state[other_weight][key]
        assert (value.dtype, value.shape) == (found.dtype, found.shape)
        if value.dtype in (torch.uint8, torch.bfloat16, torch.int64):
            assert (value != found).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adagrad", "ADOPT"])
def test_sums_and_long_averages_stay_right_over_a_long_run(name: str) -> None:
    """A sum that grows by less than the distance of codes, an average over 10 000 steps: no drift, little noise."""
    low, weight, _ = train(name, 8, 4000, size=(64, 64))
    full, exact_weight, _ = train(name, 32, 4000, size=(64, 64))
    state = "sum" if name == "Adagrad" else "exp_avg_sq"
    ours = dequantize(low.state[weight][state], low.state[weight][f"{state}_scale"], False)
    ratio = ours / full.state[exact_weight][state]
    print(name, float(ratio.mean()), float(ratio.std()))
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(ratio.std()) < 0.2


def test_groups_of_other_rules_in_muon_have_low_precision_state_too() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 128), "embed": nn.Embedding(64, 64)})
    optimizer = optim.Muon(model.named_parameters(), state_bits=8, backend="reference")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    dtypes = {n: {k: v.dtype for k, v in optimizer.state[p].items() if v.dim()} for n, p in model.named_parameters()}
    assert dtypes["layer.weight"] == {"momentum_buffer": torch.uint8, "momentum_buffer_scale": torch.float32}
    assert dtypes["embed.weight"]["exp_avg_sq"] == torch.uint8
    assert dtypes["layer.bias"]["exp_avg"] == torch.float32  # small


def test_what_is_weights_or_a_difference_stays_wide() -> None:
    kept = {}
    for name in ("ScheduleFreeAdamW", "RMSpropCentered", "Prodigy", "AdEMAMix"):
        optimizer, weight, _ = train(name, 8, 1, "reference", (64, 64))
        state = optimizer.state[weight]
        kept[name] = sorted(
            key
            for key, value in state.items()
            if value.dim() and f"{key}_scale" not in state and not key.endswith("_scale")
        )
    assert kept == {
        "ScheduleFreeAdamW": ["z"],
        "RMSpropCentered": ["grad_avg", "square_avg"],
        "Prodigy": ["p0", "s"],
        "AdEMAMix": ["exp_avg_slow"],
    }
    weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(
        ValueError, match=r"RMSprop: Invalid state_bits=8: must be 32, because .* parts of a difference"
    ):
        optim.RMSprop([weight], centered=True, state_bits=8)
    with pytest.raises(ValueError, match=r"Adafactor: Invalid state_bits=8: must be 32, because .* matrix factors"):
        optim.Adafactor([weight], state_bits=8)


def test_every_optimizer_is_in_the_table_or_refuses() -> None:
    of_table = {type(make([nn.Parameter(torch.zeros(8, 8))])) for make, *_ in TABLE.values()}
    for _, cls in OPTIMIZERS.items():
        if issubclass(cls, FusedOptimizer) and cls.__module__.startswith("lightning_optim") and cls not in of_table:
            make: Any = cls
            with pytest.raises(ValueError, match="must be 32"):
                make([nn.Parameter(torch.zeros(8, 8))], state_bits=8)
