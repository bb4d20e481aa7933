"""Groups for optimizers of hidden matrices, and an optimizer base that gives all other parameters to AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FINITE, FRACTION, NON_NEGATIVE, Range
from lightning_optim.optim.base import FusedOptimizer
from lightning_optim.optim.hyperparameters import check_numbers
from lightning_optim.optim.ranges import ranges_of
from lightning_optim.optim.shared_options import SharedOptions
from lightning_optim.param_groups import Entry, NamedParameter, build_param_groups, named_parameters, why_not_hidden
from lightning_optim.param_groups.parts import is_stack


def muon_param_groups(model: nn.Module, rules: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """Parameter groups of ``model`` for `Muon` or `NorMuon`: as `build_param_groups` makes them, each split in two.

    What is no hidden matrix (`lightning_optim.param_groups.why_not_hidden`) goes to a second group, with
    ``rule="adamw"``. The optimizer's constructor does the same, but knows embeddings by their names only; here the
    modules are seen, too. Groups whose rule says which update to use stay as they are.

    Args:
        model: The model.
        rules: As for `build_param_groups`.

    Example:
        >>> model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
        >>> for group in muon_param_groups(model):
        ...     print(group["name"], group.get("rule"), [name for name, _ in group["params"]])
        default None ['body.weight']
        default_adamw adamw ['tokens.weight', 'body.bias', 'head.weight', 'head.bias']
    """
    found = {id(one.parameter): one for one in named_parameters(model)}
    groups: list[dict[str, Any]] = []
    for group in build_param_groups(model, rules):
        if "rule" in group:
            groups.append(group)
            continue
        known = [found[id(param)] for _, param in group["params"]]
        for part in split_group(group, [one.not_hidden for one in known]):
            groups += [part] if "rule" in part else _split_by_form(part, found)
    return groups


def split_group(group: Mapping[str, Any], not_hidden: Sequence[str | None]) -> list[dict[str, Any]]:
    """``group`` without what is no hidden matrix, and a group of this for AdamW; empty ones left out.

    Args:
        group: The group.
        not_hidden: Of each parameter, what else it is than a hidden matrix. The group for AdamW keeps it by name, as
            `not_hidden`, to be shown in plans.
    """
    params = list(group["params"])
    matrices = [param for param, reason in zip(params, not_hidden, strict=True) if reason is None]
    others = [(param, reason) for param, reason in zip(params, not_hidden, strict=True) if reason is not None]
    parts = [{**group, "params": matrices}] if matrices else []
    if others:
        name = {"name": f"{group['name']}_adamw"} if matrices and "name" in group else {}
        reasons = {param[0]: reason for param, reason in others if isinstance(param, tuple)}
        because = {"not_hidden": reasons} if reasons else {}
        parts.append({**group, **name, "params": [param for param, _ in others], "rule": "adamw", **because})
    return parts


def _split_by_form(group: dict[str, Any], found: Mapping[int, NamedParameter]) -> Iterator[dict[str, Any]]:
    """``group`` marked as holding kernels or stacks, as tensors of three and more dimensions; in two if it has both."""
    forms: dict[bool, list[Any]] = {}
    matrices = []
    for name, param in group["params"]:
        if param.dim() == 2:
            matrices.append((name, param))
        else:
            forms.setdefault(not is_stack(param, found[id(param)].modules), []).append((name, param))
    if "flatten" in group or not forms:
        yield group
        return
    if len(forms) == 1:
        yield {**group, "flatten": next(iter(forms))}
        return
    name = {"name": f"{group['name']}_stacks"} if "name" in group else {}
    stacks = {id(param) for _, param in forms[False]}
    yield {**group, "params": [entry for entry in group["params"] if id(entry[1]) not in stacks], "flatten": True}
    yield {**group, **name, "params": forms[False], "flatten": False}


class HiddenMatrixOptimizer(FusedOptimizer):
    """Base of optimizers for hidden matrices: what is none goes to AdamW, in groups of its own.

    A group without `rule` is split where it must be, when it is added: the matrices stay, and the others follow in a
    group with ``rule="adamw"`` and the settings of the original, its name with `_adamw` after it.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        defaults: Hyperparameters by name.
        adamw: Settings for groups that go to AdamW and do not have them: lr, betas, eps, weight_decay; None for none.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: As for `FusedOptimizer`; or a parameter of three dimensions needs ``flatten``.
        TypeError: An option is unknown.
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        "momentum": Range(0, 1, below=True),
        "ns_coefficients": FINITE,
        "ns_steps": Range(1, 99, whole=True),
        "adamw_lr": replace(NON_NEGATIVE, optional=True),
        "adamw_betas": FRACTION,
        "adamw_eps": NON_NEGATIVE,
        "adamw_weight_decay": replace(NON_NEGATIVE, optional=True),
    }

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        adamw: Mapping[str, Any],
        **options: Unpack[SharedOptions],
    ) -> None:
        self._adamw = {name: value for name, value in adamw.items() if value is not None}
        super().__init__(params, defaults, **options)
        # AdamW has checked them if it has a group; a mistake is one without such a group, too.
        check_numbers(type(self).__name__, {f"adamw_{n}": v for n, v in self._adamw.items()}, ranges_of(type(self)))

    groups_of = staticmethod(muon_param_groups)
    """How `OptimizerFactory` makes the groups of a model for this class."""

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """See `FusedOptimizer.hyperparameters`; those for AdamW are not this optimizer's own."""
        return {name: value for name, value in super().hyperparameters().items() if not name.startswith("adamw_")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see the class for what becomes of those that are no hidden matrices."""
        params = param_group["params"]
        if param_group.get("rule") is not None or isinstance(params, set):  # which torch refuses
            parts = [param_group]
        else:
            params = [params] if isinstance(params, Tensor) else list(params)
            parts = split_group({**param_group, "params": params}, [_looks_like(entry) for entry in params])
        count = len(self.param_groups)
        try:
            for part in parts or [param_group]:
                super().add_param_group(self._adamw | part if part.get("rule") == "adamw" else part)
        except Exception:
            del self.param_groups[count:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw": self._adamw}

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """See `FusedOptimizer.check`."""
        adjust = group["adjust_lr_fn"]
        if not (group["flatten"] is None or isinstance(group["flatten"], bool)):
            raise ValueError(f"{cls.__name__}: flatten={group['flatten']!r}; needed is None, True or False.")
        if adjust not in (None, "original", "match_rms_adamw"):
            raise ValueError(
                f"{cls.__name__}: adjust_lr_fn={adjust!r}; needed is None, 'original' or 'match_rms_adamw'."
            )


def _looks_like(entry: Any) -> str | None:
    """What a parameter is if it is no hidden matrix, as far as its name and shape tell."""
    name, param = entry if isinstance(entry, tuple) else ("", entry)
    return why_not_hidden(param, [name]) if isinstance(param, Tensor) else "unknown"
