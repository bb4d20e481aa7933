"""The range of each hyperparameter, which the optimizer that has it declares."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.core.group_keys import GROUP_KEYS, IDENTITY
from lightning_optim.core.ranges import ranges_of
from lightning_optim.optim import FusedOptimizer, Range
from lightning_optim.optim.base import OPTIMIZERS


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3, 3))]


class Averaged(FusedOptimizer):
    """A user's optimizer, from outside the package."""

    ranges: ClassVar[Mapping[str, Range]] = {"beta": Range(0, 1, below=True), "gain": Range()}

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, gain: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "gain": gain, "weight_decay": 0.0}, **options)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Any:
        return optim.SGD.rule({**group, "momentum": 0})


@pytest.mark.parametrize(
    "parameter", ["gain=0.9", "gain=1", "gain=(0.9, 0.99)", "gain: float", "gain: 'float | None' = None"]
)
def test_a_number_without_a_range_is_an_error_when_the_class_is_made(parameter: str) -> None:
    text = f"class Loose(FusedOptimizer):\n    def __init__(self, params, {parameter}):\n        pass\n"
    with pytest.raises(
        TypeError, match=r"Loose takes the number 'gain'.*ranges = \{\"gain\": Range\(0, 1, below=True\)"
    ):
        exec(text, {"FusedOptimizer": FusedOptimizer})


@pytest.mark.parametrize(
    "parameter", ["gain='a'", "gain=None", "gain=True", "lr=0.1", "betas=(0.9, 0.99)", "beta=0.9", "state_bits=32"]
)
def test_what_is_no_number_or_has_an_inherited_range_needs_none(parameter: str) -> None:
    text = f"class Fine(FusedOptimizer):\n    def __init__(self, params, {parameter}):\n        pass\n"
    exec(text, {"FusedOptimizer": FusedOptimizer})


def test_a_number_that_the_signature_does_not_show_is_an_error_at_construction() -> None:
    class Hidden(Averaged):
        def __init__(self, params: Any, **settings: Any) -> None:
            FusedOptimizer.__init__(self, params, {"lr": 0.1, "weight_decay": 0.0, **settings})

    Hidden(params(), beta=0.5)
    with pytest.raises(TypeError, match="Hidden takes the number 'gamma'"):
        Hidden(params(), gamma=0.5)


@pytest.mark.parametrize("beta", [1.5, 1.0, -0.1, math.nan, math.inf, "half", None, True])
def test_a_user_s_number_is_checked(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta="):
        Averaged(params(), beta=beta)
    with pytest.raises(ValueError, match="beta="):
        Averaged([{"params": params(), "beta": beta}])


def test_a_user_s_number_is_checked_by_name_and_in_a_group_of_another_optimizer() -> None:
    lo.register(Averaged, name="averaged_for_ranges")
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        lo.OptimizerFactory("averaged_for_ranges", optimizer_kwargs={"beta": 1.5})
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        optim.Lion([{"params": params(), "rule": "averaged_for_ranges", "beta": 1.5}])
    with pytest.raises(ValueError, match="gain=nan"):
        optim.Lion([{"params": params(), "rule": "averaged_for_ranges", "gain": math.nan}])
    assert optim.list_optimizers()["averaged_for_ranges"] == "A user's optimizer, from outside the package."
    OPTIMIZERS.remove("averaged_for_ranges")


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_no_number_of_ours_may_be_nan(name: str) -> None:
    cls = optim.get_optimizer_class(name)
    assert issubclass(cls, FusedOptimizer)
    for number in ranges_of(cls).keys() & inspect.signature(cls).parameters.keys():
        default = inspect.signature(cls).parameters[number].default
        wrong = (math.nan, *default[1:]) if isinstance(default, tuple) else math.nan
        with pytest.raises(ValueError, match=rf"{number.removeprefix('adamw_')}(\[0\])?=nan"):
            cls(params(), **{number: wrong})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.SGD(p, dampening=1.5), "must be 0 <= dampening <= 1"),
        (lambda p: optim.Muon(p, momentum=1.0), "must be 0 <= momentum < 1"),
        (lambda p: optim.Muon(p, adamw_lr=-1.0), "Muon: Invalid adamw_lr=-1.0"),
        (
            lambda p: optim.Muon(p, ns_coefficients=(1.0, math.inf, 1.0)),
            r"ns_coefficients=\(1.0, inf, 1.0\): must",
        ),
        (lambda p: optim.Adafactor(p, eps=(None, None)), r"Adafactor: Invalid eps\[1\]=None"),
        (lambda p: optim.Adafactor(p, beta2_decay=0.1), "beta2_decay=0.1: must be at most 0"),
        (lambda p: optim.AdamW(p, eps=None), "eps=None of type NoneType: must be a number"),
        (lambda p: optim.Prodigy(p, d0=0.0), "d0=0.0: must be a finite number above 0"),
        (lambda p: optim.SOAP(p, precondition_frequency=2.5), "=2.5: must be a whole number of at least 1"),
        (lambda p: optim.AdamW([{"params": p, "rounding_seed": 0.5}]), "rounding_seed=0.5: must be a whole number"),
        (lambda p: optim.AdamW([{"params": p, "peak_lr": -1.0}]), "Invalid peak_lr=-1.0: must be"),
    ],
)
def test_values_outside_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(params())


@pytest.mark.parametrize(
    ("allowed", "needed"),
    [
        (Range(), "a number"),
        (Range(0), "at least 0"),
        (Range(0, below=True, optional=True), "a finite number of at least 0 or None"),
        (Range(high=1, below=True), "a number below 1"),
        (Range(1, 9, whole=True), "a whole number from 1 to 9"),
        (Range(0, 1, above=True), "0 < x <= 1"),
    ],
)
def test_ranges_in_words(allowed: Range, needed: str) -> None:
    assert allowed.needed("x") == needed
    assert math.nan not in allowed


def test_group_keys_are_known_everywhere() -> None:
    """What the package itself writes into groups is in the table, and so no option of a rule and never a typo."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    rules = [lo.ParamGroupRule(name="first", pattern="^0", frozen_until=2, rule="lion")]
    optimizer = lo.OptimizerFactory("muon", lr=0.1, param_groups=rules)(model)["optimizer"]
    hyperparameters = optim.Muon.hyperparameters().keys() | optim.AdamW.hyperparameters().keys()
    for group in optimizer.param_groups:
        assert group.keys() - hyperparameters <= GROUP_KEYS.keys()
    assert {"params", "param_names", "name"} == IDENTITY
    for key in ("calls", "peak_lr_from", "not_hidden", "frozen_until"):
        with pytest.raises(ValueError, match=f"{key!r} is not an option"):
            lo.ParamGroupRule(name="all", pattern=".", options={key: 1})
