"""State dicts: to and from torch, bit-exact resumption, dtypes kept, parameters matched by name."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch

from lightning_optim import optim
from tests.helpers import through_a_file
from tests.optim.cases import (
    BACKENDS,
    CASES,
    Case,
    Setting,
    assert_same,
    copies,
    each_setting,
    give,
    gradients,
    groups_of,
    parameters,
    run,
)

each = pytest.mark.parametrize(("case", "setting"), each_setting())
with_twin = pytest.mark.parametrize(
    ("case", "setting"),
    [p for p in each_setting(tuple(c for c in CASES if c.torch_twin)) if p.values[1].theirs is None],
)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ten_steps_after_a_resume_are_bit_equal(case: Case, setting: Setting, dtype: torch.dtype) -> None:
    params = parameters(case, dtype)
    optimizer = case.optimizer(groups_of(params, 0.1), **setting.arguments)
    run(optimizer, params, 5)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]})
    resumed = [p.clone().requires_grad_() for p in saved["params"]]
    fresh = case.optimizer(groups_of(resumed, 0.1), **setting.arguments)
    fresh.load_state_dict(saved["optimizer"])
    assert_same(saved["optimizer"], fresh.state_dict())
    run(optimizer, params, 10, seed=2)
    run(fresh, resumed, 10, seed=2)
    assert_same(params, resumed)
    assert_same(optimizer.state_dict(), fresh.state_dict())


@with_twin
def test_state_goes_to_torch_and_comes_back(case: Case, setting: Setting) -> None:
    assert case.torch_twin is not None
    params = parameters(case, torch.float64)
    lr = setting.arguments["lr"]
    ours = case.optimizer(groups_of(params, lr), **setting.arguments)
    run(ours, params, 3)

    theirs = copies(params)
    twin = case.torch_twin(groups_of(theirs, lr), **setting.arguments)
    twin.load_state_dict(through_a_file(ours.state_dict()))
    run(ours, params, 3, seed=2)
    run(twin, theirs, 3, seed=2)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    back = copies(theirs)
    again = case.optimizer(groups_of(back, 0.123))
    again.load_state_dict(through_a_file(twin.state_dict()))
    run(twin, theirs, 3, seed=3)
    run(again, back, 3, seed=3)
    for a, b in zip(theirs, back, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@with_twin
def test_state_keys_are_those_of_torch(case: Case, setting: Setting) -> None:
    assert case.torch_twin is not None
    params = parameters(case)
    ours = case.optimizer(params, **setting.arguments)
    twin = case.torch_twin(params, **setting.arguments)
    run(ours, params, 1)
    run(twin, params, 1)
    mine, other = ours.state_dict()["state"], twin.state_dict()["state"]
    for i in other:
        extra = {"step"} if "dampening" in setting.arguments else set()  # torch dampens all but the first, uncounted
        assert set(mine[i]) == set(other[i]) | extra
        for key, value in other[i].items():
            dtype = torch.float64 if key == "mu_product" else value.dtype  # a product over all steps
            assert (mine[i][key].dtype, mine[i][key].shape) == (dtype, value.shape)


@each
def test_float32_state_beside_bf16_parameters_survives_loading(case: Case, setting: Setting) -> None:
    params = parameters(case, torch.bfloat16)
    optimizer = case.optimizer(params, **setting.arguments)
    run(optimizer, params, 2)
    fresh = case.optimizer(copies(params), **setting.arguments)
    fresh.load_state_dict(optimizer.state_dict())
    dtypes = {v.dtype for state in fresh.state.values() for v in state.values() if v.dim() > 0}
    assert dtypes <= {torch.float32}


def half_state(case: Case, setting: Setting, dtype: torch.dtype) -> tuple[list[torch.Tensor], Any]:
    """Parameters, and torch's state of them, which torch keeps in their dtype."""
    assert case.torch_twin is not None
    params = parameters(case, dtype)
    twin = case.torch_twin(params, **setting.arguments)
    run(twin, params, 2)
    return params, twin.state_dict()


