"""Findings about parameters: which are confirmed and reported, and which are as they should be."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn import functional as F

import lightning_optim as lo
from lightning_optim.core.stats import TENSOR_COLUMNS
from lightning_optim.divergence import ALARM_KINDS, HealthLimits, Inspection, ParameterHealth, gradient_history
from lightning_optim.divergence.clip_rate import ClipRate
from lightning_optim.divergence.gradient_history import GradientHistory
from lightning_optim.divergence.parameter_map import ParameterMap
from tests.helpers import NetWith, batches, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

HEALTHY = {"grad_sq": 1.0, "clipped_sq": 1.0, "param_sq": 1.0, "update_sq": 1e-6}


def _row(**values: float) -> list[float]:
    return [{**HEALTHY, **values}.get(column, 0.0) for column in TENSOR_COLUMNS]


def _health(shapes: dict[str, tuple[int, ...]], sequential: tuple[str, ...] = ()) -> ParameterHealth:
    names = list(shapes)
    return ParameterHealth(parameters=ParameterMap(names, list(shapes.values()), names, sequential))


def _told(health: ParameterHealth, grads: dict[str, float], step: int = 40, **more: Any) -> dict[str, list[str]]:
    """What is reported when these are the square sums of the gradients, by the names of the parameters."""
    values = [v for grad in grads.values() for v in _row(grad_sq=grad)]
    groups = [("all", 0.1, len(grads))]
    seen = Inspection(step, values, list(grads), [1] * len(grads), groups, **more)
    return {alarm.kind: [name.split()[0] for name in alarm.names] for alarm in health.update(seen)}


LAYERS: dict[str, tuple[int, ...]] = {
    "a.weight": (8, 4),
    "a.bias": (8,),
    "b.weight": (8, 8),
    "b.bias": (8,),
    "c.weight": (2, 8),
    "c.bias": (2,),
}


def test_a_bias_without_a_gradient_whose_weight_has_one_is_as_it_should_be():
    grads = dict.fromkeys(LAYERS, 1.0)
    assert _told(_health(LAYERS), grads | {"b.bias": 0.0}) == {}
    assert _told(_health(LAYERS), grads | {"b.bias": 1e-16}) == {}
    assert _told(_health(LAYERS), grads | {"b.bias": 1e-16, "b.weight": 1e-16}) == {"vanishing": ["b.weight", "b.bias"]}


def test_a_scale_before_a_normalization_is_as_it_should_be():
    shapes = {**LAYERS, "scale": (8,), "d.weight": (8, 8)}
    grads = dict.fromkeys(shapes, 1.0)
    assert _told(_health(shapes), grads | {"scale": 1e-16}) == {}
    assert _told(_health(shapes), grads | {"scale": 1e-16, "d.weight": 1e-16}) == {"vanishing": ["scale", "d.weight"]}


def _family(parent: str, members: int) -> dict[str, tuple[int, ...]]:
    inside = {"up.weight": (8, 4), "up.bias": (8,), "down.weight": (4, 8), "down.bias": (4,)}
    return {f"{parent}.{i}.{name}": shape for i in range(members) for name, shape in inside.items()}


@pytest.mark.parametrize("idle", [(1,), (0, 2), (0, 1, 2)])
def test_an_expert_without_tokens_is_as_it_should_be(idle):
    shapes = {"stem.weight": (4, 4), **_family("experts", 4), "head.weight": (2, 4), "head.bias": (2,)}
    grads = {name: 0.0 if any(f"experts.{i}." in name for i in idle) else 1.0 for name in shapes}
    assert _told(_health(shapes), grads) == {}
    assert _told(_health(shapes), {name: grad or 1e-16 for name, grad in grads.items()}) == {}
    # It may have no gradient at all.
    present = {name: grad for name, grad in grads.items() if grad}
    places = [i for i, grad in enumerate(grads.values()) if grad]
    without = [(i, name) for i, (name, grad) in enumerate(grads.items()) if not grad]
    assert _told(_health(shapes), present, places=places, without=without) == {}


def test_a_dead_layer_among_others_of_its_build_is_found():
    shapes = {"stem.weight": (4, 4), **_family("blocks", 3), "head.weight": (2, 4), "head.bias": (2,)}
    dead = {name: 0.0 for name in shapes if "blocks.0" in name or "blocks.1" in name or name == "stem.weight"}
    grads = dict.fromkeys(shapes, 1.0) | dead | {"blocks.2.up.weight": 0.0}  # Its inputs are all 0.
    assert set(_told(_health(shapes), grads)["dead"]) == {*dead, "blocks.2.up.weight"}
    # Those of a Sequential always run.
    grads["blocks.2.up.weight"] = 1.0
    assert _told(_health(shapes), grads) == {"dead": ["stem.weight"]}
    assert set(_told(_health(shapes, ("blocks",)), grads)["dead"]) == set(dead)


def test_a_chain_in_which_the_gradient_vanishes_is_found_among_layers_of_one_build():
    shapes = {"stem.weight": (4, 4), **_family("blocks", 3), "head.weight": (2, 4), "head.bias": (2,)}
    small = {name: 1e-16 for name in shapes if "blocks.0" in name or name == "stem.weight"}
    grads = dict.fromkeys(shapes, 1.0)
    assert set(_told(_health(shapes), grads | small)["vanishing"]) == set(small)
    # The order in the model need not be that in which they are used.
    grads["first.weight"] = 1.0
    shapes = {"first.weight": (2, 2), **shapes}
    between = {name: 1e-8 for name in shapes if "blocks.1" in name}
    assert set(_told(_health(shapes), {name: {**grads, **small, **between}[name] for name in shapes})["vanishing"]) == {
        name for name in small if "blocks" in name
    } | {"stem.weight"}


def test_each_parameter_is_reported_once():
    health = _health(LAYERS)
    dead = dict.fromkeys(LAYERS, 1.0) | {"a.weight": 0.0, "a.bias": 0.0}
    assert _told(health, dead, 40) == {"dead": ["a.weight", "a.bias"]}
    assert _told(health, dict.fromkeys(LAYERS, 1.0), 50) == {}
    other = _health(LAYERS)
    other.load_state_dict(health.state_dict())
    assert _told(other, dead, 60) == _told(health, dead, 60) == {}
    assert _told(health, dead | {"b.weight": 0.0}, 70) == {"dead": ["b.weight"]}
    health.rolled_back()
    assert _told(health, dead, 80) == {"dead": ["a.weight", "a.bias"]}


def _steps(history: GradientHistory, count: int, *square_sums: Any, loss: float = 1.0) -> GradientHistory:
    for step in range(history.step + 1, history.step + 1 + count):
        history.update(step, np.array([s(step) if callable(s) else s for s in square_sums]), None, loss)
    return history


def test_a_gradient_of_now_and_then_is_not_dead():
    history = _steps(GradientHistory(), 200, 1.0, lambda step: float(step % 30 == 0), lambda step: float(step < 90), 1)
    assert history.without_gradient().tolist() == [False, False, True, False]
    grads = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    assert _told(ParameterHealth(history=history), grads, 200) == {"dead": ["c"]}


def test_a_gradient_that_grows_or_was_there_a_moment_ago_does_not_vanish():
    history = _steps(GradientHistory(), 30, 1.0, lambda step: 1e-20 * step**4, lambda step: 1.0 * (step < 30), 1e-16)
    health = ParameterHealth(history=history)
    assert _told(health, {"a": 1.0, "grows": 1e-15, "was": 1e-16, "small": 1e-16}, 30) == {"vanishing": ["small"]}


def test_small_gradients_at_a_loss_of_next_to_nothing_are_as_they_should_be():
    history = _steps(GradientHistory(), 30, 1.0, 1.0, loss=2.0)
    _steps(history, 30, 1.0, 0.0, loss=1e-4)
    assert _told(ParameterHealth(history=history), {"a": 1.0, "b": 0.0}, 60) == {}
    _steps(history, 30, 1.0, 0.0, loss=1.0)
    assert _told(ParameterHealth(history=history), {"a": 1.0, "b": 0.0}, 90) == {"dead": ["b"]}


def test_gradients_along_the_momentum_mean_nothing_in_the_first_steps():
    row = _row(momentum_sq=1.0, grad_exp_avg=0.9)
    health = ParameterHealth()
    looks = [Inspection(step, row, ["w"], [1], [("all", 0.1, 1)]) for step in range(20, 300, 10)]
    assert [alarm.step for look in looks for alarm in health.update(look)] == [200]


def test_no_advice_is_given_at_a_loss_of_next_to_nothing():
    history = _steps(GradientHistory(), 30, 1.0, loss=2.0)
    health = ParameterHealth(history=history)
    assert [alarm.kind for alarm in _hint("lr_too_low", health)] == ["lr_too_low"]
    _steps(history, 30, 1.0, loss=0.0)
    assert _hint("lr_too_low", ParameterHealth(history=history)) == []


@pytest.mark.parametrize(("usual", "converged", "told"), [(1.0, False, 1), (1.0, True, 0), (0.0, False, 0)])
def test_a_gradient_explodes_against_a_usual_one(usual, converged, told):
    history = _steps(GradientHistory(), 30, 1.0, loss=2.0)
    _steps(history, 30, 1.0, loss=0.0 if converged else 2.0)
    health = ParameterHealth(history=history)
    looks = [Inspection(60 + i, _row(grad_sq=usual), ["w"], [1], [("all", 0.1, 1)]) for i in range(12)]
    looks += [Inspection(80, _row(grad_sq=1e4), ["w"], [1], [("all", 0.1, 1)])]
    assert sum(alarm.kind == "exploding" for look in looks for alarm in health.update(look)) == told


@pytest.mark.parametrize("pending", [2, 17, 10**6])
def test_steps_that_are_processed_together_leave_the_same_history(pending: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    histories = GradientHistory(), GradientHistory()
    for step in range(1, 200):
        count = 3 + step // 60
        norms = np.where(rng.random(count) < 0.5, 0.0, rng.random(count))
        norms[rng.random(count) < 0.05] = np.nan
        places = np.sort(rng.choice(count, count - 1, replace=False)) if step % 5 == 0 else None
        for history, most in zip(histories, (1, pending), strict=True):
            monkeypatch.setattr(gradient_history, "_PENDING", most)
            history.update(step, norms if places is None else norms[:-1], places, 1.0)
        if step % 30 == 0:
            assert histories[0].without_gradient().tolist() == histories[1].without_gradient().tolist()
    assert histories[0].state_dict() == histories[1].state_dict()


def test_the_history_survives_a_checkpoint_and_another_order():
    history = _steps(GradientHistory(), 40, 1.0, 0.0, lambda step: float(step < 5))
    other = GradientHistory()
    other.load_state_dict(history.state_dict())
    assert other.state_dict() == history.state_dict()
    other.move([2, -1, 0])
    assert other.without_gradient().tolist() == [True, True, False]
    assert other.never_used(1)
    assert not other.never_used(0)
    other.update(41, np.array([1.0]), np.array([4.0]), 1.0)
    assert [other.never_used(place) for place in (2, 3, 4)] == [False, True, False]


def test_a_gradient_missing_now_and_then_is_no_mistake():
    history = GradientHistory()
    history.update(1, np.array([1.0, 1.0]), None, 1.0)
    history.update(2, np.array([1.0]), np.array([0]), 1.0)
    health = ParameterHealth(history=history)
    assert _told(health, {"a": 1.0}, without=[(1, "b"), (2, "c")]) == {"no_gradient": ["c"]}


def test_most_of_the_network_dies_at_once_and_again_after_it_has_recovered():
    def most(health: ParameterHealth, step: int, grad: float) -> list[bool]:
        numel = [10, 10, 1]
        rows = [*_row(grad_sq=grad), *_row(grad_sq=grad), *_row()]
        alarms = health.update(Inspection(step, rows, ["a", "b", "c"], numel, [("all", 0.1, 3)]))
        return [alarm.most for alarm in alarms if alarm.kind == "dead"]

    history = _steps(GradientHistory(), 30, 1.0, 1.0, 1.0)
    health = ParameterHealth(history=history)
    assert most(health, 30, 1.0) == []
    _steps(history, 10, 0.0, 0.0, 1.0)
    assert most(health, 40, 0.0) == []  # A few batches that nothing can be learned from are no collapse.
    _steps(history, 10, 0.0, 0.0, 1.0)
    assert most(health, 50, 0.0) == [True]
    assert most(health, 51, 0.0) == []
    assert most(health, 60, 1.0) == []
    assert most(health, 70, 0.0) == [True]


def test_updates_that_round_away_are_told_from_those_that_are_small_at_the_second_look():
    def told(steps: int = 2, update: float = 1e-5, zero: float = 0.0, **more: Any) -> list[str]:
        health, row = ParameterHealth(), _row(update_sq=update**2, zero_grad=zero)
        looks = (Inspection(40 + 10 * i, row, ["w"], [100], [("all", 0.1, 1)], **more) for i in range(steps))
        return [alarm.kind for look in looks for alarm in health.update(look)]

    eps = torch.finfo(torch.bfloat16).eps
    assert told(1, lossy=[eps]) == []
    assert told(2, lossy=[eps]) == ["rounded_away"]
    assert told(3, lossy=[eps]) == ["rounded_away"]
    assert told(update=1e-3, lossy=[eps]) == []
    assert told(update=1e-4, zero=99.0, lossy=[eps]) == []  # Most elements have nothing to lose.
    assert told() == []
    assert told(update=0.0) == ["stalled"]
    assert told(update=0.0, kept=[0]) == []


@pytest.mark.parametrize(("dtype", "options", "told"), [
    (torch.bfloat16, {}, True),
    (torch.float16, {}, True),
    (torch.bfloat16, {"kahan_sum": True}, False),
    (torch.bfloat16, {"stochastic_rounding": True}, False),
    (torch.float32, {}, False),
])  # fmt: skip
def test_training_in_16_bits_at_a_low_rate_says_that_updates_round_away(tmp_path, dtype, options, told):
    class Half(NetWith):
        def forward(self, x):
            return super().forward(x.to(dtype)).float()

    guard = lo.DivergenceGuard(rollback=None, report_dir=str(tmp_path))
    optimizer = lo.ConfigureOptimizers("adamw", lr=1e-6, weight_decay=0.0, optimizer_kwargs=options)
    model = Half(lambda module: None).to(dtype)
    make_trainer([optimizer, guard], log_every_n_steps=10).fit(model, batches(50, batch_size=16))
    entries = [entry for entry in guard.report.entries if entry.kind == "rounded_away"]
    assert len(entries) == told
    assert all("kahan_sum" in entry.text and "stochastic_rounding" in entry.text for entry in entries)
    assert not {"stalled", "dead", "vanishing"} & {entry.kind for entry in guard.report.entries}


def _clipped(rate: ClipRate, *stretches: tuple[int, float, float]) -> list[int]:
    """Steps with an advice, in stretches of so many steps, a share of which is clipped to so much of their norm."""
    step = clipped = 0
    told = []
    for steps, share, left in stretches:
        for _ in range(steps // 10):
            step, clipped = step + 10, clipped + round(10 * share)
            told += [step] if rate.update(step, clipped, left) else []
    return told


def test_clipping_of_nearly_every_step_is_reported_once_after_a_long_stretch():
    assert _clipped(ClipRate(), (1000, 1.0, 0.1)) == [210]
    assert _clipped(ClipRate(), (150, 1.0, 0.1), (150, 0.5, 0.1), (150, 1.0, 0.1)) == []
    assert _clipped(ClipRate(), (150, 1.0, 0.1), (150, 1.0, 0.9), (150, 1.0, 0.1)) == []
    assert _clipped(ClipRate(), (1000, 0.9, 0.1)) == []
    assert _clipped(ClipRate(), (1000, 1.0, 0.8)) == []
    assert _clipped(ClipRate(), (150, 1.0, 0.1), (10, 0.9, 0.1), (100, 1.0, 0.1)) == [210]  # 99 % are enough.
    rate = ClipRate()
    _clipped(rate, (300, 1.0, 0.1))
    other = ClipRate()
    other.load_state_dict(rate.state_dict())
    assert _clipped(other, (1000, 1.0, 0.1)) == []


@pytest.mark.parametrize(("max_norm", "told"), [(1e-3, 1), (10.0, 0)])
def test_a_run_whose_clipping_acts_as_a_learning_rate_says_so(tmp_path, max_norm, told):
    guard = lo.DivergenceGuard(rollback=None, report_dir=str(tmp_path))
    module = NetWith(lambda module: torch.optim.SGD(module.parameters(), lr=0.01))
    clipping = lo.GradientClipping(max_norm)
    make_trainer([clipping, guard], log_every_n_steps=25).fit(module, batches(300, batch_size=8))
    entries = [entry for entry in guard.report.entries if entry.kind == "always_clipped"]
    assert len(entries) == told
    assert all("steps were clipped" in entry.text for entry in entries)


def _run(module: Any, tmp_path: Path, *callbacks: Any, steps: int = 60) -> dict[str, list[str]]:
    guard = lo.DivergenceGuard(rollback=None, report_dir=str(tmp_path))
    make_trainer([guard, *callbacks], log_every_n_steps=25).fit(module, batches(steps, batch_size=8))
    return {entry.kind: entry.names for entry in guard.report.entries}


def _all(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def test_parameters_that_a_callback_unfreezes_later_are_frozen_on_purpose(tmp_path):
    class Later(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            pl_module.body.requires_grad_(False)

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    assert _run(NetWith(_all), tmp_path, Later()) == {}


def test_modules_in_evaluation_mode_are_frozen_on_purpose(tmp_path):
    module = NetWith(_all)
    module.body.requires_grad_(False)
    assert _run(module, tmp_path) == {"no_gradient": ["body.weight", "body.bias"]}
    module.body.eval()
    assert _run(module, tmp_path) == {}


class Thaws(NetWith):
    """Unfreezes its body in the course of training."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 40:
            self.thaw()

    def thaw(self):
        for param in self.body.parameters():
            param.requires_grad = True


