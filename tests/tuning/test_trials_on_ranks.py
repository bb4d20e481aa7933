"""Trials on two ranks: they decide alike, and the fit that follows is the one without them."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.trial_fits import fit_all


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with Ranks(2) as ranks:
        return ranks.run(fit_all, tmp_path_factory.mktemp("trials"), timeout=250)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_fit_is_bit_equal_and_both_ranks_find_the_same(answers, kind):
    first, second = (answer[kind] for answer in answers)
    assert first["equal"]
    assert second["equal"]
    assert first["text"] == second["text"]
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) >= 15
