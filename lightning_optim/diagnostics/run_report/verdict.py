"""What became of a run, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lightning_optim.diagnostics.generalization import Generalization, Look
from lightning_optim.diagnostics.metric_names import is_better_higher, quantity_of, split_of, training_name
from lightning_optim.diagnostics.run_report.analysis import best_of, finite, last_of, of_all_optimizers
from lightning_optim.diagnostics.run_report.run import Points, Run, loss_tags, short

_DIVERGED = 2.0
"""A last loss of more than this many times the distance that it had fallen, above its best, is a divergence."""
_HARDLY = 0.05
"""Share of the first loss by which it has to fall."""
_STANDS_OUT = 10.0
"""Factor on the median of the first losses from which the very first one says nothing."""
_CLIPPED = 0.5
_LAST = 0.1


def main_metric(runs: Sequence[Run]) -> str | None:
    """Return the metric by which runs are compared: a validation loss, else another one of validation, else a loss."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if is_better_higher(name) is not None))
    validated = [name for name in names if split_of(name) == "validation"]
    losses = [name for name in validated if is_better_higher(name) is False]
    if losses or validated:
        return min(losses or validated, key=lambda name: (sum(name not in run.scalars for run in runs), len(name)))
    own = [tag for run in runs for tag in loss_tags(run)[:1]]
    return own[0] if own else None


def label_of(tag: str) -> str:
    """Return how a metric is called in a sentence."""
    return "training loss" if tag == "optim_loss/mean" else short(tag)


def compare(runs: Sequence[Run]) -> list[str]:
    """Return sentences about which of the runs is best, by each metric of validation, else by the loss."""
    names = [n for n in dict.fromkeys(n for run in runs for n in run.metrics) if split_of(n) == "validation"]
    names = [name for name in names if is_better_higher(name) is not None] or [
        name for name in [main_metric(runs)] if name is not None
    ]
    sentences = []
    for name in names[:4]:
        higher = bool(is_better_higher(name))
        bests = [(run, best) for run in runs if (best := best_of(run.scalars.get(name, []), higher)) is not None]
        bests.sort(key=lambda pair: -pair[1][1] if higher else pair[1][1])
        if not bests:
            continue
        (run, (step, value, seconds)), others = bests[0], bests[1:]
        what = "highest" if higher else "lowest"
        text = f"{short(run.name)} has the {what} {label_of(name)}" if others else f"The {what} {label_of(name)} is"
        where = f"at step {step:,} of {run.steps:,}, after {duration(seconds)}"
        text += f": {value:.4g} {where}" if others else f" {value:.4g}, {where}"
        if others:
            text += f"; {short(others[0][0].name)} follows with {others[0][1][1]:.4g}"
        sentences.append(text + ".")
    return sentences


def of_run(run: Run) -> list[tuple[str, str]]:
    """Return what is to be known of a run: pairs of ``"good"``, ``"note"`` or ``"bad"``, and a sentence."""
    found = [sentence for sentence in (_course(run), _overfitting(run)) if sentence is not None]
    for name, one, several in (
        ("skipped_steps", "step was skipped", "steps were skipped"),
        ("lr_cuts", "time the guard cut the learning rate", "times the guard cut the learning rate"),
        ("rollbacks", "time the guard went back to a snapshot", "times the guard went back to a snapshot"),
    ):
        if count := int(last_of(run, name) or 0):
            found.append(("note", f"{count:,} {one if count == 1 else several}."))
    for points in of_all_optimizers(run, "clip_rate")[:1]:
        rate = sum(value for _, value, _ in points) / len(points)
        if rate >= _CLIPPED:
            found.append(("note", f"{rate:.0%} of the steps were clipped, so that clipping sets the step size."))
        elif rate > 0:
            found.append(("good", f"{rate:.1%} of the steps were clipped."))
    return found


REMEDY = (
    "Against overfitting: keep the weights of the best step (EarlyStopping, ModelCheckpoint), or train with more "
    "weight decay, with dropout, or with more or augmented data."
)


def _start(points: Points) -> float:
    """Return the first value, or the median of the first ones where it stands out, as after a step far too large."""
    usual = statistics.median(value for _, value, _ in points[: max(len(points) // 20, 5)])
    first = points[0][1]
    return first if abs(first) <= _STANDS_OUT * abs(usual) else usual


def _course(run: Run) -> tuple[str, str] | None:
    tags = loss_tags(run)
    if not tags or len(run.scalars[tags[0]]) < 2:
        return None
    name, points = label_of(tags[0]), run.scalars[tags[0]]
    last = points[-1][1]
    if not math.isfinite(last):
        bad = next(step for step, value, _ in points if not math.isfinite(value))
        return "bad", f"The {name} is not finite at the end; it was not at step {bad:,} for the first time."
    best = best_of(points, False)
    assert best is not None
    tail = _mean(points[-max(len(points) // 20, 1) :])
    start = _start(finite(points))
    fallen = start - best[1]
    if tail - best[1] > _DIVERGED * max(fallen, abs(best[1]) * 0.05):
        return "bad", f"It diverged: the {name} was {best[1]:.4g} at step {best[0]:,}, and is {tail:.4g} at the end."
    if fallen <= 0.01 * abs(best[1]):
        return "bad", f"The {name} has not fallen: it began at {start:.4g}, and ended at {tail:.4g}."
    if start - tail <= _HARDLY * abs(start):
        return "bad", f"The {name} has hardly fallen: it began at {start:.4g}, and ended at {tail:.4g}."
    share = max(round(len(points) * _LAST), 1)
    before, after = _mean(points[-2 * share : -share] or points[:1]), _mean(points[-share:])
    text = f"The {name} fell from {start:.4g} to {tail:.4g}"
    if len(points) >= 20 and before - after > 0.02 * fallen:
        return "note", f"{text}, and was still falling in the last tenth of the run: training longer would help."
    return "good", f"{text}."


def _overfitting(run: Run) -> tuple[str, str] | None:
    validated = [name for name in run.metrics if split_of(name) == "validation"]
    losses = [name for name in validated if quantity_of(name) == "loss"]
    for name in losses or validated:
        training = training_name(name, run.metrics) or ("optim_loss/mean" if losses else None)
        if (
            training is None
            or training not in run.scalars
            or (best := best_of(run.scalars[name], bool(is_better_higher(name)))) is None
        ):
            continue
        watch, text = Generalization(), None
        for (before, *_), (step, value, _) in zip([(-1, 0, 0), *run.scalars[name]], run.scalars[name], strict=False):
            between = [point for point in run.scalars[training] if before < point[0] <= step]
            seen = _mean(between) if between else min(run.scalars[training], key=lambda p: abs(p[0] - step))[1]
            text = watch.update(name, label_of(training), Look(step, value, seen)) or text
        if text is not None and f"(step {best[0]:,}) to" in text:  # and not only before another best
            last = run.scalars[name][-1][1]
            return "bad", (
                f"It overfits: {label_of(name)} was best at step {best[0]:,} ({best[1]:.4g}), and is {last:.4g} at the "
                f"end, while {label_of(training)} went on to improve."
            )
    return None


def _mean(points: Points) -> float:
    values = [value for _, value, _ in finite(points)]
    return sum(values) / len(values) if values else math.nan


def duration(seconds: float) -> str:
    """Format a time in words.

    Example:
        >>> duration(0.5), duration(75), duration(7300)
        ('0.5 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
