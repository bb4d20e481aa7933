"""Single tensors in a report: which of them stand out, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_optim.core.registry import one_or_several
from lightning_optim.core.stats import TENSOR_COLUMNS
from lightning_optim.core.suggest import nearest


class TensorRows:
    """Quantities of every tensor of one step, on the host.

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
        """One of `QUANTITIES`, shape [tensors]; NaN where there is no such quantity."""
        with np.errstate(all="ignore"):  # 0/0 is the answer where there is none
            values: np.ndarray = QUANTITIES[name](self)
        return values

    def sum(self, name: str) -> np.ndarray:
        """One of `TENSOR_COLUMNS`, shape [tensors]."""
        return self._sums[name]

    def mean(self, name: str) -> np.ndarray:
        """The sum called ``name`` over the number of elements."""
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
"""By name: what the diagnostics of the same name say of a group. A group's `update_rms` is ``optim_lr/effective``."""


@dataclass(frozen=True)
class PerTensor:
    """Display of single tensors by `OptimizerMonitor` on TensorBoard.

    Their values are transferred with the others of a report.

    Args:
        worst: Number of tensors that the text `optim/tensors` lists; 0 for no text. First those whose gradient is not
            finite, then those whose ``by`` is the most times larger or smaller than the median tensor's.
        by: The quantity that ranks them, one of `QUANTITIES`.
        heat_maps: Quantities of which there is an image `optim/tensors/<quantity>`, tensors × time; needs matplotlib.
        every: Number of reports from one text and image to the next; the last state is written at the end.

    Raises:
        ValueError: A quantity is unknown or a number out of range; the message names the nearest.

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
            raise ValueError(f"Invalid worst={self.worst!r}: a whole number of at least 0 is needed; 0 for no text.")
        if self.every < 1:
            raise ValueError(f"Invalid every={self.every!r}: a whole number of at least 1 is needed, for instance 20.")


def worst_first(rows: TensorRows, by: str) -> list[int]:
    """Return the places of the tensors in the order of how far they stand out.

    Those come first whose gradient is not finite, then those farthest from the median, in ratio.

    Tensors without the quantity, or with 0 of it, come last.
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
    """Return header and lines of a table of the worst tensors."""
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
