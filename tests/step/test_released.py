"""Steps in the backward pass: the weights of usual steps, without gradients; and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.clipping import AGC, AdaGC, AutoClip, BlockRMS, ClipRule, GlobalNorm, GroupNorm, UpdateRMS, Value
from lightning_optim.core.stats import StepCounts
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.base import OPTIMIZERS
from lightning_optim.step import StepPipeline
from lightning_optim.step.released import ReleasedPipeline
from tests.helpers import bit_equal

MADE = {
    "adamw": optim.AdamW,
    "sgd": lambda params, **options: optim.SGD(params, lr=0.01, momentum=0.9, **options),
    "lion": optim.Lion,
    "muon": optim.Muon,
    "lamb": optim.LAMB,
    "adafactor": optim.Adafactor,
    "soap": optim.SOAP,
    "schedule_free": optim.ScheduleFreeAdamW,
    "bf16_state": lambda params, **options: optim.AdamW(params, state_bits=16, **options),
    "decay_by_peak": lambda params, **options: optim.AdamW(params, weight_decay_kind="independent", **options),
}
RULES = [None, BlockRMS(0.05), AGC(0.01), Value(0.01)]


class Tied(nn.Module):
    """With a weight that is used twice, one that is not used, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(2, 2)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)
        self.norm.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def _model():
    torch.manual_seed(0)
    return Tied()


