"""What a comparison has measured, by variant and seed, and what follows from it in words."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lightning_optim.tuning.compare.metric import Metric
from lightning_optim.tuning.compare.paired import Difference, paired
from lightning_optim.tuning.compare.rates import TunedRate
from lightning_optim.tuning.runs import JobResult

COLUMNS = (
    "variant", "seed", "status", "metric", "best", "best_step", "best_seconds", "last", "train_loss", "gap", "steps",
    "seconds", "ms_per_step", "state_bytes", "skipped", "spikes", "lr_factor", "lr", "initial_weights",
    "first_batches", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison.

    Args:
        results: Results by variant and seed.
        metric: The metric of the comparison.
        settings: What each variant sets, as text.
        rates: Tuned rates by variant; None if each was taken as given.
        budget: The budget in words.
        folder: Folder with the runs, ``compare.html`` and ``results.csv``.
        changes_model: Variants that change the model or the data.
        page: The page; None if none was written.
    """

    results: Mapping[str, Mapping[int, JobResult]]
    metric: Metric
    settings: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, TunedRate] | None = None
    budget: str = ""
    folder: Path = Path()
    changes_model: Sequence[str] = ()
    page: Path | None = None

    def bests(self, variant: str) -> dict[int, float]:
        """Return the best value of the metric by seed, of the seeds that have finished."""
        found = {seed: self.metric.best(r) for seed, r in self.results[variant].items() if r.ok}
        return {seed: point[1] for seed, point in found.items() if point is not None}

    @cached_property
    def ranking(self) -> list[str]:
        """The variants, the one with the best mean first; those without a finished seed last."""

        def place(name: str) -> tuple[int, float]:
            values = list(self.bests(name).values())
            if not values:
                return 2, 0.0
            value = mean(values)
            complete = len(values) == len(self.results[name])
            return 0 if complete else 1, -value if self.metric.higher else value

        return sorted(self.results, key=place)

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """The paired difference of each variant from the best one, by variant."""
        best, *others = self.ranking
        values = self.bests(best)
        return {name: paired(values, self.bests(name), self.metric.higher, len(others)) for name in others}

    def mean_and_sd(self, variant: str) -> tuple[float, float]:
        """Return mean and standard deviation of the best values over seeds; NaN where there are too few."""
        values = list(self.bests(variant).values())
        return (mean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan)

    def average(self, variant: str, what: str) -> float:
        """Return the mean of a number of all runs of a variant that have it; NaN without any.

        Args:
            variant: The variant.
            what: A field of `JobResult`, or ``"gap"``.
        """
        values = [
            self.metric.gap(result) if what == "gap" else getattr(result, what)
            for result in self.results[variant].values()
        ]
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        return mean(known) if known else math.nan

    def verdict(self) -> list[tuple[str, str]]:
        """Return sentences about what the comparison says, each with ``"good"``, ``"note"`` or ``"bad"``."""
        return [*self._about_best(), *self._about_others(), *self._about_failures(), *self._about_fairness()]

    def _about_best(self) -> list[tuple[str, str]]:
        best = self.ranking[0]
        if not self.bests(best):
            return [("bad", "No run has finished, so there is nothing to compare.")]
        what = f"{'highest' if self.metric.higher else 'lowest'} {label(self.metric)}"
        text = f"{best} has the {what}: {self.shown(best)}"
        return [("good", f"{text}, the mean of the best values of {count(len(self.bests(best)), 'seed')}.")]

    def _about_others(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        best = self.ranking[0]
        if not self.bests(best):
            return found
        for name, gap in self.differences.items():
            if not self.bests(name):
                continue
            if gap.verdict == "cannot tell":
                found.append(
                    (
                        "note",
                        f"{name} is worse by {gap.mean:.3g} with one seed, which cannot tell a difference from noise: "
                        "run 3 seeds or more."
                        if gap.seeds
                        else f"{name} and {best} have no seed in common that has finished: nothing can be told.",
                    )
                )
            elif gap.verdict == "worse":
                found.append(("good", f"{name} is worse than {best} by {_interval(gap)}: more than noise."))
            else:
                found.append(
                    ("note", f"{name} and {best} differ by {_interval(gap)}: within noise over {gap.seeds} seeds.")
                )
        if any(gap.seeds >= 2 for gap in self.differences.values()):
            found.append(
                ("note", "Differences are paired over seeds; their 95% intervals (Student's t) hold all together.")
            )
        return found

    def _about_failures(self) -> list[tuple[str, str]]:
        found = []
        for name, results in self.results.items():
            if failed := {seed: result for seed, result in results.items() if not result.ok}:
                states = ", ".join(f"seed {seed} {_was(result.status)}" for seed, result in failed.items())
                reason = next((r.error.splitlines()[0] for r in failed.values() if r.error), "")
                found.append(("bad", f"{name}: {states}{f' ({reason})' if reason else ''}. It is not in the means."))
        return found

    def _about_fairness(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self.rates is None:
            found.append(
                (
                    "note",
                    "Each variant ran at the rate that it was given. Only with a rate tuned for each of them is a "
                    "comparison of optimizers fair: --tune-lr.",
                )
            )
        else:
            factors = ", ".join(f"{name} {rate.factor:.3g}x" for name, rate in self.rates.items())
            found.append(("good", f"Each variant ran at its own tuned rate: {factors} of the given one."))
            if edges := [name for name, rate in self.rates.items() if rate.at_edge]:
                found.append(
                    ("bad", f"The best rate of {' and '.join(edges)} is at the edge of those tried; it may be farther.")
                )
        found.append(self._about_start())
        if self.metric.note:
            found.append(("note", self.metric.note))
        return found

    def _about_start(self) -> tuple[str, str]:
        weights, batches = self.same("weights"), self.same("batches")
        changed = " and ".join(self.changes_model)
        if self.changes_model:
            order = "all saw the same batches" if batches else "their batches differ as well"
            return "note", f"{changed} change{'s' * (len(self.changes_model) == 1)} model or data: initial weights " + (
                f"are {'equal nevertheless' if weights else 'not equal'}; {order}."
            )
        if weights and batches:
            return (
                "good",
                "For each seed, all variants had the same initial weights and the same first batches (checked).",
            )
        what = " and ".join(n for n, same in (("initial weights", weights), ("first batches", batches)) if not same)
        return "bad", f"The {what} differ between variants of one seed: the comparison is not paired."

    def same(self, fact: str) -> bool:
        """Return whether a digest, ``"weights"`` or ``"batches"``, is equal for all variants of each seed."""
        seeds = {seed for results in self.results.values() for seed in results}
        for seed in seeds:
            known = [results[seed].facts.get(fact) for results in self.results.values() if seed in results]
            digests = [tuple(each) if isinstance(each, list) else each for each in known if each]
            if fact == "batches" and digests:  # A run that ended early has seen fewer.
                least = min(map(len, digests))
                digests = [each[:least] for each in digests]
            if len(set(digests)) > 1:
                return False
        return True

    def shown(self, variant: str) -> str:
        """Return the metric of a variant as text: mean ± standard deviation."""
        average, spread = self.mean_and_sd(variant)
        return "-" if math.isnan(average) else f"{average:.4g}" + ("" if math.isnan(spread) else f" ± {spread:.2g}")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each run, by the columns of ``results.csv``."""
        found = []
        for name, results in self.results.items():
            for seed, result in results.items():
                best = self.metric.best(result)
                factor = 1.0 if self.rates is None else self.rates[name].factor
                cells: dict[str, Any] = {
                    "variant": name, "seed": seed, "status": result.status, "metric": self.metric.name,
                    "best": best and best[1], "best_step": best and best[0], "best_seconds": best and round(best[2], 3),
                    "last": self.metric.last(result), "train_loss": result.train_loss,
                    "gap": self.metric.gap(result), "steps": result.steps, "seconds": round(result.seconds, 3),
                    "ms_per_step": result.ms_per_step, "state_bytes": result.state_bytes, "skipped": result.skipped,
                    "spikes": result.spikes, "lr_factor": factor, "lr": result.facts.get("lr"),
                    "initial_weights": result.facts.get("weights"),
                    "first_batches": " ".join(result.facts.get("batches", [])),
                    "error": result.error.replace("\n", " "),
                }  # fmt: skip
                found.append(cells)
        return found

    def write_csv(self, path: Path) -> Path:
        """Write ``results.csv``: a row for each run.

        Args:
            path: The file.

        Returns:
            ``path``.
        """
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())
        return path


def label(metric: Metric) -> str:
    """Return what a metric is called in a sentence."""
    return metric.name if metric.of_validation else "training loss at the end"


def count(number: int, what: str) -> str:
    """Return a number with its noun.

    Example:
        >>> count(1, "seed"), count(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def _interval(gap: Difference) -> str:
    return f"{gap.mean:.3g} ± {gap.half_width:.2g}"


def _was(status: str) -> str:
    return {"killed": "was killed", "out of memory": "ran out of memory"}.get(status, status)
