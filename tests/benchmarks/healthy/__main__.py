"""What the guard does to healthy runs: ``python -m tests.benchmarks.healthy``, prints a Markdown table."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch

import lightning_optim as lo
from tests.benchmarks.healthy import KINDS, TUNING, Outcome, no_guard, run_all
from tests.benchmarks.timing import table

HEADER: list[str] = ["kind", "runs", "cuts", "rollbacks", "stops", "skipped good steps of 1000", "alarms in a run"]
HEADER += ["metric", "without guard", "with it"]


def row(guarded: Sequence[Outcome], unguarded: Sequence[Outcome]) -> list[object]:
    """Return the row of one kind, from its outcomes with a guard and without."""
    runs = len(guarded)
    alarms: Counter[str] = sum((outcome.alarms for outcome in guarded), Counter())
    listed = ", ".join(f"{kind} {count / runs:g}" for kind, count in sorted(alarms.items())) or "none"
    skipped, steps = sum(outcome.skipped for outcome in guarded), sum(outcome.steps for outcome in guarded)
    counts = [sum(getattr(outcome, name) for outcome in guarded) for name in ("cuts", "rollbacks", "stops")]
    metric = KINDS[guarded[0].kind].metric
    return [guarded[0].kind, runs, *counts, round(1000 * skipped / steps, 2), listed, metric] + [
        _mean_and_spread([outcome.metric for outcome in outcomes]) for outcomes in (unguarded, guarded)
    ]


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
    return f"{statistics.fmean(values):.3g} ± {spread:.2g}"


def main() -> None:
    """Print the table, a row as soon as it is known, and then what was reported in which run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(TUNING))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--guarded-only", action="store_true", help="leave out the runs without a guard")
    parser.add_argument("--entries", action="store_true", help="print each entry of the reports as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        raise SystemExit(f"No kind {unknown[0]!r}. There are: {'; '.join(KINDS)}.")
    guards = (lo.DivergenceGuard,) if arguments.guarded_only else (lo.DivergenceGuard, no_guard)
    outcomes = run_all(arguments.kinds, arguments.seeds, guards, arguments.jobs)
    entries = []
    for kind, of_kind in itertools.groupby(outcomes, lambda outcome: outcome.kind):
        found = list(of_kind)
        guarded, unguarded = found[:: len(guards)], found[1 :: len(guards)]
        lines = table(HEADER, [row(guarded, unguarded)]).splitlines()
        print("\n".join(lines if kind == arguments.kinds[0] else lines[2:]), flush=True)
        entries += [
            f"{kind}, seed {o.seed}, step {at}: {what}: {text}" for o in guarded for at, what, text in o.entries
        ]
    if arguments.entries:
        print("", *entries, sep="\n")


if __name__ == "__main__":
    main()
