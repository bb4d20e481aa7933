"""Every bad input is refused at construction with what was given, what is needed and what is nearest."""

from __future__ import annotations

import math
import re

import lightning.pytorch as L
import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim import optim, schedules
from lightning_optim.core.durations import Horizon
from lightning_optim.factory import OptimizerFactory

NAN, INF = math.nan, math.inf


def _own(**settings):
    """A rule with settings that the optimizer may not have."""
    return {"param_groups": [lo.ParamGroupRule(name="x", pattern="head", **settings)]}


# What is given to the factory, the error, and every piece its message must have.
FACTORY = [
    ({"optimizer": "admw"}, ValueError, ["'admw'", "'adamw'"]),
    ({"optimizer": "zzz"}, ValueError, ["'zzz'", "'adamw'", "'sgd'"]),
    ({"optimizer": "torch.optim.AdamV"}, ValueError, ["'AdamV'", "'Adam'"]),
    ({"optimizer": "torch.optm.AdamW"}, ValueError, ["'torch.optm.AdamW'"]),
    ({"optimizer": "no_such_package.Optimizer"}, ValueError, ["no_such_package"]),
    (
        {"param_groups": [{"name": "head", "lr": 0.1}]},
        ValueError,
        ["param_groups", "ParamGroupRule 'head'", "criterion"],
    ),
    ({"optimizer": 3}, TypeError, ["3", "'adamw'"]),
    ({"optimizer": nn.Linear}, TypeError, ["Linear", "Optimizer"]),
    ({"optimizer": lambda params: None}, TypeError, ["None", "Optimizer"]),
    ({"optimizer": {"class_path": "torch.optim.SGD", "args": {}}}, ValueError, ["'args'", "class_path", "init_args"]),
    ({"optimizer": {"init_args": {"lr": 0.1}}}, ValueError, ["class_path"]),
    (
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}, "lr": 2.0},
        ValueError,
        ["'lr'", "twice"],
    ),
    (
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momntum": 0.9}}},
        ValueError,
        ["'momntum'", "'momentum'"],
    ),
    ({"optimizer": lambda params: torch.optim.SGD(params, 0.1), "lr": 0.1}, ValueError, ["lr", "callable"]),
    ({"optimizer_kwargs": {"momentun": 0.9}, "optimizer": "sgd"}, ValueError, ["SGD", "'momentun'", "'momentum'"]),
    ({"optimizer_kwargs": {"bets": (0.9, 0.95)}}, ValueError, ["AdamW", "'bets'", "'betas'"]),
    ({"lr": 0.1, "optimizer_kwargs": {"lr": 0.2}}, ValueError, ["'lr'", "twice"]),
    ({"optimizer_kwargs": {"params": []}}, ValueError, ["'params'"]),
    ({"lr": 0.0}, ValueError, ["0.0", "above 0"]),
    ({"lr": -0.1}, ValueError, ["-0.1", "finite"]),
    ({"lr": NAN}, ValueError, ["nan", "finite"]),
    ({"lr": INF}, ValueError, ["inf", "finite"]),
    ({"lr": "fast"}, (ValueError, TypeError), ["fast"]),
    ({"weight_decay": -0.1}, ValueError, ["-0.1", "at least 0"]),
    ({"weight_decay": NAN}, ValueError, ["nan", "at least 0"]),
    ({"weight_decay": 0.1, "optimizer": torch.optim.SparseAdam}, ValueError, ["'weight_decay'", "SparseAdam"]),
    ({"optimizer_kwargs": {"betas": (0.9, 1.5)}}, ValueError, ["1.5"]),
    (
        _own(weight_decay=0.5) | {"optimizer": torch.optim.SparseAdam},
        ValueError,
        ["'x'", "weight_decay=0.5", "'betas'"],
    ),
    (_own(options={"epz": 1e-6}), ValueError, ["'x'", "epz", "AdamW", "'eps'"]),
    (_own(options={"momentum": 0.9}), ValueError, ["'x'", "momentum", "AdamW", "'betas'"]),
    (_own(options={"eps": -1.0}), ValueError, ["'x'", "eps", "-1.0", "at least 0"]),
    (_own(betas=[0.9]), ValueError, ["'x'", "[0.9]", "1", "2"]),
    (_own(betas=[0.9]) | {"optimizer": "torch.optim.AdamW"}, ValueError, ["'x'", "[0.9]", "1", "2"]),
    (_own(betas=[0.9, 0.99]) | {"optimizer": "sgd"}, ValueError, ["'x'", "betas", "SGD", "'momentum'"]),
    (_own(rule="lionn"), ValueError, ["'x'", "'lionn'", "'lion'"]),
    (_own(rule="sgd", options={"bets": 1}), ValueError, ["'x'", "bets", "'betas'"]),
    (_own(rule="lion") | {"optimizer": "torch.optim.AdamW"}, ValueError, ["'x'", "'lion'", "torch.optim", "'adamw'"]),
    ({"schedule": "cosin"}, ValueError, ["'cosin'", "'cosine'"]),
    ({"schedule": "zzz"}, ValueError, ["'zzz'", "'constant'", "'cosine'", "'linear'", "'wsd'"]),
    ({"schedule": 5}, TypeError, ["5", "'cosine'"]),
    ({"schedule": schedules.Cosine}, TypeError, ["Cosine", "'cosine'"]),
    ({"schedule": schedules.Cosine(warmup=5), "warmup": 10}, ValueError, ["twice", "10", "Cosine("]),
    ({"schedule": "torch.optim.lr_scheduler.StepLr"}, ValueError, ["'StepLr'", "'StepLR'"]),
    ({"schedule": "no_such_package.Schedule"}, ValueError, ["no_such_package"]),
    ({"schedule": {"init_args": {}}}, ValueError, ["class_path"]),
    ({"schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "args": {}}}, ValueError, ["'args'", "init_args"]),
    (
        {"schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_sizes": 3}}},
        ValueError,
        ["StepLR", "'step_sizes'", "'step_size'"],
    ),
    ({"schedule": lambda optimizer: None}, TypeError, ["None", "LRScheduler", "step to a multiplier"]),
    (
        {"schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3), "warmup": 5},
        ValueError,
        ["warmup=5", "SequentialLR"],
    ),
    ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, ValueError, ["metric", "ReduceOnPlateau", "monitor"]),
    ({"on_resume": "confg"}, ValueError, ["'confg'", "'config'"]),
    ({"schedules": {"weight_decya": "cosine"}}, ValueError, ["'weight_decya'", "'weight_decay'"]),
    ({"schedules": {"lr": "cosine"}}, ValueError, ["lr", "`schedule`"]),
    ({"schedules": {"weight_decay": 3}}, TypeError, ["weight_decay", "3", "'cosine'"]),
    ({"schedules": {"weight_decay": "cosin"}}, ValueError, ["'cosin'", "'cosine'"]),
    (
        {
            "schedules": {"weight_decay": "cosine"},
            "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        },
        ValueError,
        ["weight_decay", "another library's"],
    ),
    (
        {"param_groups": [lo.ParamGroupRule(name="x", pattern="head", schedule=schedules.Linear(final=2))]},
        ValueError,
        ["final=2", "[0, 1]"],
    ),
    ({"schedule": schedules.Cosine(final=1.5)}, ValueError, ["final=1.5", "[0, 1]"]),
    ({"schedule": "cosine", "warmup": "ten steps"}, ValueError, ["'ten steps'", "'500 steps'", "'5%'"]),
    ({"schedule": "cosine", "warmup": -5}, ValueError, ["-5", "at least 0"]),
    ({"schedule": "cosine", "warmup": "-5%"}, ValueError, ["'-5%'", "'5%'"]),
    ({"schedule": "cosine", "warmup": 0.05}, ValueError, ["0.05", "'5%'"]),
    ({"schedule": "cosine", "warmup": "150%"}, ValueError, ["150%", "100%"]),
    ({"schedule": "cosine", "warmup": NAN}, ValueError, ["nan"]),
    ({"schedule": "cosine", "warmup": True}, ValueError, ["True"]),
    ({"param_groups": ["no_decya"]}, ValueError, ["'no_decya'", "'no_decay'"]),
    ({"param_groups": [{"name": "head", "patern": "a"}]}, TypeError, ["param_groups", "'patern'", "'pattern'"]),
    ({"param_groups": [nn.Linear]}, TypeError, ["ParamGroupRule", "LayerDecay"]),
    ({"param_groups": "no_decay"}, (TypeError, ValueError), ["no_decay"]),
    (
        {"param_groups": [lo.ParamGroupRule(name="a", pattern="x"), lo.ParamGroupRule(name="a", pattern="y")]},
        ValueError,
        ["'a'", "unique"],
    ),
]


