"""Steps in the backward pass with parameters in shards (FSDP2), and their refusal where each process has them all."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.released_steps import STEPS, train_all
from tests.helpers import bit_equal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Ranks(2) as ranks:
        return ranks.run(train_all, tmp_path_factory.mktemp("released"))


def test_in_shards_as_a_usual_step(runs):
    first, second = runs
    for optimizer, clipped in {key[:2] for key in first if isinstance(key, tuple)}:
        usual, released = first[optimizer, clipped, False], first[optimizer, clipped, True]
        assert bit_equal(released[0], usual[0])
        assert bit_equal(released[0], second[optimizer, clipped, True][0])
        assert released[1] == usual[1]
        assert (usual[1].clipped == STEPS) is clipped
        assert (released[2], usual[2]) == (True, False)


def test_a_gradient_that_is_not_finite_on_one_rank_leaves_its_tensors_out_on_all(runs):
    first, second = runs
    assert bit_equal(first["bad"][0], second["bad"][0])
    assert all(weight.isfinite().all() for weight in first["bad"][0])
    assert first["bad"][1].skipped == second["bad"][1].skipped == 1


@pytest.mark.parametrize("name", ["released", "resumed"])
def test_a_fit_in_shards_has_the_weights_of_a_usual_one(runs, name):
    for rank in runs:
        assert bit_equal(rank["fits"][name], rank["fits"]["usual"])


def test_ddp_is_refused(runs):
    assert all("DistributedDataParallel averages gradients" in rank["ddp"] for rank in runs)
