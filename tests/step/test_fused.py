"""The decision of a step as one program: the same as that of rule and detectors, and what it costs."""

from __future__ import annotations

import math
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_optim import optim
from lightning_optim.clipping import AdaGC, AutoClip, BlockRMS, Clipper, GlobalNorm, GroupNorm, ZClip
from lightning_optim.divergence import Detector, SpikeWindow, StepGuard
from lightning_optim.divergence.early_warning import EarlyWarning
from lightning_optim.divergence.step_log import StepLog
from lightning_optim.kernels.decision import HostRunner
from lightning_optim.step import StepPipeline
from lightning_optim.step.fused import FusedDecision
from tests.step.test_lifecycle import Operations

STEPS = 60
RULES = {
    "none": lambda: None,
    "global_norm": lambda: GlobalNorm(0.5),
    "group_norm": lambda: GroupNorm(0.4, groups={"1": None, "2": 0.1}),
    "block_rms": lambda: BlockRMS(0.3),
    "adagc": lambda: AdaGC(max_norm=0.5, warmup=5, patience=3),
    "adagc_forever": lambda: AdaGC(max_norm=0.5, warmup=5, patience=None),
    "autoclip": lambda: AutoClip(percentile=75, window=20, warmup=2),
    "zclip": lambda: ZClip(window=20, warmup=6, patience=4),
    "zclip_max_norm": lambda: ZClip(window=12, warmup=6, patience=4, max_norm=0.6),
}
EVERY = pytest.mark.parametrize("name", RULES)


class Run:
    """A run with bad steps, spikes, new levels and parameters without a gradient; its weights after each step."""

    def __init__(
        self, name, *, guard=True, skip=("grad_norm", "loss"), loss=True, sparse=False, moments=True, device="cpu"
    ):
        self.parameters = [nn.Parameter(torch.zeros(3, i + 1, device=device)) for i in range(6)]
        groups: list[dict[str, Any]] = [{"params": self.parameters[i : i + 2]} for i in (0, 2, 4)]
        groups[1] |= {"betas": (0.8, 0.95)}
        optimizer = optim.AdamW(groups, lr=0.1)
        self.loss = torch.tensor(1.0)
        window = SpikeWindow(2, warmup=10, patience=6)
        early = EarlyWarning() if moments else None
        self.guard = StepGuard(window, skip, lambda: self.loss if loss else None, early_warning=early)
        detectors = [self.guard] if guard else []
        self.pipeline = StepPipeline(
            optimizer, clip=RULES[name](), clip_limit=lambda t: 1 + 0.01 * t, detectors=detectors
        )
        self.weights = []
        random = np.random.default_rng(0)
        levels = np.exp(0.3 * random.normal(size=STEPS))
        levels[[14, 30, 31]] = 40, 60, 50
        levels[40:] *= 6
        for step, level in enumerate(levels):
            self.loss = torch.tensor(math.nan if step == 20 else 1.0 + 0.1 * level, device=device)
            for i, parameter in enumerate(self.parameters):
                there = not sparse or (step + i) % 4
                parameter.grad = (
                    torch.tensor(random.normal(size=parameter.shape) * level * 0.1).float().to(device)
                    if there
                    else None
                )
            if step in (8, 25) and self.parameters[3].grad is not None:
                self.parameters[3].grad[0, 0] = math.inf if step == 8 else math.nan
            optimizer.step()
            self.weights.append(torch.cat([p.detach().flatten().cpu() for p in self.parameters]))

    @property
    def fused(self):
        return self.pipeline._decision._fused


def assert_alike(one, other):
    """The same decisions; numbers but for the order of sums, and for float32 in torch's form of the rules."""
    assert one.pipeline.counts() == other.pipeline.counts()
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-5, atol=1e-6)
    states = [run.pipeline.clip_state().get("state", {}) for run in (one, other)]
    states = [{name: value.cpu() for name, value in state.items()} for state in states]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)
    seen = [run.guard.read(everything=True) for run in (one, other)]
    assert len(seen[0]) == len(seen[1])
    for here, there in zip(*seen, strict=True):
        for name in ("step", "skipped", "bad_tensors", "bad_loss", "spikes", "levels", "worst", "early"):
            assert getattr(here, name) == getattr(there, name) or name in ("levels", "early"), name
        for name in ("group_norms", "grad_over_second_moment", "update_to_come"):
            assert getattr(here, name) == pytest.approx(getattr(there, name), rel=1e-6, nan_ok=True), name
    assert int(one.guard._quiet) == int(other.guard._quiet)


