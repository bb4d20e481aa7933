"""Every clipping method under Lightning: precisions, optimizers, accumulation, company, resumes."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_optim as lo
from lightning_optim.callbacks._hub import CHECKPOINT_KEY, state_of_last_fit
from lightning_optim.clipping import GroupNorm, list_clip_rules
from tests.clip_rules import OF_NET
from tests.helpers import (
    ADAMWS,
    PRECISIONS,
    Net,
    Recorder,
    SaveAt,
    StatefulLoader,
    TwoOptimizers,
    batches,
    bit_equal,
    make_trainer,
    precision,
    read_events,
)

EVERY = pytest.mark.parametrize("rule", OF_NET)
KINDS = pytest.mark.parametrize("kind", ADAMWS)


def _fit(rule, kind="ours", model=None, callbacks=(), loader=None, **options):
    model = model or Net()
    recorder = Recorder()
    clipping = lo.GradientClipping(method=OF_NET[rule]())
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01)
    trainer = make_trainer([configure, clipping, lo.OptimizerMonitor(), recorder, *callbacks], **options)
    trainer.fit(model, loader or batches(12))
    return model, recorder, state_of_last_fit(trainer)[CHECKPOINT_KEY]


def test_every_method_is_tested_here():
    assert sorted(OF_NET) == list_clip_rules()


# Precisions.


def _norms(rule, kind, name, folder):
    logger = L.loggers.TensorBoardLogger(folder, name="run", version="0")
    _fit(rule, kind, logger=logger, limit_train_batches=3, **precision(name))
    events = read_events(logger.log_dir)
    tags = ("optim_grad_norm/total", "optim_grad_norm_clipped/total", "optim_grad_norm_clipped/no_decay")
    return [[value for _, value in events[tag]] for tag in tags]


@pytest.fixture(scope="module")
def full_norms(tmp_path_factory):
    """The norms of a run in full precision, once for each method and optimizer."""
    return cache(lambda rule, kind: _norms(rule, kind, "32-true", tmp_path_factory.mktemp("full")))


@EVERY
@KINDS
@pytest.mark.parametrize("name", PRECISIONS[1:])
def test_every_method_in_every_precision_is_that_of_full_precision(rule, kind, name, full_norms, tmp_path):
    for low, full in zip(_norms(rule, kind, name, tmp_path), full_norms(rule, kind), strict=True):
        assert low == pytest.approx(full, rel=0.1)  # bf16 and fp16 have 3 digits; their forward passes add to that


@EVERY
@pytest.mark.parametrize("kind", ["ours", "torch-fused"])
def test_parameters_in_bf16_are_clipped_alike(rule, kind):
    model, _, state = _fit(rule, kind, precision="bf16-true")
    assert state["counts"][0][1] > 0
    assert all(p.isfinite().all() for p in model.parameters())


@EVERY
@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_an_overflow_of_the_loss_scale_is_not_remembered(rule, kind):
    """The first steps overflow while the scale comes down, which is normal."""
    model, _, state = _fit(rule, kind, loader=batches(40), **precision("16-mixed", 2.0**34))
    ((steps, clipped, overflows),) = state["counts"]
    assert 0 < overflows < 30
    assert clipped <= steps - overflows
    if "clip" in state:
        kept = state["clip"][0]["state"]
        assert int(kept["steps"]) == steps - overflows
        assert not any(tensor.isnan().any() for tensor in kept.values())
        if "norms" in kept:  # infinite where nothing has been put yet
            assert int(kept["norms"].isfinite().sum()) == min(len(kept["norms"]), steps - overflows)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("where", ["configure_gradient_clipping", "on_before_optimizer_step", "callback"])
def test_hooks_of_the_user_see_unscaled_gradients_before_clipping(kind, where):
    seen = []

    def look(model):
        seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    class Looking(Net):
        pass

    if where == "configure_gradient_clipping":
        Looking.configure_gradient_clipping = lambda self, optimizer, *_, **__: look(self)
    elif where == "on_before_optimizer_step":
        Looking.on_before_optimizer_step = lambda self, optimizer: look(self)

    class Callback(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            look(pl_module)

    extra = [Callback()] if where == "callback" else []
    _, _, state = _fit("global_norm", kind, Looking(), extra, **precision("16-mixed", 2.0**10))
    scaled, seen = list(seen), []
    assert state["counts"][0][2] == 0
    _fit("global_norm", kind, Looking(), extra)
    assert scaled == pytest.approx(seen, rel=0.05)
    assert max(seen) > 1  # the limit is 0.5


# What a batch is.


@EVERY
def test_accumulated_gradients_are_clipped_once_as_those_of_the_whole_batch(rule):
    small, _, one = _fit(rule, loader=batches(12, 2), accumulate_grad_batches=3)
    large, _, other = _fit(rule, loader=batches(4, 6))
    assert one["counts"] == other["counts"]
    torch.testing.assert_close(list(small.parameters()), list(large.parameters()), rtol=1e-4, atol=1e-6)


class Checkpointed(Net):
    """Its body is computed again in the backward pass."""

    def forward(self, x):
        return self.head(torch.tanh(self.norm(checkpoint(self.body, x, use_reentrant=False))))


class Compiled(Net):
    """Its body goes through torch.compile, which changes the parameters' names."""

    def __init__(self):
        super().__init__()
        self.body: Any = torch.compile(self.body, backend="eager")


