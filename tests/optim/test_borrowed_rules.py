"""A group may borrow any optimizer's update by its name, whoever owns it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.optim import FusedOptimizer
from tests.helpers import through_a_file
from tests.optim.cases import assert_same, give, gradients

NAMES = sorted(optim.list_optimizers())
# What an owner's hyperparameters call something else in these rules, or what these keep in the group; and tensor rules.
DELICATE = ("adafactor", "lamb", "lion", "muon", "prodigy", "sgd")
SHARED = {"lr": 0.02, "weight_decay": 0.1, "weight_decay_kind": "decoupled"}


def pairs() -> list[Any]:
    """Owner and borrowed rule; all of them, of which the tests in every run are those that may collide."""
    return [
        pytest.param(owner, rule, marks=[] if {owner, rule} <= set(DELICATE) else [pytest.mark.slow])
        for owner, rule in itertools.permutations(NAMES, 2)
    ]


def make(cls: type[FusedOptimizer], weights: list[Tensor], rule: str | None, backend: str) -> FusedOptimizer:
    groups: list[dict[str, Any]] = [{"params": [weight]} for weight in weights]
    if rule is not None:
        groups[1]["rule"] = rule
    return cls(groups, backend=backend, **SHARED)


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator).requires_grad_() for _ in range(2)]


def run(optimizers: list[FusedOptimizer], params: list[Tensor], seed: int) -> None:
    for grads in gradients(params, 3, seed):
        give(params, grads)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("owner", "rule"), pairs())
def test_a_borrowed_update_is_that_of_its_own_optimizer(owner: str, rule: str, backend: str) -> None:
    owner_class, rule_class = optim.get_optimizer_class(owner), optim.get_optimizer_class(rule)
    params = weights()
    if rule == "schedulefreeadamw":
        with pytest.raises(ValueError, match=r"ScheduleFreeAdamW cannot be the rule of a group in another optimizer"):
            make(owner_class, params, rule, backend)
        return
    optimizer = make(owner_class, params, rule, backend)
    run([optimizer], params, 1)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    fresh = make(owner_class, resumed, rule, backend)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    run([optimizer], params, 2)
    run([fresh], resumed, 2)
    assert_same(params, resumed)
    assert_same(optimizer.state_dict(), fresh.state_dict())
    if owner in ("muon", "normuon") and rule == "adamw":
        return  # whose AdamW has betas of its own
    alone = weights()
    own = {"backend": backend, **SHARED}
    both = [owner_class([alone[0]], **own), rule_class([alone[1]], **own)]
    run(both, alone, 1)
    run(both, alone, 2)
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
