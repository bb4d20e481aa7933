"""Installed packages bring classes of their own by entry points: here distributions as pip leaves them on the path."""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.clipping.choice import CLIP_RULES
from lightning_optim.diagnostics import DIAGNOSTICS
from lightning_optim.divergence import DETECTORS
from lightning_optim.optim.base import OPTIMIZERS
from lightning_optim.schedules.registry import SCHEDULES

pytestmark = pytest.mark.usefixtures("own_names")

MODULE = """
import torch
import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.diagnostics import GradNorm
from lightning_optim.divergence import NonFiniteGradient


class Tigress(lo.optim.Lion):
    '''A sign descent of another package.'''


class Plain(torch.optim.SGD):
    '''A class of torch's kind.'''


class Ramp(lo.schedules.Constant):
    '''A schedule of another package.'''


class Soft(GlobalNorm):
    '''A clip rule of another package.'''


class Alert(NonFiniteGradient):
    '''A detector of another package.'''


class Norms(GradNorm):
    '''A diagnostic of another package.'''


class Cubed(lo.optim.DecayKind):
    '''A kind of decay of another package.'''

    @staticmethod
    def pull(param, delta):
        return param * param * param
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that makes a distribution: its name, its module, and the text of its entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(package, module, text, entry_points):
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def brought(install):
    install(
        "tiger-optim",
        "tiger_optim_module",
        MODULE,
        """
        [lightning_optim.optimizers]
        tigress = tiger_optim_module:Tigress
        plain_of_tiger = tiger_optim_module:Plain
        [lightning_optim.schedules]
        ramp = tiger_optim_module:Ramp
        [lightning_optim.clip_rules]
        soft = tiger_optim_module:Soft
        [lightning_optim.detectors]
        alert = tiger_optim_module:Alert
        [lightning_optim.diagnostics]
        norms = tiger_optim_module:Norms
        [lightning_optim.weight_decay_kinds]
        cubed = tiger_optim_module:Cubed
        l1 = tiger_optim_module:Cubed
        """,
    )


def test_an_entry_point_of_each_kind_is_found_by_name_and_loaded_when_it_is_used(brought):
    for registry, name, cls in (
        (OPTIMIZERS, "tigress", "Tigress"),
        (SCHEDULES, "ramp", "Ramp"),
        (CLIP_RULES, "soft", "Soft"),
        (DETECTORS, "alert", "Alert"),
        (DIAGNOSTICS, "norms", "Norms"),
    ):
        sys.modules.pop("tiger_optim_module", None)
        assert name in registry.names()
        assert "tiger_optim_module" not in sys.modules  # a name alone imports nothing
        assert registry.get(name).__name__ == cls
        assert name in registry


def test_a_kind_of_decay_is_found_by_name_and_those_of_ours_stay_ours(brought):
    weight = nn.Parameter(torch.full((2,), 2.0))
    weight.grad = torch.zeros(2)
    owners = r"'l1' belongs to .*WeightDecayKind, so tiger_optim_module.Cubed of .*'tiger-optim'"
    with pytest.warns(UserWarning, match=owners):
        lo.optim.SGD([weight], lr=0.1, weight_decay=0.5, weight_decay_kind="cubed").step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 2 - 0.05 * 8))


def test_a_package_that_brings_names_is_not_imported_for_ours(brought):
    lo.OptimizerFactory("adamw", lr=1e-3, schedule="cosine").build(nn.Linear(2, 2), lo.Horizon(total_steps=9))
    assert "tiger_optim_module" not in sys.modules


def test_its_names_work_where_ours_do(brought, capsys):
    model = nn.Linear(2, 2)
    optimizer, _ = lo.OptimizerFactory("tigress", lr=1e-3, schedule="ramp").build(model)
    assert type(optimizer).__name__ == "Tigress"
    grouped = lo.optim.AdamW([{"params": [model.weight], "rule": "tigress", "lr": 0.25}], weight_decay=0)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    grouped.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full((2, 2), 0.25))
    assert type(lo.GradientClipping(method="soft", max_norm=1.0).clip_rule()).__name__ == "Soft"
    assert [type(d).__name__ for d in lo.DivergenceGuard(detectors=["alert"]).extra_detectors] == ["Alert"]
    assert [type(d).__name__ for d in lo.OptimizerMonitor(diagnostics=["norms"]).diagnostics] == ["Norms"]
    main(["list", "optimizers", "tigress"])
    assert "tigress" in capsys.readouterr().out
    main(["list", "schedules", "ramp"])
    assert "A schedule of another package." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import a_module_that_is_not_there\n", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("raise SystemError('out of order')\n", "SystemError: out of order"),
        ("class Other: pass\n", "AttributeError"),
        ("class Broken: pass\n", "must be a Optimizer class"),
    ],
)
def test_a_broken_package_is_a_warning_with_its_name_and_breaks_nothing(install, text, reason):
    entries = "[lightning_optim.optimizers]\nbroken = broken_optim_module:Broken\n"
    install("broken-optim", "broken_optim_module", text, entries)
    with pytest.warns(UserWarning, match="'broken-optim' offers the optimizer 'broken', which cannot") as told:
        assert "adamw" in lo.optim.list_optimizers()
    assert reason in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "broken" not in lo.optim.list_optimizers()  # once
        lo.OptimizerFactory("adamw", lr=1e-3)
    with pytest.raises(ValueError, match="Unknown optimizer 'broken'"):
        lo.optim.get_optimizer_class("broken")


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd"])
def test_a_name_of_ours_stays_ours_and_both_owners_are_named(install, name):
    install("greedy-optim", "greedy_module", MODULE, f"[lightning_optim.optimizers]\n{name} = greedy_module:Tigress\n")
    owner = lo.optim.AdamW if name.lower() == "adamw" else lo.optim.SGD
    message = rf"'{name}' belongs to {owner.__module__}.{owner.__name__}, so greedy_module.Tigress of .*'greedy-optim'"
    with pytest.warns(UserWarning, match=message):
        assert lo.optim.get_optimizer_class(name) is owner
    assert "greedy_module" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lo.optim.get_optimizer_class(name) is owner


def test_a_name_that_two_packages_bring_is_the_first_s_and_both_are_named(install):
    for each in ("first", "second"):
        entries = f"[lightning_optim.optimizers]\ntwice = {each}_module:Tigress\n"
        install(f"{each}-optim", f"{each}_module", MODULE, entries)
    with pytest.warns(UserWarning, match=r"'twice' belongs to (\w+)_module\.Tigress of .*'\1-optim', so ") as told:
        cls = lo.optim.get_optimizer_class("twice")
    assert str(told[0].message).count("installed package") == 2
    assert f"belongs to {cls.__module__}.Tigress" in str(told[0].message)


def test_a_class_of_one_s_own_does_not_take_the_name_of_a_package(brought):
    class Tigress(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match=r"belongs to tiger_optim_module\.Tigress of .*'tiger-optim': choose"):
        lo.register(Tigress)


def test_a_package_may_register_and_bring_the_same_class(install):
    text = f"{MODULE}\nlo.register(Tigress)\n"
    install("both-optim", "both_module", text, "[lightning_optim.optimizers]\ntigress = both_module:Tigress\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lo.optim.get_optimizer_class("tigress")
        assert found is sys.modules["both_module"].Tigress
        OPTIMIZERS.remove("tigress")
        assert lo.optim.get_optimizer_class("tigress") is found


def test_a_package_that_is_installed_while_we_run_is_found(install):
    with pytest.raises(ValueError, match="Unknown optimizer 'late_tigress'"):
        lo.optim.get_optimizer_class("late_tigress")
    install("late-optim", "late_module", MODULE, "[lightning_optim.optimizers]\nlate_tigress = late_module:Tigress\n")
    assert lo.optim.get_optimizer_class("late_tigress").__module__ == "late_module"


@pytest.mark.parametrize(
    ("room", "base", "registry"),
    [
        (lo.optim, torch.optim.SGD, OPTIMIZERS),
        (lo.schedules, lo.schedules.Constant, SCHEDULES),
        (lo.clipping, lo.clipping.GlobalNorm, CLIP_RULES),
        (lo.divergence, lo.divergence.NonFiniteGradient, DETECTORS),
        (lo.diagnostics, lo.diagnostics.GradNorm, DIAGNOSTICS),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_each_room_registers_its_kind_alone(room, base, registry):
    @room.register("of_room")
    class Own(base):  # type: ignore[valid-type, misc]
        pass

    @room.register(name="named")
    class Named(base):  # type: ignore[valid-type, misc]
        pass

    @room.register
    class ByClassName(base):  # type: ignore[valid-type, misc]
        pass

    assert [registry.get(name) for name in ("of_room", "named", "by_class_name")] == [Own, Named, ByClassName]
    with pytest.raises(TypeError, match=f"must be a {registry.base.__name__} class"):
        room.register(nn.Linear)


def test_the_decorator_for_all_kinds_takes_a_name_as_well():
    @lo.register("ramp_of_mine")
    class Ramp(lo.schedules.Constant):
        pass

    assert lo.schedules.get_schedule("ramp-of-mine") is Ramp
