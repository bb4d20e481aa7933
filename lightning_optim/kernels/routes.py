"""Ways of tensors to the rank that processes them whole, and of the results back: one packed message each.

All ranks of a route must call its methods in the same order with the same owners and cuts, which they compute from
shapes only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.shards import part_of, rows_of_rank, whole_of
from lightning_optim.kernels.message import Message, all_to_all


class Cut(NamedTuple):
    """Form of a tensor that travels.

    Args:
        shape: Shape of the whole tensor.
        dtype: Dtype in the message.
        dim: The dimension that is cut over the ranks; None if each rank has all of the tensor.
        like: A DTensor, the parts of which lie as those of the tensor do, or of the tensor expanded to its shape; used
            by `Meshes` only.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None
    like: Tensor | None = None

    def part(self, rank: int, ranks: int) -> tuple[int, ...]:
        """Return the shape of the part of ``rank``."""
        if self.dim is None:
            return self.shape
        _, count = rows_of_rank(self.shape[self.dim], rank, ranks)
        return (*self.shape[: self.dim], count, *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """Return the part of ``rank`` as a view of ``whole``."""
        if self.dim is None:
            return whole
        return whole.narrow(self.dim, *rows_of_rank(self.shape[self.dim], rank, ranks))


Named = dict[str, Tensor]
Cuts = Sequence[dict[str, Cut]]
"""Of each tensor that is updated, what travels by name."""


class Route(ABC):
    """A group of ranks, each of which processes the tensors that it owns."""

    ranks: int
    rank: int

    def owns(self, owner: int) -> bool:
        """Return whether this rank processes what belongs to ``owner``."""
        return owner == self.rank

    def needs(self, owner: int) -> bool:
        """Return whether this rank has to give what belongs to ``owner``: shards of it, say."""
        return True

    @abstractmethod
    def agree(self, flag: Tensor) -> Tensor:
        """Return the largest ``flag``, shape [], of all ranks, so that none enters a collective that another skips."""

    @abstractmethod
    def gather(
        self, owners: Sequence[int], cuts: Cuts, given: Iterable[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Send what each rank holds to the owners.

        Args:
            owners: Owner of each updated tensor.
            cuts: What is sent of each.
            given: This rank's parts, in any floating dtype, or nothing where it `needs` to give none. They are iterated
                once and copied, so that one tensor's are in memory at a time.
            device: Device of the tensors.

        Returns:
            Function that waits and returns for each tensor what its owner needs, whole; empty for those of others.
        """

    @abstractmethod
    def scatter(
        self, owners: Sequence[int], cuts: Cuts, results: Sequence[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Send results from the owners to all ranks.

        Args:
            owners: Owner of each updated tensor.
            cuts: What is sent of each.
            results: The results, whole, of the tensors that this rank owns; empty for others.
            device: Device of the tensors.

        Returns:
            Function that waits and returns this rank's parts of the results of each tensor.
        """


class Shards(Route):
    """Ranks that hold shards of the tensors, cut along one dimension over one mesh dimension."""

    def __init__(self, mesh: Any, mesh_dim: int) -> None:
        self._group = mesh.get_group(mesh_dim)
        self._mesh = mesh
        self.ranks, self.rank = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)

    def agree(self, flag: Tensor) -> Tensor:
        """Implement `Route`; replicas over other mesh dimensions agree as well."""
        return _agree(flag, [self._mesh.get_group(dim) for dim in range(self._mesh.ndim)])

    def gather(
        self, owners: Sequence[int], cuts: Cuts, given: Iterable[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        owned = _owned(owners, self.ranks)
        order = [(i, name) for own in owned for i in own for name in _cut(cuts[i])]
        mine = [(i, name) for i in owned[self.rank] for name in _cut(cuts[i])]
        sent = Message([(cuts[i][name].part(self.rank, self.ranks), cuts[i][name].dtype) for i, name in order], device)
        came = Message(
            [(cuts[i][n].part(rank, self.ranks), cuts[i][n].dtype) for rank in range(self.ranks) for i, n in mine],
            device,
        )
        places = dict(zip(order, sent.read(), strict=True))
        kept: list[Named] = []
        for i, tensors in enumerate(given):
            for name in _cut(cuts[i]):
                places[i, name].copy_(tensors[name])
            kept.append({n: t for n, t in tensors.items() if owners[i] == self.rank and cuts[i][n].dim is None})
        counts = [sum(len(_cut(cuts[i])) for i in own) for own in owned]
        work = all_to_all(came, [len(mine)] * self.ranks, sent, counts, self._group)

        def arrived() -> list[Named]:
            work(sent)
            parts = came.read()
            for place, (i, name) in enumerate(mine):
                dim = cuts[i][name].dim
                assert dim is not None
                kept[i][name] = torch.cat(parts[place :: len(mine)], dim)
            return kept

        return arrived

    def scatter(
        self, owners: Sequence[int], cuts: Cuts, results: Sequence[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        owned = _owned(owners, self.ranks)
        order = [(i, name) for own in owned for i in own for name in cuts[i]]
        mine = [(rank, i, name) for rank in range(self.ranks) for i in owned[self.rank] for name in cuts[i]]
        sent = Message([(cuts[i][name].part(rank, self.ranks), cuts[i][name].dtype) for rank, i, name in mine], device)
        came = Message([(cuts[i][name].part(self.rank, self.ranks), cuts[i][name].dtype) for i, name in order], device)
        sent.write([cuts[i][n].take(results[i][n].reshape(cuts[i][n].shape), r, self.ranks) for r, i, n in mine])
        counts = [sum(len(cuts[i]) for i in own) for own in owned]
        work = all_to_all(came, counts, sent, [len(mine) // self.ranks] * self.ranks, self._group)

        def arrived() -> list[Named]:
            work(sent)
            return _named(order, came.read(), len(owners))

        return arrived


class Copies(Route):
    """Ranks that all have the whole tensors, equal: nothing is gathered, and results are sent to all."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def needs(self, owner: int) -> bool:
        """Implement `Route`: the owner has a copy."""
        return owner == self.rank

    def agree(self, flag: Tensor) -> Tensor:
        """Implement `Route`."""
        return _agree(flag, [self._group])

    def gather(
        self, owners: Sequence[int], cuts: Cuts, given: Iterable[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        found = list(given)
        return lambda: found

    def scatter(
        self, owners: Sequence[int], cuts: Cuts, results: Sequence[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        orders = [[(i, name) for i in own for name in cuts[i]] for own in _owned(owners, self.ranks)]
        forms = [[(cuts[i][name].shape, cuts[i][name].dtype) for i, name in order] for order in orders]
        longest = max(Message.length(form) for form in forms)
        sent = Message(forms[self.rank], device, longest)
        sent.write([results[i][name].reshape(cuts[i][name].shape) for i, name in orders[self.rank]])
        everything = torch.empty(self.ranks * longest, dtype=torch.uint8, device=device)
        work = dist.all_gather_into_tensor(everything, sent.buffer, self._group, async_op=True)

        def arrived() -> list[Named]:
            if work is not None:
                work.wait()
            parts = [
                part
                for rank, form in enumerate(forms)
                for part in Message(form, device, buffer=everything[rank * longest : (rank + 1) * longest]).read()
            ]
            return _named([one for order in orders for one in order], parts, len(owners))

        return arrived


class Meshes(Route):
    """Ranks of a mesh that hold shards of any other placements: each gathers all tensors and processes them all."""

    ranks, rank = 1, 0

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def agree(self, flag: Tensor) -> Tensor:
        """Implement `Route`."""
        return _agree(flag, [self._mesh.get_group(dim) for dim in range(self._mesh.ndim)])

    def gather(
        self, owners: Sequence[int], cuts: Cuts, given: Iterable[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        found = [
            {
                name: tensor if (like := cut[name].like) is None else whole_of(tensor.to(cut[name].dtype), like)
                for name, tensor in tensors.items()
            }
            for tensors, cut in zip(given, cuts, strict=True)
        ]
        return lambda: found

    def scatter(
        self, owners: Sequence[int], cuts: Cuts, results: Sequence[Named], device: torch.device
    ) -> Callable[[], list[Named]]:
        """Implement `Route`."""
        found: list[Named] = []
        for result, cut in zip(results, cuts, strict=True):
            parts = {}
            for name, (shape, dtype, _, like) in cut.items():
                whole = result[name].reshape(shape).to(dtype)
                parts[name] = whole if like is None else part_of(whole.expand(like.shape), like)
            found.append(parts)
        return lambda: found


def _agree(flag: Tensor, groups: Sequence[Any]) -> Tensor:
    flag = flag.detach().clone()
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return flag


def _owned(owners: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the indices of the tensors of each rank."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for i, owner in enumerate(owners):
        found[owner].append(i)
    return found


def _cut(cuts: dict[str, Cut]) -> list[str]:
    """Return the names of what is cut; each rank has the rest."""
    return [name for name, cut in cuts.items() if cut.dim is not None]


def _named(order: Sequence[tuple[int, str]], parts: Sequence[Tensor], count: int) -> list[Named]:
    found: list[Named] = [{} for _ in range(count)]
    for (i, name), part in zip(order, parts, strict=True):
        found[i][name] = part
    return found
