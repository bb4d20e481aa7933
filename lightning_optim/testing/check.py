"""What a check is, how it ends, and the list of all checks."""

from __future__ import annotations

import inspect
import traceback
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject

__all__ = ["CHECKS", "Check", "Result", "check"]

CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order of the reports."""

GROUPS = ("default", "compile", "distributed", "gpu")
"""Checks of "distributed" run only on request, because they start two processes."""


@dataclass(frozen=True)
class Result:
    """How one check ended.

    Args:
        check: The check.
        status: Whether the optimizer passed, failed, or the check does not apply to it.
        seen: What was seen instead of what the check expects, or why it does not apply; empty after a pass.
    """

    check: Check
    status: Literal["passed", "failed", "skipped"]
    seen: str = ""


class Check:
    """One question to an optimizer: a function of a `Subject` that raises where the answer is wrong.

    Called with a factory it is a test: it returns None where the optimizer passes, raises an AssertionError where it
    fails, and `unittest.SkipTest`, which pytest knows as well, where the check does not apply.

    Args:
        function: The function; its name is the check's, and its docstring says what is expected.
        why: Why it matters, in one or two sentences.
        fix: What to change in an optimizer that fails.
        group: One of `GROUPS`.

    Attributes:
        name: Name of the check.
        family: Name of the file that has it, such as "gradients".
        expected: What is expected.

    Example:
        >>> from lightning_optim.testing import checks
        >>> checks(only=["none_gradients"])[0](torch.optim.SGD, lr=0.1)
    """

    def __init__(self, function: Callable[[Subject], None], *, why: str, fix: str, group: str = "default") -> None:
        self.function = function
        self.name = self.__name__ = function.__name__
        self.family = function.__module__.rpartition(".")[2]
        self.expected = " ".join((inspect.getdoc(function) or "").split())
        self.why = why
        self.fix = fix
        self.group = group

    def __repr__(self) -> str:
        return f"<check {self.name}>"

    def run(self, subject: Subject) -> Result:
        """Put the question and return the result; what the optimizer raises is a failure.

        Args:
            subject: The optimizer.
        """
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _settings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                self.function(subject)
            except CheckSkipped as skipped:
                return Result(self, "skipped", str(skipped))
            except CheckFailed as failed:
                return Result(self, "failed", str(failed))
            except (Exception, SystemExit) as error:
                return Result(self, "failed", _raised(error))
        return Result(self, "passed")

    def __call__(
        self,
        factory: Callable[..., Any],
        /,
        *,
        reference: Callable[..., Any] | None = None,
        device: str = "cpu",
        claims: dict[str, str] | None = None,
        **hyperparameters: Any,
    ) -> None:
        """Run the check as a test.

        Args:
            factory: The optimizer, as `lightning_optim.testing.check_optimizer` takes it.
            reference: The update in plain words, as there.
            device: Device of the parameters.
            claims: Facts that must come out so, as there.
            **hyperparameters: Arguments of a class.

        Raises:
            AssertionError: The optimizer fails.
            SkipTest: The check does not apply to it.
        """
        subject = Subject(factory, hyperparameters, reference=reference, device=device, claims=claims)
        result = self.run(subject)
        if result.status == "skipped":
            raise unittest.SkipTest(result.seen)
        if result.status == "failed":
            raise AssertionError(explain(result))


def explain(result: Result) -> str:
    """Return a failure as text: what was expected and seen, why it matters and how to fix it."""
    check = result.check
    return f"{check.name}\n  expected: {check.expected}\n  seen: {result.seen}\n  why: {check.why}\n  fix: {check.fix}"


def check(*, why: str, fix: str, group: str = "default") -> Callable[[Callable[[Subject], None]], Check]:
    """Make a check of the function below and add it to `CHECKS`.

    Args:
        why: Why it matters.
        fix: What to change in an optimizer that fails.
        group: One of `GROUPS`.
    """

    def register(function: Callable[[Subject], None]) -> Check:
        made = Check(function, why=why, fix=fix, group=group)
        assert made.name not in CHECKS, made.name
        assert group in GROUPS, group
        CHECKS[made.name] = made
        return made

    return register


@contextmanager
def _settings() -> Iterator[None]:
    """Restore what an optimizer may leave behind for the whole process, and start with gradients enabled."""
    dtype = torch.get_default_dtype()
    with torch.set_grad_enabled(True):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _raised(error: BaseException) -> str:
    """Return an error with the line of the optimizer that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parent)
    theirs = [f for f in frames if not f.filename.startswith(here) and "torch/utils" not in f.filename]
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}{where}"
