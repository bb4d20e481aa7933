"""`torch.set_default_device` says where the user's tensors are made; what we make for ourselves names its device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lightning_optim
from lightning_optim import optim
from lightning_optim.clipping import list_clip_rules, make_clip_rule
from lightning_optim.step import StepPipeline
from tests.optim.cases import BACKENDS, Case, copies, each_case, give, gradients, parameters

MAKERS = {"tensor", "as_tensor", "asarray", "scalar_tensor", "empty", "zeros", "ones", "full", "arange", "linspace"}
MAKERS |= {"logspace", "eye", "rand", "randn", "randint", "randperm", "empty_strided", "Generator", "tril_indices"}


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_every_tensor_that_we_make_names_its_device() -> None:
    package = Path(lightning_optim.__file__).parent
    missing = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{path.relative_to(package)}:{node.lineno} torch.{node.func.attr}")
    assert missing == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", each_case())
def test_a_step_is_the_same_whatever_the_default_device(case: Case, backend: str) -> None:
    one = parameters(case)
    other = copies(one)
    full = backend == "reference"  # the others' further kernels are compiled, and used, elsewhere
    flags = {"cautious": True} if full and "cautious" in case.optimizer.hyperparameters() else {}
    first, second = (case.optimizer(params, **flags, backend=backend) for params in (one, other))
    for grads in gradients(one, 3):
        give(one, grads)
        give(other, grads)
        first.collect_step_stats = second.collect_step_stats = full
        first.step()
        torch.set_default_device("meta")
        try:
            second.step()
        finally:
            torch.set_default_device(None)
    saved = first.state_dict()
    torch.set_default_device("meta")
    try:
        second.load_state_dict(saved)
        second.found_inf = torch.ones((), device="cpu")
        second.step()
    finally:
        torch.set_default_device(None)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert all(v.device.type == "cpu" for v in second.state[b].values())


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("flags", [{"state_bits": 8}, {"state_bits": 16}], ids=["8", "16"])
def test_state_in_fewer_bits_is_where_the_weights_are(flags: dict[str, int]) -> None:
    weight = torch.nn.Parameter(torch.ones(5000, device="cpu"))
    optimizer = optim.AdamW([weight], **flags)
    weight.grad = torch.ones(5000, device="cpu")
    optimizer.step()
    assert {v.device.type for v in optimizer.state[weight].values()} == {"cpu"}
    assert bool((weight < 1).all())


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("rule", list_clip_rules())
def test_clipping_keeps_its_memory_where_the_gradients_are(rule: str) -> None:
    weight = torch.nn.Parameter(torch.ones(8, device="cpu"))
    optimizer = optim.AdamW([weight])
    arguments = {"value": {"max_value": 1.0}, "global_norm": {"max_norm": 1.0}}.get(rule, {})
    pipeline = StepPipeline(optimizer, clip=make_clip_rule(rule, arguments))
    for scale in (1.0, 100.0):
        weight.grad = torch.full((8,), scale, device="cpu")
        optimizer.step()
    assert weight.isfinite().all()
    pipeline.close()
