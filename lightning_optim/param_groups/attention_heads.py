"""Numbers of heads of an attention module, under the names that libraries give them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads")
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "kv_n_heads",
    "kv_heads",
    "num_heads_kv",
    "num_query_groups",
    "n_query_groups",
)
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "kv_channels")
_KEY_DIM = ("key_dim", "dim_out_qk")
_VALUE_DIM = ("value_dim", "val_dim", "dim_out_v")

Layout = tuple[int | tuple[int, ...], int]
"""A number of equal blocks or the size of each, and how often they are repeated."""


@dataclass(frozen=True)
class AttentionHeads:
    """Numbers of heads and their sizes, as far as a module has them.

    Args:
        heads: Heads of the queries; None if only the widths are known.
        kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        key_dim: Size of the keys, of one head or of all.
        value_dim: Size of the values, of one head or of all.
    """

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    key_dim: int | None = None
    value_dim: int | None = None

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> AttentionHeads | None:
        """Return the numbers that the first of ``modules`` which has any, or its `config`, gives; None if none does."""
        for module in modules:
            heads, kv_heads, head_dim, key_dim, value_dim = (
                _number(module, names) for names in (_HEADS, _KV_HEADS, _HEAD_DIM, _KEY_DIM, _VALUE_DIM)
            )
            if heads is not None or (key_dim is not None and value_dim is not None):
                return cls(heads, kv_heads, head_dim, key_dim, value_dim)
        return None

    @property
    def grouped(self) -> bool:
        """Whether several heads of queries share one of keys and values."""
        return self.kv_heads is not None and self.heads is not None and self.kv_heads != self.heads

    @property
    def width(self) -> int | None:
        """Size of the queries of all heads."""
        return None if self.heads is None or self.head_dim is None else self.heads * self.head_dim

    def layout(self, out: int, per_head: bool) -> Layout | None:
        """Return the blocks of query, key and value in a projection with ``out`` outputs; None if they do not fit.

        Args:
            out: Outputs of the projection.
            per_head: Whether query, key and value of one head, or of heads that share a key, are next to each other.
        """
        if self.key_dim is not None and self.value_dim is not None:
            total = 2 * self.key_dim + self.value_dim
            equal = self.key_dim == self.value_dim
            blocks: int | tuple[int, ...] = 3 if equal else (self.key_dim, self.key_dim, self.value_dim)
            repeats = 1 if total == out else self.heads
            return (blocks, repeats) if repeats is not None and total * repeats == out else None
        if self.heads is None:
            return None
        kv_heads = self.kv_heads or self.heads
        total = self.heads + 2 * kv_heads
        head_dim = out // total if self.head_dim is None else self.head_dim
        if head_dim * total != out or self.heads % kv_heads:
            return None
        if kv_heads == self.heads:
            # Without a size of heads, any multiple would fit.
            return None if self.head_dim is None and not per_head else (3, self.heads if per_head else 1)
        repeats = kv_heads if per_head else 1
        queries, keys = self.heads * head_dim // repeats, kv_heads * head_dim // repeats
        return (queries, keys, keys), repeats


def _number(module: nn.Module, names: Iterable[str]) -> int | None:
    """Return the first positive number that the module, or its `config`, has under one of ``names``."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if type(value) is int and value > 0:
                return value
    return None
