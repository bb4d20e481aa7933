"""Muon, NorMuon, SOAP and Adafactor on ranks that share the work: sharded parameters, and copies under DDP."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.core.shards import rows_of_rank
from lightning_optim.kernels.owners import buckets_of, owners_of
from tests.distributed.ranks import RankEnded, Ranks, run_ranks
from tests.optim import matrices_on_ranks
from tests.optim.matrices_on_ranks import MUONS, run_checks
from tests.optim.tensor_parallel_checks import WHOLE_TENSORS

NAMES = ("Muon", "NorMuon", "SOAP", "Adafactor")
FLAGS: tuple[dict[str, Any], ...] = (
    {"cautious": True},
    {"weight_decay": 0.1, "weight_decay_kind": "norm", "maximize": True},
    {"weight_decay": 0.1, "weight_decay_kind": "l2"},
    {"weight_decay": 0.1, "weight_decay_kind": "l2_sp"},
    {"ema": (0.9, "power 0.1")},
)


def label(name: str, arguments: dict[str, Any]) -> str:
    return "-".join([name, *map(str, arguments.values())])


def checks(*wanted: tuple[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {label(name, arguments): (name, arguments) for name, arguments in wanted}


FAST = checks(
    *(("equality", {"name": name}) for name in NAMES),
    *(("equality", {"name": name, "ema": 0.9}) for name in ("Muon", "SOAP")),
    ("many_buckets", {"name": "NorMuon"}),
    *(("fully_sharded", {"name": name}) for name in ("Muon", "Adafactor")),
    *(("skip", {"name": name}) for name in ("NorMuon", "SOAP")),
    *(("resume", {"name": name}) for name in ("NorMuon", "SOAP")),
    ("not_a_number", {"name": "NorMuon"}),
    ("bf16", {"name": "SOAP", "kahan_sum": True}),
    ("tensor_parallel", {"name": "Muon"}),
    *(("eight_bits", {"name": name}) for name in ("NorMuon", "SOAP")),
    ("copies", {"name": "NorMuon"}),
    ("copies", {"name": "SOAP", "precondition_frequency": 2}),
    *(("copies_in_place", {"mixed": mixed}) for mixed in (False, True)),
    ("memory", {}),
)
ALL = checks(
    *(("equality", {"name": name, "backend": backend}) for name in NAMES for backend in ("cpu", "reference")),
    *(("equality", {"name": name, "dtype": torch.float64}) for name in NAMES),
    *(("equality", {"name": name, "backend": "reference", **flags}) for name in NAMES for flags in FLAGS),
    *(("equality", {"name": name, "backend": "cpu", **FLAGS[0]}) for name in NAMES),
    *(("equality", {"name": name, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}) for name in MUONS),
    *(
        (check, {"name": name})
        for name in NAMES
        for check in ("many_buckets", "fully_sharded", "skip", "not_a_number", "resume", "bf16", "other_placements")
    ),
    *(("bf16", {"name": name, "kahan_sum": True}) for name in NAMES),
    *(("eight_bits", {"name": name}) for name in ("Muon", "NorMuon", "SOAP")),
    *(("tensor_parallel", {"name": name}) for name in ("Muon", "NorMuon", "Adafactor")),
    *(("copies_in_place", {"mixed": mixed}) for mixed in (False, True)),
    *(("copies", {"name": name, "backend": backend}) for name in MUONS for backend in ("cpu", "reference")),
    *(
        ("copies", {"name": "SOAP", "precondition_frequency": 2, "backend": backend})
        for backend in ("cpu", "reference")
    ),
    ("memory", {}),
)
KINDS = {"fast": FAST, "all": ALL}


@cache
def found(kind: str, world_size: int) -> list[dict[str, str]]:
    """What each rank found wrong; all checks by one start of the ranks, which takes longer than most of them."""
    wanted = KINDS[kind]
    try:
        answers = run_ranks(run_checks, list(wanted.values()), world_size=world_size, timeout=600)
    except (AssertionError, EOFError) as error:  # kept, lest every test starts the ranks again
        return [dict.fromkeys(wanted, f"The ranks failed: {error}")]
    return [dict(zip(wanted, answer, strict=True)) for answer in answers]


@pytest.mark.parametrize("check", FAST)
def test_two_ranks_do_what_one_device_does(check):
    for rank in found("fast", 2):
        assert not rank[check], rank[check]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("check", ALL)
def test_ranks_with_all_else(check, world_size):
    for rank in found("all", world_size):
        assert not rank[check], rank[check]


def test_every_optimizer_of_whole_tensors_is_tried():
    assert {name.lower() for name in NAMES} == set(WHOLE_TENSORS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_distributed_checkpoint_of_two_ranks_is_loaded_by_four_and_by_one(name, tmp_path: Path):
    expected, _ = run_ranks(matrices_on_ranks.save_distributed, name, str(tmp_path))
    for world_size in (4, 1):
        run_ranks(matrices_on_ranks.load_distributed, name, str(tmp_path), expected, world_size=world_size)


@pytest.mark.parametrize(
    ("name", "is_stuck", "most"), [("NorMuon", False, 20), pytest.param("SOAP", True, 9, marks=pytest.mark.slow)]
)
def test_the_loss_of_a_rank_ends_the_others(name, is_stuck, most, tmp_path: Path):
    with Ranks(2) as ranks, pytest.raises(RankEnded, match="rank 1 ended with exit code 1"):
        ranks.run(matrices_on_ranks.lose_one, name, tmp_path / "waited", is_stuck, timeout=60)
    assert float((tmp_path / "waited").read_text()) < most


def test_shards_are_cut_as_torch_cuts_chunks():
    for size in range(12):
        for ranks in range(1, 7):
            chunks = torch.arange(size).chunk(ranks) if size else ()
            wanted = [chunk.tolist() for chunk in chunks] + [[]] * (ranks - len(chunks))
            found = [rows_of_rank(size, rank, ranks) for rank in range(ranks)]
            assert [list(range(first, first + count)) for first, count in found] == wanted


def test_work_is_divided_evenly_and_alike():
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    assert owners_of(costs, 2) == [0, 1, 1, 0, 0]
    assert owners_of([1.0] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert owners_of([3.0], 4) == [0]


def test_a_bucket_has_at_most_one_large_tensor_of_each_owner_or_as_many_as_fit():
    owners, sizes = [0, 1, 0, 1, 0, 0], [100, 10, 10, 10, 10, 10]
    buckets = buckets_of(owners, [float(size) for size in sizes], sizes, ["large", *["small"] * 5], 20)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(6))
    assert buckets == [[0, 1, 3], [2, 4], [5]]
    for bucket in buckets:
        for owner in (0, 1):
            own = [sizes[i] for i in bucket if owners[i] == owner]
            assert sum(own) <= 20 or len(own) == 1
