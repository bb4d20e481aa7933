"""bf16 weights with 8-bit corrections: floats of 24 bits, their error, and training with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import optim
from lightning_optim.kernels.corrections import cut, weights_of
from lightning_optim.kernels.rounding import first_key
from tests.helpers import through_a_file
from tests.optim.cases import BACKENDS, assert_same, run

KEY = torch.tensor(first_key(0, 0))
SHORT: dict[str, Any] = {"kahan_sum": True, "kahan_bits": 8}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def floats(count: int = 50_000) -> Tensor:
    """Float32 of all sizes and both signs, with powers of two and what is next to them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-100, 120, (count,), generator=generator)
    powers = 2.0 ** torch.arange(-100, 100)
    return torch.cat([values, powers, powers.nextafter(torch.tensor(0.0)), -powers, torch.tensor([0.0, -0.0])])


def test_24_bits_come_back_and_the_upper_half_is_the_nearest_bf16() -> None:
    values = (floats().view(torch.int32) & -256).view(torch.float32)  # nothing is left to be rounded
    param, codes = cut(values, KEY, 3)
    assert_same(weights_of(param, codes), values)
    assert float(((param.float() - values).abs() > (values.bfloat16().float() - values).abs()).float().mean()) == 0.0
    assert (codes.min(), codes.max()) == (-128, 127)


def test_what_24_bits_do_not_hold_is_rounded_without_bias() -> None:
    values = floats()
    back = weights_of(*cut(values, KEY, 3))
    relative = ((back - values) / values).nan_to_num().double()
    assert float(relative.abs().max()) < 2**-15
    assert float(relative.std()) < 2**-16
    assert abs(float(relative.mean())) < 2**-22


def test_nan_and_infinity_stay() -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    param, codes = cut(values, KEY, 3)
    assert_same(weights_of(param, codes), values)
    assert codes.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_backends_are_equal_bit_for_bit(state_bits: int) -> None:
    made = []
    for backend in BACKENDS:
        weight = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        optimizer = optim.SGD([weight], lr=1e-3, momentum=0.5, state_bits=state_bits, backend=backend, **SHORT)
        run(optimizer, [weight], 5)
        made.append((weight.detach(), dict(optimizer.state[weight])))
    for other in made[1:]:
        assert_same(made[0], other)
    assert made[0][1]["kahan_comp"].unique().numel() == 256


@each_backend
def test_the_error_against_float32_weights(backend: str) -> None:
    """A hundred steps of AdamW; figures in docs/concepts/low_precision.md."""
    errors = {}
    for name, options in {"bf16": {}, "24": SHORT, "32": {"kahan_sum": True}}.items():
        weight = torch.randn(2_000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        wide = weight.detach().float().requires_grad_()
        low = optim.AdamW([weight], lr=1e-4, backend=backend, **options)
        full = optim.AdamW([wide], lr=1e-4, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            weight.grad = torch.randn(2_000, generator=generator).bfloat16()
            wide.grad = weight.grad.float()
            low.step()
            full.step()
        kept = low.state[weight].get("kahan_comp")
        ours = weight.float() if kept is None else weights_of(weight, kept)
        errors[name] = float(((ours - wide) / wide).detach().abs().median())
    print(errors)
    assert errors["24"] < 1e-4
    assert errors["24"] < errors["bf16"] / 10
    assert errors["32"] < errors["24"]


def loss_after(steps: int, dtype: torch.dtype, **options: Any) -> float:
    """Loss of a small network, computed from the weights that it trains, at a rate of which bf16 loses much."""
    generator = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(256, 16, generator=generator), torch.randn(16, 4, generator=generator)
    y = (x @ teacher).tanh()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(dtype)
    optimizer = optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    with torch.no_grad():
        for param in model.parameters():
            kept = optimizer.state[param].get("kahan_comp")
            param.data = param.float() if kept is None else weights_of(param, kept)
        return float(nn.functional.mse_loss(model.float()(x), y))


def test_training_reaches_the_loss_of_float32_weights() -> None:
    full = loss_after(1500, torch.float32)
    short, bare = loss_after(1500, torch.bfloat16, **SHORT), loss_after(1500, torch.bfloat16)
    print(full, short, bare)
    assert abs(short / full - 1) < 0.02
    assert bare > 1.1 * full


@pytest.mark.parametrize("kind", ["muon", "schedulefreeadamw", "adamw"])
def test_one_byte_per_parameter(kind: str) -> None:
    weight = torch.randn(64, 64).bfloat16().requires_grad_()
    cls: Any = optim.get_optimizer_class(kind)
    optimizer = cls([weight], **SHORT)
    run(optimizer, [weight], 2)
    comp = optimizer.state[weight]["kahan_comp"]
    assert (comp.dtype, comp.shape) == (torch.int8, weight.shape)


def test_the_average_of_schedule_free_starts_from_the_whole_weight() -> None:
    weight = torch.randn(64, 64).bfloat16().requires_grad_()
    optimizer = optim.ScheduleFreeAdamW([weight], lr=1e-3, **SHORT)
    run(optimizer, [weight], 3)
    y, z = weights_of(weight, optimizer.state[weight]["kahan_comp"]), optimizer.state[weight]["z"]
    kept = weight.detach().clone()
    optimizer.eval()
    assert_same(weight.detach(), torch.lerp(y, z, 1 - 1 / 0.9).bfloat16())
    optimizer.train()
    assert_same(weight.detach(), kept)


@each_backend
def test_compensation_continues_in_the_form_in_which_it_was_saved(backend: str) -> None:
    weight = torch.randn(64, 64).bfloat16().requires_grad_()
    first = optim.AdamW([weight], kahan_sum=True, backend=backend)
    run(first, [weight], 2)
    again = weight.detach().clone().requires_grad_()
    second = optim.AdamW([again], kahan_sum=True, backend=backend)
    second.load_state_dict(through_a_file(first.state_dict()))
    second.param_groups[0]["kahan_bits"] = 8
    for optimizer, param in ((first, weight), (second, again)):
        run(optimizer, [param], 2)
        assert optimizer.state[param]["kahan_comp"].dtype == torch.bfloat16
    assert_same(weight, again)


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.bfloat16, {"kahan_bits": 8}, "kahan_bits=8 has no effect without kahan_sum=True"),
        (torch.bfloat16, {"kahan_sum": True, "kahan_bits": 4}, "Invalid kahan_bits=4: must be 16 or 8"),
        (torch.bfloat16, {"kahan_sum": True, "kahan_bits": True}, "Invalid kahan_bits=True"),
        (torch.float16, SHORT, "parameter 0 .* is float16, .*Use kahan_bits=16"),
        (torch.bfloat16, {"kahan_bit": 8}, "kahan_bits"),
    ],
)
def test_what_cannot_work_is_refused(dtype: torch.dtype, options: Any, message: str) -> None:
    weight = torch.zeros(4, 4, dtype=dtype).requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        optim.AdamW([weight], **options)


def test_corrections_of_other_parameters_are_refused_or_without_effect() -> None:
    weight = torch.randn(8, 8).bfloat16().requires_grad_()
    optimizer = optim.AdamW([weight], **SHORT)
    run(optimizer, [weight], 1)
    other = weight.detach().half().requires_grad_()
    with pytest.raises(ValueError, match="state 'kahan_comp' of parameter 0"):
        optim.AdamW([other], kahan_sum=True).load_state_dict(optimizer.state_dict())
    wide = weight.detach().float().requires_grad_()
    fresh = optim.AdamW([wide])
    fresh.load_state_dict(optimizer.state_dict())
    run(fresh, [wide], 1)
