"""Run the checks on one optimizer."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_optim.core.suggest import nearest
from lightning_optim.testing.check import CHECKS, GROUPS, Check, Result
from lightning_optim.testing.report import Report
from lightning_optim.testing.subject import Subject

__all__ = ["check_optimizer", "checks"]

FAMILIES = (
    "descent",
    "gradients",
    "closures",
    "updates",
    "hyperparameters",
    "decay",
    "state",
    "copies",
    "shapes",
    "integration",
    "pipeline",
    "distributed",
)
"""Files of checks, in the order of the reports."""

FACTS = (
    "gradient scale",
    "sparse gradients",
    "complex parameters",
    "weight decay",
    "state",
    "state of float16 weights",
    "state of bfloat16 weights",
)
"""Names of facts that can be claimed."""

for _family in FAMILIES:  # Each adds its checks to the list.
    importlib.import_module(f"lightning_optim.testing.{_family}")


def checks(only: Iterable[str] | None = None, skip: Iterable[str] | None = None) -> list[Check]:
    """Return checks, for instance as the parameters of a test.

    Args:
        only: Names of checks, of their files ("state") or of groups ("distributed"); None for all that need neither a
            second process nor a GPU.
        skip: Names to leave out.

    Raises:
        ValueError: There is no such name.

    Example:
        In a test file, each check becomes one test:

        ```python
        @pytest.mark.parametrize("check", lightning_optim.testing.checks())
        def test_conforms(check):
            check(MyOptimizer, lr=0.1)
        ```

        >>> [check.name for check in checks(only=["closures"])]
        ['closure_once', 'closure_loss', 'closure_grad_enabled', 'closure_gradients']
    """
    wanted = None if only is None else _named(only, "only")
    unwanted = set() if skip is None else _named(skip, "skip")
    usual = {name for name, check in CHECKS.items() if check.group in ("default", "compile")}
    chosen = usual if wanted is None else wanted
    return [check for name, check in CHECKS.items() if name in chosen and name not in unwanted]


def check_optimizer(
    factory: Callable[..., Any],
    /,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] | None = None,
    reference: Callable[..., Any] | None = None,
    device: str = "cpu",
    claims: Mapping[str, str] | None = None,
    **hyperparameters: Any,
) -> Report:
    """Check whether an optimizer keeps what torch, trainers and checkpoints rely on.

    Args:
        factory: A class, with its arguments as further keywords, or a function from parameters to an optimizer. With a
            class more is checked, because it can be made with other values.
        only: Names of checks, files or groups, see `checks`; None for all that need neither a second process nor a
            GPU. With ``device="cuda"`` those that need a GPU are among them.
        skip: Names to leave out.
        reference: The update in plain words, ``reference(param, grad, state, step, **group) -> param``: the new values
            of one parameter, from tensors in float64; ``state`` is a dict of its own, ``step`` counts from 1.
        device: Device of the parameters.
        claims: Facts that must come out so, such as ``{"weight decay": "decoupled, scaled by lr"}``; the report has all
            under `Report.facts`.
        **hyperparameters: Arguments of the class.

    Raises:
        TypeError: The class has no such argument.
        ValueError: There is no such check, fact or device, or none is left to check.

    Example:
        >>> import torch
        >>> report = check_optimizer(torch.optim.AdamW, lr=0.1, only=["closures", "weight_decay"])
        >>> report.passed
        True
        >>> report.facts["weight decay"]
        'decoupled, scaled by lr'
    """
    for name in claims or {}:
        if name not in FACTS:
            raise ValueError(f"Invalid claims={name!r}: there is no such fact. {nearest(name, FACTS)}")
    subject = Subject(factory, hyperparameters, reference=reference, device=device, claims=dict(claims or {}))
    chosen = checks(only, skip)
    if not chosen:
        raise ValueError(f"Invalid only={only!r}, skip={skip!r}: no check is left.")
    if only is None and device != "cpu":
        left_out = set() if skip is None else _named(skip, "skip")
        chosen += [c for c in CHECKS.values() if c.group == "gpu" and c.name not in left_out]
    start = time.perf_counter()
    results = _basics(subject, chosen) or [check.run(subject) for check in chosen]
    return Report(subject.name, results, subject.facts, time.perf_counter() - start)


def _basics(subject: Subject, chosen: list[Check]) -> list[Result] | None:
    """Return results where the optimizer cannot make a plain step: one failure says so, and the rest is skipped."""

    def plain_step(subject: Subject) -> None:
        """An optimizer of two matrices makes two steps."""
        subject.run(2)

    basic = Check(
        plain_step,
        why="Nothing else can be checked before a plain step works.",
        fix="Give the arguments that it needs, or a function that makes it.",
    )
    result = basic.run(subject)
    if result.status == "passed":
        return None
    return [result, *(Result(check, "skipped", "a plain step fails") for check in chosen)]


def _named(names: Iterable[str], argument: str) -> set[str]:
    """Return names of checks from names of checks, files and groups."""
    names = [names] if isinstance(names, str) else list(names)
    found: set[str] = set()
    for name in names:
        matching = {n for n, check in CHECKS.items() if name in (n, check.family, check.group)}
        if not matching:
            known = [*CHECKS, *dict.fromkeys(c.family for c in CHECKS.values()), *GROUPS]
            raise ValueError(f"Invalid {argument}={name!r}: there is no such check. {nearest(name, known)}")
        found |= matching
    return found
