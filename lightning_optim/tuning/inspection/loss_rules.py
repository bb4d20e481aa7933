"""Findings about the loss: its arguments, its value against chance, and how it is reduced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_optim.tuning.inspection.findings import Finding, finding
from lightning_optim.tuning.inspection.losses import BINARY, CLASSIFICATION, REGRESSION, LossCall
from lightning_optim.tuning.inspection.watch import Watch

LARGEST_TARGET = 100.0
MADE_BY_SOFTMAX = ("softmax", "sigmoid", "gumbel_softmax")


def argument_findings(watch: Watch) -> Iterator[Finding]:
    """Predictions and targets that do not fit the loss function."""
    for name, where in watch.broadcasts.items():
        yield finding("shape-mismatch", name or "the loss", f"predictions and targets broadcast: {where}.")
        break
    told = set()
    for call in watch.losses:
        for kind, seen in _mismatches(call):
            if kind not in told:
                told.add(kind)
                yield finding(kind, call.module or call.name, f"{call.name}: {seen}." if call.module else f"{seen}.")


def _mismatches(call: LossCall) -> Iterator[tuple[str, str]]:
    shapes = f"predictions {list(call.shape)}, targets {list(call.target_shape)}"
    if call.name in REGRESSION and call.shape != call.target_shape:
        yield "shape-mismatch", f"{shapes}"
    if call.name == "cross_entropy" and call.classes is not None and call.classes > 1:
        if call.made_by in MADE_BY_SOFTMAX or (call.sums_to_one and call.targets >= 4):
            yield (
                "softmax-before-cross-entropy",
                "the predictions of each sample are in [0, 1]"
                + (f", by {call.made_by}" if call.made_by in MADE_BY_SOFTMAX else " and sum to 1"),
            )
        if call.target_sums is not None and (
            abs(call.target_sums[0] - 1) > 0.05 or abs(call.target_sums[1] - 1) > 0.05
        ):
            yield (
                "targets-not-probabilities",
                f"targets of a sample sum to {call.target_sums[0]:.3g} to {call.target_sums[1]:.3g}",
            )
    if call.name == "nll_loss" and not call.bad and call.log_sum > 0.05:
        yield "logits-to-nll", f"exp(predictions) of a sample sums to exp(±{call.log_sum:.2g}), not to 1"
    if call.name == "binary_cross_entropy_with_logits":
        if call.made_by in MADE_BY_SOFTMAX and call.in_unit:
            yield "sigmoid-before-logits-loss", f"the predictions come from {call.made_by}"
        if call.target_sums is not None:
            yield "target-range", f"targets from {call.target_sums[0]:.3g} to {call.target_sums[1]:.3g}, not in [0, 1]"


def reduction_findings(watch: Watch, losses: Sequence[float], accumulate: int) -> Iterator[Finding]:
    """A loss that is a sum over samples, or a mean of a mean.

    Args:
        watch: What was seen.
        losses: The number on which backward was called, of each batch.
        accumulate: Batches of one optimizer step, by which a step may divide its loss itself.

    Yields:
        The findings.
    """
    calls = [call for call in watch.losses if call.trained]
    if not losses or len(calls) != len(losses):
        return  # Several terms: what belongs to which is not known.
    ratios = [
        loss / call.value
        for loss, call in zip(losses, calls, strict=True)
        if call.value > 0 and math.isfinite(call.value) and math.isfinite(loss)
    ]
    if len(ratios) < len(calls):
        return
    call, ratio = calls[0], ratios[0]
    batch = call.shape[0] if call.shape else 1

    def is_factor(factor: float) -> bool:
        return all(abs(each / factor - 1) < 0.02 for each in ratios)

    if call.terms >= 8 and all(r > 0.5 * c.terms for r, c in zip(ratios, calls, strict=True)):
        seen = (
            f"the loss is {losses[0]:.4g}, the sum over {call.terms:,} elements with a mean of {call.value:.4g}"
            f"{f'; chance gives {call.chance:.4g}' if call.chance else ''}."
        )
        yield finding("loss-reduction", call.name, seen)
    elif batch >= 8 and batch != accumulate and ratio < 0.5 and (is_factor(1 / batch) or is_factor(1 / call.terms)):
        mean = f"the mean {call.value:.4g} of {call.terms:,} elements"
        seen = f"the loss is {losses[0]:.4g}, {mean} divided by {1 / ratio:.0f}."
        yield finding("loss-reduction", call.name, seen)


def start_findings(watch: Watch) -> Iterator[Finding]:
    """A loss far above that of chance."""
    for call in watch.losses:
        if not call.trained or not call.plain or call.chance is None or not math.isfinite(call.value):
            continue
        limit = 1.5 * call.chance + 1.5
        if call.name in (*CLASSIFICATION, *BINARY) and call.value > limit:
            numbers = f"the loss is {call.value:.3g}, chance gives {call.chance:.3g}"
            if call.output_spread > 2.5:
                seen = f"{numbers}: the predictions of a sample spread by {call.output_spread:.3g}."
                yield finding("output-scale", call.module or call.name, seen)
            else:
                yield finding("loss-start", call.module or call.name, f"{call.name}: {numbers}.")
            return
        if call.name in REGRESSION and call.target_from_batch:
            yield from _regression(call)
            return


def _regression(call: LossCall) -> Iterator[Finding]:
    size = math.hypot(call.target_mean, call.target_std)
    if size > LARGEST_TARGET:
        seen = f"{call.name}: targets have mean {call.target_mean:.3g} and standard deviation {call.target_std:.3g}."
        yield finding("target-scale", call.module or call.name, seen)
    elif size > 0 and call.output_rms > 10 * max(size, 1e-6) and call.output_rms > 10:
        seen = f"{call.name}: outputs have an RMS of {call.output_rms:.3g}, targets of {size:.3g}."
        yield finding("output-scale", call.module or call.name, seen)


def target_findings(watch: Watch) -> Iterator[Finding]:
    """Targets that are all the same, or of a few of many classes."""
    by_place: dict[tuple[str, str, int | None], list[LossCall]] = {}
    for call in watch.losses:
        if call.target_from_batch and not call.bad:
            by_place.setdefault((call.module, call.name, call.classes), []).append(call)
    for (module, name, classes), calls in by_place.items():
        count = sum(call.targets for call in calls)
        where = module or name
        if name in REGRESSION:
            first = calls[0]
            same = all(c.target_std == 0 and c.target_mean == first.target_mean for c in calls)
            if same and count >= 16 and max(call.shape[0] if call.shape else 1 for call in calls) > 1:
                yield finding("constant-targets", where, f"all {count:,} targets are {first.target_mean:.4g}.")
            continue
        used: set[int] = set().union(*(call.used for call in calls))
        if not used:
            continue
        least = 64 if name in BINARY else 16
        if len(used) == 1 and count >= least:
            yield finding("constant-targets", where, f"all {count:,} targets are class {next(iter(used))}.")
        elif name in CLASSIFICATION and classes and len(used) < classes / 10 and count >= 20 * classes:
            seen = f"{len(used)} of {classes:,} classes occur in {count:,} targets, the largest is {max(used)}."
            yield finding("unused-classes", where, seen)
