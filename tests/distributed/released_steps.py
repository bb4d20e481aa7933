"""Steps in the backward pass on two ranks; called on each rank by test_released.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lightning_optim as lo
from lightning_optim.clipping import BlockRMS, ClipRule
from lightning_optim.step import StepPipeline
from tests.distributed.fsdp2_fits import Factory, fit_bare
from tests.helpers import SaveAt

STEPS, BAD = 4, 2


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def _whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(kind: type, clip: ClipRule | None, released: bool, bad: bool = False):
    """Weights after a few steps of a model in shards, each rank with data of its own, and the pipeline's counts."""
    rank = torch.distributed.get_rank()
    model = _model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = kind(model.named_parameters(), lr=0.01)
    pipeline = (lo.release_gradients if released else StepPipeline)(optimizer, clip=clip)
    seen = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        loss = model(torch.randn(6, 5)).square().sum()
        (loss * float("nan") if bad and step == BAD and rank == 1 else loss).backward()
        seen += [parameter.grad is None for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return [_whole(parameter) for parameter in model.parameters()], pipeline.counts(), all(seen)


def fit_all(folder: Path):
    """Weights after fits in Lightning: usual, released, and both parts of a released one that is resumed."""
    path = folder / "half.ckpt"
    runs = {"usual": fit_bare(Factory), "released": fit_bare(Factory, (lo.GradientRelease(), SaveAt(3, path)))}
    torch.distributed.barrier()
    runs["resumed"] = fit_bare(Factory, (lo.GradientRelease(),), path)
    return {name: run["weights"] for name, run in runs.items()}


def train_all(folder: Path):
    fits = fit_all(folder)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    runs: dict[Any, Any] = {
        (kind.__name__, clip is not None, released): train(kind, clip, released)
        for kind, clip in ((lo.optim.AdamW, None), (lo.optim.LAMB, BlockRMS(0.01)))
        for released in (False, True)
    }
    runs["fits"] = fits
    runs["ddp"] = refused()
    runs["bad"] = train(lo.optim.AdamW, None, True, bad=True)
    return runs


def refused():
    """The message of a model whose gradients are averaged after the hooks of the backward pass."""
    model = DistributedDataParallel(_model())
    try:
        lo.release_gradients(lo.optim.AdamW(model.parameters()))
    except RuntimeError as error:
        return str(error)
