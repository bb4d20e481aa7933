"""AdamW on an NVIDIA or AMD GPU: ours with clipping, skipping and step sums against what else there is.

    python -m tests.benchmarks.gpu_optimizers --sizes 1M 100M 1B

Every candidate alternates with torch's fused AdamW in one run, so that clocks and neighbours touch both alike; a row
gives medians, their ratio, and how close the candidate comes to a plain device copy of as many bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim import kernels, optim

LR, MAX_NORM = 1e-4, 1.0
STEP_BYTES = 28  # per float32 parameter: read weight, gradient and two moments, write all but the gradient
NORM_BYTES = 4  # one more read of the gradient
BYTES_HELD = 2 * 16  # two models with their gradients and moments, per parameter

Step = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """One way to take a step.

    Args:
        name: Shown in the table.
        make: A step over parameters that have gradients.
        bytes_per_param: What it must at least move.
    """

    name: str
    make: Callable[[list[Tensor]], Step]
    bytes_per_param: int


def ours(clip: bool, sums: bool) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        optimizer = optim.AdamW(params, LR, backend="triton")
        optimizer.collect_step_stats = sums

        def step() -> None:
            if clip:
                norm = kernels.measure([p.grad for p in params if p.grad is not None]).sum().sqrt()
                optimizer.divisor = (norm / MAX_NORM).clamp(min=1.0)
                optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()

        return step

    return make


def torch_fused(clip: bool) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        optimizer = torch.optim.AdamW(params, LR, fused=True)

        def step() -> None:
            if clip:
                # It rewrites the gradients, by a coefficient that is 1 from the second time on: the same work.
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return step

    return make


def torch_compiled(params: list[Tensor]) -> Step:
    optimizer = torch.optim.AdamW(params, torch.tensor(LR), foreach=True, capturable=True)
    compiled: Step = torch.compile(optimizer.step, fullgraph=False)
    return compiled


def optimi(params: list[Tensor]) -> Step:
    import optimi

    step: Step = optimi.AdamW(params, lr=LR, betas=(0.9, 0.999), eps=1e-8, triton=True).step
    return step


CANDIDATES = (
    Candidate("ours", ours(clip=False, sums=False), STEP_BYTES),
    Candidate("ours, clip and skip", ours(clip=True, sums=False), STEP_BYTES + NORM_BYTES),
    Candidate("ours, clip, skip and all sums", ours(clip=True, sums=True), STEP_BYTES + NORM_BYTES),
    Candidate("torch fused after clip_grad_norm_", torch_fused(clip=True), STEP_BYTES + 3 * NORM_BYTES),
    Candidate("torch compiled", torch_compiled, STEP_BYTES),
    Candidate("optimi", optimi, STEP_BYTES),
)


def model(total: int, tensors: int) -> list[Tensor]:
    """Float32 parameters with gradients: as many vectors as matrices, as in a transformer."""
    pairs = max(tensors // 2, 1)
    vector = min(1024, total // pairs // 2)
    params = [
        torch.randn(size, device="cuda").mul_(0.02).requires_grad_()
        for _ in range(pairs)
        for size in (total // pairs - vector, vector)
    ]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)
    return params


def milliseconds(step: Step) -> tuple[float, float]:
    """Of one step: of the device's work, and of the host until it may go on."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # some 10 ms, in which the host gets ahead: no launch is waited for
    start.record()
    began = time.perf_counter()
    step()
    host = (time.perf_counter() - began) * 1e3
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), host


def copy_bandwidth() -> float:
    """Bytes read and written per second by a plain copy, the best of a few."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source))[0] for _ in range(20))
    return 2 * source.numel() * source.element_size() / best * 1e3


def compare(candidate: Candidate, total: int, tensors: int, rounds: int, bandwidth: float) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    step, control = candidate.make(model(total, tensors)), torch_fused(clip=False)(model(total, tensors))
    for _ in range(3):
        step()
        control()
    pairs = [(milliseconds(step), milliseconds(control)) for _ in range(rounds)]
    device = statistics.median(own[0] for own, _ in pairs)
    host = statistics.median(own[1] for own, _ in pairs)
    fused = statistics.median(other[0] for _, other in pairs)
    achieved = total * candidate.bytes_per_param / device * 1e3
    return (
        f"| {candidate.name} | {total / 1e6:g} M | {tensors} | {device:.3f} | {device / fused:.2f} | "
        f"{achieved / 1e9:.0f} | {achieved / bandwidth:.0%} | {host:.2f} |"
    )


def size(text: str) -> int:
    """`10M` as a number."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size, default=[10**6, 10**7, 10**8, 10**9], help="such as 1M 100M")
    parser.add_argument("--tensors", nargs="+", type=int, default=[200], help="tensors that a model is divided into")
    parser.add_argument("--rounds", type=int, default=25, help="of each of the two, alternating")
    parser.add_argument("--only", default="", help="candidates whose name contains this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, and this script measures nothing else. Run it on a machine with a GPU.")
    reason = kernels.why_not("triton", torch.device("cuda"))
    if reason is not None:
        sys.exit(f"The triton backend cannot run here: {reason}")

    bandwidth = copy_bandwidth()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    print(f"{torch.cuda.get_device_name()}, {versions}; a plain copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print("| AdamW, float32 | parameters | tensors | ms | to torch fused | GB/s | of a copy | host ms |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for total in arguments.sizes:
        for tensors in arguments.tensors:
            if total * BYTES_HELD > 0.9 * torch.cuda.mem_get_info()[0]:
                print(f"| (all) | {total / 1e6:g} M | {tensors} | too little memory | | | | |")
                continue
            for candidate in CANDIDATES:
                if arguments.only not in candidate.name:
                    continue
                try:
                    print(compare(candidate, total, tensors, arguments.rounds, bandwidth), flush=True)
                except ImportError as error:
                    print(f"| {candidate.name} | {total / 1e6:g} M | {tensors} | {error} | | | | |")
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
