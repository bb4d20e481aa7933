"""Schedule-Free AdamW: the switch between the weights trained and the weights used."""

from __future__ import annotations

import pytest
import schedulefree
import torch
from torch import Tensor

from lightning_optim import optim
from tests.optim.cases import BACKENDS, Case, assert_same, copies, give, gradients, parameters, run

CASE = Case(optim.ScheduleFreeAdamW, schedulefree.AdamWScheduleFree, ())


@pytest.mark.parametrize("flags", [{"kahan_sum": True}, {"stochastic_rounding": True}], ids=["kahan", "stochastic"])
def test_small_changes_of_bf16_weights_survive(flags: dict[str, bool]) -> None:
    """y follows that of float32 weights and is restored bit for bit; x is rounded once, not from a rounded y."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4000, generator=generator).bfloat16().float().requires_grad_()
    narrow = wide.detach().bfloat16().requires_grad_()
    plain = narrow.detach().clone().requires_grad_()
    made = [
        optim.ScheduleFreeAdamW([weight], lr=1e-4, weight_decay=0.1, **extra)
        for weight, extra in ((wide, {}), (narrow, flags), (plain, {}))
    ]
    for _ in range(200):
        for weight, optimizer in zip((wide, narrow, plain), made, strict=True):
            weight.grad = torch.full_like(weight, 0.5)
            optimizer.step()
    moved = [float((weight.detach().float() - wide.detach()).mean().abs()) for weight in (narrow, plain)]
    assert moved[0] < 0.05 * moved[1]
    y = narrow.detach().clone()
    made[0].eval()
    made[1].eval()
    if "kahan_sum" in flags:
        assert float((narrow != wide.bfloat16()).float().mean()) < 0.1
    made[1].train()
    assert torch.equal(narrow, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [16, 8])
def test_the_second_moment_in_fewer_bits_steps_alike(bits: int, backend: str) -> None:
    sets = [parameters(CASE, shapes=((100, 50),)) for _ in range(2)]
    for params, kept in zip(sets, (32, bits), strict=True):
        optimizer = optim.ScheduleFreeAdamW(params, lr=1e-2, state_bits=kept, backend=backend)
        before = params[0].detach().clone()
        run(optimizer, params, 20)
        params[0] = params[0].detach() - before
        dtypes = {name: tensor.dtype for name, tensor in next(iter(optimizer.state.values())).items()}
        assert dtypes["z"] == torch.float32
        assert dtypes["exp_avg_sq"] == {32: torch.float32, 16: torch.bfloat16, 8: torch.uint8}[kept]
    (full,), (low,) = sets
    assert float((full - low).norm() / full.norm()) < 0.05


def values(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_average_is_the_published_one(backend: str) -> None:
    ours, theirs = parameters(CASE, torch.float64), parameters(CASE, torch.float64)
    optimizer = optim.ScheduleFreeAdamW(ours, lr=0.01, weight_decay=0.1, warmup_steps=4, backend=backend)
    reference = schedulefree.AdamWScheduleFree(theirs, lr=0.01, weight_decay=0.1, warmup_steps=4)
    reference.train()
    for step, grads in enumerate(gradients(ours, 30)):
        give(ours, grads)
        give(theirs, grads)
        optimizer.step()
        reference.step()
        if step % 7 == 0:
            for one in (optimizer, reference):
                one.eval()
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            for one in (optimizer, reference):
                one.train()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_average_is_that_of_z() -> None:
    """With equal weights x is the plain mean of the points z has been at."""
    params = parameters(CASE, torch.float64)
    optimizer = optim.ScheduleFreeAdamW(params, lr=0.01)
    visited = []
    for grads in gradients(params, 6):
        visited.append([optimizer.state[p].get("z", p).detach().clone() for p in params])
        give(params, grads)
        optimizer.step()
    means = [torch.stack(points).mean(0) for points in zip(*visited[1:], strict=True)]
    last = [optimizer.state[p]["z"] for p in params]
    optimizer.eval()
    for i, param in enumerate(params):
        torch.testing.assert_close(param.detach(), (means[i] * 5 + last[i]) / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_leaves_training_as_if_it_had_not_been(dtype: torch.dtype) -> None:
    first = parameters(CASE, dtype)
    second = copies(first)
    one, other = optim.ScheduleFreeAdamW(first, lr=0.1), optim.ScheduleFreeAdamW(second, lr=0.1)
    for seed in range(3):
        run(one, first, 2, seed)
        run(other, second, 2, seed)
        before = values(first)
        one.eval()
        one.eval()
        assert not any(torch.equal(a, b) for a, b in zip(before, first, strict=True))
        one.train()
        one.train()
        assert_same(values(first), values(second))
        assert_same(one.state_dict(), other.state_dict())


def test_a_checkpoint_of_evaluation_mode_goes_on_bit_exactly() -> None:
    params = parameters(CASE)
    optimizer = optim.ScheduleFreeAdamW(params, lr=0.1)
    run(optimizer, params, 3)
    optimizer.eval()
    resumed = [p.requires_grad_() for p in values(params)]
    fresh = optim.ScheduleFreeAdamW(resumed, lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    for one, its in ((optimizer, params), (fresh, resumed)):
        one.train()
        run(one, its, 5, seed=2)
    assert_same(params, resumed)
    assert_same(optimizer.state_dict(), fresh.state_dict())


def test_a_step_in_evaluation_mode_is_refused() -> None:
    params = parameters(CASE)
    optimizer = optim.ScheduleFreeAdamW(params)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) first; in Lightning, the callback ScheduleFree"):
        run(optimizer, params, 1)


def test_other_rules_beside_it_are_left_alone() -> None:
    params = parameters(CASE)
    optimizer = optim.ScheduleFreeAdamW([{"params": params[:1]}, {"params": params[1:], "rule": "lion"}], lr=0.1)
    run(optimizer, params, 3)
    before = values(params)
    optimizer.eval()
    assert not torch.equal(before[0], params[0])
    assert_same(before[1:], values(params[1:]))
    optimizer.train()
    assert_same(before, values(params))


def test_a_rate_of_zero_changes_nothing() -> None:
    params = parameters(CASE)
    before = values(params)
    optimizer = optim.ScheduleFreeAdamW(params, lr=0.0)
    run(optimizer, params, 2)
    assert_same(before, values(params))
    optimizer.eval()
    assert_same(before, values(params))


@pytest.mark.parametrize("options", [{}, {"kahan_sum": True}])
def test_weights_of_training_that_were_not_saved_are_computed_from_the_average(options):
    weight = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    if options:
        weight = torch.nn.Parameter(weight.detach().bfloat16())
    optimizer = optim.ScheduleFreeAdamW([weight], lr=0.1, **options)
    for step in range(4):
        weight.grad = torch.linspace(-1, 1, 50).to(weight.dtype) * (step - 2)
        optimizer.step()
    before = weight.detach().clone()
    optimizer.eval()
    del optimizer.state[weight]["y"]
    with pytest.warns(UserWarning, match="averaged weights without the weights of training"):
        optimizer.train()
    torch.testing.assert_close(weight.detach(), before, rtol=2**-7 if options else 1e-5, atol=1e-6)
