"""What each clipping method costs beside the update, and the global norm beside torch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.clipping import ClipRule, get_clip_rule, list_clip_rules
from lightning_optim.core.stats import GradStats
from tests.benchmarks.models import transformer
from tests.benchmarks.timing import interleave, memory_copy, table

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "ours": lambda params: lo.optim.AdamW(params),
    "torch, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch": lambda params: torch.optim.AdamW(params, foreach=True),
}


def _stepper(
    parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], rule: ClipRule | None
) -> Callable[[], object]:
    """A step of a fresh optimizer over copies of the parameters, clipped by a pipeline."""
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    optimizer = make(copies)
    if rule is not None:
        lo.StepPipeline(optimizer, clip=rule)
    return optimizer.step


def clipping_methods() -> str:
    """A step with each method, for optimizers that take a divisor for each tensor, one in all, or none."""
    parameters = transformer(layers=4)  # there are eleven copies of it, each with its moments
    rows: list[list[object]] = []
    bare: dict[str, float] = {}
    for kind, make in OPTIMIZERS.items():
        candidates = {"none": _stepper(parameters, make, None)}
        for name in list_clip_rules():
            candidates[name] = _stepper(parameters, make, get_clip_rule(name)())
        timings = interleave(candidates, rounds=7)
        bare[kind] = timings["none"].ms
        for name in list_clip_rules():
            rows.append([kind, name, timings[name].ms, timings[name].over(timings["none"])])
    rows = [[kind, "none", ms, 1.0] for kind, ms in bare.items()] + rows
    return table(
        [f"AdamW, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters", "method", "ms", "over the bare step"],
        rows,
    )


def global_norm_and_torchs() -> str:
    """All that global-norm clipping adds, against ``clip_grad_norm_``, which rewrites the gradients."""
    parameters = transformer()
    count = sum(p.numel() for p in parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    rule = get_clip_rule("global_norm")()

    def ours() -> object:
        norm_sq = lo.kernels.measure(grads)
        return rule(GradStats(norm_sq, (len(grads),)))

    timings = interleave(
        {
            "torch's clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1e9),
            "ours: norms and divisor": ours,
            "copy of as many bytes as the gradients": memory_copy(4 * count),
        }
    )
    reference = timings["torch's clip_grad_norm_"]
    return table(
        ["global norm, 23.5 M parameters in 74 tensors", "ms", "over torch's"],
        [[name, timing.ms, timing.over(reference)] for name, timing in timings.items()],
    )


SECTIONS = (clipping_methods, global_norm_and_torchs)
