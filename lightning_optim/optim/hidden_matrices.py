"""Parameter groups for optimizers of hidden matrices, and a base class that updates all other parameters by AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optim.core.ranges import FRACTION, NON_NEGATIVE, Range, ranges_of
from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import checked
from lightning_optim.core.user_frame import depth_outside
from lightning_optim.optim.adamw import AdamW
from lightning_optim.optim.base import FusedOptimizer, class_of_rule
from lightning_optim.optim.fused_groups import cut_by_fused, fused_note, resolve_split
from lightning_optim.optim.hyperparameters import check_lengths, check_numbers
from lightning_optim.optim.matrix_form import check_form
from lightning_optim.optim.matrix_groups import cut_by_form
from lightning_optim.optim.matrix_scale import SCALES
from lightning_optim.optim.ns_coefficients import iterations
from lightning_optim.optim.shared_options import SharedOptions
from lightning_optim.param_groups import Entry, build_param_groups, named_parameters, why_not_hidden
from lightning_optim.param_groups.fused import find_fused


@checked
def muon_param_groups(model: nn.Module, rules: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """Build parameter groups for `Muon` or `NorMuon`: those of `build_param_groups`, each split into two.

    Parameters that are not hidden matrices (`lightning_optim.param_groups.why_not_hidden`) get a second group with
    ``rule="adamw"``. Stacks of matrices, such as experts, and fused projections, such as query, key and value in one
    weight, get groups of their own with the keys `flatten` and `split`. The constructor of the optimizer does the same,
    but only by names; this function also inspects the modules. Groups that have the key `rule` already are not split,
    and those with `flatten` or `split` keep their values.

    Args:
        model: The model.
        rules: As for `build_param_groups`.

    Returns:
        Parameter groups with (name, parameter) pairs.

    Example:
        >>> model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
        >>> for group in muon_param_groups(model):
        ...     print(group["name"], group.get("rule"), [name for name, _ in group["params"]])
        default None ['body.weight']
        default_adamw adamw ['tokens.weight', 'body.bias', 'head.weight', 'head.bias']
    """
    found = {id(one.parameter): one for one in named_parameters(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    groups: list[dict[str, Any]] = []
    for group in build_param_groups(model, rules):
        if "rule" in group:
            groups.append(group)
            continue
        known = [found[id(param)] for _, param in group["params"]]
        for part in split_group(group, [one.not_hidden for one in known]):
            if "rule" in part:
                groups.append(part)
                continue
            for form in cut_by_form(part, found):
                groups += cut_by_fused(form, [find_fused(found[id(param)], modules) for _, param in form["params"]])
    return groups


def split_group(group: Mapping[str, Any], not_hidden: Sequence[str | None]) -> list[dict[str, Any]]:
    """Split ``group`` into a group of hidden matrices and a group of other parameters for AdamW.

    Args:
        group: The parameter group.
        not_hidden: Reason why each parameter is not a hidden matrix, None for hidden matrices. The group for AdamW
            stores the reasons by name under `not_hidden`, for plans.

    Returns:
        The groups that are not empty.
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


_NEEDED = ("betas", "eps")
"""Settings for AdamW that cannot be those of the other groups."""


class HiddenMatrixOptimizer(FusedOptimizer):
    """Base class of optimizers for hidden matrices, which puts all other parameters into separate groups for AdamW.

    A group without `rule` is split if necessary when it is added: the hidden matrices stay, and the other parameters
    follow in a group with ``rule="adamw"``, the settings of the original, and its name with the suffix `_adamw`.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        defaults: Hyperparameters by name.
        adamw: Defaults of groups for AdamW: lr, betas, eps, weight_decay. None for the weight decay of the original
            group; None for its lr with `match_rms_adamw`, whose scale is AdamW's, and otherwise for that of AdamW.
        **options: Options that all optimizers share; see `SharedOptions`.

    Raises:
        ValueError: As for `FusedOptimizer`, or a parameter of three dimensions needs ``flatten``.
        TypeError: An option is unknown.
    """

    structured = frozenset({"ns_coefficients", "split"})
    ranges: ClassVar[Mapping[str, Range]] = {
        "momentum": Range(0, 1, below=True),
        "ns_steps": Range(1, 99, whole=True),
        "split_dim": Range(whole=True, tensor=False),
        "split_repeats": Range(1, whole=True, tensor=False),
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
        self._adamw = {name: value for name, value in adamw.items() if value is not None or name in _NEEDED}
        if adamw["lr"] is None and defaults["adjust_lr_fn"] != "match_rms_adamw":
            self._adamw["lr"] = AdamW.hyperparameters()["lr"]
        # They must be valid without a group for AdamW as well, and a message has the names that were given.
        named = {f"adamw_{name}": value for name, value in self._adamw.items()}
        lengths = {name: (0.9, 0.95) if name == "adamw_betas" else None for name in named}
        check_lengths(type(self).__name__, named, lengths)
        check_numbers(type(self).__name__, named, ranges_of(type(self)))
        super().__init__(params, defaults, **options)
        if note := fused_note(self.param_groups):
            warnings.warn(f"{type(self).__name__}: {note}", stacklevel=depth_outside())

    groups_of = staticmethod(muon_param_groups)
    """Function by which `OptimizerFactory` builds the parameter groups of a model for this class."""

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """Return the result of `FusedOptimizer.hyperparameters` without the settings for AdamW."""
        return {name: value for name, value in super().hyperparameters().items() if not name.startswith("adamw_")}

    @classmethod
    def usual_lr_of(cls, group: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return AdamW's range for `match_rms_adamw`, whose steps are as large as AdamW's, and otherwise `usual_lr`."""
        return AdamW.usual_lr if group.get("adjust_lr_fn") == "match_rms_adamw" else cls.usual_lr

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with parameters that are not hidden matrices in a separate group; see the class."""
        params, rule = param_group["params"], param_group.get("rule")
        if isinstance(params, set):  # torch refuses sets.
            parts = [param_group]
        else:
            params = [params] if isinstance(params, Tensor) else list(params)
            parts = [{**param_group, "params": params}]
            if rule is None:
                parts = split_group(parts[0], [_looks_like(entry) for entry in params])
        count = len(self.param_groups)
        try:
            if rule is None or issubclass(class_of_rule(rule), HiddenMatrixOptimizer):
                parts = [own for part in parts for own in resolve_split(part, self.defaults["split"])]
            for part in parts or [param_group]:
                super().add_param_group(self._adamw | part if part.get("rule") == "adamw" else part)
        except Exception:
            del self.param_groups[count:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw": self._adamw}

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Implement `FusedOptimizer.check`."""
        adjust = group["adjust_lr_fn"]
        check_form(cls.__name__, group, auto=True)
        if adjust not in (None, *SCALES):
            raise ValueError(
                f"{cls.__name__}: Invalid adjust_lr_fn={adjust!r}: must be None or the name of a factor. "
                f"{nearest(str(adjust), SCALES)}"
            )
        try:
            iterations(group["ns_coefficients"], group["ns_steps"])
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None


def _looks_like(entry: Any) -> str | None:
    """Return the reason why a parameter is not a hidden matrix by its name and shape; None if it may be one."""
    name, param = entry if isinstance(entry, tuple) else ("", entry)
    if isinstance(param, UninitializedParameter):
        return None  # The check of all parameters says what is missing.
    return why_not_hidden(param, [name]) if isinstance(param, Tensor) else "unknown"
