"""Heat map of a quantity of every tensor over the whole run, as one image of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

COLUMNS = 256
_ROWS_WITH_NAMES = 60


class HeatMap:
    """Values by tensor and time, in a bounded number of columns.

    When all columns are in use, each pair of neighbours is merged into its larger values. A tensor that is missing from
    some reports (a frozen group) has gaps.

    Args:
        columns: Largest number of columns, even.

    Example:
        >>> heat_map = HeatMap(columns=2)
        >>> for step, value in enumerate((1.0, 4.0, 2.0, 3.0)):
        ...     heat_map.add(step, ["w"], np.array([value]))
        >>> heat_map.steps, heat_map.values().tolist()
        ([0, 2], [[4.0, 3.0]])
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self.steps: list[int] = []
        """First step of each column."""
        self._limit = columns
        self._rows: dict[str, int] = {}
        self._values = np.full((0, columns), np.nan, dtype=np.float32)
        self._per_column = 1
        self._in_last = 0

    def values(self) -> np.ndarray:
        """Return the values, float32, shape [tensors, columns so far]; NaN where there is none."""
        return self._values[:, : len(self.steps)]

    def add(self, step: int, names: Sequence[str], values: np.ndarray) -> None:
        """Add the values of one report.

        Args:
            step: Step of the report.
            names: Name of each tensor.
            values: The quantity of each tensor, shape [tensors].
        """
        if self._in_last == 0 or self._in_last == self._per_column:
            if len(self.steps) == self._limit:
                self._halve()
            self.steps.append(step)
            self._in_last = 0
        self._in_last += 1
        for name in names:
            self._rows.setdefault(name, len(self._rows))
        if missing := len(self._rows) - len(self._values):
            self._values = np.vstack([self._values, np.full((missing, self._limit), np.nan, dtype=np.float32)])
        rows = [self._rows[name] for name in names]
        column = len(self.steps) - 1
        self._values[rows, column] = np.fmax(self._values[rows, column], values)

    def _halve(self) -> None:
        pairs = np.fmax(self._values[:, 0::2], self._values[:, 1::2])
        self._values = np.full_like(self._values, np.nan)
        self._values[:, : pairs.shape[1]] = pairs
        self.steps = self.steps[0::2]
        self._per_column *= 2

    def draw(self, title: str, order: Mapping[str, int] = MappingProxyType({})) -> Any:
        """Draw the map as pixels, with colours on a logarithmic scale.

        Zeros are black, infinities red, and missing values grey. The scale starts above the lowest hundredth of the
        values, which take its lowest colour.

        Args:
            title: Title of the image.
            order: Position of each tensor in the model, by name; rows are in this order.

        Returns:
            uint8, shape [height, width, 3]; None as long as no value is finite and above 0.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        rows = sorted(self._rows, key=lambda name: order.get(name, len(order)))
        values = self.values()[[self._rows[name] for name in rows]].astype(np.float64)
        positive = values[np.isfinite(values) & (values > 0)]
        if not positive.size:
            return None
        low, high = float(np.quantile(positive, 0.01)), float(positive.max())
        high = max(high, low * 1.01)  # A single value alone would give an empty scale.
        colours = colormaps["viridis"].with_extremes(under="black", over="red", bad="lightgrey")
        shown = np.where(values == 0, low / 10, np.where(np.isinf(values), high * 10, np.maximum(values, low)))
        height = min(max(2.0, 0.16 * len(values)), 12.0)
        figure = Figure(figsize=(10, height + 0.8), layout="constrained", dpi=90)
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        image = panel.imshow(
            shown, aspect="auto", interpolation="nearest", cmap=colours, norm=LogNorm(low, high), origin="upper"
        )
        figure.colorbar(image, ax=panel, pad=0.01)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        places = np.unique(np.linspace(0, len(self.steps) - 1, 7).astype(int))
        panel.set_xticks(places, [str(self.steps[place]) for place in places])
        stride = -(-len(values) // _ROWS_WITH_NAMES)
        panel.set_yticks(range(0, len(values), stride), rows[::stride], fontsize=7)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
