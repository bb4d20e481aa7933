"""Comparisons: fairness that is checked, verdicts that know noise, and a process that stays as it was."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.cli.compare import read_variants
from lightning_optim.tuning.compare.curves import binned, levels, spread_of
from lightning_optim.tuning.compare.metric import Metric, choose_metric
from lightning_optim.tuning.compare.outcome import Comparison
from lightning_optim.tuning.compare.page import summary, write_comparison
from lightning_optim.tuning.compare.paired import paired, t_quantile
from lightning_optim.tuning.compare.rates import tune_rates
from lightning_optim.tuning.compare.study import Settings, run_comparison
from lightning_optim.tuning.runs import Job, JobResult
from lightning_optim.tuning.runs.lock import lock
from lightning_optim.tuning.runs.records import CURVE_FILE, VALIDATION_FILE
from tests.helpers import make_trainer
from tests.tuning.jobs import Points, Small

TRAINER = {"accelerator": "cpu", "num_sanity_val_steps": 0}
VARIANTS = {
    "sgd": {"optim": {"optimizer": "sgd", "lr": 0.05}},
    "adamw": {"optim": {"optimizer": "adamw", "lr": 0.05, "schedule": "linear"}, "clip": {"max_norm": 1.0}},
    "broken": {"optim": {"optimizer": "sgd", "lr": 1e12}},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison from Python, and a fit behind it that is that of a process without one."""
    alone = _fitted(lambda: None)
    found = []

    def compare():
        before = _state()
        folder = tmp_path_factory.mktemp("compare")
        options = {"seeds": 2, "steps": 12, "validations": 3, "trainer": TRAINER, "progress": False, "workers": 1}
        found.append(lo.compare(Small, Points, VARIANTS, base={"clip": {"max_norm": 5.0}}, folder=folder, **options))
        assert str(_state()) == str(before)

    behind = _fitted(compare)
    assert all(torch.equal(alone[name], behind[name]) for name in alone)
    return found[0]


def _fitted(then):
    torch.manual_seed(3)
    model, data = Small(), Points()
    optim = lo.ConfigureOptimizers(optimizer="adamw", lr=0.05)
    lo.attach(model, optim)
    then()
    make_trainer([optim], max_epochs=1).fit(model, data)
    return model.state_dict()


def _state():
    numpy = np.random.get_state()[1].tolist()
    return torch.random.get_rng_state().tolist(), random.getstate(), numpy, torch.get_num_threads(), dict(os.environ)


def test_variants_of_a_seed_start_alike_and_what_diverges_is_told(compared):
    of_seed = {seed: [compared.results[name][seed].facts for name in VARIANTS] for seed in (0, 1)}
    for facts in of_seed.values():
        assert len({each["weights"] for each in facts}) == 1
        assert len({tuple(each["batches"]) for each in facts}) == 1
    assert of_seed[0][0]["weights"] != of_seed[1][0]["weights"]
    assert [compared.results["broken"][seed].status for seed in (0, 1)] == ["diverged", "diverged"]
    assert [compared.results[name][0].steps for name in ("sgd", "adamw")] == [12, 12]
    assert compared.ranking[-1] == "broken"
    words = " ".join(sentence for _, sentence in compared.verdict())
    assert "same initial weights and the same first batches (checked)" in words
    assert "broken: seed 0 diverged, seed 1 diverged" in words
    assert "--tune-lr" in words
    assert compared.metric == Metric("val_loss")


def test_page_and_table_have_all_that_was_measured(compared):
    page = compared.page.read_text()
    for text in (
        "val_loss by steps",
        "val_loss by seconds",
        "Training loss by steps",
        "ms per step",
        "sgd",
        "lr: 0.05",
    ):
        assert text in page
    rows = list(csv.DictReader((compared.folder / "results.csv").open()))
    assert [(row["variant"], row["seed"]) for row in rows] == [(name, str(s)) for name in VARIANTS for s in (0, 1)]
    assert float(rows[0]["best"]) == pytest.approx(compared.bests("sgd")[0])
    assert int(rows[2]["state_bytes"]) > int(rows[0]["state_bytes"] or 0)
    assert rows[0]["initial_weights"] == rows[2]["initial_weights"] != rows[1]["initial_weights"]
    assert {path.suffix for path in compared.folder.iterdir() if path.is_file()} >= {".html", ".csv", ".png"}


