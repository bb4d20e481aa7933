from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_optim import schedules
from lightning_optim.core.durations import Horizon
from lightning_optim.schedules import Cosine, Linear, MultiStepDecay, ReduceOnPlateau, Scheduler, StepDecay
from lightning_optim.schedules.plateau import Observer
from tests.distributed.ranks import run_ranks
from tests.schedules.cases import cosine, optimizer_of


def test_scheduler_keeps_the_ratio_of_the_groups():
    optimizer = optimizer_of(0.4, 0.04)
    scheduler = Scheduler(optimizer, Cosine(warmup=4, final=0.1), Horizon(total_steps=20))
    for step in range(25):
        expected = cosine(step, 20, 4, 0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4 * expected, 0.04 * expected])
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()


def test_scheduler_without_a_length_keeps_the_peak_until_it_is_resolved():
    optimizer = optimizer_of(0.4)
    scheduler = Scheduler(optimizer, Linear(warmup=4))
    assert optimizer.param_groups[0]["lr"] == 0.4
    scheduler.resolve(Horizon(total_steps=10))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_scheduler_refuses_a_run_that_its_schedule_does_not_fit():
    with pytest.raises(ValueError, match="longer than the run"):
        Scheduler(optimizer_of(0.4), Linear(warmup=11), Horizon(total_steps=10))
    scheduler = Scheduler(optimizer_of(0.4), Linear(warmup=11))
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


def test_a_group_added_later_follows_at_the_ratio_it_joined_with():
    optimizer = optimizer_of(0.4)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.08})
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2 * 0.08 / 0.3])


def test_skipped_steps_do_not_advance_it():
    skipped = 3
    scheduler = Scheduler(optimizer_of(1.0), Linear(), Horizon(total_steps=10))
    scheduler.hold_on(lambda: skipped)
    positions = []
    for skips in (3, 4, 4, 6, 6, 6):  # an accelerator may tell of two skips at once
        skipped = skips
        scheduler.optimizer.step()
        scheduler.step()
        positions.append(scheduler.last_epoch)
    assert positions == [1, 1, 2, 1, 2, 3]


def test_state_is_the_position_and_its_curve_and_restores_the_rate():
    def make():
        optimizer = optimizer_of(0.4)
        return Scheduler(optimizer, Cosine(warmup=3), Horizon(total_steps=20))

    scheduler = make()
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())
    assert state == {
        "last_epoch": 7,
        "total_steps": 20,
        "steps_per_epoch": None,
        "schedules": {"lr": "Cosine(warmup=3)"},
    }
    restored = make()
    restored.load_state_dict(state)
    for _ in range(10):
        assert restored.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]
        for each in (scheduler, restored):
            each.optimizer.step()
            each.step()


def test_an_epoch_is_refused():
    scheduler = Scheduler(optimizer_of(1.0), Linear(), Horizon(total_steps=10))
    with pytest.raises(ValueError, match="epoch=3"):
        scheduler.step(3)


# Other hyperparameters, and groups with a schedule of their own.


def test_other_hyperparameters_follow_their_schedules_at_their_groups_ratio():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": params[0], "weight_decay": 0.4}, {"params": params[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([*groups, {"params": params[2], "betas": (0.8, 0.9)}], lr=0.5, weight_decay=0.1)
    schedules = {"weight_decay": Linear(final=3), "momentum": Linear(final=0.5), "beta2": Linear(final=0.9)}
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=10), schedules)
    for step in range(13):
        p = min(step / 10, 1)
        first, second, third = optimizer.param_groups
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 * (1 - p)] * 3)
        assert first["weight_decay"] == pytest.approx(0.4 * (1 + 2 * p))
        assert second["weight_decay"] == 0
        assert third["weight_decay"] == pytest.approx(0.1 * (1 + 2 * p))
        assert first["betas"] == pytest.approx((0.9 * (1 - p / 2), 0.999 * (1 - p / 10)))
        assert third["betas"] == pytest.approx((0.8 * (1 - p / 2), 0.9 * (1 - p / 10)))
        optimizer.step()
        scheduler.step()


def test_a_named_group_may_have_a_schedule_of_its_own():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "name": name} for name in ("head", "body")]
    optimizer = torch.optim.SGD([groups[0] | {"schedule": Linear(warmup=4)}, groups[1]], lr=0.4)
    scheduler = Scheduler(optimizer, Linear(), Horizon(total_steps=4))
    assert "schedule" not in optimizer.state_dict()["param_groups"][0]
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [rates[0] for rates in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0])
    assert [rates[1] for rates in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])


@pytest.mark.parametrize(
    ("schedules", "told"),
    [
        ({"weight_decya": Linear()}, r"SGD has no hyperparameter 'weight_decya'.*'weight_decay'"),
        ({"beta1": Linear()}, r"no hyperparameter 'beta1'"),
        ({"nesterov": Linear()}, r"no hyperparameter 'nesterov'"),
        ({"lr": Linear()}, r"lr as `schedule`"),
        ({"momentum": Linear(final=1.2)}, r"schedule of momentum would set it to 1.*below 1"),
        ({"momentum": Linear(warmup=11)}, r"longer than the run"),
    ],
)
def test_a_hyperparameter_that_cannot_be_scheduled_is_refused(schedules, told):
    with pytest.raises(ValueError, match=told):
        Scheduler(optimizer_of(0.1, momentum=0.9), Linear(), Horizon(total_steps=10), schedules)