@with_twin
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_that_torch_kept_in_16_bits_are_widened_and_that_is_said_once(
    case: Case, setting: Setting, dtype: torch.dtype
) -> None:
    params, saved = half_state(case, setting, dtype)
    optimizer = case.optimizer(copies(params), **setting.arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    low = any(v.dtype == dtype for state in saved["state"].values() for v in state.values() if torch.is_tensor(v))
    assert [str(w.message)[:46] for w in told] == [
        f"Optimizer state that was stored in {str(dtype)[6:]} is converted"[:46]
    ] * low
    arrays = [v for state in optimizer.state.values() for n, v in state.items() if n != "step"]
    assert {v.dtype for v in arrays if v.dim() > 0} <= {torch.float32}
    for (_, old), new in zip(saved["state"].items(), optimizer.state.values(), strict=True):
        assert_same({n: old[n].float() for n in new}, {n: v.float() for n, v in new.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_moment_loaded_in_bf16_falls(backend: str) -> None:
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    twin = torch.optim.AdamW([weight], lr=0.0)
    weight.grad = torch.ones_like(weight)
    twin.step()
    optimizer = optim.AdamW([weight], lr=0.0, backend=backend)
    with pytest.warns(UserWarning, match="stored in bfloat16 is converted to float32"):
        optimizer.load_state_dict(twin.state_dict())
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros_like(weight)
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], before * 0.999**100, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [16, 8])
def test_moments_that_our_own_kept_in_fewer_bits_stay(bits: int) -> None:
    weight = torch.ones(5000, requires_grad=True)
    first, second = optim.AdamW([weight], state_bits=bits), optim.AdamW([weight])
    run(first, [weight], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(first.state_dict())
        run(second, [weight], 1)
    assert second.state[weight]["exp_avg"].dtype == {16: torch.bfloat16, 8: torch.uint8}[bits]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.optimizer.__name__)
@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=["wider", "narrower"]
)
@pytest.mark.filterwarnings("ignore:Optimizer state that was stored in float64")
def test_a_run_goes_on_in_another_precision(case: Case, before: torch.dtype, after: torch.dtype, backend: str) -> None:
    """Loaded, and in place, as `module.double()` does it; the same as a run that was in that precision all along."""
    arguments = {"lr": 1e-2, "backend": backend} | (
        {"momentum": 0.9} if case.optimizer in (optim.SGD, optim.LARS) else {}
    )
    params = parameters(case, before)
    optimizer = case.optimizer(params, **arguments)
    run(optimizer, params, 2)
    others = [p.detach().to(after).requires_grad_() for p in params]
    fresh = case.optimizer(others, **arguments)
    fresh.load_state_dict(optimizer.state_dict())
    for param in params:
        param.data, param.grad = param.data.to(after), None
    run(optimizer, params, 2)
    run(fresh, others, 2)
    assert_same(params, others)
    for a, b in zip(params, others, strict=True):
        assert_same(optimizer.state[a], fresh.state[b])
        arrays = [v for n, v in fresh.state[b].items() if n != "step" and v.dim() > 0]
        assert {v.dtype for v in arrays if v.is_floating_point()} <= {after}


@each
def test_a_loaded_dict_is_not_changed_by_later_steps(case: Case, setting: Setting) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **setting.arguments)
    run(optimizer, params, 2)
    saved = deepcopy(optimizer.state_dict())
    kept = deepcopy(saved)
    fresh = case.optimizer(copies(params), **setting.arguments)
    fresh.load_state_dict(saved)
    run(fresh, [p for g in fresh.param_groups for p in g["params"]], 2)
    assert_same(saved, kept)


@each
def test_parameters_are_matched_by_name_when_order_and_grouping_changed(case: Case, setting: Setting) -> None:
    params = parameters(case)
    params = params[:4]
    named = list(zip("abcd", params, strict=True))
    first = case.optimizer([{"params": named[:2]}, {"params": named[2:], "lr": 0.5}], **setting.arguments)
    run(first, params, 3)
    others = copies(params)
    renamed = dict(zip("abcd", others, strict=True))
    second = case.optimizer(
        [{"params": [(n, renamed[n]) for n in order]} for order in ("dc", "ba")], **setting.arguments
    )
    second.load_state_dict(first.state_dict())
    assert [g["lr"] for g in second.param_groups] == [0.5, setting.arguments["lr"]]
    assert [g["param_names"] for g in second.param_groups] == [["d", "c"], ["b", "a"]]
    for grads in gradients(params, 3, seed=2):
        give(params, grads)
        give(others, grads)
        first.step()
        second.step()
    assert_same(params, others)


