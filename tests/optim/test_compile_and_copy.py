"""Under `torch.compile`, and copied: steps stay what they are, and switches what they were set to."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import StepLR

from lightning_optim import StepPipeline, optim
from lightning_optim.clipping import GlobalNorm
from tests.optim.cases import Case, assert_same, copies, each_case, give, gradients, parameters, run


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("case", each_case())
def test_a_compiled_step_is_the_step(case: Case) -> None:
    first = parameters(case)
    second = copies(first)
    one, two = (case.optimizer(params, **case.settings[0].arguments) for params in (first, second))
    compiled = torch.compile(one.step, backend="eager")
    for grads in gradients(first, 3):
        give(first, grads)
        give(second, grads)
        compiled()
        two.step()
    assert_same(first, second)
    assert counters["frames"]["total"] == 1  # a wrapper of torch.compile's own, once, and nothing below it


@pytest.mark.parametrize("cls", [optim.AdamW, torch.optim.AdamW], ids=["ours", "torch"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_compiled_training_step_trains_as_without(cls: Any, scheduled: bool) -> None:
    def train(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        optimizer = cls(model.parameters(), lr=0.1)
        pipeline = StepPipeline(optimizer, clip=GlobalNorm(1e-3))
        if scheduled:  # torch's wrap `step` once more
            StepLR(optimizer, 1)

        def step(batch: torch.Tensor) -> None:
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        one = torch.compile(step, backend="eager") if compiled else step
        for _ in range(4):
            one(torch.randn(5, 3))
        assert pipeline.counts().clipped == 4
        return [param.detach() for param in model.parameters()]

    plain = train(compiled=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        traced = train(compiled=True)
    # Dynamo warns of caches and locks that it traces through, which in torch's optimizers are none of ours.
    assert not [str(w.message) for w in said if "lightning_optim" in str(w.message) or "numba" in str(w.message)]
    assert not [str(w.message) for w in said if "lru_cache" in str(w.message)]
    for a, b in zip(plain, traced, strict=True):  # torch's step itself is compiled, and rounds elsewhere
        torch.testing.assert_close(a, b, rtol=0, atol=0 if cls is optim.AdamW else 1e-4)


_COLD = """
import sys
import torch
from lightning_optim import optim
params = [torch.ones(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)]
optimizer = getattr(optim, sys.argv[1])(params, lr=0.1, backend="cpu")
step = torch.compile(optimizer.step, backend="eager")
for param in params:
    param.grad = torch.ones_like(param)
step()
print(params[1].tolist(), dict(torch._dynamo.utils.counters["frames"]))
"""


@pytest.mark.parametrize("name", ["SGD", pytest.param("Adafactor", marks=pytest.mark.slow)])
def test_kernels_may_be_compiled_beneath_a_compiled_step(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # empty
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _COLD, name], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("]")[1].strip() == "{'total': 1, 'ok': 1}"
    assert list(tmp_path.rglob("*.nbi"))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda given: pickle.loads(pickle.dumps(given))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", each_case())
def test_a_copy_has_every_public_attribute(case: Case, how: str) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **case.settings[0].arguments, backend="reference")
    optimizer.collect_step_stats = True
    optimizer.divisor = torch.tensor(2.0)
    optimizer.note = {"of": "the user"}
    StepLR(optimizer, 1)  # wraps this object's `step`, which is nothing to copy
    run(optimizer, params, 2)
    twin = COPIES[how](optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public - {name for name in vars(twin) if not name.startswith("_")} == {"step"}
    assert (twin.collect_step_stats, twin.divisor, twin.backend, twin.note) == (True, 2.0, "reference", optimizer.note)
    torch.testing.assert_close(twin.step_stats.sums, optimizer.step_stats.sums, rtol=0, atol=0, equal_nan=True)
    copied = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in copied} & {id(p) for p in params}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in gradients(own, 2, seed=5):
        give(own, grads)
        give(copied, grads)
        optimizer.step()
        twin.step()
    assert_same(own, copied)
    assert_same(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_a_model_and_its_optimizer_are_copied_together() -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model_twin, twin = copy.deepcopy((model, optimizer))
    assert [id(p) for p in twin.param_groups[0]["params"]] == [id(p) for p in model_twin.parameters()]
    assert set(twin.state) == set(model_twin.parameters())
    model_twin(torch.ones(1, 3)).sum().backward()
    twin.step()
    assert not torch.equal(model.weight, model_twin.weight)
