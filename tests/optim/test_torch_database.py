"""torch's own table of optimizer inputs, valid and not, and the checks that torch runs over it.

The table (`optim_db`) comes with torch, the checks do not: these are ours, one for each of torch's, over torch's inputs
for the optimizers that torch has, and over our own settings for all. What is not checked, and why:

| what torch checks | why not here |
|---|---|
| `foreach`, `fused`, `capturable`, `differentiable` | how torch runs; our backends: test_backends_agree.py |
| betas as tensors, CUDA graphs, several devices, MPS, moves between them | no such device in these tests |
| complex parameters do what their real views do | ours refuse them, which is checked |
| sparse gradients (SGD, Adagrad, SparseAdam) | ours refuse them, which is checked |
| parameters that are not matrices refused by Muon | to ours they go to AdamW, see test_muon.py |
| Adadelta, Adamax, ASGD, LBFGS, Rprop, SparseAdam | there is none of ours |
| no entry in `state` where there is nothing to keep (SGD without momentum) | ours has an empty one, by which a step
  that only makes state (`torch.distributed.checkpoint`) is told from one of the training |
| a test suite under Dynamo | see test_compile_and_copy.py |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.helpers import through_a_file
from tests.optim import cases
from tests.optim.cases import CASES, Case, assert_same, copies, each_case, give, gradients, run

pytest.importorskip("expecttest", reason="torch's own tests want it")
from torch.testing._internal.common_optimizers import optim_db

TWINS = {case.torch_twin: case for case in CASES if case.torch_twin}
INFOS = [pytest.param(info, id=info.optim_cls.__name__) for info in optim_db if info.optim_cls in TWINS]  # type: ignore[attr-defined]
# How torch runs an optimizer, not what it computes.
IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}


@pytest.fixture
def _double() -> Iterator[None]:
    """float64 for torch's own 0-d state, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(info: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Constructor arguments of torch's table that ours take, and torch's words for them."""
    for entry in info.optim_inputs_func(device="cpu"):
        arguments = {k: v for k, v in entry.kwargs.items() if k not in IMPLEMENTATION}
        if not any(isinstance(beta, Tensor) for beta in arguments.get("betas", ())):  # for capturing CUDA graphs
            yield copy.deepcopy(arguments), entry.desc


def all_inputs(case: Case) -> list[dict[str, Any]]:
    """Those of torch's table, if torch has the optimizer, and ours."""
    info = next((info for info in optim_db if info.optim_cls is case.torch_twin), None)
    return [
        *(copy.deepcopy(setting.arguments) for setting in case.settings),
        *(arguments for arguments, _ in (inputs(info) if info else ())),
    ]


def each_input(check: Callable[[Case, dict[str, Any]], None]) -> Any:
    """The test that a check is, for every optimizer, over all its inputs."""

    @pytest.mark.parametrize("case", each_case())
    def test(case: Case) -> None:
        for arguments in all_inputs(case):
            check(case, arguments)

    return test


def parameters(case: Case, shapes: tuple[tuple[int, ...], ...] | None = None) -> list[Tensor]:
    """Small ones of the case's shapes."""
    return cases.parameters(case, shapes=shapes or tuple(shape for shape in case.shapes if math.prod(shape) < 1000))


def other_shape(case: Case) -> tuple[int, ...]:
    """Of a second parameter: Muon and SOAP are compared on matrices only."""
    return () if any(len(shape) < 2 for shape in case.shapes) else (2, 5)


# Torch's inputs against torch.


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("info", INFOS)
def test_valid_inputs_do_what_torch_does(info: Any) -> None:
    case = TWINS[info.optim_cls]
    for arguments, words in inputs(info):
        if isinstance(arguments.get("lr"), Tensor):
            arguments["lr"] = arguments["lr"].double()  # torch's Muon decays in the precision of lr
        if info.optim_cls is torch.optim.Muon:
            arguments = {"lr": 1e-3, **arguments}  # ours has another default
        first = [
            torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
            torch.ones(other_shape(case), dtype=torch.float64),
        ]
        second = copies(first)
        optimizer, twin = case.optimizer(copies(first), **arguments), info.optim_cls(second, **arguments)
        own = [p for g in optimizer.param_groups for p in g["params"]]
        for grads in gradients(own, 4):
            give(own, grads)
            give(second, grads)
            optimizer.step()
            twin.step()
        for a, b in zip(own, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=words)


