"""Jobs in processes of their own: what becomes of each, of the others, and of a study that is killed."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_optim as lo
from lightning_optim.diagnostics.run_report import read_runs
from lightning_optim.tuning.runs import Job, run_jobs
from lightning_optim.tuning.runs.description import describe
from lightning_optim.tuning.runs.digests import digest_of_tensors
from lightning_optim.tuning.runs.job import write_json
from lightning_optim.tuning.runs.python_fit import python_job
from lightning_optim.tuning.runs.records import spikes
from lightning_optim.tuning.runs.runner import available_cores
from lightning_optim.tuning.runs.worker import IN_JOB, how_it_failed
from tests.tuning.jobs import Own, Points, Small

ROOT = Path(__file__).parents[2]
QUIET = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0}
JOBS = "tests.tuning.light_jobs"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One study with a job of each fate."""
    folder = tmp_path_factory.mktemp("study")
    optim = lo.ConfigureOptimizers(optimizer="adamw", lr=1e-2, schedule="cosine", warmup=2, param_groups=["no_decay"])
    jobs = [
        Job("written", f"{JOBS}:write", {"loss": 0.5}),
        Job("nan", f"{JOBS}:write", {"loss": float("nan")}),
        Job("raises", f"{JOBS}:fail"),
        Job("memory", f"{JOBS}:exhaust"),
        Job("dies", f"{JOBS}:die"),
        Job("slow", f"{JOBS}:sleep", timeout=0.5),
        Job("pruned", f"{JOBS}:write", {"pause": 0.2, "seed": 1}),
        python_job("fits/a", Small, Points, [optim], QUIET, seed=1, steps=8, validations=2),
        python_job("fits/b", Small, Points, [optim], QUIET, seed=1, steps=8, validations=2, lr_factor=3),
        python_job("fits/own", Own, Points, [], QUIET, seed=1, steps=8, lr_factor=3),
        python_job("fits/c", Small, Points, [optim], QUIET, seed=2, steps=7, validations=2, reseed=True),
        python_job("fits/wide", lambda: Small(8), Points, [optim], QUIET, seed=2, steps=7, reseed=True),
    ]
    before = torch.random.get_rng_state(), dict(os.environ), list(sys.path)
    results = run_jobs(
        jobs, folder, workers=1, progress=False, on_values=lambda job, v: job.name == "pruned" and v["step"] >= 1
    )
    after = torch.random.get_rng_state(), dict(os.environ), list(sys.path)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    return jobs, folder, results


def test_each_job_has_a_result_whatever_became_of_the_others(study):
    _, _, results = study
    assert {name: result.status for name, result in results.items()} == {
        "written": "finished", "nan": "diverged", "raises": "failed", "memory": "out of memory", "dies": "killed",
        "slow": "timed out", "pruned": "pruned", "fits/a": "finished", "fits/b": "finished", "fits/own": "finished",
        "fits/c": "finished", "fits/wide": "finished",
    }  # fmt: skip
    assert results["raises"].error == "ValueError: no such thing"
    assert "SIGKILL" in results["dies"].error
    assert "no such thing" in (Path(results["raises"].folder) / "log.txt").read_text()
    assert len(results["pruned"].validation()["val_loss"]) < 5


def test_a_fit_is_recorded(study):
    _, _, results = study
    fit = results["fits/a"]
    assert (fit.steps, len(fit.curve()), fit.skipped, fit.spikes) == (8, 8, 0, 0)
    assert [step for step, *_ in fit.validation()["val_loss"]] == [4, 8]
    assert fit.best("val_loss") is not None
    assert fit.metrics["val_loss"] == fit.validation()["val_loss"][-1][1]
    # Two moments of 25 parameters, and counts.
    assert 200 <= fit.state_bytes < 400
    assert fit.facts["lr"] == {"no_decay": 0.01, "default": 0.01}
    assert fit.facts["validated"] == ["val_loss"]
    (run,) = read_runs([Path(fit.folder) / "events"])
    assert "val_loss" in run.scalars
    # The last step is validated, whatever the interval.
    assert results["fits/c"].validation()["val_loss"][-1][0] == 7


def test_a_factor_scales_what_the_steps_use(study):
    _, _, results = study
    assert results["fits/b"].facts["lr"] == pytest.approx({"no_decay": 0.03, "default": 0.03})
    assert results["fits/own"].facts["lr"] == pytest.approx({"0": 0.3})


def test_weights_and_order_of_data_are_those_of_the_seed(study):
    _, _, results = study
    a, b, c, wide = (results[f"fits/{name}"].facts for name in ("a", "b", "c", "wide"))
    assert (a["weights"], a["batches"]) == (b["weights"], b["batches"])
    assert a["weights"] != c["weights"]
    assert a["batches"] != c["batches"]
    # A model that draws more random numbers sees the same batches where these are seeded again.
    assert wide["weights"] != c["weights"]
    assert wide["batches"] == c["batches"]


