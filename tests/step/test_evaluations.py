"""Optimizers that evaluate their closure several times, or step by another one inside: each evaluation is real."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.core.stats import STEP_SUMS, StepCounts, StepRecord
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.factory import freezing
from lightning_optim.step import StepPipeline
from lightning_optim.step.evaluations import updating_optimizer
from lightning_optim.step.foreign_decay import ForeignDecay
from tests.helpers import bit_equal
from tests.step.sharpness import Clipped, Lookahead, LookSam, OneCallSam, OwnSam, Sam, SumSam

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "ours": partial(lo.optim.AdamW, lr=0.1),
}
SAMS = [Sam, OneCallSam, SumSam, LookSam, Lookahead]


class Run:
    """A small regression, trained by closures; ``bad`` are the evaluations whose loss is NaN."""

    def __init__(self, make: Callable[[Any], Optimizer], bad: tuple[int, ...] = ()) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
            self.x, self.y = torch.randn(16, 4), torch.randn(16, 2)
        self.optimizer: Any = make(self.net.parameters())
        self.bad, self.evaluations = bad, 0
        self.grads: list[Tensor] = []

    def evaluate(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.net(self.x), self.y) * (math.nan if self.evaluations in self.bad else 1)
        loss.backward()
        self.evaluations += 1
        self.grads = [p.grad.clone() for p in self.net.parameters() if p.grad is not None]
        return loss

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            if isinstance(self.optimizer, OneCallSam):
                self.evaluate()
            self.optimizer.step(self.evaluate)
        return self

    def everything(self) -> Any:
        inside = updating_optimizer(self.optimizer)
        return copy.deepcopy([self.net.state_dict(), inside.state_dict()["state"]])


def pipeline(run: Run, max_norm: float | None = 1e9, guard: bool = True, reports: list[StepRecord] | None = None):
    return StepPipeline(
        run.optimizer,
        clip=None if max_norm is None else GlobalNorm(max_norm),
        detectors=[NonFiniteGradient()] if guard else [],
        on_report=None if reports is None else reports.append,
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sam", SAMS)
def test_what_never_acts_changes_no_bit_and_no_evaluation(sam, base):
    plain, run = (Run(lambda params: sam(params, BASES[base])) for _ in range(2))
    reports: list[StepRecord] = []
    pipe = pipeline(run, reports=reports)
    assert bit_equal(run.train(5).everything(), plain.train(5).everything())
    assert run.evaluations == plain.evaluations
    assert pipe.counts() == StepCounts(steps=5)
    assert [record.steps for record in reports] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("sam", SAMS)
def test_the_gradients_of_the_update_are_clipped_and_no_others(sam):
    reference = Run(lambda params: sam(params, partial(Clipped, lr=0.1, momentum=0.9))).train(6)
    run = Run(lambda params: sam(params, BASES["sgd"]))
    pipe = pipeline(run, max_norm=Clipped.max_norm)
    torch.testing.assert_close(run.train(6).everything(), reference.everything())
    assert run.evaluations == reference.evaluations
    assert pipe.counts() == StepCounts(steps=6, clipped=6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sam", SAMS)
def test_a_bad_first_evaluation_leaves_everything_as_it_was(sam, base):
    plain, run = (Run(lambda params: sam(params, BASES[base])) for _ in range(2))
    pipe = pipeline(run)
    run.train(3)
    before, steps = run.everything(), run.optimizer.steps
    run.bad = (run.evaluations,)
    if sam is OneCallSam:  # both come after the weights were moved by the first
        run.bad = (run.evaluations + 1,)
    run.train(1)
    assert bit_equal(run.everything(), before)
    assert run.optimizer.steps == steps
    assert pipe.counts() == StepCounts(steps=4, skipped=1)
    run.train(2)
    assert bit_equal(run.everything(), plain.train(5).everything())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sam", [Sam, SumSam])
def test_a_bad_second_evaluation_leaves_weights_and_moments_as_they_were(sam, base):
    run = Run(lambda params: sam(params, BASES[base]))
    pipe = pipeline(run)
    before = run.train(3).everything()
    run.bad = (run.evaluations + 1,)
    assert bit_equal(run.train(1).everything(), before)
    assert pipe.counts() == StepCounts(steps=4, skipped=1)
    assert not bit_equal(run.train(1).everything(), before)


@pytest.mark.parametrize("make", [lambda params: Sam(params, BASES["sgd"]), lambda params: OwnSam(params)])
def test_a_report_is_of_the_last_evaluation_and_of_the_whole_step(make):
    run, reports = Run(make), []
    pipeline(run, max_norm=None, guard=False, reports=reports)
    for step in range(3):
        before = [p.detach().clone() for p in run.net.parameters()]
        run.train(1)
        grads = torch.stack([grad.double().square().sum() for grad in run.grads])
        moved = torch.stack(
            [(p.detach() - b).double().square().sum() for p, b in zip(run.net.parameters(), before, strict=True)]
        )
        torch.testing.assert_close(reports[step].grad.norm_sq, grads)
        torch.testing.assert_close(
            reports[step].update.sums[:, STEP_SUMS.index("update_sq")].double(), moved, rtol=1e-4, atol=1e-9
        )
    assert len(reports) == 3


def test_steps_that_are_made_by_hand_are_those_of_the_optimizer_inside():
    run = Run(lambda params: Sam(params, BASES["sgd"]))
    pipe = pipeline(run, max_norm=0.1)
    reference = Run(lambda params: Sam(params, partial(Clipped, lr=0.1, momentum=0.9)))
    for each in (run, reference):
        for _ in range(3):
            each.evaluate()
            with torch.no_grad():
                each.optimizer.climb()
            each.evaluate()
            each.optimizer.back()
            each.optimizer.base_optimizer.step()
    torch.testing.assert_close(run.everything(), reference.everything())
    assert pipe.counts() == StepCounts(steps=3, clipped=3)


def test_gradients_that_lie_ready_are_clipped_for_the_optimizer_inside():
    def step(run: Run) -> None:
        run.evaluate()
        run.optimizer.step()

    run = Run(lambda params: Lookahead(params, BASES["sgd"]))
    reference = Run(lambda params: Lookahead(params, partial(Clipped, lr=0.1, momentum=0.9)))
    pipe = pipeline(run, max_norm=0.1)
    for _ in range(3):
        step(run)
        step(reference)
    torch.testing.assert_close(run.everything(), reference.everything())
    run.bad = (run.evaluations,)
    before = run.everything()
    step(run)
    assert bit_equal(run.everything(), before)
    assert pipe.counts() == StepCounts(steps=4, clipped=3, skipped=1)


def test_an_optimizer_that_updates_by_itself_is_clipped_at_each_evaluation_and_says_so_once():
    run, reference = Run(OwnSam), Run(OwnSam)
    plain = reference.evaluate

    def clipped() -> Tensor:
        loss = plain()
        nn.utils.clip_grad_norm_(reference.net.parameters(), 0.1)
        return loss

    reference.evaluate = clipped
    pipe = pipeline(run, max_norm=0.1, guard=False)
    with pytest.warns(UserWarning, match="OwnSam evaluates its closure more than once") as said:
        run.train(4)
    assert len(said) == 1
    torch.testing.assert_close(run.everything(), reference.train(4).everything())
    assert pipe.counts() == StepCounts(steps=4, clipped=4)


def test_it_is_not_guarded_because_it_cannot_be_left_half_way():
    run = Run(OwnSam)
    pipeline(run, max_norm=None)
    with pytest.raises(RuntimeError, match=r"cannot leave out steps of OwnSam.*SAM\(params, base_optimizer\)"):
        run.train(1)
    assert run.optimizer.steps == 0


@pytest.mark.filterwarnings("ignore:OwnSam evaluates")
def test_a_bad_last_evaluation_of_it_ends_the_run_where_clipping_would_leave_it_out():
    run = Run(OwnSam, bad=(3,))
    pipeline(run, max_norm=0.1, guard=False)
    with pytest.raises(RuntimeError, match="not finite at the last evaluation"):
        run.train(2)
    assert run.optimizer.steps == 1


class MovesFirst(torch.optim.SGD):
    """Evaluates once, at other weights than those of the run, as schedule-free optimizers with a closure do."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(0.01)
                p.grad = None
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1.0)
        return super().step(closure)


