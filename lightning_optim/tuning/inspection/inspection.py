"""The result of a look at a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lightning_optim.tuning.inspection.findings import Finding


@dataclass(frozen=True)
class Row:
    """One place of the model, in the order of execution.

    Args:
        name: Name of the module, with the function behind a colon if the module does more than that.
        operation: The function, or the class of the module.
        shape: Shape of its last output.
        rms: RMS of its outputs.
        zeros: Share of outputs that are 0.
        signal: RMS of what differs between samples; NaN for one sample.
        dead: Share of units that were flat for all samples.
        saturated: Share of outputs near an end of a sigmoid or tanh.
        gradient_rms: RMS of the gradient of its outputs; NaN if none arrived.
        weight_gain: rms · √fan_in of its weight, which is √2 after He and about 1 after Xavier; None without a weight.
        weight_gradient_rms: RMS of the gradient of its parameters; None without any.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    rms: float
    zeros: float
    signal: float
    dead: float
    saturated: float
    gradient_rms: float
    weight_gain: float | None
    weight_gradient_rms: float | None


@dataclass(frozen=True)
class LossValue:
    """The loss at the start.

    Args:
        name: The loss function; ``"loss"`` if it is none of torch's.
        value: Its value, averaged over batches and elements.
        chance: What the best constant prediction gives; None if that is unknown.
    """

    name: str
    value: float
    chance: float | None


@dataclass
class Inspection:
    """What a look at a model has seen.

    Args:
        rows: Places of the model in the order of execution.
        findings: What stands against training: problems first, then notes.
        losses: The losses at the start.
        batches: Number of batches.
        samples: Size of the first batch.
        parameters: Number of elements of all parameters.
        trainable: Of those, the ones that require a gradient.
        error: What ended the look before its end; None if nothing did. One of the findings explains it.
    """

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    losses: list[LossValue] = field(default_factory=list)
    batches: int = 0
    samples: int = 0
    parameters: int = 0
    trainable: int = 0
    error: str | None = None

    @property
    def problems(self) -> list[Finding]:
        """The findings that are no mere notes."""
        return [finding for finding in self.findings if finding.level == "problem"]

    @property
    def kinds(self) -> list[str]:
        """The kinds of all findings."""
        return [finding.kind for finding in self.findings]

    def table(self, width: int = 80) -> str:
        """Return the rows as a table.

        Args:
            width: Most columns of a line.
        """
        from lightning_optim.tuning.inspection.text import format_table

        return format_table(self, width)

    def text(self, width: int = 80) -> str:
        """Return the table with the losses before it and the findings after it.

        Args:
            width: Most columns of a line.
        """
        from lightning_optim.tuning.inspection.text import format_inspection

        return format_inspection(self, width)

    def picture(self, path: str | Path) -> None:
        """Draw activations and gradients by depth into a PNG.

        Args:
            path: Where to write it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from lightning_optim.tuning.inspection.picture import draw_inspection

        draw_inspection(self, path)

    def __str__(self) -> str:
        return self.text()
