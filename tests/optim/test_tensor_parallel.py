"""Tensor parallelism, whose gradients lie otherwise than their parameters: two ranks, and four, do what one does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim import optim
from lightning_optim.core.placements import is_split
from tests.clip_rules import OF_BLOCK
from tests.distributed.ranks import run_ranks
from tests.optim.cases import BACKENDS
from tests.optim.tensor_parallel_checks import ADAMWS, WHOLE_TENSORS, elementwise, make

LAYERS = ("emb", "first", "up", "out")  # a plain gradient, a sum's terms, and shards


def label(name: str, arguments: dict[str, Any]) -> str:
    return "-".join([name, *map(str, arguments.values())])


def checks(*wanted: tuple[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {label(name, arguments): (name, arguments) for name, arguments in wanted}


FAST = checks(
    *(("optimizer", {"name": name}) for name in elementwise()),
    ("optimizer", {"name": "adamw", "backend": "reference"}),
    ("optimizer", {"name": "adamw", "cautious": True, "weight_decay": 0.1, "weight_decay_kind": "norm"}),
    *(("clipping", {"kind": "ours", "rule": rule}) for rule in OF_BLOCK),
    *(("clipping", {"kind": "torch", "rule": rule}) for rule in ("global_norm", "agc", "value", "momentum_ratio")),
    ("clipping", {"kind": "torch-fused", "rule": "group_norm"}),
    *(("record", {"name": name}) for name in ("ours", "torch", "torch-sgd")),
    *(("skip", {"kind": kind, "layer": layer}) for kind in ("ours", "torch") for layer in LAYERS),
    *(("once", {"kind": kind}) for kind in ADAMWS),
    *(("beside_plain_parameters", {"kind": kind}) for kind in ("ours", "torch")),
    *(("placements", {"backend": backend}) for backend in ("cpu", "reference")),
    *(("whole_matrices", {"name": name}) for name in WHOLE_TENSORS),
    *((name, {}) for name in ("reductions", "norm_of_terms", "refusals", "state_of_torch", "undelivered")),
)
FLAGS = (
    {"cautious": True},
    {"maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decay_kind": "norm"},
    {"weight_decay": 0.1, "weight_decay_kind": "l2_sp"},
)
LIMITED = "schedulefreeadamw"  # offers none of these
SLOW = checks(
    *(("optimizer", {"name": name, "backend": "reference"}) for name in elementwise()),
    *(("optimizer", {"name": name, **flags}) for name in elementwise() if name != LIMITED for flags in FLAGS),
    *(("optimizer", {"name": name, "backend": backend}) for name in ("adamw", "lamb") for backend in BACKENDS),
    *(("placements", {"backend": backend}) for backend in BACKENDS),
    *(("clipping", {"kind": kind, "rule": rule}) for kind in ADAMWS for rule in OF_BLOCK),
    *(("record", {"name": name}) for name in [*ADAMWS, "torch-sgd", *elementwise()]),
    *(("skip", {"kind": "torch-fused", "layer": layer}) for layer in LAYERS[1:]),
)
FOUR = checks(
    *(("optimizer", {"name": name}) for name in elementwise()),
    ("optimizer", {"name": "adamw", "backend": "reference"}),
    ("optimizer", {"name": "adamw", "cautious": True, "weight_decay": 0.1, "weight_decay_kind": "norm"}),
    *(("clipping", {"kind": kind, "rule": rule}) for kind in ("ours", "torch") for rule in OF_BLOCK),
    *(("record", {"name": name}) for name in ("ours", "torch")),
    *(("skip", {"kind": "ours", "layer": layer}) for layer in LAYERS[1:]),
    *((name, {}) for name in ("reductions", "norm_of_terms", "refusals", "strided_shards")),
    ("placements", {"backend": "cpu"}),
)


@pytest.fixture(scope="module")
def found():
    """What each rank found wrong; all checks of a kind by one start of the ranks, which takes longer than most."""

    @cache
    def run(kind: str, world_size: int) -> list[dict[str, str]]:
        try:
            return run_ranks(make, KINDS[kind], world_size=world_size, timeout=TIMEOUT[kind])
        except (AssertionError, EOFError) as error:  # kept, lest every test starts the ranks again
            return [dict.fromkeys(KINDS[kind], f"The ranks failed: {error}")]

    return run


TIMEOUT = {"fast": 120, "slow": 600, "four": 600}
KINDS = {"fast": FAST, "slow": SLOW, "four": FOUR}


@pytest.mark.parametrize("check", FAST)
def test_two_ranks_do_what_one_process_does(found, check):
    for rank in found("fast", 2):
        assert not rank[check], rank[check]


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW)
def test_two_ranks_with_all_else(found, check):
    for rank in found("slow", 2):
        assert not rank[check], rank[check]


@pytest.mark.slow
@pytest.mark.parametrize("check", FOUR)
def test_four_ranks_of_data_and_tensor_parallelism(found, check):
    for rank in found("four", 4):
        assert not rank[check], rank[check]


def test_every_optimizer_is_tried():
    assert {*elementwise(), *WHOLE_TENSORS} == set(optim._classes())


def test_what_is_relied_on_of_placements():
    """torch does not say of `_StridedShard` that it is a shard."""
    strided = _StridedShard(0, split_factor=2)
    assert not strided.is_shard()
    assert [is_split(p) for p in (strided, Shard(1), Replicate(), Partial())] == [True, True, False, False]
    assert strided.dim == 0
    with torch.no_grad():
        assert strided != Shard(0)
