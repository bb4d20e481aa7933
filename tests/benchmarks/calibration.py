"""Where the limits of the guard's advice come from: ``python -m tests.benchmarks.calibration``, prints Markdown.

The five real trainings of the tests, at rates from a hundredth to a hundred times a good one, with several seeds. A run
is good if it ends within 20 % of the way that the best of its kind has come; else its rate is too low or too high. Each
quantity that advice rests on is looked at every 10 steps, and a run counts with the extreme that a limit is held
against: with the fifth in a row where advice asks for five.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import lightning.pytorch as L
import torch

import lightning_optim as lo
from lightning_optim.callbacks._hub import HubCallback
from lightning_optim.core.stats import STEP_SUMS, StepRecord
from lightning_optim.divergence import HealthLimits
from tests.benchmarks.timing import table
from tests.divergence.trainings import TRAININGS, train

FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
VERDICTS = ("good", "too low", "too high")
IN_A_ROW = 5
WARMUP = HealthLimits().warmup


@dataclass
class Look:
    """What one step tells."""

    ratio: float
    cosine: float
    clipped: float
    smallest_grad: float
    smallest_ratio: float
    below_eps: float
    zero: float
    group_norm: float


@dataclass
class Run:
    """A training with its outcome."""

    name: str
    factor: float
    end: float
    looks: list[Look]
    told: set[str]
    verdict: str = ""


@dataclass(frozen=True)
class Quantity:
    """Something a limit is held against; ``of`` gives the value of a run that the limit decides on."""

    name: str
    limit: str
    of: Callable[[Sequence[Look]], float]
    above: bool
    against: tuple[str, ...] = field(default=("too low", "too high"))


class Looks(HubCallback):
    """Notes what the guard looks at."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def report_due(self, trainer: L.Trainer) -> bool:
        """Every 10 steps."""
        return trainer.global_step % 10 == 9

    def on_report(self, trainer: L.Trainer, optimizer_index: int, record: StepRecord) -> None:
        """Compute it here, where waiting does not matter."""
        if record.steps < WARMUP or not self.report_due(trainer):
            return
        sums = dict(zip(STEP_SUMS, record.update.sums.double().T, strict=True))
        numel = torch.tensor(record.update.numel)
        seen, moved, params = record.clipped_norm_sq.double(), sums["update_sq"], sums["param_sq"]
        rms = (record.grad.norm_sq.double() / numel).sqrt()
        ends = list(accumulate(record.grad.group_sizes))
        self.looks.append(
            Look(
                ratio=_root(moved.sum() / params.sum()),
                cosine=float(sums["grad_exp_avg"].sum() / (seen.sum() * sums["momentum_sq"].sum()).sqrt()),
                clipped=_root(seen.sum() / record.grad.norm_sq.double().sum()),
                smallest_grad=float(rms[rms > 0].min() / rms.max()) if rms.max() > 0 else math.nan,
                smallest_ratio=float((moved / params)[params > 0].min().sqrt()),
                below_eps=float((sums["below_eps"] / numel).max()),
                zero=float((sums["zero_grad"] / numel).max()),
                group_norm=_root(record.grad.norm_sq[: ends[0]].double().sum()),
            )
        )


def _root(value: torch.Tensor) -> float:
    return math.sqrt(float(value)) if value >= 0 else math.nan


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def lowest_mean(quantity: str) -> Callable[[Sequence[Look]], float]:
    """The least mean of five looks in a row, or twice the highest of them if that is more."""

    def of(looks: Sequence[Look]) -> float:
        values = _finite([getattr(look, quantity) for look in looks])
        fives = [values[i : i + IN_A_ROW] for i in range(len(values) - IN_A_ROW + 1)]
        rows = [max(statistics.fmean(five), 2 * max(five)) for five in fives]
        return min(rows, default=math.nan)

    return of


def highest_in_a_row(quantity: str) -> Callable[[Sequence[Look]], float]:
    """What five looks in a row are all above, at most."""

    def of(looks: Sequence[Look]) -> float:
        values = _finite([getattr(look, quantity) for look in looks])
        rows = [min(values[i : i + IN_A_ROW]) for i in range(len(values) - IN_A_ROW + 1)]
        return max(rows, default=math.nan)

    return of


def lowest_in_a_row(quantity: str) -> Callable[[Sequence[Look]], float]:
    """What five looks in a row are all below, at least."""

    def of(looks: Sequence[Look]) -> float:
        values = _finite([getattr(look, quantity) for look in looks])
        rows = [max(values[i : i + IN_A_ROW]) for i in range(len(values) - IN_A_ROW + 1)]
        return min(rows, default=math.nan)

    return of


def _explosion(looks: Sequence[Look]) -> float:
    norms = _finite([look.group_norm for look in looks])
    times = [norms[i] / statistics.median(norms[i - 10 : i]) for i in range(10, len(norms)) if norms[i - 1] > 0]
    return max(times, default=math.nan)


