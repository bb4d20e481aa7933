"""Loading of optimizer state from this package and from torch, by position or by parameter name."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.core.group_keys import PARAMS
from lightning_optim.core.placements import is_sharded, placed_as
from lightning_optim.core.sharding import local
from lightning_optim.core.shards import placed_state
from lightning_optim.core.suggest import nearest
from lightning_optim.kernels import plain
from lightning_optim.kernels.quantization import BLOCK
from lightning_optim.kernels.rules import Rule, TensorRule
from lightning_optim.optim.admission import Ruled, Subject, check_state
from lightning_optim.optim.sharded_codes import fitted
from lightning_optim.optim.state import tensor_names

ADVICE = (
    "Nothing has been loaded. Remove the state of parameters that are new or of another shape from the state dict, so "
    "that they start from new state"
)


class Loadable(Ruled, Protocol):
    """What is needed of an optimizer to load its state."""

    # torch's own, which `Optimizer.load_state_dict` runs, too
    _optimizer_load_state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _optimizer_load_state_dict_post_hooks: OrderedDict[int, Callable[..., Any]]

    def __setstate__(self, state: dict[str, Any]) -> None: ...


OF_PARAMETERS = ("flatten", "split", "split_dim", "split_repeats")
"""Group keys that describe the parameters rather than how they are updated."""

UNSAVED_DEFAULTS: Mapping[str, Any] = MappingProxyType({"ema": None, "kahan_bits": 16})
"""Group keys that a state dict lacks where they have this value. Distributed checkpoints from before these options lack
them, and `torch.distributed.checkpoint` loads a checkpoint only if it has every key of the present state dict."""


def without_defaults(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose groups lack the keys of `UNSAVED_DEFAULTS` that have the values there."""
    groups = [
        {k: v for k, v in group.items() if k not in UNSAVED_DEFAULTS or v != UNSAVED_DEFAULTS[k]}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def load_state_dict(optimizer: Loadable, state_dict: Mapping[str, Any]) -> None:
    """Load ``state_dict`` into ``optimizer``; see `FusedOptimizer.load_state_dict`.

    Args:
        optimizer: The optimizer, modified in place; it is unchanged after an error.
        state_dict: State dict of this class, or of torch's optimizer of the same name; tensors are copied.

    Raises:
        ValueError: Parameters do not match by position or by name, or a state does not match its parameter.
    """
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    saved_groups = [deepcopy(group) for group in state_dict["param_groups"]]  # Groups must not share tensors.
    by_position = _same_order(optimizer.param_groups, saved_groups)
    ids = (
        _ids_by_position(optimizer.param_groups, saved_groups) if by_position else _ids_by_name(optimizer, saved_groups)
    )

    owners = {saved: group for group in saved_groups for saved in group["params"]}
    sources = []
    for i, ids_of_group in enumerate(ids):
        source = owners[ids_of_group[0]] if ids_of_group else saved_groups[i] if i < len(saved_groups) else {}
        # Names keep their values, because they identify the present parameters of the group. So do keys that torch does
        # not save, and descriptions of parameters if these come from saved groups with different descriptions.
        own = {"params"} if by_position else set(PARAMS)
        own |= {key for key in OF_PARAMETERS if len({str(owners[saved].get(key)) for saved in ids_of_group}) > 1}
        sources.append({k: v for k, v in source.items() if k not in own})
        if source.get("kahan_sum"):  # Its state has 16 bits. Averages, in contrast, may begin at any step.
            sources[-1].setdefault("kahan_bits", UNSAVED_DEFAULTS["kahan_bits"])
    known = {saved for ids_of_group in ids for saved in ids_of_group}
    state: defaultdict[Any, Any] = defaultdict(dict)
    for saved, entry in state_dict["state"].items():
        if saved not in known:
            state[saved] = deepcopy(entry)  # This entry does not belong to a parameter.
    for group, ids_of_group, source in zip(optimizer.param_groups, ids, sources, strict=True):
        for index, (param, saved) in enumerate(zip(group["params"], ids_of_group, strict=True)):
            if saved in state_dict["state"]:
                subject = Subject(optimizer, group | source, index)
                fits = fitted(state_dict["state"][saved], param, _rule_of(subject).compressible)
                # torch saves None for a momentum that does not exist yet.
                entry = {key: value for key, value in fits.items() if value is not None}
                factors = _factors(subject, param, entry)
                state[param] = {key: _copied(param, key, value, factors) for key, value in entry.items()}
                _check(subject, param, state[param])
                _refuse_bare_codes(subject, state[param])

    for group, source in zip(optimizer.param_groups, sources, strict=True):  # The optimizer is unchanged up to here.
        group.update(source)
    optimizer.__setstate__({"state": state})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _same_order(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether to match parameters by position: names are missing, or equal and in the same order."""
    if not all("param_names" in group for group in (*groups, *saved)):
        return True
    return [group["param_names"] for group in groups] == [group["param_names"] for group in saved]


def _ids_by_position(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"The state dict has parameter groups of sizes {saved_sizes}, this optimizer of {sizes}. Create it with "
            "the same groups, or with named parameters on both sides, which are matched by name."
        )
    return [list(group["params"]) for group in saved]


def _ids_by_name(optimizer: Ruled, saved: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    ids = {name: i for group in saved for name, i in zip(group["param_names"], group["params"], strict=True)}
    wanted = [name for group in optimizer.param_groups for name in group["param_names"]]
    missing = [name for name in wanted if name not in ids]
    if missing:
        raise ValueError(
            f"The state dict has no parameter {missing[0]!r} ({len(missing)} missing). {nearest(missing[0], ids)}"
        )
    surplus = sorted(set(ids) - set(wanted))
    if surplus:
        raise ValueError(
            f"The state dict has {surplus[0]!r}, which this optimizer does not have ({len(surplus)} such). "
            f"{nearest(surplus[0], wanted)}"
        )
    return [[ids[name] for name in group["param_names"]] for group in optimizer.param_groups]


def _check(subject: Subject, param: Tensor, state: Mapping[str, Any]) -> None:
    """Check the loaded state of ``param``: whole tensors if both are DTensors, otherwise local shards.

    Raises:
        RefusedError: A state does not match the parameter.
    """
    rule = _rule_of(subject)
    whole = {key: value for key, value in state.items() if hasattr(value, "placements")}
    here = {key: value for key, value in state.items() if key not in whole}
    for part, tensor, others in ((whole, param, here), (here, local(param), whole)):
        if part:
            check_state(subject, tensor, rule, part, ADVICE, elsewhere=others)


def _factors(subject: Subject, param: Tensor, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of loaded states that are placed over ranks although their shape may not be the parameter's."""
    rule = _rule_of(subject)
    return tuple(tensor_names(rule, state)) if isinstance(rule, TensorRule) and is_sharded(param) else ()


def _refuse_bare_codes(subject: Subject, state: Mapping[str, Any]) -> None:
    """Refuse 8-bit codes that have been converted to floating point.

    `torch.distributed.checkpoint` loads into state as the present optimizer makes it, whatever its dtype: codes would
    become moments of up to 255, without a word.

    Raises:
        RefusedError: A state that may be stored as codes has only whole numbers from 0 to 255, and several of them.
    """
    if subject.group.get("state_bits") != 8:  # With the state, a checkpoint brings its settings.
        return
    for name in _rule_of(subject).compressible:
        value = local(state[name]) if isinstance(state.get(name), Tensor) else None
        if value is None or not value.is_floating_point() or value.numel() < BLOCK or value.is_meta:
            continue
        if bool(((value == value.round()) & (value >= 0) & (value < 256)).all()) and len(torch.unique(value)) > 2:
            raise subject.refuse(
                name,
                f"has whole numbers up to 255: 8-bit codes without their scales in {name}_scale. A sharded checkpoint "
                "is loaded into state of the form in which it was saved: here a vector of one process has codes, and "
                "one that is sharded has none. Keep vectors in a group with state_bits=32 in both runs, or load whole "
                "state (`torch.save`, `optimizer.load_state_dict`). Nothing has been loaded",
            )


def _rule_of(subject: Subject) -> Rule:
    """Return the rule of a parameter whose averaged weights may be loaded."""
    return subject.optimizer.rule_of({**subject.group, "train_mode": True})


def _copied(param: Tensor, key: str, value: Any, factors: Collection[str] = ()) -> Any:
    """Copy ``value`` to the device of the parameter, in its saved dtype; return unchanged what `check_state` refuses.

    `widening` converts the dtype later if necessary. States named in ``factors`` are placed by `placed_state`.
    """
    if isinstance(value, Tensor) and (value.is_meta or plain.why_unsafe(local(value), written=False)):
        return value
    if key == "step" and isinstance(value, Tensor | int | float):
        # Old checkpoints have a plain number; torch stores the tensor on the CPU unless fused.
        value = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        value = value.reshape(()) if value.numel() == 1 else value
        dtype = value.dtype if value.is_floating_point() else torch.float32
        return value.to(device=param.device, dtype=dtype, copy=True)
    if isinstance(value, Tensor):
        value = value.detach().to(param.device, copy=True)
        # torch's SGD creates its momentum from the first gradient, whose placements may differ.
        placed = placed_as(value, param)
        return placed_state(placed, param) if key in factors else placed
    return deepcopy(value)
