"""The table of the kinds of alarm: what each means, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class AlarmKind:
    """One kind of alarm.

    Args:
        name: Name in reports and logs.
        advice: What to change, one or two sentences.
        skip_suffices: Whether skipping the step undoes the problem completely.
        escalates: Whether skipping the step is not enough, so that the guard has to respond.
        lost: Whether the weights have become worse, so that a lower learning rate alone is not enough either.
        reliability: For a hint that misses more than it finds: how much it found, and how often it was wrong, in the
            calibration (`python -m tests.benchmarks.calibration`). It is part of the alarm's text.
    """

    name: str
    advice: str
    skip_suffices: bool = False
    escalates: bool = False
    lost: bool = False
    reliability: str = ""


@dataclass(frozen=True)
class Alarm:
    """One alarm about one step.

    Args:
        kind: Name of an `AlarmKind`.
        step: Number of optimizer steps so far, that one included.
        text: One sentence.
        names: Parameters or groups concerned, the worst first.
        escalates: Whether skipping the step is not enough.
        lost: Whether the weights have become worse, so that a lower learning rate alone is not enough either.
        most: Whether it concerns most of the network, which was healthy before.
        is_repeated: Whether the like has been reported before, so that it is not reported again.
    """

    kind: str
    step: int
    text: str
    names: tuple[str, ...] = ()
    escalates: bool = False
    lost: bool = False
    most: bool = False
    is_repeated: bool = False

    @property
    def skip_suffices(self) -> bool:
        """Whether skipping the step undoes the problem completely."""
        return ALARM_KINDS[self.kind].skip_suffices


_KINDS = (
    AlarmKind(
        "nonfinite",
        "Look at the batches listed: a NaN in the data, a logarithm or division of 0, an overflow "
        "in 16 bits. `GradientClipping: {max_norm: 1.0}` does not help against NaN; `precision: "
        "bf16-mixed` helps against overflow.",
        skip_suffices=True,
    ),
    AlarmKind(
        "spike",
        "`GradientClipping: {method: zclip}` or `{max_norm: ...}` at about the usual gradient "
        "norm clips such steps instead of skipping them; if there are many, a longer `warmup` or "
        "AdamW's `betas: [0.9, 0.95]`.",
        skip_suffices=True,
    ),
    AlarmKind(
        "early_warning",
        "The next updates are larger than the learning rate says. If the loss rises after it: a lower `lr`, a longer "
        "`warmup`, AdamW's `betas: [0.9, 0.95]`, or `StableAdamW`; if it does not, nothing.",
        skip_suffices=True,
    ),
    AlarmKind(
        "new_level",
        "Check whether the data, the loss or the trained parameters have changed. If steps of a "
        "healthy run were skipped, `DivergenceGuard: {spikes: {threshold: 12}}`.",
    ),
    AlarmKind(
        "jump",
        "The weights have left the good region: a lower `lr`, a longer `warmup`, clipping.",
        escalates=True,
        lost=True,
    ),
    AlarmKind(
        "slow_divergence",
        "A lower peak `lr`, or a schedule that falls earlier.",
        escalates=True,
    ),
    AlarmKind(
        "loss_scale_collapse",
        "`precision: bf16-mixed` in place of `16-mixed`, or a loss without very large intermediate values.",
        escalates=True,
    ),
    AlarmKind(
        "vanishing",
        "Another activation, normalisation or residual connections before the parameters named; a "
        "larger `lr_multiplier` for their group.",
    ),
    AlarmKind(
        "exploding",
        "`GradientClipping`, per group or `{method: agc}`; normalisation in the layers named.",
        reliability="found in 1 of 33 runs at too high a rate, and in 0 of 61 good ones",
    ),
    AlarmKind(
        "dead",
        "Units that never fire get no gradient: a lower `lr`, another initialisation or activation.",
    ),
    AlarmKind(
        "collapsed",
        "A lower `lr`, a longer `warmup`; normalisation, or an activation with a gradient everywhere.",
        escalates=True,
        lost=True,
    ),
    AlarmKind(
        "stalled",
        "A smaller `eps`, or a larger `lr_multiplier` for the group: its updates are too small to matter.",
    ),
    AlarmKind(
        "rounded_away",
        "`kahan_sum: true`, or `stochastic_rounding: true` for bfloat16, of this package's optimizers; or `precision: "
        "bf16-mixed`, which keeps the weights in float32. A higher `lr` also makes updates that survive rounding.",
    ),
    AlarmKind(
        "no_gradient",
        "Unfreeze the parameters named (`requires_grad_`), use them in the loss, or leave them out of the optimizer; "
        "nothing, if they are to be unfrozen or used later.",
    ),
    AlarmKind(
        "lr_too_high",
        "A lower `lr`. This is a hint: see how often it was right before you act on it.",
        reliability="found in 5 of 33 runs at too high a rate, and in 0 of 61 good ones",
    ),
    AlarmKind(
        "lr_too_low",
        "A higher `lr`. This is a hint: see how often it was right before you act on it.",
        reliability="found in 13 of 41 runs at too low a rate, and in 1 of 61 good ones",
    ),
    AlarmKind(
        "always_clipped",
        "A `max_norm` above the usual gradient norm, so that clipping acts on exceptions; if every step is to be "
        "scaled down, a lower `lr` does that openly.",
    ),
    AlarmKind(
        "detected",
        "A detector of your own requested the skip of the step; its `reason` says why.",
        skip_suffices=True,
    ),
)

ALARM_KINDS: Mapping[str, AlarmKind] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""All kinds by name. A user's own detectors raise ``detected``."""


def alarm(
    kind: str,
    step: int,
    text: str,
    names: tuple[str, ...] = (),
    *,
    escalates: bool | None = None,
    lost: bool | None = None,
    most: bool = False,
    is_repeated: bool = False,
) -> Alarm:
    """Create an `Alarm` of a kind of the table.

    Args:
        kind: Name of the kind.
        step: Number of optimizer steps so far, that one included.
        text: One sentence.
        names: Parameters or groups concerned, the worst first.
        escalates: Whether skipping the step is not enough; None for the value in the table.
        lost: Whether the weights have become worse; None for the value in the table.
        most: Whether it concerns most of the network.
        is_repeated: Whether the like has been reported before.

    Returns:
        The alarm.

    Raises:
        KeyError: There is no such kind.

    Example:
        >>> alarm("jump", 3, "the loss stays three times as high").escalates
        True
    """
    table = ALARM_KINDS[kind]
    if table.reliability:
        text = f"{text} (a hint: in its calibration {table.reliability})"
    return Alarm(
        kind,
        step,
        text,
        names,
        escalates=table.escalates if escalates is None else escalates,
        lost=table.lost if lost is None else lost,
        most=most,
        is_repeated=is_repeated,
    )
