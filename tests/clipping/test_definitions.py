"""Every rule against its definition, by arithmetic written down once more or by the published code."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_optim.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    BlockRMS,
    GroupNorm,
    MomentumRatio,
    UpdateRMS,
    Value,
    ZClip,
)
from lightning_optim.core.stats import GradStats
from lightning_optim.step import StepPipeline
from tests.helpers import bit_equal
from tests.optim.published import timm
from tests.optimizer_cases import FUSED_DAMPENED, OURS, TORCH, TORCH_FUSED, Case

SHAPES = ((6, 4), (3, 2, 3, 3), (5,), (), (4, 1))
# Our kernel takes a divisor for each tensor, torch's one in all, the others none.
KINDS = [OURS, TORCH_FUSED, TORCH, FUSED_DAMPENED]
SGD = Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Gradients(torch.optim.SGD):
    """An optimizer that notes what its update would use."""

    def __init__(self, params):
        super().__init__(params, lr=1.0)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def parameters(dtype=torch.float32, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype)) for shape in shapes]


def gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for index, param in enumerate(params):
        param.grad = (torch.randn(param.shape, generator=generator) * scale * (index + 1)).to(param.dtype)
    return [param.grad.clone() for param in params]


def clipped(rule, params, steps=1, scale=1.0, groups=None, factors=None):
    """What the optimizer sees at each step, beside what the gradients were."""
    optimizer = Gradients(groups or params)
    pipeline = StepPipeline(optimizer, clip=rule)
    raw = []
    for step in range(steps):
        raw.append(gradients(params, step, scale * (factors[step] if factors else 1.0)))
        optimizer.step()
    return raw, optimizer.seen, pipeline


def close(a, b, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-2)


def norm(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_clip_grad_value(dtype):
    params = parameters(dtype)
    _, ((*seen,),), pipeline = clipped(Value(0.7), params)
    gradients(params, 0)
    nn.utils.clip_grad_value_(params, 0.7)
    assert bit_equal(seen, [p.grad for p in params])
    assert pipeline.counts().clipped == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "eps"), [(0.01, 1e-3), (0.3, 1e-3), (0.5, 2.0), (1e6, 1e-3)])
def test_agc_is_timms_adaptive_clip_grad(dtype, factor, eps):
    agc = timm("agc", "utils")
    params = parameters(dtype)
    params[0].data[2] = 0  # a unit that starts at zero has to be able to move
    _, ((*seen,),), pipeline = clipped(AGC(factor, eps), params)
    raw = gradients(params, 0)
    agc.adaptive_clip_grad(params, factor, eps)
    close(seen, [p.grad for p in params], dtype)
    assert pipeline.counts().clipped == (0 if factor == 1e6 else 1)
    assert (seen[0][2] != 0).all()
    assert bit_equal(seen, raw) is (factor == 1e6)


def test_agc_leaves_alone_what_is_excluded_by_name():
    params = parameters()
    names = ["body.weight", "conv.weight", "conv.bias", "scale", "head.weight"]
    optimizer = Gradients(params)
    StepPipeline(optimizer, clip=AGC(exclude=[r"^head\."]), names=dict(zip(params, names, strict=True)))
    raw = gradients(params, 0)
    optimizer.step()
    (seen,) = optimizer.seen
    assert [bool(torch.equal(a, b)) for a, b in zip(raw, seen, strict=True)] == [False] * 4 + [True]


def test_agc_finds_names_in_the_optimizer_and_refuses_patterns_that_match_nothing():
    model = nn.Linear(2, 2)
    named = torch.optim.SGD(list(model.named_parameters()), lr=1.0)
    StepPipeline(named, clip=AGC(exclude=["^weight$"]))
    with pytest.raises(ValueError, match=r"'wieght' matches no parameter. Did you mean 'weight'"):
        StepPipeline(named, clip=AGC(exclude=["wieght"]))
    with pytest.raises(ValueError, match="the parameters have none"):
        StepPipeline(torch.optim.SGD(model.parameters(), lr=1.0), clip=AGC(exclude=["^weight$"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_rms_is_optaxs(dtype):
    params = parameters(dtype)
    ((*raw,),), ((*seen,),), _ = clipped(BlockRMS(1.5), params)
    expected = [g / max(1.0, math.sqrt(float(g.double().square().mean())) / 1.5) for g in raw]
    close(seen, expected, dtype)
    assert torch.equal(seen[0], raw[0])
    assert not torch.equal(seen[4], raw[4])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_norm_is_clip_grad_norm_of_each_group(kind, dtype):
    rule = GroupNorm(2.0, {"small": 0.5, "free": None})
    finals = []
    for ours in (True, False):
        params = parameters(dtype)
        groups = [
            {"params": params[:2], "name": "body"},
            {"params": params[2:3], "name": "small"},
            {"params": params[3:], "name": "free"},
        ]
        optimizer = kind.make(groups)
        if ours:
            StepPipeline(optimizer, clip=rule)
        for step in range(4):
            gradients(params, step)
            if not ours:
                nn.utils.clip_grad_norm_(params[:2], 2.0)
                nn.utils.clip_grad_norm_(params[2:3], 0.5)
            optimizer.step()
        finals.append(params)
    close(finals[0], finals[1], dtype)


def test_after_group_norm_every_group_is_within_its_limit():
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:3], "name": "head"}, {"params": params[3:]}]
    raw, steps, _ = clipped(GroupNorm(0.1, {"head": 3.0, "2": 0.02}), params, 8, groups=groups, scale=5)
    for before, seen in zip(raw, steps, strict=True):
        for part, limit in ((slice(2), 0.1), (slice(2, 3), 3.0), (slice(3, None), 0.02)):
            assert norm(seen[part]) <= limit * (1 + 1e-6)
            assert norm(seen[part]) == pytest.approx(min(norm(before[part]), limit), rel=1e-5)


def test_a_limit_for_a_group_that_does_not_exist_is_refused_with_the_nearest():
    optimizer = torch.optim.SGD([{"params": parameters(), "name": "head"}], lr=1.0)
    with pytest.raises(ValueError, match=r"no parameter group 'haed'. Did you mean 'head'"):
        StepPipeline(optimizer, clip=GroupNorm(groups={"haed": 1.0}))


@pytest.mark.parametrize("percentile", [10.0, 50.0, 93.0, 100.0])
def test_autoclip_is_the_percentile_of_all_norms_while_the_window_holds_them(percentile):
    rng = np.random.default_rng(0)
    factors = np.exp(rng.normal(size=40)).tolist()
    raw, steps, _ = clipped(AutoClip(percentile, window=64), parameters(), 40, factors=factors)
    history = []
    for before, after in zip(raw, steps, strict=True):
        history.append(norm(before))
        limit = np.percentile(history, percentile)
        assert norm(after) == pytest.approx(min(history[-1], limit), rel=1e-5)


def test_autoclip_forgets_what_is_older_than_its_window():
    factors = [100.0] * 8 + [1.0] * 8 + [3.0]
    raw, steps, _ = clipped(AutoClip(50.0, window=8), parameters(), 17, factors=factors)
    assert norm(steps[-1]) == pytest.approx(np.median([norm(g) for g in raw[-8:]]), rel=1e-5)
    assert norm(steps[-1]) < norm(raw[-1]) / 2


def test_zclip_is_a_robust_z_score_of_the_logarithm():
    rng = np.random.default_rng(1)
    factors = np.exp(0.3 * rng.normal(size=60))
    factors[[30, 45]] *= [20, 5]
    rule = ZClip(threshold=2.0, window=16, warmup=10)
    raw, steps, pipeline = clipped(rule, parameters(), 60, factors=factors.tolist())
    window, flags = [], []
    for step, (before, after) in enumerate(zip(raw, steps, strict=True)):
        x = math.log(norm(before))
        flag = False
        if len(window) >= 10:
            recent = window[-16:]
            median = np.median(recent)
            sigma = max(1.4826 * np.median(np.abs(np.array(recent) - median)), 0.04)
            z = (x - median) / sigma
            flag = z > 2.0
            limit = math.exp(median + 4.0 / z * sigma) if flag else None
        assert norm(after) == pytest.approx(limit if flag else norm(before), rel=1e-4)
        flags += [step] if flag else []
        window += [] if flag else [x]
    assert {30, 45} <= set(flags)
    assert len(flags) < 10
    assert pipeline.counts().clipped == len(flags)


def test_zclips_absolute_limit_holds_from_the_first_step():
    _, steps, _ = clipped(ZClip(max_norm=0.5), parameters(), 3)
    assert [norm(seen) for seen in steps] == pytest.approx([0.5] * 3, rel=1e-5)


@pytest.mark.parametrize("patience", [None, 3])
def test_adagc_is_the_papers(patience):
    rng = np.random.default_rng(2)
    factors = np.exp(0.5 * rng.normal(size=30)).tolist()
    params = parameters()
    rule = AdaGC(max_norm=4.0, ratio=1.05, beta=0.9, warmup=5, patience=patience)
    raw, steps, _ = clipped(rule, params, 30, factors=factors)
    gamma, flags = [math.inf] * len(params), [0] * len(params)
    moved = 0
    for step, (before, after) in enumerate(zip(raw, steps, strict=True)):
        norms = [norm([g]) for g in before]
        if step < 5:
            divisors = [max(1.0, norm(before) / 4.0)] * len(params)
        else:
            divisors = [max(1.0, n / (1.05 * g)) for n, g in zip(norms, gamma, strict=True)]
        close(after, [g / d for g, d in zip(before, divisors, strict=True)])
        for i, (n, divisor) in enumerate(zip(norms, divisors, strict=True)):
            gamma[i] = min(gamma[i], n / divisor) if step < 5 else 0.9 * gamma[i] + 0.1 * n / divisor
            flags[i] = flags[i] + 1 if divisor > 1 and step >= 5 else 0
            if flags[i] == patience:
                gamma[i], flags[i] = n, 0
                moved += 1
    assert (moved > 0) is (patience is not None)


@pytest.mark.parametrize(
    "kind", [OURS, TORCH_FUSED, TORCH, Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})], ids=str
)
def test_momentum_ratio_compares_with_the_first_moment(kind):
    params = parameters()
    optimizer = kind.make(params)
    StepPipeline(optimizer, clip=MomentumRatio(ratio=1.5, warmup=2, patience=100))
    reference_params = parameters()
    reference = kind.make(reference_params)
    clips = 0
    for step in range(6):
        gradients(params, step)
        gradients(reference_params, step)
        for param in reference_params:
            state = reference.state[param]
            if step >= 2:
                m = state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"] * (1 - 0.9)
                divisor = max(1.0, norm([param.grad]) / (1.5 * norm([m])))
                param.grad = param.grad / divisor
                clips += divisor > 1
        optimizer.step()
        reference.step()
        close(params, reference_params)
    assert clips > 5


def test_a_momentum_of_zero_does_not_stop_training():
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    StepPipeline(optimizer, clip=MomentumRatio(warmup=1))
    for step in range(3):
        gradients(params, step, scale=0.0)
        optimizer.step()
    before = copy.deepcopy(params)
    gradients(params, 9)
    optimizer.step()
    assert all((a != b).all() for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", [OURS, TORCH_FUSED, TORCH], ids=str)
def test_update_rms_divides_by_the_rms_of_the_gradient_over_the_root_of_the_second_moment(kind):
    params, reference_params = parameters(), parameters()
    optimizer, reference = kind.make(params), kind.make(reference_params)
    StepPipeline(optimizer, clip=UpdateRMS(max_rms=1.2))
    clips = []
    for step in range(6):
        factor = 10.0 if step == 4 else 1.0
        gradients(params, step, factor)
        for param, grad in zip(reference_params, gradients(reference_params, step, factor), strict=True):
            state = reference.state[param]
            v = state["exp_avg_sq"].double() if state else torch.zeros_like(grad).double()
            v = (0.999 * v + 0.001 * grad.double().square()) / (1 - 0.999 ** (step + 1))
            rms = math.sqrt(float((grad.double().square() / v.clamp(min=1e-16)).mean()))
            param.grad = grad / max(1.0, rms / 1.2)
            clips.append(rms > 1.2)
        optimizer.step()
        reference.step()
        close(params, reference_params)
    assert not any(clips[: len(params)])
    assert all(clips[4 * len(params) : 5 * len(params)])


@pytest.mark.parametrize(("rule", "needed"), [(MomentumRatio(warmup=1), "exp_avg"), (UpdateRMS(), "exp_avg_sq")])
def test_an_optimizer_without_the_moment_is_refused_by_name(rule, needed):
    params = parameters()
    optimizer = torch.optim.Adagrad(params)
    StepPipeline(optimizer, clip=rule)
    gradients(params, 0)
    with pytest.raises(ValueError, match=rf"needs an optimizer that keeps '{needed}'.*Adagrad keeps 'step', 'sum'"):
        optimizer.step()


@pytest.mark.parametrize("norm_sq", [0.1, 0.3, 2.0])
def test_a_norm_is_not_above_a_limit_that_it_is_itself(norm_sq):
    """The window keeps float32, while norms are summed in float64."""
    rule = AutoClip(percentile=50)
    state = {**rule.init_state(1), "steps": torch.tensor(0)}
    stats = GradStats(torch.tensor([norm_sq], dtype=torch.float64), (1,))
    assert rule(stats, state) == 1
