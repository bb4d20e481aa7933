"""In Fabric: pipeline, schedule and factory, given what `fabric.setup` returns."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import MixedPrecision
from torch import nn

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.wrappers import unwrap_module, unwrap_optimizer
from lightning_optim.divergence import NonFiniteGradient

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
OPTIMIZERS = {
    "ours": lambda params: lo.optim.SGD(params, lr=1.0),
    "torch": lambda params: torch.optim.SGD(params, lr=1.0, foreach=False),
    "torch fused": lambda params: torch.optim.SGD(params, lr=1.0, fused=True),
}


def fabric_of(precision):
    if precision != "16-mixed":
        return L.Fabric(accelerator="cpu", devices=1, precision=precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # Fabric itself takes bfloat16 on the CPU.
    return L.Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def set_up(precision, make, wrapped=True):
    """Fabric, and module, optimizer and pipeline as its user has them."""
    torch.manual_seed(0)
    fabric = fabric_of(precision)
    module = nn.Linear(8, 1, bias=False)
    inner = make(module.parameters())
    module, optimizer = fabric.setup(module, inner)
    pipeline = lo.StepPipeline(
        optimizer if wrapped else inner, clip=GlobalNorm(max_norm=0.125), detectors=[NonFiniteGradient()]
    )
    return fabric, module, optimizer, pipeline


def step(fabric, module, optimizer, value):
    optimizer.zero_grad()
    fabric.backward(module(torch.full((2, 8), value)).float().square().sum())
    optimizer.step()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pipeline_on_the_wrapper_clips_and_skips(name, precision):
    fabric, module, optimizer, pipeline = set_up(precision, OPTIMIZERS[name])
    before = module.weight.detach().clone()
    step(fabric, module, optimizer, 3.0)
    assert (module.weight - before).float().norm().item() == pytest.approx(0.125, rel=0.02)
    before = module.weight.detach().clone()
    step(fabric, module, optimizer, float("nan"))
    assert torch.equal(module.weight, before)
    # A GradScaler does not call an optimizer that takes no flag.
    called = not (name == "torch" and precision == "16-mixed")
    counts = pipeline.counts()
    assert (counts.steps, counts.clipped, counts.skipped) == (1 + called, 1, int(called))
    pipeline.close()
    before = module.weight.detach().clone()
    step(fabric, module, optimizer, 3.0)
    assert (module.weight - before).float().norm() > 1.0, "closed, it is still in the way"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_the_wrapper_is_on_the_optimizer(name, precision):
    weights = []
    for wrapped in (True, False):
        fabric, module, optimizer, _ = set_up(precision, OPTIMIZERS[name], wrapped)
        for value in (1.0, float("nan"), 0.5):
            step(fabric, module, optimizer, value)
        weights.append(module.weight.detach().clone())
    assert torch.equal(*weights)


def test_an_overflow_that_is_announced_is_counted():
    fabric, module, optimizer, pipeline = set_up("16-mixed", OPTIMIZERS["torch"])
    pipeline.expect_step()
    step(fabric, module, optimizer, float("nan"))
    assert pipeline.counts().skipped == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_schedule_drives_what_the_wrapper_steps(precision):
    fabric, module, optimizer, pipeline = set_up(precision, OPTIMIZERS["ours"])
    scheduler = lo.schedules.Scheduler(optimizer, lo.schedules.Linear(), lo.Horizon(total_steps=4))
    scheduler.hold_on(lambda: pipeline.counts().skipped)
    rates = []
    for value in (1.0, float("nan"), 1.0, 1.0):
        rates.append(optimizer.param_groups[0]["lr"])
        step(fabric, module, optimizer, value)
        scheduler.step()  # warns, which is an error here, if it does not see the optimizer's steps
    assert rates == [1.0, 0.75, 0.75, 0.5]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_factory_takes_the_module_of_fabric(precision):
    fabric = fabric_of(precision)
    model = fabric.setup_module(nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 1)}))
    rules = [lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10)]
    built, scheduler = lo.OptimizerFactory("sgd", lr=0.1, schedule="linear", param_groups=rules).build(
        model, lo.Horizon(total_steps=10)
    )
    optimizer = fabric.setup_optimizers(built)
    assert [group["name"] for group in optimizer.param_groups] == ["head", "default"]
    assert optimizer.param_groups[0]["param_names"] == ["head.weight", "head.bias"]
    groups = lo.build_param_groups(model, rules)
    assert [name for name, _ in groups[0]["params"]] == ["head.weight", "head.bias"]
    body, head = (module.weight.detach().clone() for module in model.values())
    optimizer.zero_grad()
    fabric.backward(sum(param.float().sum() for param in model.parameters()))
    optimizer.step()
    scheduler.step()
    body, head = (before - module.weight for before, module in zip((body, head), model.values(), strict=True))
    assert torch.allclose(body.float(), torch.tensor(0.1), rtol=0.03)
    assert torch.allclose(head.float(), torch.tensor(1.0), rtol=0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.9), pytest.approx(0.09)]


class Circle:
    @property
    def __dict__(self):  # type: ignore[override]
        return {"optimizer": self}


@pytest.mark.parametrize("given", [None, nn.Linear(1, 1), object(), Circle(), type("Wrap", (), {"optimizer": 3})()])
@pytest.mark.parametrize("make", [lo.StepPipeline, lambda given: lo.schedules.Scheduler(given, lo.schedules.Linear())])
def test_what_is_no_optimizer_is_refused(make, given):
    with pytest.raises(TypeError, match=r"is no torch\.optim\.Optimizer"):
        make(given)


def test_only_fabrics_wrapper_is_unwrapped():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(1, 1)

    module = Mine()
    assert unwrap_module(module) is module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    fabric = fabric_of("32-true")
    wrapped, handed_out = fabric.setup(module, optimizer)
    assert type(wrapped) is not Mine, "Fabric's wrapper has another name"
    assert unwrap_module(wrapped) is module
    assert unwrap_optimizer(handed_out) is optimizer
