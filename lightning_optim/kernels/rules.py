"""Update rules: the arithmetic of one optimizer step and the names of its state, without any storage.

A rule is stateless. The device and dtype of tensors, the order of blocks, weight decay, clipping, `maximize`,
`cautious`, skipping and statistics belong to the backend and are the same for every rule.
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
from lightning_optim.kernels.own_rule import check_elementwise
from lightning_optim.kernels.recorded import Recorded

Scalar = Any
"""A float on the host, or a number that only a device knows: a float64 tensor, [] or [tensors], or a `Recorded`."""


# `scalars` and `rescale` call the following named functions, which take floats and tensors; in `update` and
# `sums_update` each backend replaces them with its own. Both versions must agree on NaN: maximum, minimum and where
# propagate it, and sign(NaN) is 0 as in torch.


def sqrt(x: Scalar) -> Scalar:
    """Return the square root."""
    if isinstance(x, Recorded):
        return x.call("sqrt", x)
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def absolute(x: Scalar) -> Scalar:
    """Return |x|."""
    return abs(x)


def sign(x: Scalar) -> Scalar:
    """Return the sign of ``x``: -1, 0 or 1."""
    if isinstance(x, Recorded):
        return x.call("sign", x)
    return torch.sign(x) if isinstance(x, Tensor) else float((x > 0) - (x < 0))


def where(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    """Return ``x`` where ``condition`` holds, otherwise ``y``; both are evaluated."""
    if isinstance(condition, Tensor):
        # With two Python numbers `torch.where` would return float32, whatever the dtype of the other operands.
        wide = widest_dtype(condition.device)
        x, y = (v if isinstance(v, Tensor) else condition.new_full((), v, dtype=wide) for v in (x, y))
        return torch.where(condition, x, y)
    return condition.call("where", condition, x, y) if isinstance(condition, Recorded) else x if condition else y


def maximum(x: Scalar, y: Scalar) -> Scalar:
    """Return the larger value, or NaN if either value is NaN."""
    return where((x > y) | (x != x), x, y)


def minimum(x: Scalar, y: Scalar) -> Scalar:
    """Return the smaller value, or NaN if either value is NaN."""
    return where((x < y) | (x != x), x, y)


NAMED_FUNCTIONS = ("sqrt", "absolute", "sign", "where", "maximum", "minimum")
"""Names of the functions that `update` may call, in addition to plain helper functions made of the same."""


def rebind(
    function: Callable[..., Any],
    named: Mapping[str, Callable[..., Any]],
    compiler: Callable[[Any], Any] = lambda function: function,
) -> Any:
    """Replace the named functions in ``function``, and in the helpers that it calls, with those of a backend.

    Args:
        function: A plain Python function of arithmetic, `NAMED_FUNCTIONS`, and helpers made of the same.
        named: Implementations of the backend by name.
        compiler: Decorator applied to the function and to each helper, innermost first (`numba.njit`, `triton.jit`).

    Returns:
        The new function, as returned by ``compiler``.

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
            raise TypeError(
                f"{function.__qualname__} uses {name!r}; a rule may use {', '.join(NAMED_FUNCTIONS)} only; "
                "numbers come from `scalars`"
            )
    return compiler(types.FunctionType(function.__code__, bound, function.__name__, function.__defaults__))