QUANTITIES = (
    Quantity("update over weights, 5 in a row", "high_ratio", highest_in_a_row("ratio"), True, ("too high",)),
    Quantity("cosine of gradient and momentum, mean of 5", "against", lowest_mean("cosine"), False, ("too high",)),
    Quantity("update over weights, 5 in a row", "low_ratio", lowest_in_a_row("ratio"), False, ("too low",)),
    Quantity("cosine, 5 in a row", "along", highest_in_a_row("cosine"), True, ("too low",)),
    Quantity("share of the gradient left by clipping, 5 in a row", "", lowest_in_a_row("clipped"), False),
    Quantity(
        "smallest gradient over the largest",
        "vanishing",
        lambda s: min(_finite([x.smallest_grad for x in s]), default=math.nan),
        False,
    ),
    Quantity(
        "smallest update over weights of a tensor",
        "stalled",
        lambda s: min(_finite([x.smallest_ratio for x in s]), default=math.nan),
        False,
    ),
    Quantity(
        "largest share below eps of a tensor",
        "below_eps",
        lambda s: max(_finite([x.below_eps for x in s]), default=math.nan),
        True,
    ),
    Quantity(
        "largest share of zeros in a gradient", "", lambda s: max(_finite([x.zero for x in s]), default=math.nan), True
    ),
    Quantity("gradient norm over its median of 10", "exploding", _explosion, True),
)


def runs(steps: int, seeds: Sequence[int], names: Sequence[str]) -> list[Run]:
    """Train them all, and say of each what it was."""
    found = []
    for name in names:
        here = []
        for factor in FACTORS:
            for seed in seeds:
                looks = Looks()
                with tempfile.TemporaryDirectory() as folder:
                    guard = lo.DivergenceGuard(None, lr_cut=None, rollback=None, stop=False, report_dir=folder)
                    losses = train(TRAININGS[name], [guard, looks], steps, factor, seed)
                end = statistics.fmean(losses[-steps // 10 :])
                told = {entry.kind for entry in guard.report.entries}
                here.append(Run(name, factor, end, looks.looks, told))
                start = losses[0]
        ends = {factor: statistics.median([r.end for r in here if r.factor == factor]) for factor in FACTORS}
        best = min((end, factor) for factor, end in ends.items() if math.isfinite(end))
        for run in here:
            good = run.end < best[0] + 0.2 * (start - best[0])
            run.verdict = "good" if good else "too low" if run.factor < best[1] else "too high"
        found += here
    return found


def distributions(found: Sequence[Run]) -> str:
    """Each quantity in good and bad runs: 5th percentile, median and 95th."""
    rows: list[list[object]] = []
    for quantity in QUANTITIES:
        row: list[object] = [quantity.name, _limit(quantity)]
        for verdict in VERDICTS:
            values = sorted(_finite([quantity.of(run.looks) for run in found if run.verdict == verdict]))
            row.append(" / ".join(f"{_at(values, share):.2g}" for share in (0.05, 0.5, 0.95)) if values else "-")
        rows.append(row)
    return table(["quantity", "limit", *VERDICTS], rows)


def limits(found: Sequence[Run]) -> str:
    """Each limit as shipped and as the good runs allow it: how many good runs it speaks of, and how many bad ones."""
    rows: list[list[object]] = []
    for quantity in QUANTITIES:
        values = {v: _finite([quantity.of(r.looks) for r in found if r.verdict == v]) for v in VERDICTS}
        if not values["good"]:
            continue
        bad = [value for verdict in quantity.against for value in values[verdict]]
        ordered = sorted(values["good"])
        shipped = getattr(HealthLimits(), quantity.limit) if quantity.limit else None
        allowed = _at(ordered, 0.98 if quantity.above else 0.02)
        for which, limit in (("shipped", shipped), ("for 2 % of good runs", allowed)):
            if limit is not None:
                beyond = [sum(v > limit if quantity.above else v < limit for v in some) for some in (ordered, bad)]
                rows.append(
                    [
                        f"{quantity.name} {'>' if quantity.above else '<'} {limit:.2g}",
                        which,
                        f"{beyond[0]} of {len(ordered)}",
                        f"{beyond[1]} of {len(bad)} {' or '.join(quantity.against)}",
                    ]
                )
    return table(["limit", "", "good runs", "bad runs"], rows)


def advice(found: Sequence[Run]) -> str:
    """What the guard said, as it ships."""
    told: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(VERDICTS, 0))
    counts = {verdict: sum(run.verdict == verdict for run in found) for verdict in VERDICTS}
    for run in found:
        for kind in run.told:
            told[kind][run.verdict] += 1
    rows = [[kind, *(f"{told[kind][v]} of {counts[v]}" for v in VERDICTS)] for kind in sorted(told)]
    return table(["told", *VERDICTS], rows)


def outcomes(found: Sequence[Run]) -> str:
    """How the runs ended."""
    rows: list[list[object]] = []
    for name in dict.fromkeys(run.name for run in found):
        row: list[object] = [name]
        for factor in FACTORS:
            here = [run for run in found if run.name == name and run.factor == factor]
            marks = {"good": "", "too low": " ↓", "too high": " ↑"}
            row.append(f"{statistics.median([r.end for r in here]):.3g}{marks[here[0].verdict]}")
        rows.append(row)
    return table(["last losses (↓ too low, ↑ too high) at the rate times", *map(str, FACTORS)], rows)


def _limit(quantity: Quantity) -> str:
    return f"`{quantity.limit}` {getattr(HealthLimits(), quantity.limit):g}" if quantity.limit else ""


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[3, 4, 5], help="the limits were set on 0, 1 and 2")
    parser.add_argument("--only", nargs="*", default=list(TRAININGS))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = runs(arguments.steps, arguments.seeds, arguments.only)
    for part in (outcomes, advice, distributions, limits):
        print(part(found), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
