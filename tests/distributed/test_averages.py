"""Averages of weights in shards (FSDP2, through Lightning): as on one device, and resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

import lightning_optim as lo
from tests.distributed.average_fits import EMA, STEPS, SeenWhole, fit, fit_all, fit_schedule_free, flat
from tests.distributed.ranks import Ranks
from tests.helpers import bit_equal

pytestmark = pytest.mark.filterwarnings("ignore:Step .* skipped")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    with Ranks(2) as ranks:
        return folder, ranks.run(fit_all, folder, timeout=250)


def test_in_shards_as_on_one_device(runs):
    whole = fit(sharded=False)
    for found in (rank["32-true-False"] for rank in runs[1]):
        assert found["counts"] == whole["counts"] == [STEPS - 1.0] * len(found["counts"])
        for name in ("average", "training", "other"):
            torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)
    assert len(whole["seen"]) == STEPS // 2


def test_schedule_free_trains_on_the_right_weights_after_a_validation(runs):
    for rank in runs[1]:
        torch.testing.assert_close(rank["schedule-free"], fit_schedule_free(sharded=False), rtol=1e-5, atol=1e-6)


def test_schedule_free_continues_from_a_distributed_checkpoint(runs):
    for rank in runs[1]:
        torch.testing.assert_close(rank["schedule-free-resumed"], rank["schedule-free"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_resumed_run_ends_bit_equal(runs, precision, distributed):
    for rank in runs[1]:
        resumed, whole = rank[f"{precision}-{distributed}-resumed"], rank[f"{precision}-{distributed}"]
        assert resumed["seen"][-1] == whole["seen"][-1]
        for name in ("average", "training", "other", "counts"):
            assert bit_equal(resumed[name], whole[name])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_distributed_checkpoint_is_read_on_one_device(runs, precision):
    folder, ranks = runs
    model = SeenWhole(seed=3).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    weights = list(model.parameters())
    optimizer, _ = lo.OptimizerFactory("adamw", lr=0.01, optimizer_kwargs={"ema": EMA}).build(model)
    weights_read, state = {"state_dict": get_model_state_dict(model)}, {"optimizer_0": {}}
    state["optimizer_0"] = get_optimizer_state_dict(model, optimizer)
    load(weights_read, checkpoint_id=folder / f"{precision}-True", no_dist=True)
    load(state, checkpoint_id=folder / f"{precision}-True", no_dist=True)
    model.load_state_dict(weights_read["state_dict"])
    set_optimizer_state_dict(model, optimizer, state["optimizer_0"])
    saved = ranks[0][f"{precision}-True"]["saved"]
    assert not bit_equal([weight.detach() for weight in weights], saved)
    lo.optim.swap_out_average(optimizer)
    assert bit_equal([weight.detach() for weight in weights], saved)


def test_whole_weights_of_a_validation_are_not_trained_on_with_the_first_fsdp():
    with Ranks(2, join=True) as ranks:
        for use_orig_params in (False, True):
            for without, validated in ranks.run(flat, use_orig_params):
                assert without == validated
