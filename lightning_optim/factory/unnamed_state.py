"""Names for the parameters of a state dict that has none, as stock torch optimizers save it: by order and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_OF_PARAM_SHAPE = ("exp_avg", "momentum_buffer", "square_avg", "sum", "exp_avg_sq", "z", "prev", "acc_delta", "ax")
"""State that has its parameter's shape, whatever the optimizer."""

Shape = tuple[int, ...]


def name_parameters(
    state_dict: Mapping[str, Any], model: nn.Module, order: Sequence[str] = ()
) -> list[dict[Any, str]] | str:
    """Find out which parameters of ``model`` the groups of a state dict without names have.

    A stock optimizer has been given ``model.parameters()``, or those that are trainable, in one group or cut into
    several, each in the module's order. One group is matched by that order; several by the one way to cut the
    parameters that fits the shapes of the state.

    Args:
        state_dict: As an optimizer of unnamed parameters returns it.
        model: The model; tied parameters count once.
        order: Names in the order that the model had when the state was saved, as the keys of its own state dict; its
            present order where they are not given.

    Returns:
        For each group its names by the numbers of the parameters, without those that were frozen and have no state;
        or, in place of all, the reason why they cannot be told, a clause.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> name_parameters(torch.optim.AdamW(model.parameters()).state_dict(), model)
        [{0: '0.weight', 1: '0.bias', 2: '1.weight', 3: '1.bias'}]
    """
    everything = _in_order(model, order)
    trainable = {name: param for name, param in everything.items() if param.requires_grad}
    groups: list[list[Any]] = [list(group["params"]) for group in state_dict["param_groups"]]
    count = sum(map(len, groups))
    state = state_dict["state"]
    # A stock optimizer has frozen parameters, too, mostly, and keeps nothing of them.
    with_state = [[number for number in group if state.get(number)] for group in groups]
    owner = type(model).__name__
    reason = (
        f"it has {count} parameters without names, and {owner} has {len(trainable)} that are trainable, of "
        f"{len(everything)}"
    )
    for numbers, params in ((groups, trainable), (with_state, trainable), (groups, everything)):
        if sum(map(len, numbers)) != len(params) or (numbers is with_state and count != len(everything)):
            continue
        shapes = [[_shape(state.get(number, {})) for number in group] for group in numbers]
        ways = list(_ways(list(params.items()), shapes, limit=2))
        if len(ways) == 1:
            return [dict(zip(group, names, strict=True)) for group, names in zip(numbers, ways[0], strict=True)]
        fit = f"fit {owner} in more than one order" if ways else f"do not fit the order of {owner}"
        reason = f"its {count} parameters have no names, and the shapes of their state {fit}"
    return reason


def fits_by_position(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each saved group has as many parameters as the present one at its place, of the same shapes."""
    saved = state_dict["param_groups"]
    return [len(group["params"]) for group in saved] == [len(group["params"]) for group in groups] and all(
        _shape(state_dict["state"].get(number, {})) in (None, tuple(param.shape))
        for group, other in zip(groups, saved, strict=True)
        for param, number in zip(group["params"], other["params"], strict=True)
    )


def _in_order(model: nn.Module, order: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters by the first of their names, in the order of ``order``, if that has all of them."""
    present = dict(model.named_parameters())
    first = {id(param): name for name, param in present.items()}
    of_name = dict(model.named_parameters(remove_duplicate=False))
    names = list(dict.fromkeys(first[id(of_name[name])] for name in order if name in of_name))
    return {name: present[name] for name in names} if len(names) == len(present) else present


def _shape(state: Mapping[str, Any]) -> Shape | None:
    """The shape of the parameter that a state is of; None if it does not tell."""
    found = (state[key] for key in _OF_PARAM_SHAPE if isinstance(state.get(key), Tensor))
    return next((tuple(tensor.shape) for tensor in found), None)


def _ways(
    params: Sequence[tuple[str, nn.Parameter]], shapes: Sequence[Sequence[Shape | None]], limit: int
) -> Iterator[list[list[str]]]:
    """Up to ``limit`` ways to deal out the parameters, in order, to groups of these shapes."""
    dead: set[tuple[int, ...]] = set()
    found = 0
    # Depth first, without recursion: (how many of each group are taken, the group that the last parameter went to).
    path: list[tuple[tuple[int, ...], int]] = [((0,) * len(shapes), 0)]
    alive = [False]
    while path:
        taken, group = path[-1]
        place = sum(taken)
        if place == len(params):
            found += 1
            yield _dealt(params, [chosen for _, chosen in path[:-1]], len(shapes))
            if found == limit:
                return
            group = len(shapes)
            alive[-1] = True
        while group < len(shapes) and not _next_fits(shapes[group], taken[group], params[place][1]):
            group += 1
        if group == len(shapes):
            path.pop()
            was_alive = alive.pop()
            if not was_alive:
                dead.add(taken)
            if path:
                alive[-1] |= was_alive
                path[-1] = (path[-1][0], path[-1][1] + 1)
            continue
        path[-1] = (taken, group)
        following = (*taken[:group], taken[group] + 1, *taken[group + 1 :])
        if following in dead:
            path[-1] = (taken, group + 1)
        else:
            path.append((following, 0))
            alive.append(False)


def _next_fits(shapes: Sequence[Shape | None], taken: int, param: nn.Parameter) -> bool:
    return taken < len(shapes) and shapes[taken] in (None, tuple(param.shape))


def _dealt(params: Sequence[tuple[str, nn.Parameter]], groups: Sequence[int], count: int) -> list[list[str]]:
    dealt: list[list[str]] = [[] for _ in range(count)]
    for (name, _), group in zip(params, groups, strict=True):
        dealt[group].append(name)
    return dealt
