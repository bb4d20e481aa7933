from __future__ import annotations

import pytest
import torch

from tests.clip_rules import OF_NET
from tests.distributed.ddp_fits import BAD_STEP, KINDS, STEPS, fit_all
from tests.distributed.ranks import Ranks
from tests.helpers import bit_equal, read_events


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One start of the ranks for all kinds of optimizers, because starting them takes longer than training."""
    folder = tmp_path_factory.mktemp("ddp")
    with Ranks(2) as ranks:
        ranks.run(fit_all, folder, timeout=250)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_rank_is_skipped_by_all_and_weights_stay_identical(runs, kind):
    ranks = [torch.load(runs / kind / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert rank["skipped"] == [0, 0, 1, 1, 1, 1]
        assert bit_equal(rank["before"], rank["after"])
        assert not bit_equal(rank["start"]["parameters"], rank["final"]["parameters"])
        assert all(tensor.isfinite().all() for tensor in rank["final"]["parameters"].values())
        assert [state["last_epoch"] for state in rank["final"]["schedulers"]] == [5]
    assert bit_equal(ranks[0]["final"], ranks[1]["final"])
    assert torch.equal(ranks[0]["averages"], ranks[1]["averages"])  # of the early warning
    assert ranks[0]["averages"].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_of_the_rank_that_met_no_nan_shows_the_skip(runs, kind):
    skipped = dict(read_events(runs / kind / "run" / "0")["optim_health/skipped_steps"])
    assert skipped[BAD_STEP - 1] == 0
    assert skipped[BAD_STEP] == 1


@pytest.mark.parametrize("rule", OF_NET)
def test_every_way_to_clip_decides_alike_on_all_ranks_and_weights_stay_identical(runs, rule):
    first, second = (torch.load(runs / f"{rule}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["counts"] == second["counts"]
    assert bit_equal(first["weights"], second["weights"])
    steps, clipped, skipped = first["counts"][-1]
    assert (steps, skipped) == (STEPS, 5)  # once in each of five epochs
    assert clipped > 0


def test_a_resumed_run_returns_to_the_snapshot_of_the_run_before_on_all_ranks(runs):
    for rank in (0, 1):
        whole, resumed = (torch.load(runs / f"{name}-{rank}.pt", weights_only=True) for name in ("whole", "resumed"))
        assert [text.split(",")[0] for _, text in whole["did"]] == ["back to the state after step 7"] * 2
        assert resumed["did"] == whole["did"][1:]
        assert bit_equal(resumed["weights"], whole["weights"])
        assert bit_equal(resumed["state"], whole["state"])
