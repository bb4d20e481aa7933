"""Relations between the parameters of a model that tell a fault from what is zero by construction."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

_ALIKE = 0.01
"""Smallest share of the largest gradient of a family that modules used side by side have."""


class ParameterMap:
    """Which parameters vouch for each other.

    **Companions.** The gradient of a bias is the sum of what arrives at the outputs of its module, and that of the
    weight is made of the same. A bias whose gradient is zero (up to rounding) while that of its weight is not is zero
    by construction: a normalization after it, or the softmax over the keys of attention, takes any shift out. The same
    holds for a scale before a normalization. So a vector is judged together with the matrices of its module, or with
    the next ones before and after it if its module has none.

    **Idle members.** One of several modules of the same build under one parent, of which no parameter has a gradient
    while another has, is an expert without tokens or a branch that is not taken. The members of a `torch.nn.Sequential`
    always run, so this is not assumed of them.

    Args:
        names: Name of each parameter of the optimizer, by its place; None where it is not known.
        shapes: Shape of each parameter, by its place.
        order: Names of all parameters in the order of the model.
        sequential: Names of the modules whose children always run, one after another.
    """

    def __init__(
        self,
        names: Mapping[int, str | None] | Sequence[str | None] = (),
        shapes: Sequence[tuple[int, ...]] = (),
        order: Sequence[str] = (),
        sequential: Collection[str] = (),
    ) -> None:
        known = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        self._place = {name: place for place, name in known.items() if name is not None}
        self._shapes = dict(enumerate(shapes))
        rank = {name: i for i, name in enumerate(order)}
        self._order = sorted((rank[name], place) for name, place in self._place.items() if name in rank)
        self._rank = {place: i for i, place in self._order}
        self._owned: dict[str, list[int]] = defaultdict(list)
        for name, place in self._place.items():
            self._owned[_owner(name)].append(place)
        self._name = {place: name for name, place in self._place.items()}
        self._matrices = [(i, place) for i, place in self._order if not self._is_vector(place)]
        self._families = self._find_families(set(sequential))

    def owned(self, place: int) -> list[int]:
        """Return the matrices of the module of a vector; empty for a matrix."""
        if place not in self._name or not self._is_vector(place):
            return []
        return [other for other in self._owned[_owner(self._name[place])] if not self._is_vector(other)]

    def companions(self, place: int) -> list[int]:
        """Return the matrices next to a vector before and after it, in the order of the model; empty for a matrix."""
        if place not in self._rank or not self._is_vector(place):
            return []
        at = bisect.bisect(self._matrices, (self._rank[place], -1))
        return [matrix for _, matrix in self._matrices[max(at - 1, 0) : at + 1]]

    def is_spared(self, place: int, bad: Collection[int], rms: Mapping[int, float], *, own_only: bool = False) -> bool:
        """Return whether a parameter is zero by construction.

        Args:
            place: Place of the parameter.
            bad: Places of parameters without a gradient that matters.
            rms: Root mean square of each gradient, by the place of its parameter.
            own_only: Whether only the matrices of the same module count.
        """
        if own := self.owned(place):
            return any(other in rms and other not in bad for other in own)
        near = [] if own_only else [other for other in self.companions(place) if other in rms or other in bad]
        return bool(near) and not any(other in bad for other in near)

    def idle(self, bad: Collection[int], rms: Mapping[int, float], *, exact: bool) -> set[int]:
        """Return the parameters of idle members.

        Args:
            bad: Places of parameters without a gradient that matters.
            rms: Root mean square of each gradient, by the place of its parameter.
            exact: Whether gradients that are missing or exactly 0 are meant. Small ones may also be those at the lower
                end of a chain of layers. In that case the gradient of each layer is smaller than that of the next, so
                the other members of the family differ widely, and nothing before it has a larger gradient.
        """

        def healthy(place: int) -> bool:
            return place in rms and place not in bad

        found: set[int] = set()
        for family in self._families:
            out = [member for member in family if all(place in bad for place in member)]
            whole = [m for m in family if all(healthy(place) for place in m if not self._is_vector(place))]
            if not out or not whole:
                continue
            sizes = [max(rms.get(place, 0.0) for place in member) for member in family if member not in out]
            if not exact and min(sizes) < _ALIKE * max(sizes):
                continue
            for member in out:
                first = min(self._rank.get(place, 0) for place in member)
                if exact or any(healthy(place) for i, place in self._matrices if i < first):
                    found.update(member)
        return found

    def has_zero_inputs(self, zero: Collection[int], bad: Collection[int], rms: Mapping[int, float]) -> bool:
        """Return whether the inputs of a module are all 0: its bias has a gradient, but its weight has none.

        Args:
            zero: Places of parameters whose gradient is 0.
            bad: Places of parameters without a gradient that matters.
            rms: Root mean square of each gradient, by the place of its parameter.
        """
        return any(
            other in rms and other not in bad and self._is_vector(other)
            for place in zero
            if self._name.get(place, "").endswith("weight")
            for other in self._owned[_owner(self._name[place])]
        )

    def _is_vector(self, place: int) -> bool:
        shape = self._shapes.get(place, ())
        if len(shape) <= 1:
            return True
        if math.prod(shape) != max(shape):
            return False
        # The scales of `torch.nn.utils.parametrizations.weight_norm`, [units, 1, 1]; the weight of a single unit is
        # not one.
        others = self._owned.get(_owner(self._name.get(place, "")), [])
        return any(math.prod(self._shapes.get(other, ())) > math.prod(shape) for other in others)

    def _find_families(self, sequential: set[str]) -> list[list[list[int]]]:
        """Return groups of modules of the same build under the same parent, each as the places of its parameters."""
        members: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, place in self._place.items():
            parts = name.split(".")
            for depth in range(1, len(parts)):
                members[".".join(parts[:depth])].append((".".join(parts[depth:]), place))
        families: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
        for module, inside in members.items():
            parent = _owner(module)
            if parent not in sequential:
                build = tuple(sorted((name, self._shapes.get(place)) for name, place in inside))
                families[parent, build].append([place for _, place in inside])
        return [family for family in families.values() if len(family) > 1]


def _owner(name: str) -> str:
    """Return the name of the module of a parameter; a parametrization belongs to the module that has it."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
