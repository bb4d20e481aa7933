"""Kinds of weight decay of one's own: one elementwise function, which every backend runs."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning_optim.core.registry import Registry
from lightning_optim.kernels.own_rule import refuse_literals
from lightning_optim.kernels.rules import NAMED_FUNCTIONS, rebind


class DecayKind:
    """Base class of a kind of weight decay of your own: w ← w - u - c·pull(w, u) for an update u.

    A registered kind is a value of ``weight_decay_kind``, on every backend, in every optimizer of this package that
    applies its decay outside of its update.

    Raises:
        TypeError: When a subclass is defined: `pull` is missing, has other parameters, or uses what kernels do not
            have.

    Example:
        >>> import torch
        >>> import lightning_optim as lo
        >>> @lo.optim.register("cubic")
        ... class Cubic(lo.optim.DecayKind):
        ...     '''Decay in proportion to the cube of the weight, for few large weights.'''
        ...
        ...     @staticmethod
        ...     def pull(param, delta):
        ...         return param * param * param
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = lo.optim.SGD([weight], lr=0.1, weight_decay=0.5, weight_decay_kind="cubic")
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9500, 1.6000])
        >>> DECAY_KINDS.remove("cubic")
    """

    pull: ClassVar[Callable[..., Any]]
    """Direction of the decay at one element, a static method of `param`, the weight before the step, and `delta`, the
    update that is subtracted from it. As in `UpdateRule.update`, it may use arithmetic, comparisons and the
    `lightning_optim.kernels.rules.NAMED_FUNCTIONS`, but no numeric literals."""

    @staticmethod
    def coefficient(lr: Any, weight_decay: Any) -> Any:
        """Return c of a step.

        Args:
            lr: Learning rate of this step, a float or a device tensor of shape [], which the host must not read.
            weight_decay: λ of the parameter group.
        """
        return lr * weight_decay

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pull = getattr(cls, "pull", None)
        if not isinstance(pull, types.FunctionType) or pull.__code__.co_varnames[: pull.__code__.co_argcount] != (
            "param",
            "delta",
        ):
            raise TypeError(f"{cls.__name__} must define the static method pull(param, delta).")
        rebind(pull, dict.fromkeys(NAMED_FUNCTIONS, abs))  # refuses names that kernels do not have
        advice = "Put constant factors into `coefficient`, and write x * x for x ** 2."
        refuse_literals(f"{cls.__name__}.pull", pull, advice)


DECAY_KINDS: Registry[DecayKind] = Registry(
    "kind of weight decay",
    DecayKind,
    group="lightning_optim.weight_decay_kinds",
    reserved=dict.fromkeys(
        ("decoupled", "independent", "corrected", "l2", "l1", "l2_sp", "cautious", "norm"),
        "lightning_optim.kernels.weight_decay.WeightDecayKind",
    ),
)
"""Kinds of weight decay that users register; those of this package are `WeightDecayKind`."""

_forms: WeakKeyDictionary[type[DecayKind], str] = WeakKeyDictionary()


def _apply_pull(param: Any, delta: Any, decay: Any) -> Any:
    return delta + decay * pull(param, delta)  # type: ignore[name-defined]  # noqa: F821 - bound by `own_form`


def _only_pull(param: Any, delta: Any, decay: Any) -> Any:
    return pull(param, delta)  # type: ignore[name-defined]  # noqa: F821 - bound by `own_form`


def own_form(
    cls: type[DecayKind], apply_decay: dict[str, Callable[..., Any]], decay_term: dict[str, Callable[..., Any]]
) -> str:
    """Return the name of the form of a kind, after it has been added to the tables of forms.

    Each class has a form of its own, because kernels are cached by form and a notebook may define a kind again.

    Args:
        cls: The kind.
        apply_decay: `weight_decay.APPLY_DECAY`.
        decay_term: `weight_decay.DECAY_TERM`.
    """
    if (form := _forms.get(cls)) is None:
        form = _forms[cls] = f"own_{len(apply_decay)}"
        names = {"__name__": cls.__module__, "pull": cls.pull}
        for table, function in ((apply_decay, _apply_pull), (decay_term, _only_pull)):
            table[form] = types.FunctionType(function.__code__, names, function.__name__)
    return form
