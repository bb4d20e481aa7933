"""Validation of parameters, gradients and state before a step, with errors that name the tensor.

A kernel receives addresses and one number of elements for a parameter, its gradient and all its state, and cannot check
them. torch's operations check more, but silently broadcast a state of another shape. Therefore all tensors are
validated here first: when parameters are sorted into batches (`Batches`), and when state is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.core.host import read
from lightning_optim.core.placements import PLAIN, is_sharded
from lightning_optim.core.sharding import local
from lightning_optim.kernels import averages, plain, quantization
from lightning_optim.kernels.rules import Rule, TensorRule, UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL
from lightning_optim.optim import weight_averages
from lightning_optim.optim.state import tensor_names


class Ruled(Protocol):
    """Interface of an optimizer for sorting its parameters and naming them in messages."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...  # noqa: D102 - torch's own

    @property
    def state(self) -> Any: ...  # noqa: D102

    @property
    def backend(self) -> str: ...  # noqa: D102 - the name of what is to run its kernels

    @property
    def divide_over(self) -> Any: ...  # noqa: D102 - a process group, or None

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that updates the parameters of ``group``."""

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """Return the text that identifies a parameter in messages."""


class RefusedError(ValueError, RuntimeError):
    """Error for tensors that a step cannot use; the message has their name, what was given and the requirement.

    It is a ValueError like the other errors of loading, and a RuntimeError like those of torch's optimizers in a step.
    """


@dataclass(frozen=True, slots=True)
class Subject:
    """The parameter ``index`` of ``group``, whose tensors are validated; its name is formatted only for a message."""

    optimizer: Ruled
    group: Mapping[str, Any]
    index: int

    def refuse(self, role: str, text: str) -> RefusedError:
        """Return the error with the predicate ``text`` about the parameter (empty ``role``), `gradient` or a state."""
        return RefusedError(f"{type(self.optimizer).__name__}: {self.call(role)} {text}.")

    def call(self, role: str) -> str:
        """Return the text that identifies a tensor of the parameter in messages."""
        name = self.optimizer.label(self.group, self.index)
        return f"{'the gradient' if role == GRADIENT else f'state {role!r}'} of {name}" if role else name


GRADIENT = "gradient"
ADVICE = "Give it the state of this parameter, or remove it (optimizer.state.pop(parameter)) to start from new state"


def _shape_of(name: str, value: Any, param: Tensor, rule: Rule, own: Mapping[str, torch.Size]) -> torch.Size | None:
    """Return the shape that a state called ``name`` must have; None if it is unknown.

    Args:
        name: Name of the state.
        value: The state; scales may have the shape of those of one row.
        param: The parameter, or its shard on this rank.
        rule: The rule that updates it.
        own: Shapes of the state of a tensor rule, by name.
    """
    if name in own:
        return own[name]
    if weight_averages.is_average(name):
        return param.shape
    if name in ("kahan_comp", INITIAL, *rule.set_aside) or (name in rule.state and isinstance(rule, UpdateRule)):
        return param.shape
    if name in ("step", "rounding_key", averages.STEP) or name in rule.scalar_state:
        return torch.Size(())
    if name.endswith("_scale") and name.removesuffix("_scale") in rule.compressible:
        in_one_row = torch.Size((quantization.blocks(param.numel()),))
        is_in_one_row = isinstance(value, Tensor) and value.shape == in_one_row
        return in_one_row if is_in_one_row else quantization.scale_shape(param.shape)
    return None


def _shapes_of_tensor_rule(param: Tensor, group: Mapping[str, Any], rule: Rule) -> dict[str, torch.Size]:
    """Return the shapes of the tensors from `init_state`, computed on the meta device where the rule supports it."""
    without = torch.empty(param.shape, dtype=param.dtype, device="meta")
    try:
        first = rule.init_state(without, group)
    except (NotImplementedError, RuntimeError):  # The rule reads the weights.
        first = rule.init_state(param, group)
    return {name: value.shape for name, value in first.items() if isinstance(value, Tensor)}


_COUNTS = (torch.float32, torch.float64, torch.int64)
_SCALARS = {"step": _COUNTS, averages.STEP: _COUNTS, "rounding_key": (torch.int64,)}
"""Valid dtypes of 0-d state; a half-precision step count would stagnate at 256 or 2048."""


def check_state(
    subject: Subject,
    param: Tensor,
    rule: Rule,
    state: Mapping[str, Any],
    advice: str = ADVICE,
    elsewhere: Collection[str] = (),
) -> None:
    """Check that the entries of ``state`` have the shapes and dtypes that ``param`` needs.

    Args:
        subject: The parameter in its group, for messages.
        param: The parameter; the local shard of a DTensor if ``state`` has local shards.
        rule: The rule that updates it.
        state: The existing state; missing and unknown entries are ignored.
        advice: Way out for the message, as a sentence without its full stop.
        elsewhere: Names of further state of the parameter, which is checked separately.

    Raises:
        RefusedError: An entry does not match the parameter.
    """
    check_memory(subject, {"": param})  # New state is created from the weights.
    there = [name for name in tensor_names(rule, state) if isinstance(rule, TensorRule)]
    # A shard by itself may have a shape that the rule cannot update; its arrays are then elsewhere.
    unneeded = isinstance(rule, UpdateRule) or not state or (bool(elsewhere) and not there)
    own = {} if unneeded else _shapes_of_tensor_rule(param, subject.group, rule)
    missing = sorted(own.keys() - state.keys() - set(elsewhere))
    if missing and there:  # It is incomplete, or was created for another shape.
        raise subject.refuse(missing[0], f"is missing, but the state has {', '.join(map(repr, there))}. {advice}")
    for name, value in state.items():
        shape = _shape_of(name, value, param, rule, own)
        if shape is None:
            continue
        if not isinstance(value, Tensor):
            raise subject.refuse(name, f"is {value!r}, but must be a tensor of shape {tuple(shape)}")
        if value.shape != shape:
            raise subject.refuse(
                name,
                f"has shape {tuple(value.shape)}, but must have shape {tuple(shape)}, because the parameter has shape "
                f"{tuple(param.shape)}. {advice}",
            )
        if value.is_meta and not param.is_meta:
            raise subject.refuse(name, "is on the meta device and has no values. " + advice)
        reason = plain.why_unsafe(value, written=True)
        if reason is not None:
            raise subject.refuse(name, reason)
        if name == "kahan_comp" and value.dtype == torch.int8 and param.dtype != torch.float16:
            continue
        if name in own or name in ("kahan_comp", INITIAL) or weight_averages.is_average(name):
            _check_form(subject, name, value, state.get(f"{name}_scale") if name in rule.compressible else None)
        elif name in _SCALARS or name in rule.scalar_state:
            needed = _SCALARS.get(name, _SCALARS["step"][:2])
            if value.dtype not in needed:
                raise subject.refuse(name, f"has dtype {value.dtype}, but must have {' or '.join(map(str, needed))}")
            if value.is_neg():  # The host reads and writes its memory directly.
                raise subject.refuse(name, "is lazily negated; resolve it with .resolve_neg()")
    if isinstance(rule, UpdateRule):
        for name in rule.state:
            if name in state:
                _check_form(subject, name, state[name], state.get(f"{name}_scale"))


def check_present_state(subject: Subject, param: Tensor, rule: Rule, state: Mapping[str, Any]) -> None:
    """Check the state of a parameter as `check_state` does: this rank's shards of it, and factors whole.

    Args:
        subject: The parameter in its group, for messages.
        param: The parameter, which may be a DTensor.
        rule: The rule that updates it.
        state: The existing state, with DTensors where it is sharded.

    Raises:
        RefusedError: An entry does not match the parameter.
    """
    if isinstance(rule, TensorRule) and is_sharded(param):  # A factor of a shard says nothing about that of the whole.
        check_state(subject, param, rule, state)
    else:
        check_state(subject, local(param), rule, {name: local(value) for name, value in state.items()})


def _check_form(subject: Subject, name: str, value: Tensor, scale: Tensor | None) -> None:
    """Check that an elementwise state has real numbers, or 8-bit codes with scales."""
    if scale is None and not value.is_floating_point():
        also = f", or be 8-bit codes with scales in {name}_scale" if value.dtype == torch.uint8 else ""
        raise subject.refuse(name, f"has dtype {value.dtype}, but must have a real floating-point dtype{also}")
    if scale is not None and (value.dtype, scale.dtype) != (torch.uint8, torch.float32):
        raise subject.refuse(
            name, f"has dtype {value.dtype} and scales of {scale.dtype}, but must have torch.uint8 and torch.float32"
        )


def grad_of(subject: Subject, param: Tensor) -> Tensor:
    """Return the local gradient of ``param``, with lazy operations resolved.

    Args:
        subject: The parameter in its group, for messages.
        param: The parameter, whose gradient exists.

    Returns:
        The gradient in the shape of the local parameter.

    Raises:
        RefusedError: A step cannot use the gradient.
    """
    whole = param.grad
    assert whole is not None
    if whole.layout is not torch.strided:
        sparse = "sparse" in str(whole.layout)
        raise subject.refuse(
            GRADIENT,
            (f"is sparse ({whole.layout})" if sparse else f"has the layout {whole.layout}")
            + ", but must be dense"
            + (": create the layer with sparse=False, or use torch.optim.SparseAdam" if sparse else ""),
        )
    grad, here = local(whole), local(param)
    if whole.shape != param.shape or grad.shape != here.shape:
        cut = "" if whole.shape != param.shape else f", on this rank {tuple(grad.shape)} and {tuple(here.shape)}"
        raise subject.refuse(
            GRADIENT,
            f"has shape {tuple(whole.shape)}, and the parameter has shape {tuple(param.shape)}{cut}. If weights have "
            "been replaced, clear the gradients (zero_grad) and compute them again",
        )
    if not grad.is_floating_point():
        raise subject.refuse(GRADIENT, f"has dtype {grad.dtype}, but must have a real floating-point dtype")
    return plain.resolved(grad)


def check_memory(subject: Subject, tensors: Mapping[str, Tensor]) -> bool:
    """Check that operations may run on the tensors of a parameter, and return whether kernels may as well.

    Args:
        subject: The parameter in its group, for messages.
        tensors: The parameter (under the empty name), its `gradient`, and its state by name; local shards of DTensors.

    Returns:
        Whether kernels may run on the tensors; otherwise only torch's operations may.

    Raises:
        RefusedError: Neither kernels nor torch's operations may run on a tensor.
    """
    device = tensors[""].device
    usual = True
    for role, tensor in tensors.items():
        if plain.is_usual(tensor) and tensor.device == device:
            continue
        usual = False
        reason = plain.why_unsafe(tensor, written=role != GRADIENT)
        if reason is not None:
            raise subject.refuse(role, reason)
        if tensor.device != device:
            raise subject.refuse(role, f"is on {tensor.device}, but must be on {device} like the parameter")
    return usual or all(map(plain.is_plain, tensors.values()))


def check_counts(subject: Subject, scalars: Mapping[str, Tensor]) -> None:
    """Check that a step count which the host can read is a non-negative number.

    Args:
        subject: The parameter in its group, for messages.
        scalars: 0-d state of the parameter by name, shape [] each.

    Raises:
        RefusedError: The step count is not valid.
    """
    step = scalars.get("step")
    if step is not None and step.device.type == "cpu" and type(step) in PLAIN and not 0 <= read(step) < 2**53:
        raise subject.refuse("step", f"is {read(step)}, but must be the number of steps taken")


Owned = tuple[Tensor, Subject, str]
"""A tensor, the parameter to which it belongs, and its role."""


def check_apart(written: Sequence[Owned], grads: Sequence[Owned]) -> None:
    """Check that no tensor which a step writes shares memory with another tensor.

    Otherwise two threads would write the same element, or one would read what another has already changed.

    Args:
        written: Plain parameters and all their state, of any shapes.
        grads: Their gradients, which may share memory with each other.

    Raises:
        RefusedError: Two tensors share memory that a step would write.
    """
    for device in {tensor.device for tensor, _, _ in written}:
        here = [[owned for owned in some if owned[0].device == device] for some in (written, grads)]
        found = plain.shared(*([tensor for tensor, _, _ in some] for some in here))
        if found is not None:
            (_, subject, role), (_, other, other_role) = ([*here[0], *here[1]][i] for i in found)
            raise subject.refuse(
                role,
                f"and {other.call(other_role)} share memory that a step would write. Give each tensor its own memory "
                "(.clone()), and pass a tied weight once",
            )


@contextmanager
def by_name(optimizer: Ruled, params: Collection[Tensor]) -> Iterator[None]:
    """Convert errors of torch's operations on ``params``, which are not plain, to errors that name the parameters.

    Raises:
        RefusedError: An operation in the block has failed.
    """
    try:
        yield
    except Exception as error:  # Tensor subclasses raise errors of any type.
        places = [(group, i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        ours = [(g, i) for g, i in places if any(g["params"][i] is param for param in params)]
        group, index = ours[0]
        kind = type(group["params"][index])
        raise RefusedError(
            f"{type(optimizer).__name__}: {optimizer.label(group, index)} ({len(ours)} such), its gradient or its "
            "state is a tensor subclass with semantics of its own (the parameter is a "
            f"{kind.__module__}.{kind.__qualname__}), so torch's operations run instead of kernels. They failed: "
            f"{type(error).__name__}: {error}. Use an optimizer that the library of the subclass supports."
        ) from error
