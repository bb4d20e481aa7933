"""Steps and Trainers on an NVIDIA or AMD GPU: ours with clipping, guard and step sums against what else there is.

    python -m tests.benchmarks.gpu                              # everything, in less than ten minutes
    python -m tests.benchmarks.gpu adamw --sizes 1M 100M 1B

Every candidate alternates with a control in one run, so that clocks and neighbours touch both alike; a row gives
medians, their ratio, how close the candidate comes to a plain device copy of as many bytes, its launches, and how long
the host is busy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim import kernels, optim
from lightning_optim.clipping import GlobalNorm
from lightning_optim.divergence import NonFiniteGradient, SpikeWindow, StepGuard
from lightning_optim.divergence.early_warning import EarlyWarning
from lightning_optim.kernels import symmetric
from lightning_optim.optim.newton_schulz import orthogonalize_stack
from lightning_optim.optim.ns_coefficients import iterations
from lightning_optim.step import StepPipeline

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
        most_tensors: Above it, it is left out: to compile it would take minutes.
    """

    name: str
    make: Callable[[list[Tensor]], Step]
    bytes_per_param: int
    most_tensors: int = 10**9


def ours(clip: bool = False, guard: bool = False, sums: bool = False, **options: Any) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        optimizer = optim.AdamW(params, LR, **options)
        if not clip:
            return optimizer.step
        loss = torch.ones((), device="cuda")
        watch = StepGuard(SpikeWindow(2), loss=lambda: loss, early_warning=EarlyWarning())
        detectors = [watch] if guard else [NonFiniteGradient()]

        def forget(record: Any) -> None:
            watch.read()

        StepPipeline(optimizer, clip=GlobalNorm(MAX_NORM), detectors=detectors, on_report=forget if sums else None)
        return optimizer.step

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


def lion(params: list[Tensor]) -> Step:
    return optim.Lion(params, LR).step


def optimi_lion(params: list[Tensor]) -> Step:
    import optimi

    step: Step = optimi.Lion(params, lr=LR, triton=True).step
    return step


def bitsandbytes_8bit(params: list[Tensor]) -> Step:
    step: Step = importlib.import_module("bitsandbytes").optim.AdamW8bit(params, LR).step
    return step


def torchao_8bit(params: list[Tensor]) -> Step:
    step: Step = importlib.import_module("torchao.optim").AdamW8bit(params, LR).step
    return step


def muon(params: list[Tensor]) -> Step:
    return optim.Muon(params, LR).step


def torch_muon(params: list[Tensor]) -> Step:
    return torch.optim.Muon(params, LR).step


ADAMW = (
    Candidate("ours", ours(), STEP_BYTES),
    Candidate("ours, clip and skip", ours(clip=True), STEP_BYTES + NORM_BYTES),
    Candidate("ours, clip, guard and all sums", ours(clip=True, guard=True, sums=True), STEP_BYTES + NORM_BYTES),
    Candidate("torch fused after clip_grad_norm_", torch_fused(clip=True), STEP_BYTES + 3 * NORM_BYTES),
    Candidate("torch compiled", torch_compiled, STEP_BYTES, most_tensors=500),
    Candidate("optimi", optimi, STEP_BYTES),
)
OTHERS = (
    Candidate("Lion", lion, 20),
    Candidate("optimi Lion", optimi_lion, 20),
    Candidate("AdamW, state_bits=8", ours(state_bits=8), 16),
    Candidate("bitsandbytes AdamW8bit", bitsandbytes_8bit, 16),
    Candidate("torchao AdamW8bit", torchao_8bit, 16),
)
MATRICES = (Candidate("Muon", muon, 0), Candidate("torch Muon", torch_muon, 0))


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


def matrices(layers: int, width: int) -> list[Tensor]:
    """Float32 matrices of a transformer with gradients."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    params = [torch.randn(shape, device="cuda").mul_(0.02).requires_grad_() for _ in range(layers) for shape in shapes]
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


def launches(step: Step) -> int:
    """Kernels that one step launches, copies aside."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    others = ("Memcpy", "Memset", "Optimizer", "cuda", "cuLaunch", "Activity")
    return sum(not event.name.startswith(others) for event in profile.events())


def compare(
    candidate: Candidate,
    make: Callable[[], list[Tensor]],
    label: str,
    rounds: int,
    bandwidth: float,
    control: Any = None,
) -> str:
    """Return one row of the table."""
    torch.manual_seed(0)
    params = make()
    total = sum(param.numel() for param in params)
    step, other = candidate.make(params), (control or torch_fused(clip=False))(make())
    for _ in range(3):
        step()
        other()
    pairs = [(milliseconds(step), milliseconds(other)) for _ in range(rounds)]
    device = statistics.median(own[0] for own, _ in pairs)
    host = statistics.median(own[1] for own, _ in pairs)
    fused = statistics.median(theirs[0] for _, theirs in pairs)
    achieved = total * candidate.bytes_per_param / device * 1e3
    return (
        f"| {candidate.name} | {label} | {device:.3f} | {device / fused:.2f} | "
        f"{achieved / 1e9:.0f} | {achieved / bandwidth:.0%} | {launches(step)} | {host:.2f} |"
    )


