"""How much of its weight attention gives to one key."""

from __future__ import annotations

from torch import Tensor


def largest_of_scores(scores: Tensor) -> float | None:
    """Return the median, over queries, of the largest weight that one key gets.

    Args:
        scores: Scores before the softmax: [..., queries, keys].

    Returns:
        The median, in (0, 1]; None of two keys or fewer.
    """
    if scores.ndim < 3 or scores.shape[-1] <= 2:
        return None
    # A part is enough. Masks of large negative numbers take no part in the largest.
    part = scores[:4].flatten(0, -3)[:64].float()
    return float(part.softmax(-1).amax(-1).nanmedian())


def largest_of_attention(query: Tensor, key: Tensor, scale: float | None) -> float | None:
    """Return the same for queries and keys.

    Args:
        query: Queries: [..., queries, features].
        key: Keys: [..., keys, features].
        scale: Factor on their products; None for 1 / √features.

    Returns:
        As `largest_of_scores`; None where queries and keys are of different batches.
    """
    if query.ndim < 3 or query.shape[:-2] != key.shape[:-2]:
        return None
    query, key = query.flatten(0, -3)[:8, :64].float(), key.flatten(0, -3)[:8].float()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return largest_of_scores(scores.unsqueeze(0))
