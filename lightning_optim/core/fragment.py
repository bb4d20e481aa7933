"""Parts of the decision of a step, as lines of a program that runs in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

NUMBER, PARAMETER = 0, -1
"""Lengths of a state that is one number, and of one with an element for each parameter."""


@dataclass(frozen=True)
class Fragment:
    """Lines of the program that decides a step, from the clip rule or from the guard.

    The lines are Python. They run over numpy arrays as they are, and Triton compiles them for an accelerator; the same
    decision in torch's operations, rule by rule, is what they are tested against. A vector has one element for each
    parameter of the optimizer; all numbers are float64. The lines may use

    - ``norm_sq``, a vector, 0 where a parameter has no gradient, and ``has``, the vector of flags that says where;
    - ``norm``, the norm of all gradients; ``finite``, whether all are finite; ``loss``, NaN if it is not known;
    - ``divisor`` in the guard's part: a number or a vector, 1 without clipping;
    - the names below, and the functions of `lightning_optim.kernels.decision`.

    Args:
        lines: Lines without indentation. They bind ``new_<name>`` for each state; those of a clip rule also
            ``divisor``, and the flag ``clipped``; those of a guard the flags ``skip``, ``norm_flag`` and ``loss_flag``.
        numbers: Names of numbers from the host, which may change at every step.
        vectors: Names of vectors from the host, which change with the groups only.
        states: Name and length of each state: `NUMBER`, `PARAMETER`, or the length of a window. ``n * PARAMETER`` are n
            vectors in a row, ``<name>_0`` and so on. A state moves on only where the step is taken.
        always: Names of states, all numbers, that move on when a step is skipped, too.
    """

    lines: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    states: tuple[tuple[str, int], ...] = ()
    always: tuple[str, ...] = ()

    @cached_property
    def longest(self) -> int:
        """Length of the longest window among the states; 0 without a window."""
        return max((length for _, length in self.states), default=NUMBER)