def rows(candidates: Sequence[Candidate], make: Callable[[], list[Tensor]], label: str, *arguments: Any) -> None:
    """Print a row for each candidate that can run."""
    for candidate in candidates:
        try:
            print(compare(candidate, make, label, *arguments), flush=True)
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"| {candidate.name} | {label} | {type(error).__name__}: {str(error)[:80]} | | | | | |", flush=True)
        torch.cuda.empty_cache()


def adamw(sizes: list[int], tensors: list[int], rounds: int, bandwidth: float) -> None:
    """Print AdamW by size and number of tensors, beside torch's fused AdamW."""
    for total in sizes:
        for count in tensors if total == max(sizes[0], 10**7) else tensors[:1]:
            if total * BYTES_HELD > 0.9 * torch.cuda.mem_get_info()[0]:
                print(f"| (all) | {total / 1e6:g} M in {count} | too little memory | | | | | |")
                continue
            able = [candidate for candidate in ADAMW if candidate.most_tensors >= count]
            rows(able, partial(model, total, count), f"{total / 1e6:g} M in {count}", rounds, bandwidth)


def others(sizes: list[int], tensors: list[int], rounds: int, bandwidth: float) -> None:
    """Print other optimizers beside torch's fused AdamW, and Muon beside torch's."""
    rows(OTHERS, partial(model, 10**8, 200), "100 M in 200", rounds, bandwidth)
    for width in (512, 1024, 2048):
        rows(MATRICES, partial(matrices, 12, width), f"12 layers of {width}", rounds, bandwidth, torch_muon)


def newton_schulz(sizes: list[int], tensors: list[int], rounds: int, bandwidth: float) -> None:
    """Print milliseconds of five iterations on one bf16 matrix: usual and Gram form, with whole and halved products."""
    print("\n| rows x columns | usual | usual, halved | Gram | Gram, halved |\n| --- | --: | --: | --: | --: |")
    schedule = iterations("keller", 5)
    for rows in (512, 1024, 2048, 4096, 8192):
        for columns in (rows, 4 * rows):
            x = torch.randn(rows, columns, device="cuda")
            found = []
            for gram in (False, True):
                for least in (2**31, 0):
                    symmetric.HALVED_FROM = least
                    symmetric.symmetric_products.cache_clear()
                    step = partial(orthogonalize_stack, [x], schedule, 1e-7, torch.bfloat16, gram)
                    step()
                    found.append(statistics.median(milliseconds(step)[0] for _ in range(rounds)))
            print(f"| {rows} x {columns} | {' | '.join(f'{time:.3f}' for time in found)} |", flush=True)


def trainer(sizes: list[int], tensors: list[int], rounds: int, bandwidth: float) -> None:
    """Print a Trainer with everything beside a bare one, by precision."""
    from tests.benchmarks.monitor import trainer_with_everything

    for precision in ("bf16-mixed", "16-mixed", "bf16-true", "32-true"):
        print(f"\n{precision}:\n", flush=True)
        options = {"accelerator": "gpu", "devices": 1, "precision": precision}
        print(trainer_with_everything(max(rounds // 3, 2), (16, 512), dim=768, only=3, **options), flush=True)


SECTIONS: dict[str, Callable[[list[int], list[int], int, float], None]] = {
    function.__name__: function for function in (adamw, others, newton_schulz, trainer)
}


def size(text: str) -> int:
    """`10M` as a number."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--sizes", nargs="+", type=size, default=[10**7, 10**8, 10**9], help="such as 1M 100M")
    parser.add_argument("--tensors", nargs="+", type=int, default=[200, 5000], help="tensors of a model")
    parser.add_argument("--rounds", type=int, default=15, help="of each of the two, alternating")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - SECTIONS.keys():
        sys.exit(f"No section {min(unknown)!r}. There are: {', '.join(SECTIONS)}.")
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, and this script measures nothing else. Run it on a machine with a GPU.")
    reason = kernels.why_not("triton", torch.device("cuda"))
    if reason is not None:
        sys.exit(f"The triton backend cannot run here: {reason}")

    bandwidth = copy_bandwidth()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "lightning"))
    print(f"{torch.cuda.get_device_name()}, {versions}; a plain copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print("| float32 | parameters | ms | to the control | GB/s | of a copy | launches | host ms |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for section in arguments.sections:
        SECTIONS[section](arguments.sizes, arguments.tensors, arguments.rounds, bandwidth)


if __name__ == "__main__":
    main()
