"""Checks that ranks make together of tensor parallelism. Run by test_tensor_parallel.py.

A check is a function here whose name begins with ``check_``. Each raises what is wrong on its rank. One that dies on
one rank only leaves the other waiting, so what ranks compare they compare alike.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim import StepPipeline, clipping, optim
from lightning_optim.core.placements import gradient_of, is_split
from lightning_optim.core.sharding import local, max_over_shards, sum_over_shards, sum_split_units
from lightning_optim.core.stats import STEP_SUMS, StepRecord
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.kernels import measure
from lightning_optim.step.histograms import KINDS
from tests.clip_rules import OF_BLOCK

STEPS = 3
WHOLE_TENSORS = ("adafactor", "muon", "normuon", "soap")
# Arguments beside the learning rate with which an optimizer moves far enough, in three steps, for a fault to show.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "prodigy": {"lr": 1.0, "d0": 0.01},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "lars": {"lr": 1.0, "momentum": 0.9},
    "radam": {"lr": 0.1, "betas": (0.9, 0.8)},
}
ADAMWS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ours": lambda params: optim.AdamW(params, lr=0.01),
    "torch-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "torch": lambda params: torch.optim.AdamW(params, lr=0.01),
}
LAYOUTS = ([Replicate()], [Shard(0)], [Shard(1)])
GRADIENTS = ("replicate", "shard 0", "shard 1", "partial", "average", "plain")


class Block(nn.Module):
    """A transformer's layer without attention: vectors, matrices and an embedding, 7 rows of which over 2 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.first, self.last = nn.Embedding(7, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down, self.out = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        x = x + self.down(torch.tanh(self.up(self.first(x))))
        return self.out(self.last(x))


