"""Averages of the weights over the steps: what `ema` of a group means, and the arithmetic of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_optim.kernels.rules import Scalar, minimum

STEP = "ema_step"
"""Name of the 0-d state that counts the steps in the averages of a parameter. It is a checkpoint key."""

POWER = "power"
WIDEST = math.sqrt(1 / 12)
"""Relative width of the uniform average over all steps, the largest one."""

Ema = float | str | Sequence[float | str] | None
"""The option `ema`: one average or several, each a decay or the text `power <width>`."""


def state_names(count: int) -> tuple[str, ...]:
    """Return the names of the averages of a parameter, which are checkpoint keys."""
    return tuple(f"ema_{number}" for number in range(count))


def weight_names(count: int) -> tuple[str, ...]:
    """Return the names of the scalars of a step: the weight of the new parameters in each average."""
    return tuple(f"{name}_weight" for name in state_names(count))


def names_of(count: int) -> tuple[tuple[str, str], ...]:
    """Return the names of each average and of its weight."""
    return tuple(zip(state_names(count), weight_names(count), strict=True))


def parse(ema: Any) -> tuple[float | str, ...] | None:
    """Return the averages of a group in the form that groups and checkpoints hold: numbers and texts.

    Args:
        ema: A value of the option `ema`.

    Returns:
        One entry per average; None if there are none.

    Raises:
        ValueError: The value is not one that the option takes.

    Example:
        >>> parse([0.999, "power 0.05"])
        (0.999, 'power 0.05')
    """
    if ema is None or (isinstance(ema, list | tuple) and not ema):
        return None
    return tuple(_entry(entry, ema) for entry in (ema if isinstance(ema, list | tuple) else (ema,)))


def kept_by(group: Mapping[str, Any]) -> tuple[float | str, ...]:
    """Return the averages that a group keeps, of which there may be none; see `parse`.

    The value may have been set by hand since the last step, so it is not read from the group directly.
    """
    return parse(group.get("ema")) or ()


def _entry(entry: Any, ema: Any) -> float | str:
    words = entry.split() if isinstance(entry, str) else []
    try:
        value = float(words[-1] if words else entry)
    except (TypeError, ValueError):
        raise _refused(ema) from None
    if isinstance(entry, bool) or not (len(words) < 2 or (len(words) == 2 and words[0] == POWER)):
        raise _refused(ema)
    if len(words) == 2:
        if not 0 < value <= WIDEST + 1e-3:
            raise ValueError(
                f"Invalid ema={ema!r}: the relative width of a power-function average must be above 0 and at most "
                "0.2887; 0.05 and 0.1 are usual and 0.2887 is the mean of all steps."
            )
        return f"{POWER} {words[1]}"
    if not 0 < value < 1:
        raise _refused(ema)
    return value


def _refused(ema: Any) -> ValueError:
    return ValueError(
        f"Invalid ema={ema!r}: must be a decay between 0 and 1 such as 0.999, a power-function "
        "average such as 'power 0.05', a list of these for several averages, or None."
    )


@lru_cache(maxsize=256)
def exponent(width: float) -> float:
    """Return γ of the power-function average whose relative width is ``width``.

    Its weights rise as stepᵞ, and σ² = (γ + 1) / ((γ + 2)²·(γ + 3)), of which the largest solution is taken (Karras et
    al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024, https://arxiv.org/abs/2312.02696,
    equation 127).

    Example:
        >>> round(exponent(0.05), 2), round(exponent(0.1), 2)
        (16.97, 6.94)
    """
    t = width**-2
    return max(float(np.roots([1, 7, 16 - t, 12 - t]).real.max()), 0.0)


def scalars(ema: Sequence[float | str], step: Scalar) -> dict[str, Scalar]:
    """Compute the weight of the new parameters in each average, 1 − β, and the step count.

    Args:
        ema: The averages, as `parse` returns them.
        step: Number of the step, from 1; a float, a tensor, or recorded.

    Returns:
        The scalars of `weight_names`, and `STEP`.
    """
    found = {STEP: step}
    for name, entry in zip(weight_names(len(ema)), ema, strict=True):
        if isinstance(entry, str):
            found[name] = 1 - (1 - 1 / step) ** (1 + exponent(float(entry.split()[1])))
        else:
            found[name] = 1 - minimum(entry, (1 + step) / (10 + step))
    return found


def moved(average: Any, param: Any, weight: Any) -> Any:
    """Return one element of an average after a step, given the parameter as it is stored."""
    return average + weight * (param - average)
