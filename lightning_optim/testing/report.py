"""The report of all checks of one optimizer."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from lightning_optim.testing.check import Result, explain

WIDTH = 80


class ConformanceError(AssertionError):
    """An optimizer has failed checks."""


@dataclass
class Report:
    """What the checks have found. As a string it fits a terminal of 80 columns.

    Args:
        name: Name of the optimizer.
        results: One result per check, in the order of the checks.
        facts: What was found out on the way, such as the kind of weight decay.
        seconds: How long it took.
    """

    name: str
    results: list[Result]
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return not self.failures

    @property
    def failures(self) -> list[Result]:
        """The checks that have failed."""
        return [r for r in self.results if r.status == "failed"]

    @property
    def skipped(self) -> list[Result]:
        """The checks that do not apply, each with the reason in ``seen``."""
        return [r for r in self.results if r.status == "skipped"]

    def raise_for_failures(self) -> None:
        """Raise if a check has failed.

        Raises:
            ConformanceError: The message explains each failure.
        """
        if not self.passed:
            texts = "\n\n".join(explain(r) for r in self.failures)
            raise ConformanceError(f"{self.name} fails {len(self.failures)} of {len(self.results)} checks.\n\n{texts}")

    def __str__(self) -> str:
        passed = len(self.results) - len(self.failures) - len(self.skipped)
        lines = [
            *_wrap(
                f"{self.name}: {passed} checks passed, {len(self.failures)} failed, {len(self.skipped)} skipped "
                f"({self.seconds:.1f} s)",
                "",
            )
        ]
        for result in self.failures:
            check = result.check
            lines += ["", f"FAILED {check.name} ({check.family})"]
            for label, text in (
                ("expected", check.expected),
                ("seen", result.seen),
                ("why", check.why),
                ("fix", check.fix),
            ):
                lines += _wrap(text, f"  {label + ':':<10}")
        if self.skipped:
            lines += ["", "Skipped"]
            for result in self.skipped:
                lines += _wrap(result.seen, f"  {result.check.name}: ")
        if self.facts:
            lines += ["", "Facts"]
            for name, value in self.facts.items():
                lines += _wrap(value, f"  {name}: ")
        return "\n".join(lines)


def _wrap(text: str, label: str) -> list[str]:
    indent = " " * (len(label) if len(label) <= 14 else 6)
    return textwrap.wrap(f"{label}{text}", WIDTH, subsequent_indent=indent) or [label]
