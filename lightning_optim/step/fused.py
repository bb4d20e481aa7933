"""The decision of a step in one launch, where clip rule and detectors can be lines of one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim import kernels
from lightning_optim.clipping import Clipper, ClipRule, Divisor
from lightning_optim.core.fragment import Fragment
from lightning_optim.divergence import Detector, NonFiniteGradient, StepGuard
from lightning_optim.divergence.step_row import RowLayout
from lightning_optim.kernels.decision import LONGEST, MOST, HostRunner, Program, Runner
from lightning_optim.step.gradients import Gradients, decays_of, numbers
from lightning_optim.step.one_step import OneStep


@dataclass(frozen=True)
class Decided:
    """What the program has decided of a step, to be adopted at its end.

    Args:
        counts: Clipped and skipped steps with this one, int64, shape [2].
        norm: Norm of the gradients, shape [].
        clip_state: State of the clip rule after the step.
        guard_state: State of the guard after the step.
        row: Row of the step for the guard; None without one.
        layout: Its layout.
        group_names: Name of each parameter group.
    """

    counts: Tensor
    norm: Tensor
    clip_state: dict[str, Tensor]
    guard_state: dict[str, Tensor]
    row: Tensor | None
    layout: RowLayout
    group_names: tuple[str, ...]


class FusedDecision:
    """Decides a step by one program: over numpy arrays on the CPU, by Triton on an accelerator.

    It is the decision of clip rule and guard in one launch, whatever the number of tensors. What it cannot decide,
    because a rule has no fragment, a gradient is a shard, or there is another detector, which may read what clipping
    leaves of the gradients, is left to the operations of rule and detectors.

    Args:
        clipper: The clip rule and its state; None for no clipping.
        detectors: The detectors. Any of them makes a gradient that is not finite skip the step.
        runner: What runs the program; None for the one of the device.
    """

    def __init__(self, clipper: Clipper | None, detectors: Sequence[Detector], runner: Runner | None = None) -> None:
        self._clipper = clipper
        self._guard = next((d for d in detectors if type(d) is StepGuard), None)
        has_others = any(d is not self._guard and type(d) is not NonFiniteGradient for d in detectors)
        self._is_able = bool(clipper or detectors) and not has_others
        self._can_skip = bool(detectors)
        self._runner = runner
        self._rule: tuple[ClipRule, dict[str, Any]] | None = None
        self._programs: dict[Any, Program] = {}
        self._fragments: dict[tuple[str, ...], Fragment | None] = {}
        self._vectors: tuple[Any, list[Any]] | None = None
        self._numbers: tuple[Any, Any] | None = None
        self._places: tuple[Any, Any] | None = None

    def decide(self, step: OneStep, incoming: Tensor | None, steps: int, counts: Tensor) -> Decided | None:
        """Decide a step, and set its ``clip`` and ``skip``.

        Args:
            step: The step, whose gradients have been collected.
            incoming: Flag of a GradScaler, shape [], non-zero to skip; None for none.
            steps: Optimizer steps so far.
            counts: Clipped and skipped steps so far, int64, shape [2].

        Returns:
            What to `adopt` at the end of the step; None if the program cannot decide it.
        """
        gradients, device = step.gradients, counts.device
        if not self._is_able or not gradients.plain or gradients.shards is not None:
            return None
        if gradients.grads[0].device != device or (self._guard is not None and self._guard.detectors):
            return None
        run = self._runner = self._runner or runner_for(device)
        names = step.stats.group_names
        if run is None or not self._fits(gradients, names, device):
            return None
        loss = None if self._guard is None else self._guard.begin()
        has_incoming = incoming is not None
        program = self._program(names, loss is not None, has_incoming, len(gradients.params) != gradients.parameters)
        given: dict[str, Any] = {"norm_sq": step.stats.norm_sq}
        if loss is not None:
            given["loss"] = loss
        if incoming is not None:
            given["incoming"] = incoming.reshape(()).to(device, torch.float32, non_blocking=True)
        if program.sparse:
            given["place"] = self._uploaded_places(gradients, run)
        if program.vectors:
            given.update(zip(program.vectors, self._uploaded_vectors(program, gradients, names, run), strict=True))
        clip_state: Mapping[str, Tensor] = {}
        guard_state: Mapping[str, Tensor] = {}
        numbers: tuple[float, ...] = ()
        if self._clipper is not None:
            numbers += self._clipper.rule.numbers(self._clipper.begin(steps, gradients.parameters, device))
            clip_state = self._clipper.values
        if self._guard is not None:
            numbers += self._guard.numbers()
            guard_state = self._guard.states(gradients.parameters, device)
        if numbers:
            given["numbers"] = self._uploaded_numbers(numbers, run)
        before = {**clip_state, **guard_state, "counts": counts}
        tensors = len(gradients.params)
        results: dict[str, Any] = {f"new_{name}": (value.shape, value.dtype) for name, value in before.items()}
        results |= {"norm": ((), torch.float64), "skip": ((), torch.float32)}
        results["divisor"] = (tensors,) if program.per_tensor else (), torch.float64
        if program.guard is not None:
            results["row"] = (program.row_length(tensors),), torch.float64
        made = run.run(program, {**given, **before}, results)
        step.skip = made["skip"] if self._can_skip or has_incoming else None
        if self._clipper is not None:
            step.clip = Divisor(made["divisor"])
        return Decided(
            counts=made["new_counts"],
            norm=made["norm"],
            clip_state={name: made[f"new_{name}"] for name in clip_state},
            guard_state={name: made[f"new_{name}"] for name in guard_state},
            row=made.get("row"),
            layout=RowLayout(gradients.group_sizes, loss is not None, program.sparse),
            group_names=names,
        )

    def adopt(self, decided: Decided) -> None:
        """End a step: take over the states that its decision has led to.

        Args:
            decided: As `decide` returned it.
        """
        if self._clipper is not None:
            self._clipper.adopt(decided.clip_state)
        if self._guard is not None:
            assert decided.row is not None
            self._guard.adopt(decided.guard_state, decided.row, decided.layout, decided.group_names)

    def _fits(self, gradients: Gradients, names: tuple[str, ...], device: torch.device) -> bool:
        """Return whether the present clip rule, if there is one, has a fragment, and ``device`` can run the program."""
        if device.type != "cpu" and gradients.parameters > MOST:
            return False
        if self._clipper is None:
            return True
        rule = self._clipper.rule
        if not _is_known(type(rule)):
            return False
        self._follow(rule)
        if names not in self._fragments:
            self._fragments[names] = rule.fragment(names)
        fragment = self._fragments[names]
        return fragment is not None and (device.type == "cpu" or fragment.longest <= LONGEST)

    def _follow(self, rule: ClipRule) -> None:
        """Drop the programs of another rule, or of other settings, which are constants in a program."""
        if self._rule is None or self._rule[0] is not rule or self._rule[1] != vars(rule):
            settings = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(rule).items()}
            self._rule, self._vectors = (rule, settings), None
            self._programs, self._fragments = {}, {}

    def _program(self, names: tuple[str, ...], has_loss: bool, has_incoming: bool, sparse: bool) -> Program:
        key = names, has_loss, has_incoming, sparse, None if self._guard is None else tuple(self._guard.skip)
        if key not in self._programs:
            self._programs[key] = Program(
                clip=self._fragments.get(names),
                per_tensor=self._clipper is not None and self._clipper.rule.per_tensor,
                guard=None if self._guard is None else self._guard.fragment(has_loss),
                has_ratios=self._guard is not None and self._guard.moments is not None,
                has_loss=has_loss,
                has_incoming=has_incoming,
                can_skip=self._can_skip,
                sparse=sparse,
            )
        return self._programs[key]

    def _uploaded_numbers(self, given: tuple[float, ...], run: Runner) -> Any:
        if self._numbers is None or self._numbers[0] != given:
            self._numbers = given, run.upload(np.array(given))
        return self._numbers[1]

    def _uploaded_vectors(
        self, program: Program, gradients: Gradients, names: tuple[str, ...], run: Runner
    ) -> list[Any]:
        groups = gradients.optimizer.param_groups
        sizes = tuple(len(group["params"]) for group in groups)
        decays = tuple(map(decays_of, groups))
        # A parameter may have been replaced by one of another size, or resized; the guard does not ask for sizes.
        numel = gradients.numel() if program.clip is not None and program.clip.vectors else ()
        key = names, sizes, decays, numel
        if self._vectors is None or self._vectors[0] != key:
            params = [param for group in groups for param in group["params"]]
            owners = [index for index, size in enumerate(sizes) for _ in range(size)]
            rows: list[Sequence[float]] = []
            if self._clipper is not None:
                rows += self._clipper.rule.vectors([numbers(p) for p in params], names, owners)
            if self._guard is not None:
                rows += self._guard.vectors(decays, sizes)
            self._vectors = key, [run.upload(np.array(row, dtype=np.float64)) for row in rows]
        return self._vectors[1]

    def _uploaded_places(self, gradients: Gradients, run: Runner) -> Any:
        """Return the index of each parameter among those with a gradient, int64, -1 for one without."""
        there = [p.grad is not None for group in gradients.optimizer.param_groups for p in group["params"]]
        if self._places is None or self._places[0] != there:
            has = np.array(there)
            self._places = there, run.upload(np.where(has, np.cumsum(has) - 1, -1))
        return self._places[1]


@cache
def _is_known(kind: type[ClipRule]) -> bool:
    """Return whether the fragment of a rule is that of its decision, which a subclass may have changed."""

    def depth(name: str) -> int:
        return next(i for i, one in enumerate(kind.__mro__) if name in vars(one))

    return depth("fragment") <= min(map(depth, ("__call__", "updated", "init_state")))


def runner_for(device: torch.device) -> Runner | None:
    """Return what runs programs on a device; None if nothing does."""
    if device.type == "cpu":
        return HostRunner()
    if device.type == "cuda" and kernels.choose("auto", device).name == "triton":
        from lightning_optim.kernels.triton.decision import DeviceRunner

        return DeviceRunner(device)
    return None
