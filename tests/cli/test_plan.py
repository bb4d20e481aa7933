"""What a plan says of a run besides groups and curves, and the command that shows it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.callbacks._guard.snapshots import parts_of
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.cli import main
from lightning_optim.divergence.snapshots.parts import bytes_needed
from lightning_optim.factory.plan_advice import describe_optimizer
from lightning_optim.factory.plan_text import format_plan
from tests.cli.malformed import GOOD
from tests.helpers import Data, Net, make_trainer


def _configure(optimizer="adamw", lr=None, **options):
    return lo.ConfigureOptimizers(optimizer, lr=lr, **options)


def _loader(count=40, size=8):
    return DataLoader(TensorDataset(torch.randn(count, 4), torch.randn(count, 2)), size)


def _plan(*callbacks, loader=None, model=None, **trainer):
    return make_plan(make_trainer(callbacks=list(callbacks), **trainer), model or Net(), loader or _loader())


@pytest.mark.parametrize("how", ["loader", "dict", "data", "named data", "none"])
def test_the_data_come_as_fit_takes_them(how):
    trainer, given = make_trainer(callbacks=[_configure(schedule="cosine")], max_epochs=2), _loader()
    if how == "loader":
        plan = make_plan(trainer, Net(), given)
    elif how == "dict":
        plan = make_plan(trainer, Net(), {"a": given, "b": _loader(16)})
    elif how == "data":
        plan = make_plan(trainer, Net(), Data(5))
    elif how == "named data":
        plan = make_plan(trainer, Net(), datamodule=Data(5))
    else:
        Own = type("Own", (Net,), {"train_dataloader": lambda self: given})
        plan = make_plan(trainer, Own())
    assert plan.conflicts == []
    assert plan.horizon.total_steps == 10
    with pytest.raises(ValueError, match="train_dataloaders or a datamodule"):
        make_plan(trainer, Net(), given, Data(5))


def test_batch_and_accumulation():
    assert _plan(_configure()).facts["Batch"] == "8 samples"
    accumulated = _plan(_configure(), accumulate_grad_batches=4)
    assert accumulated.facts["Batch"] == "8 samples x 4 accumulated = 32 per step"
    changing = _plan(_configure(), GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)
    assert changing.facts["Batch"] == "8 samples, accumulated over 1 from epoch 0, 4 from epoch 1"
    own = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 2)), batch_sampler=[[0, 1], [2, 3]])
    assert _plan(_configure(), loader=own).facts["Batch"].startswith("unknown samples")


def test_optimizer_schedule_clipping_and_guard():
    plan = _plan(
        _configure("lion", 1e-4, optimizer_kwargs={"betas": (0.8, 0.9), "cautious": True}, schedule="cosine", warmup=2),
        lo.GradientClipping(0.5),
        lo.DivergenceGuard(),
    )
    assert plan.facts["Optimizer"].startswith("lightning_optim.optim.Lion(lr=0.0001, betas=(0.8, 0.9), weight_decay=0")
    assert "cautious=True" in plan.facts["Optimizer"]
    assert plan.facts["Schedule"] == "Cosine(warmup=2)"
    assert plan.facts["Clipping"] == "GradientClipping(max_norm=0.5)"
    assert plan.facts["Guard"].startswith("skips values that are not finite, spikes above 8; then lr x 0.5, rollback")
    assert plan.facts["Snapshots"].startswith("2 of ")
    text = format_plan(plan)
    assert all(f"{label}: " in text for label in plan.facts)
    assert max(map(len, text.splitlines())) <= 80


def test_without_clipping_and_guard_the_plan_says_so():
    facts = _plan(_configure()).facts
    assert (facts["Clipping"], facts["Guard"]) == ("none", "none")
    assert "Snapshots" not in facts
    assert "gradient_clip_val=0.5" in _plan(_configure(), gradient_clip_val=0.5).facts["Clipping"]
    quiet = _plan(_configure(), lo.DivergenceGuard(spikes=None, lr_cut=None, rollback=None, stop=False))
    assert quiet.facts["Guard"] == "skips values that are not finite; then nothing"


def test_the_snapshots_are_as_large_as_those_of_the_fit():
    guard = lo.DivergenceGuard()

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.body: Any = torch.nn.Sequential(torch.nn.Linear(4, 500), torch.nn.Linear(500, 8))

    class Sizes(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.need = bytes_needed(parts_of(trainer, pl_module, guard.hub, guard._guarded))

    sizes = Sizes()
    make_trainer(callbacks=[_configure(), guard, sizes], max_epochs=1).fit(Wide(), _loader())
    shown = _plan(_configure(), lo.DivergenceGuard(), model=Wide()).facts["Snapshots"]
    number, unit = shown.split()[2:4]
    planned = float(number) * {"kB,": 1e3, "MB,": 1e6}[unit]
    assert planned == pytest.approx(sizes.need, rel=0.2)


def test_groups_that_differ_show_betas_and_schedules():
    rules = [{"name": "head", "pattern": "^head", "betas": (0.5, 0.9), "schedule": "linear"}]
    plan = _plan(_configure(schedule="cosine", param_groups=[lo.ParamGroupRule(**rules[0])]))
    assert [group.betas for group in plan.groups] == [(0.5, 0.9), (0.9, 0.999)]
    text = format_plan(plan)
    assert "0.5, 0.9" in text
    assert "betas" in text.splitlines()[8]
    assert "group head Linear()" in plan.facts["Schedule"]
    assert "betas" not in format_plan(_plan(_configure())).partition("group ")[2]


@pytest.mark.parametrize(
    ("optimizer", "lr", "told"),
    [
        ("prodigy", 3e-4, "lr=0.0003 is low for Prodigy"),
        ("lion", 1e-2, "lr=0.01 is high for Lion"),
        ("adamw", 0.5, "lr=0.5 is high for AdamW"),
        ("torch.optim.AdamW", 0.5, "lr=0.5 is high for AdamW"),
        ("sgd", 1e-5, "lr=1e-05 is low for SGD"),
        ("adamw", 1e-3, None),
        ("adamw", 2e-5, None),
        ("torch.optim.Adadelta", 1.0, None),
    ],
)
def test_an_unusual_rate_is_noted(optimizer, lr, told):
    notes = [note for note in _plan(_configure(optimizer, lr)).notes if "usual" in note]
    assert [told in note for note in notes] == ([] if told is None else [True])


def test_muon_is_judged_by_the_scale_that_it_has():
    def notes(lr, **options):
        return [n for n in _plan(_configure("muon", lr, optimizer_kwargs=options)).notes if "usual" in n]

    assert any("lr=0.001 is low for Muon" in note for note in notes(1e-3, adjust_lr_fn="original"))
    assert notes(1e-3, adjust_lr_fn="match_rms_adamw") == []
    assert notes(0.02, adjust_lr_fn="original") == []  # The groups of AdamW have their own.
    assert ["high for AdamW" in note for note in notes(0.02, adjust_lr_fn="original", adamw_lr=0.02)] == [True]


def test_a_multiplier_of_a_group_is_no_unusual_rate():
    rule = lo.ParamGroupRule(name="head", pattern="^head", lr_multiplier=100)
    assert not [note for note in _plan(_configure("adamw", 1e-3, param_groups=[rule])).notes if "usual" in note]


def test_what_a_schedule_free_optimizer_lacks_is_noted():
    def notes(*callbacks, **options):
        return _plan(_configure("schedulefreeadamw", 2.5e-3, **options), *callbacks).notes

    assert len(notes(schedule="cosine")) == 2
    (missing,) = notes(schedule="constant", warmup=2)
    assert "lightning_optim.ScheduleFree" in missing
    (decays,) = notes(lo.ScheduleFree(), schedule="cosine")
    assert "Cosine lowers it as well" in decays
    assert notes(lo.ScheduleFree()) == []


def test_averages_are_shown_with_their_use_and_their_memory():
    def plan(*callbacks, **options):
        return _plan(_configure("adamw", 1e-3, optimizer_kwargs=options), *callbacks)

    averages = {"ema": [0.999, "power 0.05"]}
    used = plan(lo.WeightAverage(1), **averages)
    assert used.facts["Averages"] == "0.999; power 0.05 (for validation and checkpoints)"
    assert not used.notes
    assert not used.conflicts
    (note,) = plan(**averages).notes
    assert "lightning_optim.WeightAverage, validation and checkpoints have the weights of the last step" in note
    (conflict,) = plan(lo.WeightAverage(2), **averages).conflicts
    assert "Invalid which=2" in conflict
    without = plan()
    assert "Averages" not in without.facts
    more = [a.state_bytes - b.state_bytes for a, b in zip(used.groups, without.groups, strict=True)]
    assert more == [2 * 4 * group.numel + 4 * len(group.parameters) for group in used.groups]


def test_an_optimizer_of_torch_is_described_by_its_public_path():
    described = describe_optimizer(torch.optim.Adam([torch.zeros(1)], lr=0.1, amsgrad=True))
    assert described == "torch.optim.Adam(lr=0.1, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=True)"


def test_what_an_override_file_drops_is_noted(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text(GOOD)
    override = {"trainer": {"callbacks": [{"class_path": "lightning_optim.ConfigureOptimizers"}]}}
    (tmp_path / "override.yaml").write_text(yaml.safe_dump(override))
    main(["plan", "--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "override.yaml")])
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "takes the place" in line]
    assert "without GradientClipping, DivergenceGuard, OptimizerMonitor" in note


def test_a_short_run_fills_the_picture():
    lines = format_plan(_plan(_configure(schedule="linear"), loader=_loader(24)), width=40).splitlines()
    assert lines[-3].rstrip().endswith("step 2")
    assert len(lines[-3]) >= 40