def block(mesh: DeviceMesh | None, plain: Sequence[str] = ()) -> nn.Module:
    """The same weights every time.

    Args:
        mesh: Of tensor parallelism, or of data parallelism and that; None for one process.
        plain: Layers that are left as they are; what comes out of them is then whole on each rank.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Block()
    if mesh is None:
        return model
    plan = {
        "emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "first": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if plain:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh if mesh.ndim == 1 else mesh["tp"], plan)
    if mesh.ndim == 2:
        for layer in (model.up, model.down, model.out):
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def backward(model: nn.Module, step: int) -> None:
    """Gradients of one step; the same data on all ranks, as in each group of tensor parallelism."""
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(0, 7, (2, 3, 6), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    (loss * (1 + step)).backward()  # so that what compares with steps before finds something to clip


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and vectors without decay."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": [p for p in params if p.dim() < 2]}]


def train(
    make: Callable[[Any], torch.optim.Optimizer],
    mesh: DeviceMesh | None,
    clip: clipping.ClipRule | None = None,
    spoil: Callable[[nn.Module, int], None] | None = None,
    plain: Sequence[str] = (),
    **pipeline: Any,
) -> tuple[nn.Module, StepPipeline | None]:
    """The model after some steps."""
    model = block(mesh, plain)
    optimizer = make(groups(model))
    used = StepPipeline(optimizer, clip=clip, **pipeline) if clip is not None or pipeline else None
    for step in range(STEPS):
        backward(model, step)
        if spoil is not None:
            spoil(model, step)
        optimizer.step()
    return model, used


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_on_all_ranks(tensor: Tensor) -> None:
    """Raises unless all ranks have the same, bit for bit."""
    tensor = tensor.detach().contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    for other in found:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)


def compare(model: nn.Module, one: nn.Module, tolerance: float = 2e-6) -> None:
    """Raises unless weights are those of one process, and replicas are equal."""
    for (name, param), expected in zip(model.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(
            whole(param), expected.detach(), rtol=1e-4, atol=tolerance, msg=partial("{}: {}".format, name)
        )
        if not isinstance(param, DTensor) or not any(map(is_split, param.placements)):
            same_on_all_ranks(local(param))


def maker(name: str, **arguments: Any) -> Callable[[Any], torch.optim.Optimizer]:
    kind = optim.get_optimizer_class(name)
    return lambda params: kind(params, **{"lr": 0.01, **ARGUMENTS.get(name, {}), **arguments})


def torch_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def elementwise() -> list[str]:
    return [name for name in optim._classes() if name not in WHOLE_TENSORS]


# What can be checked. `mesh` is of tensor parallelism alone, or of data parallelism (FSDP2) and that.


def check_optimizer(mesh: DeviceMesh, name: str, **arguments: Any) -> None:
    make = maker(name, **arguments)
    compare(train(make, mesh)[0], train(make, None)[0])


def check_beside_plain_parameters(mesh: DeviceMesh, kind: str) -> None:
    arguments = {"clip": clipping.GlobalNorm(0.1), "on_report": lambda record: None, "plain": ("emb",)}
    compare(train(ADAMWS[kind], mesh, **arguments)[0], train(ADAMWS[kind], None, **arguments)[0])


def check_clipping(mesh: DeviceMesh, kind: str, rule: str) -> None:
    model, used = train(ADAMWS[kind], mesh, OF_BLOCK[rule]())
    one, alone = train(ADAMWS[kind], None, OF_BLOCK[rule]())
    compare(model, one)
    assert used is not None
    assert alone is not None
    assert used.counts() == alone.counts()
    assert alone.counts().clipped > 0
    states = [clip_state["state"] for clip_state in (used.clip_state(), alone.clip_state()) if clip_state]
    torch.testing.assert_close(states[:1], states[1:], rtol=1e-4, atol=1e-6)


def check_record(mesh: DeviceMesh, name: str) -> None:
    """All that the monitor is made from."""
    make = ADAMWS[name] if name in ADAMWS else maker(name) if name != "torch-sgd" else torch_sgd
    found: list[list[StepRecord]] = [[], []]
    for records, where in zip(found, (mesh, None), strict=True):
        train(make, where, clipping.GlobalNorm(0.1), on_report=records.append, histograms=lambda: KINDS)
    for record, expected in zip(*found, strict=True):
        assert record.update.numel == expected.update.numel
        assert record.update.group_sizes == expected.update.group_sizes
        for index, column in enumerate(STEP_SUMS):
            sums, right = (r.update.sums[:, index] for r in (record, expected))
            torch.testing.assert_close(
                sums, right, rtol=1e-3, atol=1e-9, equal_nan=True, msg=partial("{}: {}".format, column)
            )
        for value, right in (
            (record.grad.norm_sq, expected.grad.norm_sq),
            (record.clipped_norm_sq, expected.clipped_norm_sq),
            (record.norms, expected.norms),
        ):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-9)
        same_on_all_ranks(record.update.sums)
        for what, counts in record.histograms.items():
            right = expected.histograms[what]
            torch.testing.assert_close(counts.sum(1), right.sum(1))
            assert (counts - right).abs().sum() <= 6, what  # a value at the border of two columns
            same_on_all_ranks(counts)


def check_skip(mesh: DeviceMesh, kind: str, layer: str) -> None:
    """A NaN on one rank only has all ranks leave out the step."""
    before: dict[str, Tensor] = {}
    bad = 1
    plain = ("emb",) if layer == "emb" else ()

    def spoil(model: nn.Module, step: int) -> None:
        if step != bad:
            return
        before.update({name: local(p).detach().clone() for name, p in model.named_parameters()})
        if dist.get_rank() == 1:
            local(model.get_parameter(layer + ".weight").grad).view(-1)[0] = torch.nan

    def stop(record: StepRecord) -> None:
        assert bool(record.skip > 0) == (record.steps == bad + 1)

    model = block(mesh, plain)
    optimizer = ADAMWS[kind](groups(model))
    pipeline = StepPipeline(optimizer, detectors=[NonFiniteGradient()], on_report=stop)
    for step in range(STEPS):
        backward(model, step)
        with torch.no_grad():
            spoil(model, step)
        optimizer.step()
        assert pipeline.counts().skipped == int(step >= bad)
        if step == bad:
            for name, param in model.named_parameters():
                assert torch.equal(before[name], local(param).detach()), name
    for param in model.parameters():
        assert local(param).isfinite().all()


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The calls of ``DTensor.redistribute``."""
    calls: list[Any] = []
    original = DTensor.redistribute

    def redistribute(self: DTensor, *args: Any, **kwargs: Any) -> DTensor:
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    DTensor.redistribute = redistribute
    try:
        yield calls
    finally:
        DTensor.redistribute = original


