"""What ranks check together of optimizers that need whole matrices. Run by test_matrices_on_ranks.py."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optim import StepPipeline, clipping, optim
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.kernels import parts
from lightning_optim.kernels.cpu import momentum
from lightning_optim.kernels.matrix_rule import MatrixRule
from lightning_optim.optim import division, muon, muon_in_place, soap_bases
from lightning_optim.optim.matrix_form import matrix_form
from lightning_optim.optim.muon import MuonRule
from tests.live_bytes import peak_bytes
from tests.optim.tensor_parallel_checks import same_on_all_ranks, train

STEPS = 4
ROWS, COLUMNS = Shard(0), Shard(1)
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "tall": ((9, 4), ROWS),
    "wide": ((7, 16), ROWS),
    "one row": ((1, 3), ROWS),
    "square": ((6, 6), ROWS),
    "twin": ((6, 6), ROWS),
    "by columns": ((6, 10), COLUMNS),
    "kernel": ((5, 3, 3, 2), ROWS),
    "kernel by inputs": ((5, 3, 3, 2), COLUMNS),
}
STACKS: dict[str, tuple[tuple[int, ...], Any]] = {
    "experts": ((3, 5, 4), ROWS),
    "experts by rows": ((3, 5, 4), COLUMNS),
    "stacked experts": ((3, 2, 5, 4), ROWS),
}
FUSED: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "grouped queries": ((11, 4), ROWS, {"split": (6, 3, 2)}),
    "query, key, value": ((9, 4), COLUMNS, {"split": 3}),
    "gate and up": ((4, 10), ROWS, {"split": (7, 3), "split_dim": -1}),
    "interleaved": ((12, 5), ROWS, {"split": 3, "split_repeats": 2}),
    "experts": ((2, 8, 3), ROWS, {"split": (5, 3), "flatten": False}),
}
FUSED = {f"fused: {key}": value for key, value in FUSED.items()}
VECTORS: dict[str, tuple[tuple[int, ...], Any]] = {"vector": ((7,), ROWS), "number": ((1,), ROWS)}
MUONS = ("Muon", "NorMuon")


@contextmanager
def precise(dtype: torch.dtype) -> Iterator[None]:
    """Newton-Schulz, and what is sent for it, in ``dtype`` instead of bfloat16."""
    old = MatrixRule.sent_dtype
    MatrixRule.sent_dtype = dtype
    try:
        yield
    finally:
        MatrixRule.sent_dtype = old


def groups(name: str, given: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Parameter groups of parameters by name."""
    rule = {"rule": name.lower()} if name in MUONS else {}
    fused = [{"params": [(key, given[key])], **rule, **FUSED[key][2]} for key in given if key in FUSED]
    if name not in MUONS:
        return [{"params": [(key, param) for key, param in given.items() if key not in FUSED]}, *fused]
    matrices = [(key, param) for key, param in given.items() if key in SHAPES]
    stacks = [(key, param) for key, param in given.items() if key in STACKS]
    vectors = [(key, param) for key, param in given.items() if key in VECTORS]
    return [
        {"params": matrices, "rule": name.lower()},  # else a matrix of one row would be AdamW's
        {"params": stacks, "rule": name.lower(), "flatten": False, "lr": 0.05},
        {"params": vectors, "rule": "adamw"},
        *fused,
    ]


def values(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Values in all shapes by name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | VECTORS | (STACKS if name in MUONS else {})
    shapes |= {} if name == "Adafactor" else {key: (shape, where) for key, (shape, where, _) in FUSED.items()}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, (shape, _) in shapes.items()}


def placement(key: str) -> Any:
    return (SHAPES | STACKS | VECTORS | FUSED)[key][1]


def place(value: Tensor, key: str, mesh: DeviceMesh, placements: Sequence[Any] | None = None) -> DTensor:
    """A value over a mesh; without ``placements`` replicated over all dimensions but the last."""
    if placements is None:
        placements = [Replicate()] * (mesh.ndim - 1) + [placement(key)]
    whole = distribute_tensor(value, mesh, [Replicate()] * mesh.ndim)
    return whole.redistribute(placements=[p if getattr(p, "dim", 0) < value.dim() else Replicate() for p in placements])


