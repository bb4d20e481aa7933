"""Parameter groups of kernels and of stacks of matrices, told apart by the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_optim.param_groups import Entry, NamedParameter, build_param_groups, named_parameters
from lightning_optim.param_groups.parts import is_stack


def stack_param_groups(model: nn.Module, rules: Sequence[Entry] = ()) -> list[dict[str, Any]]:
    """Build parameter groups that tell stacks of matrices, such as experts, by ``flatten=False`` from kernels.

    Args:
        model: The model.
        rules: As for `build_param_groups`.

    Returns:
        The groups of `build_param_groups`; one that has stacks and kernels is split into two.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> model.experts = nn.Parameter(nn.Linear(4, 4).weight.detach().expand(3, 4, 4).clone())
        >>> for group in stack_param_groups(model):
        ...     print(group["name"], group.get("flatten"), [name for name, _ in group["params"]])
        default False ['weight', 'bias', 'experts']
    """
    found = {id(one.parameter): one for one in named_parameters(model)}
    groups: list[dict[str, Any]] = []
    for group in build_param_groups(model, rules):
        groups += [group] if "rule" in group else cut_by_form(group, found, kernels=None)
    return groups


def cut_by_form(
    group: dict[str, Any], found: Mapping[int, NamedParameter], kernels: bool | None = True
) -> Iterator[dict[str, Any]]:
    """Set `flatten` of ``group`` for kernels or stacks of matrices; split the group if it has both.

    Args:
        group: The parameter group; one with `flatten` is left as it is.
        found: The parameters of the model by identity.
        kernels: `flatten` of kernels; None to leave it as it is.

    Yields:
        One or two groups.
    """
    stacks, others, kinds = [], [], set()
    for name, param in group["params"]:
        one = found[id(param)]
        if one.dim > 2 and is_stack(param, one.modules):
            stacks.append((name, param))
        else:
            others.append((name, param))
            kinds.add(one.dim > 2)
    if "flatten" in group or not (stacks or True in kinds):
        yield group
        return
    alone = True not in kinds  # Matrices are the same, flattened or not.
    if not stacks or alone or not others:
        yield group | ({"flatten": False} if stacks else {"flatten": kernels} if kernels is not None else {})
        return
    name = {"name": f"{group['name']}_stacks"} if "name" in group else {}
    yield {**group, "params": others} | ({"flatten": kernels} if kernels is not None else {})
    yield {**group, **name, "params": stacks, "flatten": False}