def test_wrong_variants_are_refused_before_anything_runs(tmp_path):
    def refused(variants, **options):
        return lo.compare(Small, Points, variants, folder=tmp_path / "runs", **options)

    good = VARIANTS["sgd"]
    with pytest.raises(ValueError, match=r"Unknown key 'optm' of variant 'b'. Did you mean 'optim'"):
        refused({"a": good, "b": {"optm": {}}})
    with pytest.raises(ValueError, match=r"Invalid optim of variant 'b'.*sgdd"):
        refused({"a": good, "b": {"optim": {"optimizer": "sgdd"}}})
    with pytest.raises(TypeError, match=r"Invalid variant 'b'"):
        refused({"a": good, "b": 3})
    with pytest.raises(ValueError, match=r"two or more"):
        refused({"a": good})
    with pytest.raises(ValueError, match=r"give one of the two budgets"):
        refused({"a": good, "b": good}, steps=3, seconds=3)
    with pytest.raises(ValueError, match=r"Unknown argument of the Trainer 'max_step'"):
        refused({"a": good, "b": good}, trainer={"max_step": 3})
    with pytest.raises(ValueError, match=r"folder's name"):
        refused({"a": good, "../b": good})
    assert not (tmp_path / "runs").exists()


def test_a_folder_is_of_one_comparison_at_a_time(tmp_path):
    with lock(tmp_path, "a comparison"), pytest.raises(FileExistsError, match="Another process runs a comparison in"):
        lo.compare(Small, Points, {"a": VARIANTS["sgd"], "b": VARIANTS["adamw"]}, folder=tmp_path, steps=4)
    lock(tmp_path, "a comparison").close()


def test_a_metric_that_no_run_has_ends_the_comparison_after_one_run(tmp_path):
    def make(name: str, variant: str, seed: int, **_: Any) -> Job:
        return Job(name, "tests.tuning.light_jobs:write")

    settings = Settings(seeds=1, steps=4, metric="val_los", workers=1, progress=False, preload=())
    with pytest.raises(ValueError, match="Invalid metric='val_los'.*Did you mean 'val_loss'"):
        run_comparison(settings, {"a": "", "b": ""}, make, tmp_path)
    assert [path.parent.parent.name for path in tmp_path.rglob("result.json")] == ["a"]


# The command line.


def test_misspelt_variants_of_a_file_are_refused_in_a_few_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.yaml"
    base.write_text("model: tests.tuning.jobs.Small\ndata: tests.tuning.jobs.Points\noptim: {optimizer: adamw}\n")
    variants = tmp_path / "variants.yaml"
    start = ["compare", "--config", str(base), "--variants", str(variants), "--out", str(tmp_path / "runs")]
    cases = {
        "a: {}\nb: {optm: {lr: 1}}\n": "optm: unknown key. Did you mean 'optim'",
        "a: {}\nb: {optim: {optimizer: lionn}}\n": "Did you mean 'lion'",
        "a: {}\nb: 3\n": "line 2: variant 'b' is 3",
        "a: {}\n": "two or more",
        "": "variants.yaml is empty: it must have names of variants",
        "a: {}\nb: {seed_everything: 3}\n": "Invalid seed_everything in variant 'b' with --seeds",
        "a: {}\nb: {trainer: {max_epochs: 3}}\n": "Invalid trainer.max_epochs in variant 'b' with --steps",
    }
    flags = {
        ("--stpes", "9"): "Unknown option --stpes. Did you mean '--steps'",
        ("--sedes=3",): "Unknown option --sedes. Did you mean '--seeds'",
        ("--trainer.max_steps", "3"): "Invalid --trainer.max_steps with --steps, which takes its place",
        ("--nothing", "3"): "error: Unknown option --nothing.",
        ("--seeds", "x"): "argument --seeds: invalid int value: 'x'. See lightning-optim compare --help.",
        ("--out", base.name): "Cannot write to base.yaml: base.yaml is a file.",
    }
    all_cases = [(text, (), said) for text, said in cases.items()]
    all_cases += [("a: {}\nb: {}\n", more, said) for more, said in flags.items()]
    for text, more, expected in all_cases:
        variants.write_text(text)
        with pytest.raises(SystemExit):
            main([*start, "--steps", "4", *more])
        error = capsys.readouterr().err
        assert expected in error, error
        assert len(error.strip().splitlines()) <= 6
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_command_tunes_compares_and_continues(tmp_path, capsys, monkeypatch):
    variants = tmp_path / "variants.yaml"
    variants.write_text("adamw: {}\nsgd: {optim: {optimizer: sgd, lr: 0.01}}\n")
    args = [
        "compare", "--model", "tests.tuning.jobs.Small", "--data", "tests.tuning.jobs.Points", "--optim.optimizer",
        "adamw", "--optim.lr", "0.003", "--trainer.accelerator", "cpu", "--variants", str(variants), "--seeds", "2",
        "--steps", "24", "--tune-lr", "--workers", "2", "--out", str(tmp_path / "runs"),
    ]  # fmt: skip
    main(args)
    said = capsys.readouterr()
    assert "at its own tuned rate" in " ".join(said.out.split())
    assert "runs 4/4" in said.err
    rows = list(csv.DictReader((tmp_path / "runs" / "results.csv").open()))
    assert {row["status"] for row in rows} == {"finished"}
    assert len({row["lr_factor"] for row in rows if row["variant"] == "adamw"}) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("curve.csv")}
    main(args)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("curve.csv")} == before
    variants.write_text("adamw: {}\nsgd: {optim: {optimizer: sgd, lr: 0.02}}\n")
    with pytest.raises(SystemExit):
        main(args)
    assert "another configuration" in capsys.readouterr().err


