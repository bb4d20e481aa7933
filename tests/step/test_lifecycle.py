"""A pipeline comes and goes: what it hangs on an optimizer, what it leaves, what it costs, what it reports."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import optim
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import StepCounts
from lightning_optim.divergence import NonFiniteGradient, SpikeWindow, StepGuard
from lightning_optim.step import StepPipeline
from tests.helpers import bit_equal, count_reads
from tests.optimizer_cases import ALL, OURS, TORCH, TORCH_FUSED, Case, set_gradients

BOTH = pytest.mark.parametrize("case", [OURS, TORCH_FUSED, TORCH], ids=str)
GUARD = {"detectors": [NonFiniteGradient()]}


class Operations(TorchDispatchMode):
    """Lists the names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(name)


def _traces(optimizer):
    """All of an optimizer that a pipeline could leave its mark on."""
    return {
        **{key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")},
        "pre": list(optimizer._optimizer_step_pre_hooks.values()),
        "post": list(optimizer._optimizer_step_post_hooks.values()),
        "groups": [sorted(group) for group in optimizer.param_groups],
    }


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("scheduled", [False, True])
def test_close_leaves_nothing_behind(case, scheduled):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    if scheduled:  # torch's schedulers wrap `step` as well
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = copy.copy(_traces(optimizer))
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)
    if hasattr(optimizer, "train"):
        optimizer.train()
        before = {**before, "groups": [sorted(group) for group in optimizer.param_groups]}
    for factor in (1.0, math.nan):
        set_gradients(parameters, 1, factor, case.sparse)
        optimizer.step()
    pipe.close()
    after = _traces(optimizer)
    # Marks of schedulefree, of torch's schedulers, and of our optimizers themselves.
    others = {"train_mode", "_opt_called", "step_stats", "_batches"}
    assert after.keys() - others == before.keys() - others
    assert after["pre"] == before["pre"]
    assert after["post"] == before["post"]
    assert vars(optimizer).get("step") == before.get("step")