# A metric.


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 2])
def test_a_plateau_is_what_torch_takes_for_one(mode, patience):
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(60, generator=generator) + 0.05).tolist()
    values[10] = math.nan
    theirs = optimizer_of(0.4)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, mode, 0.5, patience, min_lr=0.4 * 0.1)
    ours = optimizer_of(0.4)
    schedule = ReduceOnPlateau(warmup=3, mode=mode, factor=0.5, patience=patience, floor=0.1)
    scheduler = Scheduler(ours, schedule, Horizon())
    scheduler.observe(values[0] - 1000 if mode == "min" else 1000)  # during the warmup: does not count
    for _ in range(3):
        ours.step()
        scheduler.step()
    for value in values:
        reference.step(value)
        scheduler.observe(value)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
    assert ours.param_groups[0]["lr"] < 0.4


def test_a_plateau_resumes_where_it_was():
    def make():
        return Scheduler(optimizer_of(0.4), ReduceOnPlateau(factor=0.5, patience=1), Horizon())

    scheduler = make()
    for value in (1.0, 1.0, 1.0, 1.0):
        scheduler.observe(value)
    restored = make()
    restored.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert restored.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    restored.observe(1.0)
    assert restored.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_other_schedules_look_at_no_metric():
    with pytest.raises(ValueError, match=r"Linear\(\) looks at no metric.*ReduceOnPlateau"):
        Scheduler(optimizer_of(0.4), Linear(), Horizon(total_steps=9)).observe(1.0)


# Loading a state of another curve.


def _moved(schedule, total, steps):
    scheduler = Scheduler(optimizer_of(1.0), schedule, Horizon(total_steps=total))
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    return scheduler


def test_a_longer_run_keeps_its_old_curve_with_a_warning():
    longer = Scheduler(optimizer_of(1.0), Linear(final=0.2), Horizon(total_steps=20))
    with pytest.warns(UserWarning, match=r"ends at step 10, this run at 20.*on_resume=\"config\""):
        longer.load_state_dict(_moved(Linear(final=0.2), 10, 5).state_dict())
    assert longer.get_last_lr() == pytest.approx([0.6])
    assert longer.horizon == Horizon(10)


@pytest.mark.parametrize("late", [False, True], ids=["known", "resolved-later"])
def test_a_longer_run_is_stretched_when_asked_to(late):
    told = []
    longer = Scheduler(
        optimizer_of(1.0),
        Linear(final=0.2),
        None if late else Horizon(total_steps=20),
        on_resume="config",
        tell=lambda message, warn: told.append((message, warn)),
    )
    longer.load_state_dict(_moved(Linear(final=0.2), 10, 5).state_dict())
    longer.resolve(Horizon(total_steps=20))
    assert longer.get_last_lr() == pytest.approx([0.8])
    ((message, warn),) = told
    assert "ends at step 10, this run at 20" in message
    assert not warn


def test_another_schedule_is_refused_or_taken_as_said():
    state = _moved(Linear(), 10, 5).state_dict()
    with pytest.raises(ValueError, match=r"lr: Linear\(\) → Cosine\(\).*on_resume=\"config\""):
        Scheduler(optimizer_of(1.0), Cosine(), Horizon(total_steps=10)).load_state_dict(state)
    told = []
    taken = Scheduler(
        optimizer_of(1.0),
        Cosine(),
        Horizon(total_steps=10),
        {"momentum": Linear()},
        on_resume="config",
        tell=lambda message, _: told.append(message),
    )
    taken.load_state_dict(state)
    assert taken.get_last_lr() == pytest.approx([0.5])
    assert told == ["Resumed with the configuration's schedule: lr: Linear() → Cosine(); momentum: none → Linear()."]


def test_an_unknown_value_of_on_resume_is_refused():
    with pytest.raises(ValueError, match=r"on_resume='confg'.*'config'"):
        Scheduler(optimizer_of(1.0), Linear(), on_resume="confg")


def plateau_on_a_rank() -> float:
    """The rate after looks at a metric that is ever better on rank 0 and ever worse on rank 1."""
    rank = dist.get_rank()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = Scheduler(optimizer, ReduceOnPlateau(factor=0.5, patience=0), Horizon())
    observer = Observer(scheduler)
    for values in ((4.0, 2.0), (3.5, 2.1), (2.0, 3.8)):  # means 3, 2.8, 2.9
        metric = torch.tensor(values[rank])
        observer.step(metric)
        assert metric == values[rank]
    return optimizer.param_groups[0]["lr"]


def test_all_ranks_take_the_mean_of_what_they_see_for_the_metric():
    assert run_ranks(plateau_on_a_rank) == [0.2, 0.2]


@pytest.mark.parametrize("schedule", [StepDecay(every=3, factor=0.5), MultiStepDecay(milestones=[3])])
def test_a_checkpoint_with_the_former_name_of_its_schedule_is_resumed(schedule):
    state = _moved(schedule, 10, 5).state_dict()
    state["schedules"]["lr"] = state["schedules"]["lr"].replace("StepDecay(", "Step(")
    resumed = Scheduler(optimizer_of(1.0), schedule, Horizon(total_steps=10))
    resumed.load_state_dict(state)
    assert resumed.last_epoch == 5
    state["schedules"]["lr"] = state["schedules"]["lr"].replace("3", "4")
    with pytest.raises(ValueError, match="The checkpoint's schedule is not the one configured"):
        resumed.load_state_dict(state)


def test_former_names_of_schedules_are_the_same_classes():
    assert (schedules.Step, schedules.MultiStep) == (StepDecay, MultiStepDecay)
    assert schedules.get_schedule("step_decay") is schedules.get_schedule("step") is StepDecay
