"""Searches: what is refused, what becomes of each trial, of a study that is killed, and of two processes on one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.cli.best_config import write_best
from lightning_optim.cli.fit_config import read_fit
from lightning_optim.cli.known_ranges import KnownRanges
from lightning_optim.tuning.search.claims import Claims, is_dead, this_process
from lightning_optim.tuning.search.methods import make_pruner, make_sampler, open_storage
from lightning_optim.tuning.search.pictures import importances
from lightning_optim.tuning.search.python_search import fit_trial
from lightning_optim.tuning.search.result import SearchResult, Trial
from lightning_optim.tuning.search.search import SearchError, Settings
from lightning_optim.tuning.search.space import Space, SpaceError
from tests.tuning.search_jobs import SPACE, run, run_here

ROOT = Path(__file__).parents[2]

# The space.


def test_a_space_is_read_in_all_its_forms():
    space = Space.read(
        {
            "optim": {
                "lr": {"low": "1e-5", "high": 1e-2, "log": True},
                "warmup": ["1%", 10],
            },  # YAML reads 1e-5 as text
            "model.width": {"low": 32, "high": 256, "step": 32},
            "--optim.weight_decay": "loguniform(1e-4, 0.1)",
            "optim.optimizer.betas": {"choices": [[0.9, 0.95], [0.9, 0.999]]},
        }
    )
    shown = {parameter.path: (parameter.shown(), parameter.whole) for parameter in space}
    assert shown == {
        "optim.lr": ("1e-05 to 0.01, log", False),
        "optim.warmup": ("1%, 10", False),
        "model.width": ("32 to 256, step 32", True),
        "optim.weight_decay": ("0.0001 to 0.1, log", False),
        "optim.optimizer.betas": ("[0.9, 0.95], [0.9, 0.999]", False),
    }
    params = space.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask())
    assert params["model.width"] in range(32, 257, 32)
    assert params["optim.optimizer.betas"] in ([0.9, 0.95], [0.9, 0.999])


CONDITIONAL: dict[str, Any] = {
    "lr": [
        {"low": 0.1, "high": 1.0, "when": {"optimizer": "sgd"}},
        {"low": 1e-4, "high": 1e-2, "log": True, "when": {"optimizer": ["adamw", "lion"]}},
    ],
    "optimizer": ["sgd", "adamw", "lion"],
    "nesterov": {"choices": [True, False], "when": {"optimizer": "sgd"}},
    "power": {"low": 1, "high": 3, "when": {"nesterov": True}},
}


def test_conditions_decide_which_are_used_and_in_which_range():
    space = Space.read(CONDITIONAL)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    seen = set()
    for _ in range(60):
        params = space.suggest(study.ask())
        sgd = params["optimizer"] == "sgd"
        assert 0.1 <= params["lr"] <= 1 if sgd else 1e-4 <= params["lr"] <= 1e-2
        assert ("nesterov" in params) is sgd
        assert ("power" in params) is params.get("nesterov", False)
        seen.add((params["optimizer"], params.get("nesterov")))
    assert len(seen) == 4


def test_corners_have_each_end_and_only_what_is_used_together():
    joint = [params for parameter, _, params in Space.read(CONDITIONAL).corners() if parameter is None]
    seen = {(path, value) for params in joint for path, value in params.items()}
    ends = {("lr", 0.1), ("lr", 1.0), ("lr", 1e-4), ("lr", 1e-2), ("power", 1), ("power", 3)}
    assert seen == ends | {("optimizer", o) for o in CONDITIONAL["optimizer"]} | {
        ("nesterov", True),
        ("nesterov", False),
    }
    for params in joint:
        assert ("nesterov" not in params) or params["optimizer"] == "sgd"
        assert ("power" not in params) or params["nesterov"]
    assert len(joint) < 12


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "The space is empty"),
        ([1], "must be a mapping"),
        ({"x": 3}, "x: 3 is one value. Give a range"),
        ({"x": {"low": 2, "high": 1}}, "x: low=2 must be below high=1."),
        ({"x": {"low": 1, "high": 1}}, "must be below"),
        ({"x": {"low": 0, "high": 1, "log": True}}, "low=0 must be above 0 with log: true"),
        ({"x": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "log and step exclude each other"),
        ({"x": {"low": 0, "high": 1, "step": 2}}, "step=2 must be above 0, and at most 1"),
        ({"x": {"low": 0}}, "x: no 'high'"),
        ({"x": {"low": "a", "high": 1}}, "low must be a number, got 'a'"),
        ({"x": {"low": 0, "high": float("inf")}}, "high must be a finite number"),
        ({"x": {"low": 0, "high": 1, "lgo": True}}, "x: unknown key 'lgo'. Did you mean"),
        ({"x": {"lov": 0, "hihg": 1}}, "x: unknown key 'lov'. Did you mean"),
        ({"x": {"choices": []}}, "choices must be a list"),
        ({"x": {"choices": [1], "low": 0}}, "choices and low given"),
        ({"x": [1, 1]}, "a choice is given twice"),
        ({"x": "auto"}, "no range is known for it"),
        ({"x": {"low": 0, "high": 1, "when": {"y": 1}}}, "when asks for y, which is not searched"),
        ({"x": {"low": 0, "high": 1, "when": {"y": "b"}}, "y": ["a", "c"]}, "y=b, which is none of its choices"),
        ({"x": {"low": 0, "high": 1, "when": {"y": 1}}, "y": {"low": 0, "high": 1}}, "which is a range"),
        ({"x": {"choices": [1, 2], "when": {"y": 1}}, "y": {"choices": [1, 2], "when": {"x": 1}}}, "in a circle"),
        ({"x": [{"low": 0, "high": 1, "when": {"y": 1}}] * 2, "y": [1, 2]}, "two entries apply at once"),
    ],
)
def test_a_wrong_space_is_refused_with_its_path(space, message):
    with pytest.raises(SpaceError) as error:
        Space.read(space)
    assert message in str(error.value)


# A configuration of a user's own.

PROJECT = """
import os, signal, time, lightning.pytorch as L, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(L.LightningModule):
    def __init__(self, width: int = 4, dropout: float = 0.0, how: str = "ok"):
        super().__init__()
        self.how = how
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        if self.how == "raises":
            raise ValueError("no such thing")
        if self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        return loss * float("nan") if self.how == "nan" else loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y) + (float("nan") if self.how == "nan" else 0))

