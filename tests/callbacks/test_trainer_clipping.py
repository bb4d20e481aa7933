"""Clipping by Lightning, not by us, in mixed precision: it works with the optimizers that we make fused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim as lo
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.core.operands_flag import unscales_itself
from lightning_optim.step.operands import InKernel
from tests.helpers import ADAMWS, PRECISIONS, Net, batches, bit_equal, make_trainer, precision

LIMIT = 0.05


class Stock(Net):
    """Trains as Lightning alone does.

    Args:
        hook: Whether the module's own hook clips.
        manual: Whether it optimizes by hand, and clips there.
    """

    def __init__(self, hook: bool = False, manual: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.hook, self.automatic_optimization = hook, not manual

    def configure_optimizers(self) -> Any:
        # SGD feels the length of a gradient; momentum, that all steps were taken.
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=LIMIT, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss


class OwnHook(Stock):
    """Clips in its own hook, as Lightning's documentation shows it."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=LIMIT, gradient_clip_algorithm="norm")


class InModule(Stock):
    def configure_optimizers(self) -> Any:
        return lo.OptimizerFactory("sgd", lr=0.5, optimizer_kwargs={"momentum": 0.5}, param_groups=[])(self)


SUPPLIED = {
    "ours": lambda: lo.ConfigureOptimizers("sgd", lr=0.5, optimizer_kwargs={"momentum": 0.5}, param_groups=[]),
    "torch": lambda: lo.ConfigureOptimizers(partial(torch.optim.SGD, lr=0.5, momentum=0.5), param_groups=[]),
}
BY_TRAINER: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": LIMIT},
    "value": {"gradient_clip_val": LIMIT / 10, "gradient_clip_algorithm": "value"},
}


def _fit(model: Stock, parts: Any, name: str, **options: Any) -> list[Tensor]:
    make_trainer(parts, **precision(name), **options).fit(model, batches(6))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("clip", BY_TRAINER)
@pytest.mark.parametrize("kind", SUPPLIED)
def test_the_trainers_clipping_gives_the_weights_of_stock_lightning(kind, clip, name, accumulate):
    options = {**BY_TRAINER[clip], "accumulate_grad_batches": accumulate}
    model = Stock()
    weights = _fit(model, [SUPPLIED[kind]()], name, **options)
    torch.testing.assert_close(weights, _fit(Stock(), [], name, **options), rtol=2e-4, atol=1e-5)
    group = model.trainer.optimizers[0].param_groups[0]
    assert kind == "ours" or group["fused"]
    assert not bit_equal(weights, _fit(Stock(), [], name, accumulate_grad_batches=accumulate))


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", SUPPLIED)
@pytest.mark.parametrize("more", [[], [partial(lo.GradientClipping, 1e9)]], ids=["alone", "clipping"])
def test_so_does_a_hook_of_the_module(kind, name, more):
    parts = [SUPPLIED[kind](), *(make() for make in more)]
    torch.testing.assert_close(_fit(OwnHook(), parts, name), _fit(OwnHook(), [], name), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_factory_in_the_module_needs_no_callback(name):
    stock = _fit(Stock(), [], name, **BY_TRAINER["norm"])
    torch.testing.assert_close(_fit(InModule(), [], name, **BY_TRAINER["norm"]), stock, rtol=2e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Step .* skipped")
@pytest.mark.parametrize("kind", ["ours", "torch-fused"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_guard_beside_it_still_skips_in_the_kernel(name, kind, tmp_path):
    model = Net(nan_batches=[2])
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), rollback=None)
    seen: list[type] = []

    class Watch(lo.OptimizerMonitor):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.extend(type(pipeline._operands) for pipeline in self.hub.pipelines)

    parts = [lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01), guard, Watch()]
    make_trainer(parts, **precision(name), gradient_clip_val=LIMIT).fit(model, batches(6))
    assert set(seen) == {InKernel}
    assert guard.skipped_steps == 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", SUPPLIED)
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_clipping_by_hand_works_where_there_is_no_scale(name, kind):
    stock = _fit(Stock(manual=True), [], name)
    torch.testing.assert_close(_fit(Stock(manual=True), [SUPPLIED[kind]()], name), stock, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SUPPLIED)
def test_clipping_by_hand_of_gradients_with_a_scale_is_refused_with_the_way_out(kind):
    model = Stock(manual=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"does not allow.*Use the callback lightning_optim\.GradientClipping"):
        _fit(model, [SUPPLIED[kind]()], "16-mixed")
    assert bit_equal([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_plan_finds_no_conflict_in_it(name):
    model = Stock()
    model.train_dataloader = lambda: batches(2)
    plan = make_plan(make_trainer([SUPPLIED["torch"]()], **precision(name), gradient_clip_val=LIMIT), model)
    assert plan.conflicts == []
    assert plan.groups[0].name == "default"


def test_without_clipping_by_others_a_scale_is_still_taken_out_in_the_kernel():
    model = Stock()
    make_trainer([SUPPLIED["ours"]()], **precision("16-mixed")).fit(model, batches(2))
    assert unscales_itself(model.trainer.optimizers[0])
