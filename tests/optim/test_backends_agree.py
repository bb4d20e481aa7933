"""Every backend does what `reference` does, for any shape, layout, dtype and set of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_optim import optim
from lightning_optim.core.stats import STEP_SUMS
from tests.optim.cases import BACKENDS, Case, Setting, each_case, each_kernel, each_setting, give, gradients, parameters

OTHERS = [name for name in BACKENDS if name != "reference"]
LAYOUTS = ("plain", "transposed", "strided", "odd_offset", "channels_last_like")
SHAPES = ((), (0,), (1,), (3, 0), (2,), (13,), (7, 11), (4, 3, 2), (4099,), (65537,), (257, 263))


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A leaf parameter of ``shape`` whose memory is as ``layout`` says."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        result = values.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided" and shape:
        result = torch.zeros((*shape[:-1], shape[-1] * 2), dtype=dtype)[..., ::2]
    elif layout == "odd_offset":
        result = torch.zeros(values.numel() + 3, dtype=dtype)[3:].view(shape)
    elif layout == "channels_last_like" and len(shape) == 3:
        result = values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    else:
        return values.requires_grad_()
    return result.detach().copy_(values).requires_grad_()


def pair(case: Case, setting: Setting, backend: str, make: Any) -> tuple[list[Any], list[list[Tensor]]]:
    params = [make(), make()]
    names = ("reference", backend)
    return [case.optimizer(p, **setting.arguments, backend=n) for p, n in zip(params, names, strict=True)], params


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_float32_agrees_over_thirty_steps(case: Case, setting: Setting, backend: str) -> None:
    optimizers, (expected, got) = pair(case, setting, backend, lambda: parameters(case))
    for grads in gradients(expected, 30):
        give(expected, grads)
        give(got, grads)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("case", "setting"), each_kernel())
def test_low_precision_agrees_to_one_rounding(case: Case, setting: Setting, dtype: torch.dtype, backend: str) -> None:
    optimizers, (expected, got) = pair(case, setting, backend, lambda: parameters(case, dtype))
    for grads in gradients(expected, 10):
        give(expected, grads)
        give(got, grads)
        for optimizer in optimizers:
            optimizer.step()
    ulp = torch.finfo(dtype).eps
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=2 * ulp, atol=2 * ulp)
    for a, b in zip(*(o.state_dict()["state"].values() for o in optimizers), strict=True):
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("case", [c for c in each_case() if c.values[0].elementwise])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS)), min_size=1, max_size=5),
    setting_index=st.integers(0, 9),
    missing=st.sets(st.integers(0, 4)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    collect=st.booleans(),
    grads_as=st.sampled_from(["plain", "like_param"]),
)
def test_any_shape_and_layout(
    case: Case,
    backend: str,
    tensors: list[tuple[tuple[int, ...], str]],
    setting_index: int,
    missing: set[int],
    dtype: torch.dtype,
    collect: bool,
    grads_as: str,
) -> None:
    setting = case.settings[setting_index % len(case.settings)]

    def make() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [laid_out(shape, layout, dtype, generator) for shape, layout in tensors]

    optimizers, (expected, got) = pair(case, setting, backend, make)
    for grads in gradients(expected, 3):
        for optimizer, params in zip(optimizers, (expected, got), strict=True):
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                grad = grad.clone() if grads_as == "plain" else torch.empty_like(param).copy_(grad)
                param.grad = None if i in missing else grad
            optimizer.collect_step_stats = collect
            optimizer.step()
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    if collect:
        a, b = (optimizer.step_stats for optimizer in optimizers)
        assert (a.group_sizes, a.numel) == (b.group_sizes, b.numel)
        torch.testing.assert_close(b.sums, a.sums, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "setting"), each_kernel())
def test_not_a_number_and_infinity_reach_the_parameters(case: Case, setting: Setting, backend: str) -> None:
    """What clipping and guards are there to prevent must not be hidden by a fast-maths flag."""
    params = parameters(case)
    optimizer = case.optimizer(params, **setting.arguments, backend=backend)
    (grads,) = gradients(params, 1)
    grads[0].view(-1)[0] = torch.nan
    give(params, grads)
    optimizer.collect_step_stats = True
    optimizer.step()
    state = optimizer.state[params[0]]
    moments = [v for name, v in state.items() if v.shape == params[0].shape and name != "p0"]  # where Prodigy began
    assert all(moment.isnan().any() for moment in moments)
    assert moments or params[0].isnan().any()
    assert optimizer.step_stats is not None
    for name in ("grad_exp_avg", "grad_sq_over_exp_avg_sq"):
        assert optimizer.step_stats.sums[0, STEP_SUMS.index(name)].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_gradient_of_a_float64_parameter_is_computed_with_in_float64(backend: str) -> None:
    first, second = (torch.ones(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    first.grad_dtype = torch.float32
    first.grad = torch.linspace(0.1, 0.7, 5)
    second.grad = first.grad.double()
    for param in (first, second):
        optimizer = optim.AdamW([param], lr=0.1, backend=backend)
        optimizer.divisor = torch.tensor(3.0)
        optimizer.step()
        optimizer.step()
    assert torch.equal(first, second)