class FreezesAtStart(NetWith):
    """Freezes its body, for good."""

    def on_train_start(self):
        self.body.requires_grad_(False)


def test_a_module_that_unfreezes_its_parameters_later_froze_them_on_purpose(tmp_path):
    module = Thaws(_all)
    module.body.requires_grad_(False)
    assert _run(module, tmp_path) == {}
    assert _run(FreezesAtStart(_all), tmp_path) == {"no_gradient": ["body.weight", "body.bias"]}


class Margin(NetWith):
    """A loss of exactly 0 once all samples are beyond the margin."""

    def training_step(self, batch, batch_idx):
        out = self.head(self.body(batch[0]))
        return F.relu(0.01 - (out[:, 0] - out[:, 1]) * (1 if self.global_step < 2 else 1e9)).mean() + 0 * out.sum() ** 2


class Constant(NetWith):
    """Nothing has a gradient, although there is a loss."""

    def training_step(self, batch, batch_idx):
        return 1.0 + 0.0 * self.head(self.norm(self.body(batch[0]))).sum()


def test_gradients_of_0_are_right_at_a_loss_of_0_only(tmp_path):
    module = Margin(_all)
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(torch.tensor([0.005, 0.0]))
    assert "dead" not in _run(module, tmp_path, steps=100)
    assert len(_run(Constant(_all), tmp_path)["dead"]) == 6


