"""Every optimizer by its name alone, or at a usual rate, trains two tasks about as AdamW does at its own default.

The tasks are those of the examples, made small: scikit-learn's digits with a convolutional network, and bytes of the
standard library with a transformer.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lightning_optim as lo
from lightning_optim import optim

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.char_lm import CharLM, stdlib_sources
from examples.digits import Digits, DigitsNet

# By name alone, and where torch's default is for fine-tuning only, at a usual rate.
RATES = {"sgd": 0.1, "radam": 3e-3, "adan": 3e-3, "rmsprop": 1e-3}
NAMED = ("lion", "muon", "normuon", "prodigy", "schedulefreeadamw", "soap")
EVERY = sorted(optim.list_optimizers())

DIGITS_DISTANCE = 0.15  # nats, after 6 epochs; AdamW has about 0.09, and the untrained model 2.3
TEXT_DISTANCE = 0.4  # nats per byte, after 150 steps; AdamW has about 2.5, and the untrained model 5.5


@cache
def train_digits(name: str, lr: float | None, epochs: int) -> float:
    """Return the validation loss after some epochs at a constant rate."""
    torch.manual_seed(0)
    data, model, batch = Digits(), DigitsNet(width=16), 64
    data.setup("fit")
    images, labels = data.train.tensors
    optimizer, scheduler = lo.OptimizerFactory(name, lr=lr).build(model, lo.Horizon(total_steps=22 * epochs))
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    if isinstance(
        optimizer, optim.ScheduleFreeAdamW
    ):  # The running statistics of batch norm are those of the weights that were trained.
        optimizer.eval()
        with torch.no_grad():
            model(images)
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(data.val.tensors[0]), data.val.tensors[1]).item()


@cache
def text() -> torch.Tensor:
    found = bytearray()
    for _, path in sorted(stdlib_sources()):
        found.extend(path.read_bytes())
        if len(found) > 1_000_000:
            break
    return torch.frombuffer(found, dtype=torch.uint8).long()


@cache
def train_text(name: str, lr: float | None, steps: int) -> float:
    """Return the validation loss after some steps at a constant rate."""
    torch.manual_seed(0)
    train, val, model = text()[:900_000], text()[900_000:], CharLM(dim=64, num_layers=2)
    optimizer, scheduler = lo.OptimizerFactory(name, lr=lr).build(model, lo.Horizon(total_steps=steps))

    def loss(source: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([source[place : place + 65] for place in places.tolist()])
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss(train, torch.randint(len(train) - 65, (16,))).backward()
        optimizer.step()
        scheduler.step()
    if isinstance(optimizer, optim.ScheduleFreeAdamW):
        optimizer.eval()
    with torch.no_grad():
        return loss(val, torch.linspace(0, len(val) - 65, 64).long()).item()


@pytest.mark.parametrize("name", NAMED)
def test_the_name_alone_trains_digits_as_adamw_does(name):
    adamw = train_digits("adamw", None, epochs=3)
    assert adamw < 0.4
    assert train_digits(name, None, epochs=3) < adamw + DIGITS_DISTANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_trains_both_tasks_as_adamw_does(name):
    lr = RATES.get(name)
    assert train_digits(name, lr, epochs=6) < train_digits("adamw", None, epochs=6) + DIGITS_DISTANCE
    assert train_text(name, lr, steps=150) < train_text("adamw", None, steps=150) + TEXT_DISTANCE


def test_parameters_that_muon_hands_to_adamw_have_a_rate_of_adamw():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for name in ("muon", "normuon"):
        optimizer, _ = lo.OptimizerFactory(name).build(model)
        assert {group.get("rule"): group["lr"] for group in optimizer.param_groups} == {None: 0.02, "adamw": 1e-3}
        options = {"adjust_lr_fn": "match_rms_adamw"}
        optimizer, _ = lo.OptimizerFactory(name, lr=3e-4, optimizer_kwargs=options).build(model)
        assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
        optimizer, _ = lo.OptimizerFactory(name, optimizer_kwargs={"adamw_lr": 0.5}).build(model)
        assert {group.get("rule"): group["lr"] for group in optimizer.param_groups}["adamw"] == 0.5


MATCHED = {"adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "muon", "lr": 1e-3}, "lr=0.001 of Muon is far below"),
        ({"optimizer": "prodigy", "lr": 3e-4}, "lr=0.0003 of Prodigy is far below what is usual for it, 0.3 to 3"),
        ({"optimizer": "lion", "lr": 1e-2}, "lr=0.01 of Lion is far above"),
        ({"optimizer": "adamw", "lr": 0.1}, "lr=0.1 of AdamW is far above"),
        (
            {"lr": 3e-4, "param_groups": [{"name": "a", "pattern": "x", "rule": "muon"}]},
            "lr=0.0003 of Muon is far below",
        ),
        ({"param_groups": [{"name": "a", "pattern": "x", "lr": 1.0}]}, "lr=1 of AdamW is far above"),
        ({"optimizer": "adamw", "lr": 1e-5}, None),
        ({"optimizer": "sgd", "lr": 1e-3}, None),
        ({"optimizer": "muon", "lr": 1e-3, "optimizer_kwargs": MATCHED}, None),
        ({"optimizer": "torch.optim.AdamW", "lr": 0.1}, None),
    ],
)
@pytest.mark.parametrize("cls", [lo.OptimizerFactory, lo.ConfigureOptimizers])
def test_a_rate_of_another_scale_is_warned_about_where_it_is_written(cls, given, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cls(**given)
    found = [one for one in caught if "usual" in str(one.message)]
    assert [str(one.message).startswith(message or "-") for one in found] == ([True] if message else [])
    assert all(one.filename == __file__ for one in found)


@pytest.mark.parametrize("name", EVERY)
def test_no_default_is_warned_about(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.OptimizerFactory(name)
