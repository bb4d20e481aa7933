"""What cannot be updated in the backward pass, each refused with its reason and a way out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import ClipRule
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.divergence import Detector, NonFiniteGradient
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.optim import FusedOptimizer


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose parameters cannot be updated one by one.

    Raises:
        TypeError: It is not an optimizer of this package.
        ValueError: A rule needs sums over all gradients, or the parameters are on several devices.
    """
    label = type(optimizer).__name__
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{label} cannot update in the backward pass: needed is an optimizer of lightning_optim.optim, which can "
            "update each parameter by itself. For torch's optimizers there is one of the same name."
        )
    for group in optimizer.param_groups:
        rule = optimizer.rule_of(group)
        if isinstance(rule, UpdateRule) and rule.shared:
            raise ValueError(
                f"{label} cannot update in the backward pass: its {', '.join(rule.shared)} follow from sums over all "
                "gradients of a step, taken before any parameter changes. Use an optimizer with a learning rate of "
                "its own, such as AdamW, or keep the gradients."
            )
    devices = sorted({str(param.device) for group in optimizer.param_groups for param in group["params"]})
    if len(devices) > 1:
        raise ValueError(
            f"{label} has parameters on {', '.join(devices)}, whose gradients come in threads of their own. Needed is "
            "one device, or an optimizer for each."
        )


def check_rule(rule: ClipRule | None, use_last_norm: bool) -> None:
    """Refuse a clip rule that needs gradients that the backward pass has not computed yet.

    Raises:
        ValueError: The rule needs more than one gradient at a time; or ``use_last_norm`` without a need for it.
    """
    spans = None if rule is None else _spans(rule)
    each = "block_rms, agc, update_rms, momentum_ratio and value limit each tensor by itself"
    if spans == "norm" and not use_last_norm:
        raise ValueError(
            f"{rule!r} needs the norm of all gradients, which is not known before the backward pass is over. Set "
            f"use_last_norm=True to clip by the norm of the step before; or use another rule: {each}."
        )
    if spans == "step":
        raise ValueError(
            f"{rule!r} decides from all gradients of a step, which never exist together here. Use another rule: "
            f"{each}; global_norm and adagc can use the norm of the step before (use_last_norm=True). A rule of your "
            "own that looks at one tensor at a time says so by `spans = 'tensor'`."
        )
    if use_last_norm and spans != "norm":
        given = "no clip rule is given" if rule is None else f"{rule!r} needs no norm of all gradients"
        raise ValueError(f"Invalid use_last_norm=True: {given}. It is for global_norm and adagc; leave it out.")


def check_detectors(detectors: Sequence[Detector]) -> None:
    """Refuse detectors, apart from that of gradients that are not finite.

    Raises:
        ValueError: There is one that looks at a whole step.
    """
    for detector in detectors:
        if type(detector) is not NonFiniteGradient:
            raise ValueError(
                f"{type(detector).__name__} decides whether a step happens from all its gradients, and here the first "
                "parameters have been updated before the last gradients exist. Without it, a tensor whose gradient is "
                "not finite is left out (skip_nonfinite=True). Remove the detector (DivergenceGuard), or keep the "
                "gradients."
            )


def check_processes(params: Iterable[Tensor], shards: FlatShards | None) -> None:
    """Refuse parameters whose gradients are averaged over processes only after they have been accumulated.

    Raises:
        RuntimeError: Parameters are whole on each of several processes (DDP), or flat shards (FSDP1).
    """
    distributed = torch.distributed
    if shards is not None:
        raise RuntimeError(
            "FSDP's flat parameters get their gradients outside of autograd, out of sight of hooks. Use FSDP2 "
            "(fully_shard, Lightning's ModelParallelStrategy), or keep the gradients."
        )
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    if any(not hasattr(param, "placements") for param in params):
        raise RuntimeError(
            f"There are {distributed.get_world_size()} processes, and parameters that each of them has as a whole. "
            "DistributedDataParallel averages gradients over processes after the hooks of the backward pass, so each "
            "process would update with a gradient of its own. Use FSDP2 (fully_shard, Lightning's "
            "ModelParallelStrategy), which averages before, or keep the gradients."
        )


def check_scaler(optimizer: Optimizer) -> None:
    """Refuse the step of a GradScaler.

    Raises:
        RuntimeError: The optimizer has been given a loss scale or an overflow flag.
    """
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        raise RuntimeError(
            f"{type(optimizer).__name__} is stepped by a GradScaler, and its gradients have been used in the backward "
            "pass already, multiplied by the loss scale: whether any of them overflowed is known only when all are "
            "there. Use bf16, or keep the gradients. Weights have been updated with scaled gradients in this step."
        )


def check_histograms(kinds: Collection[str]) -> None:
    """Refuse histograms.

    Raises:
        RuntimeError: Some are asked for.
    """
    if kinds:
        raise RuntimeError(
            f"Histograms of {', '.join(sorted(kinds))} need all gradients of a step, which never exist together here. "
            "Leave out OptimizerMonitor(histograms=...), or keep the gradients."
        )


def _spans(rule: ClipRule) -> str:
    """Return what a rule depends on; a subclass that changes the decision has to say so again."""

    def depth(name: str) -> int:
        return next(i for i, one in enumerate(type(rule).__mro__) if name in vars(one))

    known = depth("spans") <= min(map(depth, ("__call__", "updated", "init_state")))
    return rule.spans if known else "step"