def test_stacks_remain_stacks_in_a_group_with_matrices() -> None:
    matrix, stack = torch.randn(4, 4), torch.randn(3, 4, 4)
    first = {"matrix": matrix.requires_grad_(), "stack": stack.requires_grad_()}
    stacks = {"params": [("stack", stack)], "flatten": False}
    apart = optim.Muon([{"params": [("matrix", matrix)]}, stacks])
    run(apart, list(first.values()), 2)
    second = {name: tensor.detach().clone().requires_grad_() for name, tensor in first.items()}
    together = optim.Muon(list(second.items()), flatten=False)
    together.load_state_dict(apart.state_dict())
    assert [group["flatten"] for group in together.param_groups] == [False]
    run(apart, list(first.values()), 2)
    run(together, list(second.values()), 2)
    assert_same(list(first.values()), list(second.values()))


@each
def test_deepcopy_and_pickle(case: Case, setting: Setting) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **setting.arguments, backend="reference")
    optimizer.grad_scale, optimizer.divisor = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.collect_step_stats = True
    run(optimizer, params, 2)
    for copy in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copy.backend == "reference"
        assert not hasattr(copy, "grad_scale")  # of the one step, and nobody would remove it
        assert (copy.divisor, copy.collect_step_stats) == (1.0, True)
        assert copy.step_stats is not None
        assert_same(optimizer.state_dict(), copy.state_dict())
        own = [p for g in copy.param_groups for p in g["params"]]
        assert not any(a is b for a, b in zip(own, params, strict=True))
        run(copy, own, 2)


def test_transient_attributes_are_not_saved() -> None:
    optimizer = optim.AdamW([torch.ones(1, requires_grad=True)])
    optimizer.divisor = optimizer.grad_scale = optimizer.found_inf = torch.tensor(1.0)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_a_momentum_loaded_from_torch_counts_as_begun() -> None:
    params = [torch.ones(2, dtype=torch.float64, requires_grad=True)]
    twin = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    run(twin, params, 1)
    own = copies(params)
    optimizer = optim.SGD(own, lr=0.1)
    optimizer.load_state_dict(twin.state_dict())
    run(twin, params, 2)
    run(optimizer, own, 2)
    torch.testing.assert_close(own[0], params[0], rtol=0, atol=1e-15)


def test_switching_amsgrad_on_after_loading_starts_its_state() -> None:
    params = [torch.ones(2, requires_grad=True)]
    first = optim.AdamW(params)
    run(first, params, 2)
    second = optim.AdamW(params, amsgrad=True)
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["amsgrad"] = True
    run(second, params, 1)
    assert float(second.state[params[0]]["step"]) == 3.0
    assert "max_exp_avg_sq" in second.state[params[0]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [torch.ones(1, requires_grad=True)]}], r"sizes \[2\], this optimizer of \[1\]"),
        (
            [{"params": [("weights", torch.ones(1, requires_grad=True)), ("bias", torch.ones(1, requires_grad=True))]}],
            "no parameter 'weights'.*Did you mean 'weight'",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(groups: Any, message: str) -> None:
    names = ("weight", "bias")
    named = [(name, torch.ones(1, requires_grad=True)) for name in names]
    saved = optim.AdamW(named if "param" in message else [p for _, p in named]).state_dict()
    with pytest.raises(ValueError, match=message):
        optim.AdamW(groups).load_state_dict(saved)


def test_load_hooks_run() -> None:
    optimizer = optim.AdamW([torch.ones(1, requires_grad=True)])
    seen = []

    def rename(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [group | {"lr": 0.5} for group in state_dict["param_groups"]]
        return state_dict | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == ["post"]


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Muon", "ScheduleFreeAdamW"])
def test_a_state_dict_asks_for_no_options_that_older_distributed_checkpoints_lack(name: str) -> None:
    # torch.distributed.checkpoint loads into the present state dict, of which the checkpoint must have every key.
    weight = torch.nn.Parameter(torch.ones(2, 2))
    (group,) = getattr(optim, name)([weight], lr=0.1).state_dict()["param_groups"]
    assert not {"ema", "kahan_bits", "averaged"} & group.keys()


def test_a_checkpoint_says_what_its_kahan_state_is() -> None:
    def made(bits: int) -> optim.AdamW:
        weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        return optim.AdamW([weight], lr=0.1, kahan_sum=True, kahan_bits=bits)

    for saved, other in ((16, 8), (8, 16)):
        source, target = made(saved), made(other)
        source.step()
        target.load_state_dict(source.state_dict())
        assert target.param_groups[0]["kahan_bits"] == saved
        target.step()
        source.step()
