"""Findings about weights and activations by depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_optim.tuning.inspection.findings import Finding, finding
from lightning_optim.tuning.inspection.operations import RECTIFIERS, SIGMOIDAL
from lightning_optim.tuning.inspection.sites import Site
from lightning_optim.tuning.inspection.watch import Watch

LARGEST_GAIN = 4.0
"""rms · √fan above which weights are large, of the smaller fan: He has 1.41, GPT-2's 0.02 in the widest layers 2.6."""
LEAST_GAIN = 0.02
"""The same below which they are small: the narrowest layers of GPT-2's 0.02 have 0.1."""
LARGEST_INPUT = 20.0
MOST_DEAD = 0.7
"""Share of dead units of one layer. By chance alone, a fifth is usual on small data."""
FEWEST_UNITS = 16
"""Units of a layer below which only all of them together are dead."""
MOST_SATURATED = 0.5
LEAST_DEPTH = 5
"""Layers from which on a trend is looked for."""
DECADES = 3.0
"""Powers of ten by which a signal may change over all layers."""
LARGEST_SHARE = 0.99
"""Weight of one key, at the median over queries, above which attention is saturated."""


def input_findings(watch: Watch) -> Iterator[Finding]:
    """Inputs that are not normalised."""
    for name, (site, sums) in watch.entrances.items():
        if sums.rms > LARGEST_INPUT and not any(kind.startswith("norm") for kind in site.followed_by):
            seen = (
                f"its inputs come straight from the batch with an RMS of {sums.rms:.3g} (largest {sums.largest:.3g})."
            )
            yield finding("input-scale", name, seen)
            return


def weight_findings(watch: Watch) -> Iterator[Finding]:
    """Weights that are zero, repeated, too large or too small."""
    sites = [site for site in ordered(watch) if site.weight is not None]
    zero = [s for s in sites if s.weight is not None and s.weight.rms == 0 and s.weight.trainable and s.constant_input]
    if zero:
        every = [s for s in sites if s.weight is not None and s.weight.rms == 0]
        names = [s.weight.name for s in every if s.weight is not None]
        yield finding("zero-weights", names, f"all weights are 0 ({_count(names, 'layer')}), and inputs constant.")
    same = [s.weight for s in sites if s.weight is not None and s.weight.repeated]
    if same:
        seen = f"{same[0].repeated} of {same[0].units} units are exact copies of others ({_count(same, 'layer')})."
        yield finding("identical-units", [weight.name for weight in same], seen)
        return
    tied = [site for site in sites if site.weight is not None and site.weight.name in watch.tied]
    for site in tied:
        assert site.weight is not None
        if site.weight.gain > LARGEST_GAIN and site.last:
            seen = (
                f"the head shares its weight with an embedding, of RMS {site.weight.rms:.2g}, and its outputs have an "
                f"RMS of {site.output.rms:.3g}."
            )
            yield finding("tied-head", site.weight.name, seen)
    large = [s for s in sites if s not in tied and _is_large(s)]
    if large:
        yield _of_gain("large-weights", large)
    small = [s for s in sites if s not in tied and _is_small(s)]
    if small:
        yield _of_gain("small-weights", small)


def _of_gain(kind: str, sites: Sequence[Site]) -> Finding:
    site = sites[0]
    assert site.weight is not None
    activation = next((name.partition(":")[2] for name in site.followed_by if name.startswith("activation")), None)
    usual, method = gain_for(activation)
    return finding(
        kind,
        [s.weight.name for s in sites if s.weight is not None],
        f"RMS {site.weight.rms:.2g}, {site.weight.gain / usual:.2g}x what {method} gives for {_inputs(site)}"
        f"{f' before {activation}' if activation else ''} ({_count(sites, 'layer')}).",
    )


def gain_for(activation: str | None) -> tuple[float, str]:
    """Return the gain for an activation, and who has derived it."""
    if activation in SIGMOIDAL or activation is None:
        return (5 / 3 if activation == "tanh" else 1.0), "Xavier"
    return math.sqrt(2), "He"


def _inputs(site: Site) -> str:
    assert site.weight is not None
    return f"{site.weight.fans.inputs:,.0f} inputs"


def _is_large(site: Site) -> bool:
    weight = site.weight
    if weight is None or not weight.trainable or math.prod(weight.shape) < 16:
        return False
    # He may be with either fan, and Xavier is with both.
    if weight.rms * math.sqrt(min(weight.fans.inputs, weight.fans.outputs)) <= LARGEST_GAIN:
        return False
    normalised = any(kind.startswith("norm") for kind in site.followed_by)
    grew = site.output.rms > LARGEST_GAIN / 2 * site.entered.rms if site.entered.rms > 0 else False
    return grew and not normalised


def _is_small(site: Site) -> bool:
    weight = site.weight
    if weight is None or not weight.trainable or not 0 < weight.gain < LEAST_GAIN or math.prod(weight.shape) < 16:
        return False
    # The end of a residual branch, a head and a gate may start small; and a normalisation makes up for it.
    passed_on = all(kind.startswith(("activation", "linear")) for kind in site.followed_by)
    return passed_on and bool(site.followed_by) and not site.last


