"""The learning rate, and what goes with it, when the batch size changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.optim.base import OPTIMIZERS

GOYAL = "Goyal et al., 2017, https://arxiv.org/abs/1706.02677"
MALLADI = "Malladi et al., 2022, https://arxiv.org/abs/2205.10287"
WANG = "Wang and Aitchison, 2024, https://arxiv.org/abs/2405.13698"
LARS = "You et al., 2017, https://arxiv.org/abs/1708.03888"
LAMB = "You et al., 2020, https://arxiv.org/abs/1904.00962"

_LINEAR = {"sgd": GOYAL, "schedulefreesgd": GOYAL, "lars": LARS}
"""Optimizers whose step is proportional to the gradient, or is published with this rule."""
_SQUARE_ROOT = {
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "radam", "rmsprop", "adamax"), MALLADI),
    "lamb": LAMB,
}
_UNCHANGED = {
    "prodigy": "it estimates the size of its steps itself",
    "adagrad": "its sum of squared gradients shrinks with the square of the number of steps by which it is divided",
}
_COUPLED = {"sgd", "adam", "rmsprop", "adagrad", "adamax", "radam", "nadam"}
"""Optimizers whose weight decay is, by default, a part of the gradient (`weight_decay_kind` "l2")."""
_HALF_LIVES = ("betas", "alpha", "beta2")
"""Hyperparameters that are decay rates of averages of gradients or of their squares."""


@dataclass(frozen=True)
class ScaledRate:
    """Hyperparameters for another batch size.

    Args:
        lr: The learning rate.
        rule: "linear", "square root" or "unchanged".
        source: Where the rule is published; None if no rule is published for the optimizer.
        others: Further hyperparameters that change, by name, as the optimizer takes them.
        notes: What to know about them, as sentences.
    """

    lr: float
    rule: str
    source: str | None
    others: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def scale_lr(
    lr: float,
    batch: int,
    new_batch: int,
    optimizer: str | type,
    hyperparameters: Mapping[str, Any] | None = None,
) -> ScaledRate:
    """Return the learning rate for another batch size, with the rule and its source.

    The rules hold while gradients are dominated by noise, which is far below the gradient noise scale. Let ``k`` be
    ``new_batch / batch``. A step of SGD is proportional to the gradient, so ``k`` steps of the small batch are one step
    at ``k`` times the rate (Goyal et al., 2017). A step of Adam has a size of its own, in which the noise, that shrinks
    by the root of ``k``, is divided out: the rate grows by that root (Malladi et al., 2022; Krizhevsky, 2014, and
    Hoffer et al., 2017, proposed the root for SGD).

    Averages of Adam and its relatives keep their length in samples: ``1 - beta`` is multiplied by ``k`` and ``eps``
    divided by its root (Malladi et al., 2022). So does decoupled weight decay, whose length is that of
    ``1 / (lr * weight_decay)`` steps (Wang and Aitchison, 2024). The momentum of SGD stays, as Goyal et al. keep it.

    Args:
        lr: The present learning rate.
        batch: Present number of samples of an optimizer step: batch size x accumulated batches x devices.
        new_batch: Another such number.
        optimizer: Name or class of the optimizer; one that is not known counts as an Adam-like one, without a source.
        hyperparameters: Those that are in use: ``betas``, ``alpha``, ``eps``, ``weight_decay``. Only what is given is
            scaled.

    Returns:
        The rate, the rule and what else changes.

    Raises:
        ValueError: A batch size is below 1, or the rate is not above 0.

    References:
        Goyal et al., Accurate, Large Minibatch SGD, 2017, https://arxiv.org/abs/1706.02677;
        Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022,
        https://arxiv.org/abs/2205.10287;
        Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014,
        https://arxiv.org/abs/1404.5997;
        Hoffer et al., Train longer, generalize better, 2017, https://arxiv.org/abs/1705.08741;
        Wang and Aitchison, How to set AdamW's weight decay as you scale model and dataset size, 2024,
        https://arxiv.org/abs/2405.13698.

    Example:
        >>> scale_lr(0.1, 256, 1024, "sgd").lr
        0.4
        >>> scaled = scale_lr(1e-3, 64, 256, "adamw", {"betas": (0.9, 0.99), "weight_decay": 0.1})
        >>> scaled.lr, scaled.rule, scaled.others
        (0.002, 'square root', {'betas': (0.6, 0.96), 'weight_decay': 0.2})
    """
    for name, value in (("batch", batch), ("new_batch", new_batch)):
        if value < 1:
            raise ValueError(f"Invalid {name}={value!r}: must be a number of samples, of at least 1.")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"Invalid lr={lr!r}: must be a finite number above 0.")
    name = _name_of(optimizer)
    factor = new_batch / batch
    given = dict(hyperparameters or {})
    others: dict[str, Any] = {}
    notes: list[str] = []
    if name in _UNCHANGED:
        notes.append(f"The rate of {name} stays: {_UNCHANGED[name]}.")
        return ScaledRate(lr, "unchanged", None, _decayed(name, given, factor, 1.0), tuple(notes))
    if name in _LINEAR:
        new_lr, rule = lr * factor, "linear"
        source: str | None = _LINEAR[name]
    else:
        new_lr, rule = lr * math.sqrt(factor), "square root"
        source = _SQUARE_ROOT.get(name)
        for key in _HALF_LIVES:
            if given.get(key) is not None:
                _scale_averages(key, given[key], factor, others, notes)
        if name in _SQUARE_ROOT and given.get("eps"):
            others["eps"] = _rounded(given["eps"] / math.sqrt(factor))
        if source is None:
            notes.append(
                f"No rule is published for {name}: the root is that of steps whose size does not depend on the "
                "gradients'. Check it with a rate trial."
            )
    others |= _decayed(name, given, factor, new_lr / lr)
    return ScaledRate(_rounded(new_lr), rule, source, others, tuple(notes))


def _name_of(optimizer: str | type) -> str:
    text = optimizer if isinstance(optimizer, str) else optimizer.__name__
    text = text.rpartition(".")[2]
    with contextlib.suppress(ValueError):
        text = OPTIMIZERS.get(text).__name__  # one of the names of other libraries, say
    return text.lower().replace("_", "").replace("-", "")


def _scale_averages(key: str, value: Any, factor: float, others: dict[str, Any], notes: list[str]) -> None:
    """Keep the length of averages in samples, as far as there is one."""
    several = isinstance(value, tuple | list)
    scaled = [1 - factor * (1 - beta) for beta in (value if several else [value])]
    if min(scaled) < 0:
        notes.append(
            f"{key} {value} cannot be scaled: an average would be shorter than one step. The rule ends before "
            "this batch size, so check the rate with a trial."
        )
        return
    rounded = tuple(_rounded(beta) for beta in scaled)
    others[key] = rounded if several else rounded[0]


def _decayed(name: str, given: Mapping[str, Any], factor: float, lr_factor: float) -> dict[str, Any]:
    """The weight decay that forgets as much per sample as before; one in the gradient does so by itself."""
    decay = given.get("weight_decay")
    kind = given.get("weight_decay_kind") or ("l2" if name in _COUPLED else "decoupled")
    if given.get("decoupled_weight_decay"):
        kind = "decoupled"
    by = {"independent": factor, "l2": 1.0, "l1": 1.0, "l2_sp": 1.0}.get(kind, factor / lr_factor)
    return {} if not decay or math.isclose(by, 1.0) else {"weight_decay": _rounded(decay * by)}


def _rounded(value: float) -> float:
    """Without the dust of floating point: twelve digits."""
    return float(f"{value:.12g}")