@pytest.fixture
def in_torch(monkeypatch):
    """Makes runs whose decisions are those of rule and detectors themselves."""

    def make(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(FusedDecision, "decide", lambda *_: None)
            return Run(*args, **kwargs)

    return make


@pytest.mark.parametrize("sparse", [False, True])
@EVERY
def test_the_program_decides_as_rule_and_guard_do(name, sparse, in_torch):
    run = Run(name, sparse=sparse)
    assert run.fused._programs, "no step was decided by a program"
    assert run.pipeline.counts().skipped >= 4
    assert_alike(run, in_torch(name, sparse=sparse))


@pytest.mark.parametrize(
    "options", [{"skip": ()}, {"skip": ("loss",)}, {"loss": False}, {"moments": False}, {"guard": False}]
)
@pytest.mark.parametrize("name", ["none", "global_norm", "adagc"])
def test_the_guard_may_have_less_to_do(name, options, in_torch):
    if name == "none" and "guard" in options:
        pytest.skip("nothing to decide")
    run = Run(name, **options)
    assert run.fused._programs
    assert_alike(run, in_torch(name, **options))


_VIEWS = {"detach", "lift_fresh", "select", "view"}
"""Operations that compute nothing: of numpy's views of tensors, and of the reverse."""


@EVERY
def test_a_program_needs_no_operation_of_torch(name):
    run = Run(name)
    optimizer = run.pipeline.optimizer
    names = []
    for close in (False, True):
        if close:
            run.pipeline.close()
        for _ in range(3):
            with Operations() as seen:
                optimizer.step()
        names.append(Counter(seen.names))
    more = names[0] - names[1]
    assert sum(count for one, count in more.items() if one not in _VIEWS) <= 4, more


class Halved(GlobalNorm):
    def __call__(self, stats, state=None, limit=1.0):
        return super().__call__(stats, limit=limit / 2)


class Renamed(GlobalNorm):
    pass


@pytest.mark.parametrize(("rule", "is_known"), [(Halved(), False), (Renamed(), True)])
def test_a_rule_that_decides_otherwise_than_its_fragment_is_asked_itself(rule, is_known):
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    optimizer = optim.SGD([parameter], lr=1.0)
    pipeline = StepPipeline(optimizer, clip=rule)
    optimizer.step()
    assert parameter.detach().norm().item() == pytest.approx(1.0 if is_known else 0.5, rel=1e-5)
    assert bool(pipeline._decision._fused._programs) is is_known


def test_another_detector_sees_what_clipping_leaves_and_learns_of_skips():
    class Third(Detector):
        def __init__(self):
            self.seen, self.skips = [], []

        def __call__(self, stats):
            self.seen.append(stats.clipped_norm_sq.item())
            return torch.tensor(len(self.skips) % 3 == 2)

        def commit(self, skip):
            self.skips.append(bool(skip))

    parameter = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([parameter], lr=1.0)
    third = Third()
    pipeline = StepPipeline(optimizer, clip=GlobalNorm(1.0), detectors=[third])
    for step in range(6):
        parameter.grad = torch.full((4,), math.nan if step == 3 else 2.0)
        optimizer.step()
    assert third.seen == pytest.approx([1, 1, 1, math.nan, 1, 1], rel=1e-5, nan_ok=True)
    assert third.skips == [False, False, True, True, False, True]
    assert pipeline.counts().skipped == 3


def new_rule(pipeline):
    pipeline.clipper.rule = BlockRMS(0.25)


def new_window(pipeline):
    pipeline.clipper.rule.percentile = 20.0


def new_limit(pipeline):
    pipeline.clipper.rule.groups["0"] = 0.125


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (lambda: GlobalNorm(0.5), new_rule),
        (lambda: AutoClip(percentile=90, window=8), new_window),
        (lambda: GroupNorm(0.5), new_limit),
    ],
)
def test_a_change_of_the_rule_counts(rule, change, monkeypatch):
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(FusedDecision, "decide", lambda *_: None)
        parameter = nn.Parameter(torch.zeros(4))
        optimizer = optim.SGD([parameter], lr=1.0)
        pipeline = StepPipeline(optimizer, clip=rule())
        for step in range(12):
            if step == 6:
                before = parameter.detach().clone()
                change(pipeline)
            parameter.grad = torch.full((4,), 1.0 + step % 3)
            optimizer.step()
        results.append(parameter.detach() - before)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_parameter_of_another_size_has_its_own_root_mean_square():
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = optim.SGD(parameters, lr=1.0)
    StepPipeline(optimizer, clip=BlockRMS(1.0))
    for size in (4, 100):
        parameters[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(size))
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.full((100,), -1.0))


