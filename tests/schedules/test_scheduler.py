from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_optim.durations import Horizon
from lightning_optim.schedules import Cosine, Linear, Scheduler


def _cosine(step, total, warmup, final):
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (min(step, total) - warmup) / (total - warmup))) / 2


def _optimizer(*rates, **options):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=1.0, **options)


def test_scheduler_keeps_the_ratio_of_the_groups():
    optimizer = _optimizer(0.4, 0.04)
    scheduler = Scheduler(optimizer, Cosine(warmup=4, final=0.1), Horizon(total_steps=20))
    for step in range(25):
        expected = _cosine(step, 20, 4, 0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4 * expected, 0.04 * expected])
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()


def test_scheduler_without_a_length_keeps_the_peak_until_it_is_resolved():
    optimizer = _optimizer(0.4)
    scheduler = Scheduler(optimizer, Linear(warmup=4))
    assert optimizer.param_groups[0]["lr"] == 0.4
    scheduler.resolve(Horizon(total_steps=10))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_scheduler_refuses_a_run_that_its_schedule_does_not_fit():
    with pytest.raises(ValueError, match="longer than the run"):
        Scheduler(_optimizer(0.4), Linear(warmup=11), Horizon(total_steps=10))
    scheduler = Scheduler(_optimizer(0.4), Linear(warmup=11))
    with pytest.raises(ValueError, match="longer than the run"):
        scheduler.resolve(Horizon(total_steps=10))


def test_tensor_rates_are_written_in_place():
    rate = torch.tensor(0.4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.3)
    first = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    assert first.item() == pytest.approx(0.3)
    assert rate.item() == pytest.approx(0.2)


def test_a_group_added_later_follows_at_its_own_peak():
    optimizer = _optimizer(0.4)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.08})
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.04])


def test_skipped_steps_do_not_advance_it():
    skipped = 3
    scheduler = Scheduler(_optimizer(1.0), Linear(), Horizon(total_steps=10))
    scheduler.hold_on(lambda: skipped)
    positions = []
    for skips in (3, 4, 4, 6, 6, 6):  # an accelerator may tell of two skips at once
        skipped = skips
        scheduler.optimizer.step()
        scheduler.step()
        positions.append(scheduler.last_epoch)
    assert positions == [1, 1, 2, 1, 2, 3]


def test_state_is_the_position_alone_and_restores_the_rate():
    def make():
        optimizer = _optimizer(0.4)
        return Scheduler(optimizer, Cosine(warmup=3), Horizon(total_steps=20))

    scheduler = make()
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())
    assert state == {"last_epoch": 7}
    restored = make()
    restored.load_state_dict(state)
    for _ in range(10):
        assert restored.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]
        for each in (scheduler, restored):
            each.optimizer.step()
            each.step()


def test_an_epoch_is_refused():
    scheduler = Scheduler(_optimizer(1.0), Linear(), Horizon(total_steps=10))
    with pytest.raises(ValueError, match="epoch=3"):
        scheduler.step(3)
