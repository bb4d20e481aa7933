"""A compiled loop that looks for changes sees every change that Python sees, and a warm step calls no more for more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import optim
from lightning_optim.kernels import base
from lightning_optim.optim import batches
from tests.optim.cases import assert_same
from tests.optim.test_batches import CHANGES, Change, give, params

pytest.importorskip("numba")
from lightning_optim.kernels.cpu import object_layout

pytestmark = pytest.mark.skipif(object_layout.layout() is None, reason="objects lie elsewhere in this version")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch from the second step, whatever the number of tensors."""
    monkeypatch.setattr(batches, "_WATCHED_AFTER", 1)
    for module in (batches, base):
        monkeypatch.setattr(module, "MANY", 1)


def set_memory(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        parameters[0].set_(parameters[0].detach().clone() * 2)  # type: ignore[call-overload]


def transpose_in_place(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        parameters[2].t_()


def shrink(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[1].grad = None
    parameters[1].requires_grad_(False).resize_(4).requires_grad_()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[parameters[1]][name].resize_(4)
    parameters[1].grad = torch.ones(4)


def swap_tensors(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    torch.utils.swap_tensors(optimizer.state[parameters[0]]["exp_avg"], torch.full((4, 3), 0.5))


def new_count(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.state[parameters[0]]["step"] = torch.tensor(7.0)


def count_written(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.state[parameters[0]]["step"].fill_(7.0)
    optimizer.state[parameters[1]]["step"].data = torch.tensor(3.0)


def remove_parameter(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]["params"][1]


def reorder(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def new_list(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = parameters[:2]


def new_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    fresh = type(optimizer.state)(dict)
    fresh.update({p: {n: t.clone() * 2 for n, t in optimizer.state[p].items()} for p in parameters})
    optimizer.state = fresh


def strided_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[0].grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).t()


def expanded_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[0].grad = torch.ones(1, 1).expand(4, 3)


def negated_gradient(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    assert parameters[0].grad is not None
    parameters[0].grad = torch._neg_view(parameters[0].grad)


def part_of_a_bucket(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    bucket = torch.randn(100, generator=torch.Generator().manual_seed(2))
    parameters[0].grad, parameters[1].grad = bucket[5:17].view(4, 3), bucket[40:45]


def frozen(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    parameters[3].requires_grad_(False)
    parameters[3].grad = None


def collect(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.collect_step_stats = True  # type: ignore[attr-defined]


MORE: dict[str, Change] = {
    **CHANGES,
    **{
        change.__name__: change
        for change in (
            *(set_memory, transpose_in_place, shrink, swap_tensors, new_count, count_written, remove_parameter),
            *(reorder, new_list, new_state, strided_gradient, expanded_gradient, negated_gradient),
            *(part_of_a_bucket, frozen, collect),
        )
    },
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.NAdam, optim.Muon])
def test_a_change_between_watched_steps_counts(name: str, optimizer_class: type[optim.AdamW]) -> None:
    of_adamw = ("rule", "flag", "checkpoint", "shrink", "transpose_in_place", "new_list")
    if optimizer_class is not optim.AdamW and name in of_adamw:
        pytest.skip("of AdamW's options and state")
    results = []
    watched = 0
    for forget in (False, True):  # sorted anew before every step: what remembering must not change
        parameters = params()
        optimizer: Any = optimizer_class(parameters, lr=0.1)
        for step in range(7):
            give(parameters, step)
            if step == 4:
                try:
                    MORE[name](optimizer, parameters)
                except KeyError:  # It has no such state.
                    pytest.skip("of AdamW's state")
            if forget:
                optimizer._batches = None
            optimizer.step()
            watched += optimizer._batches._watch is not None
        results.append([p.detach() for p in parameters] + [t for s in optimizer.state.values() for t in s.values()])
    assert watched >= 2, "or nothing was tested"
    assert_same(results[0], results[1])


def test_the_watch_itself_is_what_notices_that_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    for step in range(4):
        give(parameters, step)
        optimizer.step()
    monkeypatch.setattr(batches, "_look", None)
    give(parameters, 4)
    optimizer.step()
    parameters[0].data = parameters[0].data.clone()
    with pytest.raises(TypeError):
        optimizer.step()


def test_a_gradient_that_overlaps_a_watched_weight_is_refused() -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    for step in range(4):
        give(parameters, step)
        optimizer.step()
    parameters[0].grad = parameters[0].data.view(4, 3)
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()


def test_what_changes_again_and_again_is_looked_at_in_python() -> None:
    parameters = params()
    optimizer = optim.AdamW(parameters)
    for step in range(40):
        give(parameters, step)
        parameters[0].grad = torch.ones(4, 3) if step % 2 else torch.zeros(20)[:12].view(4, 3)
        optimizer.step()
    assert optimizer._batches is not None


def calls_of(step: Callable[[], object]) -> int:
    """Number of calls of functions, of Python and built in, that ``step`` makes."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("optimizer_class", [optim.AdamW, optim.Lion, optim.SGD, optim.NAdam])
def test_a_warm_step_calls_no_more_functions_for_more_tensors(optimizer_class: Any) -> None:
    counts = []
    for number in (10, 300):
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(number)]
        optimizer = optimizer_class(parameters, lr=0.1)
        for _ in range(5):
            give(parameters, 0)
            optimizer.step()
        counts.append(calls_of(optimizer.step))
    assert counts[1] - counts[0] < 5
    assert counts[1] < 400
