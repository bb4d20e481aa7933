"""State of another optimizer class, and of stock optimizers without names: refused, dropped, or taken over by name."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.factory.optimizer_identity import KEY, saved_class
from lightning_optim.factory.unnamed_state import name_parameters
from tests.helpers import bit_equal


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.body(x))))


DATA = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(2))


def _train(model, optimizer, steps=range(3)):
    for step in steps:
        optimizer.zero_grad()
        model(DATA[step]).square().sum().backward()
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def _build(name, model=None, **options):
    model = Model() if model is None else model
    return model, lo.OptimizerFactory(name, lr=0.01, **options).build(model, lo.Horizon(100))[0]


def _saved(name, **options):
    model, optimizer = _build(name, **options)
    _train(model, optimizer)
    return optimizer.state_dict()


def _without_class(state_dict):
    """As versions before 0.2 saved it."""
    return {key: value for key, value in state_dict.items() if key != KEY}


OTHERS = [
    "lion",
    "sgd",
    "lamb",
    "prodigy",
    "muon",
    "schedulefreeadamw",
    "adafactor",
    torch.optim.SGD,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("old", [False, True])
def test_state_of_another_class_is_refused_with_both_and_the_line_to_write(name, old):
    saved = _saved("adamw")
    _, optimizer = _build(name)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf'AdamW, and {type(optimizer).__name__} is conf.*on_resume="config"'):
        optimizer.load_state_dict(_without_class(saved) if old else saved)
    assert bit_equal(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("old", [False, True])
def test_the_configuration_starts_the_other_class_afresh_and_says_so(name, old, capsys):
    saved = _saved("adamw")
    torch.manual_seed(0)
    model, optimizer = _build(name, on_resume="config")
    torch.manual_seed(0)
    alone, fresh = _build(name)
    optimizer.load_state_dict(_without_class(saved) if old else saved)
    told = capsys.readouterr().out
    assert f"Resumed with {type(optimizer).__name__} and a checkpoint of AdamW" in told.replace(
        "Adam or AdamW", "AdamW"
    )
    if name != "muon":  # its vectors are AdamW's
        assert "exp_avg_sq" in told
        assert bit_equal(optimizer.param_groups, fresh.param_groups)
        assert not any(optimizer.state.values()) or bit_equal(optimizer.state_dict(), fresh.state_dict())
        assert bit_equal(_train(model, optimizer), _train(alone, fresh))


def test_what_the_other_class_updates_in_the_same_way_keeps_its_state(capsys):
    saved = _saved("adamw", param_groups=[])
    model, optimizer = _build("muon", on_resume="config")
    optimizer.load_state_dict(saved)
    assert "Resumed with Muon and a checkpoint of AdamW" in (told := capsys.readouterr().out)
    assert "continues" in told
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            assert ("exp_avg_sq" in state) == (group.get("rule") == "adamw")
    _train(model, optimizer)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("radam", torch.optim.RAdam),
        ("nadam", torch.optim.NAdam),
    ],
)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_torchs_class_of_the_same_name_is_the_same_optimizer(one, other, back, old, recwarn):
    kinds = (other, one) if back else (one, other)
    saved = _saved(kinds[0])
    _, optimizer = _build(kinds[1])
    optimizer.load_state_dict(_without_class(saved) if old else saved)
    assert len(optimizer.state) == len(saved["state"])


def test_a_class_derived_from_a_librarys_goes_on_with_its_state():
    class Mine(torch.optim.AdamW):
        pass

    saved = _saved(torch.optim.AdamW)
    for state in (saved, _saved(Mine), _without_class(_saved(Mine))):
        _, optimizer = _build(Mine)
        optimizer.load_state_dict(state)
        assert optimizer.state
    assert saved_class(_build(torch.optim.AdamW)[1], _saved(torch.optim.Adam)) == "Adam"


def test_a_group_whose_rule_is_another_is_refused_or_starts_afresh(capsys):
    def rules(rule):
        return [lo.ParamGroupRule(name="head", part="head", **({"rule": rule} if rule else {}))]

    saved = _saved("adamw", param_groups=rules("lion"))
    model, optimizer = _build("adamw", param_groups=rules(None), on_resume="config")
    optimizer.load_state_dict(saved)
    assert "of Lion" in capsys.readouterr().out
    assert set(optimizer.state[model.body.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer.state.get(model.head.weight)
    _train(model, optimizer)
    moved = [
        lo.ParamGroupRule(name="body", pattern="^body"),
        lo.ParamGroupRule(name="head", pattern="^norm", rule="lion"),
    ]
    _, optimizer = _build("adamw", param_groups=moved)
    with pytest.raises(
        ValueError, match=r"updated by AdamW.*head\.weight \(Lion\)|updated by Lion.*norm\.weight \(AdamW\)"
    ):
        optimizer.load_state_dict(saved)


# Stock optimizers: no names.


def _frozen(model):
    model.body.requires_grad_(False)
    return model


def _tied(model):
    model.copy = nn.Linear(4, 2)
    model.copy.weight = model.head.weight
    return model


def _decay(model):
    return [{"params": [p for p in model.parameters() if (p.ndim > 1) == large]} for large in (True, False)]


CUTS = {
    "all": lambda model: model.parameters(),
    "trainable": lambda model: [p for p in model.parameters() if p.requires_grad],
    "by dimension": _decay,
    "head and body": lambda model: [
        {"params": model.head.parameters()},
        {"params": [p for name, p in model.named_parameters() if not name.startswith("head")]},
    ],
}
STOCK = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("change", [None, _frozen, _tied])
@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_stock_optimizers_state_is_taken_over_by_name(name, cut, change, kind, capsys, recwarn):
    cls, options = STOCK[name]
    model = Model() if change is None else change(Model())
    stock = cls(CUTS[cut](model), lr=0.01, **options)
    _train(model, stock)
    saved, other = copy.deepcopy((stock.state_dict(), model))
    expected = _train(model, stock, range(3, 6))
    _, optimizer = _build(name if kind == "ours" else cls, other, optimizer_kwargs=options)
    assert len(optimizer.param_groups) == 2  # with and without decay
    optimizer.load_state_dict(saved)
    assert capsys.readouterr().out.count("has no names of parameters") == 1
    result = _train(other, optimizer, range(3, 6))
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=2e-6, atol=1e-7)


def test_the_order_that_the_model_had_is_taken_where_it_is_known():
    class Three(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(4)))

    before, now = Three("abc"), Three("cab")
    stock = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9)
    for number, param in enumerate(before.parameters()):
        param.grad = torch.full((4,), float(number))
    stock.step()
    assert name_parameters(stock.state_dict(), now) == [{0: "c", 1: "a", 2: "b"}]
    assert name_parameters(stock.state_dict(), now, list(before.state_dict())) == [{0: "a", 1: "b", 2: "c"}]
    assert name_parameters(stock.state_dict(), now, ["other"]) == [{0: "c", 1: "a", 2: "b"}]


def test_what_could_be_matched_in_more_than_one_way_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    stock = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1:].parameters()}])
    _train_sequential(model, stock)
    _, optimizer = _build("adamw", model)
    with pytest.raises(ValueError, match=r"in more than one order.*param_groups=\[\]"):
        optimizer.load_state_dict(stock.state_dict())
    assert not optimizer.state


def test_what_matches_no_parameters_is_refused_with_both_numbers():
    model = Model()
    stock = torch.optim.AdamW(model.head.parameters())
    _train(model, stock)
    _, optimizer = _build("adamw", model)
    with pytest.raises(ValueError, match="2 parameters without names, and Model has 6 that are trainable, of 6"):
        optimizer.load_state_dict(stock.state_dict())
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2), nn.LayerNorm(4))
    _, optimizer = _build("adamw", other)
    stock = torch.optim.AdamW(model.parameters())
    _train(model, stock)
    with pytest.raises(ValueError, match="do not fit the order of Sequential"):
        optimizer.load_state_dict(stock.state_dict())


def test_the_same_groups_in_the_same_places_are_matched_by_place_where_order_does_not_tell(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    stock = torch.optim.AdamW([{"params": model[:2].parameters()}, {"params": model[2].parameters()}], lr=0.01)
    _train_sequential(model, stock)
    rules = [lo.ParamGroupRule(name="first", pattern=r"^[01]\.")]
    _, optimizer = _build("adamw", model, param_groups=rules)
    optimizer.load_state_dict(stock.state_dict())
    assert "their places in the groups" in capsys.readouterr().out
    assert all(bit_equal(optimizer.state[p]["exp_avg"], stock.state[p]["exp_avg"]) for p in model.parameters())


def _train_sequential(model, optimizer):
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()


@pytest.mark.parametrize("say", ["checkpoint", "config"])
def test_the_rate_of_a_stock_optimizer_is_held_or_replaced_and_reported(say, capsys):
    model = Model()
    stock = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.3)
    _train(model, stock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, optimizer = _build("adamw", model, weight_decay=0.1, schedule="linear", on_resume=say)
        optimizer.load_state_dict(stock.state_dict())
    told = capsys.readouterr().out if say == "config" else str(caught[-1].message)
    assert re.search(r"group default: weight_decay 0\.3 → 0\.1", told)
    assert "group default: lr 0.5 → 0.01" in told
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    assert rates == ([0.5, 0.5] if say == "checkpoint" else [0.01, 0.01])


def test_every_class_of_ours_is_told_from_adamw_by_what_it_saves_or_has_its_name():
    _, adamw = _build("adamw")
    for name in optim.list_optimizers():
        state = _saved(name)
        assert (saved_class(adamw, state) is None) == (name == "adamw")
        assert state[KEY].endswith(optim.get_optimizer_class(name).__name__)
