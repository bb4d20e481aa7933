"""What the fuzzer draws: an optimizer, its parameters, and what happens to them between two steps. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.optim.fuzz_tampering import GRADIENTS, PARAMETERS, STATES
from tests.optim.memory_cells import Cell, full, quick

LAYOUTS = ("plain", "plain", "transposed", "strided", "channels_last", "permuted")
SHAPES = ((), (0,), (1,), (5,), (3, 4), (4, 3), (4, 4), (4, 4), (2, 0), (2, 3, 4), (2, 3, 2, 2), (255,), (256,), (257,))
LONG = ((4095,), (4096,), (4097,), (65, 64))
"""Where `state_bits=8` begins to act."""

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.02},
    {"lr": 0.0},
    {"weight_decay": 0.0},
    {"maximize": True},
    {"rule": "lion"},
    {"rule": "adamw"},
    {"rule": "muon"},
    {"rule": "lyon"},
    {"name": "tower"},
)
BUILDING: tuple[dict[str, Any], ...] = (
    {"cautious": True},
    {"kahan_sum": True},
    {"stochastic_rounding": True},
    {"state_bits": 16},
    {"state_bits": 8},
    {"weight_decay": 0.1, "weight_decay_kind": "l1"},
    {"weight_decay": 0.1, "weight_decay_kind": "l2_sp"},
    {"weight_decay": 0.1, "weight_decay_kind": "norm"},
    {"rule": "sgd"},
    {"rule": "adafactor"},
)
"""Options of a group that need kernels of their own."""

BUILDERS = ("adamw", "lion")
"""Optimizers that may meet any dtype and option: each such pair is a kernel more to compile."""


@dataclass(frozen=True)
class Part:
    """One parameter, and what happens to it after some ordinary steps.

    Args:
        shape: Its shape.
        layout: Of its memory; see `memory_cells.laid_out`.
        gradient: A name of `fuzz_tampering.GRADIENTS`.
        parameter: None, or a name of `PARAMETERS` there.
        states: Names of `STATES` there, each with the number of the state that it happens to.
        stale: Whether the parameter changes after it has got its gradient.
    """

    shape: tuple[int, ...]
    layout: str = "plain"
    gradient: str = "plain"
    parameter: str | None = None
    states: tuple[tuple[int, str], ...] = ()
    stale: bool = False


@dataclass(frozen=True)
class Example:
    """One optimizer, made, stepped, tampered with, and stepped again.

    Args:
        cell: The optimizer.
        parts: Its parameters.
        options: Of its groups; part number i is in group i modulo their number.
        before: Ordinary steps.
        after: Steps with what was tampered with.
        threads: torch's.
        skip: Whether `found_inf` is set, and to what.
        loads: Whether it is a saved state that is tampered with, which is then loaded.
    """

    cell: Cell
    parts: tuple[Part, ...]
    options: tuple[dict[str, Any], ...] = ({},)
    before: int = 1
    after: int = 2
    threads: int = 1
    skip: float | None = None
    loads: bool = False


@cache
def _menu(everything: bool) -> list[Cell]:
    return full("cpu") if everything else quick()


def _rarely(names: Any, none: Any, of: int = 6) -> st.SearchStrategy[Any]:
    return st.integers(0, of - 1).flatmap(lambda i: st.sampled_from(tuple(names)) if i == 0 else st.just(none))


@st.composite
def examples(draw: st.DrawFn, everything: bool = False, triton: bool = False) -> Example:
    """Examples.

    Args:
        draw: hypothesis's.
        everything: Of the whole matrix; else of what other tests build kernels for.
        triton: Whether some run on Triton, by its interpreter.
    """
    cell = draw(st.sampled_from(_menu(everything)))
    if triton and draw(st.integers(0, 11 if everything else 23)) == 0:  # under the interpreter, slow
        cell = replace(cell, backend="triton")
    alone = cell.dtype == "float32" and len(cell.arguments) <= 1
    builds = cell.backend == "triton" or (cell.optimizer in BUILDERS and (everything or alone))
    shapes = SHAPES + (LONG if cell.arguments.get("state_bits") == 8 or draw(st.integers(0, 15)) == 0 else ())
    dtypes = ("other_dtype", "narrow", "wide")
    gradients = [name for name in GRADIENTS if builds or name not in dtypes]
    parameters = [name for name in PARAMETERS if builds or name not in dtypes]
    states = [name for name in STATES if builds or name not in dtypes]
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        wild = draw(st.integers(0, 2)) == 0
        parts.append(
            Part(
                draw(st.sampled_from(shapes)),
                draw(st.sampled_from(LAYOUTS)),
                draw(_rarely(gradients, "plain", 2 if wild else 5)),
                draw(_rarely(parameters, None, 2)) if wild else None,
                tuple(draw(st.lists(st.tuples(st.integers(0, 7), st.sampled_from(states)), max_size=2)))
                if wild
                else (),
                draw(st.booleans()) if wild else False,
            )
        )
    known = OPTIONS + (BUILDING if builds else ())
    options = tuple(draw(st.sampled_from(known)) for _ in range(draw(st.sampled_from((1, 1, 2, 3)))))
    return Example(
        cell,
        tuple(parts),
        options,
        before=draw(st.integers(0, 2)),
        after=draw(st.integers(1, 2)),
        threads=draw(st.sampled_from((1, 1, 2))),
        skip=draw(st.sampled_from((None, None, None, 0.0, 1.0))),
        loads=draw(st.integers(0, 3)) == 0,
    )