def check_once(mesh: DeviceMesh, kind: str) -> None:
    """However many read a gradient, it is redistributed once, and its numbers stay."""
    model = block(mesh)
    optimizer = ADAMWS[kind](groups(model))
    StepPipeline(
        optimizer,
        clip=clipping.ZClip(),
        detectors=[NonFiniteGradient()],
        on_report=lambda r: None,
        histograms=lambda: KINDS,
    )
    for step in range(2):
        backward(model, step)
        params: list[Any] = list(model.parameters())
        otherwise = [p for p in params if p.grad.placements != p.placements]
        assert len(otherwise) == 5  # the embedding and four vectors of norms
        expected = [whole(p.grad) for p in params]
        with counted() as calls:
            optimizer.step()
        assert len(calls) == len(otherwise)
        for param, gradient in zip(params, expected, strict=True):
            assert param.grad.placements == param.placements
            assert torch.equal(whole(param.grad), gradient)


def placed(value: Tensor, mesh: DeviceMesh, kind: str) -> Tensor:
    """A gradient whose whole is ``value``."""
    rank = dist.get_rank()
    if kind == "plain":
        return value.clone()
    if kind == "partial":
        part = value.clone() * (3.0 if rank == 0 else -2.0) if dist.get_world_size() == 2 else value / 4
        return DTensor.from_local(part, mesh, [Partial()] * mesh.ndim, run_check=False)
    if kind == "average":
        part = value * 2.0 * (rank % 2)
        return DTensor.from_local(part, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
    target = Replicate() if kind == "replicate" else Shard(int(kind[-1]))
    return distribute_tensor(value, mesh, [target] * mesh.ndim)


def check_placements(mesh: DeviceMesh, backend: str) -> None:
    """Every placement of a gradient beside every one of a parameter, uneven and empty shards among them."""
    cases = [
        (shape, layout, gradient) for shape in ((7, 3), (1, 5), (0, 3)) for layout in LAYOUTS for gradient in GRADIENTS
    ]
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape, _, _ in cases]
    for name, arguments in (
        ("adamw", {"cautious": True, "weight_decay": 0.1, "weight_decay_kind": "norm"}),
        ("lamb", {"cautious": True}),
        ("stableadamw", {}),
    ):
        alone = [value.clone().requires_grad_() for value in values]
        shared: list[Any] = [
            distribute_tensor(value.clone(), mesh, layout * mesh.ndim).requires_grad_()
            for value, (_, layout, _) in zip(values, cases, strict=True)
        ]
        cls: Any = optim.get_optimizer_class(name)
        one, both = (cls(params, lr=0.1, backend=backend, **arguments) for params in (alone, shared))
        one.collect_step_stats = both.collect_step_stats = True
        for _ in range(2):
            for a, b, (_, _, gradient) in zip(alone, shared, cases, strict=True):
                a.grad = torch.randn(a.shape, generator=generator)
                b.grad = placed(a.grad, mesh, gradient)
            one.step()
            both.step()
            assert one.step_stats is not None
            assert both.step_stats is not None
            torch.testing.assert_close(one.step_stats.sums, both.step_stats.sums, rtol=1e-4, atol=1e-4, equal_nan=True)
        for a, b, case in zip(alone, shared, cases, strict=True):
            torch.testing.assert_close(
                a.detach(), whole(b), rtol=1e-4, atol=1e-5, msg=partial("{} {} {}".format, name, case)
            )
            assert b.grad.placements == b.placements
            assert b.grad.to_local().shape == b.to_local().shape