class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        x = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), self.batch_size)

    val_dataloader = train_dataloader
"""
RUN = """
model: search_project.Model
data: search_project.Data
trainer:
  accelerator: cpu
  max_epochs: 2
  callbacks:
    - class_path: lightning_optim.ConfigureOptimizers
      init_args:
        optimizer: adamw
        lr: 0.01
        schedule: cosine
        param_groups: [{name: head, pattern: "^net.3", lr_multiplier: 2.0}]
    - class_path: lightning_optim.GradientClipping
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "search_project.py").write_text(PROJECT)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("search_project", None)
    return tmp_path


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def _refused(project, capsys, space, *flags):
    (project / "space.yaml").write_text(space)
    with pytest.raises(SystemExit):
        main(["search", "--config", "run.yaml", "--space", "space.yaml", "--trials", "1", *flags])
    assert not (project / "search").exists()
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 6
    return error


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "optim.lrr: {low: 1e-4, high: 1e-2}",
            "optim.lrr: 0.0001 is refused. Unknown option --optim.lrr. Did you mean",
        ),
        ("optim.lr: {low: -1, high: 1.0}", "Invalid lr=-1.0 of AdamW: it must be finite and above 0"),
        _slow("optim.optimizer: [adamw, adamv]", "optim.optimizer: adamv is refused."),
        ("model.widht: {low: 4, high: 8}", "Did you mean 'width'?"),
        _slow("model.width: {low: 4.5, high: 8.5}", "model.width: 4.5 is refused"),
        _slow("optim.optimizer.betas: [[0.9, 0.95], [0.9, 1.5]]", "must be 0 <= betas[1] < 1"),
        ("optim.lrr: auto", "no range is known for it: give low and high, or choices. Did you mean 'optim.lr'"),
        ("", "space.yaml is empty: it must have what to search"),
        ("optim.lr: {low: 1\n", "space.yaml, line 2, column 1"),
        ("optim.lr: auto\noptim.lr: auto", "the key optim.lr occurs twice"),
    ],
)
def test_what_the_configuration_refuses_is_refused_before_the_first_trial(project, capsys, space, message):
    assert message in _refused(project, capsys, space)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "tpee"], "Unknown sampler 'tpee'. Did you mean 'tpe'?"),
        (["--pruner", "medain"], "Unknown pruner 'medain'. Did you mean 'median'?"),
        (["--sampler", "grid"], "the range of model.dropout has no step"),
        (["--trials", "0"], "Invalid trials=0"),
        (["--trails", "3"], "Unknown option --trails. Did you mean '--trials'?"),
        (["--steps", "4", "--trainer.max_epochs=3"], "Invalid --trainer.max_epochs with --steps"),
        (["--out", "run.yaml"], "Cannot write to run.yaml: run.yaml is a file."),
        (["--metric", "val_temperature"], "Is a higher val_temperature better?"),
        (["--optim.lrr", "1"], "Unknown option --optim.lrr"),
        (["--storage", "nosql://x"], "Cannot open the storage nosql://x"),
    ],
)
def test_a_wrong_flag_is_refused(project, capsys, flags, message):
    (project / "space.yaml").write_text("model.dropout: {low: 0.0, high: 0.5}")
    with pytest.raises(SystemExit):
        main(["search", "--config", "run.yaml", "--space", "space.yaml", *flags])
    assert message in capsys.readouterr().err


