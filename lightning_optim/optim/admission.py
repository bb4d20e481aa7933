"""Lets through what can be updated, and refuses the rest by name, before anything is read or written.

A kernel gets addresses and one number of elements for a parameter, its gradient and all its state, and believes them.
torch's operations check more, but broadcast, and so take a state of another shape in silence. Both therefore see only
what has passed here: when parameters are sorted (`Batches`), and when state is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.core.host import read
from lightning_optim.core.placements import PLAIN
from lightning_optim.core.sharding import local
from lightning_optim.kernels import plain, quantization
from lightning_optim.kernels.rules import Rule, TensorRule, UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL
from lightning_optim.optim.state import tensor_names


class Ruled(Protocol):
    """What is needed of an optimizer to sort its parameters, and to speak of them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...  # noqa: D102 - torch's own

    @property
    def state(self) -> Any: ...  # noqa: D102

    @property
    def backend(self) -> str: ...  # noqa: D102 - the name of what is to run its kernels

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """How a group's parameters are updated."""

    def label(self, group: Mapping[str, Any], index: int) -> str:
        """How messages call a parameter."""


class RefusedError(ValueError, RuntimeError):
    """Tensors that no step can take; the message says whose, what was given and what is needed.

    A ValueError like the others that loading raises, and a RuntimeError like those of torch's optimizers in a step.
    """


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose tensors are looked at: the parameter ``index`` of ``group``. Names are made only for a message."""

    optimizer: Ruled
    group: Mapping[str, Any]
    index: int

    def refuse(self, role: str, text: str) -> RefusedError:
        """The error that says ``text`` of the parameter (``role`` empty), its `gradient`, or a state by its name."""
        return RefusedError(f"{type(self.optimizer).__name__}: {self.call(role)} {text}.")

    def call(self, role: str) -> str:
        """How messages call a tensor of the parameter."""
        name = self.optimizer.label(self.group, self.index)
        return f"{'the gradient' if role == GRADIENT else f'state {role!r}'} of {name}" if role else name


GRADIENT = "gradient"
ADVICE = "Give it the state of this parameter, or drop it (optimizer.state.pop(parameter)) to begin anew"


def _shape_of(name: str, param: Tensor, rule: Rule, own: Mapping[str, torch.Size]) -> torch.Size | None:
    """The shape that a state called ``name`` must have; None if it is not known here.

    Args:
        name: Its name.
        param: The parameter, or this rank's shard.
        rule: What updates it.
        own: Of a tensor rule, the shapes of its own state.
    """
    if name in own:
        return own[name]
    if name in ("kahan_comp", INITIAL, *rule.set_aside) or (name in rule.state and isinstance(rule, UpdateRule)):
        return param.shape
    if name in ("step", "rounding_key") or name in rule.scalar_state:
        return torch.Size(())
    if name.endswith("_scale") and name.removesuffix("_scale") in rule.compressible:
        return torch.Size((quantization.blocks(param.numel()),))
    return None


def _shapes_of_tensor_rule(param: Tensor, group: Mapping[str, Any], rule: Rule) -> dict[str, torch.Size]:
    """What `init_state` would make, without its memory where the rule's operations work without."""
    without = torch.empty(param.shape, dtype=param.dtype, device="meta")
    try:
        first = rule.init_state(without, group)
    except (NotImplementedError, RuntimeError):  # it reads the weights
        first = rule.init_state(param, group)
    return {name: value.shape for name, value in first.items() if isinstance(value, Tensor)}


_SCALARS = {"step": (torch.float32, torch.float64, torch.int64), "rounding_key": (torch.int64,)}
"""Dtypes of 0-d state: a half-precision count would stand still at 256."""


def check_state(
    subject: Subject,
    param: Tensor,
    rule: Rule,
    state: Mapping[str, Any],
    advice: str = ADVICE,
    elsewhere: Collection[str] = (),
) -> None:
    """Raise `RefusedError` if something in ``state`` has not the shape, or the form, that ``param`` needs.

    Args:
        subject: Whose it is.
        param: The parameter; of a DTensor, its shard where ``state`` has shards.
        rule: What updates it.
        state: What there is; what is missing, or unknown, does not matter.
        advice: What to do, as a sentence without its full stop.
        elsewhere: Names of further state of the parameter, which is checked by itself.

    Raises:
        RefusedError: It does not fit.
    """
    check_memory(subject, {"": param})  # state that is made is made of the weights
    own = {} if isinstance(rule, UpdateRule) or not state else _shapes_of_tensor_rule(param, subject.group, rule)
    missing = sorted(own.keys() - state.keys() - set(elsewhere))
    there = [name for name in tensor_names(rule, state) if isinstance(rule, TensorRule)]
    if missing and there:  # of parts, or made for another shape
        raise subject.refuse(missing[0], f"is missing beside {', '.join(map(repr, there))}. {advice}")
    for name, value in state.items():
        shape = _shape_of(name, param, rule, own)
        if shape is None:
            continue
        if not isinstance(value, Tensor):
            raise subject.refuse(name, f"is {value!r}; needed is a tensor of shape {tuple(shape)}")
        if value.shape != shape:
            raise subject.refuse(
                name,
                f"has shape {tuple(value.shape)}; needed is {tuple(shape)}, for the parameter has shape "
                f"{tuple(param.shape)}. {advice}",
            )
        if value.is_meta and not param.is_meta:
            raise subject.refuse(name, "is on the meta device, and has no numbers. " + advice)
        reason = plain.why_unsafe(value, written=True)
        if reason is not None:
            raise subject.refuse(name, reason)
        if name in own or name in ("kahan_comp", INITIAL):
            _check_form(subject, name, value, None)
        elif name in _SCALARS or name in rule.scalar_state:
            needed = _SCALARS.get(name, _SCALARS["step"][:2])
            if value.dtype not in needed:
                raise subject.refuse(name, f"is {value.dtype}; needed is {' or '.join(map(str, needed))}")
            if value.is_neg():  # the host reads and writes it where it lies
                raise subject.refuse(name, "is lazily negated; put its value there with .resolve_neg()")
    if isinstance(rule, UpdateRule):
        for name in rule.state:
            if name in state:
                _check_form(subject, name, state[name], state.get(f"{name}_scale"))


