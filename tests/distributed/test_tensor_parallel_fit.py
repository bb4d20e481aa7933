"""Clipping, guard and monitor under Lightning's tensor parallelism, alone and with FSDP2: as on one device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.distributed.tensor_parallel_fits import BAD_STEP, RUNS, STEPS, fit, fit_all
from tests.helpers import bit_equal, read_events

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Step .* skipped")]
EACH_ITS_OWN = ("optim_loss/", "optim_speed/")  # a clock; and a loss that is NaN on some ranks only


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    @cache
    def run(data_parallel_size: int) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("tensor_parallel")
        with Ranks(2 * data_parallel_size) as ranks:
            return folder, ranks.run(fit_all, folder, data_parallel_size, timeout=280)

    return run


@pytest.mark.parametrize(("kind", "rule"), RUNS)
@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_over_ranks_as_on_one_device(runs, data_parallel_size, kind, rule, tmp_path):
    folder, ranks = runs(data_parallel_size)
    name = f"{kind}-{rule}"
    whole = fit(kind, rule, tmp_path, None)
    assert whole["counts"][-1][1] > 0
    assert [skipped for *_, skipped in whole["counts"]] == [0] * BAD_STEP + [1] * (STEPS - BAD_STEP)
    for rank in ranks:
        assert rank[name]["counts"] == whole["counts"]
        assert bit_equal(rank[name]["weights"], ranks[0][name]["weights"])
    torch.testing.assert_close(ranks[0][name]["weights"], whole["weights"], rtol=1e-4, atol=1e-5)
    events = read_events(folder / name / "0")
    speeds = (events[f"optim_speed/{what}_per_second"] for what in ("samples", "steps"))
    for (_, samples), (_, steps) in zip(*speeds, strict=True):  # each group of tensor parallelism has a batch of 4
        assert samples / steps == pytest.approx(4 * data_parallel_size, rel=1e-4)
    for tag, points in read_events(tmp_path / name / "0").items():
        if tag.startswith("optim_") and not tag.startswith(EACH_ITS_OWN):
            found = events[tag]
            assert [step for step, _ in found] == [step for step, _ in points]
            values = [value for _, value in points]
            assert [value for _, value in found] == pytest.approx(values, rel=1e-3, abs=1e-6, nan_ok=True), tag