class Run:
    """An optimizer on one device, or on shards of a mesh."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        mesh: DeviceMesh | None,
        placements: Sequence[Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.name, self.dtype, self.mesh, self.placements = name, dtype, mesh, placements
        given = values(name, dtype)
        self.params = {
            key: nn.Parameter(value if mesh is None else place(value, key, mesh, placements))
            for key, value in given.items()
        }
        self.optimizer = getattr(optim, name)(groups(name, self.params), lr=0.1, **arguments)
        self.count = 0

    def give(self, spoil: Tensor | None = None) -> None:
        """Gradients of the next step, with ``spoil`` added to one element."""
        self.count += 1
        for key, value in values(self.name, self.dtype, self.count).items():
            if spoil is not None and key == "tall":
                value[-1, -1] += spoil
            self.params[key].grad = value if self.mesh is None else place(value, key, self.mesh, self.placements)

    def step(self) -> None:
        self.give()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [whole(param) for param in self.params.values()]

    def states(self) -> dict[str, Tensor]:
        return {
            f"{key} {name}": whole(value)
            for key, param in self.params.items()
            for name, value in self.optimizer.state[param].items()
        }


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def meshes() -> list[DeviceMesh]:
    """One over all ranks; with four also one of replicas of shards."""
    ranks = dist.get_world_size()
    found = [init_device_mesh("cpu", (ranks,))]
    return found + ([init_device_mesh("cpu", (2, ranks // 2))] if ranks > 2 else [])


def assert_as_one(
    name: str, dtype: torch.dtype, mesh: DeviceMesh, placements: Sequence[Any] | None = None, **arguments: Any
) -> None:
    """Shards are what one device has."""
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if name in MUONS else {"rtol": 0, "atol": 0}
    with precise(torch.float64 if dtype == torch.float64 else torch.float32):
        one, many = (Run(name, dtype, where, placements, **arguments) for where in (None, mesh))
        one.optimizer.collect_step_stats = many.optimizer.collect_step_stats = True
        for _ in range(STEPS):
            one.step()
            many.step()
        torch.testing.assert_close(many.weights(), one.weights(), **tolerance)
        torch.testing.assert_close(many.states(), one.states(), **tolerance)
        assert one.optimizer.step_stats.numel == many.optimizer.step_stats.numel
        torch.testing.assert_close(
            many.optimizer.step_stats.sums, one.optimizer.step_stats.sums, rtol=1e-4, atol=1e-5, equal_nan=True
        )


def check_eight_bits(name: str) -> None:
    """Moments in 8 bits are sharded as codes, and give what 32 bits give but for their rounding."""
    (mesh, *_) = meshes()
    with precise(torch.float32):
        params, optimizers = [], []
        for bits, where in ((32, None), (8, None), (8, mesh)):
            torch.manual_seed(0)
            value = torch.randn(12, 512)
            param = nn.Parameter(value if where is None else distribute_tensor(value, where, [ROWS]))
            rule = {"rule": name.lower()}
            optimizers.append(getattr(optim, name)([{"params": [param]} | rule], lr=0.01, state_bits=bits))
            params.append(param)
        start = whole(params[0])
        for _ in range(STEPS):
            value = torch.randn(12, 512)
            for param, optimizer in zip(params, optimizers, strict=True):
                param.grad = distribute_tensor(value, mesh, [ROWS]) if isinstance(param, DTensor) else value.clone()
                optimizer.step()
    (state,) = optimizers[-1].state.values()
    codes = [value for value in state.values() if value.dtype == torch.uint8]
    assert codes
    assert all(isinstance(value, DTensor) and value.placements == (ROWS,) for value in codes)
    exact, single, sharded = (whole(param) - start for param in params)
    assert 0 < (sharded - exact).norm() < 2 * (single - exact).norm()
    assert (sharded - exact).norm() < 0.1 * exact.norm()


@contextmanager
def small_buckets() -> Iterator[None]:
    """Buckets of a few elements, so that there are many."""
    old = parts.AT_LEAST["cpu"]
    parts.AT_LEAST["cpu"] = 30
    try:
        yield
    finally:
        parts.AT_LEAST["cpu"] = old


def check_equality(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
    for mesh in meshes():
        assert_as_one(name, dtype, mesh, **arguments)


def check_many_buckets(name: str) -> None:
    """Results do not depend on the buckets."""
    with small_buckets():
        check_equality(name, backend="reference")
        check_equality(name, backend="reference", cautious=True, weight_decay=0.1, weight_decay_kind="norm")
        many = Run(name, torch.float32, meshes()[0])
        many.step()
    batches = many.optimizer._batches.batches
    assert any(len(batch.kernels["plan"].buckets) > 1 for batch in batches if batch.route is not None)


def check_bf16(name: str, **arguments: Any) -> None:
    """An owner computes what one device does, so that bf16 weights are equal; but for products of other stacks."""
    for mesh in meshes():
        assert_as_one(name, torch.bfloat16, mesh, backend="reference", **arguments)


def check_fully_sharded(name: str) -> None:
    """Under `fully_shard` with the data of all ranks, clipping, and a NaN on one rank: as one process with all data."""

    def model() -> nn.Sequential:
        torch.manual_seed(3)
        layers = nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5)
        return nn.Sequential(*layers)

    rank, ranks = dist.get_rank(), dist.get_world_size()
    one, many = model(), model()
    for layer in many:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    many[2].weight.requires_grad_(False)
    one[2].weight.requires_grad_(False)
    pipelines = []
    with precise(torch.float32):
        for net in (one, many):
            free = [(key, param) for key, param in net.named_parameters() if param.requires_grad]
            optimizer = getattr(optim, name)(free, lr=0.05)
            detectors = [NonFiniteGradient()]
            pipelines.append(StepPipeline(optimizer, clip=clipping.GlobalNorm(0.05), detectors=detectors))
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            data = torch.randn(4 * ranks, 6, generator=generator)
            before = [whole(p).clone() for p in many.parameters()]
            for net, part in ((one, data), (many, data[rank::ranks])):
                net.zero_grad()
                bad = torch.nan if step == 2 and (net is one or rank == ranks - 1) else 1.0
                (net(part).square().mean() * bad).backward()
            for pipeline in pipelines:
                pipeline.optimizer.step()
            same = [torch.equal(a, whole(b)) for a, b in zip(before, many.parameters(), strict=True)]
            assert all(same) == (step == 2 or (name == "SOAP" and step == 0))
        if name == "SOAP":  # Its bases depend on the last bits of gradients that have no full rank.
            return
        for a, b in zip(one.parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(whole(b), whole(a), rtol=1e-5, atol=1e-6)
    counts = [pipeline.counts() for pipeline in pipelines]
    assert counts[0] == counts[1]
    assert (counts[0].clipped > 0, counts[0].skipped) == (True, 1)


def check_skip(name: str) -> None:
    """A flag that only one rank has set skips the step on all, exactly; none waits for another."""
    for backend in ("reference", "cpu"):
        run = Run(name, torch.float32, meshes()[-1], backend=backend)
        run.step()
        before = [*run.weights(), *run.states().values()]
        run.optimizer.found_inf = torch.tensor(1.0 if dist.get_rank() == dist.get_world_size() - 1 else 0.0)
        run.step()
        assert all(torch.equal(a, b) for a, b in zip(before, [*run.weights(), *run.states().values()], strict=True))
        run.optimizer.found_inf.zero_()
        run.step()
        assert not all(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=False))


def save_distributed(name: str, folder: str) -> list[Tensor]:
    """Save an optimizer in shards after two steps, and return what its weights are after two more."""
    with precise(torch.float32):
        run = Run(name, torch.float32, init_device_mesh("cpu", (dist.get_world_size(),)), backend="reference")
        for step in range(STEPS):
            if step == 2:
                model = Model(run)
                weights, state = get_state_dict(model, run.optimizer)
                dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)  # type: ignore[attr-defined]
            run.step()
        return run.weights()


def load_distributed(name: str, folder: str, expected: list[Tensor]) -> None:
    """Continue on this number of ranks with what another number has saved."""
    with precise(torch.float32):
        run = Run(name, torch.float32, init_device_mesh("cpu", (dist.get_world_size(),)), backend="reference")
        model = Model(run)
        weights, state = get_state_dict(model, run.optimizer)
        dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)  # type: ignore[attr-defined]
        set_state_dict(model, run.optimizer, model_state_dict=weights, optim_state_dict=state)
        run.count = 2
        for _ in range(STEPS - 2):
            run.step()
        torch.testing.assert_close(run.weights(), expected, rtol=1e-6, atol=1e-6)


class Model(nn.Module):
    """A module of the parameters of a run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        for key, param in run.params.items():
            self.register_parameter(key, param)


