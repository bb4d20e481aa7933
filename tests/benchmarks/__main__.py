"""Runs benchmarks and prints Markdown: ``python -m tests.benchmarks [SECTION ...]``."""

from __future__ import annotations

import sys

from tests.benchmarks import clipping, cold_start, cpu_optimizers, memory, monitor, roofline, training_loop
from tests.benchmarks.timing import machine


def main(names: list[str]) -> None:
    """Run the sections called ``names``, or all."""
    modules = (training_loop, cpu_optimizers, roofline, cold_start, clipping, memory, monitor)
    known = {section.__name__: section for module in modules for section in module.SECTIONS}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"No section {unknown[0]!r}. There are: {', '.join(known)}.")
    print(machine(), flush=True)
    for name in names or known:
        print(f"\n## {name.replace('_', ' ')}\n", flush=True)
        print(known[name](), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
