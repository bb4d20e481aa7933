"""Options that all optimizers share: written once, seen by everything that looks at a constructor."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.optim import FusedOptimizer, SharedOptions, shared_options

NAMES = optim.list_optimizers()


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]


def test_each_option_has_a_default_and_a_documentation() -> None:
    assert SharedOptions.__annotations__.keys() == shared_options.DEFAULTS.keys()
    doc = inspect.getdoc(SharedOptions) or ""
    assert all(f"\n    {name}: " in doc for name in shared_options.DEFAULTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_shows_the_options_it_takes(name: str) -> None:
    cls = optim.get_optimizer_class(name)
    assert issubclass(cls, FusedOptimizer)
    taken = inspect.signature(cls).parameters
    offered = shared_options.DEFAULTS.keys() - cls.refused_options.keys()
    assert offered <= taken.keys()
    assert not cls.refused_options.keys() & taken.keys()
    for option in offered:
        assert taken[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n    {option}: " in (inspect.getdoc(cls) or "")
    (group, *_) = cls(params()).param_groups  # type: ignore[call-arg]
    assert all(group[option] == taken[option].default for option in offered - {"backend"})


@pytest.mark.parametrize("name", NAMES)
def test_a_new_option_is_one_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_options, "DEFAULTS", {**shared_options.DEFAULTS, "lookahead": False})
    monkeypatch.setitem(SharedOptions.__annotations__, "lookahead", bool)
    cls = optim.get_optimizer_class(name)
    assert issubclass(cls, FusedOptimizer)
    assert cls.hyperparameters()["lookahead"] is False
    optimizer = cls(params(), lookahead=True)  # type: ignore[call-arg]
    assert all(group["lookahead"] is True for group in optimizer.param_groups)
    with pytest.raises(TypeError, match=r"'lookahed'. Did you mean 'lookahead'"):
        cls(params(), lookahed=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="lookahead='yes': must be True or False"):
        cls(params(), lookahead="yes")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"unknown key 'lookahed'. Did you mean 'lookahead'"):
        cls([{"params": params(), "lookahed": True}])  # type: ignore[call-arg]
    factory = lo.OptimizerFactory(name, optimizer_kwargs={"lookahead": True})
    assert factory(torch.nn.Linear(3, 3))["optimizer"].param_groups[0]["lookahead"] is True


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_names_the_nearest(name: str) -> None:
    with pytest.raises(TypeError, match=r"'maximise'. Did you mean 'maximize'"):
        optim.get_optimizer_class(name)(params(), maximise=True)  # type: ignore[call-arg]


def test_an_option_that_is_not_offered_says_why() -> None:
    message = "ScheduleFreeAdamW: cautious=True is not offered, because x would no longer be the average of z"
    assert "cautious" not in optim.ScheduleFreeAdamW.hyperparameters()
    assert "\n    cautious: " not in (inspect.getdoc(optim.ScheduleFreeAdamW) or "")
    with pytest.raises(ValueError, match=message):
        optim.ScheduleFreeAdamW(params(), cautious=True)
    with pytest.raises(ValueError, match=message):
        optim.ScheduleFreeAdamW([{"params": params(), "cautious": True}])
    with pytest.raises(ValueError, match=message):
        lo.OptimizerFactory("schedulefreeadamw", optimizer_kwargs={"cautious": True})
    assert optim.ScheduleFreeAdamW(params(), cautious=False).param_groups[0]["cautious"] is False


def test_a_subclass_may_have_other_defaults() -> None:
    class Careful(optim.SGD):
        option_defaults = {"cautious": True}  # noqa: RUF012 - as anyone would write it

    assert Careful.hyperparameters()["cautious"] is True
    assert Careful(params()).param_groups[0]["cautious"] is True
    assert Careful(params()).param_groups[0]["weight_decay_kind"] == "l2"  # SGD's
    assert Careful(params(), cautious=False).param_groups[0]["cautious"] is False


def test_a_user_s_optimizer_gets_them_with_one_line() -> None:
    class Plain(FusedOptimizer):
        """Plain.

        Args:
            params: Parameters.
            lr: Learning rate.
            **options: Shared.
        """

        def __init__(self, params: ParamsT, lr: float = 0.1, **options: Unpack[SharedOptions]) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": 0.0}, **options)

        @classmethod
        def rule(cls, group: Any) -> Any:
            return optim.SGD.rule({**group, "momentum": 0})

    assert list(inspect.signature(Plain).parameters) == ["params", "lr", *shared_options.DEFAULTS]
    assert "\n    cautious: " in (inspect.getdoc(Plain) or "")
    (param,) = weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = Plain(weights, maximize=True)
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 1.1))


def test_a_command_line_and_yaml_take_them() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"})
    given = "{class_path: lightning_optim.optim.Lion, init_args: {cautious: true, state_bits: 8}}"
    parsed = parser.parse_args([f"--optimizer={given}"]).optimizer.init_args
    assert (parsed.cautious, parsed.state_bits) == (True, 8)
    for wrong in ("{cautios: true}", "{cautious: perhaps}"):
        with pytest.raises(jsonargparse.ArgumentError):
            parser.parse_args([f"--optimizer={{class_path: lightning_optim.optim.Lion, init_args: {wrong}}}"])
    flat = jsonargparse.ArgumentParser()
    flat.add_class_arguments(optim.Lion, "lion", skip={"params"})
    assert "point against the" in flat.format_help()
