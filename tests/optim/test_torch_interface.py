"""What users and libraries expect of a torch optimizer: groups, hooks, schedulers, names, refusals."""

from __future__ import annotations

import inspect
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from lightning_optim import optim
from tests.helpers import through_a_file
from tests.optim.cases import (
    CASES,
    Case,
    Setting,
    assert_same,
    copies,
    each_case,
    each_setting,
    give,
    gradients,
    parameters,
    run,
)

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, 10, cycle_momentum=bool({"betas", "momentum"} & o.defaults.keys())
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", each_case())
def test_every_torch_scheduler_drives_the_rate(case: Case, name: str) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params, **case.settings[0].arguments)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for grads in gradients(params, 4):
        give(params, grads)
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(rates)) > 1
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(("case", "setting"), each_setting())
def test_hooks_zero_grad_and_added_groups(case: Case, setting: Setting) -> None:
    params = parameters(case)
    optimizer = case.optimizer(params[:1], **setting.arguments)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.add_param_group({"params": params[1:], "name": "late", "lr": 0.5, "mine": "kept"})
    assert (optimizer.param_groups[1]["name"], optimizer.param_groups[1]["mine"]) == ("late", "kept")
    assert optimizer.param_groups[1]["peak_lr"] == 0.5
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 2)  # the first step of ADOPT, and of SOAP, moves nothing
    assert seen == ["pre", "post"] * 2
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()  # nothing to do, and nothing wrong


def test_named_parameters_are_kept_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = optim.AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_every_hyperparameter_may_differ_by_group() -> None:
    for case in CASES:
        betas = tuple(beta / 2 for beta in case.optimizer.hyperparameters().get("betas", ()))
        values = {"lr": 0.5, "betas": betas, "eps": 0.3, "momentum": 0.4, "weight_decay": 0.6}
        defaults = case.optimizer.hyperparameters()
        given: dict[str, Any] = {name: values[name] for name in defaults if name in values}
        if isinstance(defaults.get("eps"), tuple):
            given["eps"] = (0.3, 0.3)
        (first, *rest) = parameters(case)
        optimizer = case.optimizer([{"params": [first], **given}, {"params": rest}])
        assert {name: optimizer.param_groups[0][name] for name in given} == given
        assert all(optimizer.param_groups[1][name] == optimizer.defaults[name] for name in given)
        run(optimizer, [first, *rest], 1)


