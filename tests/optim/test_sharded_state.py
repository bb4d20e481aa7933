"""8-bit state and Kahan compensation in shards (FSDP2): resuming, and loading on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lightning_optim.kernels.quantization import dequantize
from tests.distributed.ranks import run_ranks
from tests.optim import sharded_state_checks as checks
from tests.optim.cases import assert_same

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
each_kind = pytest.mark.parametrize("kind", checks.OPTIONS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """What one process without ranks does, and what each of two ranks does."""
    folder = tmp_path_factory.mktemp("states")
    one = {kind: checks.save(kind, folder / f"{kind}-one") for kind in checks.OPTIONS}
    model, optimizer = checks.make("codes")
    checks.step(model, optimizer, range(checks.STEPS))
    torch.save(optimizer.state_dict(), folder / "codes.pt")
    model, optimizer = checks.make("rows")
    checks.step(model, optimizer, range(checks.STEPS))
    torch.save(get_optimizer_state_dict(model, optimizer), folder / "rows-full.pt")
    return folder, one, run_ranks(checks.save_and_load, folder)


def of_save(found: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors for name, tensors in found.items() if not name.startswith("rest ")}


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moments as float32."""
    wide = {}
    for name in ("exp_avg", "exp_avg_sq"):
        moment = tensors[name]
        wide[name] = (
            dequantize(moment, tensors[f"{name}_scale"], name == "exp_avg")
            if moment.dtype == torch.uint8
            else moment.float()
        )
    return wide


@each_kind
def test_resuming_on_as_many_ranks_is_bit_equal(runs: Any, kind: str) -> None:
    for rank in runs[2]:
        assert_same(rank[f"saved {kind}"], rank[f"loaded {kind}"])


@each_kind
def test_ranks_do_what_one_process_does_but_for_noise(runs: Any, kind: str) -> None:
    _, one, (first, second) = runs
    assert_same(first[f"saved {kind}"], second[f"saved {kind}"])
    for name, whole in one[kind].items():
        sharded = first[f"saved {kind}"][name]
        if "norm" not in name or kind != "codes":  # a vector has 32 bits on ranks
            assert {key: (v.dtype, v.shape) for key, v in whole.items()} == {
                key: (v.dtype, v.shape) for key, v in sharded.items()
            }
        for key, value in values(whole).items():
            error = (values(sharded)[key] - value).norm() / value.norm()
            assert error < (0.01 if "exp_avg_scale" not in whole else 0.05), (name, key)
        torch.testing.assert_close(whole["weight"], sharded["weight"], rtol=0.02, atol=5e-3)


@each_kind
def test_a_checkpoint_of_two_ranks_is_that_of_one_process_and_back(runs: Any, kind: str) -> None:
    folder, one, ranks = runs
    if kind == "codes":  # torch loads into what a step would make, and the state of a vector differs
        with pytest.raises(BaseException, match=r"Missing key .*norm.weight"):
            checks.load(kind, folder / kind)
        for rank in ranks:
            assert "state 'exp_avg' of parameter 4" in rank["of one codes"]
            assert "has whole numbers up to 255" in rank["of one codes"]
        return
    assert_same(of_save(checks.load(kind, folder / kind)), of_save(ranks[0][f"saved {kind}"]))
    for rank in ranks:
        assert_same(of_save(rank[f"of one {kind}"]), of_save(one[kind]))


@pytest.mark.slow
@each_kind
def test_a_checkpoint_of_two_ranks_is_loaded_on_four(runs: Any, kind: str) -> None:
    folder, _, ranks = runs
    for rank in run_ranks(checks.load_all, folder, world_size=4):
        assert_same(of_save(rank[kind]), of_save(ranks[0][f"saved {kind}"]))
        for name, tensors in rank[kind].items():
            expected = ranks[0][f"saved {kind}"][name]
            torch.testing.assert_close(tensors["weight"], expected["weight"], rtol=0.02, atol=5e-3)


def test_whole_state_is_loaded_into_shards(runs: Any) -> None:
    """Codes of whole rows as they are; those of blocks that cross ranks as their values."""
    _, one, ranks = runs
    for rank in ranks:
        for name, loaded in rank["plain"].items():
            tensors = one["codes"][name] | {"weight": loaded["weight"]}  # which is not loaded
            if name in ("uneven.weight", "norm.weight", "norm.bias"):
                assert loaded["exp_avg"].dtype == torch.float32
                if name != "uneven.weight":
                    assert_same(values(tensors), values(loaded))
            else:
                assert_same(tensors, loaded)


def test_a_full_state_dict_is_loaded_into_shards_through_torch(runs: Any) -> None:
    _, one, ranks = runs
    for rank in ranks:
        for name, loaded in rank["full"].items():
            assert_same(one["rows"][name] | {"weight": loaded["weight"]}, loaded)


def test_the_last_dimension_may_be_sharded_in_whole_blocks(runs: Any) -> None:
    for rank in runs[2]:
        found = rank["tensor parallel"]
        assert found["scales"] == (16, 4)
        for shape, error in zip(("(16, 640)", "(3, 16, 512)", "(64, 16, 3, 3)"), found["errors"], strict=True):
            if shape == "(3, 16, 512)":
                assert not error
            else:
                assert f"cannot have 8-bit state: its shape {shape} is sharded along dimension 1 over 2 ranks" in error
                assert "Set state_bits to 16 or 32" in error
