"""State in 16 and 8 bits: error of the code, memory, training, checkpoints, refusals."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import optim
from lightning_optim.kernels import quantization, rounding
from lightning_optim.optim import FusedOptimizer
from tests.helpers import through_a_file
from tests.optim.cases import BACKENDS, assert_same, copies, give, gradients, run

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_width = pytest.mark.parametrize("bits", [16, 8])
each_optimizer = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p, **k: optim.AdamW(p, **k), id="AdamW"),
        pytest.param(lambda p, **k: optim.AdamW(p, amsgrad=True, **k), id="AMSGrad"),
        pytest.param(lambda p, **k: optim.Lion(p, **k), id="Lion"),
        pytest.param(lambda p, **k: optim.SGD(p, momentum=0.9, **k), id="SGD"),
    ],
)
KEY = torch.tensor(rounding.first_key(0, 0))


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Whole blocks, an incomplete one, a transposed matrix, and one that is too small for 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 256), (5003,), (80, 70), (11,))]
    made[2] = made[2].t()
    return [tensor.requires_grad_() for tensor in made]


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_has_256_values(signed: bool) -> None:
    codes = quantization.code_map(signed)
    assert len(codes.unique()) == 256
    assert codes.equal(codes.sort().values)
    assert float(codes[-1]) == 1.0
    assert 0.0 in codes.tolist()
    assert float(codes[codes > 0][0]) == pytest.approx(0.55e-6 if signed else 0.325e-6)


def quantized_error(values: Tensor, signed: bool) -> dict[str, float]:
    back = quantization.dequantize(*quantization.quantize(values, signed, KEY, 2), signed)
    relative = (back - values).abs() / values.abs()
    return {
        "median": float(relative.median()),
        "p99": float(relative.quantile(0.99)),
        "bias": float((back - values).sum() / values.abs().sum()),
        "rms": float((back - values).square().mean().sqrt() / values.square().mean().sqrt()),
    }


def test_error_of_normal_first_moments_and_of_their_squares() -> None:
    """The figures in docs/concepts/low_precision.md."""
    normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    first, second = quantized_error(normal, True), quantized_error(normal.square(), False)
    print(first, second)
    assert first["median"] < 0.02
    assert first["p99"] < 0.15
    assert first["rms"] < 0.02
    assert abs(first["bias"]) < 1e-3
    assert second["median"] < 0.02
    assert second["p99"] < 0.25
    assert second["rms"] < 0.02
    assert abs(second["bias"]) < 1e-3


def test_every_code_comes_back_as_itself() -> None:
    for signed in (True, False):
        values = quantization.code_map(signed) * 3.0  # 256 values make one block
        codes, scales = quantization.quantize(values, signed, KEY, 2)
        assert codes.tolist() == list(range(256))
        assert scales.tolist() == [3.0]


def test_small_second_moments_do_not_become_zero_and_zeros_stay() -> None:
    values = torch.zeros(300)
    values[0], values[1] = 1.0, 1e-12
    back = quantization.dequantize(*quantization.quantize(values, False, KEY, 2), False)
    assert float(back[1]) > 0
    assert (back[2:] == 0).all()


@each_backend
@each_width
def test_a_second_moment_can_rise_and_fall(bits: int, backend: str) -> None:
    """Gradients of unit variance, then of a hundredth: v follows. Rounded to the nearest it would stay where it was."""
    param = torch.zeros(4096, requires_grad=True)
    optimizer = optim.AdamW([param], lr=0.0, betas=(0.9, 0.99), state_bits=bits, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for sigma, steps in ((1.0, 300), (0.1, 800)):
        for _ in range(steps):
            param.grad = sigma * torch.randn(4096, generator=generator)
            optimizer.step()
        state = optimizer.state[param]
        v = state["exp_avg_sq"]
        if bits == 8:
            v = quantization.dequantize(v, state["exp_avg_sq_scale"], False)
        assert float(v.float().mean()) == pytest.approx(sigma**2, rel=0.06)


@each_backend
@each_width
@each_optimizer
def test_backends_agree_with_float32_state(make: Any, bits: int, backend: str) -> None:
    params = weights()
    wide = copies(params)
    low, full = make(params, lr=1e-3, state_bits=bits, backend=backend), make(wide, lr=1e-3, backend="reference")
    start = copies(params)
    run(low, params, 30)
    run(full, wide, 30)
    for a, b, first in zip(params, wide, start, strict=True):
        assert float(((a - b).norm() / (b - first).norm()).detach()) < (0.2 if isinstance(low, optim.Lion) else 0.05)


@each_width
@each_optimizer
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_backends_agree(make: Any, bits: int, dtype: torch.dtype) -> None:
    """Apart from values so near to a rounding boundary that the order of operations decides."""
    sets = [weights(dtype) for _ in BACKENDS]
    made = [make(p, lr=1e-3, state_bits=bits, backend=b) for p, b in zip(sets, BACKENDS, strict=True)]
    for optimizer, params in zip(made, sets, strict=True):
        run(optimizer, params, 3)
        optimizer.collect_step_stats = True
        run(optimizer, params, 1, seed=2)
    for a, b in zip(*sets, strict=True):
        assert (a - b).abs().gt(1e-5 if dtype == torch.float32 else 0).float().mean() < 0.01
        for name, value in made[0].state[a].items():
            other = made[1].state[b][name]
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            if value.dtype in (torch.uint8, torch.bfloat16, torch.int64):
                assert (value != other).float().mean() < 0.01
    one, two = (o.step_stats.sums for o in made)
    torch.testing.assert_close(one, two, rtol=0.02, atol=1e-2, equal_nan=True)


def bytes_per_parameter(optimizer: FusedOptimizer, param: Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in optimizer.state[param].values() if t.dim() > 0) / param.numel()


@pytest.mark.parametrize(
    ("make", "bits", "expected"),
    [
        (lambda p, **k: optim.AdamW(p, **k), 32, 8),
        (lambda p, **k: optim.AdamW(p, **k), 16, 4),
        (lambda p, **k: optim.AdamW(p, **k), 8, 2 + 2 * 4 / 256),
        (lambda p, **k: optim.Lion(p, **k), 8, 1 + 4 / 256),
        (lambda p, **k: optim.SGD(p, momentum=0.9, **k), 8, 1 + 4 / 256),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_parameter(make: Any, bits: int, expected: float, dtype: torch.dtype) -> None:
    param = torch.zeros(256 * 64, dtype=dtype, requires_grad=True)
    optimizer = make([param], state_bits=bits)
    run(optimizer, [param], 1)
    assert bytes_per_parameter(optimizer, param) == expected


def test_small_tensors_keep_32_bits() -> None:
    params = [torch.zeros(n, requires_grad=True) for n in (4095, 4096)]
    optimizer = optim.AdamW(params, state_bits=8)
    run(optimizer, params, 1)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.uint8]
    assert "rounding_key" not in optimizer.state[params[0]]


@each_backend
@each_width
@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_equal(make: Any, bits: int, backend: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    names = [str(i) for i in range(len(params))]
    optimizer = make(list(zip(names, params, strict=True)), lr=1e-3, state_bits=bits, backend=backend)
    run(optimizer, params, 3)
    assert float(optimizer.state[params[0]].get("step", 3)) == 3.0
    resumed = copies(params)
    for i in (2,):
        resumed[i] = params[i].detach().t().clone().t().requires_grad_()
    named = list(zip(names, resumed, strict=True))
    fresh = make([named[2], named[0], named[3], named[1]], lr=1e-3, backend=backend)  # state_bits comes with the state
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    copy, pickled = deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    run(optimizer, params, 10, seed=2)
    for grads in gradients(resumed, 10, seed=2):
        give(resumed, grads)
        fresh.step()
    assert_same(params, resumed)
    for p, r in zip(params, resumed, strict=True):
        assert_same(dict(optimizer.state[p]), dict(fresh.state[r]))
    for other in (copy, pickled):
        own = [p for g in other.param_groups for p in g["params"]]
        run(other, own, 10, seed=2)
        assert_same(params, own)
        assert_same(optimizer.state_dict(), other.state_dict())


@each_backend
@each_width
@each_optimizer
def test_a_skipped_step_changes_nothing(make: Any, bits: int, backend: str) -> None:
    params = weights()
    optimizer = make(params, lr=1e-3, state_bits=bits, backend=backend)
    run(optimizer, params, 2)
    before = deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    optimizer.found_inf = torch.ones(())
    run(optimizer, params, 2)
    assert_same(before, (optimizer.state_dict(), [p.detach() for p in params]))


@each_backend
def test_the_first_step_is_that_of_float32_state(backend: str) -> None:
    """The update sees its moments before they are rounded."""
    params = weights()
    wide = copies(params)
    run(optim.AdamW(params, state_bits=8, backend=backend), params, 1)
    run(optim.AdamW(wide, backend=backend), wide, 1)
    for a, b in zip(params, wide, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_backend
def test_a_nan_reaches_the_state(backend: str) -> None:
    params = weights()
    optimizer = optim.AdamW(params, state_bits=8, backend=backend)
    (grads,) = gradients(params, 1)
    grads[0].view(-1)[300] = torch.nan
    give(params, grads)
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        scales = optimizer.state[params[0]][f"{name}_scale"]
        assert scales.flatten().isnan().tolist() == [i == 1 for i in range(64)]


@each_width
def test_flags_combine(bits: int) -> None:
    """bf16 parameters whose update survives, beside moments in fewer bits, with the cautious mask."""
    for flag in ({"kahan_sum": True}, {"stochastic_rounding": True}):
        sets = [weights(torch.bfloat16) for _ in BACKENDS]
        for params, backend in zip(sets, BACKENDS, strict=True):
            run(optim.AdamW(params, lr=1e-3, state_bits=bits, cautious=True, backend=backend, **flag), params, 3)
        for a, b in zip(*sets, strict=True):
            assert (a != b).float().mean() < 0.01


def accuracy(make: Any, seed: int) -> float:
    """Of a small network on scikit-learn's handwritten digits, on a third that it was not trained on."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    x = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order]
    y = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make(model.parameters())
    for _ in range(12):
        for batch in torch.randperm(1200, generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p, **k: optim.AdamW(p, lr=3e-3, **k), id="AdamW"),
        pytest.param(lambda p, **k: optim.Lion(p, lr=5e-4, **k), id="Lion"),
        pytest.param(lambda p, **k: optim.SGD(p, lr=0.1, momentum=0.9, **k), id="SGD"),
    ],
)
def test_training_reaches_the_accuracy_of_float32_state(make: Any) -> None:
    results = {
        bits: [accuracy(lambda p, bits=bits: make(p, state_bits=bits), seed) for seed in range(2)]
        for bits in (32, 16, 8)
    }
    print(results)
    for bits in (16, 8):
        assert sum(results[bits]) / 2 > sum(results[32]) / 2 - 0.01
    assert min(results[32]) > 0.85


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.AdamW(p, state_bits=4), "state_bits=4: must be 32, 16 or 8"),
        (lambda p: optim.SGD(p, state_bits=8), "SGD: Invalid state_bits=8: must be 32, because it keeps no state"),
        (lambda p: optim.AdamW([{"params": p, "state_bits": 8.5}]), "state_bits=8.5: must"),
        (
            lambda p: optim.AdamW([q.detach().double() for q in p], state_bits=16),
            "is float64, whose precision state_bits=16",
        ),
        (
            lambda p: optim.Adafactor([{"params": p, "state_bits": 8}]),
            "Adafactor: Invalid state_bits=8.*matrix factors",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(weights())


@each_backend
@pytest.mark.parametrize(("bits", "lowest", "highest"), [(16, 0.98, 1.02), (8, 0.0, 0.1)])
def test_what_an_outlier_costs_its_block_is_what_the_docs_say(
    bits: int, lowest: float, highest: float, backend: str
) -> None:
    """AdamW beside a gradient of 1e5: eight bits keep the neighbours from moving, sixteen do not."""
    moved = []
    for kept in (32, bits):
        generator = torch.Generator().manual_seed(1)
        weight = torch.zeros(4096, requires_grad=True)
        optimizer = optim.AdamW([weight], lr=1e-3, weight_decay=0.0, state_bits=kept, backend=backend)
        for _ in range(60):
            weight.grad = torch.randn(4096, generator=generator) + 0.3
            weight.grad[::256] = 1e5
            optimizer.step()
        moved.append(float(weight.detach().view(-1, 256)[:, 1:].mean()))
    assert lowest <= moved[1] / moved[0] <= highest