def test_without_a_file_of_a_space_an_example_is_shown(project, capsys):
    with pytest.raises(SystemExit):
        main(["search", "--config", "run.yaml"])
    assert "optim.lr: auto" in capsys.readouterr().err


def test_ranges_that_are_known_are_those_of_each_optimizer(project):
    of_fit = ["--config", "run.yaml"]
    known = KnownRanges(of_fit)
    assert known("optim.lr", {}) == [{"low": 1e-5, "high": 3e-3, "log": True}]
    entries = known("optim.lr", {"optim.optimizer": ["adamw", "sgd", "nadamw"]})
    assert [(e["high"], e["when"]["optim.optimizer"]) for e in entries] == [(3e-3, ["adamw", "nadamw"]), (1.0, ["sgd"])]
    decays = known("optim.weight_decay", {"optim.optimizer": {"choices": ["adamw", "sgd"]}})
    assert [each["high"] for each in decays] == [0.3, 1e-3]
    space = Space.read({"optim.optimizer": ["adamw", "sgd"], "optim.lr": "auto", "clip.max_norm": "auto"}, known)
    names = ["optim.optimizer", "clip.max_norm", "optim.lr (optim.optimizer=adamw)", "optim.lr (optim.optimizer=sgd)"]
    assert [parameter.name for parameter in space] == names


def test_integers_are_drawn_only_where_nothing_else_is_accepted(project):
    from lightning_optim.cli.search import check_space, read_space

    (project / "space.yaml").write_text(
        "model.dropout: {low: 0, high: 1}\nmodel.width: {low: 2, high: 8}\ntrainer.max_epochs: {low: 1, high: 3}\n"
    )
    space = read_space("space.yaml", ["--config", "run.yaml"])
    assert {p.path: p.whole for p in space} == {"model.dropout": False, "model.width": True, "trainer.max_epochs": True}
    check_space(space, ["--config", "run.yaml"])


FLAGS = [
    ["--optim.lr=0.003", "--clip.max_norm=0.3", "--clip.method=zclip", "--seed_everything=7"],
    ["--optim.optimizer=nadamw", "--optim.weight_decay=0.3", "--clip=false", "--guard=true"],
    ["--optim.optimizer.betas=[0.8, 0.9]", "--optim.schedule.final=0.2", "--optim.warmup=5%", "--monitor={}"],
    ["--optim.param_groups.head.lr_multiplier=5.0", "--guard.spikes.threshold=5.0", "--model.width=8"],
    ["--model.dropout=0.5", "--data.batch_size=32", "--trainer.accumulate_grad_batches=2"],
    [],
]


