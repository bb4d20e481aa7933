"""Division of an optimizer's work over the ranks of DDP: on where gradients are the same on all ranks, else off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_optim as lo
from lightning_optim.factory import division


class DDPStrategy:
    """What the strategy has that says how gradients are reduced."""

    _ddp_comm_state: Any = None
    _ddp_comm_hook: Any = None
    _model_averaging_period: Any = None


class SingleDeviceStrategy:
    """Any other."""


@pytest.fixture
def two_ranks(monkeypatch):
    """A process group of two ranks, called "world"."""
    names: dict[str, Any] = {"is_available": lambda: True, "is_initialized": lambda: True, "get_world_size": lambda: 2}
    monkeypatch.setattr(division, "dist", SimpleNamespace(**names, group=SimpleNamespace(WORLD="world")))


def optimizer_after(strategy: Any, divide_over: Any = None, **of_module: Any) -> Any:
    optimizer = lo.optim.Muon([torch.nn.Parameter(torch.ones(4, 4))])
    optimizer.divide_over = divide_over
    division.divide_work(optimizer, SimpleNamespace(trainer=SimpleNamespace(strategy=strategy), **of_module))
    return optimizer


@pytest.mark.usefixtures("two_ranks")
def test_under_ddp_work_is_divided_until_the_end_of_the_fit():
    optimizer = optimizer_after(DDPStrategy())
    assert optimizer.divide_over == "world"
    division.undivide_work(optimizer)
    assert optimizer.divide_over is None


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("attribute", ["_ddp_comm_state", "_ddp_comm_hook", "_model_averaging_period"])
def test_not_where_gradients_may_differ(attribute):
    strategy = DDPStrategy()
    setattr(strategy, attribute, 1)
    assert optimizer_after(strategy).divide_over is None


@pytest.mark.usefixtures("two_ranks")
def test_not_with_parameters_that_ddp_ignores():
    assert optimizer_after(DDPStrategy(), _ddp_params_and_buffers_to_ignore=["experts.weight"]).divide_over is None


@pytest.mark.usefixtures("two_ranks")
def test_not_with_another_strategy_and_not_against_the_user():
    assert optimizer_after(SingleDeviceStrategy()).divide_over is None
    refused = optimizer_after(DDPStrategy(), divide_over=False)
    assert refused.divide_over is False
    division.undivide_work(refused)
    assert refused.divide_over is False


@pytest.mark.usefixtures("two_ranks")
def test_optimizers_of_others_and_modules_without_a_trainer_are_left_alone():
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    division.divide_work(theirs, SimpleNamespace(trainer=SimpleNamespace(strategy=DDPStrategy())))
    division.undivide_work(theirs)
    assert not hasattr(theirs, "divide_over")
    ours = lo.optim.Muon([torch.nn.Parameter(torch.ones(4, 4))])
    division.divide_work(ours, SimpleNamespace())
    assert ours.divide_over is None


def test_what_is_relied_on_of_the_strategy():
    from lightning.pytorch.strategies import DDPStrategy as Lightnings

    assert {name for name in vars(DDPStrategy) if name.startswith("_ddp") or name.startswith("_model")} <= vars(
        Lightnings()
    ).keys()
