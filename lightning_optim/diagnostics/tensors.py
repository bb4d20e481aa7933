"""Statistics of individual tensors in a report, and the table of those that stand out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_optim.core.registry import one_or_several
from lightning_optim.core.stats import TENSOR_COLUMNS
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed


class TensorRows:
    """Statistics of every tensor of one step, on the host.

    Args:
        names: Name of each tensor.
        groups: Name of each tensor's group.
        numel: Number of elements of each tensor.
        sums: `StepRecord.per_tensor`, shape [tensors, columns].
    """

    def __init__(self, names: Sequence[str], groups: Sequence[str], numel: Sequence[int], sums: np.ndarray) -> None:
        self.names, self.groups = tuple(names), tuple(groups)
        self._numel = np.asarray(numel, dtype=np.float64)
        self._sums: dict[str, np.ndarray] = dict(zip(TENSOR_COLUMNS, sums.T, strict=True))

    def quantity(self, name: str) -> np.ndarray:
        """Return one of `QUANTITIES`, shape [tensors]; NaN where a tensor has no such quantity."""
        with np.errstate(all="ignore"):  # 0/0 gives the NaN of a tensor without the quantity.
            values: np.ndarray = QUANTITIES[name](self)
        return values

    def sum(self, name: str) -> np.ndarray:
        """Return one of `TENSOR_COLUMNS`, shape [tensors]."""
        return self._sums[name]

    def mean(self, name: str) -> np.ndarray:
        """Return one of `TENSOR_COLUMNS` divided by the number of elements, shape [tensors]."""
        values: np.ndarray = self._sums[name] / self._numel
        return values


QUANTITIES: dict[str, Callable[[TensorRows], np.ndarray]] = {
    "grad_norm": lambda rows: np.where(np.isnan(rows.sum("grad_sq")), np.inf, np.sqrt(rows.sum("grad_sq"))),
    "param_rms": lambda rows: np.sqrt(rows.mean("param_sq")),
    "update_rms": lambda rows: np.sqrt(rows.mean("update_sq")),
    "update_ratio": lambda rows: _finite(np.sqrt(rows.sum("update_sq") / rows.sum("param_sq"))),
    "cosine": lambda rows: rows.sum("grad_exp_avg") / np.sqrt(rows.sum("clipped_sq") * rows.sum("momentum_sq")),
    "over_second_moment": lambda rows: np.sqrt(rows.mean("grad_sq_over_exp_avg_sq")),
    "below_eps": lambda rows: rows.mean("below_eps"),
    "zero": lambda rows: rows.mean("zero_grad"),
}
"""Quantities of a tensor by name, defined as a group's diagnostics are; `update_rms` is a group's ``lr/effective``."""


@typed
@dataclass(frozen=True)
class PerTensor:
    """Display of individual tensors by `OptimizerMonitor`, in loggers that can.

    Their values are transferred with the others of a report.

    Args:
        worst: Number of tensors that the text `optim/tensors` lists, at least 0; 0 for no text. Those whose gradient is
            not finite come first, then those whose ``by`` differs from the median tensor's by the largest factor.
        by: Quantity that ranks the tensors, one of `QUANTITIES`.
        heat_maps: Quantities shown as images `optim/tensors/<quantity>`, tensors × time; needs matplotlib.
        every: Number of reports from one text and image to the next, at least 1; the last state is written at the end.

    Raises:
        ValueError: A quantity is unknown, for which the message names the nearest, or a number is out of range.

    Example:
        >>> PerTensor(worst=5, by="grad_norm", heat_maps=())
        PerTensor(worst=5, by='grad_norm', heat_maps=(), every=20)
    """

    worst: int = 10
    by: str = "update_ratio"
    heat_maps: Sequence[str] | str = ("grad_norm", "update_ratio")
    every: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "heat_maps", one_or_several(self.heat_maps))
        for name in (self.by, *self.heat_maps):
            if name not in QUANTITIES:
                raise ValueError(f"Unknown quantity {name!r} of a tensor. {nearest(name, QUANTITIES)}")
        if self.worst < 0:
            raise ValueError(f"Invalid worst={self.worst!r}: must be a whole number of at least 0; 0 for no text.")
        if self.every < 1:
            raise ValueError(f"Invalid every={self.every!r}: must be a whole number of at least 1, for instance 20.")


def worst_first(rows: TensorRows, by: str) -> list[int]:
    """Return the indices of the tensors, those that stand out most first.

    Tensors whose gradient is not finite come first, then those that differ from the median by the largest factor.
    Tensors without the quantity, or with a value of 0, come last.

    Args:
        rows: The tensors.
        by: One of `QUANTITIES`.
    """
    with np.errstate(all="ignore"):
        decades = np.log10(rows.quantity(by))
    decades[~np.isfinite(decades)] = np.nan
    known = ~np.isnan(decades)
    distance = np.abs(decades - (np.median(decades[known]) if known.any() else 0.0))
    distance[~known] = -1.0
    distance[~np.isfinite(rows.sum("grad_sq"))] = np.inf
    return [int(place) for place in np.argsort(-distance, kind="stable")]


def table_of(rows: TensorRows, detail: PerTensor) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of the tensors that stand out most."""
    found = {name: rows.quantity(name) for name in QUANTITIES}
    shown = {name: values for name, values in found.items() if not np.isnan(values).all()}
    with np.errstate(all="ignore"):
        share = rows.sum("grad_sq") / rows.sum("grad_sq").sum()
    places = worst_first(rows, detail.by)[: detail.worst]
    header = ["tensor", "group", "share of grad_norm²", *shown]
    lines = [
        [rows.names[i], rows.groups[i], f"{share[i]:.1%}", *(_text(values[i]) for values in shown.values())]
        for i in places
    ]
    return header, lines


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(values), np.nan, values)


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3g}"
