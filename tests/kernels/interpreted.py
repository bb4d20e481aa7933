"""The Triton backend on the CPU, under Triton's interpreter; run by `test_triton_interpreter` in its own process.

Triton decides when it is imported whether to interpret, so this cannot share a process with tests that compile.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import kernels, optim
from lightning_optim.kernels import measure
from lightning_optim.kernels.symmetric import Products
from lightning_optim.kernels.triton import launch as launching
from lightning_optim.kernels.triton import symmetric
from lightning_optim.kernels.triton.functions import add_blocks, add_squares
from lightning_optim.optim import gram_form, newton_schulz
from lightning_optim.optim.newton_schulz import orthogonalize
from tests.kernels.bfloat16 import round_as_hardware_does
from tests.optim.cases import (
    CASES,
    Case,
    Setting,
    assert_same,
    each_kernel,
    give,
    gradients,
    parameters,
)
from tests.optim.test_backends_agree import laid_out
from tests.optim.test_rules import Custom, TrustRatioRule

# 5003 elements take two programs, each with whole blocks, and a rest.
TENSORS = (
    ((), "plain"),
    ((0,), "plain"),
    ((13,), "odd_offset"),
    ((3, 0), "plain"),
    ((7, 11), "transposed"),
    ((4, 3, 2), "channels_last_like"),
    ((521,), "strided"),
    ((5003,), "plain"),
)


@pytest.fixture(autouse=True)
def _bfloat16_as_hardware_rounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    round_as_hardware_does(monkeypatch.setattr)


ELEMENTWISE = tuple(case for case in CASES if case.elementwise)


class Launches(list[tuple[Any, int, tuple[Any, ...]]]):
    """Every launch: function, programs, arguments."""

    only_count = False

    def of_rules(self) -> list[Any]:
        """The functions that did more than add up block sums."""
        return [function for function, _, _ in self if function not in (add_blocks, add_squares)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches()
    original = launching.launch

    def launch(function: Any, programs: int, device: torch.device, *arguments: Any) -> None:
        seen.append((function, programs, arguments))
        if not seen.only_count:
            original(function, programs, device, *arguments)

    monkeypatch.setattr("lightning_optim.kernels.triton.backend.launch", launch)
    return seen


def mixed(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [laid_out(shape, layout, dtype, generator) for shape, layout in TENSORS]


def pair(case: Case, setting: Setting, dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[list[Tensor]]]:
    params = [mixed(dtype), mixed(dtype)]
    names = ("reference", "triton")
    return [case.optimizer(p, **setting.arguments, backend=n) for p, n in zip(params, names, strict=True)], params


def assert_close_states(first: Any, second: Any, rtol: float, atol: float) -> None:
    for a, b in zip(*(o.state_dict()["state"].values() for o in (first, second)), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            # State has units of its own: RMSprop's momentum adds terms of ±10, and what cancels keeps their rounding.
            largest = float(a[key].abs().max()) if a[key].numel() else 0.0
            scaled = 4 * torch.finfo(torch.float32).eps * largest
            torch.testing.assert_close(b[key], a[key], rtol=rtol, atol=max(atol, scaled))


@pytest.mark.parametrize(("case", "setting"), each_kernel(ELEMENTWISE))
def test_agrees_with_reference(case: Case, setting: Setting) -> None:
    """Shapes, layouts, missing gradients, divisors [] and [tensors], a skipped step, step sums."""
    optimizers, (expected, got) = pair(case, setting)
    missing = 2
    for step, grads in enumerate(gradients(expected, 4)):
        for optimizer, params in zip(optimizers, (expected, got), strict=True):
            give(params, grads)
            params[missing].grad = None
            optimizer.divisor = torch.tensor(0.5) if step == 0 else torch.linspace(0.5, 3.0, len(params) - 1)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.collect_step_stats = step >= 2
            optimizer.step()
        if step >= 2:
            a, b = (optimizer.step_stats for optimizer in optimizers)
            assert (a.group_sizes, a.numel) == (b.group_sizes, b.numel)
            torch.testing.assert_close(b.sums, a.sums, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert b.sums.isnan().all() == (step == 2)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert_close_states(optimizers[0], optimizers[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("case", "setting"), each_kernel(ELEMENTWISE))
def test_a_skipped_step_writes_nothing(case: Case, setting: Setting) -> None:
    params = mixed(torch.float32)
    optimizer = case.optimizer(params, **setting.arguments, backend="triton")
    steps = list(gradients(params, 2))
    give(params, steps[0])
    optimizer.step()
    before = (
        [p.detach().clone() for p in params],
        {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()},
    )
    give(params, steps[1])
    optimizer.found_inf = torch.ones(())
    optimizer.divisor = torch.tensor(float("nan"))
    optimizer.step()
    assert_same(before, ([p.detach() for p in params], optimizer.state_dict()["state"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.Lion])
def test_dtypes(optimizer_class: Any, dtype: torch.dtype) -> None:
    params = [mixed(dtype), mixed(dtype)]
    first, second = (optimizer_class(p, 1e-2, backend=n) for p, n in zip(params, ("reference", "triton"), strict=True))
    for grads in gradients(params[0], 3):
        for optimizer, own in zip((first, second), params, strict=True):
            give(own, grads)
            optimizer.step()
    ulp = torch.finfo(dtype).eps
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(b, a, rtol=2 * ulp, atol=2 * ulp)
    assert_close_states(first, second, rtol=1e-5 if dtype != torch.float64 else 1e-13, atol=1e-6)


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32])
def test_narrower_states_are_widened(param_dtype: torch.dtype) -> None:
    params = [mixed(param_dtype), mixed(param_dtype)]
    both = [optim.AdamW(p, 1e-2, backend=n) for p, n in zip(params, ("reference", "triton"), strict=True)]
    for step, grads in enumerate(gradients(params[0], 3)):
        for optimizer, own in zip(both, params, strict=True):
            give(own, grads)
            with pytest.warns(UserWarning, match="is converted to float32") if step == 1 else nullcontext():
                optimizer.step()
            if step == 0:
                for state in optimizer.state.values():
                    state["exp_avg"] = state["exp_avg"].bfloat16()
                    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
    assert_close_states(both[0], both[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("cautious", [False, True])
def test_a_rule_with_sums(cautious: bool, launches: Launches) -> None:
    params = [mixed(torch.float32), mixed(torch.float32)]
    both = [
        Custom(p, 0.1, TrustRatioRule(), weight_decay=0.2, cautious=cautious, backend=n)
        for p, n in zip(params, ("reference", "triton"), strict=True)
    ]
    for grads in gradients(params[0], 3):
        for optimizer, own in zip(both, params, strict=True):
            give(own, [g.abs() + 0.1 for g in grads])
            optimizer.step()
    filled = [i for i, p in enumerate(params[0]) if p.numel()]  # 0/0 for the others, in both
    for i in filled:
        torch.testing.assert_close(params[1][i], params[0][i], rtol=1e-5, atol=1e-5)
        assert_close_values = both[0].state[params[0][i]]["travelled"], both[1].state[params[1][i]]["travelled"]
        torch.testing.assert_close(*assert_close_values, rtol=1e-5, atol=0)
    assert len(launches.of_rules()) == 3 * (3 if cautious else 2)


def test_not_a_number_reaches_the_parameters_and_nothing_else() -> None:
    params = parameters(Case(optim.AdamW, torch.optim.AdamW, ()), shapes=((5,), (600,)))
    optimizer = optim.AdamW(params, backend="triton")
    give(params, [torch.ones(5), torch.full((600,), torch.inf).index_fill(0, torch.tensor(3), torch.nan)])
    optimizer.step()
    assert params[0].isfinite().all()
    assert params[1].isnan().all()


def test_one_launch_for_all_tensors_of_a_kind(launches: Launches) -> None:
    params = [torch.randn(n % 7 + 1, dtype=(torch.float32, torch.float64)[n % 2]) for n in range(200)]
    optimizer = optim.AdamW([p.requires_grad_() for p in params], backend="triton")
    give(params, [torch.ones_like(p) for p in params])
    launches.only_count = True
    optimizer.step()
    assert [programs for _, programs, _ in launches] == [100, 100]
    launches.clear()
    optimizer.collect_step_stats = True
    optimizer.step()
    assert len(launches) == 4
    assert len(launches.of_rules()) == 2
    launches.clear()
    measure_with_triton([p.grad for p in params if p.dtype == torch.float32])
    assert len(launches.of_rules()) == 1


def test_values_that_change_compile_nothing_and_upload_no_addresses(launches: Launches) -> None:
    params = [torch.randn(9, requires_grad=True), torch.randn(4, requires_grad=True)]
    optimizer = optim.AdamW(params, backend="triton")
    give(params, [torch.ones_like(p) for p in params])
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.divisor = torch.tensor(1.0 + step)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    functions, programs, arguments = zip(*launches, strict=True)
    assert len(set(functions)) == len(set(programs)) == 1
    # Triton keys what it compiled by the dtypes of such arguments; none is a number.
    kinds = {tuple(argument.dtype for argument in own) for own in arguments}
    assert kinds == {(torch.int64, torch.int64, torch.float32, torch.float32, torch.float32)}
    blocks, addresses = zip(*(own[:2] for own in arguments), strict=True)
    assert len({id(table) for table in (*blocks, *addresses)}) == 2
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert launches[-1][2][0] is blocks[0]
    assert launches[-1][2][1] is not addresses[0]


def measure_with_triton(grads: Any) -> Tensor:
    return kernels.get_backend("triton").measure(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_automatic", lambda device_type: kernels.get_backend("triton"))
    grads = [p.detach() for p in mixed(dtype)]
    got = measure(grads)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.double(), torch.stack([g.double().square().sum() for g in grads]), rtol=1e-6, atol=0)
    grads[7][4321] = torch.inf
    assert measure(grads).isfinite().tolist() == [True] * 7 + [False]


def test_nothing_but_the_interpreter_runs_on_this_device() -> None:
    assert "interpreter runs on the CPU only" in str(kernels.why_not("triton", torch.device("cuda")))


def test_step_counts_of_several_dtypes() -> None:
    """Some may have been loaded from a run with another default dtype."""
    optimizers, weights = [], []
    for backend in ("reference", "triton"):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        optimizer = optim.AdamW(params, lr=0.1, backend=backend)
        for step in range(4):
            if step == 1:
                optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].double()
                optimizer.state[params[2]]["step"] = optimizer.state[params[2]]["step"].long()
            for i, param in enumerate(params):
                param.grad = torch.full((3,), float(i + step))
            optimizer.step()
        optimizers.append(optimizer)
        weights.append([param.detach() for param in params])
    assert_close_states(optimizers[0], optimizers[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_a_divisor_of_any_strides() -> None:
    weights = []
    for backend in ("reference", "triton"):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
        optimizer = optim.SGD(params, lr=0.1, backend=backend)
        for param in params:
            param.grad = torch.ones(3)
        optimizer.divisor = torch.tensor([[2.0, 100.0], [4.0, 100.0], [8.0, 100.0]])[:, 0]
        optimizer.step()
        weights.append([param.detach() for param in params])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "tile"), [((1, 1), 16), ((16, 16), 16), ((37, 50), 16), ((3, 40, 21), 32)])
def test_half_of_the_tiles_make_the_whole_of_a_symmetric_product(shape, tile, dtype, monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", tile)
    monkeypatch.setattr(symmetric, "STEP", 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tall = x.mT.contiguous().mT
    add = torch.eye(shape[-2], dtype=dtype).expand(*shape[:-1], shape[-2])
    exact = x.double() @ x.double().mT
    ulp = torch.finfo(dtype).eps
    largest = exact.abs().max().item()
    for given in (x, tall):
        got = symmetric.product(given, given.mT)
        torch.testing.assert_close(got.double(), exact, rtol=ulp, atol=ulp * largest / 10)
        got = symmetric.add_product(add, given, given.mT, beta=-2.0, alpha=0.5)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), 0.5 * exact - 2 * add.double(), rtol=ulp, atol=ulp * largest / 10)
        assert torch.equal(got.tril(-1), got.mT.tril(-1))
    gram = got
    square = gram.double() @ gram.double()
    got = symmetric.add_product(gram, gram, gram)
    torch.testing.assert_close(
        got.double(), gram.double() + square, rtol=ulp, atol=ulp * square.abs().max().item() / 10
    )


def test_every_tile_below_the_diagonal_is_written_once_with_its_mirror_image(monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", 16)
    for rows in (160, 16 * 11 + 1):
        x = torch.ones(rows, 16, dtype=torch.bfloat16)
        assert (symmetric.product(x, x.mT) == 16).all()


@pytest.mark.parametrize("gram", [False, True])
def test_newton_schulz_does_the_same_with_half_of_the_tiles(gram, monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", 16)
    x = torch.randn(2, 24, 80, generator=torch.Generator().manual_seed(0))
    (whole,) = orthogonalize([x], gram=gram)
    halved = Products(symmetric.product, symmetric.add_product)
    for module in (newton_schulz, gram_form):
        monkeypatch.setattr(module, "symmetric_products", lambda *_: halved)
    (half,) = orthogonalize([x], gram=gram)
    torch.testing.assert_close(half.float(), whole.float(), rtol=0, atol=0.02)