@BOTH
def test_a_closed_pipeline_no_longer_clips_or_skips(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    StepPipeline(optimizer, clip=GlobalNorm(1e-3), **GUARD).close()
    reference = case.parameters()
    for each, made in ((parameters, optimizer), (reference, case.make(reference))):
        set_gradients(each, 1)
        made.step()
    assert bit_equal(parameters, reference)
    set_gradients(parameters, 1, math.nan)
    optimizer.step()
    assert parameters[-1].isnan().any()


@BOTH
def test_pipelines_can_follow_one_another(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    for max_norm in (0.5, 1e6):
        pipe = StepPipeline(optimizer, clip=GlobalNorm(max_norm), **GUARD)
        set_gradients(parameters, 1)
        optimizer.step()
        assert pipe.counts() == StepCounts(steps=1, clipped=1 if max_norm == 0.5 else 0)
        pipe.close()


def test_close_keeps_a_later_wrapper_of_step_which_then_forwards_every_call():
    case = TORCH
    parameters = case.parameters()
    optimizer = case.make(parameters)
    pipe = StepPipeline(optimizer, **GUARD)
    inner, calls = optimizer.step, []
    theirs = optimizer.step = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    pipe.close()
    assert optimizer.step is theirs
    set_gradients(parameters, 1, math.nan)
    optimizer.step()
    assert calls == [1]
    assert parameters[-1].isnan().any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_update_leaves_no_operands_on_the_optimizer(error, monkeypatch):
    case = TORCH_FUSED
    parameters = case.parameters()
    optimizer = case.make(parameters)
    before = _traces(optimizer).keys()
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)
    set_gradients(parameters, 1)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_adamw_", fail)
        with pytest.raises(error):
            optimizer.step()
    pipe.close()
    assert _traces(optimizer).keys() == before


def test_the_step_after_an_interrupted_update_is_not_clipped_by_its_divisor(monkeypatch):
    case = Case(torch.optim.SGD, {"lr": 1.0, "fused": True}, shapes=((4,),))
    parameters = case.parameters()
    optimizer = case.make(parameters)
    StepPipeline(optimizer, clip=GlobalNorm(0.5), **GUARD)

    def fail(*args, **kwargs):
        raise RuntimeError("mine")

    set_gradients(parameters, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_sgd_", fail)
        with pytest.raises(RuntimeError, match="mine"):
            optimizer.step()
    set_gradients(parameters, 2, 1e-2)
    start, grad = parameters[0].detach().clone(), parameters[0].grad.clone()
    optimizer.step()
    torch.testing.assert_close(start - parameters[0].detach(), grad, rtol=1e-4, atol=1e-6)


@BOTH
def test_state_dict_is_torchs_own_and_loads_without_us(case):
    parameters = case.parameters()
    optimizer = case.make(parameters)
    StepPipeline(optimizer, clip=GlobalNorm(0.5), on_report=lambda record: None, **GUARD)
    set_gradients(parameters, 1)
    optimizer.step()
    plain = case.make(case.parameters())
    set_gradients(list(plain.param_groups[0]["params"]), 1)
    plain.step()
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    saved, of_plain = (each.state_dict()["param_groups"] for each in (optimizer, plain))
    assert [group.keys() for group in saved] == [group.keys() for group in of_plain]
    plain.load_state_dict(optimizer.state_dict())
    assert bit_equal(plain.state_dict(), optimizer.state_dict())


@BOTH
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_torchs_schedulers_notice_the_steps(case, scheduler_first):
    optimizer = case.make(case.parameters())
    if not scheduler_first:
        StepPipeline(optimizer, **GUARD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if scheduler_first:
        StepPipeline(optimizer, **GUARD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps before its optimizer
        set_gradients(list(optimizer.param_groups[0]["params"]), 1)
        optimizer.step()
        scheduler.step()


# What it costs.


def _two_hundred_tensors():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(200)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    return parameters


def test_the_gradients_are_read_once_however_many_parts_ask(monkeypatch):
    reads = count_reads(monkeypatch)
    optimizer = torch.optim.AdamW(_two_hundred_tensors(), fused=True)
    StepPipeline(
        optimizer,
        clip=GlobalNorm(0.5),
        detectors=[NonFiniteGradient(), NonFiniteGradient()],
        on_report=pytest.fail,
        report_due=lambda: False,
    )
    optimizer.step()
    assert reads == [200]


def test_nothing_is_measured_if_nothing_needs_it(monkeypatch):
    reads = count_reads(monkeypatch)
    optimizer = torch.optim.AdamW(_two_hundred_tensors(), fused=True)
    StepPipeline(optimizer, on_report=pytest.fail, report_due=lambda: False)
    with Operations() as seen:
        optimizer.step()
    assert reads == []
    assert seen.count("clone") == 0


@pytest.mark.parametrize("case", [OURS, TORCH_FUSED], ids=str)
def test_a_fused_step_never_asks_the_device_for_a_number(case):
    records = []
    optimizer = case.make(_two_hundred_tensors())
    pipe = StepPipeline(optimizer, clip=GlobalNorm(0.5), on_report=records.append, **GUARD)
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
        pipe.counts()
    assert len(records) == 2
    assert seen.count("_local_scalar_dense") == 0


# What it reports.


@BOTH
@pytest.mark.parametrize("bad", [False, True])
def test_a_record_describes_its_step(case, bad):
    records = []
    parameters = case.parameters()
    first, rest = parameters[:1], parameters[1:]
    optimizer = case.make([{"params": first, "name": "first", "lr": 0.1}, {"params": rest, "lr": 0.2}])
    StepPipeline(optimizer, clip=GlobalNorm(0.5), on_report=records.append, **GUARD)
    set_gradients(parameters, 1, math.nan if bad else 1.0)
    grads, before = copy.deepcopy([p.grad for p in parameters]), copy.deepcopy(parameters)
    optimizer.step()
    (record,) = records
    assert record.group_names == ("first", "1")
    assert [group["lr"] for group in record.hyperparameters] == [0.1, 0.2]
    assert record.steps == 1
    assert record.counts.tolist() == [0 if bad else 1, int(bad)]
    assert record.skip.item() == bad
    assert record.grad.group_norms()[0].item() == pytest.approx(grads[0].norm().item(), rel=1e-5)
    changed = [
        sum(float((p - q).detach().square().sum()) for p, q in zip(*pair, strict=True))
        for pair in ((before[:1], first), (before[1:], rest))
    ]
    size = [sum(float(p.detach().square().sum()) for p in group) for group in (before[:1], before[1:])]
    assert (changed == [0, 0]) is bad
    if bad:  # no update, so nothing to tell of it
        assert record.update.sums.isnan().all()
    else:
        assert record.update.groups("update_sq").tolist() == pytest.approx(changed, rel=1e-4)
        assert record.update.groups("param_sq").tolist() == pytest.approx(size, rel=1e-5)
    if not bad:
        total = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        assert record.grad.total_norm().item() == pytest.approx(total, rel=1e-5)
        assert record.clipped_norm_sq.sum().sqrt().item() == pytest.approx(0.5, rel=1e-4)


def test_only_due_steps_are_reported():
    records, due = [], iter([False, True, False, True])
    parameters = OURS.parameters()
    optimizer = OURS.make(parameters)
    StepPipeline(optimizer, on_report=records.append, report_due=lambda: next(due))
    for seed in range(4):
        set_gradients(parameters, seed)
        optimizer.step()
    assert [record.steps for record in records] == [2, 4]


def test_operations_of_clipping_and_guard_do_not_grow_with_the_number_of_tensors():
    counts = []
    for tensors in (3, 200):
        parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(tensors)]
        optimizer = optim.AdamW(parameters)
        watch = StepGuard(SpikeWindow(2), loss=lambda: torch.tensor(1.0))
        StepPipeline(optimizer, clip=GlobalNorm(0.5), detectors=[watch])
        for parameter in parameters:
            parameter.grad = torch.ones(4)
        for _ in range(3):
            optimizer.step()
        with Operations() as seen:
            optimizer.step()  # sorts anew: whoever looks on is part of what tensors are
            seen.names.clear()
            optimizer.step()
        counts.append(len(seen.names))
    assert counts[0] == counts[1] <= 30
