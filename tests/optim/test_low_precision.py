"""bf16 and fp16 parameters: small changes survive, noise is reproducible, backends agree."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.kernels import rounding
from tests.helpers import through_a_file
from tests.optim.cases import BACKENDS, assert_same, copies, give, gradients, run

KAHAN, STOCHASTIC = {"kahan_sum": True}, {"stochastic_rounding": True}
CORRECTED: dict[str, Any] = {"kahan_sum": True, "kahan_bits": 8}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_flag = pytest.mark.parametrize("flag", [KAHAN, STOCHASTIC, CORRECTED], ids=["kahan", "stochastic", "24bits"])
each_optimizer = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p, **k: optim.AdamW(p, **k), id="AdamW"),
        pytest.param(lambda p, **k: optim.Adam(p, **{"weight_decay_kind": "decoupled"} | k), id="Adam"),
        pytest.param(lambda p, **k: optim.Lion(p, **k), id="Lion"),
        pytest.param(lambda p, **k: optim.SGD(p, **{"weight_decay_kind": "decoupled", "momentum": 0.9} | k), id="SGD"),
    ],
)


def weights(dtype: torch.dtype = torch.bfloat16, n: int = 20_000, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n // 100, 100), (n,))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def test_every_optimizer_takes_the_flags() -> None:
    for name in optim.list_optimizers():
        cls: Any = optim.get_optimizer_class(name)
        taken = cls.hyperparameters()
        assert {"kahan_sum", "stochastic_rounding", "state_bits"} <= taken.keys(), name


@each_backend
@each_optimizer
@pytest.mark.parametrize(
    ("dtype", "flag", "expected"),
    [
        (torch.bfloat16, KAHAN, 0.9512),
        (torch.bfloat16, STOCHASTIC, 0.9512),
        (torch.bfloat16, CORRECTED, 0.9512),
        (torch.float16, KAHAN, 0.9512),
        (torch.float32, {}, 0.9512),  # the control
        (torch.bfloat16, {}, 1.0),  # what the flags are for
    ],
    ids=["bf16-kahan", "bf16-stochastic", "bf16-24bits", "fp16-kahan", "fp32", "bf16"],
)
def test_weight_decay_survives(make: Any, backend: str, dtype: torch.dtype, flag: Any, expected: float) -> None:
    (param, _) = weights(dtype, 5_000)
    before = param.detach().double()  # a copy, for every dtype
    optimizer = make([param], lr=1e-3, weight_decay=0.1, backend=backend, **flag)
    param.grad = torch.zeros_like(param)
    for _ in range(500):
        optimizer.step()
    assert float((param.detach().double() / before).mean()) == pytest.approx(expected, abs=1e-3)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kahan_follows_float32(dtype: torch.dtype, backend: str) -> None:
    """Parameter plus compensation is worth twice the digits: compared with float32 weights of the same history."""
    params = weights(dtype, 1_000)
    wide = [p.detach().float().requires_grad_() for p in params]
    ours = optim.AdamW(params, lr=1e-4, kahan_sum=True, backend=backend)
    plain = optim.AdamW(wide, lr=1e-4, backend=backend)
    for grads in gradients(params, 100):
        give(params, grads)
        give(wide, [g.float() for g in grads])
        ours.step()
        plain.step()
    for a, b in zip(params, wide, strict=True):
        compensated = a.detach().float() + ours.state[a]["kahan_comp"].float()
        assert ours.state[a]["kahan_comp"].dtype == dtype
        error, without = (compensated - b).abs().mean(), (a - b).abs().mean()
        assert error < 0.1 * without


@each_flag
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_as_without_the_flags(dtype: torch.dtype, flag: Any) -> None:
    params = weights(dtype, 500)
    others = copies(params)
    one, other = optim.AdamW(params, **flag), optim.AdamW(others)
    run(one, params, 3)
    run(other, others, 3)
    assert_same(params, others)
    assert_same(one.state_dict()["state"], other.state_dict()["state"])


@each_flag
@each_optimizer
def test_backends_store_alike(make: Any, flag: Any) -> None:
    """Powers of two make every number before the rounding exact, so that only the storing could differ."""
    sets = [weights(seed=3) for _ in BACKENDS]
    for params, backend in zip(sets, BACKENDS, strict=True):
        params[1] = params[1].detach().view(20, 10, 100).permute(2, 0, 1).requires_grad_()  # not contiguous
        optimizer = make(params, lr=2**-8, weight_decay=2**-4, backend=backend, **flag)
        for param in params:
            param.grad = torch.zeros_like(param)
        for _ in range(20):
            optimizer.step()
    assert_same(*sets)
    assert not torch.equal(sets[0][0], weights(seed=3)[0])


@each_flag
@each_optimizer
def test_backends_agree_on_gradients(make: Any, flag: Any) -> None:
    """Apart from values so near to a rounding boundary that the order of operations decides."""
    sets = [weights(seed=4) for _ in BACKENDS]
    for params, backend in zip(sets, BACKENDS, strict=True):
        run(make(params, lr=1e-3, backend=backend, **flag), params, 5)
    for a, b in zip(*sets, strict=True):
        assert (a != b).float().mean() < 0.01
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased_and_picks_neighbours(backend: str) -> None:
    n = 200_000
    for fraction in (0.0, 0.1, 0.5, 0.9):
        param = torch.ones(n, dtype=torch.bfloat16, requires_grad=True)
        optimizer = optim.SGD([param], lr=1.0, stochastic_rounding=True, backend=backend)
        param.grad = torch.full_like(param, -fraction / 128)  # bf16 has steps of 1/128 above 1
        optimizer.step()
        exact = 1 + float(-param.grad[0])
        values = param.detach().double()
        assert set(values.unique().tolist()) <= {1.0, 1 + 1 / 128}
        assert float(values.mean()) == pytest.approx(exact, abs=5 / 128 * 0.5 / n**0.5)


def test_infinity_and_nan_stay() -> None:
    for backend in BACKENDS:
        param = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
        optimizer = optim.SGD([param], lr=1.0, stochastic_rounding=True, backend=backend)
        param.grad = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=torch.bfloat16)
        optimizer.step()
        assert_same(param.detach(), torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0], dtype=torch.bfloat16))


def test_noise_is_uniform_and_independent() -> None:
    n = 100_000
    index = torch.arange(n)
    key = torch.tensor(rounding.first_key(0, 0))
    streams = [
        rounding.noise(index, rounding.slot_key(key, 0)),
        rounding.noise(index, rounding.slot_key(key, 2)),
        rounding.noise(index, rounding.slot_key(rounding.next_key(key), 0)),
        rounding.noise(index, rounding.slot_key(torch.tensor(rounding.first_key(0, 1)), 0)),
        rounding.noise(index, rounding.slot_key(torch.tensor(rounding.first_key(1, 0)), 0)),
    ]
    low = torch.stack([(s & 0xFFFF).double() / 65536 for s in streams])
    assert torch.allclose(low.mean(1), torch.tensor(0.5, dtype=torch.float64), atol=4 * 0.289 / n**0.5)
    correlations = torch.corrcoef(torch.cat([low, low.roll(1, 1)]))
    assert (correlations - torch.eye(10)).abs().max() < 5 / n**0.5
    bits = torch.stack([(streams[0] >> b) & 1 for b in range(32)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 5 * 0.5 / n**0.5


def test_noise_on_python_integers_is_that_on_tensors() -> None:
    key = rounding.slot_key(rounding.first_key(5, 7), 0)
    index = torch.tensor([0, 1, 2**31, 2**32 + 3])
    assert rounding.noise(index, torch.tensor(key)).tolist() == [rounding.noise(i, key) for i in index.tolist()]


@each_backend
def test_noise_does_not_depend_on_threads_and_other_tensors(backend: str) -> None:
    results = []
    for threads, grads in ((1, (0, 1)), (2, (0, 1)), (1, (1,))):
        torch.set_num_threads(threads)
        params = weights(n=200_000)
        optimizer = optim.AdamW(params, lr=1e-3, stochastic_rounding=True, backend=backend)
        for i in grads:
            params[i].grad = torch.ones_like(params[i])
        optimizer.step()
        results.append(params[1].detach())
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_seed_of_ones_own() -> None:
    results = []
    for seed in (0, 0, 1):
        (param, _) = weights()
        optimizer = optim.AdamW([{"params": [param], "rounding_seed": seed}], stochastic_rounding=True)
        param.grad = torch.ones_like(param)
        optimizer.step()
        results.append(param.detach())
    assert_same(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@each_backend
@each_flag
@each_optimizer
def test_resuming_is_bit_equal(make: Any, flag: Any, backend: str) -> None:
    params = weights(n=1_000)
    optimizer = make(params, lr=1e-3, backend=backend, **flag)
    run(optimizer, params, 3)
    resumed = copies(params)
    fresh = make(resumed, lr=1e-3, backend=backend, **flag)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    copy = deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    run(optimizer, params, 10, seed=2)
    for other in (fresh, copy, pickled):
        own = [p for g in other.param_groups for p in g["params"]]
        run(other, own, 10, seed=2)
        assert_same(params, own)
        assert_same(optimizer.state_dict(), other.state_dict())


@each_backend
@each_flag
@each_optimizer
def test_a_skipped_step_changes_nothing(make: Any, flag: Any, backend: str) -> None:
    params = weights(n=1_000)
    optimizer = make(params, lr=1e-3, backend=backend, **flag)
    run(optimizer, params, 2)
    before = deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    optimizer.found_inf = torch.ones(())
    optimizer.collect_step_stats = True
    run(optimizer, params, 2)
    assert_same(before, (optimizer.state_dict(), [p.detach() for p in params]))
    del optimizer.found_inf
    run(optimizer, params, 1)
    assert optimizer.step_stats is not None
    assert optimizer.step_stats.sums[:, :2].isfinite().all()


@each_backend
def test_flags_work_with_cautious_and_per_group(backend: str) -> None:
    params = weights(n=1_000)
    optimizer = optim.AdamW(
        [{"params": params[:1]}, {"params": params[1:], "kahan_sum": False, "stochastic_rounding": True}],
        cautious=True,
        kahan_sum=True,
        backend=backend,
    )
    run(optimizer, params, 2)
    assert "kahan_comp" in optimizer.state[params[0]]
    assert "rounding_key" in optimizer.state[params[1]]
    assert "kahan_comp" not in optimizer.state[params[1]]


@pytest.mark.parametrize(
    ("dtype", "arguments", "message"),
    [
        (torch.bfloat16, {"kahan_sum": True, "stochastic_rounding": True}, "choose one"),
        (torch.float16, {"stochastic_rounding": True}, "is float16.*bfloat16"),
        (torch.bfloat16, {"kahan_sum": 1}, "kahan_sum=1: must be True or False"),
    ],
)
def test_what_cannot_work_is_refused(dtype: torch.dtype, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(weights(dtype, 200), **arguments)


def test_a_backend_that_does_not_know_the_flags_leaves_them_to_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.kernels.cpu.backend import CpuBackend

    monkeypatch.setattr(CpuBackend, "low_precision", False)
    monkeypatch.setattr(CpuBackend, "apply", None)
    params, expected = weights(n=200), weights(n=200)
    run(optim.AdamW(params, kahan_sum=True, backend="cpu"), params, 1)
    run(optim.AdamW(expected, kahan_sum=True, backend="reference"), expected, 1)
    assert_same(params, expected)


@each_flag
@pytest.mark.parametrize("optimizer_class", [optim.Muon, optim.NorMuon, optim.SOAP, optim.Adafactor])
def test_rules_of_matrices_take_the_flags(optimizer_class: Any, flag: dict[str, Any]) -> None:
    param = torch.randn(64, 48).bfloat16().requires_grad_()
    begin = param.detach().double()
    optimizer = optimizer_class([param], lr=1e-3, weight_decay=0.1, **flag)
    param.grad = torch.zeros_like(param)
    for _ in range(200):
        optimizer.step()
    # bf16 alone would leave it at 1. SOAP's first step only finds its bases.
    assert float((param.detach().double() / begin).mean()) == pytest.approx((1 - 1e-4) ** 200, abs=2e-3)
    kept = "kahan_comp" if flag is KAHAN else "rounding_key"
    assert kept in optimizer.state[param]
    state = through_a_file(optimizer.state_dict())
    assert_same(state["state"], optimizer.state_dict()["state"])
