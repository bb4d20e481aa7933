"""The depth of each parameter in a model: embeddings at 0, then layer by layer, the head last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_optim.param_groups.parts import NamedParameter

_BEFORE, _INSIDE, _AFTER = 0, 1, 2
Place = tuple[float, ...]
"""Position of a parameter; positions sort by depth, and parameters with the same position are equally deep."""

_LAYER = re.compile(
    r"(?:^|\.)(?P<kind>layers?|blocks?|h|stages?|resblocks|encoder_layers|decoder_layers|layer(?=\d))\.?(?P<index>\d+)\."
)
"""One layer of a stack: ``encoder.layer.3.``, ``layers.3.``, ``h.3.``, ``blocks.3.``, ``layer1.``."""
_WITHIN = re.compile(r"(?P<kind>(?:blocks|layers)\.)?(?P<index>\d+)\.")
"""A block of a stage, right after it: ``stages.1.blocks.2.``, ``layers.1.blocks.2.`` (Swin), ``layer1.2.`` (ResNet)."""
_MERGE_WITH_PREVIOUS = 99999  # timm's number for "belongs to the previous group"


def parameter_depths(
    model: nn.Module, parameters: Sequence[NamedParameter], pattern: str | None = None
) -> dict[str, int]:
    r"""Compute the depth of each parameter, by name, counted from 0 without gaps.

    The first of these that applies to the model decides: the ``pattern``; timm's ``group_matcher``; layers under the
    names that transformers and residual networks use (``layer.N``, ``layers.N``, ``blocks.N``, ``h.N``, ``stages.N``);
    the children of its largest `nn.Sequential` or `nn.ModuleList`. Parameters outside of layers come before them if
    they are embeddings or registered before the first layer, else after them. A tied weight has the depth of its first
    use. Several stacks (encoder and decoder, two towers) are numbered in parallel and aligned at their ends.

    Args:
        model: The model.
        parameters: Its parameters; frozen ones are included because they count for the depth.
        pattern: A regular expression to find in parameter names, whose groups capture the numbers that give the depth:
            ``"tower\.(\d+)\."``.

    Returns:
        The depth by parameter name.

    Raises:
        ValueError: No depth is recognised in the model, or the pattern matches nothing or captures no number.

    Example:
        >>> from lightning_optim.param_groups import named_parameters
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layers": nn.Sequential(nn.Linear(4, 4)),
        ...                        "head": nn.Linear(4, 9, bias=False)})
        >>> parameter_depths(model, list(named_parameters(model)))
        {'embed.weight': 0, 'layers.0.weight': 1, 'layers.0.bias': 1, 'head.weight': 2}
    """
    places = _places(model, parameters, pattern)
    if places is None:
        names = ", ".join(repr(parameter.name) for parameter in parameters[:4])
        raise ValueError(
            f"No depth is recognised in {type(model).__name__}: it has neither timm's group_matcher, nor layers named "
            "layer.N, layers.N, blocks.N, h.N or stages.N, nor an nn.Sequential or nn.ModuleList of two layers with "
            f"parameters. Its parameters are {names}, ...: give layer_decay a `pattern` that captures the layer's "
            r"number, for instance 'tower\.(\d+)\.'."
        )
    rank = {place: depth for depth, place in enumerate(sorted(set(places.values())))}
    return {name: rank[place] for name, place in places.items()}


def _places(model: nn.Module, parameters: Sequence[NamedParameter], pattern: str | None) -> dict[str, Place] | None:
    if pattern is not None:
        regex = re.compile(pattern)
        indices = {p.name: found for p in parameters if (found := _first(p.names, lambda n: _caught(regex, n)))}
        if not indices:
            names = ", ".join(repr(parameter.name) for parameter in parameters[:4])
            raise ValueError(
                f"Invalid pattern={pattern!r} of layer_decay: matches no parameter. Their names are {names}, ..."
            )
        return _around(parameters, {name: ("", index) for name, index in indices.items()})
    for prefix, module in model.named_modules():
        if callable(matcher := getattr(module, "group_matcher", None)):
            return _by_timm(matcher(), parameters, f"{prefix}." if prefix else "")
    layers = {p.name: found for p in parameters if (found := _first(p.names, _named_layer))}
    if len(set(layers.values())) < 2:
        layers = _children_of_the_largest_stack(model, parameters) or layers
    return _around(parameters, layers) if layers else None


def _around(parameters: Sequence[NamedParameter], layers: Mapping[str, tuple[str, Place]]) -> dict[str, Place]:
    """Return the position of every parameter, given the stack and the index in it for those in layers."""
    stacks: dict[str, list[Place]] = {}
    for stack, index in sorted(set(layers.values())):
        stacks.setdefault(stack, []).append(index)
    longest = max(len(indices) for indices in stacks.values())
    first = next(i for i, parameter in enumerate(parameters) if parameter.name in layers)
    places: dict[str, Place] = {}
    for i, parameter in enumerate(parameters):
        if parameter.name in layers:
            stack, index = layers[parameter.name]
            # Layers count from the end, because the last layers of two towers are equally far from the loss.
            places[parameter.name] = (_INSIDE, longest - len(stacks[stack]) + stacks[stack].index(index))
        elif "embedding" in parameter.parts or (i < first and "head" not in parameter.parts):
            places[parameter.name] = (_BEFORE,)
        else:
            places[parameter.name] = (_AFTER,)
    return places


def _named_layer(name: str) -> tuple[str, Place] | None:
    found = _LAYER.search(name)
    if found is None:
        return None
    index: Place = (int(found["index"]),)
    within = _WITHIN.match(name, found.end())
    # `block.0.layer.1` (T5) and `layers.0.1` are excluded, because they are parts of one layer.
    if within and found["kind"] in (("layers", "stages", "stage") if within["kind"] else ("layer", "stages", "stage")):
        index += (int(within["index"]),)
    return name[: found.start()], index


def _children_of_the_largest_stack(
    model: nn.Module, parameters: Sequence[NamedParameter]
) -> dict[str, tuple[str, Place]]:
    stacks: dict[str, dict[str, tuple[str, Place]]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            start = f"{prefix}." if prefix else ""
            inside = [p.name for p in parameters if p.name.startswith(start)]
            children = {name: name[len(start) :].partition(".")[0] for name in inside}
            order = {child: float(i) for i, (child, _) in enumerate(module.named_children())}
            stacks[prefix] = {name: (prefix, (order[child],)) for name, child in children.items() if child in order}
    deep = {prefix: layers for prefix, layers in stacks.items() if len(set(layers.values())) > 1}
    return max(deep.values(), key=len, default={})


def _by_timm(
    matcher: Mapping[str, Any] | Callable[[str], Any], parameters: Sequence[NamedParameter], prefix: str
) -> dict[str, Place]:
    """Return positions by timm's ``group_matcher``: regular expressions whose groups, and a suffix, number the layers.

    Parameters that the matcher does not know, and those outside the module that has it, belong to the head.
    """
    rules: list[tuple[re.Pattern[str], int, Sequence[float]]] = []
    if not callable(matcher):
        for ordinal, specification in enumerate(matcher.values()):
            if specification is None:
                continue
            several = [(specification, None)] if isinstance(specification, str) else specification
            rules += [(re.compile(regex), ordinal, suffix or ()) for regex, suffix in several]

    def place(name: str) -> Place:
        if not name.startswith(prefix):
            return (float("inf"),)
        name = name.removeprefix(prefix)
        if callable(matcher):
            answer = matcher(name)
            return tuple(map(float, answer)) if isinstance(answer, Iterable) else (float(answer),)
        for regex, ordinal, suffix in rules:
            if found := regex.match(name):
                return (float(ordinal), *(float(part) for part in (*found.groups(), *suffix) if part is not None))
        return (float("inf"),)

    places = {parameter.name: min(place(name) for name in parameter.names) for parameter in parameters}
    merged: dict[Place, Place] = {}
    for given in sorted(set(places.values())):
        previous = list(merged.values())[-1] if merged else given
        merged[given] = previous if given[-1] == _MERGE_WITH_PREVIOUS else given
    return {name: merged[given] for name, given in places.items()}


def _caught(regex: re.Pattern[str], name: str) -> Place | None:
    found = regex.search(name)
    if found is None:
        return None
    try:
        place = tuple(float(part) for part in found.groups() if part is not None)
    except ValueError:
        place = ()
    if not place:
        raise ValueError(
            f"Invalid pattern={regex.pattern!r} of layer_decay: captures {found.groups()} in {name!r}, but must "
            r"capture the number of the layer, for instance 'tower\.(\d+)\.'."
        )
    return place


def _first(names: Iterable[str], function: Callable[[str], Any]) -> Any:
    return next((answer for name in names if (answer := function(name)) is not None), None)
