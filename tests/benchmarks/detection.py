"""How often a tenfold loss is found, against false alarms: ``python -m tests.benchmarks.detection``, prints Markdown.

Losses and gradient norms of healthy runs are recorded once, by a guard that only watches. Then the window of the guard
looks at them with other limits: how many steps it flags, which are false alarms, and how many it would flag if loss and
gradient were ten times as large in that step. The runs are those of the digits with small batches, whose losses spread
by a factor of ten late in training, and for the false alarms the corpus of `tests.benchmarks.healthy`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import lightning_optim as lo
from lightning_optim.divergence import SIGNALS, Spikes, SpikeWindow
from tests.benchmarks.healthy import KINDS, TUNING, run_all
from tests.benchmarks.healthy.base import Classifier
from tests.benchmarks.timing import table

FACTOR = 10.0
START = 128
"""Steps that are not counted, until the window is full."""

Values = list[tuple[float, ...]]
"""Gradient norm and loss of each step of a run."""


class BatchesOf32(Classifier):
    """A perceptron that learns digits in batches of 32."""

    steps = 1000
    batch_size = 32

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


class BatchesOf128(BatchesOf32):
    """The same in batches of 128."""

    batch_size = 128


NOISY: dict[str, type[Classifier]] = {"batches of 32": BatchesOf32, "batches of 128": BatchesOf128}
CHANGED = (
    *("a term joins", "a large term joins", "curriculum, in jumps", "contrastive, batch doubles"),
    "label noise from mid-run",
)
"""Kinds whose loss does jump, so that a flag at the jump is no false alarm of the rule but a matter of what follows."""


@dataclass
class Count:
    """What a window makes of recorded runs.

    Args:
        steps: Number of steps that were looked at.
        found: Number of them that would be flagged at ten times the values.
        false: Number of them that are flagged as they are.
        runs: The kinds with false alarms, and their number in each.
    """

    steps: int = 0
    found: int = 0
    false: int = 0
    runs: dict[str, int] = field(default_factory=dict)


def watching() -> lo.DivergenceGuard:
    """Return a guard that does nothing but watch."""
    return lo.DivergenceGuard(Spikes(skip=False), lr_cut=None, rollback=None, stop=False, health=None)


def record(kinds: Iterable[str], seeds: Iterable[int], jobs: int) -> dict[str, list[Values]]:
    """Return the values of each kind, one list for each seed and optimizer."""
    recorded: dict[str, list[Values]] = {}
    for outcome in run_all(kinds, seeds, (watching,), jobs, observe=True):
        for seen in outcome.observed.values():
            good = [s for s in seen if not (s.bad_tensors or s.bad_loss)]
            recorded.setdefault(outcome.kind, []).append([tuple(s.values[name] for name in SIGNALS) for s in good])
    return recorded


def count(recorded: dict[str, list[Values]], spikes: Spikes) -> Count:
    """Return what a window makes of each run; a step that is flagged does not enter its window."""
    result = Count()
    for kind, runs in recorded.items():
        for values in runs:
            limits = spikes.window_of(len(SIGNALS))
            for step, now in enumerate(values):
                flags = flagged(limits, now)
                if step >= START:
                    result.steps += 1
                    result.found += any(flagged(limits, [FACTOR * v for v in now]))
                    if any(flags):
                        result.false += 1
                        result.runs[kind] = result.runs.get(kind, 0) + 1
                limits.update(now, flags, not any(flags))
    return result


def flagged(limits: SpikeWindow, values: Sequence[float]) -> list[bool]:
    """Return whether each value is a spike, as `StepGuard` decides it on the device."""
    together = all(v > limit for v, limit in zip(values, limits.together, strict=True))
    return [v > limit or together for v, limit in zip(values, limits.alone, strict=True)]


def main() -> None:
    """Record, and print the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(TUNING))
    parser.add_argument("--kinds", nargs="*", default=[kind for kind in KINDS if kind not in CHANGED])
    parser.add_argument("--threshold", type=float, nargs="*", default=[8.0, 6.0, 5.0, 4.0])
    parser.add_argument("--together", type=float, nargs="*", default=[math.inf, 3.0, 2.0, 1.5, 1.25])
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    KINDS.update(NOISY)
    noisy = {kind: record([kind], arguments.seeds, 1) for kind in NOISY}  # A new process does not know these kinds.
    healthy = record(arguments.kinds, arguments.seeds, arguments.jobs)
    rows: list[list[object]] = []
    for threshold in arguments.threshold:
        for together in arguments.together:
            spikes = Spikes(threshold=threshold, together=together)
            counts = [count(recorded, spikes) for recorded in noisy.values()]
            false = count(healthy, spikes)
            worst = ", ".join(f"{kind} {n}" for kind, n in sorted(false.runs.items(), key=lambda item: -item[1])[:3])
            shares = [f"{100 * c.found / c.steps:.0f} %" for c in counts]
            wrong = [round(1000 * c.false / c.steps, 2) for c in (*counts, false)]
            rows.append([threshold, together, *shares, *wrong, worst])
    header = ["`threshold`", "`together`", *(f"found, {kind}" for kind in NOISY)]
    header += [f"false of 1000, {kind}" for kind in (*NOISY, "healthy runs")]
    print(table([*header, "most of them in"], rows))


if __name__ == "__main__":
    main()
