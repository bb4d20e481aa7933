"""Work of ranks for `test_sharded_state`: a model in shards (FSDP2) with low-precision state, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_optim import optim

OPTIONS: dict[str, dict[str, Any]] = {
    "codes": {"state_bits": 8},
    "rows": {"state_bits": 8},  # of matrices only
    "kahan": {"kahan_sum": True, "state_bits": 16},
    "24bits": {"kahan_sum": True, "kahan_bits": 8},
}
STEPS = 3


class Parts(nn.Module):
    """Rows that are longer and shorter than a block, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.uneven = nn.Linear(300, 31)  # blocks of 256 and of 44 values; 16 rows and 15 on two ranks
        self.conv = nn.Conv2d(16, 32, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 20, 100))  # 3 on four ranks: one has none
        self.norm = nn.LayerNorm(5000)

    def forward(self, x: Tensor) -> Tensor:
        return x


def make(kind: str, backend: str = "cpu") -> tuple[nn.Module, optim.FusedOptimizer]:
    """A model and its optimizer, sharded over the ranks, or whole without a group."""
    torch.manual_seed(0)
    model = Parts().to(torch.float32 if kind in ("codes", "rows") else torch.bfloat16)
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    vectors = [param for param in model.parameters() if param.dim() == 1]
    matrices = [param for param in model.parameters() if param.dim() > 1]
    groups: Any = (
        [{"params": matrices}, {"params": vectors, "state_bits": 32}] if kind == "rows" else model.parameters()
    )
    return model, optim.AdamW(groups, lr=1e-2, weight_decay=0.1, backend=backend, **OPTIONS[kind])


def step(model: nn.Module, optimizer: optim.FusedOptimizer, seeds: range) -> None:
    """Take steps with the same gradients on any number of ranks."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            given: Any = param
            param.grad = distribute_tensor(grad, given.device_mesh, given.placements) if dist.is_initialized() else grad
        optimizer.step()


def contents(model: nn.Module, optimizer: optim.FusedOptimizer) -> dict[str, dict[str, Tensor]]:
    """All tensors of parameters, whole."""
    found = {}
    for name, param in model.named_parameters():
        state = {"weight": param.detach(), **optimizer.state[param]}
        found[name] = {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()
        }
    return {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in found.items()}


def save(kind: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Train, save, go on; return everything as it was when it was saved, and after the rest (under ``rest``)."""
    model, optimizer = make(kind)
    step(model, optimizer, range(STEPS))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    save_sharded(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    saved = contents(model, optimizer)
    step(model, optimizer, range(STEPS, 2 * STEPS))
    return saved | {f"rest {name}": tensors for name, tensors in contents(model, optimizer).items()}


def load(kind: str, folder: Path, backend: str = "cpu") -> dict[str, dict[str, Tensor]]:
    """Load what any number of ranks has saved, go on; return as `save` does."""
    model, optimizer = make(kind, backend)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    load_sharded(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    loaded = contents(model, optimizer)
    step(model, optimizer, range(STEPS, 2 * STEPS))
    return loaded | {f"rest {name}": tensors for name, tensors in contents(model, optimizer).items()}


def load_plain(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Load into shards what `torch.save` has of a whole optimizer, its older form included; return what is there."""
    model, optimizer = make("codes")
    saved = torch.load(folder / "codes.pt")
    uneven = saved["state"][1]  # whose 300 values of a row cannot be had from one row of blocks but as values
    uneven["exp_avg_scale"] = uneven["exp_avg_scale"].new_ones(37)
    uneven["exp_avg_sq_scale"] = uneven["exp_avg_sq_scale"].new_ones(37)
    optimizer.load_state_dict(saved)
    found = contents(model, optimizer)
    step(model, optimizer, range(1))
    return found


def load_full(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Load into shards the full state dict of a whole optimizer through torch, as Lightning does."""
    model, optimizer = make("rows")
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, torch.load(folder / "rows-full.pt"), options=options)
    return contents(model, optimizer)


def tensor_parallel() -> dict[str, Any]:
    """Shard the last dimension, in whole blocks and otherwise; load it into rows, and whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    columns, rows = (nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)])) for dim in (1, 0))
    plain = nn.Parameter(whole.clone())
    first = optim.AdamW([columns], state_bits=8)
    for param in (columns, rows, plain):
        given: Any = param
        param.grad = whole if param is plain else distribute_tensor(whole, mesh, given.placements)
    first.step()
    state: dict[str, Any] = first.state_dict()["state"][0]
    for param in (rows, plain):
        other = optim.AdamW([param], state_bits=8)
        other.load_state_dict(first.state_dict())
        for name, value in other.state[param].items():
            of_first = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
            assert of_first.equal(value.full_tensor() if hasattr(value, "full_tensor") else value), name
        other.step()
    errors = []
    for shape, dim in (((16, 640), 1), ((3, 16, 512), 2), ((64, 16, 3, 3), 1)):
        param = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(dim)]))
        try:
            optim.AdamW([param], state_bits=8)
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append("")
        optim.AdamW([param], state_bits=16)
    return {"scales": state["exp_avg_scale"].shape, "errors": errors}


def save_and_load(folder: Path) -> dict[str, Any]:
    """Everything that two ranks do."""
    found: dict[str, Any] = {}
    for kind in OPTIONS:
        found[f"saved {kind}"] = save(kind, folder / kind)
        found[f"loaded {kind}"] = load(kind, folder / kind)
        try:
            found[f"of one {kind}"] = load(kind, folder / f"{kind}-one")
        except ValueError as error:
            found[f"of one {kind}"] = str(error)
    return found | {"plain": load_plain(folder), "full": load_full(folder), "tensor parallel": tensor_parallel()}


def load_all(folder: Path) -> dict[str, Any]:
    """Everything that four ranks do."""
    return {kind: load(kind, folder / kind) for kind in OPTIONS}
