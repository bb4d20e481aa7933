"""State, and weights, that no step can take are refused by name before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import optim
from lightning_optim.optim import FusedOptimizer
from tests.optim.cases import BACKENDS, assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def stepped(make: Callable[..., FusedOptimizer], backend: str) -> tuple[FusedOptimizer, Tensor]:
    """An optimizer after one step over a parameter called `stem.weight`."""
    param = torch.randn(6, 5).requires_grad_()
    optimizer = make([("stem.weight", param)], backend=backend)
    param.grad = torch.randn(6, 5)
    optimizer.step()
    return optimizer, param


def emptied(tensor: Tensor) -> Tensor:
    result = tensor.detach().clone()
    result.untyped_storage().resize_(0)
    return result


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(key)


def _put(key: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: change(state[key])})


TAMPERED = [
    pytest.param(optim.Adafactor, _without("row_var"), "'row_var'.*is missing", id="part_of_a_tensor_rule"),
    pytest.param(
        optim.Adafactor,
        lambda state: state.update(variance=state.pop("row_var") @ state.pop("col_var")),
        "'col_var'.*is missing, but the state has 'variance'",
        id="of_a_vector",
    ),
    pytest.param(optim.NorMuon, _without("second_momentum_buffer"), "second_momentum.*is missing", id="muons_state"),
    pytest.param(
        optim.Muon, _put("momentum_buffer", lambda s: s.long()), "has dtype torch.int64, but must", id="integers"
    ),
    pytest.param(
        optim.AdamW, _put("step", lambda s: s.bfloat16()), "'step'.*has dtype torch.bfloat16", id="half_count"
    ),
    pytest.param(optim.NAdam, _put("step", lambda s: s - 9), "'step'.*is -8", id="negative_count"),
    pytest.param(optim.NAdam, _put("mu_product", lambda s: s.long()), "'mu_product'.*int64", id="integer_product"),
    pytest.param(optim.AdamW, _put("step", lambda s: s * torch.nan), "'step'.*is nan", id="count_not_a_number"),
    pytest.param(optim.AdamW, _put("step", lambda s: s.to("meta")), "'step'.*meta", id="count_without_numbers"),
    pytest.param(optim.AdamW, _put("exp_avg", lambda s: s.to("meta")), "'exp_avg'.*meta", id="without_numbers"),
    pytest.param(optim.AdamW, _put("step", torch._neg_view), "'step'.*is lazily negated", id="negated_count"),
    pytest.param(optim.AdamW, _put("step", Tensor.to_sparse), "'step'.*sparse", id="sparse_count"),
    pytest.param(optim.AdamW, _put("step", lambda s: "many"), "'step'.*'many', but must be a tensor", id="words"),
    pytest.param(optim.AdamW, _put("exp_avg_sq", emptied), "'exp_avg_sq'.*resized", id="emptied"),
]


@each_backend
@pytest.mark.parametrize(("make", "tamper", "message"), TAMPERED)
def test_refused_at_the_next_step(make: Any, tamper: Any, message: str, backend: str) -> None:
    optimizer, param = stepped(make, backend)
    tamper(optimizer.state[param])
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=f"{message}|'stem.weight'.*{message}") as caught:
        optimizer.step()
    assert "'stem.weight'" in str(caught.value)
    assert torch.equal(param, before)


@each_backend
@pytest.mark.parametrize(("make", "tamper", "message"), [row for row in TAMPERED if "count" not in str(row.id)])
def test_refused_when_loaded(make: Any, tamper: Any, message: str, backend: str) -> None:
    optimizer, param = stepped(make, backend)
    saved = optimizer.state_dict()
    saved["state"] = {0: dict(saved["state"][0])}
    tamper(saved["state"][0])
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(saved)
    assert "'stem.weight'" in str(caught.value)
    assert_same(before, optimizer.state[param])


@each_backend
@pytest.mark.parametrize(
    "make",
    [
        optim.ScheduleFreeAdamW,
        optim.Prodigy,
        lambda params, backend: optim.AdamW(
            params, weight_decay=0.1, weight_decay_kind="l2_sp", kahan_sum=True, backend=backend
        ),
    ],
    ids=["averaged", "first_weights", "pulled"],
)
def test_no_state_is_made_of_weights_without_memory(make: Any, backend: str) -> None:
    param = torch.randn(6, 5).requires_grad_()
    optimizer = make([("stem.weight", param)], backend=backend)
    param.grad = torch.randn(6, 5)
    param.data = emptied(param)
    for call in (optimizer.step, lambda: optimizer.make_state([param])):
        with pytest.raises(RuntimeError, match=r"'stem\.weight' needs 120 bytes of memory, and its storage has 0"):
            call()


@each_backend
def test_codes_whose_key_is_missing_get_one(backend: str) -> None:
    param = torch.randn(70, 80).requires_grad_()
    optimizer = optim.Lion([param], state_bits=8, backend=backend)
    param.grad = torch.randn(70, 80)
    optimizer.step()
    del optimizer.state[param]["rounding_key"]
    optimizer.param_groups[0]["state_bits"] = 32
    optimizer.step()
    assert optimizer.state[param]["rounding_key"].dtype == torch.int64


@each_backend
def test_moments_in_16_bits_that_are_too_small_for_8_go_on_as_they_are(backend: str) -> None:
    param = torch.randn(6, 5).requires_grad_()
    first, second = (optim.Lion([param], state_bits=bits, backend=backend) for bits in (16, 8))
    param.grad = torch.randn(6, 5)
    first.step()
    saved = first.state_dict()
    del saved["state"][0]["rounding_key"]
    saved["param_groups"][0]["state_bits"] = 8
    second.load_state_dict(saved)
    second.step()
    assert second.state[param]["exp_avg"].dtype == torch.bfloat16
    assert second.state[param]["rounding_key"].dtype == torch.int64


def test_an_unknown_rule_is_called_by_the_option() -> None:
    with pytest.raises(
        ValueError, match=r"Invalid rule='lyon' of a group: Unknown optimizer 'lyon'. Did you mean 'lion'"
    ):
        optim.AdamW([{"params": [torch.zeros(1, requires_grad=True)], "rule": "lyon"}])
