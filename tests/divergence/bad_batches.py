"""Faults of single batches: what a skipped step has to mend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import lightning_optim as lo
from lightning_optim.divergence import LRCut, Rollback
from tests.divergence.runs import QUICK, Cell, Fault, FaultyNet, Seen
from tests.helpers import bit_equal

BAD = 40


def assert_only_skipped(seen: Seen, bad: set[int]) -> None:
    """At these steps nothing moved, bit for bit: weights, moments, counters, schedule. At all others it did."""
    for step in range(1, len(seen.after)):
        before, after = seen.before(step), seen.after[step]
        for part in ("parameters", "optimizers", "schedulers"):
            assert bit_equal(before[part], after[part]) is (step in bad), (step, part)
    assert seen.skipped - seen.overflows == len(bad) or seen.overflows == len(bad) == seen.skipped


class NaNLoss(Fault):
    """The loss is NaN for one batch."""

    number = 1
    steps = 12

    def factor(self, step: int, micro: int, last: bool) -> float:
        return math.nan if step == 5 else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert_only_skipped(seen, {5})
        assert [(told.step, told.kind) for told in seen.told] == [(5, "nonfinite")]
        assert all(float(s["step"]) == 11 for s in seen.after[-1]["optimizers"][0]["state"].values())
        assert seen.after[-1]["schedulers"][0]["last_epoch"] == 11


class NaNInTheFirstMicroBatch(NaNLoss):
    """The loss of the first micro-batch of a step is NaN, and the last one's, which Lightning shows, is fine."""

    number = 13
    accumulations = (2, 4)

    def factor(self, step: int, micro: int, last: bool) -> float:
        return math.nan if (step, micro) == (5, 0) else 1.0


class NaNOnOneRank(NaNLoss):
    """The loss is NaN on the last rank only."""

    number = 3

    def factor(self, step: int, micro: int, last: bool) -> float:
        return math.nan if last and step == 5 else 1.0


class InfInOneGradient(Fault):
    """One element of one parameter's gradient is infinite, as from a kernel gone wrong; the loss is fine."""

    number = 2
    steps = 12

    def model(self, cell: Cell) -> FaultyNet:
        model = FaultyNet(self, cell)

        def spoil(grad: Tensor) -> Tensor:
            last = model.trainer.fit_loop.epoch_loop.batch_idx % cell.accumulate == cell.accumulate - 1
            bad = model.trainer.global_step == 5 and last and model.global_rank == cell.ranks - 1
            return grad.index_fill(0, torch.tensor([0]), math.inf) if bad else grad

        model.head.bias.register_hook(spoil)
        return model

    def check(self, cell: Cell, seen: Seen) -> None:
        assert_only_skipped(seen, {5})
        if cell.scaled:  # how a GradScaler finds its scale: counted, and nothing to alarm about
            assert (seen.overflows, seen.told) == (1, [])
        else:
            (told,) = seen.told
            assert (told.step, told.kind, told.names) == (5, "nonfinite", ["head.bias"])
            assert "1 of them, first of all head.bias" in told.text
        grads = seen.grads[5]
        assert not grads.pop("head.bias").isfinite().all()
        assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


class TenfoldLoss(Fault):
    """The loss is ten times as high for one batch."""

    number = 4
    steps = 56

    def factor(self, step: int, micro: int, last: bool) -> float:
        return 10.0 if step == BAD else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert_only_skipped(seen, {BAD})
        (told,) = seen.told
        assert (told.step, told.kind) == (BAD, "spike")
        assert told.batches == [cell.accumulate * BAD + micro for micro in range(cell.accumulate)]
        assert seen.baselines[BAD - 1] == seen.baselines[BAD] != seen.baselines[BAD + 1]


class SpikeOnOneRank(TenfoldLoss):
    """The loss of the last rank only is a hundred times as high for one batch."""

    number = 3

    def factor(self, step: int, micro: int, last: bool) -> float:
        return 100.0 if last and step == BAD else 1.0


class HalfAsHighAgain(Fault):
    """From one step on the loss is 1.5 times as high: a curriculum, an unfrozen part."""

    number = 5
    steps = 120
    batch_size = 1024  # little noise, so that it stands out
    lr = 1e-4

    def factor(self, step: int, micro: int, last: bool) -> float:
        return 1.5 if step >= 60 else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert 0 < seen.kinds().count("spike") <= 16
        # That the rate is low is true: the loss shall stand still but for the fault.
        assert all(60 <= told.step < 80 for told in seen.told if told.kind != "lr_too_low")
        assert not seen.did()
        assert bit_equal(seen.before(119), seen.after[119]) is False


class Overflows(Fault):
    """The loss scale starts far too high, and the first steps overflow until it has come down."""

    number = 9
    steps = 40
    init_scale = 2.0**30

    def check(self, cell: Cell, seen: Seen) -> None:
        assert 3 < seen.overflows == seen.skipped
        assert seen.told == []
        taken = 0
        for step, after in enumerate(seen.after):
            taken += not bit_equal(seen.before(step)["parameters"], after["parameters"])
            assert [len(values) for values in seen.baselines[step]] == [taken, taken]
            assert after["schedulers"][0]["last_epoch"] == taken
        assert taken == self.steps - seen.overflows


class TwentyNaNs(Fault):
    """Twenty NaN losses in a row."""

    number = 10
    steps = 50

    def guard(self) -> lo.DivergenceGuard:
        return lo.DivergenceGuard(QUICK, cooldown=3)

    def factor(self, step: int, micro: int, last: bool) -> float:
        return math.nan if 20 <= step < 40 else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert seen.skipped == 20
        assert seen.did()[:2] == [(24, "learning"), (29, "back")]  # ever further up the ladder
        assert seen.steps == 50
        for state in seen.after:
            assert all(tensor.isfinite().all() for tensor in state["parameters"].values())
        assert not bit_equal(seen.before(40)["parameters"], seen.after[40]["parameters"])


class NoWayOut(Fault):
    """Bad steps, on the last rank only, that come again after each rollback, until nothing is left to do."""

    number = 14
    steps = 60
    BAD = (*range(20, 25), *range(26, 31), *range(32, 37), *range(38, 60))

    def guard(self) -> lo.DivergenceGuard:
        rollback = Rollback(every=12, clean=4, lr_factor=1.0, budget=2)
        return lo.DivergenceGuard(QUICK, lr_cut=LRCut(budget=1), rollback=rollback, cooldown=1)

    def callbacks(self, guard: lo.DivergenceGuard) -> list[Any]:
        return [*super().callbacks(guard), lo.GradientClipping(method="zclip")]

    def factor(self, step: int, micro: int, last: bool) -> float:
        return math.nan if last and step in self.BAD else 1.0

    def check(self, cell: Cell, seen: Seen) -> None:
        assert seen.did() == [(24, "learning"), (30, "back"), (36, "back"), (42, "training")]
        for part in ("parameters", "optimizers", "schedulers"):
            for step in (30, 36):
                assert bit_equal(seen.after[11][part], seen.after[step][part]), (part, step)
        assert seen.steps == 43
        assert "lr_cut: 1 of 1, rollback: 2 of 2" in seen.told[-1].text