@pytest.mark.parametrize("container", ["Sequential", "ModuleList"])
def test_a_dead_layer_between_layers_of_one_build_is_named(tmp_path, container):
    class Stack(NetWith):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure)
            layers = [nn.Linear(8, 8) for _ in range(4)]
            nn.init.constant_(layers[1].bias, -100.0)
            self.layers = nn.Sequential(*layers) if container == "Sequential" else nn.ModuleList(layers)

        def forward(self, x):
            x = self.body(x)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x)

    dead = {name.split()[0] for name in _run(Stack(_all), tmp_path)["dead"]}
    assert dead >= {"body.weight", "layers.0.weight", "layers.1.weight", "layers.1.bias", "layers.2.weight"}
    assert not {"layers.2.bias", "layers.3.weight", "head.weight"} & dead


def test_a_group_added_in_mid_run_is_named(tmp_path):
    class Grows(NetWith):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 10:
                self.trainer.optimizers[0].add_param_group({"params": [self.unused]})

    module = Grows(
        lambda m: torch.optim.AdamW([p for name, p in m.named_parameters() if "unused" not in name], lr=1e-2)
    )
    module.unused = nn.Parameter(torch.ones(3, 3))
    assert _run(module, tmp_path) == {"no_gradient": ["unused"]}


