"""A step of Muon on two ranks that have copies of a model: all of it on each, or the matrices divided.

Run ``python -m tests.benchmarks.division [--name SOAP] [--widths 128,256,384] [--ranks 2] [--repeats 7]``.
Of SOAP it is a step in which all bases are refreshed.

Each rank has one thread. Printed are the median time of a step and the processor time that a rank spends in it, with
all of the work on each rank and with the work divided, and how many matrices `optim.division.pays` would divide.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_optim import optim
from lightning_optim.optim import division
from tests.distributed.ranks import Ranks

LAYERS = 4


def shapes_of(width: int) -> list[tuple[int, int]]:
    """Shapes of the matrices of transformer layers: attention, and an MLP four times as wide."""
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * LAYERS


def measure(width: int, name: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of a step, and of processor time of this rank in it, by way."""
    torch.set_num_threads(1)
    found: dict[str, tuple[float, float]] = {}
    usual = dict(division.WORTH), dict(division.AT_LEAST)
    division.WORTH["cpu"] = division.AT_LEAST["cpu"] = 0.0
    for way, group in (("alone", None), ("divided", dist.group.WORLD)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes_of(width)]
        more = {"precondition_frequency": 1} if name == "SOAP" else {}
        optimizer: Any = getattr(optim, name)([{"params": params, "rule": name.lower(), **more}], lr=0.02)
        rule, settings = optimizer.rule_of(optimizer.param_groups[0]), optimizer.param_groups[0]
        division.WORTH["cpu"] = usual[0]["cpu"]
        pays = sum(division.pays(param, settings, rule) is not None for param in params)
        division.WORTH["cpu"] = 0.0
        optimizer.divide_over = group
        for param in params:
            param.grad = torch.randn_like(param)
        times, works = [], []
        for _ in range(repeats + 2):
            dist.barrier()
            start, work = time.perf_counter(), time.process_time()
            optimizer.step()
            times.append(time.perf_counter() - start)
            works.append(time.process_time() - work)
        found[way] = statistics.median(times[2:]), statistics.median(works[2:])
    division.WORTH.update(usual[0])
    division.AT_LEAST.update(usual[1])
    return found | {"pays": (pays, len(params))}


def main() -> None:
    """Print a line for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256,384")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", default="Muon")
    asked = parser.parse_args()
    print("| width | step, all on each | step, divided | ratio | work, all on each | work, divided | ratio | pays |")
    print("|---|---|---|---|---|---|---|---|")
    with Ranks(asked.ranks, join=True) as ranks:
        for width in map(int, asked.widths.split(",")):
            rows = ranks.run(measure, width, asked.name, asked.repeats, timeout=600)
            (alone, work_alone), (divided, work) = (
                [max(row[way][i] for row in rows) for i in (0, 1)] for way in ("alone", "divided")
            )
            times = (alone, divided, work_alone, work)
            a, d, wa, w = (f"{1000 * seconds:.1f} ms" for seconds in times)
            chosen = "{} of {}".format(*rows[0]["pays"])
            print(f"| {width} | {a} | {d} | {divided / alone:.2f} | {wa} | {w} | {work / work_alone:.2f} | {chosen} |")


if __name__ == "__main__":
    main()
