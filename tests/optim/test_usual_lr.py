"""The usual learning rates, which `lightning-optim list` shows and `plan` compares with."""

from __future__ import annotations

import inspect

import pytest

from lightning_optim import optim
from lightning_optim.optim import FusedOptimizer

NAMES = sorted(optim.list_optimizers())


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_has_a_usual_rate(name):
    cls = optim.get_optimizer_class(name)
    assert issubclass(cls, FusedOptimizer)
    assert "usual_lr" in vars(cls)
    low, high = cls.usual_lr
    assert 0 < low < high
    low, high = cls.usual_lr_of(cls.hyperparameters())
    default = inspect.signature(cls).parameters["lr"].default
    assert low <= default <= high


@pytest.mark.parametrize("cls", [optim.Muon, optim.NorMuon])
def test_the_usual_rate_of_an_orthogonalised_group_depends_on_its_scale(cls):
    assert cls.usual_lr_of({"adjust_lr_fn": None}) == cls.usual_lr
    assert cls.usual_lr_of({"adjust_lr_fn": "match_rms_adamw"}) == optim.AdamW.usual_lr


def test_an_optimizer_of_a_user_needs_none(own_names):
    class Own(FusedOptimizer):
        """A user's."""

    assert Own.usual_lr is None
    assert Own.usual_lr_of({}) is None