@pytest.mark.parametrize("cls", [lo.OptimizerFactory, lo.ConfigureOptimizers])
@pytest.mark.parametrize(("given", "error", "told"), FACTORY, ids=[" ".join(row[2])[:60] for row in FACTORY])
def test_bad_arguments_of_the_factory_are_refused_at_construction(cls, given, error, told):
    with pytest.raises(error) as caught:
        cls(**given)
    for piece in told:
        assert piece in str(caught.value)


@pytest.mark.parametrize("cls", [lo.OptimizerFactory, lo.ConfigureOptimizers, lo.GradientClipping, lo.OptimizerMonitor])
def test_no_kwargs_swallow_a_typo(cls):
    with pytest.raises(TypeError, match="weight_decy"):
        cls(weight_decy=0.1)


OTHERS = [
    (lambda: lo.GradientClipping(max_norm=0), ["max_norm=0", "above 0"]),
    (lambda: lo.GradientClipping(max_norm=-1), ["max_norm=-1", "above 0"]),
    (lambda: lo.GradientClipping(max_norm=NAN), ["nan", "finite"]),
    (lambda: schedules.Polynomial(power=0), ["power=0", "above 0"]),
    (lambda: schedules.Tanh(lower=3, upper=3), ["lower=3", "upper=3", "above"]),
    (lambda: schedules.Exponential(final=0), ["final=0", "above 0"]),
    (lambda: schedules.InverseSqrt(timescale=0), ["timescale=0", "above 0"]),
    (lambda: schedules.StepDecay(every=0), ["every=0", "above 0", "'30 epochs'"]),
    (lambda: schedules.StepDecay(factor=-1), ["factor=-1", "above 0"]),
    (lambda: schedules.MultiStepDecay(milestones=[]), ["milestones=[]", "['50%', '75%']"]),
    (lambda: schedules.MultiStepDecay(milestones="50%"), ["milestones='50%'", "['50%', '75%']"]),
    (lambda: schedules.CosineRestarts(cycles=2, cycle=5), ["cycles=2", "cycle=5", "not both"]),
    (lambda: schedules.CosineRestarts(cycles=0), ["cycles=0", "at least 1"]),
    (lambda: schedules.CosineRestarts(cycle=0), ["cycle=0", "above 0"]),
    (lambda: schedules.CosineRestarts(length_multiplier=0.5), ["length_multiplier=0.5", "at least 1"]),
    (lambda: schedules.CosineRestarts(peak_multiplier=1.5), ["peak_multiplier=1.5", "(0, 1]"]),
    (lambda: schedules.ReduceOnPlateau(mode="mim"), ["'mim'", "'min'"]),
    (lambda: schedules.ReduceOnPlateau(monitor=""), ["monitor", "'val_loss'"]),
    (lambda: schedules.ReduceOnPlateau(factor=1.0), ["factor=1.0", "(0, 1)"]),
    (lambda: schedules.ReduceOnPlateau(patience=-1), ["patience=-1", "at least 0"]),
    (lambda: schedules.ReduceOnPlateau(threshold=NAN), ["threshold=nan", "finite"]),
    (lambda: schedules.ReduceOnPlateau(floor=2), ["floor=2", "[0, 1]"]),
    (lambda: schedules.Warmup(5, "cosin"), ["'cosin'", "'cosine'"]),
    (lambda: schedules.Warmup(5, start=1.0), ["start=1.0", "[0, 1)"]),
    (lambda: schedules.Warmup(5, "exponential", start=0.0), ["start=0.0", "(0, 1)"]),
    (lambda: schedules.Warmup(5, "constant"), ["constant", "start=0.1"]),
    (lambda: schedules.Cooldown(5, "lineer"), ["'lineer'", "'linear'"]),
    (lambda: schedules.Cooldown(5, final=NAN), ["final=nan", "finite"]),
    (lambda: schedules.Linear(final=-0.1), ["final=-0.1", "[0, 1]"]),
    (lambda: schedules.Cosine(final=NAN), ["final=nan", "[0, 1]"]),
    (lambda: schedules.get_schedule("constnt"), ["'constnt'", "'constant'"]),
    (lambda: optim.get_optimizer_class("sgdd"), ["'sgdd'", "'sgd'"]),
    (lambda: lo.Duration.parse("5 days"), ["'5 days'", "'2 epochs'"]),
    (lambda: lo.ParamGroupRule(name="x", pattern="["), ["'x'", "'['", "regular expression"]),
    (lambda: lo.ParamGroupRule(name="x"), ["'x'", "`pattern`"]),
    (lambda: lo.ParamGroupRule(name="x", pattern="y", schedule="cosin"), ["'cosin'", "'cosine'"]),
    (lambda: lo.ParamGroupRule(name="total", max_ndim=1), ["'total'"]),
    (lambda: lo.ParamGroupRule(name="x", max_ndim=1, lr_multiplier=NAN), ["nan", "at least 0"]),
]


