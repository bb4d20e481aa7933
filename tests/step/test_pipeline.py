"""The step pipeline in plain torch: clipping and skipping, for every optimizer there is."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import StepCounts
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.step import StepPipeline
from tests.helpers import bit_equal
from tests.optimizer_cases import (
    ALL,
    AROUND,
    FUSED_MOMENTUM,
    OURS,
    SPARSE,
    TORCH,
    TORCH_FUSED,
    Case,
    set_gradients,
)

EVERY = pytest.mark.parametrize("case", ALL, ids=str)
GUARD = {"detectors": [NonFiniteGradient()]}


def _clip_by_hand(parameters, max_norm):
    """What clip_grad_norm_ does, written down once more, because it takes no sparse gradients."""
    dense = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in dense))
    for parameter in parameters:
        parameter.grad = parameter.grad * min(max_norm / (norm + 1e-6), 1.0)
    return norm


def _train(case, seeds, pipeline=None, max_norm=None, factors=None):
    """Steps with the gradients of each seed; with a pipeline, or clipped by hand, or as they are."""
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, **pipeline) if pipeline is not None else None
    if hasattr(optimizer, "train"):  # schedulefree
        optimizer.train()
    for index, seed in enumerate(seeds):
        set_gradients(parameters, seed, (factors or {}).get(index, 1.0), case.sparse)
        if max_norm is not None:
            _clip_by_hand(parameters, max_norm)
        optimizer.step()
    return parameters, optimizer, pipe


@EVERY
def test_clipping_equals_clip_grad_norm_before_the_step(case):
    ours, _, pipe = _train(case, range(6), pipeline={"clip": GlobalNorm(0.7)})
    reference, _, _ = _train(case, range(6), max_norm=0.7)
    assert pipe.counts() == StepCounts(steps=6, clipped=6, skipped=0)
    untouched, _, _ = _train(case, range(6))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    if isinstance(case.optimizer, type) and issubclass(case.optimizer, torch.optim.SGD):  # others do not feel a scale
        assert not bit_equal(ours, untouched)


@EVERY
def test_a_limit_that_is_never_reached_changes_not_one_bit(case):
    ours, optimizer, pipe = _train(case, range(4), pipeline={"clip": GlobalNorm(1e6), **GUARD})
    plain, reference, _ = _train(case, range(4))
    assert bit_equal(ours, plain)
    assert bit_equal(optimizer.state_dict()["state"], reference.state_dict()["state"])
    assert pipe.counts() == StepCounts(steps=4)


@EVERY
@pytest.mark.parametrize("clip", [None, GlobalNorm(0.7)], ids=["", "clipped"])
def test_a_skipped_step_leaves_parameters_and_state_bit_equal(case, clip):
    parameters, optimizer, pipe = _train(case, range(3), pipeline={"clip": clip, **GUARD})
    before = copy.deepcopy((parameters, optimizer.state_dict()))
    set_gradients(parameters, 9, math.nan, case.sparse)
    optimizer.step()
    assert bit_equal((parameters, optimizer.state_dict()), before)
    assert pipe.counts() == StepCounts(steps=4, clipped=3 if clip else 0, skipped=1)


@EVERY
@pytest.mark.parametrize("bad", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_after_a_skipped_step_equals_training_without_that_step(case, bad, value):
    seeds = [0, 1, 2, 3, 4]
    with_bad, optimizer, _ = _train(case, seeds, pipeline=GUARD, factors={bad: value})
    without, reference, _ = _train(case, seeds[:bad] + seeds[bad + 1 :])
    assert all(p.isfinite().all() for p in with_bad)
    assert bit_equal(with_bad, without)
    assert bit_equal(optimizer.state_dict(), reference.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_our_optimizers_leave_the_gradients_alone(name):
    case = Case(f"lightning_optim.optim.{name}")
    parameters, optimizer, _ = _train(case, range(2), pipeline={"clip": GlobalNorm(0.1), **GUARD})
    for factor in (1.0, math.nan):
        set_gradients(parameters, 9, factor)
        before = copy.deepcopy([p.grad for p in parameters])
        optimizer.step()
        assert bit_equal([p.grad for p in parameters], before)


@pytest.mark.parametrize("case", AROUND + SPARSE, ids=str)
def test_other_optimizers_see_scaled_gradients(case):
    parameters, optimizer, _ = _train(case, [], pipeline={"clip": GlobalNorm(0.1)})
    set_gradients(parameters, 9, sparse=case.sparse)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.to_dense().clone() for p in parameters]))
    optimizer.step()
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in seen[0]))
    assert norm == pytest.approx(0.1, rel=1e-4)


# Closures.


@pytest.mark.parametrize("case", [OURS, TORCH_FUSED, TORCH], ids=str)
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_a_closure_runs_once_and_its_loss_comes_back(case, keyword, bad):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)
    before = copy.deepcopy(parameters)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = sum((p * 3).sum() for p in parameters) * (math.nan if bad else 1)
        loss.backward()
        calls.append(loss)
        return loss

    set_gradients(parameters, 9, math.nan)  # stale: the closure makes the gradients of this step
    returned = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert len(calls) == 1
    assert returned is calls[0]
    assert pipe.counts() == StepCounts(steps=1, clipped=0 if bad else 1, skipped=int(bad))
    assert bit_equal(parameters, before) is bad


@pytest.mark.parametrize("case", [OURS, TORCH_FUSED, TORCH], ids=str)
def test_an_exception_in_a_closure_propagates_and_the_next_step_works(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)

    def closure():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step(closure)
    set_gradients(parameters, 1)
    optimizer.step()
    assert pipe.counts() == StepCounts(steps=1, clipped=1)


# What there is to step on.


def test_parameters_without_gradients_are_left_out():
    case = OURS
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)
    set_gradients(parameters, 1)
    parameters[0].grad = None
    before = parameters[0].clone()
    optimizer.step()
    assert bit_equal(parameters[0].detach(), before.detach())
    assert pipe.counts() == StepCounts(steps=1, clipped=1)


@EVERY
def test_a_step_without_any_gradient_is_no_step(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), on_report=pytest.fail, **GUARD)
    pipe.expect_step()
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    pipe.settle()
    assert pipe.counts() == StepCounts()


@pytest.mark.parametrize("case", [OURS, TORCH_FUSED, FUSED_MOMENTUM, TORCH], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_other_dtypes_are_clipped_and_guarded(case, dtype):
    parameters, reference = case.parameters(dtype), case.parameters(dtype)
    optimizer, other = case.make(parameters), case.make(reference)
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.7), **GUARD)
    for seed in range(4):
        set_gradients(parameters, seed, math.nan if seed == 2 else 1.0)
        optimizer.step()
        if seed != 2:
            set_gradients(reference, seed)
            _clip_by_hand(reference, 0.7)
            other.step()
    assert pipe.counts() == StepCounts(steps=4, clipped=3, skipped=1)
    rtol = {torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(parameters, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10)


def test_tensor_learning_rates_work():
    case = Case(torch.optim.AdamW, {"lr": torch.tensor(0.1), "fused": True})
    ours, _, _ = _train(case, range(3), pipeline={"clip": GlobalNorm(0.7), **GUARD})
    reference, _, _ = _train(case, range(3), max_norm=0.7)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_several_optimizers_are_clipped_and_skipped_each_by_itself():
    case = TORCH_FUSED
    (one, first, a), (two, second, b) = (_train(case, [], {"clip": GlobalNorm(0.5), **GUARD}) for _ in range(2))
    for step in range(4):
        set_gradients(one, step, math.nan if step == 1 else 1.0)
        set_gradients(two, step, 1e-6)
        first.step()
        second.step()
    assert a.counts() == StepCounts(steps=4, clipped=3, skipped=1)
    assert b.counts() == StepCounts(steps=4)


def test_counts_start_where_a_resumed_run_left_off():
    case = OURS
    _, _, pipe = _train(case, range(2), {"clip": GlobalNorm(0.5), "counts": StepCounts(10, 5, 2)})
    assert pipe.counts() == StepCounts(steps=12, clipped=7, skipped=2)