def test_the_figures_of_hints_are_those_of_the_documentation():
    docs = Path(lo.__file__).parents[1] / "docs" / "concepts" / "divergence.md"
    table = dict(re.findall(r"^\| `(\w+)` \| (\d+ of \d+ \| \d+ of \d+ \| \d+ of \d+) \|$", docs.read_text(), re.M))
    for kind, at in (("lr_too_low", 1), ("lr_too_high", 2), ("exploding", 2)):
        good, bad = (table[kind].split(" | ")[i] for i in (0, at))
        assert bad in ALARM_KINDS[kind].reliability
        assert good in ALARM_KINDS[kind].reliability
        found, of = map(int, bad.split(" of "))
        assert 2 * found < of
    for kind in ("lr_too_low", "lr_too_high"):
        (alarm,) = _hint(kind)
        assert f"(a hint: in its calibration {ALARM_KINDS[kind].reliability})" in alarm.text
    limits = " ".join((HealthLimits.__doc__ or "").split())
    for limit, kind, at in (
        ("vanishing", "vanishing", 2),
        ("exploding", "exploding", 2),
        ("against", "lr_too_high", 2),
        ("along", "lr_too_low", 1),
    ):
        text = limits.partition(f" {limit}: ")[2]
        text = min((text.partition(f" {other.name}: ")[0] for other in fields(HealthLimits)), key=len)
        figures = table[kind].split(" | ")
        assert figures[0] in text
        assert figures[at] in text


def _hint(kind: str, health: ParameterHealth | None = None) -> list[Any]:
    health = health or ParameterHealth()
    row = _row(momentum_sq=1.0, grad_exp_avg=0.9 if kind == "lr_too_low" else -0.9)
    looks = [Inspection(50 * (i + 1), row, ["w"], [1], [("all", 0.1, 1)]) for i in range(8)]
    return [alarm for look in looks for alarm in health.update(look)]
