"""A look at a model before it is trained: some batches forward and backward, without an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.tuning.inspection.findings import Finding, finding
from lightning_optim.tuning.inspection.gradient_rules import finite_findings, gradient_findings, unregistered_findings
from lightning_optim.tuning.inspection.inspection import Inspection, LossValue, Row
from lightning_optim.tuning.inspection.loss_rules import (
    argument_findings,
    reduction_findings,
    start_findings,
    target_findings,
)
from lightning_optim.tuning.inspection.plain_steps import PlainSteps
from lightning_optim.tuning.inspection.signal_rules import (
    depth_findings,
    input_findings,
    ordered,
    score_findings,
    unit_findings,
    weight_findings,
)
from lightning_optim.tuning.inspection.units import tensors_in
from lightning_optim.tuning.inspection.watch import StoppedError, Watch
from lightning_optim.tuning.trials.objects import ObjectSnapshot

_NOW: set[int] = set()
"""Models that are being looked at, so that a hook which asks for a look gets an empty one within it."""


def inspect_model(
    model: nn.Module,
    data: Any = None,
    trainer: Any = None,
    *,
    batches: int = 3,
    loss: Callable[[Any, Any], Tensor] | None = None,
    step: Callable[[Any, Any], Tensor] | None = None,
) -> Inspection:
    """Look at a model before training: some batches forward and backward, without an update.

    Nothing is changed: parameters, buffers such as running means, gradients, random numbers, the position of loaders
    and the Trainer are what they were. So it may be called anywhere, also in ``on_train_start`` of a fit.

    Args:
        model: A LightningModule, of which ``training_step`` is run, with or without an optimizer; or any other module,
            with `loss` or `step`.
        data: Batches. For a LightningModule what ``Trainer.fit`` takes: loaders, or a LightningDataModule; None for
            those of the module, or of the fit that runs. For another module a DataLoader or list, of
            ``(inputs, targets)`` with `loss`.
        trainer: The Trainer, for device, precision and limits; None for that of the fit that runs, or a new one. Its
            callbacks and loggers get nothing.
        batches: Number of batches, at least 1.
        loss: Function of outputs and targets that returns one number; not for a LightningModule.
        step: Function of model and batch that returns the loss as one number, in place of `loss`, and of
            ``training_step``.

    Returns:
        What was seen: rows by depth, findings, losses. If torch refuses the step for a reason that a finding names,
        such as targets out of range, the inspection has it, with `Inspection.error`.

    Raises:
        ValueError: An argument is invalid, or there is no batch.
        TypeError: The data are an iterator, whose batches would be missing in training.
        Exception: The step raises something that no finding explains.

    Example:
        >>> import lightning_optim as lo
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(1))
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> lo.inspect_model(model, [batch], loss=nn.functional.cross_entropy).kinds
        ['softmax-before-cross-entropy']
    """
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"Invalid batches={batches!r}: must be a whole number of at least 1.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model={model!r:.60}: must be a torch.nn.Module.")
    if id(model) in _NOW:
        return Inspection()
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"Invalid model: {lazy} has no shape yet. Run one batch through its lazy modules first.")
    steps = _steps(model, data, trainer, loss, step)
    watch: Watch | None = None
    taken: list[list[float]] = []
    error: Exception | None = None
    samples = 0
    _NOW.add(id(model))
    try:
        with ObjectSnapshot(model, *steps.roots(), leave=steps.left()):
            steps.start()
            watch = Watch(model)
            with watch.hooked(), torch.enable_grad():
                try:
                    for index, batch in enumerate(steps.batches(batches)):
                        samples = samples or _size(batch)
                        watch.scale = steps.scale
                        with watch.step(batch):
                            steps.run(batch, index)
                        taken.append(watch.backwards)
                except Exception as raised:
                    if isinstance(raised, TypeError | ValueError) and not watch.sites:
                        raise
                    error = raised
            found = _findings(watch, taken, getattr(trainer, "accumulate_grad_batches", 1), error)
            if error is not None and (not found or not _explains(error, found, watch)):
                raise error
            if not taken and error is None:
                raise ValueError("Invalid data: must have at least one batch, has none.")
            return _result(watch, taken, found, samples, error)
    finally:
        _NOW.discard(id(model))


def _steps(model: nn.Module, data: Any, trainer: Any, loss: Any, step: Any) -> Any:
    from lightning.pytorch import LightningModule

    if isinstance(model, LightningModule) and step is None:
        from lightning_optim.tuning.inspection.lightning_steps import LightningSteps

        if loss is not None:
            raise ValueError("Invalid loss for a LightningModule: its training_step computes the loss. Leave it out.")
        return LightningSteps(model, data, trainer)
    if data is None:
        raise ValueError("Invalid data=None: must be batches, a list or a DataLoader, for a plain module.")
    if loss is not None and step is not None:
        raise ValueError("Invalid step: must not be given with loss; a step computes the loss itself.")
    return PlainSteps(model, data, loss, step)


def _size(batch: Any) -> int:
    return next((len(tensor) for _, tensor in tensors_in(batch) if tensor.ndim), 0)


def _explains(error: Exception, found: list[Finding], watch: Watch) -> bool:
    """Whether a finding says why a step has raised."""
    if isinstance(error, StoppedError):
        return True
    kinds = {each.kind for each in found}
    return "does not require grad" in str(error) and bool(kinds & {"nothing-trainable", "no-gradient"})


_EFFECTS: dict[str, set[str]] = {}
"""What each kind brings about, and what is therefore not reported with it."""


def _effects(causes: str, effects: str) -> None:
    for cause in causes.split():
        _EFFECTS.setdefault(cause, set()).update(effects.split())


_LOSS = "loss-start output-scale"
_SIGNAL = (
    "vanishing-activations exploding-activations vanishing-gradients exploding-gradients dead-units saturated-units"
)
_effects(
    "non-finite-input non-finite-activation",
    f"{_LOSS} {_SIGNAL} attention-logits no-gradient unused-parameters input-scale",
)
_effects("zero-weights identical-units", f"{_LOSS} {_SIGNAL} no-gradient small-weights")
_effects("large-weights input-scale", f"{_LOSS} {_SIGNAL} attention-logits")
_effects("input-scale", "large-weights")
_effects("small-weights", _SIGNAL)
_effects("tied-head", _LOSS)
_effects("dead-units", "vanishing-activations vanishing-gradients")
_effects("exploding-activations", f"{_LOSS} attention-logits saturated-units dead-units")
_effects("loss-reduction target-scale", _LOSS)
_effects(
    "shape-mismatch softmax-before-cross-entropy logits-to-nll logits-to-bce target-range sigmoid-before-logits-loss "
    "targets-not-probabilities",
    f"{_LOSS} loss-reduction",
)
_effects("nothing-trainable", "no-gradient unused-parameters frozen-in-the-middle")


def _findings(watch: Watch, taken: list[list[float]], accumulate: int, error: Exception | None) -> list[Finding]:
    losses = [value for values in taken for value in values]
    bad = any(not math.isfinite(value) for value in losses)

    def every() -> Iterator[Finding]:
        for kind, where, seen in watch.problems:
            yield finding(kind, where, f"{seen}.")
        yield from argument_findings(watch)
        yield from finite_findings(watch, bad)
        yield from input_findings(watch)
        yield from unregistered_findings(watch)
        yield from weight_findings(watch)
        yield from unit_findings(watch)
        yield from score_findings(watch)
        if error is None or "does not require grad" in str(error):
            yield from depth_findings(watch)
            yield from gradient_findings(watch)
        yield from reduction_findings(watch, losses, accumulate)
        yield from start_findings(watch)
        yield from target_findings(watch)
        yield from _biases(watch)

    found: dict[str, Finding] = {}
    for each in every():
        found.setdefault(each.kind, each)
    hidden = {effect for kind in found for effect in _EFFECTS.get(kind, ())}
    kept = [each for kind, each in found.items() if kind not in hidden]
    return sorted(kept, key=lambda each: each.level == "note")


def _biases(watch: Watch) -> Iterator[Finding]:
    """Biases that the next normalisation takes away."""
    cancelled = [
        site
        for site in ordered(watch)
        if site.bias is not None and site.cancelled_by is not None and len(site.followed_by) == 1
    ]
    if cancelled:
        first = cancelled[0]
        names = [site.bias for site in cancelled if site.bias is not None]
        seen = f"{first.cancelled_by} comes right after it ({len(names)} layer{'s' if len(names) > 1 else ''})."
        yield finding("bias-before-norm", names, seen, "note")


def _result(
    watch: Watch, taken: list[list[float]], found: list[Finding], samples: int, error: Exception | None
) -> Inspection:
    seen = watch.parameters.values()
    return Inspection(
        rows=[_row(watch, site) for site in ordered(watch)],
        findings=found,
        losses=_losses(watch, taken),
        batches=len(taken),
        samples=samples,
        parameters=sum(each.numel for each in seen),
        trainable=sum(each.numel for each in seen if each.requires_grad),
        error=None if error is None else " ".join(str(error).split()),
    )


def _row(watch: Watch, site: Any) -> Row:
    owned = [
        each.gradient
        for name, each in watch.parameters.items()
        if name.rpartition(".")[0] == site.module and each.gradient.count
    ]
    count, squares = sum(each.count for each in owned), sum(each.squares for each in owned)
    return Row(
        name=site.name,
        operation=site.operation,
        shape=site.shape,
        rms=site.output.rms if not site.output.bad else math.nan,
        zeros=site.output.zero_share,
        signal=site.signal,
        dead=site.dead_share,
        saturated=site.saturated_share,
        gradient_rms=site.gradient.rms,
        weight_gain=None if site.weight is None else site.weight.gain,
        weight_gradient_rms=math.sqrt(squares / count) if count and site.kind != "activation" else None,
    )


def _losses(watch: Watch, taken: list[list[float]]) -> list[LossValue]:
    by_name: dict[tuple[str, str], list[Any]] = {}
    for call in watch.losses:
        if call.trained and not math.isnan(call.value):
            by_name.setdefault((call.name, call.module), []).append(call)
    found = []
    for (name, _), calls in by_name.items():
        chances = [call.chance for call in calls if call.chance is not None and call.plain]
        chance = sum(chances) / len(chances) if chances else None
        found.append(LossValue(name, sum(call.value for call in calls) / len(calls), chance))
    values = [value for each in taken for value in each]
    if not found and values:
        found.append(LossValue("loss", sum(values) / len(values), None))
    return found