@pytest.mark.parametrize("flags", [*FLAGS[:2], *map(_slow, FLAGS[2:])], ids=str)
def test_the_best_configuration_is_a_file_that_changes_what_the_flags_do(project, flags):
    of_fit = ["--config", "run.yaml"]
    assert write_best(Path("best.yaml"), of_fit, flags, "Trial 1") == []
    by_file, by_flags = (read_fit([*of_fit, *more]).data for more in (["--config", "best.yaml"], flags))
    assert {**by_file, "config": None} == {**by_flags, "config": None}
    assert not flags or by_file["trainer"] | by_file["model"] | by_file["data"]


# Trials, without torch.


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process."""
    monkeypatch.setattr("lightning_optim.tuning.search.search.run_jobs", run_here)


def test_each_trial_has_its_end_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_optim.tuning.search.search._HOPELESS", 99)
    hows = ["ok", "raises", "memory", "dies", "nan", "slow"]
    space = {"how": hows, "x": [0.1, 0.3]}
    found = run(str(tmp_path), space, sampler="grid", trials=50)
    statuses = {(trial.params["how"], trial.params["x"]): trial.status for trial in found.trials}
    of = {"ok": "finished", "raises": "failed", "memory": "out of memory", "dies": "killed", "slow": "timed out"}
    of["nan"] = "diverged"
    assert statuses == {(how, x): of[how] for how in hows for x in (0.1, 0.3)}  # the grid, each point once
    assert (found.best.params, found.best.value) == ({"how": "ok", "x": 0.3}, pytest.approx(0.2))
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert len(rows) == 12
    assert {row["error"] for row in rows if row["how"] == "raises"} == {"ValueError: no such thing"}
    assert "12 trials: " in found.table()
    states = optuna.load_study(study_name="search", storage=open_storage(found.storage)).get_trials()
    by_how = {trial.params["how"]: trial.state.name for trial in states if "surplus" not in trial.user_attrs}
    assert by_how == {
        "ok": "COMPLETE", "raises": "FAIL", "dies": "FAIL", "memory": "PRUNED", "nan": "PRUNED", "slow": "PRUNED"
    }  # fmt: skip


def test_a_study_is_continued_to_its_number_of_trials_and_by_the_same_search_only(tmp_path, here):
    first = run(str(tmp_path), SPACE, trials=3, seed=0)
    assert [trial.number for trial in first.trials] == [0, 1, 2]
    second = run(str(tmp_path), SPACE, trials=5)
    assert second.trials[:3] == first.trials
    assert len(second.trials) == 5
    with pytest.raises(ValueError, match="was made with another space"):
        run(str(tmp_path), {**SPACE, "x": {"low": 0.0, "high": 2.0}}, trials=6)
    with pytest.raises(ValueError, match="was made with another metric and mode"):
        run(str(tmp_path), SPACE, trials=6, metric="val_acc")
    other = run(str(tmp_path), SPACE, trials=2, metric="val_acc", study="other")
    assert other.best.value == max(trial.value for trial in other.trials)
    assert other.mode == "max"


def test_trials_are_pruned_by_their_validations(tmp_path, here):
    space = {"x": {"low": 0.0, "high": 1.0}}
    found = run(str(tmp_path), space, trials=12, seed=1, pruner="median")
    pruned = [trial for trial in found.trials if trial.status == "pruned"]
    assert pruned
    best = found.best.params["x"]
    assert all(abs(trial.params["x"] - 0.3) > abs(best - 0.3) for trial in pruned)
    for trial in pruned:
        lines = (tmp_path / "trials" / f"trial_{trial.number:04d}" / "validation.jsonl").read_text().splitlines()
        assert len(lines) < 5


def test_a_misspelt_metric_ends_the_search_and_not_the_study(tmp_path, here):
    with pytest.raises(SearchError, match=r"Validation logs no 'val_los'. Did you mean 'val_loss'"):
        run(str(tmp_path), SPACE, trials=3, metric="val_los", mode="min")
    assert len(run(str(tmp_path), SPACE, trials=2).trials) == 2


def test_a_search_in_which_nothing_trains_ends(tmp_path, here):
    with pytest.raises(SearchError, match=r"The first 3 trials have failed. trial_0000: failed. ValueError: no such"):
        run(str(tmp_path), {"x": {"low": 0.0, "high": 1.0}, "how": ["raises"]}, trials=20)
    assert len(run(str(tmp_path / "late"), SPACE, pause=0.1, trials=50, seconds=0.8).trials) < 10


def _start(folder, **settings):
    command = [sys.executable, "-m", "tests.tuning.search_jobs", str(folder), json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def _wait(what, seconds=60):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("journal", marks=pytest.mark.slow)])
def test_two_processes_share_a_study_and_a_killed_one_loses_nothing(tmp_path, kind):
    storage = {"sqlite": f"sqlite:///{tmp_path}/study.db", "journal": f"journal:{tmp_path}/study.log"}[kind]
    settings = {"storage": storage, "trials": 6}
    first = _start(tmp_path / "a", pause=0.5, **settings)
    victim = tmp_path / "a" / "trials"
    _wait(lambda: list(victim.glob("*/validation.jsonl")))
    second = _start(tmp_path / "b", pause=0.02, **settings)
    _wait(lambda: list((tmp_path / "b" / "trials").glob("*")))
    first.kill()
    first.wait()
    assert second.wait(120) == 0
    study = optuna.load_study(study_name="search", storage=open_storage(storage))
    lost = [trial for trial in study.trials if "lost" in trial.user_attrs]
    assert lost
    assert all(trial.state.name == "FAIL" for trial in lost)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    retried = {tuple(trial.params.items()) for trial in done if "retry_of" in trial.user_attrs}
    assert {tuple(trial.params.items()) for trial in lost} == retried
    assert len(done) == 6


def test_a_process_is_known_to_be_dead_on_this_machine_only():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = this_process()
    assert not is_dead(me)
    host, _, started = me.rsplit(":", 2)
    other = f"{host}:{child.pid}:{started}"
    assert is_dead(other)  # its id belongs to another process now
    child.kill()
    child.wait()
    assert is_dead(other)
    assert not is_dead(f"elsewhere:{child.pid}:{started}")


def test_a_process_elsewhere_is_dead_after_a_time_without_a_beat(tmp_path):
    storage = open_storage(f"journal:{tmp_path}/study.log")
    study = optuna.create_study(storage=storage)
    lost = study.ask()
    lost.suggest_float("x", 0, 1)
    lost.set_user_attr("owner", "elsewhere:1:2")
    claims = Claims(study, storage, interval=0.05, grace=0.4)
    try:
        claims.take(mine := study.ask())
        assert claims.recover() == []
        for beat in range(4):  # it lives
            time.sleep(0.15)
            lost.set_user_attr("beat", beat)
            assert claims.recover() == []
        time.sleep(0.5)
        assert claims.recover() == [0]
        assert mine.user_attrs["beat"] > 0
        again = study.ask()
        assert again.suggest_float("x", 0, 1) == lost.params["x"]
        assert again.user_attrs["retry_of"] == [0]
    finally:
        claims.close()
    claims.release()  # as after Ctrl-C
    assert study.trials[1].state.name == "FAIL"


# What is shown.


def _result(trials, mode="min", folder=Path()):
    return SearchResult(folder, "s", "memory", "val_loss", mode, tuple(trials))


def test_importances_join_the_ranges_of_one_hyperparameter():
    space = Space.read(
        {
            "optimizer": ["sgd", "adamw"],
            "lr": [
                {"low": 0.1, "high": 1.0, "when": {"optimizer": "sgd"}},
                {"low": 1e-4, "high": 1e-2, "log": True, "when": {"optimizer": "adamw"}},
            ],
            "nothing": {"low": 0, "high": 10},
            "power": {"low": 0, "high": 9, "when": {"optimizer": "sgd"}},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    trials = []
    for number in range(40):
        params = space.suggest(study.ask())
        sgd = params["optimizer"] == "sgd"
        place = (params["lr"] - 0.1) / 0.9 if sgd else (torch.tensor(params["lr"]).log10().item() + 4) / 2
        trials.append(Trial(number, "finished", (place - 0.5) ** 2, params))
    found = importances(_result(trials), space)
    assert set(found) == {"lr", "optimizer", "nothing"}
    assert found["lr"] > 0.7
    assert importances(_result(trials[:3]), space) == {}
    assert _result(trials, "max").best.value == max(trial.value for trial in trials)


def test_samplers_and_pruners_of_optuna_are_found_by_name():
    space = Space.read({"x": {"low": 0, "high": 4}})
    for name in ("tpe", "random", "gp", "qmc", "grid", "NSGAIISampler"):
        assert isinstance(make_sampler(name, space, seed=1), optuna.samplers.BaseSampler)
    for name in ("median", "hyperband", "halving", "percentile", "none", "SuccessiveHalvingPruner"):
        assert isinstance(make_pruner(name), optuna.pruners.BasePruner)
    with pytest.raises(ValueError, match="it needs arguments"):
        make_pruner("PatientPruner")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="mode='up'"):
        Settings(mode="up")
    with pytest.raises(ValueError, match="seconds=0"):
        Settings(seconds=0)
    assert [Settings(metric="val_acc").higher, Settings().higher, Settings(mode="max").higher] == [True, False, True]


# Fits.


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


def describe_fit(params):
    """What `lo.search` is given."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    optim = lo.ConfigureOptimizers(optimizer=params["optimizer"], lr=params["lr"])
    trainer = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0}
    loaders = (DataLoader(data, 8), DataLoader(data, 32))
    return {"model": Line(), "data": loaders, "callbacks": [optim], "trainer": trainer}


