from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.core.durations import Horizon
from lightning_optim.factory import OptimizerFactory
from lightning_optim.schedules import Constant, Cosine
from tests.helpers import bit_equal


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("given", "cls", "fused"),
    [
        ("adamw", lo.optim.AdamW, None),
        ("AdamW", lo.optim.AdamW, None),
        ("sgd", lo.optim.SGD, None),
        ("lion", lo.optim.Lion, None),
        (lo.optim.AdamW, lo.optim.AdamW, None),
        ("lightning_optim.optim.AdamW", lo.optim.AdamW, None),
        (torch.optim.AdamW, torch.optim.AdamW, True),
        ("torch.optim.SGD", torch.optim.SGD, True),
        ({"class_path": "torch.optim.Adam"}, torch.optim.Adam, True),
        ({"class_path": "torch.optim.Adam", "init_args": {"fused": False}}, torch.optim.Adam, False),
        ({"class_path": "torch.optim.Adam", "init_args": {"foreach": True}}, torch.optim.Adam, None),
        ({"class_path": "torch.optim.RMSprop", "init_args": None}, torch.optim.RMSprop, None),
        (lambda params: torch.optim.RMSprop(params, lr=0.5), torch.optim.RMSprop, None),
        ({"class_path": "lion_pytorch.Lion", "init_args": {"lr": 1e-4}}, "Lion", None),
    ],
)
def test_an_optimizer_can_be_given_in_any_way(given, cls, fused):
    optimizer, _ = OptimizerFactory(given).build(_model())
    assert type(optimizer) is cls or type(optimizer).__name__ == cls
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}


def test_fused_is_not_forced_on_parameters_that_torch_has_no_kernel_for():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    optimizer, _ = OptimizerFactory(torch.optim.AdamW, param_groups=[]).build(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(list(model.parameters()))
    optimizer.step()
    assert not any(group["fused"] for group in optimizer.param_groups)
    assert all((now != then).all() for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("trains", [True, False])
def test_fused_is_not_forced_where_gradients_will_be_sparse(layer, trains):
    model = nn.Sequential(layer(4, 2, sparse=True).requires_grad_(trains), nn.Linear(2, 1))
    optimizer, _ = OptimizerFactory(torch.optim.SGD, lr=0.1).build(model)
    assert {group.get("fused") for group in optimizer.param_groups} == {None if trains else True}
    model(torch.tensor([[0, 1]])).sum().backward()
    optimizer.step()


def test_arguments_reach_the_optimizer():
    factory = OptimizerFactory(
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": (0.8, 0.9)}},
        lr=0.1,
        weight_decay=0.3,
        optimizer_kwargs={"eps": 1e-6},
    )
    group = factory.build(_model())[0].param_groups[-1]
    assert (group["betas"], group["lr"], group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.1, 0.3, 1e-6)


def test_what_is_not_given_is_the_optimizers_own_default():
    group = OptimizerFactory(torch.optim.AdamW).build(_model())[0].param_groups[-1]
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        key: plain[key] for key in ("lr", "betas", "eps", "weight_decay")
    }


def test_biases_and_norms_are_not_decayed_unless_told_otherwise():
    model = _model()
    groups = OptimizerFactory("adamw", weight_decay=0.3).build(model)[0].param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("no_decay", 0), ("default", 0.3)]
    groups = OptimizerFactory("adamw", weight_decay=0.3, param_groups=[]).build(model)[0].param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("default", 0.3)]


def test_an_optimizer_without_weight_decay_takes_the_default_rules():
    model = nn.Embedding(4, 2, sparse=True)
    optimizer, _ = OptimizerFactory(torch.optim.SparseAdam, lr=0.1).build(model)
    assert optimizer.param_groups[0]["name"] == "no_decay"


def test_multipliers_scale_the_peak_of_their_group():
    rules = [lo.ParamGroupRule(name="first", pattern=r"^0\.", lr_multiplier=0.1)]
    optimizer, scheduler = OptimizerFactory("sgd", lr=0.5, schedule="linear", param_groups=rules).build(
        _model(), Horizon(total_steps=10)
    )
    for step in range(12):
        expected = 0.5 * max(1 - step / 10, 0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected / 10, expected])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["independent", "corrected", "decoupled"])
def test_independent_decay_is_whatever_the_multiplier(kind):
    rules = [lo.ParamGroupRule(name="first", pattern=r"^0\.", lr_multiplier=0.1)]
    model = _model()
    optimizer, scheduler = OptimizerFactory(
        "sgd",
        lr=0.5,
        weight_decay=0.01,
        optimizer_kwargs={"weight_decay_kind": kind},
        schedule="linear",
        param_groups=rules,
    ).build(model, Horizon(total_steps=4))
    for step in range(4):
        before = copy.deepcopy([model[0].weight.detach(), model[2].weight.detach()])
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        share = 1 - step / 4
        for weight, old, peak in zip((model[0].weight, model[2].weight), before, (0.05, 0.5), strict=True):
            lost = {"independent": share * 0.01, "corrected": share**2 * peak * 0.01, "decoupled": share * peak * 0.01}
            torch.testing.assert_close(weight.detach(), old * (1 - lost[kind]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        (None, None, Constant()),
        (None, 10, Constant(warmup=10)),
        ("cosine", "5%", Cosine(warmup="5%")),
        (Cosine(warmup=3, final=0.2), None, Cosine(warmup=3, final=0.2)),
    ],
)
def test_schedules_by_name_and_by_value(schedule, warmup, expected):
    _, scheduler = OptimizerFactory(schedule=schedule, warmup=warmup).build(_model())
    assert repr(scheduler.schedule) == repr(expected)


def test_a_factory_can_build_for_several_models_and_be_pickled():
    factory = OptimizerFactory(torch.optim.AdamW, lr=0.1, schedule="cosine", warmup="5%")
    first, second = (factory.build(_model())[0] for _ in range(2))
    assert first is not second
    assert first.param_groups[0]["params"][0] is not second.param_groups[0]["params"][0]
    again, _ = pickle.loads(pickle.dumps(factory)).build(_model())
    assert bit_equal(again.state_dict(), first.state_dict())


def test_repr_tells_optimizer_and_schedule():
    assert (
        repr(OptimizerFactory("sgd", lr=0.1, schedule="cosine"))
        == "OptimizerFactory(SGD(lr=0.1), " + repr(Cosine()) + ")"
    )


@pytest.mark.filterwarnings("ignore:Resumed with the checkpoint's hyperparameters.*fused None")
def test_an_optimizer_with_fused_state_loads_torchs_checkpoint():
    model = _model()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    theirs.step()
    ours, _ = OptimizerFactory(torch.optim.AdamW, lr=0.1, param_groups=[]).build(model)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert [float(state["step"]) for state in ours.state_dict()["state"].values()] == [1.0] * 6
