from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import STEP_SUMS, GradStats, StepStats, sum_groups
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step.measure import measure_norm_sq, measure_update


def _stats(*norms, groups=None):
    return GradStats(torch.tensor(norms).square(), groups or (len(norms),))


@pytest.mark.parametrize(
    ("norms", "max_norm", "divisor"),
    [
        ((3.0, 4.0), 1.0, 5.0),
        ((3.0, 4.0), 2.5, 2.0),
        ((3.0, 4.0), 5.1, 1.0),
        ((0.3, 0.4), 1.0, 1.0),
        ((0.0,), 1.0, 1.0),
    ],
)
def test_divisor_brings_the_norm_down_to_the_limit_and_never_up(norms, max_norm, divisor):
    assert GlobalNorm(max_norm)(_stats(*norms)).item() == pytest.approx(divisor, rel=1e-5)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_divisor_equals_what_torch_multiplies_by(max_norm, dtype):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(3, 4, dtype=dtype)), nn.Parameter(torch.zeros(7, dtype=dtype))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    divisor = GlobalNorm(max_norm)(GradStats(measure_norm_sq(before), (2,)))
    nn.utils.clip_grad_norm_(parameters, max_norm, foreach=False)
    for parameter, grad in zip(parameters, before, strict=True):
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close((grad.double() / divisor).to(dtype), parameter.grad, rtol=tolerance, atol=0)


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, math.inf, -math.inf])
def test_unusable_limits_are_refused(max_norm):
    with pytest.raises(ValueError, match=r"max_norm=.*finite number above 0"):
        GlobalNorm(max_norm)


@pytest.mark.parametrize(
    ("norms", "skip"),
    [((1.0, 2.0), False), ((0.0,), False), ((1.0, math.nan), True), ((math.inf,), True), ((-math.inf, 1.0), True)],
)
def test_any_gradient_that_is_not_finite_skips(norms, skip):
    assert NonFiniteGradient()(_stats(*norms)).item() is skip


# What is measured.


def test_norms_are_per_group_and_over_all():
    stats = _stats(3.0, 4.0, 12.0, groups=(2, 0, 1))
    assert stats.group_norms().tolist() == [5.0, 0.0, 12.0]
    assert stats.total_norm().item() == 13.0


def test_group_sums_of_empty_groups_are_zero():
    assert sum_groups(torch.tensor([1.0, 2.0]), (0, 2, 0)).tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_square_sums_are_taken_in_wide_arithmetic(shape, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 300).to(dtype)  # squares overflow float16
    measured = measure_norm_sq([tensor])
    assert measured.dtype == torch.float64
    torch.testing.assert_close(measured[0].double(), tensor.double().square().sum(), rtol=1e-5, atol=0)


def test_views_and_mixed_dtypes_are_measured_as_they_are():
    base = torch.arange(12.0).reshape(3, 4)
    measured = measure_norm_sq([base.t()[1:], base[:, 1].to(torch.bfloat16)])
    expected = [(base[:, 1:] ** 2).sum().item(), (base[:, 1] ** 2).sum().item()]
    assert measured.tolist() == pytest.approx(expected, rel=1e-6)


def test_duplicate_entries_of_a_sparse_gradient_add_up_before_they_are_squared():
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 2]]), torch.tensor([3.0, 4.0, 1.0]), (5,))
    assert measure_norm_sq([sparse]).tolist() == [50.0]


def test_update_sums_are_exact_and_the_unknown_ones_nan():
    before = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0]])]
    after = [torch.tensor([3.5, 4.0]), torch.tensor([[3.0]])]
    stats = StepStats(measure_update([t.clone() for t in before], after), (1, 1), (2, 1))
    assert stats.groups("param_sq").tolist() == [25.0, 1.0]
    assert stats.groups("update_sq").tolist() == [0.25, 4.0]
    for name in set(STEP_SUMS) - {"param_sq", "update_sq"}:
        assert stats.groups(name).isnan().all()
