"""Equal maths: every setting of every optimizer against its published reference, step by step in float64."""

from __future__ import annotations

import pytest
import torch

from lightning_optim import optim
from tests.optim.cases import (
    BACKENDS,
    CASES,
    Case,
    Setting,
    copies,
    each_setting,
    give,
    gradients,
    groups_of,
    parameters,
)

STEPS = 30
LATE, THAWED = 7, 13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_equals_the_published_optimizer_step_by_step(case: Case, setting: Setting, backend: str) -> None:
    """Of three groups, one at a rate of 0 until late, and a fourth that joins late."""
    if case.optimizer is optim.Adagrad and torch.__version__ < "2.12":
        pytest.skip("torch's own Adagrad takes no group after its construction there.")
    ours, theirs = parameters(case, torch.float64), parameters(case, torch.float64)
    lr = setting.arguments["lr"]
    (*groups, late), (*their_groups, their_late) = (groups_of(params, lr, case) for params in (ours, theirs))
    optimizer = case.optimizer(groups, **setting.arguments, backend=backend)
    arguments = setting.arguments if setting.theirs is None else setting.theirs
    reference = (setting.reference or case.reference)(their_groups, **arguments)

    for step, grads in enumerate(gradients(ours, STEPS)):
        give(ours, grads)
        give(theirs, grads)
        if step == LATE:
            now = {"lr": optimizer.param_groups[0]["lr"]}
            optimizer.add_param_group(late | now)
            reference.add_param_group(their_late | now)
        if step == THAWED:
            optimizer.param_groups[2]["lr"] = optimizer.param_groups[0]["lr"]
        for mine, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            mine["lr"] = mine["lr"] * (0.9 if step % 3 else 1.1)
            other["lr"] = mine["lr"]
        optimizer.step()
        reference.step()
        for mine_, other_ in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine_, other_, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "setting"), each_setting(tuple(c for c in CASES if not c.group_steps)))
def test_a_missing_gradient_holds_that_parameter_and_its_step_back(case: Case, setting: Setting, backend: str) -> None:
    ours, theirs = parameters(case, torch.float64), parameters(case, torch.float64)
    optimizer = case.optimizer(ours, **setting.arguments, backend=backend)
    arguments = setting.arguments if setting.theirs is None else setting.theirs
    # One for each, because some of the published ones count steps per group.
    references = [(setting.reference or case.reference)([param], **arguments) for param in theirs]
    for step, grads in enumerate(gradients(ours, 8)):
        for params in (ours, theirs):
            give(params, grads)
            if step % 2:
                params[1].grad = None
        optimizer.step()
        for param, reference in zip(theirs, references, strict=True):
            if param.grad is not None:
                reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_a_tensor_learning_rate_is_the_same_as_a_float(case: Case, setting: Setting) -> None:
    first = parameters(case, torch.float64)
    second = copies(first)
    arguments = dict(setting.arguments)
    lr = torch.tensor(arguments.pop("lr"), dtype=torch.float64)
    one = case.optimizer(first, lr=lr, **arguments)
    other = case.optimizer(second, lr=float(lr), **arguments)
    for grads in gradients(first, 4):
        give(first, grads)
        give(second, grads)
        one.step()
        other.step()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
