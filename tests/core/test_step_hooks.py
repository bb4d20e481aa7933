"""What `torch.distributed.checkpoint` does to an optimizer without state is no step: weights, counts, rates stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import lightning_optim as lo
from lightning_optim import clipping, optim
from lightning_optim.core.step_hooks import is_trial_step
from lightning_optim.factory.freezing import freezing_of
from lightning_optim.step.foreign_decay import ForeignDecay
from tests.helpers import ADAMWS, bit_equal

HORIZON = lo.Horizon(total_steps=10)


def model() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2, bias=False))


def fill(net: nn.Module, value: float = 1.0) -> None:
    for param in net.parameters():
        param.grad = torch.full_like(param, value)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["decoupled", "norm"])
@pytest.mark.parametrize("name", optim.list_optimizers())
def test_saving_before_the_first_step_changes_nothing_and_loading_goes_on_bit_for_bit(name, kind):
    weights = model().state_dict()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = model()
        net.load_state_dict(weights)
        net = nn.Sequential(net[0], net[2]) if name in ("muon", "normuon", "soap") else net
        params = [p for p in net.parameters() if p.ndim == 2] if name in ("muon", "normuon") else net.parameters()
        cls: Any = optim.get_optimizer_class(name)
        return net, cls(params, weight_decay=0.3, weight_decay_kind=kind)

    try:
        net, optimizer = make()
    except ValueError as error:  # says itself which kinds it lacks
        pytest.skip(str(error))
    fresh = copy.deepcopy(net.state_dict())
    options: Any = {"model": net, "optimizers": optimizer}
    get_optimizer_state_dict(**options)
    assert bit_equal(dict(net.state_dict()), dict(fresh))
    assert optimizer.state

    plain_net, plain = make()
    train(plain_net, plain, range(3))
    train(net, optimizer, range(3))
    assert bit_equal(dict(net.state_dict()), dict(plain_net.state_dict()))

    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    other_net, other = make()
    other_net.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other_net, other, saved)
    assert bit_equal(dict(other_net.state_dict()), dict(net.state_dict()))
    train(net, optimizer, range(3, 5))
    train(other_net, other, range(3, 5))
    assert bit_equal(dict(other_net.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_pipeline_counts_and_learns_nothing(kind):
    net = model()
    optimizer, scheduler = lo.OptimizerFactory(**ADAMWS[kind], schedule="cosine").build(net, HORIZON)
    reports: list[Any] = []
    pipeline = lo.StepPipeline(optimizer, clip=clipping.ZClip(warmup=1), on_report=reports.append)
    before = copy.deepcopy(pipeline.clip_state())
    get_optimizer_state_dict(net, optimizer)
    assert optimizer.state
    assert pipeline.counts().steps == 0
    assert bit_equal(pipeline.clip_state(), before)
    assert reports == []
    assert scheduler.last_epoch == 0
    fill(net)
    optimizer.step()
    assert pipeline.counts().steps == 1
    assert len(reports) == 1


def test_a_frozen_group_waits_for_the_first_step_to_ask_how_long_the_run_is():
    net = model()
    rules = [lo.ParamGroupRule(name="body", pattern="^0", frozen_until="50%")]
    optimizer, scheduler = lo.OptimizerFactory("adamw", param_groups=rules).build(net)
    get_optimizer_state_dict(net, optimizer)
    assert optimizer.state
    scheduler.resolve(HORIZON)
    freezing = freezing_of(optimizer)
    assert freezing is not None
    freezing.horizon = lambda: scheduler.horizon
    before = net[0].weight.detach().clone()
    fill(net)
    optimizer.step()
    assert torch.equal(net[0].weight, before)


def test_decay_of_foreign_optimizers_takes_its_peak_from_the_first_step():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ForeignDecay(optimizer, weight_decay=0.5, kind="independent")
    weights = copy.deepcopy(net.state_dict())
    get_optimizer_state_dict(net, optimizer)
    assert bit_equal(dict(net.state_dict()), dict(weights))
    fill(net, 0.0)
    optimizer.step()
    for name, param in net.named_parameters():
        torch.testing.assert_close(param.detach(), weights[name] * 0.5)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_warmup_from_0_is_training(lr: float | Tensor):
    net, closure = model(), lambda: None
    optimizer = optim.AdamW(net.parameters(), lr=lr)
    fill(net, 0.0)
    assert is_trial_step(optimizer)
    assert not is_trial_step(optimizer, closure)
    net[0].bias.grad[-1] = torch.nan
    assert not is_trial_step(optimizer)
    fill(net, 1e-30)
    assert not is_trial_step(optimizer)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in net.parameters())
    assert not is_trial_step(optimizer)


def test_an_optimizer_without_gradients_or_with_a_rate_has_no_trial():
    net = model()
    optimizer = optim.AdamW(net.parameters(), lr=0.0)
    assert not is_trial_step(optimizer)
    fill(net, 0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    assert not is_trial_step(optimizer)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_without_memory_is_refused_at_a_rate_of_0_too(backend):
    weight = nn.Parameter(torch.ones(300))
    optimizer = optim.AdamW([("weight", weight)], lr=0.0, backend=backend)
    weight.grad = torch.ones(300)
    weight.grad.untyped_storage().resize_(0)
    assert not is_trial_step(optimizer)
    with pytest.raises(RuntimeError, match="gradient of parameter 'weight'"):
        optimizer.step()


def test_a_group_without_a_rate_of_its_own_makes_no_trial_step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = None  # as Adafactor of other libraries, which computes its rate
    weight.grad = torch.zeros(2)
    assert not is_trial_step(optimizer)
