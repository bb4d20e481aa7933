"""NaN, infinities, -0, denormal and largest numbers, wherever they stand: no backend and no flag hides or moves one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.optim.base import FusedOptimizer
from tests.optim.cases import BACKENDS

OTHERS = [name for name in BACKENDS if name != "reference"]

VALUES = (math.nan, math.inf, -math.inf, -0.0, 1e-40, -1e-40, torch.finfo(torch.float32).max)

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cautious": {"cautious": True},
    "maximize": {"maximize": True},
    "kahan": {"kahan_sum": True, "dtype": torch.bfloat16},
    "stochastic": {"stochastic_rounding": True, "dtype": torch.bfloat16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "bits16": {"state_bits": 16},
    "bits8": {"state_bits": 8},
    **{
        f"decay_{kind}{'_masked' if cautious else ''}": {
            "weight_decay_kind": kind,
            "weight_decay": 0.1,
            **({"cautious": True} if cautious else {}),
        }
        for kind in ("decoupled", "independent", "corrected", "l2", "l1", "l2_sp", "cautious", "norm")
        for cautious in (False, True)
    },
}
USUAL = {
    "SGD": ("plain",),
    "AdamW": ("plain", "cautious", "kahan", "stochastic", "bits8"),
    "Lion": ("plain", "cautious"),
    "StableAdamW": ("plain",),
    "Adafactor": ("plain",),
}
"""What is tried by default: of each kind of kernel some; the rest is slow."""


def each_kind() -> list[Any]:
    kinds = []
    for cls in optim._classes().values():
        for flags in FLAGS:
            if optimizer_of(cls, flags, "reference") is not None:
                marks = [] if flags in USUAL.get(cls.__name__, ()) else [pytest.mark.slow]
                kinds.append(pytest.param(cls, flags, id=f"{cls.__name__}-{flags}", marks=marks))
    return kinds


def optimizer_of(cls: type[FusedOptimizer], flags: str, backend: str) -> FusedOptimizer | None:
    """Over one tensor of 18 blocks of 8-bit state; None if the optimizer has no such flag."""
    given = dict(FLAGS[flags])
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(64, 72, generator=generator).to(given.pop("dtype", torch.float32)).requires_grad_()
    if "momentum" in cls.hyperparameters():
        given["momentum"] = 0.9
    try:
        return cls([param], lr=0.1, backend=backend, **given)  # type: ignore[call-arg]
    except (ValueError, TypeError):
        return None


def places(optimizer: FusedOptimizer) -> list[str]:
    (state,) = optimizer.state.values()
    return [
        "grad",
        "param",
        *(n for n, s in state.items() if s.dim() and s.is_floating_point()),
        "lr",
        "divisor",
        "skip",
    ]


def put(optimizer: FusedOptimizer, place: str, values: tuple[float, ...]) -> None:
    """``values``, each in a block of its own of 8-bit state; or the only one, for numbers."""
    (param,) = optimizer.param_groups[0]["params"]
    if place == "lr":
        optimizer.param_groups[0]["lr"] = values[0]
    elif place == "divisor":
        optimizer.divisor = torch.tensor(values[0])
    elif place == "skip":
        optimizer.found_inf = torch.tensor(values[0])
    else:
        tensor = {"grad": param.grad, "param": param}.get(place)
        flat = (optimizer.state[param][place] if tensor is None else tensor).detach().view(-1)
        for i, value in enumerate(values):
            flat[(3 + 257 * i) % flat.numel()] = value


def assert_alike(got: Tensor, expected: Tensor, coarse: bool) -> None:
    """The same specials; and close, unless a last bit may choose another code, or another neighbour."""
    assert got.dtype == expected.dtype
    if not expected.is_floating_point():
        return  # codes; what they stand for shows in the next step
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf() * got.sign(), expected.isinf() * expected.sign())
    zero = (got == 0) & (expected == 0)
    assert torch.equal(got.signbit()[zero], expected.signbit()[zero])
    if not coarse:
        tolerance = 16 * torch.finfo(got.dtype).eps
        usual = expected.abs() < 1e18  # beyond, what cancels leaves rounding of any size
        got, expected = got[usual], expected[usual]
        torch.testing.assert_close(got, expected, rtol=max(tolerance, 1e-4), atol=tolerance, equal_nan=True)


def check(cls: type[FusedOptimizer], flags: str, backend: str) -> None:
    """Three steps: an ordinary one, one with special values, one after it."""
    first = optimizer_of(cls, flags, "reference")
    assert first is not None
    rule = first.rule(first.param_groups[0])
    alone = not isinstance(rule, UpdateRule) or bool(rule.sums)
    alone = alone or FLAGS[flags].get("cautious", False) or FLAGS[flags].get("weight_decay_kind") == "norm"
    give(first, 0)
    first.step()
    for place in places(first):
        apart = alone or place in ("lr", "divisor", "skip")
        for values in [(value,) for value in VALUES] if apart else [VALUES]:
            both = []
            for name in ("reference", backend):
                optimizer = optimizer_of(cls, flags, name)
                assert optimizer is not None
                for step in range(3):
                    give(optimizer, step)
                    if step == 1:
                        put(optimizer, place, values)
                    optimizer.step()
                    if step == 1:
                        optimizer.param_groups[0]["lr"], optimizer.divisor = 0.1, None
                        vars(optimizer).pop("found_inf", None)
                both.append(optimizer)
            for expected, got in zip(*(tensors(optimizer) for optimizer in both), strict=True):
                assert_alike(got, expected, coarse=flags in ("bits8", "bits16", "stochastic"))


def give(optimizer: FusedOptimizer, step: int) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(1 + step)
    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def tensors(optimizer: FusedOptimizer) -> list[Tensor]:
    (param,) = optimizer.param_groups[0]["params"]
    return [param.detach(), *optimizer.state[param].values()]


@pytest.mark.filterwarnings("ignore:.*is above the peak known so far")  # an lr of infinity is
@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("cls", "flags"), each_kind())
def test_backends_agree(cls: type[FusedOptimizer], flags: str, backend: str) -> None:
    check(cls, flags, backend)