def unit_findings(watch: Watch) -> Iterator[Finding]:
    """Dead and saturated units."""
    dead = [s for s in ordered(watch) if _is_dead(s)]
    if dead:
        total = dead[0].dead.numel() if dead[0].dead is not None else 0
        seen = (
            f"{dead[0].dead_share:.0%} of {total} units are flat for each of {dead[0].samples:,} samples "
            f"({_count(dead, 'layer')})."
        )
        yield finding("dead-units", [site.name for site in dead], seen)
    saturated = [
        s for s in ordered(watch) if s.operation in SIGMOIDAL and s.saturated_share > MOST_SATURATED and s.samples >= 8
    ]
    if saturated:
        seen = (
            f"{saturated[0].saturated_share:.0%} of the outputs of {saturated[0].operation} are within 1% of an end "
            f"({_count(saturated, 'layer')})."
        )
        yield finding("saturated-units", [site.name for site in saturated], seen)


def _is_dead(site: Site) -> bool:
    if site.dead is None or site.samples < 32 or site.dead.numel() < 4:
        return False
    # Of a few units, as in a bottleneck that gates channels, most may be flat by chance.
    return site.dead_share == 1 or (site.dead_share > MOST_DEAD and site.dead.numel() >= FEWEST_UNITS)


def score_findings(watch: Watch) -> Iterator[Finding]:
    """Attention whose softmax is saturated."""
    sure = {name: share for name, share in watch.attention.items() if share > LARGEST_SHARE}
    if sure:
        name, share = next(iter(sure.items()))
        floor = math.floor(share * 1000) / 1000
        seen = f"half of the queries give one key a weight of at least {floor:.1%} ({_count(sure, 'layer')})."
        yield finding("attention-logits", [name or "attention", *list(sure)[1:]], seen)


def depth_findings(watch: Watch) -> Iterator[Finding]:
    """Signals and gradients that vanish or explode with depth."""
    hidden = [s for s in ordered(watch) if s.kind in ("linear", "product") and not s.last and s.weight is not None]
    if len(hidden) < LEAST_DEPTH:
        return
    forward, gradients = trend([s.signal for s in hidden]), trend([s.gradient_norm for s in hidden])
    first, last = hidden[0], hidden[-1]
    sigmoids = sum(
        any(kind == f"activation:{name}" for name in SIGMOIDAL for kind in site.followed_by) for site in hidden
    )
    norms = sum(site.kind == "norm" for site in watch.sites.values())
    lacking = f" There is {'no normalisation' if not norms else f'{norms} normalisations'} in {len(hidden)} layers."
    if gradients > DECADES and sigmoids > len(hidden) / 2:
        kind = next((name for name in SIGMOIDAL for site in hidden if f"activation:{name}" in site.followed_by), "")
        yield finding(
            "vanishing-gradients",
            first.name,
            f"its gradient has a norm of {first.gradient_norm:.2g}, that of {last.name} {last.gradient_norm:.2g}; "
            f"{kind} follows {sigmoids} of {len(hidden)} layers.",
        )
    elif forward < -DECADES or forward > DECADES:
        yield finding(
            "vanishing-activations" if forward < 0 else "exploding-activations",
            last.name,
            f"what differs between samples has an RMS of {first.signal:.2g} in {first.name} and {last.signal:.2g} here."
            + lacking,
        )
    elif gradients > DECADES or gradients < -DECADES:
        yield finding(
            "vanishing-gradients" if gradients > 0 else "exploding-gradients",
            first.name,
            f"its gradient has a norm of {first.gradient_norm:.2g}, that of {last.name} {last.gradient_norm:.2g}."
            + lacking,
            advice="Put a normalisation or residual connections between the layers (Ioffe and Szegedy 2015; He et al. "
            "2016), or initialise for the activation (He et al. 2015).",
        )


def trend(values: Sequence[float]) -> float:
    """Return by how many powers of ten values change from first to last, or 0 if there is no steady change.

    Args:
        values: Positive numbers in order; zeros and NaN are left out.

    Example:
        >>> round(trend([1.0, 0.1, 0.01, 0.001, 0.0001]), 6)
        -4.0
    """
    points = [(index, math.log10(value)) for index, value in enumerate(values) if value > 0 and math.isfinite(value)]
    if len(points) < LEAST_DEPTH:
        return 0.0
    x, y = np.array(points).T
    if y.std() == 0:
        return 0.0
    steady = abs(float(np.corrcoef(x, y)[0, 1])) > 0.85
    return float(np.polyfit(x, y, 1)[0]) * (len(values) - 1) if steady else 0.0


def ordered(watch: Watch) -> list[Site]:
    """Return all places in the order of their first execution."""
    return sorted(watch.sites.values(), key=lambda site: site.order)


def _count(things: object, what: str) -> str:
    number = len(things)  # type: ignore[arg-type]
    return f"{number} {what}{'s' if number != 1 else ''}"
