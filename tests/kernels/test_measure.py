"""Square sums of any optimizer's gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_optim import kernels
from lightning_optim.kernels import measure


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        reference = kernels.get_backend("reference")
        monkeypatch.setattr(kernels, "_automatic", lambda device_type: reference)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_square_sums(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(), (0,), (1,), (13,), (257, 263), (200_001,), (3, 0, 2)]
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    got = measure(grads)
    assert got.dtype == torch.float64
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_layouts_that_are_not_contiguous(backend: str) -> None:
    base = torch.randn(40, 30)
    grads = [base.t(), base[:, ::2], base[3:, 5], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    grads.append(torch.ones(1).expand(7))
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(measure(grads).double(), expected, rtol=1e-5, atol=0)


def test_mixed_dtypes_sparse_and_complex(backend: str) -> None:
    sparse = torch.sparse_coo_tensor([[1, 1, 2]], [3.0, 1.0, 2.0], (5,), check_invariants=False)
    grads = [torch.ones(4), torch.ones(3, dtype=torch.float64), sparse, torch.tensor([3 + 4j]).conj()]
    assert measure(grads).tolist() == pytest.approx([4.0, 3.0, 16.0 + 4.0, 25.0])
    assert measure(grads).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e20, -1e30, 3e38])
@pytest.mark.parametrize("where", [0, 5000, 99_999])
def test_finite_gradients_have_finite_square_sums(backend: str, value: float, where: int, dtype: torch.dtype) -> None:
    """Whose squares are beyond float32."""
    grads = [torch.ones(10, dtype=dtype), torch.ones(100_000, dtype=dtype)]
    grads[1][where] = value
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(measure(grads), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 5000, 99_999])
def test_not_finite_shows(backend: str, bad: float, where: int) -> None:
    grads = [torch.ones(10), torch.ones(100_000)]
    grads[1][where] = bad
    assert measure(grads).isfinite().tolist() == [True, False]


def test_no_gradients() -> None:
    assert measure([]).shape == (0,)


def test_the_same_every_time() -> None:
    grads = [torch.randn(500_000), torch.randn(65_537)]
    first = measure(grads)
    assert all(torch.equal(first, measure(grads)) for _ in range(20))