def test_a_trial_of_a_function_fits_what_it_describes(tmp_path):
    fit_trial(tmp_path, describe_fit, {"optimizer": "sgd", "lr": 0.05}, 6, 2, 0)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[1]["metrics"]["val_loss"] < lines[0]["metrics"]["val_loss"]
    with pytest.raises(TypeError, match="must return a mapping with 'model' and 'data'"):
        fit_trial(tmp_path, lambda params: None, {}, 1, None, 0)
    with pytest.raises(ValueError, match="Invalid key 'trainr'"):
        fit_trial(tmp_path, lambda params: {"model": 1, "data": 2, "trainr": 3}, {}, 1, None, 0)


@pytest.mark.slow
def test_a_function_is_searched(tmp_path):
    space = {"optimizer": ["sgd", "adamw"], "lr": "loguniform(1e-3, 0.1)"}
    found = lo.search(describe_fit, space, tmp_path, trials=4, steps=8, validations=2, seed=0, progress=False)
    assert [trial.status for trial in found.trials if trial.status not in ("finished", "pruned")] == []
    assert set(found.best.params) == {"optimizer", "lr"}
    assert {path.name for path in found.pictures} <= {"history.png", "importance.png"}


@pytest.mark.slow
def test_the_command_searches_a_users_own_module_and_survives_what_trials_do(project, capsys):
    (project / "space.yaml").write_text(
        "model.how: [ok, raises, memory, dies, nan]\noptim.optimizer: [adamw, sgd]\n"
        "optim.lr: auto\nmodel.width: {low: 2, high: 8, step: 2}\n"
    )
    command = ["search", "--config", "run.yaml", "--space", "space.yaml", "--steps", "8", "--validations", "2"]
    command += ["--sampler", "random", "--seed", "3"]
    main([*command, "--trials", "14"])
    out = capsys.readouterr().out
    assert "lightning-optim fit --config run.yaml --config search/best.yaml" in out
    rows = list(csv.DictReader((project / "search" / "trials.csv").open()))
    of = {"ok": {"finished", "pruned"}, "raises": {"failed"}, "memory": {"out of memory"}, "dies": {"killed"}}
    of["nan"] = {"diverged"}
    assert len(rows) == 14
    assert {row["model.how"] for row in rows} == set(of)
    assert all(row["status"] in of[row["model.how"]] for row in rows)
    main([*command, "--trials", "15"])
    assert "15 trials" in capsys.readouterr().out
    for name in ("history.png", "best.yaml", "study.db"):
        assert (project / "search" / name).stat().st_size > 0
    main(["fit", "--config", "run.yaml", "--config", "search/best.yaml", "--trainer.max_epochs", "1"])
