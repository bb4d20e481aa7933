"""What becomes of a test whose ranks end."""

from __future__ import annotations

import pytest

from tests.distributed import ends
from tests.distributed.ranks import RankEnded, run_ranks


def test_a_signal_is_told_of_and_all_begin_once_more(tmp_path):
    with pytest.warns(UserWarning, match="rank 1 ended with exit code -9"):
        assert run_ranks(ends.end_by_a_signal, tmp_path, 1) == [0, 1]
    with pytest.warns(UserWarning, match="ended"), pytest.raises(RankEnded, match="rank 1 ended with exit code -9"):
        run_ranks(ends.end_by_a_signal, tmp_path, 9)


def test_a_rank_that_ends_by_itself_is_no_accident():
    with pytest.raises(RankEnded, match="rank 0 ended with exit code 3"):
        run_ranks(ends.end_by_itself)
