"""Rules that get only a part of what they match."""

from __future__ import annotations

import logging

import pytest
from torch import nn

import lightning_optim as lo
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.param_groups import lost_matches
from tests.helpers import Net, batches, make_trainer

BODY = {"name": "body", "pattern": "^body", "frozen_until": "2 epochs", "lr_multiplier": 0.1}
NOTE = (
    "Parameter group rule 'body' matches 'body.bias', which the earlier rule 'no_decay' has taken: "
    "frozen_until='2 epochs', lr_multiplier=0.1 would be for it, and is not."
)


def rule(**options):
    return lo.ParamGroupRule(**options)


@pytest.fixture
def printed(caplog):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_plan_and_fit_say_the_same_note(printed):
    callbacks = [lo.ConfigureOptimizers("sgd", lr=0.1, param_groups=["no_decay", rule(**BODY)])]
    make_trainer(callbacks, max_epochs=3).fit(Net(), batches(2))
    (said,) = {record.getMessage() for record in printed.records if "Parameter group rule" in record.getMessage()}
    assert said.startswith(NOTE)
    model = Net()
    model.train_dataloader = lambda: batches(2)
    plan = make_plan(make_trainer(callbacks, max_epochs=3), model)
    assert plan.notes == [said]
    assert plan.conflicts == []


def test_the_row_of_backbone_finetuning_works_behind_the_preset():
    for rules in (["no_decay", rule(**BODY, overlay=True)], [rule(**BODY, overlay=True), "no_decay"]):
        model = Net()
        assert lost_matches(model, rules) == []
        groups = lo.build_param_groups(model, rules)
        frozen = {name for group in groups for name, _ in group["params"] if group.get("frozen_until") == "2 epochs"}
        assert frozen == {"body.weight", "body.bias"}
        (bias,) = [group for group in groups if "body.bias" in dict(group["params"])]
        assert (bias["weight_decay"], bias["lr_multiplier"]) == (0, 0.1)


HEAD = rule(name="head", pattern="^head", lr_multiplier=2)
UNDECAYED = rule(name="undecayed", max_ndim=1, weight_decay=0)
CUT = rule(name="cut", max_ndim=1, weight_decay=0, overlay=True)
TWO = [HEAD, rule(name="body", pattern="^body", lr=0.1), rule(name="all", max_ndim=2, lr=0.3)]
BIASES = [rule(name="biases", pattern="bias"), rule(name="vectors", max_ndim=1, betas=(0.1, 0.2))]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([HEAD, "no_decay"], ["'no_decay' matches 'head.bias', which the earlier rule 'head'"]),  # a preset loses, too
        ([UNDECAYED, "no_decay"], []),  # what the earlier one sets alike is not lost
        ([rule(name="norm", part="norm", weight_decay=0, lr=1.0), "no_decay"], []),
        ([rule(name="norm", part="norm", weight_decay=0.1), "no_decay"], ["'norm.weight', 'norm.bias', which"]),
        (
            BIASES,
            ["'body.bias', 'norm.bias', 'head.bias', which the earlier rule 'biases' has taken: betas=(0.1, 0.2)"],
        ),
        (TWO, ["'all' matches 'head.weight', 'head.bias', which", "'all' matches 'body.weight', 'body.bias', which"]),
        ([HEAD, UNDECAYED, CUT], []),  # the overlay gives what is lost
        ([HEAD, rule(name="vectors", max_ndim=1, schedule="cosine")], ["schedule=Cosine()"]),
    ],
)
def test_what_is_lost_is_named(rules, expected):
    notes = lost_matches(Net(), rules)
    assert len(notes) == len(expected)
    for note, part in zip(notes, expected, strict=True):
        assert part in note


def test_many_are_counted_and_frozen_ones_are_not_lost():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    rules = [rule(name="biases", pattern="bias"), rule(name="all", max_ndim=2, lr=0.1)]
    (note,) = lost_matches(model, rules)
    assert "'4.bias' and 4 more" in note
    for layer in model[1:]:  # type: ignore[attr-defined]
        layer.bias.requires_grad_(False)
    (note,) = lost_matches(model, rules)
    assert "matches '0.bias', which" in note


def test_a_rule_that_gets_nothing_stays_an_error():
    rules = [rule(name="all", max_ndim=2), rule(name="head", pattern="^head", lr=0.1)]
    with pytest.raises(ValueError, match=r"'head\.weight' went to 'all'"):
        lo.OptimizerFactory("sgd", lr=0.1, param_groups=rules).build(Net())