def lose_one(name: str, answer: Path, is_stuck: bool) -> None:
    """One rank ends, or is stuck, in the middle of training; the other writes down how long it waits for it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=3 if is_stuck else 20))
    run = Run(name, torch.float32, meshes()[0])
    run.step()
    if dist.get_rank() == 1:
        time.sleep(10 if is_stuck else 0.5)  # The other one waits already.
        os._exit(1)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        run.step()
    answer.write_text(str(time.monotonic() - started))


def check_not_a_number(name: str) -> None:
    """Without a guard, a NaN on the rank of one row is in the whole matrix, as on one device, and in no other."""
    with precise(torch.float32):
        one, many = (Run(name, torch.float32, mesh) for mesh in (None, meshes()[0]))
        for run in (one, many):
            run.step()
            run.give(torch.tensor(torch.nan))
            run.optimizer.step()
        torch.testing.assert_close(many.weights(), one.weights(), equal_nan=True, rtol=1e-6, atol=1e-6)
    assert not whole(many.params["tall"]).isfinite().any()
    assert whole(many.params["wide"]).isfinite().all()


def check_resume(name: str) -> None:
    """State is saved and loaded as shards, as a plain state dict, and from one device."""
    mesh = meshes()[-1]
    with precise(torch.float32):
        one, many, loaded = (Run(name, torch.float32, where, backend="reference") for where in (None, mesh, mesh))
        for run in (one, many):
            run.step()
        loaded.optimizer.load_state_dict(one.optimizer.state_dict())
        other = Run(name, torch.float32, mesh, backend="reference")
        other.optimizer.load_state_dict(many.optimizer.state_dict())
        for run in (loaded, other):
            run.count = 1
            with torch.no_grad():
                for key, param in run.params.items():
                    param.copy_(many.params[key])
        for run in (one, many, loaded, other):
            run.step()
        for run in (many, loaded, other):
            torch.testing.assert_close(run.weights(), one.weights(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(run.states(), one.states(), rtol=1e-6, atol=1e-6)
    for state in many.optimizer.state.values():  # No rank has all of a factor.
        for key, value in state.items():
            if value.dim() and value.shape[0] > 1 and mesh.size() > 1:
                assert value.to_local().numel() < value.numel(), key


def peak_of_step(count: int, mesh: DeviceMesh | None) -> int:
    """Bytes that a step of Muon needs for ``count`` matrices of 64 x 64, one of which makes a part."""
    params: list[Tensor] = [torch.randn(64, 64) for _ in range(count)]
    if mesh is not None:
        params = [place(param, "square", mesh) for param in params]
    params = [nn.Parameter(param) for param in params]
    optimizer = optim.Muon([{"params": params, "rule": "muon"}], lr=0.1, backend="reference")
    old = parts.AT_LEAST["cpu"], parts.SHARE
    parts.AT_LEAST["cpu"], parts.SHARE = 64 * 64, 10**6
    try:
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        return peak_bytes(optimizer.step)
    finally:
        parts.AT_LEAST["cpu"], parts.SHARE = old


def check_memory() -> None:
    """A step needs no more memory for more matrices, and that of one device and one more matrix, on its way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ranks = mesh.size()
    few, many = peak_of_step(4 * ranks, mesh), peak_of_step(16 * ranks, mesh)
    alone = peak_of_step(4 * ranks, None)
    bucket = 2 * 64 * 64 * 4  # of an owner; a thread of gloo may hold its messages a moment longer
    assert many < few + bucket, (few, many, alone)
    assert few < alone + bucket, (few, many, alone)


