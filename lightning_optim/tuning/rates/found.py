"""What has been found out about the learning rate of each optimizer of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.tuning.rates.grids import Grid
from lightning_optim.tuning.rates.rate_trials import RateTrials
from lightning_optim.tuning.rates.suggestion import Suggestion


@dataclass(frozen=True)
class FoundRate:
    """The learning rate of one optimizer.

    Args:
        name: The optimizer's name where there are several, otherwise that of its class.
        configured: Its configured base rate.
        evidence: What the sweep or the trials told, with their losses.
        seconds: How long they took.
        flag: Name of the argument that sets the rate, as a flag of ``lightning-optim fit``; None where the module
            makes its optimizers from a number that we do not know.
        grids: What was found about weight decay or batch size together with the rate.
    """

    name: str
    configured: float
    evidence: Suggestion | RateTrials
    seconds: float = 0.0
    flag: str | None = None
    grids: tuple[Grid, ...] = ()

    @property
    def lr(self) -> float | None:
        """The suggested base rate; None if the losses do not tell."""
        return self.evidence.lr

    @property
    def low(self) -> float | None:
        """Lower end of the interval of rates that are as good, as far as the losses tell."""
        return self.evidence.low

    @property
    def high(self) -> float | None:
        """Upper end of it."""
        return self.evidence.high

    @property
    def reason(self) -> str:
        """Why this rate, or why none."""
        return self.evidence.reason

    def __str__(self) -> str:
        within = "" if self.low is None or self.high is None else f", between {self.low:.2g} and {self.high:.2g}"
        found = "no rate" if self.lr is None else f"lr {self.lr:.3g}{within}"
        text = f"{self.name}: {found} (configured: {self.configured:.3g}). {_sentence(self.reason)}"
        return "\n".join([text, *(f"{self.name}: {grid}" for grid in self.grids)])


@dataclass(frozen=True)
class FoundRates(Sequence[FoundRate]):
    """What has been found, one entry for each optimizer.

    Args:
        rates: The entries, in the order of the optimizers.
        method: ``"sweep"``, ``"trials"`` or ``"check"``.
        notes: What else there is to know: trials that failed, rates that the module sets itself.
    """

    rates: tuple[FoundRate, ...]
    method: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rates)

    def __getitem__(self, index: Any) -> Any:
        return self.rates[index]

    def __iter__(self) -> Iterator[FoundRate]:
        return iter(self.rates)

    @property
    def lr(self) -> float | None:
        """The suggested rate of the only optimizer; None if the losses do not tell.

        Raises:
            ValueError: There are several optimizers.
        """
        if len(self.rates) != 1:
            names = ", ".join(rate.name for rate in self.rates)
            raise ValueError(f"There are {len(self.rates)} optimizers ({names}): take the `lr` of each entry.")
        return self.rates[0].lr

    @property
    def flags(self) -> list[str]:
        """Flags of ``lightning-optim fit`` that set what is suggested."""
        return [f"--{rate.flag}={rate.lr:.4g}" for rate in self.rates if rate.flag and rate.lr is not None]

    def override(self) -> dict[str, Any]:
        """Return a configuration that sets what is suggested, to be given after the run's own: ``fit --config``."""
        config: dict[str, Any] = {}
        for rate in self.rates:
            if rate.flag is None or rate.lr is None:
                continue
            *path, last = rate.flag.split(".")
            inner = config
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = float(f"{rate.lr:.4g}")
        return config

    def save_override(self, path: str | Path) -> Path | None:
        """Write `override` as YAML.

        Args:
            path: The file.

        Returns:
            Its path; None if there is nothing to set.
        """
        return write_override(self.override(), str(self), path)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rates), *self.notes])


def write_override(config: Mapping[str, Any], comment: str, path: str | Path) -> Path | None:
    """Write a configuration as YAML.

    Args:
        config: The configuration.
        comment: Lines above it.
        path: The file, whose folder is made.

    Returns:
        Its path; None for an empty configuration, which is not written.
    """
    if not config:
        return None
    import yaml

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    file.write_text(lines + yaml.safe_dump(dict(config), sort_keys=False))
    return file


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
