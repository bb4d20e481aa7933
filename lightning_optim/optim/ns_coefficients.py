"""Coefficients of the Newton-Schulz iteration: published ones by name, and those of the user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from lightning_optim.core.suggest import nearest

Triple: TypeAlias = tuple[float, float, float]

COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic a·x + b·x³ + c·x⁵, which Jordan et al. chose so that small singular values grow fast.
Singular values do not converge to 1 but are between about 0.7 and 1.2 after five steps, which works as well."""

_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # Rounding in bfloat16 may move a singular value above 1, from where the steep quintics would diverge.

PRESETS: dict[str, tuple[Triple, ...]] = {
    "keller": (COEFFICIENTS,),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Published coefficients, one triple for each iteration; further iterations repeat the last triple.

- `keller`: Jordan et al., https://kellerjordan.github.io/posts/muon, the default of `torch.optim.Muon`.
- `polar_express`: Amsel et al., The Polar Express, 2025, https://arxiv.org/abs/2505.16932, Algorithm 1, with its safety
  factor of 1.01.
- `you`: Y. Jiacheng's, in https://github.com/KellerJordan/modded-nanogpt and NVIDIA's Emerging-Optimizers (`quintic`).
"""

Coefficients: TypeAlias = str | Sequence[float] | Sequence[Sequence[float]]


def iterations(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """Return the coefficients (a, b, c) of each iteration.

    Args:
        coefficients: Name of a preset, one triple for all iterations, or a list of triples whose last one is repeated.
        steps: Number of iterations. A preset with more triples is cut off.

    Returns:
        ``steps`` triples.

    Raises:
        ValueError: ``coefficients`` are none of these, or a list has more than ``steps`` triples.

    Example:
        >>> [round(a, 2) for a, _, _ in iterations("you", 6)]
        [4.08, 3.95, 3.74, 2.88, 2.84, 2.84]
    """
    try:
        try:
            return _iterations(coefficients, steps)
        except TypeError:  # A list cannot be a key of the cache.
            return _iterations(_frozen(coefficients), steps)
    except ValueError as error:
        text = repr(coefficients)
        shown = text if len(text) < 120 else f"{text[:117]}..."
        raise ValueError(f"Invalid ns_coefficients={shown}: must be {error}") from None


def _frozen(value: Any) -> Any:
    """Return ``value`` as a key of the cache; None stands for what is never valid."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


@lru_cache
def _iterations(coefficients: Any, steps: int) -> tuple[Triple, ...]:
    names = ", ".join(map(repr, PRESETS))
    needed = f"{names}, three finite numbers (a, b, c), or a list of such triples, one per iteration."
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(f"{needed} {nearest(coefficients, PRESETS)}")
        triples = PRESETS[coefficients][:steps]
    elif isinstance(coefficients, tuple) and coefficients and all(isinstance(entry, tuple) for entry in coefficients):
        triples = coefficients
        if len(triples) > steps:
            raise ValueError(f"at most ns_steps={steps} triples, one per iteration, not {len(triples)}.")
    else:
        triples = (coefficients,)
    for triple in triples:
        if not isinstance(triple, tuple) or len(triple) != 3 or not all(map(_is_finite, triple)):
            raise ValueError(needed)
    triples = tuple((float(a), float(b), float(c)) for a, b, c in triples)
    return triples + triples[-1:] * (steps - len(triples))


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
