"""Our optimizers on the CPU against the fastest published ones, and what their cost depends on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.kernels.rules import UpdateRule
from tests.benchmarks.models import cut, matrices, of_shape, transformer
from tests.benchmarks.peers import peers
from tests.benchmarks.timing import interleave, memory_copy, table

# Muon, NorMuon and SOAP are bound by matrix products, not by memory.
ON_MATRICES = ("muon", "normuon", "soap")


def stepper(
    parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[], object]:
    """A step of a fresh optimizer over copies of the parameters."""
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    optimizer = make(copies)
    if hasattr(optimizer, "train"):  # schedule-free optimizers want to be told
        optimizer.train()
    return optimizer.step


def adamw_with_everything() -> str:
    """AdamW with clipping, skipping and all step sums, against torch's fused AdamW after clip_grad_norm_."""
    parameters = transformer()
    count = sum(p.numel() for p in parameters)

    def ours(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = lo.optim.AdamW(params)
        optimizer.collect_step_stats = True
        optimizer.found_inf = torch.zeros(())

        def measure_and_clip(*_: object) -> None:
            norm_sq = lo.kernels.measure([p.grad for p in params])
            optimizer.divisor = norm_sq.sum().sqrt().clamp(min=1.0)

        optimizer.register_step_pre_hook(measure_and_clip)
        return optimizer

    def torchs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, fused=True)

        def clip_gradients(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)

        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    def clip() -> object:
        return torch.nn.utils.clip_grad_norm_(parameters, 1e9)

    grads = [p.grad for p in parameters]
    timings = interleave(
        {
            "ours: clip + skip + all sums": stepper(parameters, ours),
            "torch fused, clip_grad_norm_, no sums": stepper(parameters, torchs),
            "ours: update alone": stepper(parameters, lambda p: lo.optim.AdamW(p)),
            "torch fused: update alone": stepper(parameters, lambda p: torch.optim.AdamW(p, fused=True)),
            "copy of 32 bytes per parameter": memory_copy(32 * count),
            "copy of 28 bytes per parameter": memory_copy(28 * count),
            "ours: norms of the gradients": lambda: lo.kernels.measure(grads),
            "torch clip_grad_norm_": clip,
        }
    )
    reference = timings["torch fused, clip_grad_norm_, no sums"]
    limit = timings["copy of 32 bytes per parameter"]
    return table(
        ["AdamW, 23.5 M parameters in 74 tensors", "ms", "over torch with clipping", "over the memory limit"],
        [[name, timing.ms, timing.over(reference), timing.over(limit)] for name, timing in timings.items()],
    )


def traffic(cls: type[lo.optim.FusedOptimizer], parameters: list[nn.Parameter], kwargs: dict[str, float]) -> int | None:
    """Bytes that a step of an elementwise optimizer moves at least: what it reads, and what of that it writes back."""
    optimizer = cls([nn.Parameter(torch.zeros(4096))], **kwargs)
    rule = optimizer.rule(optimizer.param_groups[0])
    if not isinstance(rule, UpdateRule):
        return None
    arrays = 2 + len(rule.state)  # parameter, gradient, state; all but the gradient are written
    return 4 * (arrays + arrays - 1 + (arrays if rule.sums else 0)) * sum(p.numel() for p in parameters)


def each_against_its_fastest_peer() -> str:
    """One row per optimizer."""
    rows: list[list[object]] = []
    for name in lo.optim.list_optimizers():
        parameters = matrices() if name in ON_MATRICES else transformer()
        cls = lo.optim.get_optimizer_class(name)
        kwargs = {"momentum": 0.9} if name in ("sgd", "lars") else {}
        candidates = {"ours": stepper(parameters, partial(cls, **kwargs))}
        for peer, make in peers(name).items():
            try:
                candidates[peer] = stepper(parameters, make)
                candidates[peer]()
            except (TypeError, ValueError, RuntimeError) as error:
                print(f"  {name}: {peer} cannot run here: {error}")
                candidates.pop(peer, None)
        slow = name in ON_MATRICES
        moved = traffic(cls, parameters, kwargs)
        if moved is not None:
            candidates["copy"] = memory_copy(moved)
        timings = interleave(candidates, rounds=5 if slow else 15, warmup=2 if slow else 3)
        ours, copied = timings.pop("ours"), timings.pop("copy", None)
        limit = "" if copied is None else ours.over(copied)
        fastest = min(timings, key=lambda peer: timings[peer].ms, default=None)
        if fastest is None:
            rows.append([name, ours.ms, "", "", "", limit])
        else:
            rows.append([name, ours.ms, fastest, timings[fastest].ms, ours.over(timings[fastest]), limit])
        print("  " + " ".join(str(cell) for cell in rows[-1]), flush=True)
    return table(
        ["optimizer", "ours, ms", "fastest published", "its ms", "ours / its", "ours / copy of the same bytes"], rows
    )