def _batch(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def _train(optimizer, model, steps, released, factors=None):
    for step in steps:
        (model(_batch(step)).square().sum() * (factors or {}).get(step, 3.0)).backward()
        assert all(parameter.grad is None for parameter in model.parameters()) or not released
        optimizer.step()
        optimizer.zero_grad()


def _run(make, clip, backend, released, steps=range(5), **options):
    model = _model()
    optimizer = make(model.named_parameters(), backend=backend)
    pipeline: StepPipeline
    if released:
        pipeline = lo.release_gradients(optimizer, clip, **options)
    else:
        pipeline = StepPipeline(optimizer, clip=clip, detectors=[NonFiniteGradient()])
    _train(optimizer, model, steps, released)
    return model, optimizer, pipeline


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", MADE)
def test_weights_and_state_are_those_of_usual_steps(name, backend):
    for clip in RULES if name in ("adamw", "muon") else RULES[:2]:
        model, optimizer, pipeline = _run(MADE[name], clip, backend, released=False)
        ours, released, handle = _run(MADE[name], clip, backend, released=True)
        assert bit_equal(list(ours.parameters()), list(model.parameters())), clip
        assert bit_equal(released.state_dict(), optimizer.state_dict())
        assert handle.counts() == pipeline.counts()
        assert (handle.counts().clipped > 0) == (clip is not None)


EVERY = [
    name
    for name in OPTIMIZERS.names()
    if issubclass(OPTIMIZERS.get(name), FusedOptimizer) and not issubclass(OPTIMIZERS.get(name), optim.Prodigy)
]


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_but_prodigy(name):
    kind: Any = OPTIMIZERS.get(name)

    def make(params, **options):
        return kind(params, lr=0.01, **options)

    runs = [_run(make, None, "reference", released, range(2))[0] for released in (True, False)]
    assert bit_equal(*(list(model.parameters()) for model in runs))


@pytest.mark.parametrize("flags", [{"kahan_sum": True}, {"stochastic_rounding": True, "state_bits": 16}], ids=str)
def test_weights_in_bf16(flags):
    runs = []
    for released in (True, False):
        model = _model().to(torch.bfloat16)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, **flags)
        if released:
            lo.release_gradients(optimizer)
        for step in range(3):
            model(_batch(step).to(torch.bfloat16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((list(model.parameters()), optimizer.state_dict()))
    assert bit_equal(*runs)


@pytest.mark.parametrize("rule", [UpdateRMS(0.5), AdaGC(max_norm=1e6, warmup=1)], ids=["update_rms", "adagc"])
def test_rules_with_state_decide_as_for_all_tensors_together(rule):
    options = {"use_last_norm": True} if isinstance(rule, AdaGC) else {}
    model, _, pipeline = _run(optim.AdamW, rule, "cpu", released=False)
    ours, _, handle = _run(optim.AdamW, rule, "cpu", released=True, **options)
    # AdaGC's γ is kept by one backend's sums, so that only rounding may differ.
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert handle.counts() == pipeline.counts()
    assert handle.counts().clipped > 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_in_the_backward_pass(reentrant, shared):
    def loss(model, step):
        x = checkpoint(model.a, _batch(step).requires_grad_(), use_reentrant=reentrant)
        for _ in range(1 + shared):
            x = checkpoint(model.b, torch.tanh(x), use_reentrant=reentrant)
        return model.head(x).square().sum()

    def train(released):
        model = _model()
        optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
        if released:
            lo.release_gradients(optimizer)
        for step in range(3):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    if reentrant and shared:  # Each use has a backward pass of its own.
        with pytest.raises(RuntimeError, match=r"parameter 'b\..* has a second gradient"):
            train(released=True)
    else:
        assert bit_equal(train(released=True), train(released=False))


class Position(nn.Module):
    """Whose second gradient is a view of the memory of one that goes on to the first layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.position = nn.Linear(6, 8), nn.Parameter(torch.ones(4, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x)[None] + self.position[None])


@pytest.mark.parametrize("rule", [AGC(0.001), Value(0.001)], ids=["agc", "value"])
def test_a_rule_that_rewrites_a_gradient_leaves_those_alone_that_are_still_computed(rule):
    runs = []
    for released in (True, False):
        torch.manual_seed(0)
        model = Position()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        (lo.release_gradients if released else StepPipeline)(optimizer, clip=rule)
        _train(optimizer, model, range(3), released)
        runs.append(list(model.parameters()))
    assert bit_equal(*runs)


def test_gradients_never_exist_together():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    optimizer = optim.AdamW(model.parameters())
    parameters = list(model.parameters())
    alive = []
    for parameter in parameters:  # before ours, which drops the gradient
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    model(torch.ones(2, 64)).sum().backward()
    kept = max(alive)
    optimizer.zero_grad()
    alive.clear()
    lo.release_gradients(optimizer)
    for _ in range(2):
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
    assert kept == 12 * 64 * 64 * 4
    assert len(alive) == 24
    assert max(alive) == 64 * 64 * 4


def test_a_tensor_that_is_not_finite_is_left_out_alone():
    model = nn.ParameterDict({"good": nn.Parameter(torch.ones(3)), "bad": nn.Parameter(torch.ones(3))})
    optimizer = optim.AdamW(model.named_parameters())
    handle = lo.release_gradients(optimizer)
    (model["good"].sum() + (model["bad"] * float("inf")).sum()).backward()
    optimizer.step()
    assert bit_equal(model["bad"].detach(), torch.ones(3))
    assert (model["good"] < 1).all()
    assert [float(optimizer.state[model[name]]["step"]) for name in ("good", "bad")] == [1, 0]
    assert handle.counts() == StepCounts(steps=1)
    assert int(handle.left_out) == 1
    ((model["good"] + model["bad"]) * float("nan")).sum().backward()
    optimizer.step()
    assert handle.counts() == StepCounts(steps=2, skipped=1)
    assert int(handle.left_out) == 3


def test_without_the_check_a_bad_gradient_arrives_as_in_a_plain_step():
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([weight], lr=0.1)
    handle = lo.release_gradients(optimizer, skip_nonfinite=False)
    (weight * float("nan")).sum().backward()
    assert weight.isnan().all()
    optimizer.step()
    assert handle.counts() == StepCounts(steps=1)


def test_the_rate_is_that_of_the_group_when_the_gradient_comes():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([weight], lr=1.0)
    handle = lo.release_gradients(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    for expected in (-1.0, -1.1, -1.11):
        weight.sum().backward()
        optimizer.step()
        schedule.step()
        assert weight.item() == pytest.approx(expected)
    assert handle.counts().steps == 3


def test_a_step_is_prepared_once_and_in_the_backward_pass():
    """A rate above the peak of its schedule, which raises the peak that the decay depends on."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([weight], lr=0.1, weight_decay=0.5, weight_decay_kind="independent")
    lo.release_gradients(optimizer)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.warns(UserWarning, match="peak"):
        weight.sum().backward()
    assert optimizer.param_groups[0]["peak_lr"] == 0.2
    optimizer.step()
    assert optimizer._batches is None  # nothing was sorted for an update that has been made


def test_the_last_norm_limits_the_next_step():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = optim.SGD(weights, lr=1.0)
    lo.release_gradients(optimizer, GlobalNorm(1.0), use_last_norm=True)
    moved = []
    for factors in ((3.0, 4.0), (0.5, 0.5), (0.5, 0.5)):
        before = [weight.item() for weight in weights]
        sum(weight * factor for weight, factor in zip(weights, factors, strict=True)).backward()
        optimizer.step()
        moved.append([b - weight.item() for b, weight in zip(before, weights, strict=True)])
    # Step 1 knows the gradients so far: 3 or 4, and then 5. Step 2 has the norm 5 of the first, step 3 one below 1.
    assert sorted(moved[0])[0] < 1.0
    assert max(moved[0]) == pytest.approx(1.0)
    assert moved[1] == pytest.approx([0.1, 0.1])
    assert moved[2] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("released", "later"), [(True, False), (False, False), (True, True)])
def test_resuming_goes_on_bit_for_bit(released, later):
    """Also from the checkpoint of a run with usual steps, whose clip rule has one state for all parameters."""
    rule = UpdateRMS(0.5, patience=2)
    whole, _, _ = _run(optim.AdamW, rule, "cpu", released=True, steps=range(8))
    model, optimizer, pipeline = _run(optim.AdamW, rule, "cpu", released=released, steps=range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pipeline.clip_state(), pipeline.counts()))
    again = Tied()
    again.norm.bias.requires_grad_(False)
    again.load_state_dict(saved[0])
    resumed = optim.AdamW(again.named_parameters(), backend="cpu")
    if later:
        handle = lo.release_gradients(resumed, rule)
        handle.load_clip_state(saved[2])
        handle.load_counts(saved[3])
    else:
        handle = ReleasedPipeline(resumed, clip=rule, clip_state=saved[2], counts=saved[3])
    resumed.load_state_dict(saved[1])
    _train(resumed, again, range(4, 8), released=True)
    assert bit_equal(list(again.parameters()), list(whole.parameters()))
    assert handle.counts().steps == 8
    flags = dict(zip(saved[2]["names"], saved[2]["state"]["flags"].tolist(), strict=True))
    assert any(flags.values())  # else nothing would be restored


