"""What clip rules measure: norms of output units and Σ g²/v̂, by compiled kernels and in torch's operations."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_optim import kernels
from lightning_optim.kernels import measures, rounding
from lightning_optim.kernels.measures import Moment, over_second_moments, unit_squares
from tests.allocations import python_peak, torch_peak

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        reference = kernels.get_backend("reference")
        monkeypatch.setattr(kernels, "_automatic", lambda device_type: reference)
        monkeypatch.setitem(rounding.PIECE, "cpu", 1000)
    return str(request.param)


def layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(), (0,), (1,), (13,), (200_001,), (257, 263), (3, 70_000), (5000, 3), (0, 4), (4, 0), (1, 50), (6, 3, 3)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    image = torch.randn(5, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    strided = [torch.randn(30, 50).to(dtype).t(), torch.randn(9, 100).to(dtype)[:, ::2], torch.randn(64).to(dtype)[::3]]
    return [
        *tensors,
        image,
        *strided,
        torch.randn(8).to(dtype).expand(4, 8),
        torch._neg_view(torch.ones(3, 2).to(dtype)),
    ]


def rows_of(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() > 1 else 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_square_sum_of_each_unit_in_every_layout(backend: str, dtype: torch.dtype) -> None:
    tensors = layouts(dtype)
    rows = list(map(rows_of, tensors))
    got = unit_squares(tensors, rows, CPU)
    assert got.dtype == torch.float64
    wide = [tensor.double().square() for tensor in tensors]
    expected = [w.flatten(1).sum(1) if w.dim() > 1 else w.sum().reshape(1) for w in wide]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("value", "finite"), [(1e30, True), (math.inf, False), (math.nan, False)])
def test_large_and_not_finite_values_of_a_unit_show_in_that_unit(backend: str, value: float, finite: bool) -> None:
    tensor = torch.ones(3, 70_000)
    tensor[1, 66_000] = value
    got = unit_squares([tensor], [3], CPU)
    assert got.isfinite().tolist() == [True, finite, True]
    assert not finite or got[1].item() == pytest.approx(value**2, rel=1e-6)


def in_float64(grad: torch.Tensor, scale: float, moment: Moment) -> list[float]:
    size = grad.double().abs() / scale
    if moment.exp_avg_sq is None or moment.step == 0:
        return [float(size.square().sum()), float((size > 0).sum())]
    v = moment.beta2 * moment.exp_avg_sq.double() + (1 - moment.beta2) * size.square()
    root = (v / (1 - moment.beta2 ** (moment.step + 1))).sqrt().clamp(min=max(moment.eps, 1e-15))
    return [float(size.square().sum()), float((size / root).square().sum())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_gradients_over_their_second_moment_in_every_layout(
    backend: str, dtype: torch.dtype, scale: float | None
) -> None:
    grads = layouts(dtype)
    moments = []
    for i, grad in enumerate(grads):
        kept = torch.rand_like(grad.resolve_neg()).square()
        kept = kept.contiguous() if i % 2 else kept
        exp_avg_sq = None if i % 5 == 0 else kept if i % 3 else kept.float()
        moments.append(Moment(exp_avg_sq, 0.0 if i % 7 == 0 else 3.0, 0.99, 0.0 if i % 2 else 1e-3))
    got = over_second_moments(grads, None if scale is None else torch.tensor(scale), moments, CPU)
    assert got.dtype == torch.float64
    expected = [in_float64(grad, scale or 1.0, moment) for grad, moment in zip(grads, moments, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_where_a_gradient_has_always_been_0_counts_as_0(backend: str) -> None:
    moment = Moment(torch.zeros(10), 4.0, 0.9, 0.0)
    assert over_second_moments([torch.zeros(10)], None, [moment], CPU).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("value", [1e-30, 1e25, 3e38])
def test_squares_beyond_float32_count_as_others_do(backend: str, value: float) -> None:
    grad = torch.full((100,), value)
    moment = Moment(torch.zeros(100), 1.0, 0.9, 0.0)
    (got,) = over_second_moments([grad], None, [moment], CPU).tolist()
    assert got == pytest.approx(in_float64(grad, 1.0, moment), rel=1e-6)
    if value > 1:  # v̂ is (1 − β₂)·g² / (1 − β₂²).
        assert got[1] == pytest.approx(190.0, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(backend: str, bad: float) -> None:
    grads = [torch.ones(100), torch.ones(100)]
    grads[1][50] = bad
    moments = [Moment(torch.ones(100), 1.0, 0.9, 1e-8)] * 2
    assert over_second_moments(grads, None, moments, CPU).isfinite().tolist() == [[True, True], [False, False]]


def test_the_same_every_time() -> None:
    grads = [torch.randn(500, 700), torch.randn(3, 200_000)]
    moments = [Moment(torch.rand_like(grad), 3.0, 0.9, 1e-8) for grad in grads]
    first = over_second_moments(grads, None, moments, CPU), unit_squares(grads, [500, 3], CPU)
    for _ in range(10):
        assert torch.equal(first[0], over_second_moments(grads, None, moments, CPU))
        assert torch.equal(first[1], unit_squares(grads, [500, 3], CPU))


@pytest.mark.parametrize("transposed", [False, True])
def test_no_temporary_is_as_large_as_a_tensor(backend: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rounding.PIECE, "cpu", 10_000)
    grad = torch.randn(1000, 1000)
    moment = Moment(torch.rand(1000, 1000), 3.0, 0.9, 1e-8)
    if transposed:
        grad = grad.t()

    def measure() -> None:
        unit_squares([grad], [1000], CPU)
        over_second_moments([grad], None, [moment], CPU)

    measure()
    limit = 0.02 if backend == "auto" and not transposed else 0.1
    assert torch_peak(measure) < limit * grad.nbytes
    assert python_peak(measure) < 0.02 * grad.nbytes


def test_contiguous_tensors_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("torch's operations")

    monkeypatch.setattr(measures, "_unit_squares", never)
    monkeypatch.setattr(measures, "_over_second_moment", never)
    grads = [torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(7, 3), torch.tensor(1.0)]
    unit_squares(grads, [5, 7, 1], CPU)
    moments = [Moment(torch.rand_like(grad), 1.0, 0.9, 1e-8) for grad in grads]
    over_second_moments(grads, None, moments, CPU)