# Verdicts, on numbers that are made up.


def _comparison(values, tmp_path, metric="val_loss", status="finished"):
    results = {}
    for name, of_seed in values.items():
        results[name] = {}
        for seed, value in enumerate(of_seed):
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            _write(folder, metric, value)
            facts = {"weights": f"w{seed}", "batches": [f"b{seed}"], "lr": {"all": 0.1}}
            how = status if name == "bad" else "finished"
            results[name][seed] = JobResult(name, str(folder), how, steps=40, metrics={metric: value}, facts=facts)
    return Comparison(results, choose_metric([each[0] for each in results.values()]), folder=tmp_path)


def _write(folder: Path, metric: str, value: float) -> None:
    steps = range(1, 41)
    lines = [f"{step},{step / 10},{value + 1 / step}\n" for step in steps]
    (folder / CURVE_FILE).write_text("step,seconds,train_loss\n" + "".join(lines))
    looks = [
        {"step": s, "seconds": s / 10, "epoch": 0, "metrics": {metric: value + 2 / s - 2 / 40}} for s in steps[9::10]
    ]
    (folder / VALIDATION_FILE).write_text("".join(json.dumps(look) + "\n" for look in looks))


def _words(comparison):
    return " ".join(sentence for _, sentence in comparison.verdict())


def test_a_difference_that_each_seed_shows_is_more_than_noise_however_much_the_seeds_differ(tmp_path):
    found = _comparison({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.12, 3.11]}, tmp_path)
    assert found.differences["b"].verdict == "worse"
    assert "b is worse than a by 0.11" in _words(found)
    assert found.shown("a") == "2 ± 1"


def test_a_difference_within_noise_is_called_so(tmp_path):
    found = _comparison({"a": [1.0, 2.0, 3.0], "b": [1.3, 1.9, 3.2]}, tmp_path)
    assert "b and a differ by 0.133" in _words(found)
    assert "within noise over 3 seeds" in _words(found)
    assert "within noise" in summary(found)[2][2]


def test_one_seed_cannot_tell(tmp_path):
    found = _comparison({"a": [1.0], "b": [9.0]}, tmp_path)
    assert "cannot tell" in _words(found)
    assert "more than noise" not in _words(found)


def test_of_a_metric_that_is_better_higher_the_highest_is_best(tmp_path):
    found = _comparison({"a": [0.7, 0.71, 0.7], "b": [0.9, 0.91, 0.9]}, tmp_path, "val_acc")
    assert found.ranking == ["b", "a"]
    assert "b has the highest val_acc" in _words(found)
    assert summary(found)[2][2].startswith("-0.2")


def test_a_variant_that_failed_is_told_and_ranks_last(tmp_path):
    found = _comparison({"bad": [0.1, 0.1], "a": [1.0, 1.1], "b": [1.2, 1.4]}, tmp_path, status="failed")
    assert found.ranking == ["a", "b", "bad"]
    assert "bad: seed 0 failed, seed 1 failed" in _words(found)
    assert write_comparison(found).exists()


