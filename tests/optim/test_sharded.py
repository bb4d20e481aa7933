"""Sharded parameters (DTensor, as FSDP2 has them): local shards are updated, sums are of whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_optim import optim
from lightning_optim.kernels import measure
from tests.distributed.ranks import run_ranks


def compare_shards_with_wholes() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = [(6, 5), (7,), (1, 3)]  # uneven, and one shard empty
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in shapes]
    whole = [value.clone().requires_grad_() for value in values]
    sharded = [distribute_tensor(value, mesh, [Shard(0)]).requires_grad_() for value in values]
    for arguments in ({"backend": "reference"}, {"backend": "cpu"}, {"backend": "cpu", "cautious": True}):
        one = optim.AdamW(whole, lr=0.1, **arguments)
        other = optim.AdamW(sharded, lr=0.1, **arguments)
        one.collect_step_stats = other.collect_step_stats = True
        for _ in range(3):
            for a, b in zip(whole, sharded, strict=True):
                a.grad = torch.randn(a.shape)
                b.grad = distribute_tensor(a.grad, mesh, [Shard(0)])
            sums = (measure([p.grad for p in some]) for some in (whole, sharded))
            torch.testing.assert_close(*(s.float() for s in sums))  # float64 for its range; added up in float32
            one.step()
            other.step()
        for a, b in zip(whole, sharded, strict=True):
            assert isinstance(b, DTensor)
            torch.testing.assert_close(a.detach(), b.full_tensor().detach())
            assert isinstance(other.state[b]["exp_avg"], DTensor)
        torch.testing.assert_close(one.step_stats.sums, other.step_stats.sums, rtol=1e-5, atol=1e-5)
        assert one.step_stats.numel == other.step_stats.numel
        other.load_state_dict(other.state_dict())
        one.step()
        other.step()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_ranks_do_what_one_does() -> None:
    run_ranks(compare_shards_with_wholes)


def sorted_once() -> None:
    """What was sorted holds for DTensors, too, until a shard is another one; the update is that of plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    values = [torch.randn(6, 5), torch.randn(7)]
    whole = [value.clone().requires_grad_() for value in values]
    sharded = [torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    one, other = (optim.AdamW(params, lr=0.1, backend="cpu") for params in (whole, sharded))
    kept = []
    for step in range(5):
        for a, b in zip(whole, sharded, strict=True):
            a.grad = torch.randn(a.shape)
            placement = Replicate() if step == 4 else Shard(0)  # another one than the parameter's is redistributed
            b.grad = distribute_tensor(a.grad, mesh, [placement])
        if step == 2:
            moved: Any = sharded[0]
            moved._local_tensor = moved._local_tensor.detach().clone()  # as FSDP2 gives a parameter another shard
        one.step()
        other.step()
        kept.append(other._batches)
        for a, b in zip(whole, sharded, strict=True):
            assert isinstance(b, DTensor)
            torch.testing.assert_close(a.detach(), b.full_tensor().detach())
    assert [kept[i] is kept[i - 1] for i in (1, 2, 3)] == [True, False, True]


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_shards_are_sorted_once() -> None:
    run_ranks(sorted_once)
