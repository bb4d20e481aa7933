"""What a backend is: it runs a rule over many tensors of one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.weight_decay import INITIAL


@dataclass(frozen=True)
class Batch:
    """Tensors that one rule updates in one call: same device, dtypes and flags; of any groups.

    All lists have one entry per tensor. Tensors are local: of a DTensor, its shard on this rank.

    Args:
        rule: What to do.
        params: Parameters, written in place.
        grads: Their gradients, never written. Shape as the parameter's; strides may differ.
        states: State tensors by name, written in place. `state` of the rule, in whatever dtype they are kept.
        scalar_states: 0-d state by name (`step`, and the rule's `scalar_state`), on the parameters' device.
        groups: The parameter group of each tensor. `lr` may be a 0-d tensor.
        full_params: The parameters as the optimizer holds them, DTensors where sharded: sums over shards need to know.
        decay_form: How parameters decay, one of `weight_decay.APPLY_DECAY`.
        cautious: Whether components of the update that point against the gradient are left out.
        kahan: Whether `kahan_comp` is among the states, in the parameter's dtype, and takes up what a step leaves out.
        stochastic: Names of the arrays ("param", states) that are rounded stochastically, to bfloat16 or to codes.
        plain: Whether kernels may run on it. Else some tensor is more than its memory, and torch's operations may.
        rounding_keys: If there are such: their random numbers' key, 0-d int64.
        shared: New values of the rule's `shared`, [] each, on the device; filled in before `apply`.
    """

    rule: Rule
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    scalar_states: list[dict[str, Tensor]]
    groups: list[Mapping[str, Any]]
    full_params: list[Tensor]
    cautious: bool
    decay_form: str = "shrink"
    kahan: bool = False
    stochastic: tuple[str, ...] = ()
    plain: bool = True
    rounding_keys: list[Tensor] = field(default_factory=list)
    shared: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """States that are kept as codes, in the order of `rule.state`; the scales of `exp_avg` are `exp_avg_scale`."""
        return tuple(name for name in self.rule.state if f"{name}_scale" in self.states[0]) if self.stochastic else ()

    @cached_property
    def state_arrays(self) -> list[list[Tensor]]:
        """The states, each a list over tensors: the rule's, compensation, initial weights, scales."""
        names = [*self.rule.state, *(["kahan_comp"] if self.kahan else [])]
        names += [INITIAL] if self.decay_form == "toward_initial" else []
        names += [f"{name}_scale" for name in self.quantized]
        return [[state[name] for state in self.states] for name in names]

    @cached_property
    def largest(self) -> float:
        """The most that a second moment can be; asked for each group at each step."""
        return largest(self.dtype)

    @cached_property
    def written(self) -> list[Tensor]:
        """What a step writes by elements, as autograd knows it."""
        shards = [param for param, whole in zip(self.params, self.full_params, strict=True) if param is not whole]
        return [*self.full_params, *shards, *(tensor for state in self.states for tensor in state.values())]

    @cached_property
    def numel(self) -> tuple[int, ...]:
        """Elements of each tensor here."""
        return tuple(map(Tensor.numel, self.params))

    @cached_property
    def addresses(self) -> np.ndarray | None:
        """Of parameters, gradients and states, [tensors, slots], the gradients' left open; None if one has gaps.

        They hold as long as the batch does: `Batches`, which keeps one from step to step, compares addresses, forms and
        sizes of memory before each use.
        """
        columns = [self.params, *self.state_arrays]
        if not all(all(map(Tensor.is_contiguous, column)) for column in columns):
            return None
        rows = [list(map(Tensor.data_ptr, column)) for column in columns]
        rows.insert(1, [0] * len(self.params))
        return np.ascontiguousarray(np.array(rows, dtype=np.int64).T)

    @cached_property
    def counters(self) -> dict[str, list[np.ndarray]]:
        """On the CPU, the memory of `scalar_states` by name: to read and write thousands of numbers as numbers."""
        return {name: [state[name].numpy() for state in self.scalar_states] for name in self.scalar_states[0]}

    def take(self, rows: Sequence[int]) -> Batch:
        """The batch of some of the tensors."""
        if len(rows) == len(self.params):
            return self
        part = copy(self)
        for name in ("state_arrays", "written", "numel", "addresses", "counters"):  # computed for all of the tensors
            part.__dict__.pop(name, None)
        for name in ("params", "grads", "states", "scalar_states", "groups", "full_params", "rounding_keys"):
            full = getattr(self, name)
            object.__setattr__(part, name, [full[row] for row in rows] if full else [])
        return part

    @cached_property
    def low_precision(self) -> bool:
        """Whether storing takes more than rounding to the nearest."""
        return self.kahan or bool(self.stochastic)

    @cached_property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.params[0].device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float64 for float64 parameters, else float32."""
        return arithmetic_dtype(self.params[0].dtype)


@cache
def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32: bf16 and fp16 are ways to store, not to compute."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(dtype: torch.dtype) -> float:
    """The most that a second moment can be, with arithmetic in ``dtype``: finite in bfloat16 as well."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.bfloat16).max


class Backend(ABC):
    """Runs rules over tensors.

    The contract of `apply`, for one batch and per tensor i:

    1. ``skip`` non-zero: nothing changes, bit for bit, 0-d state included; the sums are NaN. The device decides; the
       host does not wait. (On the CPU reading memory is free, and `apply` returns at once.)
    2. g = grad · `inverse_divisor` + `l2` · p, where `inverse_divisor` is ±1 / divisor, negative for `maximize`.
    3. A rule with `sums`: one read-only pass of `sums_update`, sums over whole tensors, `rescale`. (A rule with
       `shared` had that pass before, in `sums`, and `Batch.shared` holds what came of it.)
    4. delta, *state = update(p, g, *state, *scalars), in float32 (float64 for float64 parameters).
    5. `cautious`: delta is 0 where delta·g ≤ 0, and multiplied by numel / max(count of the others, numel/1000).
    6. p ← p − change(p, delta, decay), cast to the stored dtype at the very end; state likewise. `change` is that of
       `decay_form` in `weight_decay.APPLY_DECAY`; for `rescale`, `norm_factor` of the tensor's p − delta stands for
       `decay`. With `kahan` and `stochastic` as `rounding` says.
    7. `step` += 1; other 0-d state takes the value `scalars` returned; rounding keys advance.
    8. On request, the step sums of `stats.STEP_SUMS`, g without its L2 term, in float32, by fixed-order sums over
       blocks and then over a tensor's blocks, never by atomics.

    `scalars.scalar_columns` computes every per-tensor number above as float64 columns [tensors] on the batch's device,
    and `scalars.commit` does (7); a compiled backend packs the columns it needs into one table and reads row i for
    tensor i.
    """

    name: str
    low_precision: ClassVar[bool] = False
    """Whether it knows about `kahan` and `stochastic` of a batch. What it does not, the reference backend does."""

    reads_skip: ClassVar[bool] = False
    """Whether its kernels read the flag wherever they run. For others, that of tensors on the CPU is read before."""

    @abstractmethod
    def why_not(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device`` here, as a sentence; None if it can."""

    @abstractmethod
    def supports(self, batch: Batch) -> bool:
        """Whether `apply` can run ``batch``. What it cannot, the reference backend does."""

    @abstractmethod
    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Square sum of each of ``grads`` (dense, real, local, one device and dtype), [tensors].

        In float64 where the device has it, and finite wherever a gradient is: 1e20² is beyond float32.
        """

    @abstractmethod
    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """The rule's `sums` by name, each [tensors], float64 where the device has it: the pass of (3) alone."""

    @abstractmethod
    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Update the batch, as the class's contract says.

        Args:
            batch: What to update.
            divisor: Gradients are divided by it; shape [] or [tensors of the batch], on the device.
            skip: Non-zero leaves everything as it is; shape [], on the device.
            collect: Whether to return the step sums, [tensors of the batch, columns], float32.
        """
