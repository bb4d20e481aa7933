"""Averages of the weights that an optimizer keeps: what they are, what leaves them alone, and how they are used."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.kernels.averages import exponent
from lightning_optim.optim import averaged_weights, ema_state_dict, one_param, swap_in_average, swap_out_average
from lightning_optim.optim.batches import Batches
from lightning_optim.optim.exchange import exchange, undo
from lightning_optim.optim.state import state_bytes
from tests.helpers import bit_equal, through_a_file
from tests.optim.cases import BACKENDS

EMA = [0.9, "power 0.1", "power 0.2887"]
STEPS = 6


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = ((7, 5), (80, 60), (3, 3))) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make(name: str, params: Any, **options: Any) -> optim.FusedOptimizer:
    return optim.get_optimizer_class(name)(params, **{"lr": 0.1, **options})  # type: ignore[return-value]


def train(
    optimizer: optim.FusedOptimizer, params: list[nn.Parameter], steps: int = STEPS, skip: Any = (), seed: int = 1
) -> list[list[Tensor]]:
    """The weights after each step that is not skipped."""
    generator, found = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.found_inf = torch.tensor(float(step in skip))
        optimizer.step()
        if step not in skip:
            found.append([param.detach().clone() for param in params])
    return found


def closed_form(start: list[Tensor], points: list[list[Tensor]], betas: Any) -> list[Tensor]:
    """Σ wᵢ·pᵢ with wᵢ = (1 − βᵢ)·Π βₖ over the later steps k, in float64."""
    everything = [[p.detach().double() for p in start], *([p.double() for p in some] for some in points)]
    weights = [1.0]
    for t in range(1, len(points) + 1):
        weights = [w * betas(t) for w in weights] + [1 - betas(t)]
    return [sum(w * some[i] for w, some in zip(weights, everything, strict=True)) for i in range(len(start))]  # type: ignore[misc]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lamb"])
def test_an_average_has_its_closed_form_and_the_weights_do_not_notice(name: str, backend: str) -> None:
    params, alone = parameters(), parameters()
    start = [param.detach().clone() for param in params]
    points = train(make(name, alone, backend=backend), alone)
    optimizer = make(name, params, backend=backend, ema=EMA)
    assert bit_equal(train(optimizer, params), points)
    power = exponent(0.1)
    for number, betas in enumerate(
        [lambda t: min(0.9, (1 + t) / (10 + t)), lambda t: (1 - 1 / t) ** (1 + power), lambda t: 1 - 1 / t]
    ):
        found = [optimizer.state[param][f"ema_{number}"] for param in params]
        torch.testing.assert_close(
            found, closed_form(start, points, betas), rtol=1e-5 if number == 2 else 1e-12, atol=0
        )


def test_the_width_of_a_power_function_is_that_of_its_profile() -> None:
    # The profile of an average at the end of a run is tᵞ, whose deviation relative to the length is the width.
    for width in (0.05, 0.1, 0.2):
        gamma = exponent(width)
        mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {"kahan_sum": True}), ("lion", {"stochastic_rounding": True}), ("adamw", {"state_bits": 8})],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_averages_of_bf16_weights_are_float32_whatever_the_state_is(
    name: str, options: dict[str, Any], backend: str
) -> None:
    params, alone = parameters(torch.bfloat16), parameters(torch.bfloat16)
    start = [param.detach().clone() for param in params]
    points = train(make(name, alone, backend=backend, **options), alone)
    optimizer = make(name, params, backend=backend, ema=0.9, **options)
    optimizer.collect_step_stats = True
    assert bit_equal(train(optimizer, params), points)
    found = [optimizer.state[param]["ema_0"] for param in params]
    assert {average.dtype for average in found} == {torch.float32}
    wanted = closed_form(start, points, lambda t: min(0.9, (1 + t) / (10 + t)))
    torch.testing.assert_close([a.double() for a in found], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_skipped_step_does_not_move_an_average(name: str, backend: str) -> None:
    params = parameters(torch.float32)
    start = [param.detach().clone() for param in params]
    optimizer = make(name, params, backend=backend, ema=0.9)
    points = train(optimizer, params, skip={0, 3})
    wanted = closed_form(start, points, lambda t: min(0.9, (1 + t) / (10 + t)))
    for param, average in zip(params, wanted, strict=True):
        assert optimizer.state[param]["ema_step"].item() == STEPS - 2
        torch.testing.assert_close(optimizer.state[param]["ema_0"].double(), average, rtol=1e-5, atol=1e-6)


def test_tensors_that_are_not_contiguous_are_averaged() -> None:
    whole = torch.zeros(4, 6)
    params = [nn.Parameter(whole[:, ::2]), nn.Parameter(torch.zeros(6, 4).t())]
    optimizer = make("muon", params, ema=0.9)
    points = train(optimizer, params, 3)
    wanted = closed_form([torch.zeros(4, 3), torch.zeros(4, 6)], points, lambda t: (1 + t) / (10 + t))
    for param, average in zip(params, wanted, strict=True):
        torch.testing.assert_close(optimizer.state[param]["ema_0"].double(), average, rtol=1e-5, atol=1e-6)


def copied(optimizer: optim.FusedOptimizer, how: str) -> optim.FusedOptimizer:
    if how == "deepcopy":
        return copy.deepcopy(optimizer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(optimizer))
    params = [nn.Parameter(param.detach().clone()) for group in optimizer.param_groups for param in group["params"]]
    loaded = make("adamw", params, ema=EMA)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    return loaded


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_goes_on_bit_for_bit(how: str, dtype: torch.dtype, swapped: bool) -> None:
    params = parameters(dtype)
    optimizer = make("adamw", params, ema=EMA)
    train(optimizer, params)
    if swapped:
        swap_in_average(optimizer, 1)
    other = copied(optimizer, how)
    others = [param for group in other.param_groups for param in group["params"]]
    for one in (optimizer, other):
        swap_out_average(one)
    assert bit_equal(train(optimizer, params, seed=2), train(other, others, seed=2))
    assert bit_equal(optimizer.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_average_takes_the_place_of_the_weights_and_back(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = make("adamw", params, ema=EMA)
    train(optimizer, params)
    weights = [param.detach().clone() for param in params]
    before = copy.deepcopy(optimizer.state_dict())
    versions = [param._version for param in params]
    for which in (0, 1):
        average = [optimizer.state[param][f"ema_{which}"].to(dtype, copy=True) for param in params]
        with averaged_weights(optimizer, which):
            # Ties, which a cast rounds to even, are rounded away from zero.
            torch.testing.assert_close([p.detach() for p in params], average, rtol=2**-7, atol=0)
            assert dtype == torch.bfloat16 or bit_equal([p.detach() for p in params], average)
            with averaged_weights([optimizer], 1 - which):
                pass
            assert optimizer.param_groups[0]["averaged"].split()[0] == str(which)
            with pytest.raises(RuntimeError, match="AdamW: the parameters are at an average"):
                optimizer.step()
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    assert bit_equal([param.detach() for param in params], weights)
    assert bit_equal(optimizer.state_dict(), before)


def test_bits_are_exchanged_exactly_and_rounded_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    average = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    weight = torch.randint(-(2**15), 2**15, (100_000,), generator=generator).to(torch.int16).view(torch.bfloat16)
    wide, narrow = average.clone(), weight.clone()
    exchange(narrow, wide)
    finite = average.bfloat16().isfinite()
    error, least = (narrow.double() - average).abs(), (average.bfloat16().double() - average).abs()
    assert torch.equal(error[finite], least[finite])
    undo(narrow, wide)
    assert torch.equal(wide.view(torch.int32), average.view(torch.int32))
    assert torch.equal(narrow.view(torch.int16), weight.view(torch.int16))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(self.norm(self.embed(x))))


@pytest.mark.parametrize("swapped", [None, 0, 1])
def test_a_state_dict_of_an_average_loads_into_a_model(swapped: int | None) -> None:
    model = Tied()
    optimizer = make("adamw", model.parameters(), ema=[0.9, "power 0.1"])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    average = optimizer.state[model.embed.weight]["ema_1"].clone()
    training = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if swapped is not None:
        swap_in_average(optimizer, swapped)
    found = ema_state_dict(model, optimizer, which=1)
    swap_out_average(optimizer)
    assert bit_equal(found["embed.weight"], average)
    assert bit_equal(found["head.weight"], average)
    unchanged = ["frozen.weight", "norm.running_mean", "norm.num_batches_tracked"]
    assert bit_equal([found[name] for name in unchanged], [training[name] for name in unchanged])
    other = Tied()
    other.load_state_dict(found)
    found["frozen.weight"].zero_()
    assert bit_equal(dict(model.state_dict()), training)
    assert bit_equal(other.embed.weight.detach(), average)


def test_groups_have_averages_of_their_own_and_late_ones_too() -> None:
    params = parameters(torch.float32, ((3,),) * 4)
    groups = [{"params": params[:1]}, {"params": params[1:2], "ema": None}, {"params": params[2:3], "ema": [0.5, 0.9]}]
    optimizer = make("adamw", groups, ema=0.9)
    train(optimizer, params[:3], 3)
    optimizer.add_param_group({"params": params[3:]})
    train(optimizer, params, 2)
    kept = [sorted(name for name in optimizer.state[param] if name.startswith("ema_")) for param in params]
    assert kept == [["ema_0", "ema_step"], [], ["ema_0", "ema_1", "ema_step"], ["ema_0", "ema_step"]]
    assert [optimizer.state[param]["ema_step"].item() for param in (params[0], params[3])] == [5, 2]
    # A change in the middle of a run: one more average starts at the present weights.
    optimizer.param_groups[1]["ema"] = (0.9,)
    before = params[1].detach().clone()
    train(optimizer, params, 1)
    wanted = before + 9 / 11 * (params[1].detach() - before)
    torch.testing.assert_close(optimizer.state[params[1]]["ema_0"], wanted)


def test_state_from_before_the_option_goes_on() -> None:
    params = parameters(torch.float32)
    optimizer = make("adamw", params)
    train(optimizer, params)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    later = make("adamw", others, ema=0.9)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("ema", None)
    later.load_state_dict(state)
    start = [param.detach().clone() for param in others]
    points = train(later, others, 2)
    wanted = closed_form(start, points, lambda t: (1 + t) / (10 + t))
    torch.testing.assert_close([later.state[param]["ema_0"].double() for param in others], wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_average_that_is_given_up_is_dropped_and_begins_anew_later(backend: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight], lr=1.0, ema=[0.9, 0.5], backend=backend)

    def step() -> set[str]:
        weight.grad = torch.ones(3)
        optimizer.step()
        return set(optimizer.state[weight])

    (group,) = optimizer.param_groups
    assert {"ema_0", "ema_1", "ema_step"} <= step()
    group["ema"] = (0.9,)
    assert {"ema_0", "ema_step"} <= step()
    assert "ema_1" not in optimizer.state[weight]
    group["ema"] = "often"
    with pytest.raises(ValueError, match="Invalid ema='often': must be a decay between 0 and 1"):
        step()
    group["ema"] = None
    assert not {"ema_0", "ema_1", "ema_step"} & step()
    group["ema"] = 0.9
    before = weight.detach().clone()
    step()
    assert optimizer.state[weight]["ema_step"] == 1
    torch.testing.assert_close(optimizer.state[weight]["ema_0"], before - 9 / 11)


@pytest.mark.parametrize("given", [0.5, "power 0.05", [0.5]])
def test_a_value_set_by_hand_is_one_average_before_the_next_step_too(given: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight], lr=1.0, ema=0.9)
    (group,) = optimizer.param_groups
    weight.grad = torch.ones(3)
    optimizer.step()
    group["ema"] = given
    optimizer.make_state([weight])
    assert set(optimizer.state[weight]) == {"ema_0", "ema_step"}
    with pytest.raises(ValueError, match="a whole number from 0 to 0; SGD keeps 1"):
        swap_in_average(optimizer, 1)
    swap_in_average(optimizer)
    optim.swap_out_average(optimizer)
    assert weight.tolist() == [0.0] * 3


@pytest.mark.parametrize("given", [0.5, "power 0.05"])
def test_a_value_set_by_hand_is_read_where_gradients_are_released(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1, ema=0.9)
    lo.release_gradients(optimizer)
    optimizer.param_groups[0]["ema"] = given
    sorted_anew: list[Any] = []
    monkeypatch.setattr(one_param, "Batches", lambda view: sorted_anew.append(view) or Batches(view))
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert len(sorted_anew) == 2
    assert all(set(state) == {"ema_0", "ema_step"} for state in optimizer.state.values())


def test_weights_of_training_that_are_set_aside_are_never_dropped() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight], lr=1.0, ema=0.9)
    weight.grad = torch.ones(3)
    optimizer.step()
    optim.swap_in_average(optimizer)
    optimizer.param_groups[0]["ema"] = None
    optimizer.make_state([weight])
    optim.swap_out_average(optimizer)
    assert weight.tolist() == [0.0] * 3
    optimizer.step()
    assert weight.tolist() == [-1.0] * 3


def test_a_checkpoint_of_bf16_weights_is_not_unpacked_into_others() -> None:
    params = parameters(torch.bfloat16)
    optimizer = make("adamw", params, ema=0.9)
    train(optimizer, params)
    swap_in_average(optimizer)
    others = [nn.Parameter(param.detach().float()) for param in params]
    wider = make("adamw", others, ema=0.9)
    wider.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="set aside from bfloat16 parameters, and cannot be restored to a float32"):
        swap_out_average(wider)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.0, "ema=1.0: must be a decay between 0 and 1"),
        (True, "ema=True: must be a decay"),
        ("powre 0.1", "ema='powre 0.1': must be a decay"),
        ("power 0.5", "ema='power 0.5': the relative width of a power-function average must be above 0 and at most"),
        ([0.9, None], r"ema=\[0.9, None\]: must be a decay"),
        ({"decay": 0.9}, "must be a decay"),
        (float("nan"), "ema=nan: must be a decay"),
    ],
)
def test_what_is_no_average_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("adamw", parameters(), ema=given)


def test_uses_that_cannot_be_are_refused() -> None:
    params = parameters(torch.float16)
    optimizer = make("adamw", params, ema=0.9)
    train(optimizer, params, 1)
    with pytest.raises(ValueError, match="parameter of float16 cannot be exchanged"):
        swap_in_average(optimizer)
    with pytest.raises(ValueError, match="Invalid which=1: must be a whole number from 0 to 0; AdamW keeps 1"):
        swap_in_average(optimizer, 1)
    with pytest.raises(ValueError, match=r"AdamW keeps no averages of the weights. Give an optimizer of"):
        ema_state_dict(nn.Linear(1, 1), torch.optim.AdamW(parameters()))
    with pytest.raises(ValueError, match="averages of other parameters than those of this model"):
        ema_state_dict(nn.Linear(1, 1), optimizer)
    with pytest.raises(
        ValueError, match=r"ema=\(0.9,\) is not offered, because it is evaluated at an average of its own"
    ):
        make("schedulefreeadamw", [{"params": params, "ema": 0.9}])


def test_forms_that_configurations_use_mean_the_same() -> None:
    for given in (0.9, "0.9", [0.9], (0.9,), ["0.9"]):
        group = make("adamw", parameters(), ema=given).param_groups[0]
        assert group["ema"] == (0.9,)
    assert make("adamw", parameters(), ema=[]).param_groups[0]["ema"] is None
    buffer = io.BytesIO()
    torch.save(make("adamw", parameters(), ema=EMA).state_dict(), buffer)


def test_the_memory_of_averages_is_planned() -> None:
    (param,) = parameters(torch.bfloat16, ((10, 10),))
    optimizer = make("adamw", [param], ema=[0.9, 0.99])
    group = optimizer.param_groups[0]
    planned = state_bytes(param, group, optimizer.rule_of(group))
    train(optimizer, [param], 1)
    assert planned == sum(value.numel() * value.element_size() for value in optimizer.state[param].values())
    assert planned == 4 * 100 * 4 + 8
