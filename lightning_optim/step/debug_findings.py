"""What a step under observation shows, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_optim.step.debug_reasons import RunFacts
from lightning_optim.step.debug_rows import TensorStep

LARGE = 0.3
"""Change of a tensor, as a share of its norm, above which training hardly keeps what it has learned. Usual are about
1e-3; trust ratios and matrices under Muon have up to 0.1."""
NOISE = 1e-6
"""Norm of a gradient, as a share of the largest, that is rounding noise in float32."""
MOSTLY = 0.9
"""Share of weight decay in a change from which on the gradient hardly counts."""
SMALL = 1e-7
"""Share below which a float32 weight is hardly changed at all; its resolution is 6e-8."""


@dataclass(frozen=True)
class StepFinding:
    """Something that stands against training.

    Args:
        kind: Its kind, such as `no-gradient`.
        seen: What was seen, as a sentence.
        advice: What to do about it.
    """

    kind: str
    seen: str
    advice: str


def findings_of(
    rows: Sequence[TensorStep],
    facts: RunFacts,
    optimizer: Optimizer,
    model: nn.Module | None,
    others: Sequence[Optimizer],
) -> Iterator[StepFinding]:
    """Yield what stands against training, the most fundamental first.

    Args:
        rows: What the step did to each tensor.
        facts: What it showed as a whole.
        optimizer: The optimizer.
        model: The model, if it is known.
        others: Its other optimizers.
    """
    yield from _of_parameters(optimizer, model, others)
    if facts.has_closure and not facts.calls:
        yield StepFinding(
            "closure-not-called",
            "The optimizer did not call the closure, so no gradient was computed.",
            "Call it in step(): `with torch.enable_grad(): loss = closure()`, and return the loss.",
        )
        return
    yield from _of_gradients(rows, facts)
    yield from _of_skips(rows)
    yield from _of_changes(rows, optimizer)
    if facts.wrote_gradients:
        yield StepFinding(
            "gradient-changed",
            f"The step wrote into the gradients of {_some(facts.wrote_gradients)}.",
            "Work on a copy: gradients are read again by accumulation, clipping and monitors.",
        )
    if facts.moved_storages:
        yield StepFinding(
            "storage-replaced",
            f"The weights of {_some(facts.moved_storages)} are in another storage than before the step.",
            "Update in place (`param.add_`, `param.copy_`): tied weights, views, EMA and CUDA graphs hold the old one.",
        )


def _of_parameters(optimizer: Optimizer, model: nn.Module | None, others: Sequence[Optimizer]) -> Iterator[StepFinding]:
    here = _ids(optimizer)
    for other in others:
        if other is not optimizer and (shared := here & _ids(other)):
            yield StepFinding(
                "in-two-optimizers",
                f"{len(shared)} of its {len(here)} tensors are also in the other {type(other).__name__}.",
                "Give each parameter to one optimizer: both would move it, each with a state of its own.",
            )
    if model is None:
        return
    named = dict(model.named_parameters())
    inside = {id(param) for param in named.values()}
    if not here & inside:
        yield StepFinding(
            "another-model",
            f"None of its {len(here)} tensors is a parameter of this model.",
            "Make the optimizer from this model's parameters(), after the model is complete and on its device.",
        )
        return
    orphans = len(here - inside)
    everywhere = here.union(*map(_ids, others))
    missing = [name for name, param in named.items() if param.requires_grad and id(param) not in everywhere]
    if missing and orphans:
        yield StepFinding(
            "replaced",
            f"{_some(missing)} of the model {_are(missing)} in no optimizer, and this one has {orphans} "
            f"tensor{'s' * (orphans != 1)} that are not in the model: parameters were replaced after it was made.",
            "Make the optimizer after the model is complete (a new head, to_empty, parametrizations, conversion).",
        )
    elif missing:
        yield StepFinding(
            "in-no-optimizer",
            f"{_some(missing)} of the model {_are(missing)} in no optimizer, and will not be trained.",
            "Add them with add_param_group, give further optimizers as `others`, or set requires_grad to False.",
        )


def _of_gradients(rows: Sequence[TensorStep], facts: RunFacts) -> Iterator[StepFinding]:
    wanted = [row for row in rows if row.skipped not in ("requires_grad is False", "it has no elements")]
    none = [row.name for row in wanted if row.grad == "none"]
    if not wanted:
        yield StepFinding(
            "nothing-trainable",
            "No tensor of the optimizer requires a gradient.",
            "Set requires_grad to True for what is to be trained.",
        )
    elif len(none) == len(wanted):
        yield StepFinding(
            "no-gradient",
            "No tensor has a gradient.",
            "Call backward() before the step, and zero_grad() only after it; see that the loss depends on these "
            "parameters (no detach(), item(), no_grad()).",
        )
    elif none:
        yield StepFinding(
            "some-without-gradient",
            f"{_some(none)} {_have(none)} no gradient.",
            "The loss does not depend on them at this step; that may be meant (unused branches, other heads).",
        )
    if bad := [row.name for row in rows if row.grad == "not finite"]:
        after = "The step was skipped." if facts.nothing_changed else "The step used them."
        yield StepFinding(
            "gradient-not-finite",
            f"The gradients of {_some(bad)} are not finite. {after}",
            "Look for the first NaN with lo.inspect_model or torch.autograd.set_detect_anomaly; skip such steps with "
            "lo.DivergenceGuard; with float16 use a GradScaler.",
        )
    if zero := [row.name for row in wanted if row.grad == "zero"]:
        kind = "zero-gradient" if len(zero) == len(wanted) else "some-zero-gradients"
        yield StepFinding(
            kind,
            f"The gradients of {_some(zero)} are exactly zero.",
            "Dead or saturated units, a loss that is multiplied by 0, or gradients that were zeroed before the step.",
        )
    if facts.not_finite_after:
        yield StepFinding(
            "weights-not-finite",
            f"After the step {_some(facts.not_finite_after)} {_have(facts.not_finite_after)} weights that are not "
            "finite.",
            "See gradients above; else a division by 0 (eps), or a learning rate that is far too large.",
        )


def _of_skips(rows: Sequence[TensorStep]) -> Iterator[StepFinding]:
    advice = {
        "lr is 0": "A schedule starts at 0 or has ended, or a group was given lr=0.",
        "its group is frozen: lr is 0": "It is trained from its frozen_until on.",
        "found_inf is set: the step was skipped": "The scaler lowers its scale; a few at the start are usual.",
    }
    other = "Compare step() with the guide 'Write your own optimizer', or run `lightning-optim check` on the class."
    explained = ("no gradient", "the gradient is zero", "requires_grad is False", "it has no elements")
    rows = _above_noise(rows)
    reasons = dict.fromkeys(row.skipped for row in rows if row.skipped is not None)
    for reason in reasons:
        names = [row.name for row in rows if row.skipped == reason]
        if reason in explained or reason.startswith("a gradient is not finite"):
            continue
        kind = "lr-zero" if "lr is 0" in reason else "found-inf" if reason.startswith("found_inf") else "not-moved"
        text = advice.get(reason, other)
        if "resolution" in reason:
            kind = "below-resolution"
            text = "Raise lr; keep float32 weights, or use kahan_sum or stochastic_rounding of lightning_optim.optim."
        yield StepFinding(kind, f"{_some(names)} did not move: {reason}.", text)


def _of_changes(rows: Sequence[TensorStep], optimizer: Optimizer) -> Iterator[StepFinding]:
    moved = [row for row in rows if row.skipped is None and math.isfinite(row.update_norm)]
    judged = [row for row in moved if math.isfinite(row.against_grad)]
    # Momentum and decay may turn single tensors; the step as a whole must go down.
    slope = sum(row.against_grad * row.update_norm * row.grad_norm for row in judged)
    maximize = any(group.get("maximize") for group in optimizer.param_groups)
    if judged and (slope < 0) != maximize and slope != 0:
        yield StepFinding(
            "wrong-direction",
            f"The step goes {'down' if maximize else 'up'} the gradient"
            f"{', although maximize is True' if maximize else ''}: cosine {_total_cosine(judged, slope):.2f}.",
            "Look at the sign of the update, and at a momentum of gradients from elsewhere; after some steps momentum "
            "alone can do this for a while.",
        )
    if large := [row for row in moved if row.ratio > LARGE and len(row.shape) > 1]:  # biases begin at 0
        worst = max(large, key=lambda row: row.ratio)
        yield StepFinding(
            "update-too-large",
            f"The change of {_some([row.name for row in large])} is up to {worst.ratio:.2g} times the weights.",
            f"Lower lr (here {worst.lr:.2g}), clip the gradients, warm up; look at eps and at bias correction.",
        )
    weighty = [row for row in moved if row.weight_norm]
    if weighty and all(row.ratio < SMALL for row in weighty):
        best = max(weighty, key=lambda row: row.ratio)
        yield StepFinding(
            "update-too-small",
            f"No tensor changed by more than {best.ratio:.1g} of its weights.",
            f"Raise lr (here {best.lr:.2g}); look at a warmup at its start, at gradient scales and at eps.",
        )
    shares = [row for row in _above_noise(moved) if row.decay_share is not None and row.grad == "fine"]
    decayed = [row for row in shares if (row.decay_share or 0.0) > MOSTLY]
    if decayed:
        yield StepFinding(
            "mostly-decay",
            f"More than 90% of the change of {_some([row.name for row in decayed])} is weight decay.",
            "Lower weight_decay, or see whether its kind is scaled by lr as you expect (`weight_decay_kind`).",
        )


def _above_noise(rows: Sequence[TensorStep]) -> list[TensorStep]:
    """Return the rows without those whose gradient is rounding noise, as that of a bias before a normalisation."""
    steepest = max((row.grad_norm for row in rows if math.isfinite(row.grad_norm)), default=0.0)
    return [row for row in rows if not row.grad_norm < NOISE * steepest]


def _total_cosine(rows: Sequence[TensorStep], slope: float) -> float:
    size = math.sqrt(sum(row.update_norm**2 for row in rows) * sum(row.grad_norm**2 for row in rows))
    return slope / size if size else 0.0


def _ids(optimizer: Any) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"
