"""torch's first FSDP, which flattens and cuts: plain torch on two ranks; Lightning's strategy for it wants CUDA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy

import lightning_optim as lo
from lightning_optim import clipping, optim
from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.step import StepPipeline
from tests.distributed.ranks import run_ranks
from tests.helpers import Net, batches, make_trainer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def sharded(use_orig_params, strategy=ShardingStrategy.FULL_SHARD):
    model = net()
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu"), "sharding_strategy": strategy}
    model[2] = FSDP(model[2], **options)
    return FSDP(model, **options)


def loss(model, step, part=slice(None)):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, generator=generator) * (5 if step == 7 else 1)
    bad = math.nan if step == 4 and (part == slice(None) or dist.get_rank() == 1) else 1.0
    return model(x[part]).square().mean() * bad


def groups(model):
    params = list(model.parameters())
    return [{"params": params[:2], "name": "first"}, {"params": params[2:], "name": "rest"}]


def clip_and_skip() -> None:
    """Counts, sums and weights of every rule and kind of optimizer, in shards as on one rank."""
    rules = [
        clipping.GlobalNorm(0.2),
        clipping.GroupNorm(0.2, {"first": 0.05}),
        clipping.BlockRMS(0.01),
        clipping.Value(0.01),
        clipping.AutoClip(50.0, window=3),
        clipping.ZClip(threshold=0.5, warmup=2),
        clipping.AdaGC(0.2, warmup=2),
        clipping.MomentumRatio(2.0, warmup=2),
        clipping.UpdateRMS(0.9),
    ]
    makes = {
        "ours": lambda groups: optim.AdamW(groups, lr=0.01),
        "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
        "plain": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    }
    for number, rule in enumerate(rules):
        for kind, make in makes.items():
            if kind != "ours" and number > 3:  # each form of what a rule decides has been handed over in each way
                continue
            finals, records, counts = [], [], []
            for cut in (True, False):
                model = sharded(True) if cut else net()
                optimizer = make(groups(model))
                seen = []
                pipeline = StepPipeline(optimizer, clip=rule, shards=FlatShards.of(model), on_report=seen.append)
                for step in range(10):
                    optimizer.zero_grad()
                    loss(model, step, slice(dist.get_rank(), None, 2) if cut else slice(None)).backward()
                    optimizer.step()
                if cut:
                    with FSDP.summon_full_params(model):
                        finals.append([p.detach().clone() for p in model.parameters()])
                else:
                    finals.append([p.detach() for p in model.parameters()])
                counts.append(pipeline.counts())
                records.append(seen)
            assert counts[0] == counts[1], (rule, kind, counts)
            assert counts[0].skipped == 1
            assert counts[0].clipped > 0
            torch.testing.assert_close(finals[0], finals[1], rtol=1e-4, atol=1e-6)
            for a, b in zip(*records, strict=True):
                torch.testing.assert_close(a.grad.norm_sq, b.grad.norm_sq, rtol=1e-4, atol=1e-8, equal_nan=True)
                torch.testing.assert_close(a.clipped_norm_sq, b.clipped_norm_sq, rtol=1e-3, atol=1e-8, equal_nan=True)
                for name in ("param_sq", "update_sq"):
                    torch.testing.assert_close(
                        a.update.groups(name), b.update.groups(name), rtol=1e-3, atol=1e-8, equal_nan=True
                    )
            whole = torch.cat([p.flatten() for p in finals[0]])
            other = whole.clone()
            dist.broadcast(other, 0)
            assert torch.equal(whole, other)


def clip_as_fsdp() -> None:
    """As FSDP's own clipping, which has to be called by hand; with flat parameters as well."""
    for use_orig_params in (True, False):
        finals = []
        for ours in (True, False):
            model = sharded(use_orig_params)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            if ours:
                StepPipeline(optimizer, clip=clipping.GlobalNorm(0.1), shards=FlatShards.of(model))
            for step in range(3):
                optimizer.zero_grad()
                loss(model, step, slice(dist.get_rank(), None, 2)).backward()
                if not ours:
                    model.clip_grad_norm_(0.1)
                optimizer.step()
            with FSDP.summon_full_params(model):
                finals.append([p.detach().clone() for p in model.parameters()])
        torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-7)


def refuse() -> None:
    """What is copied to all ranks is not added up, and rows in pieces are refused."""
    assert FlatShards.of(sharded(True, ShardingStrategy.NO_SHARD)) is None
    assert FlatShards.of(net()) is None
    model = sharded(True)
    with pytest.raises(ValueError, match="Use FSDP2"):
        StepPipeline(optim.AdamW(model.parameters()), clip=clipping.AGC(), shards=FlatShards.of(model))


@pytest.mark.parametrize("check", [clip_and_skip, clip_as_fsdp, refuse])
def test_flat_shards_are_clipped_and_skipped_as_whole_tensors(check) -> None:
    run_ranks(check)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what Lightning's strategy calls
def test_lightnings_strategy_for_it() -> None:
    """On one GPU, where all is in one shard; Lightning itself refuses to clip norms there."""
    from lightning.pytorch.strategies import FSDPStrategy

    finals = []
    for strategy in ("auto", FSDPStrategy()):
        model = Net()
        parts = [lo.ConfigureOptimizers("adamw", lr=0.01), lo.GradientClipping(0.1), lo.DivergenceGuard()]
        trainer = make_trainer(parts, accelerator="gpu", devices=1, strategy=strategy)
        trainer.fit(model, batches(6))
        state = trainer.strategy.lightning_module_state_dict()
        finals.append({name: value.cpu() for name, value in state.items()})
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-4, atol=1e-6)
