"""Checks with two processes, under DDP and under FSDP2."""

from __future__ import annotations

import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException

from lightning_optim.testing.check import check
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject, normal

RANKS = 2


@check(
    why="Ranks that drift apart train different models without an error.",
    fix="Use nothing that differs between ranks: no random numbers without a common seed, no local statistics.",
    group="distributed",
)
def ddp(subject: Subject) -> None:
    """Under DistributedDataParallel two ranks hold bit-equal weights, close to those of one process."""
    first, second = _ranks(subject, _ddp)
    subject.same(second, first, "the second rank against the first")
    wanted = _train(_model(), _make(subject))
    subject.close(first, wanted, "two ranks against one process", start=list(_model().parameters()), rtol=1e-3)


@check(
    why="Under fully_shard a parameter is a DTensor of which a rank has a part; norms and matrices need the whole.",
    fix="Make state with `zeros_like(param)`, and reduce norms over ranks (or `full_tensor()`).",
    group="distributed",
)
def fsdp2(subject: Subject) -> None:
    """Under fully_shard two ranks train as one process does."""
    wanted = _train(_model(), _make(subject))
    start = list(_model().parameters())
    for rank, found in enumerate(_ranks(subject, _fsdp2)):
        subject.close(found, wanted, f"rank {rank} against one process", start=start, rtol=1e-3)


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        for param, value in zip(model.parameters(), normal([(8, 6), (4, 8)], 1, 0.5), strict=True):
            param.copy_(value)
    return model


def _train(model: nn.Module, make: Callable[[Any], Any], rank: int | None = None) -> list[Tensor]:
    """Train for five steps, on the whole batch or on a rank's half of it."""
    optimizer = make(list(model.parameters()))
    if callable(train := getattr(optimizer, "train", None)):
        train()
    data = [t.float() for t in normal([(8, 6), (8, 4)] * 5, 4)]
    for step in range(5):
        x, y = data[2 * step : 2 * step + 2]
        if rank is not None:
            x, y = x[rank::RANKS], y[rank::RANKS]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    params = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in params]


def _ddp(rank: int, make: Callable[[Any], Any]) -> list[Tensor]:
    return _train(nn.parallel.DistributedDataParallel(_model()), make, rank)


def _fsdp2(rank: int, make: Callable[[Any], Any]) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return _train(model, make, rank)


def _make(subject: Subject) -> Callable[[Any], Any]:
    return functools.partial(subject.factory, **subject.options) if subject.options else subject.factory


def _ranks(subject: Subject, work: Callable[[int, Callable[[Any], Any]], list[Tensor]]) -> list[list[Tensor]]:
    """Return what each rank returns."""
    if not torch.distributed.is_available():
        raise CheckSkipped("this build of torch has no torch.distributed")
    processes: Any = torch.multiprocessing  # without types
    make = _make(subject)
    try:
        pickle.dumps(make)
    except Exception as error:
        raise CheckSkipped(f"the factory cannot be sent to another process: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        try:
            processes.spawn(_rank, (work, make, folder), nprocs=RANKS)
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            if last.startswith(("ValueError", "TypeError", "NotImplementedError")) and "shard" in last.lower():
                raise CheckSkipped(f"it refuses shards: {last[:300]}") from None
            raise CheckFailed(f"a rank has raised: {last[:300]}") from error
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[int, Callable[[Any], Any]], list[Tensor]], make: Any, folder: str) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        torch.save(work(rank, make), Path(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()
