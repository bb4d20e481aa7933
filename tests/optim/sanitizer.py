"""Every cell of the matrix with its tensors flush against memory that may not be touched.

`python -m tests.optim.sanitizer journal backend [part/parts]`, in a process of its own: what reads or writes one
element too many ends it.
"""

from __future__ import annotations

import os
import sys

import torch

from tests.canaries import GuardPages
from tests.optim.cases import CASES
from tests.optim.memory_cells import LARGE, SIZES, Cell, full, run
from tests.own_process import Journal, begin

FAULT = os.environ.get("PLANTED_FAULT")
"""Makes one element too many of each tensor, to see it found."""


OF_TENSORS = {case.optimizer.__name__.lower() for case in CASES if not case.elementwise}
"""Whose arithmetic is torch's own, where an address decides the order of a sum."""


def main(journal: Journal, cells: list[Cell]) -> None:
    """Runs ``cells``, each with its tensors at the end and at the start of their pages."""
    torch.set_num_threads(1)
    if FAULT:
        plant_fault()
    for i, cell in enumerate(cells):
        large = cell.backend == "cpu" and i % 8 == 0
        results = []
        for side in ("right", "left"):
            journal.write(f"{side} side of {cell!r}")
            results.append(run(cell, GuardPages(side), (*SIZES, *LARGE) if large else SIZES))
        if cell.backend != "reference" and cell.optimizer not in OF_TENSORS:
            assert all(map(torch.equal, *results)), "where a tensor lies must not matter"


def plant_fault() -> None:
    """Let blocks of the CPU backend end, or begin, one element outside."""
    from lightning_optim.kernels.cpu import backend as cpu

    split = cpu.split  # type: ignore[attr-defined]

    def wrong(numel: tuple[int, ...], size: int) -> object:
        blocks = split(numel, size).copy()
        if FAULT == "end":
            blocks[blocks[:, 2] == torch.tensor(numel).numpy()[blocks[:, 0]], 2] += 1
        else:
            blocks[blocks[:, 1] == 0, 1] = -1
        return blocks

    cpu.split = wrong  # type: ignore[attr-defined,assignment]


if __name__ == "__main__":
    part, parts = map(int, (sys.argv[3] if len(sys.argv) > 3 else "0/1").split("/"))
    chosen = full(sys.argv[2])[part::parts]
    main(begin(sys.argv[1]), chosen)
    print(len(chosen))