def refusals() -> list[Any]:
    weight = torch.ones(2, requires_grad=True)
    rows: list[tuple[Any, Any, dict[str, Any], str]] = [
        (
            optim.AdamW,
            [weight],
            {"lr": -1.0},
            r"AdamW: Invalid lr=-1.0: must be a finite number of at least 0",
        ),
        (optim.AdamW, [weight], {"lr": "fast"}, r"lr='fast' of type str: must be a number"),
        (optim.AdamW, [weight], {"lr": torch.ones(2)}, r"lr of shape \(2,\): must be .* one-element"),
        (optim.AdamW, [weight], {"lr": float("nan")}, r"lr=nan"),
        (optim.AdamW, [weight], {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0: must be 0 <= "),
        (optim.AdamW, [weight], {"eps": -1e-8}, r"eps=-1e-08"),
        (optim.AdamW, [weight], {"weight_decay": -1}, r"weight_decay=-1"),
        (optim.AdamW, [weight], {"weight_decay_kind": "decopled"}, r"Did you mean 'decoupled'"),
        (optim.AdamW, [weight], {"cautious": "yes"}, r"cautious='yes': must be True or False"),
        (optim.AdamW, [weight], {"backend": "cdu"}, r"Invalid backend='cdu': must be .* Did you mean 'cpu'"),
        (optim.AdamW, [weight], {"lr": 0.0, "weight_decay_kind": "independent"}, r"divides by the peak learning rate"),
        (optim.AdamW, [{"params": [weight], "name": "head", "lr": -1}], {}, r"group 'head': Invalid lr=-1"),
        (
            optim.AdamW,
            [{"params": [weight], "weight_decy": 0}],
            {},
            r"unknown key 'weight_decy'. Did you mean 'weight_d",
        ),
        (
            optim.AdamW,
            [{"params": [weight], "rule": "lyon"}],
            {},
            r"Invalid rule='lyon' of a group: Unknown optimizer 'lyon'\. Did you mean 'lion'",
        ),
        (
            optim.AdamW,
            [torch.ones(2, dtype=torch.complex64, requires_grad=True)],
            {},
            r"complex64, but must have a real",
        ),
        (optim.AdamW, [("a.weight", torch.ones(1, dtype=torch.cfloat))], {}, r"parameter 'a.weight' has dtype"),
        (optim.AdamW, [weight, weight], {}, r"parameter 1 \(shape \(2,\)\) is in the group twice"),
        (optim.AdamW, [weight], {"betas": (torch.ones(()), 0.9)}, r"betas\[0\] of type Tensor: must be a number"),
        (optim.RMSprop, [weight], {"alpha": 1.0}, r"alpha=1.0: must be 0 <= alpha < 1"),
        (optim.ADOPT, [weight], {"clip_exp": -1.0}, r"clip_exp=-1.0: must be .* or None"),
        (optim.AdEMAMix, [weight], {"betas": (0.9, 0.99)}, r"must be 3 numbers, not 2"),
        (optim.AdamW, [weight], {"betas": (0.9,)}, r"AdamW: Invalid betas=\(0.9,\): must be 2 numbers, not 1"),
        (optim.Lion, [weight], {"betas": [0.9, 0.99, 0.999]}, r"must be 2 numbers, not 3"),
        (optim.Prodigy, [weight], {"betas": 0.9}, r"betas=0.9: must be 2 numbers"),
        (
            optim.SOAP,
            [{"params": [weight], "name": "a", "betas": ()}],
            {},
            r"SOAP, group 'a': Invalid betas=\(\): must be 2 numbers",
        ),
        (
            optim.AdamW,
            [{"params": [weight], "rule": "adan", "betas": (0.9, 0.9)}],
            {},
            r"Adan: Invalid betas=.* must be 3",
        ),
        (optim.Adafactor, [weight], {"eps": (1e-3,)}, r"eps=\(0.001,\): must be 2 numbers, not 1"),
        (optim.Adafactor, [weight], {"eps": 1e-3}, r"eps=0.001: must be 2 numbers"),
        (
            optim.Muon,
            [torch.ones(2, 2)],
            {"ns_coefficients": (1.0, 2.0)},
            r"ns_coefficients=.*: must be .*three finite numbers",
        ),
        (optim.AdEMAMix, [weight], {"betas": (0.0, 0.9, 0.9), "beta3_warmup": 9}, r"beta3_warmup needs 0 < betas\[0\]"),
        (optim.Adan, [weight], {"betas": (0.9, 0.99)}, r"must be 3 numbers, not 2"),
        (optim.ScheduleFreeAdamW, [weight], {"betas": (0.0, 0.99)}, r"betas\[0\]=0: must be 0 <"),
        (
            optim.ScheduleFreeAdamW,
            [weight],
            {"inner_momentum": 1.0},
            r"inner_momentum=1.0: must be 0 <=",
        ),
        (optim.ScheduleFreeAdamW, [{"params": [weight], "cautious": True}], {}, r"cautious=True is not offered"),
        (optim.AdamW, [{"params": [weight], "rule": "schedulefreeadamw"}], {}, r"cannot be the rule of a group"),
        (optim.SGD, [weight], {"nesterov": True}, r"nesterov=True needs momentum above 0 and dampening=0, not mom"),
    ]
    return [pytest.param(*row, id=f"{row[0].__name__}-{i}") for i, row in enumerate(rows)]


@pytest.mark.parametrize(("optimizer", "params", "arguments", "message"), refusals())
def test_wrong_input_is_refused_at_construction(optimizer: Any, params: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(params, **arguments)


@pytest.mark.parametrize("case", each_case())
@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16, Fraction, torch.tensor])
def test_every_kind_of_real_number_will_do(case: Case, real: Any) -> None:
    values = {"lr": 0.25, "weight_decay": 0.5, "eps": 0.125, "momentum": 0.5, "alpha": 0.5, "d_coef": 2.0, "r": 1.0}
    defaults = case.optimizer.hyperparameters()
    plain: dict[str, Any] = {name: v for name, v in values.items() if isinstance(defaults.get(name), int | float)}
    given = {name: real(value) for name, value in plain.items()}
    if isinstance(defaults.get("betas"), tuple) and real is not torch.tensor:
        plain["betas"] = (0.5,) * len(defaults["betas"])
        given["betas"] = tuple(map(real, plain["betas"]))
    first = parameters(case)
    second = copies(first)
    one, other = case.optimizer(first, **plain), case.optimizer([{"params": second, **given}])
    run(one, first, 2)
    run(other, second, 2)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    if real is not torch.tensor:
        assert {n: type(other.param_groups[0][n]) for n in plain} == {n: type(v) for n, v in plain.items()}
        assert_same(one.state_dict(), through_a_file(other.state_dict()))


def test_whole_numbers_of_numpy_stay_whole() -> None:
    weight = torch.ones(5, 4, requires_grad=True)
    optimizer = optim.SOAP([weight], precondition_frequency=np.int64(3), lr=np.float32(0.5))
    assert (type(optimizer.defaults["precondition_frequency"]), optimizer.defaults["lr"]) == (int, 0.5)
    assert type(optimizer.param_groups[0]["precondition_frequency"]) is int


@pytest.mark.parametrize("case", each_case())
def test_groups_with_one_tensor_rate_have_schedules_of_their_own(case: Case) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    params = parameters(case)
    optimizer = case.optimizer([{"params": params[:1]}, {"params": params[1:]}], lr=lr)
    factors = [lambda step: 1 / (step + 1), lambda step: 1 / (step + 1) ** 2]
    scheduler = lr_scheduler.LambdaLR(optimizer, factors)
    run(optimizer, params, 1)
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.125]
    assert optimizer.param_groups[0]["lr"] is lr
    others = copies(params)
    resumed = case.optimizer([{"params": others[:1]}, {"params": others[1:]}], lr=0.1)
    shared = optimizer.state_dict()
    for group in shared["param_groups"]:
        group["lr"] = lr
    resumed.load_state_dict(shared)
    resumed.param_groups[0]["lr"].fill_(1.0)
    assert float(resumed.param_groups[1]["lr"]) == 0.25


