"""The backend interface, and the batch of tensors on one device that a backend updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_optim.kernels.averages import state_names
from lightning_optim.kernels.quantization import row_size
from lightning_optim.kernels.routes import Route
from lightning_optim.kernels.rules import Rule
from lightning_optim.kernels.sizes import Sizes
from lightning_optim.kernels.weight_decay import INITIAL


@dataclass(frozen=True)
class Batch:
    """Tensors that one rule updates in one call: same device, dtypes and flags, from any parameter groups.

    All lists have one entry per tensor. Tensors are local: a DTensor is represented by its shard on this rank.

    Args:
        rule: The rule that updates the tensors.
        params: Parameters of any shapes, written in place.
        grads: Gradients, never written. Each has the shape of its parameter; strides may differ.
        states: State tensors of the rule by name, written in place, in the dtype in which they are stored.
        scalar_states: 0-d state by name (`step`, and the rule's `scalar_state`), on the device of the parameters.
        groups: Parameter group of each tensor. `lr` may be a 0-d tensor.
        full_params: Parameters as the optimizer holds them, DTensors where sharded; sums over shards need them.
        decay_form: Form of weight decay, one of `weight_decay.APPLY_DECAY`.
        cautious: Whether components of the update that point against the gradient are left out.
        kahan: Whether `kahan_comp` is among the states and accumulates rounding errors, in the parameter's dtype or, if
            it is among the stochastic ones, as 8-bit corrections.
        stochastic: Names of the arrays ("param", states) that are rounded stochastically, to bfloat16 or to codes.
        plain: Whether kernels may run on the batch. If not, some tensor is more than its memory (a tensor subclass with
            semantics of its own), and only torch's operations may.
        rounding_keys: Key of the random numbers of each tensor, 0-d int64; empty without stochastic rounding.
        shared: New values of the rule's `shared`, shape [] each, on the device; filled in before `apply`.
        averages: Number of averages of the parameters, `ema_0` and so on, that the states have.
        kernels: What a backend keeps of its kernels from step to step, by a key of its own; it depends on no number.
        route: How ranks share the work of a tensor rule, a `routes.Route`; None if this rank does all of it.
        full_states: With a route, states of the rule as the optimizer holds them, DTensors where sharded.

    Attributes:
        grad_addresses: Addresses of the gradients, if the batch has been given these and no ``grads``.
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
    averages: int = 0
    kernels: dict[Any, Any] = field(default_factory=dict)
    route: Route | None = None
    full_states: list[dict[str, Tensor]] = field(default_factory=list)
    grad_addresses: np.ndarray | None = field(default=None, init=False)

    def give(self, addresses: np.ndarray | None) -> None:
        """Set the addresses of contiguous gradients, int64, [tensors], which replace ``grads``; None for ``grads``."""
        object.__setattr__(self, "grad_addresses", addresses)

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """States stored as 8-bit codes, in the order of `rule.state`; the scales of `exp_avg` are `exp_avg_scale`."""
        return tuple(name for name in self.rule.state if f"{name}_scale" in self.states[0]) if self.stochastic else ()

    @cached_property
    def corrected(self) -> bool:
        """Whether `kahan_comp` has 8-bit corrections."""
        return self.kahan and "kahan_comp" in self.stochastic

    @cached_property
    def row_sizes(self) -> tuple[int, ...] | None:
        """Size of the rows of each tensor to which blocks of 8-bit codes are confined; None if its states differ."""
        found = [
            {row_size(state[name].numel(), state[f"{name}_scale"].shape) for name in self.quantized}
            for state in self.states
        ]
        return tuple(sizes.pop() for sizes in found) if all(len(sizes) == 1 for sizes in found) else None

    @cached_property
    def state_arrays(self) -> list[list[Tensor]]:
        """State arrays as lists over tensors: the rule's, then compensation, initial weights, scales and averages."""
        names = [*self.rule.state, *(["kahan_comp"] if self.kahan else [])]
        names += [INITIAL] if self.decay_form == "toward_initial" else []
        names += [f"{name}_scale" for name in self.quantized]
        names += state_names(self.averages) if self.averages else ()
        return [[state[name] for state in self.states] for name in names]

    @cached_property
    def slot_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of parameter, gradient and `state_arrays`, from the first gradients that the batch has had."""
        return tuple(column[0].dtype for column in (self.params, self.grads, *self.state_arrays))

    @cached_property
    def largest(self) -> float:
        """Largest value of a second moment; cached, because every group needs it at every step."""
        return largest(self.dtype)

    @cached_property
    def written(self) -> list[Tensor]:
        """Tensors that a step writes elementwise, whose autograd version counters must be incremented."""
        shards = [param for param, whole in zip(self.params, self.full_params, strict=True) if param is not whole]
        return [*self.full_params, *shards, *(tensor for state in self.states for tensor in state.values())]

    @property
    def numel(self) -> tuple[int, ...]:
        """Number of elements of each local tensor."""
        return self.sizes.numel

    @cached_property
    def addresses(self) -> np.ndarray | None:
        """Addresses of parameters, gradients (filled in later) and states, int64, [tensors, slots].

        None if a tensor is not contiguous. The addresses are valid as long as the batch is: `Batches`, which keeps a
        batch from step to step, compares addresses, strides and storage sizes before each use.
        """
        columns = [self.params, *self.state_arrays]
        if not all(all(map(Tensor.is_contiguous, column)) for column in columns):
            return None
        rows = [list(map(Tensor.data_ptr, column)) for column in columns]
        rows.insert(1, [0] * len(self.params))
        return np.ascontiguousarray(np.array(rows, dtype=np.int64).T)

    @cached_property
    def counters(self) -> dict[str, list[np.ndarray] | Numbers]:
        """0-d numpy views of `scalar_states` by name, on the CPU only: reading thousands of tensors would be slow."""
        return {name: [state[name].numpy() for state in self.scalar_states] for name in self.scalar_states[0]}

    @cached_property
    def scalar_dtypes(self) -> dict[str, torch.dtype | None]:
        """Dtype of each of `scalar_states`, by name; None where tensors differ, of which some may have been loaded."""
        found = {name: {state[name].dtype for state in self.scalar_states} for name in self.scalar_states[0]}
        return {name: dtypes.pop() if len(dtypes) == 1 else None for name, dtypes in found.items()}

    def count_by(self, numbers: Callable[[Sequence[Tensor]], Numbers]) -> None:
        """Let ``numbers`` read and write `counters` where there are many of one dtype."""
        for name in self.counters:
            tensors = [state[name] for state in self.scalar_states]
            if len(tensors) >= MANY and self.scalar_dtypes[name] in (torch.float32, torch.float64):
                self.counters[name] = numbers(tensors)

    @cached_property
    def members(self) -> tuple[list[Mapping[str, Any]], np.ndarray]:
        """The different groups, and the index of each tensor's group among them, [tensors]."""
        different = {id(group): group for group in self.groups}
        index = {key: number for number, key in enumerate(different)}
        return list(different.values()), np.array([index[id(group)] for group in self.groups], dtype=np.int64)

    @cached_property
    def scalar_tables(self) -> tuple[bytes, bytes]:
        """Addresses of `scalar_states`, int64, [tensors, names], and the group of each tensor, as bytes of tables."""
        states = self.scalar_states
        addresses = [[state[name].data_ptr() for name in states[0]] for state in states]
        return np.array(addresses, dtype=np.int64).tobytes(), self.members[1].tobytes()

    @cached_property
    def sizes(self) -> Sizes:
        """Number of elements of each local tensor, with what follows from them."""
        return Sizes(tuple(map(Tensor.numel, self.params)))

    def take(self, rows: Sequence[int]) -> Batch:
        """Return the batch restricted to the tensors at the indices ``rows``."""
        if len(rows) == len(self.params):
            return self
        part = copy(self)
        # What is cached is of all tensors.
        cached = "state_arrays", "written", "sizes", "addresses", "counters", "members"
        for name in (*cached, "row_sizes", "scalar_dtypes", "scalar_tables"):
            part.__dict__.pop(name, None)
        for name in (
            "params",
            "grads",
            "states",
            "scalar_states",
            "groups",
            "full_params",
            "rounding_keys",
            "full_states",
        ):
            full = getattr(self, name)
            object.__setattr__(part, name, [full[row] for row in rows] if full else [])
        return part

    @cached_property
    def low_precision(self) -> bool:
        """Whether storing needs more than rounding to nearest: Kahan compensation or stochastic rounding."""
        return self.kahan or bool(self.stochastic)

    @cached_property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.params[0].device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float64 for float64 parameters, otherwise float32."""
        return arithmetic_dtype(self.params[0].dtype)


@cache
def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, otherwise float32: bf16 and fp16 are storage formats only."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(dtype: torch.dtype) -> float:
    """Return the largest value of a second moment with arithmetic in ``dtype``; it is finite in bfloat16 as well."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.bfloat16).max


MANY = 32
"""Number of tensors from which a compiled loop over objects is worth its compilation."""


class Numbers(Protocol):
    """The values of 0-d tensors of one dtype on the CPU; see `cpu.counters.CompiledNumbers`."""

    def read(self) -> np.ndarray:
        """Return the values, float64, [tensors], in an array that the next call may overwrite."""

    def write(self, values: np.ndarray) -> None:
        """Write new values, float64, [tensors]."""


class Watch(Protocol):
    """What notices changes of tensors without asking each of them in Python; see `cpu.objects.Watch`."""

    def gradients(self) -> np.ndarray | None:
        """Return the addresses of the gradients, int64, [gradients], or None if anything else may have changed."""


class Backend(ABC):
    """Base class of backends, which run rules over batches of tensors.

    The contract of `apply`, for one batch and each tensor i:

    1. If ``skip`` is non-zero, nothing changes, bit for bit, 0-d state included, and the sums are NaN. The device
       decides; the host does not wait. (On the CPU reading memory is free, and `apply` returns at once.)
    2. g = grad · `inverse_divisor` + `l2` · p, where `inverse_divisor` is ±1 / divisor, negative for `maximize`.
    3. For a rule with `sums`: one read-only pass of `sums_update`, sums over whole tensors, then `rescale`. (For a rule
       with `shared` this pass happened earlier, in `sums`, and `Batch.shared` holds its result.)
    4. delta, *state = update(p, g, *state, *scalars), in float32 (float64 for float64 parameters).
    5. With `cautious`, delta is 0 where delta·g ≤ 0, and multiplied by numel / max(count of the others, numel/1000).
    6. p ← p − change(p, delta, decay), cast to the stored dtype at the very end; state likewise. `change` is the
       function of `decay_form` in `weight_decay.APPLY_DECAY`; for `rescale`, the `norm_factor` of p − delta takes the
       place of `decay`. `kahan` and `stochastic` act as described in `rounding`.
       The averages `ema_0`, ... take their step towards p as it is stored.
    7. `step` += 1; other 0-d state takes the value that `scalars` returned; rounding keys advance.
    8. On request, the step sums of `stats.STEP_SUMS` with g without its L2 term, in float32, by sums in a fixed order
       over blocks and then over the blocks of a tensor, never by atomics.

    `scalars.scalar_columns` computes every per-tensor number above as float64 columns [tensors] on the batch's device,
    and `scalars.commit` performs (7); a compiled backend packs the columns it needs into one table and reads row i for
    tensor i.
    """

    name: str
    low_precision: ClassVar[bool] = False
    """Whether the backend implements `kahan` and `stochastic`; otherwise the reference backend runs such batches."""

    reads_skip: ClassVar[bool] = False
    """Whether its kernels read the flag wherever they run. For others, that of tensors on the CPU is read before."""

    watch: ClassVar[Any] = None
    """A class like `cpu.objects.Watch`, if the backend has one."""

    takes_addresses: ClassVar[bool] = False
    """Whether it runs elementwise rules on `Batch.grad_addresses`, without the gradients as objects."""

    numbers: ClassVar[Any] = None
    """A class like `cpu.counters.CompiledNumbers`, a faster `Numbers` of many tensors, if the backend has one."""

    @abstractmethod
    def why_not(self, device: torch.device) -> str | None:
        """Return the reason why this backend cannot run on ``device``, as a clause; None if it can."""

    @abstractmethod
    def supports(self, batch: Batch) -> bool:
        """Return whether `apply` can run ``batch``; otherwise the reference backend runs it."""

    @abstractmethod
    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """Compute the square sum of each of ``grads``.

        Args:
            grads: Dense, real, local tensors of any shapes, on one device and of one dtype.

        Returns:
            Shape [tensors], float64 where the device supports it. An entry is finite wherever its gradient is, although
            1e20² overflows float32.
        """

    def measure_at(self, addresses: np.ndarray, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Compute the same as `measure` of contiguous tensors at ``addresses``, int64, [tensors].

        Raises:
            NotImplementedError: The backend has no `watch`, which finds addresses.
        """
        raise NotImplementedError

    @abstractmethod
    def sums(self, batch: Batch, divisor: Tensor | None) -> dict[str, Tensor]:
        """Run only the pass of (3) and return the rule's `sums`.

        Args:
            batch: The tensors to read.
            divisor: Divisor of the gradients, shape [] or [tensors], on the device; None for 1.

        Returns:
            The sums by name, shape [tensors] each, float64 where the device supports it.
        """

    def begin(
        self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool
    ) -> Callable[[], Tensor | None]:
        """Start `apply` of a batch with a `route`, so that its tensors travel while other batches are updated.

        Args:
            batch: As for `apply`, of a tensor rule.
            divisor: As for `apply`.
            skip: As for `apply`; equal on all ranks of the route.
            collect: As for `apply`.

        Returns:
            Function that completes the update and returns the result of `apply`.

        Raises:
            NotImplementedError: The backend runs no tensor rules.
        """
        raise NotImplementedError

    @abstractmethod
    def apply(self, batch: Batch, *, divisor: Tensor | None, skip: Tensor | None, collect: bool) -> Tensor | None:
        """Update the batch under the contract of the class.

        Args:
            batch: The tensors to update.
            divisor: Divisor of the gradients, shape [] or [tensors], on the device; None for 1.
            skip: Flag, shape [], on the device; if non-zero, nothing changes. None to never skip.
            collect: Whether to return the step sums.

        Returns:
            The step sums, shape [tensors, columns of `stats.STEP_SUMS`], float32; None unless ``collect``.
        """
