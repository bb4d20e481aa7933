"""Every argument of every public constructor is given values of all types: each is refused by name, or it trains.

The cases are generated from the signatures, so that a new class or argument is tried, too.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lightning_optim as lo
from lightning_optim import clipping, diagnostics, divergence, optim, schedules
from lightning_optim.core.durations import Duration, Horizon
from lightning_optim.core.typed import InvalidArgumentError, checked, typed
from tests.helpers import Net, batches, make_trainer

NAN = math.nan
VALUES = [None, True, False, -1, 2, 0.5, NAN, math.inf, "x", "", "1.0", [], [1], [0.9] * 5, ["a"], [NAN], {}, {"a": 1}]
VALUES += [object(), lambda *given: None, torch.ones(3), nn.Linear]

CALLBACKS: dict[type, dict[str, object]] = {
    lo.ConfigureOptimizers: {},
    lo.DivergenceGuard: {},
    lo.GradientClipping: {},
    lo.OptimizerMonitor: {},
    lo.RunSummary: {},
    lo.WeightDecay: {"weight_decay": 0.1},
}
PARTS: dict[type, dict[str, object]] = {
    divergence.EarlyWarning: {},
    divergence.HealthLimits: {},
    divergence.LRCut: {},
    divergence.Rollback: {},
    divergence.SlowDivergence: {},
    divergence.Spikes: {},
    divergence.SpikeWindow: {"signals": 1},
    diagnostics.Histograms: {},
    diagnostics.PerTensor: {},
    schedules.Warmup: {"length": 3},
    schedules.Cooldown: {"length": 3},
    lo.LayerDecay: {"layer_decay": 0.5},
    lo.ParamGroupRule: {"name": "some", "pattern": "weight"},
    lo.WidthScaling: {"base_width": 2, "width": 4},
    lo.OptimizerFactory: {},
    lo.PartOptimizer: {"name": "one", "part": "net"},
    lo.Horizon: {},
    lo.Duration: {"amount": 1},
}
OPTIMIZERS = {optim.get_optimizer_class(name): {} for name in optim.list_optimizers()}
SCHEDULES = {schedules.get_schedule(name): {} for name in schedules.list_schedules()}
CLIP_RULES = {clipping.get_clip_rule(name): {} for name in clipping.list_clip_rules()}
ALL = OPTIMIZERS | SCHEDULES | CLIP_RULES | PARTS | CALLBACKS


def accepted(cls, base):
    """Try all values of all arguments; each is refused in clear words, or of a type that the annotation has.

    Returns:
        Name, value and object of those that were not refused.
    """
    made = []
    for name in parameters_of(cls):
        for value in VALUES:
            try:
                made.append((name, value, _make(cls, base | {name: value})))
                assert is_meant(value, cls, name), f"{cls.__name__}({name}={value!r}) is accepted"
            except (ValueError, TypeError) as error:
                message = str(error)
                said = name in message or any(repr(part) in message for part in (value, *_parts(value)))
                assert said, f"{cls.__name__}({name}={value!r}): {message}"
                assert not re.search(r"not supported between|object is not|has no attribute|must be real", message)
    return made


def _make(cls, given):
    if cls in OPTIMIZERS:
        return cls([nn.Parameter(torch.ones(4, 4))], **given)
    return cls(**given)


def _parts(value):
    return [*value, *(value.values() if isinstance(value, dict) else ())] if isinstance(value, list | dict) else []


@cache
def parameters_of(cls):
    return {name: p for name, p in inspect.signature(cls).parameters.items() if name != "params"}


def is_meant(value, cls, name):
    """Whether the annotation says that a value of this type is taken."""
    text, default = str(parameters_of(cls)[name].annotation), parameters_of(cls)[name].default
    plain = re.search(rf"\b({'|'.join(cls.__name__ for cls in PARTS)})\b", text)
    if value is None:
        return "None" in text or default is None or name == "weight_decay_kind"
    if isinstance(value, bool):
        return "bool" in text or (bool(plain) and "None" in text)
    if isinstance(value, int | float):
        return bool(re.search(r"\b(int|float)\b", text))
    if isinstance(value, str):
        return "str" in text
    if isinstance(value, list):
        return bool(re.search(r"Sequence|tuple|list|Any", text))
    if isinstance(value, dict):
        return bool(re.search(r"Mapping|dict", text)) or bool(plain)
    return "Callable" in text or "Any" in text


@pytest.mark.parametrize("cls", PARTS | CALLBACKS, ids=lambda cls: cls.__name__)
def test_a_wrong_type_is_refused_at_construction_by_name(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert accepted(cls, ALL[cls])


def test_so_many_malformed_arguments_are_tried():
    cases = [(cls, name, value) for cls in ALL for name in parameters_of(cls) for value in VALUES]
    wrong = [1 for cls, name, value in cases if not is_meant(value, cls, name)]
    assert len(ALL) >= 68
    assert len(wrong) >= 6000


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_what_an_optimizer_accepts_takes_finite_steps(cls):
    for name, value, optimizer in accepted(cls, {"lr": 1e-3, "backend": "reference"}):  # which compiles nothing
        (param,) = optimizer.param_groups[0]["params"]
        for _ in range(2):
            param.grad = torch.linspace(-1, 1, 16).view(4, 4)
            optimizer.step()
        assert param.isfinite().all(), f"{name}={value!r}"


@pytest.mark.parametrize("cls", SCHEDULES, ids=lambda cls: cls.__name__)
def test_what_a_schedule_accepts_gives_finite_multipliers_or_says_why_not(cls):
    for name, value, schedule in accepted(cls, {}):
        schedule = schedule.for_peak(0.1)
        try:
            curve = schedule.over(Horizon(total_steps=20, steps_per_epoch=10))
        except ValueError:  # It is longer than the run.
            assert name in ("warmup", "hold", "cooldown", "timescale", "every", "milestones", "cycle")
            continue
        assert all(math.isfinite(curve(step)) for step in range(20)), f"{name}={value!r}"


@pytest.mark.parametrize("cls", CLIP_RULES, ids=lambda cls: cls.__name__)
def test_what_a_clip_rule_accepts_clips(cls):
    for name, value, rule in accepted(cls, {}):
        weight = nn.Parameter(torch.ones(4, 4))
        optimizer = lo.optim.SGD([{"params": [weight], "name": "a"}], lr=0.1)
        try:
            pipeline = lo.StepPipeline(optimizer, clip=rule)
        except ValueError:  # It names what this model does not have.
            assert name in ("groups", "exclude")
            continue
        for _ in range(2):
            weight.grad = torch.ones(4, 4)
            optimizer.step()
        pipeline.close()
        assert weight.isfinite().all(), f"{name}={value!r}"


@pytest.mark.slow
@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)
def test_what_a_callback_accepts_trains_or_is_refused_before_the_first_step(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value, callback in accepted(cls, CALLBACKS[cls]):
            model = Net()
            logger = TensorBoardLogger(tmp_path) if cls is lo.OptimizerMonitor else False
            trainer = make_trainer([callback], max_steps=2, logger=logger)
            try:
                trainer.fit(model, batches(4))
            except (ValueError, MisconfigurationException):  # It names what this model does not have.
                assert trainer.global_step == 0
                assert value in ({"a": 1}, ["a"])
                continue
            assert trainer.global_step == 2, f"{name}={value!r}"
            assert all(p.isfinite().all() for p in model.parameters()), f"{name}={value!r}"


# What YAML takes, Python takes.

SPIKES = {"threshold": 9.0, "warmup": 32}


def test_a_mapping_stands_for_an_object_with_these_arguments():
    guard = lo.DivergenceGuard(spikes=SPIKES, rollback={"every": 7}, health={"warmup": 3})
    assert guard.spikes == divergence.Spikes(**SPIKES)
    assert guard.rollback == divergence.Rollback(every=7)
    by_path = {"class_path": "lightning_optim.divergence.Spikes", "init_args": SPIKES}
    assert lo.DivergenceGuard(spikes=by_path).spikes == guard.spikes
    assert lo.OptimizerMonitor(per_tensor={"worst": 3}).per_tensor == diagnostics.PerTensor(worst=3)
    assert lo.schedules.Cosine(warmup={"length": "5%", "shape": "cosine"}).warmup == schedules.Warmup("5%", "cosine")


def test_true_and_false_stand_for_an_object_with_its_defaults_and_for_none():
    guard = lo.DivergenceGuard(rollback=False, lr_cut=True, spikes=False)
    assert guard.rollback is None
    assert guard.spikes is None
    assert guard.lr_cut == divergence.LRCut()
    assert lo.OptimizerMonitor(per_tensor=True, histograms=False).per_tensor == diagnostics.PerTensor()
    assert lo.OptimizerMonitor(histograms=False).histograms is None


def test_rules_of_groups_may_be_mappings():
    rules = [{"name": "head", "pattern": "^1", "lr_multiplier": 10}, {"layer_decay": 0.5}, "no_decay"]
    groups = lo.build_param_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rules)
    assert {group["lr_multiplier"] for group in groups} == {0.5, 10.0}
    factory = lo.OptimizerFactory("adamw", param_groups=rules)
    optimizer, _ = factory.build(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert len(optimizer.param_groups) == len(groups)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lo.DivergenceGuard(spikes={"treshold": 8}), r"spikes=.* DivergenceGuard: Spikes got.*'threshold'"),
        (lambda: lo.DivergenceGuard(spikes={"threshold": -8}), r"spikes=.*Invalid threshold=-8"),
        (lambda: lo.DivergenceGuard(rollback={"class_path": "torch.nn.Linear"}), r"rollback=.*must be a Rollback"),
        (
            lambda: lo.DivergenceGuard(patience="5"),
            r"patience='5' of DivergenceGuard: .* whole number \(without quotes\)",
        ),
        (
            lambda: lo.DivergenceGuard(**{"patiance": 5}),
            r"argument 'patiance'. Did you mean 'patience'",
        ),
        (lambda: lo.ParamGroupRule(name="head"), r"ParamGroupRule 'head' has no criterion"),
        (
            lambda: lo.ParamGroupRule(**{"pattern": "a"}),
            r"ParamGroupRule: missing a required (keyword-only )?argument: 'name'",
        ),
        (lambda: lo.OptimizerFactory().build([]), r"Invalid model=\[\] of build\(\): must be a Module"),
        (lambda: lo.OptimizerFactory().build(nn.Linear(1, 1), 100), r"Invalid horizon=100 of build\(\): .* Horizon"),
        (lambda: lo.schedules.Cosine(warmup=0.05), r"Invalid warmup=0.05 of Cosine: .*For 5% of the run write '5%'"),
    ],
)
def test_the_message_names_the_argument(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


BETAS = [[0.9], (0.9, 0.99, 0.999), 0.9, [], "0.9"]


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "prodigy", "torch.optim.AdamW", torch.optim.NAdam, "cadamw"])
def test_betas_of_the_wrong_length_are_refused_at_once(optimizer, betas):
    with pytest.raises(ValueError, match=r"Invalid betas=.* must be 2 values"):
        lo.OptimizerFactory(optimizer, optimizer_kwargs={"betas": betas})


def test_betas_of_the_wrong_length_are_refused_in_a_callable_and_for_a_part():
    for optimizer in (
        partial(torch.optim.AdamW, betas=(0.9,)),
        lambda params: torch.optim.AdamW(params, betas=(0.9, 0.9, 0.9)),
        {"class_path": "torch.optim.Adam", "init_args": {"betas": [0.9]}},
    ):
        with pytest.raises(ValueError, match=r"Invalid betas=.* must be 2 values"):
            lo.OptimizerFactory(optimizer)
    with pytest.raises(ValueError, match=r"Optimizer 'one': Invalid betas="):
        lo.PartOptimizer(name="one", part="net", betas=[0.9])
    with pytest.raises(ValueError, match=r"Invalid adamw_betas=.* must be 2 numbers"):
        lo.optim.Muon([nn.Parameter(torch.ones(2, 2))], adamw_betas=(0.9,))
    with pytest.raises(ValueError, match=r"Invalid eps=\[1e-08\]: must be one value"):
        lo.optim.AdamW([nn.Parameter(torch.ones(2, 2))], eps=[1e-8])


# The checks themselves.


def test_numbers_of_numpy_are_numbers_and_true_is_none():
    @checked
    def half(count: int, share: float = 0.5) -> float:
        assert type(count) is int
        return count * share

    assert half(np.int64(4), np.float32(0.5)) == 2.0
    with pytest.raises(InvalidArgumentError, match=r"Invalid count=True of half\(\): must be a whole number\."):
        half(True)
    with pytest.raises(InvalidArgumentError, match=r"Invalid count=4\.0 of half\(\)"):
        half(4.0)


def test_a_subclass_is_named_in_the_message_and_keeps_its_signature():
    @typed
    class Base:
        def __init__(self, size: int) -> None:
            self.size = size

    class Mine(Base):
        pass

    assert list(inspect.signature(Mine).parameters) == ["size"]
    with pytest.raises(InvalidArgumentError, match="of Mine: must be a whole number"):
        Mine("a")


def test_every_annotation_of_a_public_constructor_can_be_checked():
    for cls in ALL.keys() - OPTIMIZERS.keys():
        assert hasattr(inspect.getattr_static(cls, "__init__"), "__wrapped__"), cls.__name__


def test_a_duration_is_checked_as_itself():
    assert Duration(amount=5, unit="percent") == Duration.parse("5%")


_EACH = [[3.4445, -4.775, 2.0315], [2.0, -1.5, 0.5]]


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("given", ["polar_express", (3.0, -3.2, 1.2), _EACH])
def test_coefficients_may_be_a_preset_or_a_list_in_configurations_too(name, given):
    rule = lo.ParamGroupRule(name="body", pattern="^body", options={"ns_coefficients": given})
    for arguments in ({"optimizer_kwargs": {"ns_coefficients": given}}, {"param_groups": [rule]}):
        optimizer, _ = lo.ConfigureOptimizers(name, lr=0.01, **arguments).build(Net())
        group = next(g for g in optimizer.param_groups if "body.weight" in g["param_names"])
        assert group["ns_coefficients"] == given
    with pytest.raises(ValueError, match="Invalid ns_coefficients='polar_expres'"):
        lo.ConfigureOptimizers(name, optimizer_kwargs={"ns_coefficients": "polar_expres"}).build(Net())