def check_reductions(mesh: DeviceMesh) -> None:
    values = [torch.arange(1.0, 1 + rows * 3).reshape(rows, 3) for rows in (7, 1, 4, 0)]
    tensors: list[Tensor] = []
    expected: list[Tensor] = []
    for value in values:
        for layout in LAYOUTS:
            tensors.append(distribute_tensor(value, mesh, layout * mesh.ndim))
            expected.append(value)
    tensors.append(values[0])  # plain, beside DTensors
    expected.append(values[0])
    parts = [local(t) for t in tensors]
    sums = torch.stack([p.sum() for p in parts])
    torch.testing.assert_close(sum_over_shards(sums, tensors), torch.stack([e.sum() for e in expected]))
    torch.testing.assert_close(measure(tensors), torch.stack([e.double().square().sum() for e in expected]))
    largest = torch.stack([p.max() if p.numel() else torch.zeros(()) for p in parts])
    right = torch.stack([e.max() if e.numel() else torch.zeros(()) for e in expected])
    torch.testing.assert_close(max_over_shards(largest, tensors), right)
    shapes = tuple((p.shape[0], 1) for p in parts)
    rows = sum_split_units(torch.cat([p.sum(1) for p in parts])[None], tensors, shapes)
    for part, tensor, value in zip(torch.split(rows[0], [s[0] for s in shapes]), tensors, expected, strict=True):
        wanted = value.sum(1)
        if isinstance(tensor, DTensor):
            split = [p if p.is_shard(0) else Replicate() for p in tensor.placements]
            wanted = distribute_tensor(wanted, mesh, split).to_local()
        torch.testing.assert_close(part, wanted)
    # What is wrong on one rank is wrong on all.
    spoiled = sums.clone()
    if dist.get_rank() == dist.get_world_size() - 1:
        spoiled[:3] = torch.nan
    total, most = sum_over_shards(spoiled, tensors), max_over_shards(spoiled, tensors)
    assert total[:3].isnan().all()
    assert total[3:].isfinite().all()
    assert not most[:3].isfinite().any()
    assert most[3:].isfinite().all()
    same_on_all_ranks(most)


def check_norm_of_terms(mesh: DeviceMesh) -> None:
    value = torch.arange(6.0).reshape(2, 3)
    for kind in GRADIENTS:
        torch.testing.assert_close(measure([placed(value, mesh, kind)]), value.double().square().sum().reshape(1))


def check_refusals(mesh: DeviceMesh) -> None:
    term = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()] * mesh.ndim, run_check=False))
    refused(partial(optim.AdamW, [("body", term)], lr=0.1), "'body'", "Partial", "Redistribute")
    theirs = torch.optim.SGD([term], lr=0.1)
    StepPipeline(theirs, clip=clipping.GlobalNorm(), names={term: "body"})
    term.grad = torch.ones_like(term)
    refused(theirs.step, "'body'", "Partial", "Redistribute")
    weight = distribute_tensor(torch.ones(4), mesh, [Replicate()] * mesh.ndim).requires_grad_()
    other = init_device_mesh("cpu", (1, 1, dist.get_world_size()))
    weight.grad = distribute_tensor(torch.ones(4), other, [Replicate()] * 3)
    refused(optim.AdamW([("body", weight)], lr=0.1).step, "'body'", "one device mesh")


def refused(call: Callable[[], Any], *pieces: str) -> None:
    """Raises unless ``call`` does, and says all ``pieces``."""
    with pytest.raises(ValueError, match=".*".join(pieces)):
        call()


