"""A rule and a kind of decay from a module of the user's own, on every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.factory.plan import Plan, plan_groups
from lightning_optim.factory.plan_text import format_plan
from lightning_optim.kernels.decay_kind import DECAY_KINDS
from lightning_optim.kernels.weight_decay import WeightDecayKind
from tests.kernels.bfloat16 import round_as_hardware_does
from tests.optim.cases import BACKENDS, assert_same, give, gradients
from tests.optim.own_rules import Cubic, Tamed

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1, "weight_decay_kind": "cubic"},
    {"weight_decay": 0.1, "weight_decay_kind": "cubic", "cautious": True},
    {"weight_decay": 0.1, "weight_decay_kind": "l2", "maximize": True},
    {"weight_decay": 0.1, "kahan_sum": True},
    {"state_bits": 16},
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
QUICK = ((0, torch.float32), (0, torch.float64), (1, torch.float32), (2, torch.bfloat16))
"""Settings and dtypes of every run; each is a kernel, which takes a second or two to compile."""
CELLS = [
    pytest.param(
        SETTINGS[i],
        dtype,
        id="-".join([*map(str, SETTINGS[i].values()), str(dtype)[6:]]),
        marks=[] if (i, dtype) in QUICK else [pytest.mark.slow],
    )
    for i in range(len(SETTINGS))
    for dtype in DTYPES
    if not ("state_bits" in SETTINGS[i] and dtype == torch.float64)  # which is refused
]


@pytest.fixture(autouse=True)
def _cubic(own_names: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in BACKENDS:
        round_as_hardware_does(monkeypatch.setattr)
    lo.optim.register("cubic")(Cubic)


def made(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: tuple[tuple[int, ...], ...] = ((37, 5), (), (3, 0), (1030,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def trained(backend: str, setting: dict[str, Any], dtype: torch.dtype, stats: bool = False) -> tuple[Any, list[Tensor]]:
    params = made(dtype)
    optimizer = Tamed(params, backend=backend, **setting)
    for step, grads in enumerate(gradients(params, 5)):
        give(params, grads)
        optimizer.found_inf = torch.tensor(float(step == 3))
        optimizer.divisor = torch.tensor(2.0)
        optimizer.collect_step_stats = stats
        optimizer.step()
    return optimizer, [param.detach() for param in params]


@pytest.mark.parametrize(("setting", "dtype"), CELLS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_rule_of_ones_own_agrees_with_the_reference_on_every_backend(
    backend: str, setting: dict[str, Any], dtype: torch.dtype
) -> None:
    expected, got = trained("reference", setting, dtype)[1], trained(backend, setting, dtype)[1]
    # Compilers may fuse a product and a sum: a rounding error of the dtype, which a narrow dtype rarely shows.
    rtol = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2**-7}[dtype]
    for a, b in zip(expected, got, strict=True):
        assert not a.numel() or not torch.equal(a, made(dtype)[0])
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_change_nothing_and_hold_the_decay_of_ones_own_kind(backend: str) -> None:
    setting = {"weight_decay": 0.1, "weight_decay_kind": "cubic"}
    plain, measured = trained(backend, setting, torch.float32), trained(backend, setting, torch.float32, stats=True)
    assert_same(plain[1], measured[1])
    before = [p.double() for p in measured[1]]
    optimizer, params = measured[0], measured[0].param_groups[0]["params"]
    give(params, [torch.zeros_like(p) for p in params])
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    decays = [0.01 * 0.1 * w**3 for w in before]
    for param, w, decay in zip(params, before, decays, strict=True):
        torch.testing.assert_close(param.detach().double(), w - decay, rtol=1e-6, atol=1e-7)
    expected = sum(float(d.square().sum()) for d in decays)
    assert float(optimizer.step_stats.groups("decay_sq").sum()) == pytest.approx(expected, rel=1e-4)


def test_a_kind_of_ones_own_is_a_value_wherever_ours_are(capsys: pytest.CaptureFixture[str]) -> None:
    kind = WeightDecayKind("cubic")
    assert (kind, kind.value, kind.needs_peak, copy.deepcopy(kind)) == ("cubic", "cubic", False, kind)
    model = torch.nn.Linear(2, 2)
    factory = lo.OptimizerFactory(
        "adamw", lr=0.004, weight_decay=0.5, optimizer_kwargs={"weight_decay_kind": "Cubic"}, param_groups=[]
    )
    optimizer, _ = factory.build(model)
    assert optimizer.param_groups[0]["weight_decay_kind"] == "cubic"
    before = model.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.002 * before**3)
    main(["list", "weight-decay", "cubic"])
    assert "cubic\n  Decay in proportion to the cube" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Did you mean 'cubic'"):
        lo.optim.AdamW(model.parameters(), weight_decay_kind="cubik")


def test_a_kind_that_is_defined_again_is_the_new_one() -> None:
    for factor in (1, 2):

        @lo.optim.register("again")
        class Again(lo.optim.DecayKind):
            @staticmethod
            def pull(param: Any, delta: Any) -> Any:
                return param

            @staticmethod
            def coefficient(lr: Any, weight_decay: Any, factor: int = factor) -> Any:
                return factor * lr * weight_decay

        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.zeros(2)
        lo.optim.SGD([weight], lr=0.1, weight_decay=0.5, weight_decay_kind="again").step()
        torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - 0.05 * factor))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pass", r"must define the static method pull\(param, delta\)"),
        ("pull = staticmethod(lambda weight, delta: weight)", r"must define the static method pull\(param, delta\)"),
        ("pull = staticmethod(lambda param, delta: 0.5 * param)", "has the literal 0.5"),
        ("pull = staticmethod(lambda param, delta: torch.tanh(param))", "uses 'torch'"),
    ],
)
def test_a_kind_that_no_kernel_could_run_is_refused_when_it_is_defined(body: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        exec(f"class Wrong(DecayKind):\n    {body}", {"DecayKind": lo.optim.DecayKind, "torch": torch})


@pytest.mark.parametrize("name", [kind.value for kind in WeightDecayKind])
def test_names_of_ours_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' belongs to lightning_optim.*WeightDecayKind: choose another"):
        lo.optim.register(name)(Cubic)
    assert name not in DECAY_KINDS.names()


@pytest.mark.parametrize(("name", "value", "ok"), [("bound", 0.0, False), ("bound", 10.0, True), ("beta", 1.0, False)])
def test_a_range_beside_a_hyperparameter_holds_at_construction_and_in_schedules(
    name: str, value: float, ok: bool
) -> None:
    lo.optim.register("tamed")(Tamed)
    model = torch.nn.Linear(2, 2)
    params = list(model.parameters())
    schedule = lo.schedules.Linear(final=value / 0.5 if name == "bound" else value / 0.9)
    if ok:
        Tamed(params, **{name: value})
        lo.OptimizerFactory("tamed", schedules={name: schedule}).build(model, lo.Horizon(total_steps=9))
        return
    with pytest.raises(ValueError, match=rf"Invalid {name}={value}: must be"):
        Tamed(params, **{name: value})
    with pytest.raises(ValueError, match=rf"Invalid {name}={value}: must be"):
        lo.OptimizerFactory("tamed", optimizer_kwargs={name: value})
    with pytest.raises(ValueError, match=f"The schedule of {name} would set it to {value:g}; it must be"):
        lo.OptimizerFactory("tamed", schedules={name: schedule}).build(model, lo.Horizon(total_steps=9))


def test_the_ranges_of_an_optimizer_of_torchs_kind_hold_as_well() -> None:
    @lo.optim.register("of_torch")
    class OfTorch(torch.optim.SGD):
        ranges = {"momentum": lo.optim.Range(0, 0.95)}  # noqa: RUF012 - as a user writes it

    with pytest.raises(ValueError, match=r"OfTorch: Invalid momentum=0\.99: must be 0 <= momentum <= 0\.95"):
        lo.OptimizerFactory("of_torch", lr=0.1, optimizer_kwargs={"momentum": 0.99})


def test_the_plan_names_a_kind_of_decay_that_is_registered() -> None:
    rule = lo.ParamGroupRule(name="head", glob="1.*", weight_decay=0.5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    factory = lo.OptimizerFactory(
        "adamw", lr=1e-3, weight_decay=0.1, optimizer_kwargs={"weight_decay_kind": "cubic"}, param_groups=[rule]
    )
    groups = plan_groups(factory.build(model)[0])
    assert [(group.name, group.weight_decay, group.decay_kind) for group in groups] == [
        ("head", 0.5, "cubic"),
        ("default", 0.1, "cubic"),
    ]
    text = format_plan(Plan(groups=groups))
    assert "decay kind" in text.splitlines()[2]
    assert text.count("cubic") == 2
    usual = plan_groups(lo.OptimizerFactory("adamw", lr=1e-3, weight_decay=0.1).build(model)[0])
    assert all(group.decay_kind is None for group in usual)
    assert "decay kind" not in format_plan(Plan(groups=usual))