@EVERY
@pytest.mark.parametrize("cls", [Checkpointed, Compiled])
def test_checkpointed_and_compiled_modules_are_clipped_alike(rule, cls):
    one, _, a = _fit(rule, model=cls())
    other, _, b = _fit(rule)
    assert a["counts"] == b["counts"]
    torch.testing.assert_close(list(one.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-7)


def test_a_compiled_lightning_module_keeps_its_names_and_is_clipped_alike():
    model = Net()
    configure = lo.ConfigureOptimizers("adamw", lr=0.01)
    trainer = make_trainer([lo.GradientClipping(method=OF_NET["agc"]()), configure])
    lo.attach(model, configure)
    trainer.fit(torch.compile(model, backend="eager"), batches(12))
    other, _, _ = _fit("agc")
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-7)


# Several optimizers.


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("method", "kwargs"),
    [("value", {"max_value": 0.01}), ("block_rms", {"max_rms": 0.01}), ("group_norm", {"max_norm": 0.25})],
)
def test_manual_optimization_clips_only_the_parameters_of_the_optimizer_that_steps(name, fused, method, kwargs):
    left = []

    class OneBackward(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            x, y = batch
            first, second = self.optimizers()  # type: ignore[attr-defined]
            self.manual_backward(nn.functional.mse_loss(self(x), y) * 10)
            before = [p.grad.clone() for p in self.head.parameters()]
            first.step()  # of the body
            left.append(bit_equal(before, [p.grad for p in self.head.parameters()]))
            second.step()
            first.zero_grad()
            second.zero_grad()

    model, recorder = OneBackward(*[partial(torch.optim.SGD, lr=1.0, fused=fused)] * 2), Recorder()
    before = [p.detach().clone() for p in model.parameters()]
    clipping = lo.GradientClipping(method=method, method_kwargs=kwargs)
    options = precision(name)
    make_trainer([clipping, recorder], limit_train_batches=1, **options).fit(model, batches(4))
    assert left == [True]
    moved = [b - a for a, b in zip(recorder.weights[0], before, strict=True)]
    for part in (moved[:2], moved[4:]):
        largest = max(float(t.abs().max()) for t in part)
        norm = math.sqrt(sum(float(t.square().sum()) for t in part))
        rms = max(float(t.square().mean().sqrt()) for t in part)
        got = {"value": largest, "block_rms": rms, "group_norm": norm}[method]
        assert got == pytest.approx(next(iter(kwargs.values())), rel=2e-3)
    assert all((t == 0).all() for t in moved[2:4])


def test_group_limits_may_name_groups_of_any_optimizer():
    limits = {"body": 1.0, "head": 0.1}

    def model():
        makes = [lambda p, name=name: torch.optim.SGD([{"params": p, "name": name}], lr=0.1) for name in limits]
        return TwoOptimizers(*makes)

    make_trainer([lo.GradientClipping(method=GroupNorm(groups=limits))]).fit(model(), batches(2))
    with pytest.raises(ValueError, match=r"no parameter group 'tail'"):
        make_trainer([lo.GradientClipping(method=GroupNorm(groups={"tail": 0.1}))]).fit(model(), batches(2))


# Company.


@EVERY
def test_weight_averaging_beside_it_changes_nothing_of_the_training(rule):
    class Last(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

    alone, beside = Last(), Last()
    _fit(rule, callbacks=[alone])
    _fit(rule, callbacks=[EMAWeightAveraging(decay=0.5), beside])
    assert bit_equal(alone.weights, beside.weights)


@pytest.mark.parametrize("rule", ["global_norm", "agc", "adagc", "value"])
def test_schedule_free_optimizers_are_clipped_at_their_training_point(rule):
    model = Net()
    clipping = lo.GradientClipping(method=OF_NET[rule]())
    configure = lo.ConfigureOptimizers("schedulefreeadamw", lr=0.01)
    trainer = make_trainer([configure, clipping, lo.ScheduleFree(), lo.DivergenceGuard()])
    trainer.fit(model, batches(8), batches(1))
    assert state_of_last_fit(trainer)[CHECKPOINT_KEY]["counts"][0][1] > 0
    assert all(p.isfinite().all() for p in model.parameters())


# Resumes.


@EVERY
@pytest.mark.parametrize(("kind", "at"), [("ours", 3), ("ours", 9), ("torch-fused", 9)])
@pytest.mark.filterwarnings("ignore:Step .* skipped")
def test_a_run_resumed_in_the_middle_of_a_window_ends_bit_equal(rule, kind, at, tmp_path):
    path = tmp_path / "middle.ckpt"
    whole, _, expected = _fit(rule, kind, Net([5]), [SaveAt(at, path)], StatefulLoader(14, []))
    assert "lightning_optim" in torch.load(path, weights_only=True)
    model = Net([5])
    clipping = lo.GradientClipping(method=OF_NET[rule]())
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01)
    trainer = make_trainer([configure, clipping])
    trainer.fit(model, StatefulLoader(14, []), ckpt_path=path)
    assert bit_equal(list(model.parameters()), list(whole.parameters()))
    assert bit_equal(state_of_last_fit(trainer)[CHECKPOINT_KEY], expected)
    assert expected["counts"][0][2] == 1


# The limit over the run, and words.


def test_a_schedule_moves_the_limit_over_the_run_and_over_a_resume(logger, tmp_path):
    def parts():
        schedule = lo.schedules.Linear(final=0.5)
        return [
            lo.ConfigureOptimizers("adamw", lr=0.001),
            lo.GradientClipping(0.1, schedule=schedule),
            lo.OptimizerMonitor(),
        ]

    path = tmp_path / "middle.ckpt"
    make_trainer([*parts(), SaveAt(3, path)]).fit(Net(), StatefulLoader(10, []))
    make_trainer(parts(), logger=logger).fit(Net(), StatefulLoader(10, []), ckpt_path=path)
    norms = read_events(logger.log_dir)["optim_grad_norm_clipped/total"]
    assert [step for step, _ in norms] == list(range(3, 10))
    assert [value for _, value in norms] == pytest.approx([0.1 * (1 - 0.05 * step) for step in range(3, 10)], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "agcc"}, "Did you mean 'agc'"),
        ({"method": "agc", "method_kwargs": {"clip_facto": 1}}, "Did you mean 'clip_factor'"),
        ({"method": "value", "max_norm": 1.0}, "takes no 'max_norm'"),
        ({"method": GroupNorm(), "max_norm": 1.0}, "Set it in the rule"),
        ({"max_norm": 1.0, "method_kwargs": {"max_norm": 2.0}}, "Give one"),
        ({"schedule": "cosin"}, "Did you mean 'cosine"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        lo.GradientClipping(**arguments)
