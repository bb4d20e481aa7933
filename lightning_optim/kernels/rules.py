"""What an optimizer is, without storage: the arithmetic of one step, and the names of its state.

A rule is stateless. Where tensors live, how they are cast, in which order blocks are visited, weight decay, clipping,
`maximize`, `cautious`, skipping and statistics belong to the backend and are the same for every rule.
"""

from __future__ import annotations

import builtins
import inspect
import math
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.core.host import widest_dtype

Scalar = Any
"""A float on the host, or a float64 tensor, [] or [tensors], on a device whose memory the host must not read."""


# The named functions. In `scalars` and `rescale` they are these, and take floats and tensors alike; in `update` and
# `sums_update` every backend puts its own in their place. Both sides must agree on NaN: it passes through
# maximum, minimum and where, and sign(NaN) is 0 as in torch.


def sqrt(x: Scalar) -> Scalar:
    """Square root."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def absolute(x: Scalar) -> Scalar:
    """|x|."""
    return abs(x)


def sign(x: Scalar) -> Scalar:
    """-1, 0 or 1."""
    return torch.sign(x) if isinstance(x, Tensor) else float((x > 0) - (x < 0))


def where(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    """``x`` where ``condition`` holds, else ``y``. Both are evaluated."""
    if isinstance(condition, Tensor):
        # Two numbers would make a float32 tensor, whatever the precision around them.
        wide = widest_dtype(condition.device)
        x, y = (v if isinstance(v, Tensor) else condition.new_full((), v, dtype=wide) for v in (x, y))
        return torch.where(condition, x, y)
    return x if condition else y


def maximum(x: Scalar, y: Scalar) -> Scalar:
    """The larger; NaN if either is."""
    return where((x > y) | (x != x), x, y)


def minimum(x: Scalar, y: Scalar) -> Scalar:
    """The smaller; NaN if either is."""
    return where((x < y) | (x != x), x, y)


NAMED_FUNCTIONS = ("sqrt", "absolute", "sign", "where", "maximum", "minimum")
"""What `update` may call, beside plain helper functions built from the same."""


def rebind(
    function: Callable[..., Any],
    named: Mapping[str, Callable[..., Any]],
    compiler: Callable[[Any], Any] = lambda function: function,
) -> Any:
    """``function`` with the named functions replaced by a backend's own, helpers it calls included.

    Args:
        function: A plain Python function: arithmetic, the `NAMED_FUNCTIONS`, and helpers made of the same.
        named: The backend's implementations, by name.
        compiler: Applied to the function and to each helper, innermost first (`numba.njit`, `triton.jit`).

    Raises:
        TypeError: The function uses a name that is neither a helper nor one of the `NAMED_FUNCTIONS`.
    """
    bound: dict[str, Any] = {"__builtins__": builtins, "__name__": function.__module__}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if name in named:
            bound[name] = named[name]
        elif isinstance(value, types.FunctionType):
            bound[name] = rebind(value, named, compiler)
        else:
            raise TypeError(f"{function.__qualname__} uses {name!r}; a rule may use {', '.join(NAMED_FUNCTIONS)} only")
    return compiler(types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__))


class Rule:
    """What elementwise and tensor rules have in common."""

    state: ClassVar[tuple[str, ...]] = ()
    """Checkpoint keys of the tensors kept per parameter, in torch's words. Permanent."""

    counts_steps: ClassVar[bool] = True
    """Whether `step`, a 0-d float32 tensor per parameter, is kept: updates taken so far, skipped ones not counted."""

    scalar_state: ClassVar[Mapping[str, float]] = types.MappingProxyType({})
    """Further 0-d state per parameter, with its first value (NAdam's `mu_product`). `scalars` gets the old value as a
    keyword and returns the new one under the same name. Kept in float64, so that products and sums over a million steps
    keep moving."""

    set_aside: ClassVar[tuple[str, ...]] = ()
    """Further state that a parameter may have, of its shape, and that steps do not see."""

    counts_calls: ClassVar[bool] = False
    """Whether the host counts calls of `step`, skipped or not, in ``group["calls"]``: for rules that must decide on the
    host what a step does, on devices whose memory it must not read. On the CPU a rule may read `step` instead."""

    first_moment: ClassVar[str | None] = None
    """The state that plays m in the step sums."""

    second_moment: ClassVar[str | None] = None
    """The state that plays v in the step sums: v̂ = v / bias_correction2, if `scalars` returns `bias_correction2_sqrt`,
    and v otherwise; `eps` is the group's."""

    compressible: ClassVar[Mapping[str, bool]] = types.MappingProxyType({})
    """States that `state_bits` may keep in 16 or 8 bits, and whether each has a sign: moments, which start at 0 and
    stand for averages. The others stay as they are. Without any, a rule refuses `state_bits`."""

    decays_beside: ClassVar[bool] = True
    """Whether weights decay outside of `update`, so that the step sums can tell decay's part."""

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """The numbers of this step, in float64: learning rate, betas, 1 − beta, bias corrections.

        Written once for two callers: on the host ``step`` is a float; on a device whose memory the host must not read
        it is a float64 tensor [tensors], and the same arithmetic runs there, because only the device knows which steps
        were skipped. So: arithmetic and the named functions, no `if` on ``step``.

        Args:
            group: The parameter group; `lr` is a float, or a 0-d device tensor.
            step: Number of this update, from 1. (0-d state `step` plus one; 1 for a rule that does not count.)
            scalar_state: Old values of `scalar_state`.

        Returns:
            The scalars of `update`, by name; new values of `scalar_state`; `decay`, where it is not what `decay` says
            at this step.
        """
        raise NotImplementedError

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        """State of a parameter before its first step, by name.

        An elementwise rule leaves out what begins at zero, and gives a number, or a tensor like the parameter, which is
        copied. A tensor rule gives everything as new tensors, which may differ from parameter to parameter; `state`
        then names what all have, if anything.
        """
        return {}

    def why_not(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Why this rule cannot update ``param`` of ``group``, as a sentence; None if it can."""
        return None

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """The pair (c, l2): weights shrink by c·w beside `update`, and l2·w is part of the gradient.

        Override in a rule that decays in its own place, which then returns (0, 0) here and λ among its `scalars`.

        Args:
            group: The parameter group.
            usual: `weight_decay.group_decay` of the group.
        """
        return usual


class UpdateRule(Rule):
    """An elementwise optimizer: one plain function, run by every backend.

    A subclass states `state`, `scalars` and `update`; it may also state `sums` with `sums_update` and `rescale`, or
    with `shared` and `share`. See `lightning_optim.optim.lion` for the smallest whole example, `lamb` for `rescale`
    and `prodigy` for `share`.
    """

    sums: ClassVar[tuple[str, ...]] = ()
    """Names of per-tensor sums that `update` depends on (trust ratios, RMS of the update); taken in a first,
    read-only pass over the tensors."""

    shared: ClassVar[tuple[str, ...]] = ()
    """Names of numbers of which there is one for all parameters of the optimizer (Prodigy's `d`).

    They are kept in every parameter group as 0-d float64 tensors on the device, so they are in checkpoints, and a
    skipped step leaves them as they are. `scalars` finds the old values in ``group``; `share` turns the `sums`, taken
    over all tensors before any is updated, into new ones, which `update` may take as ``new_<name>``. There is no
    `rescale` then.
    """

    update: ClassVar[Callable[..., Any]]
    """One element's step: returns `(delta, *state)`, the amount to subtract from the parameter and the new state.

    A static method with named positional parameters: `param, grad`, the state names in order, then names of `scalars`.
    Pure; arithmetic, comparisons and the `NAMED_FUNCTIONS`; no numeric literals (beside a float32 they promote to
    float64 in compiled backends: pass constants as scalars). `grad` is already divided, negated for `maximize`, and
    includes the L2 term; weight decay is added to `delta` by the backend.
    """

    sums_update: ClassVar[Callable[..., Any]]
    """One element's terms of `sums`, as a tuple in that order. Same parameters and rules as for `update`; `state` is as
    before the step, so a rule that needs the new moments computes them here too (in a helper that both call)."""

    def init_shared(self, group: Mapping[str, Any]) -> dict[str, float]:
        """First values of `shared`, from the first parameter group that has this rule."""
        raise NotImplementedError

    def share(self, group: Mapping[str, Any], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """New values of `shared`, on the device.

        Args:
            group: The first parameter group that has this rule, with the old values, float64 tensors [].
            sums: The sums by name over all tensors of the optimizer that have this rule, [] each, float64.
        """
        raise NotImplementedError

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        """The scalars for `update`, after the first pass.

        Args:
            scalars: What `scalars` returned, plus `decay` and `l2`, each [tensors], float64, on the device.
            sums: The sums by name, each [tensors], float64; of whole tensors where those are sharded.
            numel: Number of elements of each (whole) tensor, [tensors], float64.

        Returns:
            ``scalars`` with entries changed or added; `decay`, `l2` and `scalar_state` may be among them.
        """
        raise NotImplementedError

    @classmethod
    def update_scalars(cls) -> tuple[str, ...]:
        """Names of the scalars that `update` takes, in its order."""
        return tuple(inspect.signature(cls.update).parameters)[2 + len(cls.state) :]

    @classmethod
    def sums_scalars(cls) -> tuple[str, ...]:
        """Names of the scalars that `sums_update` takes, in its order."""
        return tuple(inspect.signature(cls.sums_update).parameters)[2 + len(cls.state) :]


class TensorRule(Rule):
    """An optimizer made of tensor operations: matrix factors, orthogonalisation, projections.

    Runs on any device as written. Divisor, `maximize`, L2, decay, `cautious`, skipping, statistics, casting to and from
    the stored dtype, and scalar state are the caller's, as for elementwise rules. Parameters that are sharded over
    ranks are refused: a matrix's factors need the whole matrix.
    """

    def together(self, param: Tensor, group: Mapping[str, Any]) -> Hashable:
        """What must be equal for tensors to go through one call of `update`; None for each by itself.

        Tensors that have it equal are handed over in parts, so that memory beyond weights, gradients and state is
        needed for one part and not for the whole model.
        """
        return ()

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[Iterable[Tensor], list[dict[str, Tensor]]]:
        """One step of several tensors: what to subtract from each, and its new state.

        Several at once so that matrices of one shape can be batched (`together`); the next come when these are stored.
        Out of place: neither inputs nor state may be written, since a skipped step must leave them as they are and only
        the device knows whether it is skipped. No host read.

        Args:
            params: Shape as the parameter, in the arithmetic dtype (float32, or float64 for float64 parameters).
            grads: As for `UpdateRule.update`.
            states: As `init_state` made them, cast to the arithmetic dtype where they are floating point.
            scalars: What `scalars` returned, as 0-d tensors in the arithmetic dtype.
            groups: The parameter group of each tensor, for settings that are not numbers.

        Returns:
            What to subtract, in order, perhaps made only when it is taken, which saves memory; and the new states,
            among which those given may appear unchanged.
        """
        raise NotImplementedError

    def update_on_cpu(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[Iterable[Tensor], list[dict[str, Tensor]]]:
        """`update` as the cpu backend calls it: the place for kernels where torch's operations are slow."""
        return self.update(params, grads, states, scalars, groups)