def test_a_usual_step_goes_on_from_released_ones():
    rule = UpdateRMS(0.5, patience=2)
    whole, _, pipeline = _run(optim.AdamW, rule, "cpu", released=False, steps=range(8))
    model, optimizer, handle = _run(optim.AdamW, rule, "cpu", released=True, steps=range(4))
    state = handle.clip_state()
    handle.remove()
    after = StepPipeline(optimizer, clip=rule, clip_state=state)
    _train(optimizer, model, range(4, 8), released=False)
    assert bit_equal(list(model.parameters()), list(whole.parameters()))
    assert bit_equal(after.clip_state(), pipeline.clip_state())


def test_remove_gives_gradients_back():
    model, optimizer, handle = _run(optim.AdamW, None, "cpu", released=True, steps=range(2))
    handle.remove()
    usual, _, _ = _run(optim.AdamW, None, "cpu", released=False, steps=range(4))
    model(_batch(2)).sum().backward()
    assert model.a.weight.grad is not None
    optimizer.zero_grad()
    _train(optimizer, model, range(2, 4), released=False)
    assert bit_equal(list(model.parameters()), list(usual.parameters()))


def test_a_closure_is_evaluated_in_the_step():
    model, usual = _model(), _model()
    optimizer, other = (optim.AdamW(m.parameters()) for m in (model, usual))
    lo.release_gradients(optimizer)

    def closure(m):
        loss = m(_batch(0)).sum()
        loss.backward()
        return loss

    assert optimizer.step(lambda: closure(model)) == other.step(lambda: closure(usual))
    assert bit_equal(list(model.parameters()), list(usual.parameters()))


def test_parameters_that_join_or_are_unfrozen_are_released_from_their_first_step_on():
    runs = []
    for released in (True, False):
        model = _model()
        optimizer = optim.AdamW(model.a.parameters())
        if released:
            lo.release_gradients(optimizer)
        model.b.weight.requires_grad_(False)
        optimizer.add_param_group({"params": model.b.parameters(), "lr": 0.1})
        for step in range(4):
            if step == 2:
                model.b.weight.requires_grad_(True)
            model(_batch(step)).sum().backward()
            if released and step == 3:
                assert model.b.weight.grad is model.b.bias.grad is model.a.weight.grad is None
            optimizer.step()
            model.zero_grad()
        runs.append(list(model.parameters()))
    assert bit_equal(*runs)


