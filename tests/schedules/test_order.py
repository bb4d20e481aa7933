"""When the scheduler is moved, where it begins, and what a copy of it is."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lightning_optim import optim
from lightning_optim.core.durations import Horizon
from lightning_optim.schedules import Cosine, Linear, ReduceOnPlateau, Scheduler
from tests.schedules.cases import optimizer_of


def _said(move):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        move()
    return [(warning.category, str(warning.message).split(":")[0].split(". ")[0]) for warning in caught]


@pytest.mark.parametrize("cls", [torch.optim.SGD, optim.SGD])
def test_a_scheduler_stepped_before_its_optimizer_warns_once_as_torchs_does(cls):
    def move(make):
        optimizer = cls([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        for _ in range(3):
            scheduler.step()
            optimizer.step()

    ours = _said(lambda: move(lambda o: Scheduler(o, Linear(), Horizon(9))))
    assert ours == _said(lambda: move(lambda o: StepLR(o, 1)))
    assert ours == [(UserWarning, "Detected call of `lr_scheduler.step()` before `optimizer.step()`")]


def _resumed(scheduler):
    scheduler.load_state_dict(Scheduler(optimizer_of(1.0), Linear(), Horizon(9)).state_dict() | {"last_epoch": 3})


def _skipped(scheduler):
    skips = iter(range(1, 9))
    scheduler.hold_on(lambda: 0)
    scheduler._skipped_steps = lambda: next(skips)


def _wrapped_anew(scheduler):
    inner = scheduler.optimizer.step
    scheduler.optimizer.step = lambda: inner()


@pytest.mark.parametrize("first", [lambda s: s.optimizer.step(), _resumed, _skipped, _wrapped_anew])
def test_no_warning_without_a_wrong_order(first):
    scheduler = Scheduler(optimizer_of(1.0), Linear(), Horizon(9))
    first(scheduler)
    assert _said(scheduler.step) == []


def test_a_skipped_step_does_not_use_the_warning_up():
    scheduler = Scheduler(optimizer_of(1.0), Linear(), Horizon(9))
    skips = iter([0, 1, 1])
    scheduler.hold_on(lambda: next(skips))
    assert _said(scheduler.step) == []
    assert len(_said(scheduler.step)) == 1


# Going on without a state.


def test_a_run_continues_from_the_given_step():
    whole = Scheduler(optimizer_of(0.4, 0.04, momentum=0.5), Cosine(warmup=3), Horizon(20), {"momentum": Linear()})
    for _ in range(7):
        whole.optimizer.step()
        whole.step()
    groups = whole.optimizer.state_dict()["param_groups"]
    optimizer = optimizer_of(0.4, 0.04, momentum=0.5)
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    rest = Scheduler(optimizer, Cosine(warmup=3), Horizon(20), {"momentum": Linear()}, last_epoch=6)
    for _ in range(5):
        assert rest.last_epoch == whole.last_epoch
        for one, other in zip(optimizer.param_groups, whole.optimizer.param_groups, strict=True):
            assert (one["lr"], one["momentum"]) == (other["lr"], other["momentum"])
        for each in (whole, rest):
            each.optimizer.step()
            each.step()


def test_the_step_given_means_what_torchs_schedulers_mean_by_it():
    ours, theirs = optimizer_of(0.4), optimizer_of(0.4)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["initial_lr"] = 0.8
    one = Scheduler(ours, Linear(final=0.5), Horizon(10), last_epoch=3)
    other = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 1 - 0.05 * step, last_epoch=3)
    assert one.get_last_lr() == pytest.approx(other.get_last_lr())
    assert one.last_epoch == other.last_epoch == 4


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"last_epoch": 3}, KeyError, r"'initial_lr' is not specified in param_groups\[0\]"),
        (
            {"last_epoch": 3, "schedules": {"momentum": Linear()}, "lr": 0.4},
            KeyError,
            r"'initial_momentum' is not specified in param_groups\[0\]",
        ),
        ({"last_epoch": -2}, ValueError, r"last_epoch=-2"),
        ({"last_epoch": 1.5}, ValueError, r"last_epoch=1.5"),
        ({"last_epoch": 3, "schedule": ReduceOnPlateau(), "lr": 0.4}, ValueError, r"how often.*state_dict"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(options, error, told):
    optimizer = optimizer_of(0.4, momentum=0.9)
    if "lr" in options:
        optimizer.param_groups[0]["initial_lr"] = options.pop("lr")
    with pytest.raises(error, match=told):
        Scheduler(optimizer, options.pop("schedule", Linear()), Horizon(9), **options)


# Copies.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
@pytest.mark.parametrize("schedule", [Cosine(final_lr=0.1), ReduceOnPlateau(patience=0)])
def test_a_copy_goes_its_own_way_from_where_it_stands(copied, schedule):
    scheduler = Scheduler(optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.4), schedule, Horizon(9))
    twin = copied(scheduler)
    assert vars(twin).keys() == vars(scheduler).keys()
    for _ in range(3):
        for each in (scheduler, twin):
            each.optimizer.step()
            assert _said(each.step) == []
            if isinstance(schedule, ReduceOnPlateau):
                each.observe(1.0)
        assert twin.get_last_lr() == scheduler.get_last_lr()
    assert twin.optimizer is not scheduler.optimizer
    twin.optimizer.step()
    twin.step()
    assert twin.last_epoch == scheduler.last_epoch + 1