class Rule:
    """Base class of elementwise rules and tensor rules."""

    state: ClassVar[tuple[str, ...]] = ()
    """Names of the state tensors of each parameter, as torch names them. They are checkpoint keys and never change."""

    counts_steps: ClassVar[bool] = True
    """Whether each parameter has the state `step`, float32, shape []: the number of updates, without skipped ones."""

    scalar_state: ClassVar[Mapping[str, float]] = types.MappingProxyType({})
    """Further 0-d state of each parameter with its initial value (NAdam's `mu_product`). `scalars` receives the old
    value as a keyword argument and returns the new one under the same name. It is stored in float64, so that products
    and sums over a million steps do not stagnate."""

    set_aside: ClassVar[tuple[str, ...]] = ()
    """Names of further state in the shape of the parameter that may exist and that steps ignore."""

    counts_calls: ClassVar[bool] = False
    """Whether the host counts calls of `step`, skipped or not, in ``group["calls"]``. It is meant for rules that decide
    on the host what a step does, on devices whose memory the host must not read. On the CPU a rule may read `step`."""

    first_moment: ClassVar[str | None] = None
    """Name of the state that is the first moment m in the step sums; None if the rule has none."""

    second_moment: ClassVar[str | None] = None
    """Name of the state that is the second moment v in the step sums; None if the rule has none. There v̂ is
    v / bias_correction2 if `scalars` returns `bias_correction2_sqrt`, otherwise v, and `eps` is that of the group."""

    compressible: ClassVar[Mapping[str, bool]] = types.MappingProxyType({})
    """States that `state_bits` may store in 16 or 8 bits, and whether each is signed.

    They have the shape of the parameter, begin at 0 (in an elementwise rule at any number that is not negative), and
    may be averages, sums, or values of one step: a weight or a difference of nearly equal states needs more bits. Other
    states keep full precision, and a rule without such states refuses `state_bits`.
    """

    decays_beside: ClassVar[bool] = True
    """Whether weights decay outside of `update`, so that the step sums can separate the part of the decay."""

    def scalars(self, group: Mapping[str, Any], step: Scalar, **scalar_state: Scalar) -> dict[str, Scalar]:
        """Compute the scalars of this step in float64: learning rate, betas, 1 − beta, bias corrections.

        One definition serves both callers. On the host ``step`` is a float. On a device whose memory the host must not
        read it is a float64 tensor, [tensors], and the same arithmetic runs there, because only the device knows which
        steps were skipped. The method may therefore use arithmetic and the named functions, but no `if` on ``step``.

        Args:
            group: The parameter group; `lr` is a float, or a 0-d device tensor.
            step: Number of this update, from 1 (the state `step` plus one; always 1 for a rule that does not count).
            scalar_state: Old values of `scalar_state`.

        Returns:
            The scalars of `update` by name; the new values of `scalar_state`; and `decay`, to override the result of
            the method `decay` at this step.
        """
        raise NotImplementedError

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> Mapping[str, Tensor | float]:
        """Return the state of a parameter before its first step.

        Args:
            param: The parameter.
            group: Its parameter group.

        Returns:
            Initial values by name. An elementwise rule omits states that start at zero, and gives a number or a tensor
            in the shape of the parameter, which is copied. A tensor rule gives all states as new tensors, whose names
            may differ between parameters; `state` then has the names that all parameters share, if any.
        """
        return {}

    def why_not(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Return the reason why this rule cannot update ``param`` of ``group``, as a sentence; None if it can."""
        return None

    def form(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """Return the matrices that this rule takes ``param`` to be, in words, for plans; None if it has no matrices."""
        return None

    def decay(self, group: Mapping[str, Any], usual: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        """Return the decay coefficients (c, l2): c·w is subtracted in addition to the update, l2·w joins the gradient.

        A rule that applies decay inside `update` overrides this method to return (0, 0), and puts λ into its `scalars`.

        Args:
            group: The parameter group.
            usual: Result of `weight_decay.group_decay` for the group.
        """
        return usual


class UpdateRule(Rule):
    """Elementwise rule: one plain function of each element, which every backend runs.

    A subclass defines `state`, `scalars` and `update`; it may also define `sums` with `sums_update` and `rescale`, or
    with `shared` and `share`. See `lightning_optim.optim.lion` for the smallest complete example, `lamb` for `rescale`
    and `prodigy` for `share`.

    Raises:
        TypeError: When a subclass is defined: `update` or `sums_update` takes other arguments than `param`, `grad`, the
            state and scalars, has literals, or returns another number of values.
    """

    sums: ClassVar[tuple[str, ...]] = ()
    """Names of per-tensor sums that `update` depends on (for trust ratios, or the RMS of the update). They are computed
    in a first, read-only pass over the tensors."""

    shared: ClassVar[tuple[str, ...]] = ()
    """Names of values that all parameters of the optimizer share (Prodigy's `d`).

    Every parameter group stores them as 0-d float64 tensors on the device, so checkpoints contain them, and a skipped
    step does not change them. `scalars` finds the old values in ``group``; `share` computes new ones from the `sums`,
    taken over all tensors before any is updated, and `update` may take these as ``new_<name>``. `rescale` is then not
    called.
    """

    update: ClassVar[Callable[..., Any]]
    """Step of one element; returns `(delta, *state)`, the amount to subtract from the parameter and the new state.

    It is a static method with named positional parameters: `param`, `grad`, the state names in order, then names of
    `scalars`. It must be pure, and may use arithmetic, comparisons and the `NAMED_FUNCTIONS`, but no numeric literals:
    in compiled backends these promote float32 to float64, so pass constants as scalars. `grad` is already divided,
    negated for `maximize`, and includes the L2 term; the backend adds weight decay to `delta`.
    """

    sums_update: ClassVar[Callable[..., Any]]
    """Terms of `sums` for one element, as a tuple in that order. The parameters and restrictions are those of `update`;
    the state is that before the step, so a rule that needs the new moments computes them here as well, in a helper that
    both functions call."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (update := getattr(cls, "update", None)) is not None:
            told = ", ".join(("the amount to subtract", *cls.state))
            check_elementwise(f"{cls.__name__}.update", update, cls.state, told, 1 + len(cls.state))
        if cls.sums and (terms := getattr(cls, "sums_update", None)) is not None:
            check_elementwise(f"{cls.__name__}.sums_update", terms, cls.state, ", ".join(cls.sums), len(cls.sums))

    def init_shared(self, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the initial values of `shared`, given the first parameter group that has this rule."""
        raise NotImplementedError

    def share(self, group: Mapping[str, Any], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the new values of `shared`, shape [] each, on the device.

        Args:
            group: The first parameter group that has this rule, with the old values, float64, shape [] each.
            sums: The sums by name over all tensors of the optimizer that have this rule, float64, shape [] each.
        """
        raise NotImplementedError

    def rescale(self, scalars: dict[str, Tensor], sums: dict[str, Tensor], numel: Tensor) -> dict[str, Tensor]:
        """Return the scalars that `update` takes in place of those from `scalars`, given the result of the first pass.

        Args:
            scalars: The result of `scalars`, plus `decay` and `l2`, [tensors] each, float64, on the device.
            sums: The sums by name, [tensors] each, float64; over all shards where a tensor is sharded.
            numel: Number of elements of each tensor over all shards, [tensors], float64.

        Returns:
            The entries to change or add, [tensors] each; `decay`, `l2` and `scalar_state` may be among them.
        """
        raise NotImplementedError

    @classmethod
    def update_scalars(cls) -> tuple[str, ...]:
        """Return the names of the scalars that `update` takes, in order."""
        return tuple(inspect.signature(cls.update).parameters)[2 + len(cls.state) :]

    @classmethod
    def sums_scalars(cls) -> tuple[str, ...]:
        """Return the names of the scalars that `sums_update` takes, in order."""
        return tuple(inspect.signature(cls.sums_update).parameters)[2 + len(cls.state) :]


class TensorRule(Rule):
    """Rule made of tensor operations, such as matrix factors, orthogonalisation or projections.

    It runs on any device as written. The caller applies divisor, `maximize`, L2, decay, `cautious`, skipping,
    statistics, casts from and to the stored dtype, and 0-d state, as for elementwise rules. A parameter that is sharded
    over ranks is updated whole by one of them: its weights, gradient and state are sent there and the results back. A
    `MatrixRule` sends less.
    """

    divides_on_cpu: ClassVar[bool] = False
    """Whether `update_on_cpu` multiplies gradients by the scalar `inverse_divisor` itself, and needs no temporary as
    large as a tensor. It is then called once for all tensors, with the gradients as they are in memory, where nothing
    else is to be done to these."""

    reads_weights: ClassVar[bool] = True
    """Whether `update` reads ``params``. If not, those of sharded tensors are not sent to the owner, and ``params`` may
    be other tensors of their shapes."""

    def together(self, param: Tensor, group: Mapping[str, Any]) -> Hashable:
        """Return a key that is equal for tensors which one call of `update` may process; None for a call of its own.

        Tensors with equal keys are passed in parts, so that temporary memory is needed for one part at a time and not
        for the whole model. Only the shape of ``param`` may be read, which may be a DTensor.
        """
        return ()

    def is_elementwise(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Return whether the update of ``param`` is elementwise, so that a shard of it can be updated by itself."""
        return False

    def cost(self, param: Tensor, group: Mapping[str, Any]) -> float:
        """Return the number of operations of an update of ``param``, by which ranks share the work.

        Only the shape of ``param`` may be read; by default this is its number of elements.
        """
        return param.numel()

    def divisible(self, param: Tensor, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return whether ranks that have copies of ``param`` should divide its update, as in data parallelism.

        Only the shape of ``param`` may be read.

        Returns:
            The operations that a rank is spared, counted as those of products in bfloat16, and the bytes that it
            receives instead; None if each rank should do all. This is the default.
        """
        return None

    def divides_now(self, group: Mapping[str, Any], step: float | None) -> bool:
        """Return whether an update that is `divisible` is divided at this step.

        Args:
            group: The parameter group.
            step: Number of this update; None on devices whose memory the host must not read (`counts_calls`).
        """
        return True

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        scalars: Sequence[dict[str, Tensor]],
        groups: Sequence[Mapping[str, Any]],
    ) -> tuple[Iterable[Tensor], list[dict[str, Tensor]]]:
        """Compute one step of several tensors.

        Several tensors are passed at once so that matrices of one shape can be batched (`together`); their results are
        stored before the next call. The method must work out of place and write neither inputs nor state, because a
        skipped step must not change them and only the device knows whether a step is skipped. It must not synchronise
        with the host.

        Args:
            params: Parameters of any shapes, in the arithmetic dtype (float32, or float64 for float64 parameters).
            grads: Gradients in the shapes and dtype of ``params``, prepared as for `UpdateRule.update`.
            states: States from `init_state`, cast to the arithmetic dtype where they are floating point.
            scalars: Results of `scalars`, as 0-d tensors of the arithmetic dtype.
            groups: Parameter group of each tensor, for settings that are not numbers.

        Returns:
            The amounts to subtract, in the shapes of ``params`` and in order, possibly computed lazily to save memory;
            and the new states, which may contain given tensors unchanged.
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
        """Compute `update` on the cpu backend; override it with kernels where torch's operations are slow.

        Kernels compute the rule of one class, of which a subclass may change any part: a subclass that does not define
        this method itself is run by its `update`.
        """
        return self.update(params, grads, states, scalars, groups)
