"""Names are open: to users' classes, in every place that takes the package's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.clipping.choice import CLIP_RULES
from lightning_optim.core.registry import Registry, snake_case
from lightning_optim.diagnostics import DIAGNOSTICS, Diagnostic
from lightning_optim.divergence import DETECTORS, Detector
from lightning_optim.optim.base import OPTIMIZERS
from lightning_optim.schedules.registry import SCHEDULES


class Halved(lo.schedules.Constant):
    """Half of the peak."""

    def shape(self, at):
        return 0.5


class Twice(GlobalNorm):
    """Another global norm."""


class Plain(torch.optim.SGD):
    """Not one of ours."""


class Ours(lo.optim.SGD):
    """One of ours."""


class Never(Detector):
    def __call__(self, stats):
        return torch.tensor(False)


class GradSum(Diagnostic):
    name = "grad_sum"

    def compute(self, record):
        return record.grad.norm_sq


pytestmark = pytest.mark.usefixtures("own_names")


@pytest.mark.parametrize(
    ("cls", "registry"),
    [
        (Halved, SCHEDULES),
        (Twice, CLIP_RULES),
        (Plain, OPTIMIZERS),
        (Ours, OPTIMIZERS),
        (Never, DETECTORS),
        (GradSum, DIAGNOSTICS),
    ],
)
def test_a_class_of_ones_own_is_found_by_name(cls, registry):
    assert lo.register(cls) is cls
    name = snake_case(cls.__name__)
    assert registry.get(name.upper()) is cls
    assert (name, cls) in registry.items()


def test_a_name_may_be_given_and_taken_again_by_the_same_class():
    for _ in range(2):  # a cell of a notebook, run twice
        lo.register(name="mine")(Halved)
    assert lo.schedules.get_schedule("mine") is Halved


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match=r"schedule name 'Cosine' belongs to .*Cosine: choose another for .*Halved"):
        lo.register(Halved, name="Cosine")
    with pytest.raises(ValueError, match="'rsqrt' belongs to"):  # an alias
        lo.register(Halved, name="rsqrt")


@pytest.mark.parametrize("thing", [dict, nn.Linear, lambda: 0])
def test_what_is_of_no_kind_is_refused(thing):
    with pytest.raises(TypeError, match=r"derives from none of .*Optimizer"):
        lo.register(thing)


def test_a_registry_refuses_another_kind_and_unknown_arguments():
    registry = Registry("rule of clipping", GlobalNorm)
    try:
        with pytest.raises(TypeError, match="must be a GlobalNorm class"):
            registry.add(Halved, "halved")
        registry.add(GlobalNorm, "global_norm")
        with pytest.raises(ValueError, match=r"takes no .max_nrom.\. Did you mean .max_norm."):
            registry.make("global-norm", {"max_nrom": 1.0})
    finally:
        registry.close()


def test_names_in_python_reach_the_factory_groups_clipping_and_guard():
    for cls in (Halved, Twice, Ours, Plain, Never, GradSum):
        lo.register(cls)
    model = nn.Linear(2, 2)
    optimizer, _ = lo.OptimizerFactory(optimizer="plain", lr=0.1, schedule="halved").build(model)
    assert isinstance(optimizer, Plain)
    grouped = lo.optim.AdamW([{"params": [model.weight], "rule": "ours"}, {"params": [model.bias]}])
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    grouped.step()
    torch.testing.assert_close(before - model.weight.detach(), 1e-3 * torch.ones(2, 2))  # SGD's step, at its lr
    assert isinstance(lo.GradientClipping(method="twice", max_norm=1.0).clip_rule(), Twice)
    assert isinstance(lo.DivergenceGuard(detectors=["never"]).extra_detectors[0], Never)
    names = [diagnostic.name for diagnostic in lo.OptimizerMonitor(diagnostics=["grad_sum", "param_norm"]).diagnostics]
    assert names == ["grad_sum", "param_norm"]


def test_a_rule_that_is_no_fused_optimizer_is_refused_for_a_group():
    lo.register(Plain)
    with pytest.raises(ValueError, match="rule='plain' of a group: Plain must be a FusedOptimizer"):
        lo.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "rule": "plain"}])


@pytest.mark.parametrize(("name", "snake"), [("WSD", "wsd"), ("OneCycle", "one_cycle"), ("AdaGCRule", "ada_gc_rule")])
def test_snake_case(name, snake):
    assert snake_case(name) == snake


def test_modules_of_the_package_are_attributes_and_none_is_loaded_before():
    code = (
        "import sys, lightning_optim as lo; before = [m for m in sys.modules if m.startswith('lightning_optim.')];"
        "names = ['clipping', 'diagnostics', 'divergence', 'optim', 'schedules', 'param_groups', 'factory', 'step'];"
        "print(len(before), [getattr(lo, name).__name__ for name in names] == [f'lightning_optim.{n}' for n in names],"
        "set(names[:5]) <= set(dir(lo)), 'torch' in before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, *rest = done.stdout.split()
    assert rest == ["True", "True", "False"]
    assert int(loaded) < 8


def test_a_class_that_is_looked_for_in_the_wrong_place_is_pointed_at():
    with pytest.raises(AttributeError, match=r"no attribute 'AdamW'\. Did you mean 'lightning_optim\.optim\.AdamW'"):
        lo.AdamW  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'GradintClipping'\. Did you mean 'GradientClipping'\?"):
        lo.GradintClipping  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        lo.nothing  # noqa: B018
    with pytest.raises(ValueError, match=r"Did you mean 'lightning_optim\.optim\.AdamW'"):
        lo.OptimizerFactory("lightning_optim.AdamW")