@pytest.mark.parametrize("rule", [AutoClip, ZClip])
def test_a_window_that_is_too_long_to_be_compiled_is_left_to_torch(rule):
    gradients = SimpleNamespace(parameters=1)
    for window, fits in ((rule().window, True), (100_000, False)):
        fused = FusedDecision(Clipper(rule(window=window)), ())
        assert fused._fits(gradients, ("0",), torch.device("cuda")) is fits
        assert fused._fits(gradients, ("0",), torch.device("cpu"))


def test_the_signals_to_skip_may_be_a_list():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([parameter], lr=1.0)
    guard = StepGuard(SpikeWindow(2), ["loss"], lambda: torch.tensor(math.nan))
    pipeline = StepPipeline(optimizer, detectors=[guard])
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert pipeline.counts().skipped == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="only Triton's interpreter runs on the CPU")
def test_triton_reads_the_averages_of_fewer_parameters(monkeypatch):
    from lightning_optim.kernels.triton.decision import DeviceRunner

    averages = []
    for run in (HostRunner, lambda: DeviceRunner(torch.device("cpu"))):
        monkeypatch.setattr("lightning_optim.step.fused.HostRunner", run)
        parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
        optimizer = optim.SGD(parameters, lr=1.0)
        guard = StepGuard(SpikeWindow(2), early_warning=EarlyWarning())
        StepPipeline(optimizer, detectors=[guard])
        for step in range(4):
            if step == 3:
                del optimizer.param_groups[0]["params"][-1]
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.full((4,), float(i + step))
            optimizer.step()
        averages.append(guard.state_dict()["moments"]["averages"])
    torch.testing.assert_close(*averages)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="only Triton's interpreter runs on the CPU")
@pytest.mark.parametrize("sparse", [False, True])
@EVERY
def test_triton_decides_as_numpy_does(name, sparse, monkeypatch):
    from lightning_optim.kernels.triton.decision import DeviceRunner

    host = Run(name, sparse=sparse)
    monkeypatch.setattr("lightning_optim.step.fused.HostRunner", lambda: DeviceRunner(torch.device("cpu")))
    device = Run(name, sparse=sparse)
    assert isinstance(host.fused._runner, HostRunner)
    assert isinstance(device.fused._runner, DeviceRunner)
    assert_alike(device, host)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("sparse", [False, True])
@EVERY
def test_a_gpu_decides_as_the_cpu_does(name, sparse, monkeypatch):
    # The host sees a step on a GPU 8 steps later, and limits with it; the CPU waits for as long here.
    monkeypatch.setattr(StepLog, "read", late(StepLog.read))
    assert_alike(Run(name, sparse=sparse, device="cuda"), Run(name, sparse=sparse))


def late(read):
    def read_late(log, everything=False):
        for i, (step, values, arrived) in enumerate(log._pending):
            log._pending[i] = step, values, arrived or _Arrived()
        return read(log, everything)

    return read_late


class _Arrived:
    def synchronize(self):
        pass


@pytest.mark.gpu
@on_a_gpu
@EVERY
def test_a_gpu_has_four_launches_beside_the_update(name):
    run = Run(name, device="cuda")
    run.pipeline.optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.pipeline.optimizer.step()
        torch.cuda.synchronize()
    others = ("Memcpy", "Optimizer", "cuda", "cuLaunch", "Activity")
    launches = [event.name for event in profile.events() if not event.name.startswith(others)]
    assert len(launches) <= 5, launches
