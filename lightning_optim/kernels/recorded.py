"""Recording of a rule's scalars as expressions, so that a device computes them in one launch from its step counts.

`Rule.scalars` is plain arithmetic of hyperparameters, which the host knows, and of step counts, which only the device
knows: it decides which steps are skipped. The rule is called with a `Recorded` in place of each count. What is computed
from numbers of the host alone stays a number; all else becomes text, in which the numbers are named constants, so that
the text is the same at every step and is compiled once.
"""

from __future__ import annotations

from typing import Any


class Recorded:
    """A number that is known on a device only, as the text of an expression.

    Args:
        text: The expression.
        constants: Values of the constants ``c[0]``, ``c[1]``, ... that expressions refer to, which grows.
    """

    __hash__ = None  # type: ignore[assignment] # comparisons are recorded as well

    def __init__(self, text: str, constants: list[float]) -> None:
        self.text, self._constants = text, constants

    def text_of(self, other: Any) -> str:
        """Return an operand as text: a number becomes a constant.

        Raises:
            TypeError: It is neither a number nor recorded.
        """
        if isinstance(other, Recorded):
            return other.text
        if not isinstance(other, int | float):
            raise TypeError(f"Cannot record arithmetic with {type(other).__name__}.")
        return constant(other, self._constants)

    def call(self, name: str, *arguments: Any) -> Recorded:
        """Return the call of a function of the device."""
        return Recorded(f"{name}({', '.join(map(self.text_of, arguments))})", self._constants)

    def _infix(self, left: Any, operator: str, right: Any) -> Recorded:
        return Recorded(f"({self.text_of(left)} {operator} {self.text_of(right)})", self._constants)

    def __add__(self, other: Any) -> Recorded:
        return self._infix(self, "+", other)

    def __radd__(self, other: Any) -> Recorded:
        return self._infix(other, "+", self)

    def __sub__(self, other: Any) -> Recorded:
        return self._infix(self, "-", other)

    def __rsub__(self, other: Any) -> Recorded:
        return self._infix(other, "-", self)

    def __mul__(self, other: Any) -> Recorded:
        return self._infix(self, "*", other)

    def __rmul__(self, other: Any) -> Recorded:
        return self._infix(other, "*", self)

    def __truediv__(self, other: Any) -> Recorded:
        return self._infix(self, "/", other)

    def __rtruediv__(self, other: Any) -> Recorded:
        return self._infix(other, "/", self)

    def __pow__(self, other: Any) -> Recorded:
        return self.call("power", self, other)

    def __rpow__(self, other: Any) -> Recorded:
        return self.call("power", other, self)

    def __neg__(self) -> Recorded:
        return self._infix(0.0, "-", self)

    def __abs__(self) -> Recorded:
        return self.call("absolute", self)

    def __lt__(self, other: Any) -> Recorded:
        return self._infix(self, "<", other)

    def __le__(self, other: Any) -> Recorded:
        return self._infix(self, "<=", other)

    def __gt__(self, other: Any) -> Recorded:
        return self._infix(self, ">", other)

    def __ge__(self, other: Any) -> Recorded:
        return self._infix(self, ">=", other)

    def __eq__(self, other: Any) -> Recorded:  # type: ignore[override]
        return self._infix(self, "==", other)

    def __ne__(self, other: Any) -> Recorded:  # type: ignore[override]
        return self._infix(self, "!=", other)

    def __and__(self, other: Any) -> Any:
        return self._infix(self, "&", other) if isinstance(other, Recorded) else other and self

    def __or__(self, other: Any) -> Any:
        return self._infix(self, "|", other) if isinstance(other, Recorded) else other or self

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        raise TypeError("The value is known on the device only. Use lightning_optim.kernels.rules.where.")

    def __float__(self) -> float:
        raise TypeError("The value is known on the device only.")


def constant(value: float, constants: list[float]) -> str:
    """Return the name of a new constant of that value."""
    constants.append(float(value))
    return f"c{len(constants) - 1}"