@pytest.mark.parametrize("info", INFOS)
def test_what_torch_refuses_is_refused(info: Any) -> None:
    ours, tried = TWINS[info.optim_cls].optimizer, 0
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = entry.optimizer_error_input
        if "only support 2D" in given.desc:
            continue  # to ours it is a convolution kernel
        if given.kwargs.keys() & IMPLEMENTATION:
            continue
        params = [torch.ones(2, 2, requires_grad=True)] if given.params is None else given.params
        # Where torch warns (a parameter twice) or waits for the step (complex ones) ours refuse at once, by value.
        early = issubclass(entry.error_type, Warning) or "complex" in given.desc
        named = {name for name in given.kwargs if name in given.desc.lower()} if given.params is None else set()
        with pytest.raises(ValueError if early else entry.error_type, match="|".join(named) or None):
            ours(params, **given.kwargs)
        tried += 1
    assert tried


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("info", INFOS)
def test_torchs_schedulers_drive_ours_as_torchs(info: Any) -> None:
    case = TWINS[info.optim_cls]
    for schedulers in info.scheduler_inputs:
        first = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True)]
        second = copies(first)
        optimizer, twin = case.optimizer(first, lr=0.01), info.optim_cls(second, lr=0.01)
        ours, theirs = ([make(o) for make in schedulers] for o in (optimizer, twin))
        for step, grads in enumerate(gradients(first, 12)):
            give(first, grads)
            give(second, grads)
            optimizer.step()
            twin.step()
            for scheduler in (*ours, *theirs):
                scheduler.step(*([1.0 + step] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


# What an optimizer does.


def _fit(
    case: Case, arguments: dict[str, Any], *, contiguous: bool = True, groups: bool = False
) -> tuple[float, float]:
    """The loss of a linear regression, first and last."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, generator=generator)
    weight = (weight if contiguous else weight.t().contiguous().t()).requires_grad_()
    other = torch.randn(10, 1, generator=generator).requires_grad_()
    batch = torch.randn(5, generator=generator)
    params: Any = [{"params": [weight]}, {"params": [other], "lr": 0.01}] if groups else [weight, other]
    optimizer = case.optimizer(params, **arguments)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(batch) + other.squeeze(1)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    return losses[0], closure().item()


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("case", each_case())
def test_the_loss_goes_the_right_way(case: Case, contiguous: bool) -> None:
    for arguments in all_inputs(case):
        first, last = _fit(case, arguments, contiguous=contiguous)
        assert (last > first) if arguments.get("maximize") else (last < first), arguments


@each_input
def test_the_loss_goes_the_right_way_with_groups(case: Case, arguments: dict[str, Any]) -> None:
    if case.one_lr:
        pytest.skip("it has one rate for all groups")
    first, last = _fit(case, arguments, groups=True)
    assert (last > first) if arguments.get("maximize") else (last < first), arguments


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("case", each_case())
def test_a_rate_may_be_a_tensor(case: Case, shape: tuple[int, ...]) -> None:
    for arguments in all_inputs(case):
        rate = float(arguments.pop("lr", 0.01))
        first = parameters(case)
        second = copies(first)
        tensor = torch.full(shape, rate)
        one = case.optimizer(first, lr=tensor, **arguments)
        two = case.optimizer(second, lr=float(tensor), **arguments)
        run(one, first, 3)
        run(two, second, 3)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert all(group["lr"] is tensor for group in one.param_groups)
        one.param_groups[0]["lr"].mul_(0)  # as schedulers write to it
        assert float(tensor) == 0


@each_input
def test_decay_differs_by_group(case: Case, arguments: dict[str, Any]) -> None:
    decayed, other = parameters(case, shapes=((5, 4), (5, 4)))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [other], "weight_decay": 0.0}]
    optimizer = case.optimizer(groups, **{**arguments, "maximize": False})
    for _ in range(6):
        for param in (decayed, other):
            param.grad = torch.full_like(param, 1e-6)
        optimizer.step()
    assert decayed.norm() < other.norm(), arguments


@each_input
def test_nothing_happens_without_gradients(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    before = copies(params)
    optimizer = case.optimizer(params, **arguments)
    optimizer.step()
    assert_same(before, params)
    assert not optimizer.state
    frozen = parameters(case)[0].requires_grad_(False)
    optimizer.add_param_group({"params": [frozen]})
    run(optimizer, params, 1)
    assert frozen.grad is None
    assert frozen not in optimizer.state


@each_input
def test_gradients_of_zero_move_nothing(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    before = copies(params)
    optimizer = case.optimizer(params, **{**arguments, "weight_decay": 0.0})
    for _ in range(2):
        give(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    assert_same(before, params)
    assert all(float(state["step"]) == 2 for state in optimizer.state.values() if "step" in state)


@each_input
def test_gradients_are_never_written(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **arguments)
    for grads in gradients(params, 2):
        give(params, grads)
        versions = [p.grad._version for p in params]
        optimizer.step()
        assert_same([p.grad for p in params], grads)
        assert [p.grad._version for p in params] == versions


@each_input
def test_a_step_found_to_be_infinite_does_not_happen(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **arguments)
    run(optimizer, params, 2)
    before, state = copies(params), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    run(optimizer, params, 1)
    assert_same(before, params)
    assert_same(state, optimizer.state_dict()["state"])


@pytest.mark.parametrize("case", [each_case()[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])])
def test_parameters_of_several_dtypes_share_a_group(case: Case) -> None:
    arguments = case.settings[0].arguments
    params = [p.to(dtype).detach().requires_grad_() for p in parameters(case) for dtype in (torch.float32, torch.half)]
    before = copies(params)
    run(case.optimizer(params, **arguments), params, 3)
    assert all(param.isfinite().all() for param in params)
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("case", each_case())
def test_complex_parameters_are_refused(case: Case) -> None:
    for params in ([torch.ones(2, 2, dtype=torch.complex64)], [("w", torch.ones(2, 2, dtype=torch.complex128))]):
        with pytest.raises(ValueError, match=r"complex.*must have a real"):
            case.optimizer(params)


# What it says and keeps.


@each_input
def test_it_can_be_printed(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    optimizer = case.optimizer([{"params": params[:1]}], **arguments)
    optimizer.add_param_group({"params": params[1:]})
    assert repr(optimizer).startswith(f"{case.optimizer.__name__} (")
    assert repr(optimizer).count("Parameter Group") == 2
    optimizer.param_groups[1]["lr"] = 0.625
    assert "lr: 0.625" in repr(optimizer)


def _continued(case: Case, arguments: dict[str, Any], through: Callable[[Any], Any], **options: Any) -> None:
    """Three steps, the state through ``through`` into a new optimizer, and three more beside the first."""
    params = parameters(case)
    optimizer = case.optimizer(params, **arguments)
    run(optimizer, params, 3)
    second = copies(params)
    again = case.optimizer(second, **copy.deepcopy(arguments))
    again.load_state_dict(through(optimizer.state_dict()))
    run(optimizer, params, 3, seed=2)
    run(again, second, 3, seed=2)
    assert_same(params, second)
    assert_same(optimizer.state_dict()["state"], again.state_dict()["state"])


def _with_plain_steps(state: Any) -> Any:
    return {
        **state,
        "state": {
            key: {name: float(value) if name == "step" else value for name, value in entry.items()}
            for key, entry in state["state"].items()
        },
    }


def _without_new_keys(state: Any) -> Any:
    groups = [{k: v for k, v in group.items() if k not in ("maximize", "cautious")} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _named(state: Any) -> Any:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["param_names"] = [f"p{i}" for i in group["params"]]
    return state


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, through_a_file, _with_plain_steps, _without_new_keys, _named],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("case", each_case())
def test_a_state_dict_goes_on_bit_by_bit(case: Case, through: Callable[[Any], Any]) -> None:
    for arguments in all_inputs(case):
        _continued(case, arguments, through)


@each_input
def test_names_are_saved_and_may_be_missing_on_one_side(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    named = case.optimizer([(f"layer.{i}", p) for i, p in enumerate(params)], **arguments)
    run(named, params, 2)
    state = named.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert sorted(names) == [f"layer.{i}" for i in range(len(params))]
    bare = copies(params)
    for group in state["param_groups"]:
        del group["param_names"]
    second = case.optimizer([(f"layer.{i}", p) for i, p in enumerate(bare)], **copy.deepcopy(arguments))
    second.load_state_dict(state)
    run(named, params, 2)
    run(second, bare, 2)
    assert_same(params, bare)


@each_input
def test_state_is_of_parameters_and_not_empty(case: Case, arguments: dict[str, Any]) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **arguments)
    run(optimizer, params, 1)
    if optimizer.rule_of(optimizer.param_groups[0]).state:
        assert len(optimizer.state) == len(params)
        assert all(optimizer.state.values())
    assert {id(param) for param in optimizer.state} <= {id(param) for param in params}


# Hooks.


def _hooked(case: Case) -> tuple[Optimizer, list[Tensor]]:
    params = parameters(case)
    optimizer = case.optimizer(params, **case.settings[0].arguments)
    give(params, [torch.ones_like(p) for p in params])
    return optimizer, params


@pytest.mark.parametrize("case", each_case())
def test_step_hooks_come_in_torchs_order(case: Case) -> None:
    optimizer, _ = _hooked(case)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("case", each_case())
def test_a_step_hook_may_change_the_arguments(case: Case) -> None:
    optimizer, _ = _hooked(case)
    optimizer.register_step_pre_hook(lambda _o, _args, kwargs: ((optimizer, lambda: 5.0), kwargs))
    assert optimizer.step() == 5.0


@pytest.mark.parametrize("case", each_case())
def test_state_dict_hooks(case: Case) -> None:
    optimizer, _ = _hooked(case)
    optimizer.step()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    assert optimizer.state_dict()["more"] == 1
    assert seen == ["first", "pre"]


@pytest.mark.parametrize("case", each_case())
def test_load_state_dict_hooks(case: Case) -> None:
    optimizer, _ = _hooked(case)
    optimizer.step()
    state = optimizer.state_dict()
    seen: list[str] = []

    def halve(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        return {**given, "param_groups": [{**group, "lr": 0.125} for group in given["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(state)
    assert seen == ["first", "pre", "post"]
    assert all(group["lr"] == 0.125 for group in optimizer.param_groups)


@pytest.mark.parametrize("case", each_case())
def test_zero_grad(case: Case) -> None:
    optimizer, params = _hooked(case)
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