def _check_form(subject: Subject, name: str, value: Tensor, scale: Tensor | None) -> None:
    """An elementwise state is real numbers, or codes with their scales."""
    if scale is None and not value.is_floating_point():
        also = f", or codes of torch.uint8 with scales {name}_scale" if value.dtype == torch.uint8 else ""
        raise subject.refuse(name, f"is {value.dtype}; needed is a real floating-point dtype{also}")
    if scale is not None and (value.dtype, scale.dtype) != (torch.uint8, torch.float32):
        raise subject.refuse(
            name, f"is {value.dtype} with scales of {scale.dtype}; scales are torch.float32, of codes of torch.uint8"
        )


def grad_of(subject: Subject, param: Tensor) -> Tensor:
    """The gradient of ``param``, local and resolved; `RefusedError` if it is none that a step can use."""
    whole = param.grad
    assert whole is not None
    if whole.layout is not torch.strided:
        sparse = "sparse" in str(whole.layout)
        raise subject.refuse(
            GRADIENT,
            (f"is sparse ({whole.layout})" if sparse else f"has the layout {whole.layout}")
            + ". Needed are dense gradients"
            + (": create the layer with sparse=False, or use torch.optim.SparseAdam" if sparse else ""),
        )
    grad, here = local(whole), local(param)
    if whole.shape != param.shape or grad.shape != here.shape:
        cut = "" if whole.shape != param.shape else f", on this rank {tuple(grad.shape)} and {tuple(here.shape)}"
        raise subject.refuse(
            GRADIENT,
            f"has shape {tuple(whole.shape)}, and the parameter has shape {tuple(param.shape)}{cut}. Where weights "
            "have been replaced, clear the gradients (zero_grad) and compute them anew",
        )
    if not grad.is_floating_point():
        raise subject.refuse(GRADIENT, f"is {grad.dtype}; needed is a real floating-point dtype")
    return plain.resolved(grad)


def check_memory(subject: Subject, tensors: Mapping[str, Tensor]) -> bool:
    """Whether kernels may run on these tensors; if not, torch's operations may. `RefusedError` if neither may.

    Args:
        subject: Whose they are.
        tensors: The parameter (name empty), its `gradient`, and all its state by name; shards of DTensors.
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
            raise subject.refuse(role, f"is on {tensor.device}, and the parameter on {device}. Needed is one device")
    return usual or all(map(plain.is_plain, tensors.values()))


def check_counts(subject: Subject, scalars: Mapping[str, Tensor]) -> None:
    """Raise `RefusedError` if a count of steps, which the host can read, is none."""
    step = scalars.get("step")
    if step is not None and step.device.type == "cpu" and type(step) in PLAIN and not 0 <= read(step) < 2**53:
        raise subject.refuse("step", f"is {read(step)}; needed is the number of steps taken")


Owned = tuple[Tensor, Subject, str]
"""A tensor, whose it is, and its role."""


def check_apart(written: Sequence[Owned], grads: Sequence[Owned]) -> None:
    """Raise `RefusedError` if a step would write an element of one tensor that another one has, too.

    Two threads would write it, in turns, or one would read what another has already changed.

    Args:
        written: Parameters and all their state; plain ones.
        grads: Their gradients, which may share memory with each other.
    """
    for device in {tensor.device for tensor, _, _ in written}:
        here = [[owned for owned in some if owned[0].device == device] for some in (written, grads)]
        found = plain.shared(*([tensor for tensor, _, _ in some] for some in here))
        if found is not None:
            (_, subject, role), (_, other, other_role) = ([*here[0], *here[1]][i] for i in found)
            raise subject.refuse(
                role,
                f"and {other.call(other_role)} share memory, and a step would write it. Give each memory of its own "
                "(.clone()); pass a tied weight once",
            )


@contextmanager
def by_name(optimizer: Ruled, params: Collection[Tensor]) -> Iterator[None]:
    """What torch's operations cannot do with ``params``, which are not plain, becomes an error that names them."""
    try:
        yield
    except Exception as error:  # whatever a class of tensors raises for what it does not know
        places = [(group, i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        ours = [(g, i) for g, i in places if any(g["params"][i] is param for param in params)]
        group, index = ours[0]
        kind = type(group["params"][index])
        raise RefusedError(
            f"{type(optimizer).__name__}: {optimizer.label(group, index)} ({len(ours)} such), its gradient or its "
            f"state is more than memory (the parameter is a {kind.__module__}.{kind.__qualname__}), so that operations "
            f"of torch run instead of kernels. They failed: {type(error).__name__}: {error}. Leave it out of this "
            "optimizer, and give it to one that its library supports."
        ) from error