@pytest.mark.parametrize("case", each_case())
def test_a_misspelt_argument_is_refused(case: Case) -> None:
    with pytest.raises(TypeError, match="weight_decy"):
        case.optimizer(parameters(case), weight_decy=0.1)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = optim.AdamW([torch.ones(1, requires_grad=True)])
    for bad in (
        {"params": [torch.ones(1, requires_grad=True)], "lr": -1},
        {"params": [torch.ones(1, dtype=torch.cfloat)]},
    ):
        with pytest.raises(ValueError, match="AdamW"):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("case", each_case())
def test_sparse_gradients_are_refused_by_parameter_name(case: Case) -> None:
    table = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = case.optimizer(list(table.named_parameters()))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'weight' is sparse.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("case", each_case())
def test_signatures_are_typed_and_documented(case: Case) -> None:
    parameters_ = inspect.signature(case.optimizer).parameters
    doc = inspect.getdoc(case.optimizer) or ""
    for name, parameter in parameters_.items():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert parameter.annotation is not parameter.empty
        assert f"\n    {name}: " in doc, f"{name} is not in Args"
    assert "References:" in doc
    assert ">>>" in doc


def test_every_optimizer_has_a_case_and_a_line() -> None:
    assert {case.optimizer.__name__.lower() for case in CASES} == set(optim.list_optimizers())
    assert set(optim.list_optimizers("*ADAM*")) >= {"adam", "adamw"}
    assert "2 values" in optim.list_optimizers("adamw")["adamw"]
    assert optim.get_optimizer_class("AdamW") is optim.AdamW
    with pytest.raises(ValueError, match=r"Unknown optimizer 'adamv'\. Did you mean .*'adamw'"):
        optim.get_optimizer_class("adamv")


def test_importing_loads_neither_lightning_nor_numba_nor_triton() -> None:
    code = (
        "import sys, lightning_optim.optim; "
        "print([m for m in ('lightning', 'lightning_fabric', 'numba', 'triton', 'llvmlite') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