def check_other_placements(name: str, **arguments: Any) -> None:
    """Cut twice, or into strided parts, each rank gathers and updates all tensors."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (max(ranks // 2, 1), min(ranks, 2)))
    strided = [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)]
    for placements in (
        strided,
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(1), Replicate()],
    ):
        assert_as_one(name, torch.float32, mesh, placements=placements, **arguments)


def check_tensor_parallel(name: str) -> None:
    """Tensor parallelism, and with four ranks strided shards of data parallelism over it."""
    ranks = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (ranks,)) if ranks < 4 else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    )

    def make(params: Any) -> Any:
        return getattr(optim, name)(params, lr=0.02)

    with precise(torch.float32):
        alone, _ = train(make, None)
        shared, _ = train(make, mesh)
    for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(whole(b), whole(a), rtol=1e-4, atol=1e-4)


@contextmanager
def counted(module: Any, function: str) -> Iterator[list[torch.Size]]:
    """Shapes of the matrices for which this rank calls a function of ``module``, one or several at a time."""
    shapes: list[torch.Size] = []
    usual = getattr(module, function)

    def counting(matrices: Any, *args: Any, **kwargs: Any) -> Any:
        given = matrices if isinstance(matrices, Tensor) else list(matrices)
        shapes.extend([given.shape] if isinstance(given, Tensor) else [matrix.shape for matrix in given])
        return usual(given, *args, **kwargs)

    setattr(module, function, counting)
    try:
        yield shapes
    finally:
        setattr(module, function, usual)


@contextmanager
def all_pay() -> Iterator[None]:
    """Matrices are divided over ranks however small they are."""
    old = division.WORTH["cpu"], division.AT_LEAST["cpu"]
    division.WORTH["cpu"] = division.AT_LEAST["cpu"] = 0.0
    try:
        yield
    finally:
        division.WORTH["cpu"], division.AT_LEAST["cpu"] = old


def check_copies(name: str, **arguments: Any) -> None:
    """Copies on all ranks of which each orthogonalises some are bit-equal, and as one rank has them."""
    with precise(torch.float32), all_pay():
        one, many = (Run(name, torch.float32, None, **arguments) for _ in range(2))
        many.optimizer.divide_over = dist.group.WORLD
        for _ in range(STEPS):
            one.step()
        with counted(soap_bases, "_moderate") if name == "SOAP" else counted(muon, "orthogonalize_stack") as done:
            for _ in range(STEPS):
                many.step()
        torch.testing.assert_close(many.weights(), one.weights(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(many.states(), one.states(), rtol=1e-6, atol=1e-6)
        for tensor in [*many.weights(), *many.states().values()]:
            same_on_all_ranks(tensor)
        counts = torch.tensor([len(done)])
        dist.all_reduce(counts)
        if name == "SOAP":  # Step 1 and 3 refresh the bases.
            expected = 2 * sum(" Q_" in key for key in many.states())
        else:
            of_matrices = [group for group in many.optimizer.param_groups if group["rule"] != "adamw"]
            forms = [matrix_form(param, group) for group in of_matrices for param in group["params"]]
            expected = STEPS * sum(len(form.shapes) for form in forms)
        assert counts.item() == expected
        assert len(done) < expected or dist.get_world_size() == 1
        for refuses in (False, None):
            other = Run(name, torch.float32, None, **arguments)
            other.optimizer.divide_over = refuses
            assert not division.divided_params(other.optimizer)
        many.optimizer.found_inf = torch.tensor(float(dist.get_rank() == 0))
        before = many.weights()
        many.step()
        assert all(torch.equal(a, b) for a, b in zip(before, many.weights(), strict=True))
        clone = deepcopy(many.optimizer)
        assert clone.divide_over is None


def check_copies_in_place(mixed: bool) -> None:
    """So are copies of which each rank's kernels update all in place, or those of some ranks, if it is ``mixed``."""
    shapes = [(9, 4), (7, 16), (16, 7), (6, 6), (6, 6), (5, 3, 3, 2)]
    odd: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((12, 5), {"split": 3}),
        ((5, 12), {"split": 3, "split_dim": -1}),
        ((4, 14), {"split": (6, 4, 4), "split_dim": -1}),
        ((3, 5, 4), {"flatten": False}),
    ]

    def made() -> Any:
        torch.manual_seed(0)
        groups = [{"params": [nn.Parameter(torch.randn(shape)) for shape in shapes], "rule": "muon"}]
        groups += [{"params": [nn.Parameter(torch.randn(shape))], "rule": "muon"} | group for shape, group in odd]
        return optim.Muon(groups, lr=0.1, backend="cpu")

    def step(optimizer: Any, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()

    with all_pay(), pytest.MonkeyPatch.context() as patch:
        one, many = made(), made()
        for number in range(STEPS):
            step(one, number)
        if mixed and dist.get_rank() == 0:
            patch.delattr(MuonRule, "on_cpu")
        many.divide_over = dist.group.WORLD
        with counted(muon_in_place, "orthogonalize_in_parts") as done, counted(momentum, "update") as updated:
            for number in range(STEPS):
                step(many, number)
            many.collect_step_stats = one.collect_step_stats = True
            for optimizer in (one, many):
                step(optimizer, STEPS)
    for a, b in zip(one.state.items(), many.state.items(), strict=True):
        torch.testing.assert_close(b[0], a[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(b[1]["momentum_buffer"], a[1]["momentum_buffer"], rtol=1e-6, atol=1e-6)
        same_on_all_ranks(b[0].detach())
        same_on_all_ranks(b[1]["momentum_buffer"])
    in_place = not mixed or dist.get_rank() > 0
    pieces = len(shapes) + len(odd) + 1  # of one tensor in two sizes
    assert len(updated) == (STEPS * pieces if in_place else 0)
    assert (0 < len(done) < len(updated)) if in_place else not done


def run_checks(wanted: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What went wrong in each check on this rank, empty if nothing did."""
    torch.set_num_threads(1)
    found = []
    for name, arguments in wanted:
        try:
            globals()[f"check_{name}"](**arguments)
            found.append("")
        except Exception:
            found.append(traceback.format_exc())
    return found