def muon_by_width() -> str:
    """The hidden matrices of 12-layer transformers; the wider, the more of the time is in matrix products."""
    return _muon({f"{dim}, MLPs of 4:1": matrices(dim=dim) for dim in (64, 128, 256, 384)}, "width of 12 layers")


def muon_by_aspect() -> str:
    """Matrices of one number of elements and ever higher aspect ratios."""
    shapes = {aspect: (384, 384 * aspect) for aspect in (1, 2, 3, 4, 8)}
    given = {
        f"{rows} x {columns}": of_shape((rows, columns), 48 // aspect) for aspect, (rows, columns) in shapes.items()
    }
    return _muon(given, "48 or fewer matrices")


def _muon(given: dict[str, list[nn.Parameter]], title: str) -> str:
    rows: list[list[object]] = []
    for name, parameters in given.items():
        candidates = {"ours": stepper(parameters, lo.optim.Muon)}
        candidates |= {peer: stepper(parameters, make) for peer, make in peers("muon").items()}
        timings = interleave(candidates, rounds=5, warmup=1)
        ours = timings.pop("ours")
        fastest = min(timings, key=lambda peer: timings[peer].ms)
        rows.append([name, ours.ms, *(timing.ms for timing in timings.values()), ours.over(timings[fastest])])
        print("  " + " ".join(str(cell) for cell in rows[-1]), flush=True)
    return table([title, "ours, ms", *(f"{peer}, ms" for peer in timings), "ours / the fastest"], rows)


def by_number_of_tensors() -> str:
    """AdamW over 10 M parameters cut into ever more tensors."""
    rows: list[list[object]] = []
    for tensors in (10, 100, 1_000, 10_000):
        parameters = cut(10_000_000, tensors)
        timings = interleave(
            {
                "ours": stepper(parameters, lambda p: lo.optim.AdamW(p)),
                "torch": stepper(parameters, lambda p: torch.optim.AdamW(p, fused=True)),
            }
        )
        rows.append([tensors, timings["ours"].ms, timings["torch"].ms, timings["ours"].over(timings["torch"])])
    return table(["tensors (10 M parameters in all)", "AdamW, ms", "torch fused, ms", "ratio"], rows)


def by_size() -> str:
    """AdamW over ever more parameters in 100 tensors."""
    rows: list[list[object]] = []
    for millions in (1, 10, 50, 200):
        parameters = cut(millions * 1_000_000, 100)
        timings = interleave(
            {
                "ours": stepper(parameters, lambda p: lo.optim.AdamW(p)),
                "torch": stepper(parameters, lambda p: torch.optim.AdamW(p, fused=True)),
                "copy": memory_copy(28 * millions * 1_000_000),
            },
            rounds=7 if millions == 200 else 15,
        )
        ours = timings["ours"]
        rows.append(
            [f"{millions} M", ours.ms, timings["torch"].ms, ours.over(timings["torch"]), ours.over(timings["copy"])]
        )
    return table(["parameters (100 tensors)", "AdamW, ms", "torch fused, ms", "ratio", "over the memory limit"], rows)


def first_step_and_memory() -> str:
    """What the first step of each optimizer costs in this process, and the state it leaves."""
    rows: list[list[object]] = []
    for name in lo.optim.list_optimizers():
        parameters = matrices(layers=2) if name in ON_MATRICES else transformer(layers=2)
        optimizer = lo.optim.get_optimizer_class(name)(parameters)  # type: ignore[call-arg]
        start = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - start
        state = sum(
            value.numel() * value.element_size()
            for per_parameter in optimizer.state.values()
            for value in per_parameter.values()
            if isinstance(value, torch.Tensor)
        )
        rows.append([name, seconds, state / sum(p.numel() for p in parameters)])
    return table(["optimizer", "first step, s (compiled code from disk)", "state, bytes per parameter"], rows)


SECTIONS = (
    adamw_with_everything,
    each_against_its_fastest_peer,
    muon_by_width,
    muon_by_aspect,
    by_number_of_tensors,
    by_size,
    first_step_and_memory,
)