def test_a_step_without_a_backward_pass_counts_as_none():
    optimizer = optim.AdamW([nn.Parameter(torch.ones(1))])
    handle = lo.release_gradients(optimizer)
    optimizer.step()
    assert handle.counts().steps == 0


def test_nothing_keeps_the_optimizer_alive():
    model = _model()
    optimizer = optim.AdamW(model.parameters())
    lo.release_gradients(optimizer)
    _train(optimizer, model, range(2), released=True)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(_batch(0)).sum().backward()
    assert model.a.weight.grad is not None


# What is refused.


class Whole(ClipRule):
    def __call__(self, stats, state=None, limit=1.0):
        return torch.full_like(stats.total_norm(), 2.0)


class Other(BlockRMS):
    def __call__(self, stats, state=None, limit=1.0):
        return torch.full_like(stats.total_norm(), 2.0)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.Prodigy, {}, "Prodigy cannot update in the backward pass: its d, d_max"),
        (optim.AdamW, {"clip": GlobalNorm(1.0)}, "needs the norm of all gradients.*use_last_norm=True"),
        (optim.AdamW, {"clip": AdaGC()}, "needs the norm of all gradients"),
        (optim.AdamW, {"clip": AutoClip()}, "AutoClip.* decides from all gradients of a step"),
        (optim.AdamW, {"clip": GroupNorm(1.0)}, "decides from all gradients of a step"),
        (optim.AdamW, {"clip": Whole()}, "says so by `spans = 'tensor'`"),
        (optim.AdamW, {"clip": Other()}, "says so by `spans = 'tensor'`"),
        (optim.AdamW, {"clip": AutoClip(), "use_last_norm": True}, "decides from all gradients of a step"),
        (optim.AdamW, {"clip": BlockRMS(), "use_last_norm": True}, "needs no norm of all gradients"),
        (optim.AdamW, {"use_last_norm": True}, "no clip rule is given"),
    ],
)
def test_what_needs_all_gradients_is_refused(make, options, message):
    optimizer = make([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        lo.release_gradients(optimizer, **options)
    assert not optimizer._updates_in_backward


def test_optimizers_of_other_packages_are_refused():
    with pytest.raises(
        TypeError, match=r"AdamW cannot update in the backward pass: needed is .*lightning_optim\.optim"
    ):
        lo.release_gradients(torch.optim.AdamW([nn.Parameter(torch.ones(1))]))


def test_a_group_that_joins_is_checked_too():
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([weight])
    lo.release_gradients(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rule": "prodigy"})
    with pytest.raises(ValueError, match="its d, d_max"):
        weight.sum().backward()


def test_releasing_twice_is_refused():
    optimizer = optim.AdamW([nn.Parameter(torch.ones(1))])
    lo.release_gradients(optimizer)
    with pytest.raises(ValueError, match="released already"):
        lo.release_gradients(optimizer)


def test_a_second_backward_pass_before_the_step_is_refused():
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([("scale", weight)])
    lo.release_gradients(optimizer)
    weight.sum().backward()
    once = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 'scale' has a second gradient before AdamW\.step\(\)"):
        weight.sum().backward()
    assert bit_equal(weight.detach(), once)


def test_a_gradient_that_was_set_by_hand_is_refused():
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([("scale", weight)])
    lo.release_gradients(optimizer)
    weight.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"parameter 'scale' has a gradient at AdamW\.step\(\)"):
        optimizer.step()


def test_a_grad_scaler_is_refused():
    weight = nn.Parameter(torch.ones(1))
    optimizer = optim.AdamW([weight])
    lo.release_gradients(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises((RuntimeError, AssertionError), match="GradScaler"):
        scaler.step(optimizer)


def test_whole_parameters_in_several_processes_are_refused(monkeypatch):
    optimizer = optim.AdamW([nn.Parameter(torch.ones(1))])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="DistributedDataParallel averages gradients"):
        lo.release_gradients(optimizer)


def test_state_that_a_trial_step_makes_is_still_made():
    """As torch.distributed.checkpoint does it: gradients of zeros, rates of 0, and a step."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([weight], lr=0.0)
    handle = lo.release_gradients(optimizer)
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert "exp_avg" in optimizer.state[weight]
    assert handle.counts().steps == 0