@pytest.mark.parametrize(("make", "told"), OTHERS, ids=[" ".join(row[1])[:60] for row in OTHERS])
def test_bad_arguments_of_the_parts_are_refused_at_construction(make, told):
    with pytest.raises(ValueError, match=re.escape(told[0])) as caught:
        make()
    for piece in told:
        assert piece in str(caught.value)


# What can be refused only once there is a model, or a length of the run.

MODEL = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})

BUILD = [
    ({"param_groups": [lo.ParamGroupRule(name="x", pattern=r"^haed\.")]}, MODEL, ["'x'", "^haed", "'head."]),
    ({"param_groups": [lo.ParamGroupRule(name="x", module_types=["Conv2d"])]}, MODEL, ["'x'", "Conv2d", "Linear"]),
    ({}, nn.Linear(2, 2).requires_grad_(False), ["Linear", "no trainable parameter", "requires_grad=False"]),
    ({}, nn.ReLU(), ["ReLU", "no trainable parameter"]),
    ({"schedule": "cosine", "warmup": 101}, MODEL, ["101", "100", "'5%'"]),
    ({"schedule": "linear", "warmup": "3 epochs"}, MODEL, ["3 epochs", "length of an epoch"]),
]


@pytest.mark.parametrize(("given", "model", "told"), BUILD, ids=[" ".join(row[2])[:60] for row in BUILD])
def test_what_does_not_fit_the_model_or_the_run_is_refused_when_it_is_built(given, model, told):
    factory = OptimizerFactory(**given)
    with pytest.raises(ValueError, match=re.escape(told[0])) as caught:
        factory.build(model, Horizon(total_steps=100))
    for piece in told:
        assert piece in str(caught.value)


def test_a_run_without_a_length_is_refused_with_what_would_give_it_one():
    with pytest.raises(ValueError, match=r"Cosine\(.*max_steps.*max_epochs.*constant"):
        OptimizerFactory(schedule="cosine").build(MODEL, Horizon())


def test_a_multiplier_of_zero_freezes_a_group_on_purpose():
    rules = [lo.ParamGroupRule(name="frozen", pattern="body", lr_multiplier=0)]
    optimizer, _ = OptimizerFactory("sgd", lr=0.1, param_groups=rules).build(MODEL)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0.1]


def test_attaching_what_is_no_factory_is_refused():
    with pytest.raises(TypeError, match="OptimizerFactory"):
        lo.attach(L.LightningModule(), "adamw")
