"""Optimizers that evaluate their closure several times, in a fit: callbacks change nothing that they should not."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.callbacks.planning import make_plan
from tests.helpers import Net, batches, bit_equal, make_trainer, precision, read_events
from tests.step.sharpness import Clipped, Lookahead, LookSam, OwnSam, Sam, SumSam

PARTS = {
    "clipping": lambda: [lo.GradientClipping(1e9)],
    "guard": lambda: [lo.DivergenceGuard()],
    "monitor": lambda: [lo.OptimizerMonitor()],
    "summary": lambda: [lo.RunSummary()],
    "all": lambda: [lo.GradientClipping(1e9), lo.DivergenceGuard(), lo.OptimizerMonitor(), lo.RunSummary()],
}
SAMS = [Sam, SumSam, LookSam, Lookahead]
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Closures(Net):
    """A net with an optimizer of its own; counts its forward passes, and keeps the norm of each gradient.

    Args:
        make: Makes the optimizer from parameters.
        manual: Whether to optimize by hand, with a closure.
        nan_calls: Forward passes whose loss is NaN.
    """

    def __init__(self, make: Any, manual: bool = False, nan_calls: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.make, self.calls, self.nan_calls = make, 0, nan_calls
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = super().training_step(batch, 0) * (float("nan") if self.calls in self.nan_calls else 1)
        self.calls += 1
        return loss


def _fit(model: Closures, parts: Any = (), count: int = 6, **options: Any) -> list[Tensor]:
    make_trainer(parts, **options).fit(model, batches(count))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"manual": True}],
    ids=["plain", "bf16-mixed", "accumulation", "manual"],
)
@pytest.mark.parametrize("sam", SAMS)
def test_parts_that_never_act_change_no_bit_and_no_forward_pass(sam, options, tmp_path, logger):
    options = dict(options)
    manual = options.pop("manual", False)
    model, plain = (Closures(lambda params: sam(params, SGD), manual) for _ in range(2))
    expected = _fit(plain, **options)
    monitor = lo.OptimizerMonitor()
    parts = [lo.GradientClipping(1e9), lo.DivergenceGuard(report_dir=str(tmp_path)), monitor, lo.RunSummary()]
    assert bit_equal(_fit(model, parts, logger=logger, **options), expected)
    assert model.calls == plain.calls
    steps = 3 if "accumulate_grad_batches" in options else 6
    points = read_events(logger.log_dir)["optim_grad_norm/total"]
    assert [step for step, _ in points] == list(range(steps))
    assert state_of_last_fit(model.trainer)["lightning_optim"]["counts"] == [[steps, 0, 0]]


@pytest.mark.parametrize("part", ["clipping", "monitor", "summary"])
@pytest.mark.filterwarnings("ignore:OwnSam evaluates")
def test_neither_do_they_where_the_optimizer_updates_by_itself(part):
    model, plain = Closures(OwnSam), Closures(OwnSam)
    assert bit_equal(_fit(model, PARTS[part]()), _fit(plain))
    assert model.calls == plain.calls == 12


def test_a_guard_is_refused_there_before_the_first_update():
    model = Closures(OwnSam)
    with pytest.raises(RuntimeError, match="guard cannot leave out steps of OwnSam"):
        _fit(model, [lo.DivergenceGuard()])
    optimizer: Any = model.trainer.optimizers[0]
    assert optimizer.steps == 0


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("sam", SAMS)
def test_the_gradients_of_the_last_evaluation_are_clipped(sam, name, manual):
    reference = Closures(lambda params: sam(params, partial(Clipped, lr=0.1, momentum=0.9)), manual)
    model = Closures(lambda params: sam(params, SGD), manual)
    clipping = lo.GradientClipping(Clipped.max_norm)
    expected = _fit(reference, **precision(name))
    torch.testing.assert_close(_fit(model, [clipping], **precision(name)), expected, rtol=1e-4, atol=1e-6)
    assert state_of_last_fit(model.trainer)["lightning_optim"]["counts"] == [[6, 6, 0]]


@pytest.mark.filterwarnings("ignore:Step .* skipped")
@pytest.mark.parametrize("bad", [4, 5], ids=["first", "last"])
def test_a_bad_evaluation_of_either_kind_leaves_the_step_out(bad, tmp_path):
    model = Closures(lambda params: Sam(params, SGD), nan_calls=(bad,))
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), rollback=None)
    weights = _fit(model, [guard])
    assert guard.skipped_steps == 1
    assert all(p.isfinite().all() for p in weights)
    assert {entry.step for entry in guard.report.entries if entry.kind == "nonfinite"} == {2}
    assert model.calls == (11 if bad == 4 else 12)


def test_a_cut_of_the_rate_counts_steps_and_not_evaluations(tmp_path):
    class Cuts(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                guard._guarded[0].cut.start(0.5, 4, 1)

    rates = []

    class Rates(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    base = partial(Rates, lr=0.1)
    for make in (base, lambda params: Sam(params, base)):
        guard = lo.DivergenceGuard(report_dir=str(tmp_path))
        _fit(Closures(make), [guard, Cuts()], count=8)
    assert rates[:8] == rates[8:]
    assert min(rates) < 0.1


# Supplied by ours.


def test_one_that_is_supplied_by_configuration_follows_its_schedule():
    make = lambda params: Sam(params, SGD)  # noqa: E731
    supplied = [lo.ConfigureOptimizers(make, schedule="linear", param_groups=[]), lo.GradientClipping(0.1)]
    model, reference = Closures(None), Closures(None)

    def own(params: Any) -> Any:
        optimizer = Sam(params, partial(Clipped, lr=0.1, momentum=0.9))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    reference.make = own
    torch.testing.assert_close(_fit(model, supplied), _fit(reference), rtol=1e-4, atol=1e-6)


LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=5)


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("summary", [False, True])
def test_lbfgs_trains_where_nothing_needs_its_gradients(name, manual, summary):
    supplier = lo.ConfigureOptimizers("torch.optim.LBFGS", lr=0.5, optimizer_kwargs={"max_iter": 5}, param_groups=[])
    model, plain = Closures(None, manual), Closures(LBFGS, manual)
    parts = [supplier, *([lo.RunSummary()] if summary else [])]
    assert bit_equal(_fit(model, parts, **precision(name)), _fit(plain, **precision(name)))
    assert model.calls == plain.calls > 6


@pytest.mark.parametrize("part", ["clipping", "guard", "monitor"])
def test_lbfgs_is_refused_by_what_needs_them_before_the_first_step_and_in_the_plan(part):
    model = Closures(LBFGS)
    with pytest.raises(TypeError, match=r"LBFGS evaluates its closure several times.*remove clipping"):
        _fit(model, PARTS[part]())
    assert model.calls == 0
    planned = Closures(LBFGS)
    planned.train_dataloader = lambda: batches(2)
    assert "LBFGS" in " ".join(make_plan(make_trainer(PARTS[part]()), planned).conflicts)


def test_lbfgs_and_a_gradient_scaler_are_lightnings_to_refuse():
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        _fit(Closures(LBFGS), [lo.RunSummary()], **precision("16-mixed"))
