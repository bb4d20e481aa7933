"""Parameters stay sorted as long as nothing changes, and every change is seen."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import optim
from tests.optim.cases import assert_same


def params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(4, 3), (5,), (2, 2), (3,)]]


def give(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


Change = Callable[[torch.optim.Optimizer, list[nn.Parameter]], object]


def replace_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    state = optimizer.state[parameters[0]]
    state["exp_avg"] = state["exp_avg"].clone() * 2


def lose_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    del optimizer.state[parameters[1]]


def reload(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters.append(nn.Parameter(torch.ones(2, 3)))
    optimizer.add_param_group({"params": [parameters[-1]], "lr": 0.5})


def drop_a_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[2].grad = None


def narrow(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[3].data = parameters[3].data.bfloat16()
    parameters[3].grad = torch.ones(3, dtype=torch.bfloat16)


def swap_memory(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[0].data = parameters[0].data.t().contiguous().t()


def swap_parameter(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    new = nn.Parameter(parameters[1].data.clone())
    new.grad = parameters[1].grad
    optimizer.param_groups[0]["params"][1] = parameters[1] = new


CHANGES: dict[str, Change] = {
    "nothing": lambda optimizer, parameters: None,
    "lr": lambda optimizer, parameters: optimizer.param_groups[0].update(lr=0.7),
    "betas": lambda optimizer, parameters: optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "rule": lambda optimizer, parameters: optimizer.param_groups[0].update(amsgrad=True),
    "cautious": lambda optimizer, parameters: optimizer.param_groups[0].update(cautious=True),
    "flag": lambda optimizer, parameters: optimizer.param_groups[0].update(state_bits=16),
    "state of one": replace_state,
    "state lost": lose_state,
    "checkpoint": reload,
    "group": add_group,
    "gradient": drop_a_gradient,
    "dtype": narrow,
    "memory": swap_memory,
    "parameter": swap_parameter,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_change_between_steps_counts(name: str, backend: str) -> None:
    results = []
    for forget in (False, True):  # sorted anew before every step: what remembering must not change
        parameters = params()
        optimizer = optim.AdamW(parameters, lr=0.1, backend=backend)
        for step in range(5):
            give(parameters, step)
            if step == 2:
                CHANGES[name](optimizer, parameters)
            if forget:
                optimizer._batches = None
            optimizer.step()
        results.append([p.detach() for p in parameters])
    assert_same(results[0], results[1])


def test_nothing_is_sorted_twice_when_nothing_changes() -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    seen = []
    for step in range(4):
        give(parameters, step)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        seen.append(optimizer._batches)
    assert seen[0] is not None
    assert all(batches is seen[0] for batches in seen)


@pytest.mark.parametrize("role", ["param", "exp_avg", "exp_avg_sq"])
def test_less_memory_in_the_same_place_is_seen(role: str) -> None:
    for numel in (1000, 5000, 20_000, 100_000, 200_000):  # until an allocator gives the place that has just become free
        parameter = nn.Parameter(torch.zeros(numel))
        parameter.grad = torch.ones(numel)
        optimizer = optim.AdamW([parameter])
        optimizer.step()
        storage = (parameter if role == "param" else optimizer.state[parameter][role]).untyped_storage()
        place = storage.data_ptr()
        storage.resize_(0)
        storage.resize_(2 * numel)
        if storage.data_ptr() == place:
            break
    assert optimizer._batches is not None
    assert not optimizer._batches.refill(optimizer, list(map(optimizer.rule_of, optimizer.param_groups)))
    with pytest.raises(RuntimeError, match=f"needs {4 * numel} bytes of memory, and its storage has {2 * numel}"):
        optimizer.step()


def test_gradients_are_not_kept_and_copies_sort_for_themselves() -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    give(parameters, 0)
    optimizer.step()
    gradient = weakref.ref(parameters[0].grad)
    optimizer.zero_grad()
    assert gradient() is None
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._batches is None


def test_an_error_in_a_step_leaves_no_gradients_behind() -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    give(parameters, 0)
    optimizer.divisor = torch.ones(3)
    with pytest.raises(ValueError, match="divisor has shape"):
        optimizer.step()
    optimizer.divisor = None
    twin = params()
    give(twin, 0)
    optimizer.step()
    optim.AdamW(twin).step()
    assert_same([p.detach() for p in parameters], [p.detach() for p in twin])


def test_a_warm_step_asks_for_each_groups_rule_once_and_looks_up_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = params()
    optimizer = optim.Muon([{"params": [parameter]} for parameter in parameters])
    assert [group.get("rule") for group in optimizer.param_groups].count("adamw") == 2
    give(parameters, 0)
    optimizer.step()
    asked: list[object] = []
    rule_of = optim.Muon.rule_of
    monkeypatch.setattr(optim.Muon, "rule_of", lambda self, group: asked.append(group) or rule_of(self, group))
    monkeypatch.setattr(optim, "get_optimizer_class", None)
    give(parameters, 1)
    optimizer.step()
    assert len(asked) == len(optimizer.param_groups)


def test_what_goes_together_is_asked_once_for_each_group_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(4, 3), (3, 4), (2, 2), (3, 4), (4, 3), (2, 2)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = optim.Muon(parameters)
    rule: Any = type(optimizer.rule_of(optimizer.param_groups[0]))
    asked: list[object] = []
    together = rule.together
    monkeypatch.setattr(
        rule, "together", lambda self, param, group: asked.append(param.shape) or together(self, param, group)
    )
    give(parameters, 0)
    optimizer.step()
    assert asked == [(4, 3), (3, 4), (2, 2)]
    give(twins, 0)
    for twin in twins:
        optim.Muon([twin]).step()
    torch.testing.assert_close(parameters, twins)
