"""The Triton backend on a GPU: what the interpreter and the compiler alone cannot show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import kernels, optim
from lightning_optim.kernels.triton import symmetric
from tests.optim.cases import Case, Setting, assert_same, each_setting, give, gradients
from tests.optim.test_backends_agree import laid_out
from tests.optim.test_rules import Custom, TrustRatioRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU"),
]

DEVICE = torch.device("cuda")
TENSORS = (
    ((), "plain"),
    ((0,), "plain"),
    ((13,), "odd_offset"),
    ((7, 11), "transposed"),
    ((4, 3, 2), "channels_last_like"),
    ((521,), "strided"),
    ((1031, 257), "plain"),
    ((4, 1024, 1024), "plain"),
)


def mixed(dtype: torch.dtype = torch.float32, aligned: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    layouts = [(shape, "plain" if aligned else layout) for shape, layout in TENSORS]
    made = []
    for shape, layout in layouts:
        tensor = laid_out(shape, layout, dtype, generator).detach()
        # `to` would make it dense: rebuild the layout over there.
        base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype, device=DEVICE)
        there = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        made.append(there.copy_(tensor).requires_grad_())
    return made


def arguments_of(case: Case, setting: Setting) -> dict[str, Any]:
    """Those of the setting; a tensor of three dimensions is one matrix, as the others are."""
    flat = {"flatten": True} if "flatten" in case.optimizer.hyperparameters() else {}
    return {**setting.arguments, **flat}


def on_device(params: list[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    on_host = [torch.empty(p.shape, dtype=p.dtype) for p in params]
    return [[g.to(DEVICE) for g in grads] for grads in gradients(on_host, steps, seed)]


def assert_agree(got: list[Tensor], expected: list[Tensor], rtol: float, atol: float) -> None:
    """Close, but for one element in 100 000: the sign of a sum that cancels hangs on how its terms were rounded."""
    apart = sum((~torch.isclose(a, b, rtol=rtol, atol=atol)).sum() for a, b in zip(got, expected, strict=True))
    assert apart <= 1e-5 * sum(p.numel() for p in got)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_is_the_automatic_choice() -> None:
    assert kernels.choose("auto", DEVICE).name == "triton"


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_agrees_with_reference(case: Case, setting: Setting, aligned: bool) -> None:
    both = [mixed(aligned=aligned), mixed(aligned=aligned)]
    names = ("reference", "triton")
    optimizers = [case.optimizer(p, **arguments_of(case, setting), backend=n) for p, n in zip(both, names, strict=True)]
    for step, grads in enumerate(on_device(both[0], 5)):
        for optimizer, params in zip(optimizers, both, strict=True):
            give(params, grads)
            params[2].grad = None
            optimizer.divisor = torch.tensor(0.5, device=DEVICE) if step else torch.linspace(1, 2, 7, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step == 2), device=DEVICE)
            optimizer.collect_step_stats = step >= 2
            optimizer.step()
        if step >= 2:
            torch.testing.assert_close(
                optimizers[1].step_stats.sums, optimizers[0].step_stats.sums, rtol=1e-4, atol=1e-4, equal_nan=True
            )
    assert_agree(both[1], both[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.Lion])
def test_dtypes(optimizer_class: Any, dtype: torch.dtype) -> None:
    both = [mixed(dtype), mixed(dtype)]
    first, second = (optimizer_class(p, 1e-2, backend=n) for p, n in zip(both, ("reference", "triton"), strict=True))
    for grads in on_device(both[0], 5):
        for optimizer, own in zip((first, second), both, strict=True):
            give(own, grads)
            optimizer.step()
    ulp = torch.finfo(dtype).eps
    assert_agree(both[1], both[0], rtol=2 * ulp, atol=2 * ulp)


def test_a_rule_with_sums() -> None:
    both = [mixed()[5:], mixed()[5:]]
    optimizers = [
        Custom(p, 0.1, TrustRatioRule(), weight_decay=0.2, backend=n)
        for p, n in zip(both, ("reference", "triton"), strict=True)
    ]
    for grads in on_device(both[0], 3):
        for optimizer, own in zip(optimizers, both, strict=True):
            give(own, grads)
            optimizer.step()
    assert_agree(both[1], both[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_a_skipped_step_changes_nothing(case: Case, setting: Setting) -> None:
    params = mixed()
    optimizer = case.optimizer(params, **arguments_of(case, setting), backend="triton")
    steps = on_device(params, 2)
    give(params, steps[0])
    optimizer.step()
    before = deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    for group in before[0]["param_groups"]:  # The host counts calls; that one was skipped it cannot know.
        if "calls" in group:
            group["calls"] += 1
    give(params, [g * math.nan for g in steps[1]])
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.collect_step_stats = True
    optimizer.step()
    assert_same(before, (optimizer.state_dict(), [p.detach() for p in params]))
    assert optimizer.step_stats is not None
    assert optimizer.step_stats.sums.isnan().all()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("make", [optim.AdamW, optim.Lion, lambda p, **k: Custom(p, 0.1, TrustRatioRule(), **k)])
def test_the_host_waits_for_nothing(make: Any, cautious: bool) -> None:
    """Several groups, dtypes, a divisor per tensor, a changing learning rate, step sums."""
    params = [*mixed(aligned=True)[5:], *mixed(torch.bfloat16)[5:]]
    optimizer = make([{"params": params[::2]}, {"params": params[1::2], "lr": 1e-3}], cautious=cautious)
    steps = on_device(params, 4)
    give(params, steps[0])
    optimizer.step()  # compiles
    optimizer.collect_step_stats = True
    optimizer.step()
    for grads in steps[1:]:
        give(params, grads)
        with no_waiting():
            norms = kernels.measure([p.grad for p in params if p.grad is not None])
            optimizer.divisor = norms.sqrt().clamp(min=1.0)
            optimizer.found_inf = (~norms.sum().isfinite()).float()
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()
    assert all(p.isfinite().all() for p in params)


def test_a_changing_learning_rate_compiles_nothing() -> None:
    triton = pytest.importorskip("triton")
    params = mixed(aligned=True)
    optimizer = optim.AdamW(params, backend="triton")
    give(params, on_device(params, 1)[0])
    optimizer.step()
    compiled = []
    kept = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs)
    try:
        for lr in (1.0, 0.5, 1e-3, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.found_inf = torch.zeros(3, device=DEVICE)[1]  # an address of another alignment
            optimizer.step()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = kept
    assert not compiled


def test_results_are_the_same_every_time() -> None:
    results = []
    for _ in range(5):
        params = mixed(aligned=True)
        optimizer = optim.AdamW(params, 1e-2, cautious=True, backend="triton")
        optimizer.collect_step_stats = True
        for grads in on_device(params, 2):
            give(params, grads)
            optimizer.step()
        assert optimizer.step_stats is not None
        norms = kernels.measure([p.grad for p in params if p.grad is not None])
        results.append((optimizer.step_stats.sums, norms, [p.detach() for p in params]))
    for other in results[1:]:
        assert_same(results[0], other)


def test_norms() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grads = [p.detach() for p in mixed(dtype)]
        expected = torch.stack([g.double().square().sum() for g in grads])
        torch.testing.assert_close(kernels.measure(grads).double(), expected, rtol=1e-5, atol=0)


def test_works_under_grad_scaler() -> None:
    param = torch.ones(3, device=DEVICE, requires_grad=True)
    optimizer = optim.AdamW([param], lr=0.1, weight_decay=0.0, backend="triton")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for factor in (1.0, math.inf, 1.0):
        before = param.detach().clone()
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param.detach()) == (factor != 1.0)
    assert float(optimizer.state[param]["step"]) == 2.0


def test_on_another_stream() -> None:
    both = [mixed(aligned=True), mixed(aligned=True)]
    steps = on_device(both[0], 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for params, stream in zip(both, (torch.cuda.current_stream(), side), strict=True):
        with torch.cuda.stream(stream):
            optimizer = optim.AdamW(params, backend="triton")
            for grads in steps:
                give(params, grads)
                optimizer.step()
    torch.cuda.synchronize()
    assert_same([p.detach() for p in both[0]], [p.detach() for p in both[1]])


def test_a_graph_capture_is_refused() -> None:
    params = mixed(aligned=True)
    optimizer = optim.AdamW(params, backend="triton")
    give(params, on_device(params, 1)[0])
    optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's GPUs use torch's products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(129, 70), (3, 520, 200), (4096, 4096), (4100, 8192)])
def test_symmetric_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE, dtype=dtype) / math.sqrt(shape[-1])
    add = torch.eye(shape[-2], device=DEVICE, dtype=dtype).expand(*shape[:-1], shape[-2])
    exact = x.float() @ x.float().mT  # in TF32 at most for float32; the products of 16-bit numbers are exact in it
    for given in (x, x.mT.contiguous().mT):
        symmetric.product(given, given.mT)  # compiled
        with no_waiting():
            plain = symmetric.product(given, given.mT)
            added = symmetric.add_product(add, given, given.mT, beta=-2.0, alpha=0.5)
        torch.testing.assert_close(plain.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
        torch.testing.assert_close(added.float(), exact / 2 - 2 * add, rtol=torch.finfo(dtype).eps, atol=1e-3)
