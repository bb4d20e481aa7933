"""Each optimizer beside what its memory traffic takes: ``python -m tests.benchmarks.roofline [OPTIMIZER ...]``.

A step has to read and write a number of bytes that follows from its rule. Two speeds of memory are measured in the same
rounds: that of a copy, which counts what it reads and what it writes (its target is also read before it is written,
which a step that writes what it has just read does not need), and that of a pass in place together with a plain read.
The bytes over a speed are a limit in milliseconds. A rule with sums over whole tensors (LAMB, LARS, StableAdamW,
Prodigy) reads its arrays once more before it may write.
"""

from __future__ import annotations

import dis
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.kernels.rules import UpdateRule
from tests.benchmarks.cpu_optimizers import ON_MATRICES, stepper
from tests.benchmarks.models import transformer
from tests.benchmarks.timing import interleave, machine, memory_copy, table

PROBE = 2**28
"""Bytes that each probe of memory moves: more than a cache holds, and little beside a step."""

GOAL = 1.15
"""Largest ratio to the limit of a copy."""


@dataclass(frozen=True)
class Traffic:
    """Arrays in the size of the parameters that a step moves.

    Args:
        read: Arrays read and not written in the same pass.
        updated: Arrays read and written in the same pass.
    """

    read: int
    updated: int

    def bytes_per_parameter(self) -> int:
        """In float32."""
        return 4 * (self.read + 2 * self.updated)


FACTORED = Traffic(read=4, updated=1)
"""Adafactor: gradients three times, for the means, the size of the update and the update; weights for their size."""


def traffic(optimizer: Any) -> Traffic | None:
    """What a step moves at least; None if matrix products and not memory bound it."""
    rule = optimizer.rule(optimizer.param_groups[0])
    if not isinstance(rule, UpdateRule):
        return FACTORED if isinstance(optimizer, lo.optim.Adafactor) else None
    first = len(_arrays(rule)) if rule.sums else 0
    return Traffic(read=1 + first, updated=1 + len(rule.state))


def _arrays(rule: UpdateRule) -> set[str]:
    """The arrays that the first pass of a rule reads."""
    used: set[str] = set()
    for instruction in dis.get_instructions(type(rule).sums_update):
        if instruction.opname.startswith("LOAD_FAST"):
            value = instruction.argval
            used |= set(value) if isinstance(value, tuple) else {value}
    return used & {"param", "grad", *rule.state}


def _probes() -> dict[str, Callable[[], object]]:
    """A copy, a pass in place and a read, of `PROBE` bytes each."""
    place = torch.ones(PROBE // 8)
    read = torch.ones(PROBE // 4)
    return {
        "copy": memory_copy(PROBE),
        "in place": lambda: place.mul_(1.0),
        "read": lambda: lo.kernels.measure([read]),
    }


def against_the_roofline(names: Sequence[str] = (), rounds: int = 9) -> str:
    """One row for each optimizer that memory bounds, or of those called so."""
    parameters = transformer()
    count = sum(p.numel() for p in parameters)
    probes = _probes()
    rows: list[list[object]] = []
    for name in names or lo.optim.list_optimizers():
        if name in ON_MATRICES:
            continue
        cls: Any = lo.optim.get_optimizer_class(name)
        cls = partial(cls, momentum=0.9) if name in ("sgd", "lars") else cls
        moved = traffic(cls([nn.Parameter(torch.zeros(4, 4))]))
        if moved is None:
            continue
        timings = interleave({"ours": stepper(parameters, cls), **probes}, rounds=rounds, warmup=2)
        ours = timings["ours"].rounds
        copied = _limits(timings["copy"].rounds, moved.bytes_per_parameter() * count)
        in_place = _limits(timings["in place"].rounds, 8 * moved.updated * count)
        read = _limits(timings["read"].rounds, 4 * moved.read * count)
        both = [a + b for a, b in zip(in_place, read, strict=True)]
        rows.append(
            [
                name,
                moved.bytes_per_parameter(),
                statistics.median(ours) * 1e3,
                statistics.median(copied) * 1e3,
                _ratio(ours, copied),
                statistics.median(both) * 1e3,
                _ratio(ours, both),
            ]
        )
        print("  " + " ".join(str(cell) for cell in rows[-1]), file=sys.stderr, flush=True)
    header = [
        "optimizer",
        "bytes per parameter",
        "ours, ms",
        "as a copy, ms",
        "ours / copy",
        "in place, ms",
        "ours / it",
    ]
    return (
        table(header, rows)
        + f"\n\n{count / 1e6:.1f} M parameters in {len(parameters)} tensors; goal: {GOAL} of a copy."
    )


def _limits(seconds: tuple[float, ...], num_bytes: int) -> list[float]:
    """Seconds that ``num_bytes`` take at the speed of a probe, round by round."""
    return [second * num_bytes / PROBE for second in seconds]


def _ratio(ours: tuple[float, ...], limits: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, limits, strict=True))


SECTIONS = (against_the_roofline,)


if __name__ == "__main__":
    print(machine(), flush=True)
    print()
    print(against_the_roofline(sys.argv[1:]), flush=True)
