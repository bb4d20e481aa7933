"""Optimizers that need whole matrices, through Lightning on two ranks: as on one device."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.fsdp2_fits import BAD_STEP, STEPS, Bad
from tests.distributed.matrix_fits import NAMES, fit, fit_copies, fit_fast, fit_some
from tests.distributed.ranks import Ranks
from tests.helpers import bit_equal

pytestmark = pytest.mark.filterwarnings("ignore:Step .* skipped")


def assert_as_one(ranks: list[dict], name: str) -> None:
    """Two ranks have decided alike, and have the weights that one device has."""
    one = fit(name, Bad(seed=7))
    first, second = ranks
    assert first["counts"] == second["counts"] == one["counts"]
    assert bit_equal(first["weights"], second["weights"])
    assert one["counts"][-1][1] > 0
    assert [skipped for *_, skipped in one["counts"]] == [0] * BAD_STEP + [1] * (STEPS - BAD_STEP)
    if name != "soap":  # The bases of small matrices depend on the last bits of the gradients.
        torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-4, atol=1e-5)


def assert_resumed(ranks: list[dict]) -> None:
    for rank in ranks:
        whole, rest = rank["whole"], rank["rest"]
        assert rest["counts"] == whole["counts"][7:]
        assert len(rest["counts"]) == STEPS - 7
        assert bit_equal(rest["weights"], whole["weights"])


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """One start of the ranks for all that is quick."""
    with Ranks(2) as ranks:
        return ranks.run(fit_fast, tmp_path_factory.mktemp("matrices"), timeout=250)


def test_shards_are_clipped_guarded_and_watched_as_one_device(fast):
    assert all(rank["sharded-normuon"]["sharded"] for rank in fast)
    assert_as_one([rank["sharded-normuon"] for rank in fast], "normuon")


def test_a_run_in_shards_resumes_bit_for_bit_from_a_distributed_checkpoint(fast):
    assert_resumed([rank["resumed-normuon-True"] for rank in fast])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_in_shards(name, tmp_path):
    with Ranks(2) as ranks:
        found = ranks.run(fit_some, tmp_path, (name,), timeout=300)
    assert_as_one([rank[f"sharded-{name}"] for rank in found], name)
    for distributed in (False, True):
        assert_resumed([rank[f"resumed-{name}-{distributed}"] for rank in found])
    assert found[0][f"back-{name}"]["did"] == found[1][f"back-{name}"]["did"]
    for rank in found:
        back = rank[f"back-{name}"]
        ((step, text),) = back["did"]
        assert (step, text) == (8, "back to the state after step 3, continuing with the next batches")
        assert bit_equal(back["after"][3], back["after"][8])
        assert not bit_equal(back["after"][3], back["after"][7])
        assert all(tensor.isfinite().all() for tensor in back["after"][-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_under_ddp_each_rank_orthogonalises_some_of_the_matrices(name):
    with Ranks(2) as ranks:
        found = ranks.run(fit_copies, name, timeout=250)
    assert_as_one(found, name)
    assert sum(len(rank["shapes"]) for rank in found) == STEPS - 1  # of one matrix, not at the step that is skipped
    assert [rank["divided"] for rank in found] == [None, None]  # no longer
