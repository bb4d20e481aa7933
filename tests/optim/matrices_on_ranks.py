"""What ranks check together of optimizers that need whole matrices. Run by test_matrices_on_ranks.py."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_optim import optim
from lightning_optim.kernels.rules import MatrixRule

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
    if name not in MUONS:
        return [{"params": list(given.items())}]
    matrices = [(key, param) for key, param in given.items() if key in SHAPES]
    stacks = [(key, param) for key, param in given.items() if key in STACKS]
    vectors = [(key, param) for key, param in given.items() if key in VECTORS]
    return [
        {"params": matrices},
        {"params": stacks, "flatten": False, "lr": 0.05},
        {"params": vectors, "rule": "adamw"},
    ]


def values(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Values in all shapes by name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | VECTORS | (STACKS if name in MUONS else {})
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, (shape, _) in shapes.items()}


def placement(key: str) -> Any:
    return (SHAPES | STACKS | VECTORS)[key][1]


def place(value: Tensor, key: str, mesh: DeviceMesh) -> DTensor:
    """A value over a mesh: replicated over all dimensions but the last."""
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [placement(key)])


class Run:
    """An optimizer on one device, or on shards of a mesh."""

    def __init__(self, name: str, dtype: torch.dtype, mesh: DeviceMesh | None, **arguments: Any) -> None:
        self.name, self.dtype, self.mesh = name, dtype, mesh
        given = values(name, dtype)
        self.params = {
            key: nn.Parameter(value if mesh is None else place(value, key, mesh)) for key, value in given.items()
        }
        self.optimizer = getattr(optim, name)(groups(name, self.params), lr=0.1, **arguments)
        self.count = 0

    def give(self, spoil: Tensor | None = None) -> None:
        """Gradients of the next step, with ``spoil`` added to one element."""
        self.count += 1
        for key, value in values(self.name, self.dtype, self.count).items():
            if spoil is not None and key == "tall":
                value[-1, -1] += spoil
            self.params[key].grad = value if self.mesh is None else place(value, key, self.mesh)

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
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def meshes() -> list[DeviceMesh]:
    """One over all ranks; with four also one of replicas of shards."""
    ranks = dist.get_world_size()
    found = [init_device_mesh("cpu", (ranks,))]
    return found + ([init_device_mesh("cpu", (2, ranks // 2))] if ranks > 2 else [])


def assert_as_one(name: str, dtype: torch.dtype, mesh: DeviceMesh, **arguments: Any) -> None:
    """Shards are what one device has."""
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 0, "atol": 0}
    with precise(torch.float64 if dtype == torch.float64 else torch.float32):
        one, many = (Run(name, dtype, where, **arguments) for where in (None, mesh))
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


def check_equality(name: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
    for mesh in meshes():
        assert_as_one(name, dtype, mesh, **arguments)


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