def test_another_start_is_told(tmp_path):
    found = _comparison({"a": [1.0, 1.1], "b": [1.2, 1.4]}, tmp_path)
    assert "(checked)" in _words(found)
    found.results["b"][1].facts["weights"] = "other"
    assert "The initial weights differ between variants of one seed: the comparison is not paired." in _words(found)


def test_more_variants_need_more_evidence():
    best, other = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.2, 1: 2.1, 2: 3.2}
    assert paired(best, other).verdict == "worse"
    assert paired(best, other, comparisons=6).verdict == "within noise"
    assert t_quantile(0.95, 5) == pytest.approx(2.5706, abs=1e-4)  # from a table


def test_levels_and_spread(tmp_path):
    found = _comparison({"a": [1.0, 1.0], "b": [1.05, 3.0]}, tmp_path)
    header, a, b = levels(found)
    assert header[-1] == "≤ 1 (best of a)"
    assert a[-1] == "40 (4.0 s)"
    assert b[-1] == "never"
    spread = spread_of([[(1, 1.0, 0.0), (2, 2.0, 1.0)], [(1, 3.0, 0.0), (2, float("nan"), 1.0)]])
    assert spread.middle == [(1, 2.0, 0.0), (2, 2.0, 1.0)]
    assert spread.low[0][1] == pytest.approx(2 - 2**0.5)
    assert binned([(step, float(step), 0.0) for step in range(1, 301)], 300)[:2] == [(2, 1.5, 0.0), (4, 3.5, 0.0)]


def test_metrics_are_found_named_or_explained():
    def result(**metrics):
        return [JobResult("a", "", "finished", metrics=metrics, train_loss=1.0)]

    assert choose_metric(result(train_loss=1.0, val_acc=0.5, val_loss=1.0)).name == "val_loss"
    assert choose_metric(result(val_acc=0.5)) == Metric("val_acc", True)
    assert choose_metric(result(val_acc=0.5, val_loss=1.0), "val_acc") == Metric("val_acc", True)
    assert choose_metric(result(odd=1.0), "odd", "max") == Metric("odd", True)
    assert "--mode max" in choose_metric(result(odd=1.0), "odd").note
    fallen_back = choose_metric(result())
    assert (fallen_back.of_validation, "training loss is compared" in fallen_back.note) == (False, True)
    with pytest.raises(ValueError, match=r"no run has logged it\. Did you mean 'val_loss'"):
        choose_metric(result(val_loss=1.0), "val_los")


def test_rates_are_tuned_with_equal_effort_and_the_grid_is_extended(tmp_path):
    jobs = []

    def make(name, variant, seed, **arguments):
        job = Job(name, "a:b", {"variant": variant, "seed": seed, **arguments})
        jobs.append(job)
        return job

    best = {"inside": 0.3, "outside": 30.0}

    def run(some, title):
        found = {}
        for job in some:
            factor = job.arguments["lr_factor"]
            off = abs(math.log(factor / best[job.arguments["variant"]]))
            status = "diverged" if factor > 50 else "finished"
            found[job.name] = JobResult(job.name, "", status, metrics={"val_loss": off})
        return found

    tuned = tune_rates(list(best), make, run, seed=1002, steps={"inside": 20, "outside": 30})
    assert tuned["inside"].factor == 0.3
    assert tuned["outside"].factor == pytest.approx(100 / 3)
    assert (tuned["inside"].at_edge, tuned["outside"].at_edge) == (False, False)
    assert {job.arguments["seed"] for job in jobs} == {1002}
    assert {job.arguments["steps"] for job in jobs if job.arguments["variant"] == "inside"} == {10, 20}


def test_settings_out_of_range_are_refused():
    for wrong in ({"seeds": 0}, {"steps": 0}, {"seconds": -1.0}, {"mode": "best"}):
        with pytest.raises(ValueError, match=re.escape(next(iter(wrong)))):
            Settings(**wrong)


def test_a_file_of_variants_keeps_its_order(tmp_path):
    path = tmp_path / "variants.yaml"
    path.write_text("b: {optim: {lr: 1e-3}}\na:\n")
    assert list(read_variants(path).items()) == [("b", {"optim": {"lr": 1e-3}}), ("a", {})]
