"""The early warning: gradients over their second moment, before the step, at no cost worth mentioning."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import GradStats
from lightning_optim.divergence import (
    Detector,
    DivergenceJudge,
    DivergenceReport,
    EarlyWarning,
    SpikeWindow,
    StepGuard,
)
from lightning_optim.divergence.early_warning import EarlySigns, SecondMoments
from lightning_optim.step import StepPipeline
from lightning_optim.step.gradients import decays_of
from lightning_optim.step.measure import measure_norm_sq
from tests.benchmarks import early_warning as benchmark
from tests.helpers import Net, batches, make_trainer


class EveryThird(Detector):
    """Leaves out every third step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, stats: GradStats) -> torch.Tensor:
        self.steps += 1
        return torch.tensor(self.steps % 3 == 0)


def _net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def _train(net: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        (net(inputs).square().mean() * scale).backward()
        if step % 4 == 1:  # a layer that is used now and then
            net[2].weight.grad = None
        optimizer.step()


def _groups(net: nn.Module) -> list[dict[str, Any]]:
    first, *others = net.parameters()
    return [{"params": [first], "betas": (0.8, 0.9)}, {"params": others}]


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("clip", [None, GlobalNorm(0.05)])
def test_the_sums_are_those_of_the_optimizers_own_second_moment(make, clip):
    net = _net()
    optimizer = make(_groups(net), lr=0.01)
    guard = StepGuard(detectors=[EveryThird()], early_warning=EarlyWarning())
    pipeline = StepPipeline(optimizer, clip=clip, detectors=[guard])
    _train(net, optimizer, 20)
    averages = guard.moments.state_dict()["averages"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    exact = torch.stack([optimizer.state[param]["exp_avg_sq"].double().sum() for param in params])
    steps = torch.stack([torch.as_tensor(optimizer.state[param]["step"]) for param in params]).double()
    betas = torch.tensor([0.9] + [0.999] * (len(params) - 1), dtype=torch.float64)
    torch.testing.assert_close(averages[1, 0], exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(averages[1, 1], 1 - betas**steps, rtol=1e-6, atol=0)
    assert steps.min() < steps.max() < 20
    pipeline.close()


def test_it_bounds_the_first_moment_over_the_root_of_the_second():
    net = _net()
    optimizer = optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    guard = StepGuard(early_warning=EarlyWarning())
    pipeline = StepPipeline(optimizer, detectors=[guard])
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator) * (100.0 if step > 20 else 1.0)
        optimizer.step()
        (seen,) = guard.read()
        for param in net.parameters():
            state = optimizer.state[param]
            first = state["exp_avg"].norm() / (1 - 0.9 ** (step + 1))
            second = (state["exp_avg_sq"].sum() / (1 - 0.99 ** (step + 1))) ** 0.5
            assert first / second <= seen.update_to_come[0] * (1 + 1e-5)
    pipeline.close()


def test_a_skipped_step_leaves_the_averages_bit_for_bit():
    net = _net()
    optimizer = optim.AdamW(net.parameters())
    guard = StepGuard(early_warning=EarlyWarning())
    pipeline = StepPipeline(optimizer, detectors=[guard])
    _train(net, optimizer, 3)
    before = copy.deepcopy((guard.moments.state_dict(), guard.early.state_dict()["values"]))
    gradient = next(net.parameters()).grad
    assert gradient is not None
    gradient[0, 0] = torch.nan
    optimizer.step()
    guard.read()
    assert torch.equal(guard.moments.state_dict()["averages"], before[0]["averages"])
    assert guard.early.state_dict()["values"] == before[1]
    pipeline.close()


def test_a_loss_scale_is_no_part_of_it():
    averages = []
    for scale in (1.0, 1024.0):
        net = _net()
        optimizer = optim.AdamW(net.parameters())
        guard = StepGuard(early_warning=EarlyWarning())
        pipeline = StepPipeline(optimizer, detectors=[guard])
        for _ in range(3):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            _train(net, optimizer, 1, scale)
        averages.append(guard.moments.state_dict()["averages"])
        pipeline.close()
    torch.testing.assert_close(*averages)


class Counted(TorchDispatchMode):
    """Counts operators, by whether they read a tensor of at least 1000 elements, and reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.large: Counter[str] = Counter()
        self.small: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        is_large = any(isinstance(one, torch.Tensor) and one.numel() >= 1000 for one in flat)
        (self.large if is_large else self.small)[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [optim.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_it_costs_no_pass_over_memory_and_no_synchronisation(make, monkeypatch):
    reads: list[int] = []

    def measured(grads):
        reads.append(len(grads))
        return measure_norm_sq(grads)

    monkeypatch.setattr("lightning_optim.step.gradients.measure_norm_sq", measured)
    counts = []
    for early in (None, EarlyWarning()):
        net = _net(width=40)
        optimizer = make(net.parameters(), lr=0.01)
        guard = StepGuard(SpikeWindow(2), early_warning=early)
        pipeline = StepPipeline(optimizer, clip=GlobalNorm(1.0), detectors=[guard])
        _train(net, optimizer, 3)
        reads.clear()
        with Counted() as counted:
            optimizer.step()
        counts.append((counted, list(reads)))
        assert len(guard.read()[-1].update_to_come) == (early is not None)
        pipeline.close()
    (without, reads_without), (with_it, reads_with) = counts
    assert reads_with == reads_without == [6]
    assert with_it.large == without.large
    synchronising = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}
    assert all(with_it.small[name] == without.small[name] for name in synchronising)
    assert with_it.small.total() - without.small.total() <= 20  # the same for any number of tensors
    assert "aten._to_copy.default" not in with_it.small - without.small or not torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_a_gpu():
    net = _net(width=64).cuda()
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    guard = StepGuard(SpikeWindow(2), early_warning=EarlyWarning())
    pipeline = StepPipeline(optimizer, detectors=[guard])
    inputs = torch.randn(16, 4, device="cuda")
    try:
        for step in range(20):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            if step == 10:  # kernels are there, and pinned memory
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.read(everything=True)[-1].update_to_come
    pipeline.close()


def _fed(signs: EarlySigns, values, accepted: bool = True):
    return [signs.update(np.array([value, 0.5]), (1, 1), ("a", "b"), accepted)[1] for value in values]


def _noise(steps: int, seed: int = 0) -> np.ndarray:
    return np.exp(0.1 * np.random.default_rng(seed).standard_normal(steps))


def test_noise_is_no_sign_and_a_jump_is_one():
    signs = EarlySigns()
    assert not any(_fed(signs, _noise(1000)))
    (found,) = _fed(signs, [2.5])[0]
    assert (found.group, found.value, found.worst, found.is_news) == ("a", 2.5, (0,), True)
    assert found.usual == pytest.approx(1.0, abs=0.05)
    (again,) = _fed(signs, [5.0])[0]
    assert not again.is_news


def test_a_value_that_is_usual_for_the_group_or_small_by_itself_is_no_sign():
    signs = EarlySigns()
    assert not any(_fed(signs, 2.5 * _noise(500)))
    steady = EarlySigns()
    assert not any(_fed(steady, [1.0] * 100 + [1.7]))
    assert _fed(steady, [1.9])[0]


def test_a_level_that_stays_is_adopted():
    signs = EarlySigns()
    _fed(signs, _noise(200))
    found = _fed(signs, 2.5 * _noise(200, seed=1))
    assert found[0]
    assert not any(found[100:])


def test_values_of_skipped_steps_do_not_enter():
    signs = EarlySigns()
    _fed(signs, _noise(100))
    before = signs.state_dict()["values"]
    _fed(signs, [3.0], accepted=False)
    assert signs.state_dict()["values"] == before


def test_signs_continue_from_a_state():
    values = np.concatenate([_noise(300), 2.5 * _noise(50)])
    whole, first, second = EarlySigns(), EarlySigns(), EarlySigns()
    expected = _fed(whole, values)
    part = _fed(first, values[:310])
    second.load_state_dict(first.state_dict())
    assert part + _fed(second, values[310:]) == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold=0.*for instance 6"),
        ({"min_value": 1.0}, "min_value=1.0.*above 1"),
        ({"warmup": 500}, "warmup=500 with window=128"),
        ({"every": 0}, "every=0"),
    ],
)
def test_limits_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyWarning(**arguments)


def _guard_after(steps: int, last: list[float], spikes: SpikeWindow | None = None) -> tuple[StepGuard, list]:
    """A guard that has seen two tensors with steady gradients, and then others."""
    guard, judge, alarms = StepGuard(spikes, (), early_warning=EarlyWarning()), DivergenceJudge(), []
    for norm_sq in [[1.0, 1.0]] * steps + [last]:
        values = torch.tensor(norm_sq, dtype=torch.float64)
        guard(GradStats(values, (1, 1), group_names=("body", "head")))
        guard.commit(torch.tensor(0.0))
        for seen in guard.read():
            alarms += judge.update(seen, {0: "body.weight", 1: "head.weight"})
    return guard, alarms


def test_the_warning_names_group_and_tensor_and_asks_for_nothing():
    guard, (found,) = _guard_after(200, [1.0, 400.0])
    assert found.kind == "early_warning"
    assert "group head" in found.text
    assert found.names == ("head.weight",)
    assert not found.escalates
    assert guard.early.last == pytest.approx(np.sqrt((0.9 + 0.1 * 400) / 4.98), rel=0.2)


def test_a_step_that_is_reported_anyway_is_no_early_warning():
    _, alarms = _guard_after(200, [1.0, 400.0], SpikeWindow(2))
    assert [found.kind for found in alarms] == ["spike"]


def test_the_report_shows_it():
    guard = StepGuard(early_warning=EarlyWarning())
    guard(GradStats(torch.tensor([9.0, 16.0]), (1, 1)))
    guard.commit(torch.tensor(0.0))
    report = DivergenceReport()
    report.see(0, 0, guard.read()[0])
    assert "| 3, 4 | 1, 1 |" in report.markdown()
    assert report.as_dict()["last_steps"][0]["grad_over_second_moment"] == [1.0, 1.0]


def test_averages_follow_their_parameters():
    moments = SecondMoments()
    moments(GradStats(torch.tensor([1.0, 2.0, 3.0]), (3,)))
    moments.commit(torch.tensor(0.0))
    moments.move([2, -1, 0])
    moments(GradStats(torch.tensor([3.0, 1.0]), (2,), places=torch.tensor([0, 2]), parameters=4))
    moments.commit(torch.tensor(0.0))
    torch.testing.assert_close(
        moments.state_dict()["averages"][2], torch.tensor([[0.0597, 0, 0.0199, 0], [0.0199, 0, 0.0199, 0]])
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95)), (0.8, 0.95)),
        (lambda p: torch.optim.AdamW(p, betas=(0.0, 0.95)), (0.9, 0.95)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7), (0.7, 0.99)),
        (lambda p: torch.optim.SGD(p, lr=0.1), (0.9, 0.99)),
        (lambda p: torch.optim.RMSprop(p, alpha=0.97), (0.9, 0.97)),
        (lambda p: torch.optim.Adadelta(p, rho=0.8), (0.9, 0.8)),
        (lambda p: torch.optim.Adagrad(p), (0.9, 0.99)),
        (lambda p: optim.Adan(p), (0.98, 0.99)),
        (lambda p: optim.AdEMAMix(p), (0.9, 0.999)),
        (lambda p: optim.Lion(p), (0.9, 0.99)),
        (lambda p: optim.Adafactor(p), (0.9, 0.99)),
    ],
)
def test_decays_are_the_optimizers_own_where_it_has_some(make, expected):
    assert decays_of(make([nn.Parameter(torch.ones(2, 2))]).param_groups[0]) == expected


def test_a_resumed_run_has_the_same_averages_and_signs(tmp_path):
    def fit(steps: int, resume: Any = None) -> dict[str, Any]:
        guard = lo.DivergenceGuard(report_dir=str(tmp_path))
        trainer = make_trainer(
            [guard, lo.ConfigureOptimizers("adamw", lr=0.01, schedule="constant")], max_steps=steps, max_epochs=-1
        )
        trainer.fit(Net(seed=1), batches(1), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        checkpoint = torch.load(tmp_path / f"{steps}.ckpt", weights_only=True)
        return checkpoint["lightning_optim.divergence_guard"]["optimizers"][0]["watch"]

    whole = fit(20)
    fit(12)
    resumed = fit(20, tmp_path / "12.ckpt")
    assert torch.equal(resumed["moments"]["averages"], whole["moments"]["averages"])
    assert resumed["early"] == whole["early"]
    assert len(whole["early"]["values"]) == 20


def test_a_rollback_restores_them(tmp_path):
    """They belong to the weights of the snapshot."""
    guard, seen = lo.DivergenceGuard(report_dir=str(tmp_path)), []

    class Returns(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            watch = guard._guarded[0].watch
            seen.append((watch.moments.state_dict(), watch.early.state_dict()["values"]))
            if trainer.global_step == 5:
                guard._snapshots.restore()
                seen.append((watch.moments.state_dict(), watch.early.state_dict()["values"]))

    make_trainer([guard, Returns()], max_steps=6).fit(Net(), batches(6))
    assert len(seen[4][1]) == 5
    assert seen[5] == ({}, [])


def test_one_poisoned_layer_is_named_before_the_loss_shows_it():
    outcome = benchmark.run("perceptron", "one layer's gradient x-30", seed=0, steps=330)
    assert outcome.before == 0
    assert outcome.early is not None
    assert outcome.other is not None
    assert outcome.early < outcome.other
    assert outcome.worst[0] == outcome.victim