def check_whole_matrices(mesh: DeviceMesh, name: str) -> None:
    """Rules of whole tensors run over replicas, whose gradients may be terms of a sum."""
    torch.manual_seed(0)
    values = [torch.randn(6, 4), torch.randn(5, 5)]
    alone = [value.clone().requires_grad_() for value in values]
    shared = [distribute_tensor(v, mesh, [Replicate()] * mesh.ndim).requires_grad_() for v in values]
    cls: Any = optim.get_optimizer_class(name)
    one, both = (cls(params, lr=0.01) for params in (alone, shared))
    for _ in range(STEPS):
        for a, b in zip(alone, shared, strict=True):
            a.grad = torch.randn(a.shape).mul(16).round() / 16  # so that terms add up exactly; SOAP turns on last bits
            b.grad = placed(a.grad, mesh, "partial")
        one.step()
        both.step()
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a.detach(), whole(b), rtol=1e-4, atol=1e-4)
        same_on_all_ranks(local(b))


def check_state_of_torch(mesh: DeviceMesh) -> None:
    """torch's SGD makes its momentum of the first gradient, so it may be placed otherwise than the parameter."""

    models = []
    for where in (mesh, None):
        model: Any = block(where)
        theirs = torch_sgd(groups(model))
        backward(model, 0)
        theirs.step()
        if where is not None:
            buffers = [(theirs.state[p]["momentum_buffer"], p) for p in model.parameters()]
            assert any(buffer.placements != p.placements for buffer, p in buffers)
        ours = optim.SGD(groups(model), lr=0.1, momentum=0.9)
        ours.load_state_dict(theirs.state_dict())
        for p in model.parameters():
            if isinstance(p, DTensor):
                assert ours.state[p]["momentum_buffer"].placements == p.placements
        backward(model, 1)
        ours.step()
        StepPipeline(theirs, clip=clipping.MomentumRatio(0.1, warmup=1), on_report=lambda record: None)
        backward(model, 2)
        theirs.step()
        models.append(model)
    compare(*models)


def check_undelivered(mesh: DeviceMesh) -> None:
    """A collective may still be on its way when a gradient is read."""
    param = distribute_tensor(torch.zeros(4), mesh, [Replicate()]).requires_grad_()
    on_its_way = functional.all_reduce(torch.ones(4), "sum", mesh.get_group(0))
    assert isinstance(on_its_way, functional.AsyncCollectiveTensor)
    param.grad = DTensor.from_local(on_its_way, mesh, [Replicate()], run_check=False)
    optim.SGD([param], lr=1.0).step()
    torch.testing.assert_close(whole(param), torch.full((4,), -float(mesh.size())))
    bare = nn.Parameter(torch.zeros(4))
    bare.grad = functional.all_reduce(torch.ones(4), "sum", mesh.get_group(0))
    optim.SGD([bare], lr=1.0).step()
    torch.testing.assert_close(bare.detach(), torch.full((4,), -float(mesh.size())))


def check_strided_shards(mesh: DeviceMesh) -> None:
    """The placement of FSDP2 over tensor parallelism; gradients of all kinds beside it."""
    model: Any = block(mesh)
    found = {name: p.placements for name, p in model.named_parameters()}
    assert isinstance(found["up.weight"][0], _StridedShard)
    assert all(map(is_split, found["up.weight"]))
    generator = torch.Generator().manual_seed(0)
    for name, param in model.named_parameters():
        value = torch.randn(param.shape, generator=generator)
        kinds = [kind for kind in GRADIENTS if not (kind == "shard 1" and param.dim() < 2)]
        for kind in kinds:
            param.grad = placed(value, mesh, kind)
            gradient: Any = gradient_of(param)
            assert gradient is param.grad
            assert gradient.placements == param.placements, (name, kind)
            torch.testing.assert_close(whole(gradient), value)
            torch.testing.assert_close(measure([gradient]), value.double().square().sum().reshape(1))


def make(checks: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Make ``checks``, name and arguments by label; what went wrong in each, on this rank."""
    world = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (2,))
        if world == 2
        else init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    )
    found = {}
    for label, (name, arguments) in checks.items():
        try:
            globals()[f"check_{name}"](mesh, **arguments)
            found[label] = ""
        except Exception:
            found[label] = traceback.format_exc()
    return found
