"""Checks of the functions of a rule when its class is defined, so that a mistake is not found in a compiled kernel."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FIRST = ("param", "grad")


def check_elementwise(owner: str, function: Any, state: Sequence[str], returned: str, count: int) -> None:
    """Check the signature, the numbers and the result of `update` or `sums_update`.

    Args:
        owner: Name of the class and of the function, for messages.
        function: The function.
        state: Names of the state.
        returned: What it returns, in words.
        count: Length of the tuple that it returns.

    Raises:
        TypeError: It is no plain static method, takes other arguments, has literals, or returns something else.
    """
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{owner} must be a static method, a plain function of numbers.")
    parameters = list(inspect.signature(function).parameters.values())
    wanted = (*FIRST, *state)
    names = tuple(p.name for p in parameters)
    # A state whose key is no good name of a variable (`sum`) may have another name here.
    misplaced = [name for place, name in enumerate(wanted) if name in names and names.index(name) != place]
    if len(names) < len(wanted) or names[: len(FIRST)] != FIRST or misplaced:
        raise TypeError(
            f"{owner} takes ({', '.join(names)}), but must begin with ({', '.join(wanted)}), which are passed by "
            "position; names of `scalars` follow."
        )
    if odd := [p.name for p in parameters if p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD]:
        raise TypeError(f"{owner} has {odd[0]!r} with a default or as a keyword: return it from `scalars` instead.")
    if free := function.__code__.co_freevars:
        raise TypeError(f"{owner} uses {free[0]!r} of the function around it: return it from `scalars` instead.")
    refuse_literals(owner, function, "Return it from `scalars` under a name, and write x * x for x ** 2.")
    try:
        result = function(*[1.0] * len(parameters))
    except Exception:  # A division by 0, or a helper that is defined below.
        return
    if not isinstance(result, tuple) or len(result) != count:
        found = f"{len(result)} values" if isinstance(result, tuple) else "one value"
        raise TypeError(f"{owner} returns {found}, but must return a tuple of {count}: {returned}.")


def refuse_literals(owner: str, function: Callable[..., Any], advice: str) -> None:
    """Refuse numbers in a function and in its helpers, as far as these are defined.

    Args:
        owner: Name of the function, for the message.
        function: The function.
        advice: The way out.

    Raises:
        TypeError: There is a number.
    """
    if (number := next(_literals(function), None)) is not None:
        raise TypeError(
            f"{owner} has the literal {number!r}, which would turn float32 into float64 in compiled backends. {advice}"
        )


def _literals(function: Callable[..., Any]) -> Iterator[complex]:
    code = function.__code__
    yield from (const for const in code.co_consts if type(const) in (int, float, complex))
    for name in code.co_names:
        helper = function.__globals__.get(name)
        # The named functions have literals, but each backend has its own in their place.
        if isinstance(helper, types.FunctionType) and helper.__module__ != "lightning_optim.kernels.rules":
            yield from _literals(helper)