def test_what_has_finished_is_not_run_again(study):
    jobs, folder, results = study
    started = []
    kept = [job for job in jobs if job.name in ("written", "nan", "pruned", "fits/a")]
    again = run_jobs(kept, folder, progress=False, on_start=lambda job: started.append(job.name))
    assert started == []
    assert again == {job.name: results[job.name] for job in kept}
    other = Job("written", f"{JOBS}:write", {"loss": 0.25})
    with pytest.raises(FileExistsError, match=r"another configuration: 'written'.*--rerun"):
        run_jobs([other], folder, progress=False)
    assert run_jobs([other], folder, preload=(), progress=False, changed="rerun")["written"].train_loss == 0.25


KILLED = """
import signal
import sys
from lightning_optim.tuning.runs import Job, run_jobs
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    jobs = [Job("first", "tests.tuning.light_jobs:write"), Job("second", "tests.tuning.light_jobs:sleep")]
    run_jobs(jobs, sys.argv[1], workers=1, preload=())
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of two studies, which run side by side until each gets its signal."""
    program = tmp_path_factory.mktemp("killed") / "program.py"
    program.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folders = {sign: program.parent / sign.name for sign in (signal.SIGKILL, signal.SIGINT)}
    with contextlib.ExitStack() as stack:
        processes = {}
        for sign, folder in folders.items():
            command = [sys.executable, program, folder]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            processes[sign] = stack.enter_context(process)
        for sign, folder in folders.items():
            pid = folder / "second" / "pid"
            _wait(lambda pid=pid: pid.exists() and pid.read_text())
            child = int(pid.read_text())
            processes[sign].send_signal(sign)
            processes[sign].wait(20)
            _wait(lambda child=child: not _alive(child))
    return folders


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_ends_its_jobs_and_is_resumed(killed, sign):
    folder = killed[sign]
    assert (folder / "first" / "result.json").exists()
    assert not (folder / "second" / "result.json").exists()
    started = []
    jobs = [Job("first", f"{JOBS}:write"), Job("second", f"{JOBS}:sleep", timeout=0.3)]
    results = run_jobs(
        jobs, folder, workers=1, preload=(), progress=False, on_start=lambda job: started.append(job.name)
    )
    assert started == ["second"]
    assert [result.status for result in results.values()] == ["finished", "timed out"]


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_with_devices_each_job_is_a_fresh_process_that_sees_its_own(tmp_path):
    jobs = [Job(name, f"{JOBS}:surroundings") for name in "ab"]
    jobs += [Job("raises", f"{JOBS}:fail"), Job("dies", f"{JOBS}:die"), Job("slow", f"{JOBS}:sleep", timeout=0.5)]
    results = run_jobs(jobs, tmp_path, devices=[0, 1], preload=(), progress=False)
    assert [results[job.name].status for job in jobs] == ["finished", "finished", "failed", "killed", "timed out"]
    seen = [(tmp_path / name / "surroundings").read_text().split() for name in "ab"]
    assert [device for device, _ in seen] == ["0", "1"]
    assert {threads for _, threads in seen} == {str(max(available_cores() // 2, 1))}


def test_wrong_jobs_are_refused_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="relative path"):
        Job("../a", "a:b")
    with pytest.raises(ValueError, match="module:function"):
        Job("a", "a.b")
    with pytest.raises(ValueError, match="Two jobs have the name 'a'"):
        run_jobs([Job("a", "a:b"), Job("a", "a:c")], tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        run_jobs([], tmp_path, workers=0)
    monkeypatch.setenv(IN_JOB, "here")
    with pytest.raises(RuntimeError, match="__main__"):
        run_jobs([], tmp_path)


def test_descriptions_know_sources_closures_and_weights():
    def factory(width):
        return lambda: Small(width)

    assert describe(factory(4)) == describe(factory(4))
    assert describe(factory(4)) != describe(factory(8))
    assert describe(Small(noise=False)) != describe(Small(noise=False))  # other weights
    optim = lo.ConfigureOptimizers(optimizer="adamw", lr=1e-2)
    assert describe(optim) == describe(lo.ConfigureOptimizers(optimizer="adamw", lr=1e-2))
    assert describe(optim) != describe(lo.ConfigureOptimizers(optimizer="adamw", lr=1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.int8])
def test_digests_of_any_dtype(dtype):
    ones, zeros = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    assert digest_of_tensors([ones]) == digest_of_tensors([ones.clone()]) != digest_of_tensors([zeros])


def test_spikes_are_counted_once_each():
    curve = [(step, 1 + step % 3 / 100, 0.0) for step in range(120)]
    assert spikes(curve) == 0
    for step in (50, 51, 90):
        curve[step] = (step, 5.0, 0.0)
    assert spikes(curve) == 2


def test_memory_is_recognised():
    assert how_it_failed(RuntimeError("DefaultCPUAllocator: can't allocate memory"))[0] == "out of memory"
    assert how_it_failed(RuntimeError("shapes"))[0] == "failed"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32(0.1), np.float32(0.2)),
        (np.zeros(3), np.ones(3)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (torch.float16, torch.bfloat16),
        (range(3), range(4)),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
        (torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Sequential(torch.nn.GELU())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_differs_is_described_differently(one, other):
    assert describe(one) == describe(copy.deepcopy(one))
    assert describe(one) != describe(other)


def test_a_file_that_cannot_be_written_is_named_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def full(part: Path, *_, **__):
        part.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_json(path, {"a": 2})
    assert error.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
    assert path.read_bytes() == b'{\n "a": 1\n}'
