"""Division of whole tensors over ranks: an owner of each, balanced by cost, and buckets that bound the memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lightning_optim.kernels.parts import cut


def owners_of(costs: Sequence[float], ranks: int) -> list[int]:
    """Assign each tensor to the rank with the least to do so far, the most costly tensors first.

    No rank then has more than 4/3 of the work of the best division (Graham, Bounds on multiprocessing timing anomalies,
    1969, https://doi.org/10.1137/0117039). The result depends on the arguments only, so all ranks find the same.

    Args:
        costs: Cost of each tensor.
        ranks: Number of ranks.

    Returns:
        The owner of each tensor, a rank of the group.

    Example:
        >>> owners_of([1.0, 5.0, 2.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


def buckets_of(
    owners: Sequence[int],
    costs: Sequence[float],
    sizes: Sequence[int],
    keys: Sequence[Hashable],
    largest: int,
) -> list[list[int]]:
    """Cut the tensors into buckets that are exchanged one after the other.

    A bucket has at most ``largest`` elements of each owner, or one larger tensor of it. Tensors of one key are kept
    together, so that their owner can process them in one call, and the most costly ones come first, so that all owners
    have about as much to do in each bucket.

    Args:
        owners: Owner of each tensor.
        costs: Cost of each tensor.
        sizes: Number of elements that an owner receives of each tensor.
        keys: Keys of `TensorRule.together`.
        largest: Largest number of elements of one owner in a bucket.

    Returns:
        Indices of the tensors of each bucket, ascending.
    """
    most: dict[Hashable, float] = {}
    for key, cost in zip(keys, costs, strict=True):
        most[key] = max(most.get(key, 0.0), cost)
    rank_of = {key: place for place, key in enumerate(sorted(most, key=lambda key: -most[key]))}
    queues: dict[int, list[int]] = {owner: [] for owner in sorted(set(owners))}
    for i in sorted(range(len(owners)), key=lambda i: (rank_of[keys[i]], i)):
        queues[owners[i]].append(i)
    runs = [list(cut(queue, sizes, largest)) for queue in queues.values()]
    count = max(map(len, runs), default=0)
    return [sorted(i for queue in runs if number < len(queue) for i in queue[number]) for number in range(count)]
