"""Every fault × precision × accumulation × ranks, in real runs: what goes wrong, and what the guard has to make of it.

What a fault is, and what must come of it, stands in `bad_batches` and `bad_runs`; here is which runs there are. The
larger part is `slow`; each fault has runs in every precision in the default tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.divergence import bad_batches, bad_runs
from tests.divergence.runs import Cell, Fault
from tests.helpers import PRECISIONS, bit_equal

pytestmark = pytest.mark.filterwarnings("ignore")

FAULTS: tuple[type[Fault], ...] = (
    bad_batches.NaNLoss,
    bad_batches.InfInOneGradient,
    bad_batches.NaNOnOneRank,
    bad_batches.SpikeOnOneRank,
    bad_batches.TenfoldLoss,
    bad_batches.HalfAsHighAgain,
    bad_runs.CreepingUp,
    bad_runs.RateTooHigh,
    bad_runs.AdamWRateTooHigh,
    bad_runs.Vanishing,
    bad_runs.Exploding,
    bad_runs.DeadLayer,
    bad_runs.FrozenByMistake,
    bad_batches.Overflows,
    bad_batches.TwentyNaNs,
    bad_runs.Interrupted,
    bad_batches.NaNInTheFirstMicroBatch,
    bad_batches.NoWayOut,
    bad_runs.AverageBeside,
    bad_runs.AverageBehind,
)

# fault, precision, ranks (None: any), and why there is no such run.
DOES_NOT_APPLY: tuple[tuple[type[Fault], str | None, int | None, str], ...] = (
    (bad_batches.NaNOnOneRank, None, 1, "there is no other rank that could be well"),
    (bad_batches.SpikeOnOneRank, None, 1, "there is no other rank that could be well"),
    (bad_batches.Overflows, "32-true", None, "there is no loss scale"),
    (bad_batches.Overflows, "bf16-mixed", None, "there is no loss scale"),
)
# NaNInTheFirstMicroBatch accumulates 2 and 4 instead of 1 and 4: one micro-batch is NaNLoss.

# Of the runs that apply, those that are not slow.
ONE_RANK = (("32-true", False), ("bf16-mixed", True), ("16-mixed", False))
"""For each fault: precision, and whether with the larger accumulation."""
NOT_ACCUMULATED = (bad_runs.RateTooHigh, bad_runs.AdamWRateTooHigh)  # too long
TWO_RANKS: dict[type[Fault], tuple[tuple[str, bool], ...]] = {
    bad_batches.NaNLoss: (("32-true", True),),
    bad_batches.NaNOnOneRank: (("32-true", False), ("bf16-mixed", True), ("16-mixed", False)),
    bad_batches.SpikeOnOneRank: (("32-true", False), ("bf16-mixed", False), ("16-mixed", True)),
    bad_batches.TenfoldLoss: (("bf16-mixed", False),),
    bad_batches.TwentyNaNs: (("16-mixed", False),),
    bad_batches.NaNInTheFirstMicroBatch: (("32-true", False),),
    bad_batches.NoWayOut: (("bf16-mixed", True),),
}


def _why_not(fault: type[Fault], cell: Cell) -> str | None:
    for which, precision, ranks, why in DOES_NOT_APPLY:
        if which is fault and precision in (None, cell.precision) and ranks in (None, cell.ranks):
            return why
    return None


def _is_default(fault: type[Fault], cell: Cell) -> bool:
    accumulated = cell.accumulate == max(fault.accumulations)
    if cell.ranks == 1 and fault in NOT_ACCUMULATED:
        return not accumulated
    return (cell.precision, accumulated) in (ONE_RANK if cell.ranks == 1 else TWO_RANKS.get(fault, ()))


def _cells() -> Iterator[Any]:
    for fault in FAULTS:
        for name, accumulate, ranks in itertools.product(PRECISIONS, fault.accumulations, (1, 2)):
            cell = Cell(name, accumulate, ranks)
            if _why_not(fault, cell) is None:
                marks = [] if _is_default(fault, cell) else [pytest.mark.slow]
                yield pytest.param(fault(), cell, id=f"{fault.number}-{fault.__name__}-{cell}", marks=marks)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two processes, started once, which do one run after another."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize(("fault", "cell"), list(_cells()))
def test_fault(fault: Fault, cell: Cell, tmp_path, request):
    if cell.ranks == 1:
        fault.check(cell, fault.run(cell, tmp_path))
        return
    seen = request.getfixturevalue("pair").run(type(fault).run, fault, cell, tmp_path, timeout=150)
    for of_rank in seen:
        fault.check(cell, of_rank)
        assert of_rank.told == seen[0].told
        assert of_rank.skipped == seen[0].skipped
        assert bit_equal(of_rank.weights, seen[0].weights)


def test_every_fault_has_default_runs_and_none_is_left_out_for_no_reason():
    cells = [(param.values[0], param.values[1], bool(param.marks)) for param in _cells()]
    assert {fault.number for fault in FAULTS} == {*range(1, 12), 13, 14, 15}  # 12: test_clean_runs; 16: test_kills
    for fault in FAULTS:
        default = {cell.precision for of, cell, slow in cells if type(of) is fault and not slow}
        assert default == {"16-mixed"} if fault is bad_batches.Overflows else set(PRECISIONS)