def test_an_evaluation_at_moved_weights_cannot_be_left_out_either():
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # torch puts hooks into the step of a class with its first instance
    run = Run(partial(MovesFirst, lr=0.1), bad=(0,))
    pipeline(run, max_norm=None)
    with pytest.raises(RuntimeError, match="after it has moved the weights"):
        run.train(1)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, lo.optim.AdamW])
@pytest.mark.parametrize("hands_on", [True, False])
def test_a_subclass_that_calls_the_step_of_its_base_class_is_one_step(make, hands_on):
    class Sub(make):  # type: ignore[valid-type, misc]
        def step(self, closure: Any) -> Any:
            if hands_on:
                return super().step(closure)
            with torch.enable_grad():
                loss = closure()
            super().step()
            return loss

    make([nn.Parameter(torch.ones(1))])  # torch puts hooks into the step of a class when it makes the first instance
    plain, run = Run(partial(make, lr=0.1), bad=()), Run(partial(Sub, lr=0.1), bad=(2,))
    pipe = pipeline(run)
    assert bit_equal(run.train(5).everything(), plain.train(4).everything())
    assert pipe.counts() == StepCounts(steps=5, skipped=1)
    assert run.evaluations == 5


class Keeps(Sam):
    """Holds an optimizer and updates by itself all the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for p in self.params:
            p.sub_(p.grad, alpha=0.1)
        return loss


def test_an_update_beside_the_optimizer_inside_is_refused():
    run = Run(lambda params: Keeps(params, BASES["sgd"]))
    pipeline(run)
    with pytest.raises(RuntimeError, match="without a step of the SGD inside it"):
        run.train(1)


def test_closing_leaves_nothing_on_either_of_the_two():
    run = Run(lambda params: Sam(params, BASES["sgd"]))
    pipeline(run, max_norm=0.1).close()
    for optimizer in (run.optimizer, run.optimizer.base_optimizer):
        assert "step" not in vars(optimizer)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    reference = Run(lambda params: Sam(params, BASES["sgd"])).train(2)
    assert bit_equal(run.train(2).everything(), reference.everything())


# Other hooks that need gradients.


@pytest.mark.parametrize("sam", [Sam, OneCallSam, LookSam, Lookahead])
def test_decay_is_taken_off_once_per_step_before_the_step_inside(sam):
    def decayed(params: Any) -> Optimizer:
        optimizer = sam(params, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0))
        ForeignDecay(optimizer, weight_decay=0.5)
        return optimizer

    reference = Run(lambda params: sam(params, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))).train(4)
    assert bit_equal(Run(decayed).train(4).everything(), reference.everything())


def test_decay_is_refused_where_there_is_no_one_update():
    run = Run(OwnSam)
    ForeignDecay(run.optimizer, weight_decay=0.5)
    with pytest.raises(RuntimeError, match="OwnSam evaluates its closure several times"):
        run.train(1)
    with pytest.raises(ValueError, match="LBFGS evaluates its closure several times"):
        ForeignDecay(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), weight_decay=0.5)


@pytest.mark.parametrize("sam", [Sam, OneCallSam])
def test_a_frozen_group_is_left_alone_by_all_evaluations(sam, monkeypatch):
    monkeypatch.setattr(freezing, "_is_distributed", lambda: True)  # then gradients are computed, and dropped
    rules = [lo.ParamGroupRule(name="body", pattern="^0", frozen_until="2 steps")]
    run = Run(lambda params: torch.optim.SGD(params, lr=0.1))
    factory = lo.OptimizerFactory(lambda groups: sam(groups, BASES["sgd"]), param_groups=rules)
    run.optimizer, scheduler = factory.build(run.net, lo.Horizon(total_steps=4))
    weight: Any = run.net[0].weight
    start = weight.detach().clone()
    for step in range(3):
        assert torch.equal(weight, start), step
        run.train(1)
        scheduler.step()
    assert not torch.equal(weight, start)


# LBFGS.


def _lbfgs(params: Any) -> Optimizer:
    return torch.optim.LBFGS(params, lr=0.5, max_iter=6)


@pytest.mark.parametrize(
    "parts",
    [{"clip": GlobalNorm(1.0)}, {"detectors": [NonFiniteGradient()]}, {"on_report": lambda record: None}],
    ids=lambda parts: next(iter(parts)),
)
def test_lbfgs_is_refused_where_its_gradients_are_needed(parts):
    with pytest.raises(TypeError, match=r"LBFGS evaluates its closure several times.*remove clipping"):
        StepPipeline(_lbfgs([nn.Parameter(torch.zeros(1))]), **parts)


def test_lbfgs_is_left_alone_and_its_steps_are_counted_where_they_are_not():
    plain, run = Run(_lbfgs), Run(_lbfgs)
    pipe = StepPipeline(run.optimizer)
    assert bit_equal(run.train(3).everything(), plain.train(3).everything())
    assert run.evaluations == plain.evaluations > 6
    assert pipe.counts() == StepCounts(steps=3)


# Which one it is.


def test_the_optimizer_inside_is_the_deepest_that_has_the_same_parameters():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    deep: Any = Sam(weights, lambda groups: Lookahead(groups, BASES["sgd"]))
    assert updating_optimizer(deep) is deep.base_optimizer.base_optimizer
    part = Sam(weights, BASES["sgd"])
    part.base_optimizer = torch.optim.SGD(weights[:1], lr=0.1)
    assert updating_optimizer(part) is part
    two: Any = Sam(weights, BASES["sgd"])
    two.other = torch.optim.SGD(weights, lr=0.1)
    assert updating_optimizer(two) is two


def test_an_optimizer_inside_forgets_its_step_when_the_pipeline_is_closed() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer: Any = Sam([weight], BASES["ours"])
    pipeline = StepPipeline(optimizer, clip=GlobalNorm(1.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.base_optimizer._batches is not None
    pipeline.close()
    assert optimizer.base_optimizer._batches is None
