"""Clipping, guard and monitor of a model in shards (FSDP2, through Lightning): as on one device with whole tensors."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.fsdp2_fits import BAD_STEP, RUNS, STEPS, fit, fit_all
from tests.distributed.ranks import Ranks
from tests.helpers import ADAMWS, bit_equal, read_events

pytestmark = pytest.mark.filterwarnings("ignore:Step .* skipped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One start of the ranks for all, because starting them takes longer than training."""
    folder = tmp_path_factory.mktemp("fsdp2")
    with Ranks(2) as ranks:
        return folder, ranks.run(fit_all, folder, timeout=250)


def read_details(folder):
    """Counts by column of each histogram at each step, and the tensors of the last table with two digits each."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    found = {
        (tag, event.step): {
            round(limit, 3): count
            for limit, count in zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True)
            if count
        }
        for tag in events.Tags()["histograms"]
        for event in events.Histograms(tag)
    }
    table = events.Tensors("optim/tensors/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {**found, "optim/tensors": {row[0]: [f"{float(cell):.1e}" for cell in row[3:] if cell] for row in rows}}


@pytest.mark.parametrize(("kind", "rule"), RUNS)
def test_in_shards_as_on_one_device(runs, kind, rule, tmp_path):
    folder, ranks = runs
    first, second = (rank[f"{kind}-{rule}"] for rank in ranks)
    whole = fit(kind, rule, tmp_path, sharded=False)
    assert first["counts"] == second["counts"]
    assert bit_equal(first["weights"], second["weights"])
    assert bit_equal(first["clip"], second["clip"])
    assert first["counts"] == whole["counts"]
    assert len(whole["counts"]) == STEPS
    assert whole["counts"][-1][1] > 0
    assert [skipped for *_, skipped in whole["counts"]] == [0] * BAD_STEP + [1] * (STEPS - BAD_STEP)
    torch.testing.assert_close(first["weights"], [w.detach() for w in whole["weights"]], rtol=1e-4, atol=1e-5)
    if whole["clip"]:
        torch.testing.assert_close(first["clip"]["state"], whole["clip"]["state"], rtol=1e-4, atol=1e-6)
    name = f"{kind}-{rule}"
    events = read_events(folder / name / "0")
    for tag, points in read_events(tmp_path / name / "0").items():
        # Each rank has losses of its own, and a clock.
        if tag.startswith("optim_") and not tag.startswith(("optim_loss/max", "optim_loss/robust_z", "optim_speed/")):
            sharded = events[tag]
            if tag == "optim_loss/mean":  # at that step it is of the rank whose loss is finite
                sharded = [point for point in sharded if point[0] != BAD_STEP]
            assert [step for step, _ in sharded] == [step for step, _ in points]
            values = [value for _, value in sharded]
            assert values == pytest.approx([value for _, value in points], rel=1e-3, abs=1e-6, nan_ok=True), tag


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_sharded_run_resumed_in_the_middle_of_a_window_is_bit_for_bit_the_one_that_went_on(runs, kind):
    snapshots = torch.load(runs[0] / f"{kind}.ckpt")["lightning_optim.divergence_guard"]["snapshots"]
    assert snapshots == {"left_out": "each rank has those of its own shards only"}
    for rank in runs[1]:
        whole, rest = rank[f"resumed-{kind}"]["whole"], rank[f"resumed-{kind}"]["rest"]
        assert rest["counts"] == whole["counts"][7:]
        assert len(rest["counts"]) == STEPS - 7
        assert bit_equal(rest["clip"], whole["clip"])
        assert bit_equal(rest["weights"], whole["weights"])


@pytest.mark.parametrize("distributed_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["Factory", "Frozen"])
def test_so_is_one_without_callbacks_whose_length_is_known_only_once_the_data_are_set_up(
    runs, kind, distributed_checkpoint
):
    """Also if a group is frozen when it is saved."""
    for rank in runs[1]:
        resumed = rank[f"resumed-{kind}-{distributed_checkpoint}"]
        assert bit_equal(resumed["rest"]["weights"], resumed["whole"]["weights"])


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_rollback_in_shards_is_bit_equal_to_the_snapshot_on_every_rank(runs, kind):
    _, results = runs
    assert results[0][f"back-{kind}"]["did"] == results[1][f"back-{kind}"]["did"]
    for rank in (0, 1):
        back = results[rank][f"back-{kind}"]
        ((step, text),) = back["did"]
        assert (step, text) == (8, "back to the state after step 3, continuing with the next batches")
        assert bit_equal(back["after"][3], back["after"][8])
        assert not bit_equal(back["after"][3], back["after"][7])
        assert all(tensor.isfinite().all() for tensor in back["after"][-1])


def test_freezing_in_shards_is_refused_where_its_checkpoints_could_not_be_loaded(runs):
    for rank in runs[1]:
        for piece in ("'head'", "'4 steps'", "AdamW", "lightning_optim.optim"):
            assert piece in rank["refused"]


@pytest.mark.parametrize("kind", ["ours", "torch-fused", "torch"])
def test_histograms_and_single_tensors_in_shards_as_on_one_device(runs, kind, tmp_path):
    folder, _ = runs
    fit(kind, "global_norm", tmp_path, sharded=False)
    sharded, whole = (read_details(base / f"{kind}-global_norm" / "0") for base in (folder, tmp_path))
    assert len(whole) == 17  # of two groups three kinds at three steps, but no update at BAD_STEP; and the table
    assert sharded.keys() == whole.keys()
    for key, found in whole.items():
        if key == "optim/tensors":
            assert sharded[key] == found
        else:  # a value that is on the border of two columns may be on either side
            assert sum(sharded[key].values()) == sum(found.values())
            assert sum(abs(sharded[key].get(limit, 0) - found.get(limit, 0)) for limit in {*found, *sharded[key]}) <= 2
