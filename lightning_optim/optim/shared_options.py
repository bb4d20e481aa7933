"""Options that all optimizers share; a new one is an entry, its documentation and its default in this module."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypedDict

from lightning_optim.core.suggest import nearest
from lightning_optim.kernels.weight_decay import WeightDecayKind


class Offers(Protocol):
    """What is needed of an optimizer class to tell which shared options it has; see `FusedOptimizer`."""

    refused_options: ClassVar[Mapping[str, str]]


class SharedOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer of this package takes, with the same meaning in all of them.

    All but ``backend`` are hyperparameters, which parameter groups may override. An optimizer that does not support an
    option refuses it at construction with the reason.

    Attributes:
        weight_decay_kind: `decoupled`, `independent`, `corrected`, `l2`, `l1`, `l2_sp`, `cautious` or `norm`; see
            `WeightDecayKind`. The default is `decoupled`, or the behaviour of torch's optimizer of the same name.
        maximize: Maximize the objective instead of minimizing it.
        cautious: Leave out update components that point against the gradient (https://arxiv.org/abs/2411.16085).
        kahan_sum: Store the rounding error of bf16 and fp16 parameters as one more state, so that small changes
            accumulate.
        kahan_bits: Bits of that state: 16, or 8 for bf16 parameters, which are weights of 24 bits then.
        stochastic_rounding: Round bf16 parameters up or down at random, so that small changes are kept on average.
        state_bits: 32, 16 or 8 bits per value of state; see the page on low precision.
        ema: Averages of the weights to keep, each one more state: a decay such as 0.9999, `power 0.05` for a
            power-function average of that relative width, or a list of several; see the page on averages.
        backend: `auto` for the fastest backend that can run, or `reference`, `cpu` or `triton`, with an error if that
            backend cannot run on the device of the parameters.

    Example:
        >>> import torch
        >>> from lightning_optim.optim import Lion
        >>> optimizer = Lion([torch.nn.Parameter(torch.ones(3))], cautious=True)
        >>> optimizer.param_groups[0]["cautious"]
        True
    """

    weight_decay_kind: str | WeightDecayKind
    maximize: bool
    cautious: bool
    kahan_sum: bool
    kahan_bits: int
    stochastic_rounding: bool
    state_bits: int
    ema: float | str | Sequence[float | str] | None
    backend: str


LISTS = frozenset({"ema"})
"""Options that may be lists, of any length."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "weight_decay_kind": "decoupled",
        "maximize": False,
        "cautious": False,
        "kahan_sum": False,
        "kahan_bits": 16,
        "stochastic_rounding": False,
        "state_bits": 32,
        "ema": None,
        "backend": "auto",
    }
)
"""Default of each of the `SharedOptions`; `FusedOptimizer.option_defaults` overrides them for one optimizer."""


def defaults_of(owner: type[Offers]) -> dict[str, Any]:
    """Return the default of each shared option, `backend` included, in the class ``owner``."""
    merged = dict(DEFAULTS)
    for base in reversed(owner.__mro__):
        merged |= vars(base).get("option_defaults", {})
    return merged


def check_names(owner: type[Offers], given: Iterable[str]) -> None:
    """Check the names of options given to the constructor of ``owner``.

    Raises:
        TypeError: A name is unknown, as for any misspelt argument in Python; the message suggests the nearest one.
    """
    known = list(inspect.signature(owner).parameters)
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f"{owner.__name__}() got an unexpected keyword argument {name!r}. {nearest(name, known)}")


def check_offered(owner: type[Offers], group: Mapping[str, Any]) -> None:
    """Refuse shared options in ``group`` that ``owner`` does not offer.

    Raises:
        ValueError: Such an option is set; the message gives the reason why it is not offered.
    """
    for name, reason in owner.refused_options.items():
        if group[name] != DEFAULTS[name]:
            raise ValueError(f"{owner.__name__}: {name}={group[name]!r} is not offered, because {reason}.")


class OwnSignature:
    """Descriptor of the signature of an optimizer class, in which `**options: Unpack[SharedOptions]` is expanded.

    `inspect.signature`, `help` and tools built on them then see every option with its name and default.
    """

    def __get__(self, instance: Offers | None, owner: type[Offers]) -> inspect.Signature:
        """Return the signature of the constructor of ``owner``, without ``self``."""
        _, *parameters = inspect.signature(owner.__init__).parameters.values()
        spelt: list[inspect.Parameter] = []
        for parameter in parameters:
            shared = parameter.kind is parameter.VAR_KEYWORD and SharedOptions.__name__ in str(parameter.annotation)
            spelt += _parameters(owner) if shared else [parameter]
        return inspect.Signature(spelt)


def _parameters(owner: type[Offers]) -> list[inspect.Parameter]:
    annotations = {name: getattr(a, "__forward_arg__", a) for name, a in SharedOptions.__annotations__.items()}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[name])
        for name, default in defaults_of(owner).items()
        if name not in owner.refused_options
    ]


def spell_out_docs(owner: type[Offers]) -> None:
    """Insert the documentation of each shared option into the docstring of ``owner``, for `help` and command lines."""
    line = re.search(r"^( *)\*\*options: .*\n", owner.__doc__ or "", re.M)
    section = re.search(r"^Attributes:\n((?: {4}.*\n)+)", inspect.getdoc(SharedOptions) or "", re.M)
    if owner.__doc__ and line and section:
        entries = textwrap.dedent(section.group(1))
        for name in owner.refused_options:
            entries = re.sub(rf"^{name}: .*\n(?: .*\n)*", "", entries, flags=re.M)
        owner.__doc__ = owner.__doc__.replace(line.group(), textwrap.indent(entries, line.group(1)))
