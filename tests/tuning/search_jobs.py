"""Trials without torch, for tests of searches, and a program that searches with them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs import Job
from lightning_optim.tuning.runs.records import CURVE_FILE, VALIDATION_FILE, read_validation
from lightning_optim.tuning.runs.result import summarise
from lightning_optim.tuning.search.search import Settings, run_search
from lightning_optim.tuning.search.space import Space

SPACE = {"x": {"low": 0.0, "high": 1.0}, "how": ["ok"]}


def trial(folder: Path, x: float, how: str = "ok", pause: float = 0.0, metric: str = "val_loss") -> None:
    """Write records as a fit does: the loss falls towards a parabola of ``x``, in five validations."""
    with (folder / CURVE_FILE).open("w") as file:
        file.write("step,seconds,train_loss\n")
        file.writelines(f"{step},{step / 10},{1 / step}\n" for step in range(1, 6))
    if how == "raises":
        raise ValueError("no such thing")
    if how == "memory":
        raise RuntimeError("CUDA out of memory")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(60)
    with (folder / VALIDATION_FILE).open("w") as file:
        for step in range(1, 6):
            loss = float("nan") if how == "nan" and step > 1 else (x - 0.3) ** 2 + 1 / step
            line = {"step": step, "seconds": step / 10, "epoch": 0, "metrics": {metric: loss, "val_acc": -loss}}
            file.write(json.dumps(line) + "\n")
            file.flush()
            time.sleep(pause)


def make_job(name: str, params: dict[str, Any], **more: Any) -> Job:
    """The job of a trial."""
    timeout = 0.5 if params.get("how") == "slow" else None
    return Job(name, "tests.tuning.search_jobs:trial", {**params, **more}, timeout=timeout)


def run(
    folder: str, space: dict[str, Any], pause: float = 0.0, metric_logged: str = "val_loss", **settings: Any
) -> Any:
    """Search with such trials."""
    options = {"workers": 1, "progress": False, "pruner": "none", "sampler": "random", **settings}
    options = {"storage": f"journal:{folder}/study.log", **options}  # which is quicker than SQLite

    def make(name: str, params: dict[str, Any]) -> Job:
        return make_job(name, params, pause=pause, metric=metric_logged)

    return run_search(make, Space.read(space), folder, Settings(**options), {"made by": "a test"}, (__name__,))


def run_here(jobs: Any, folder: Path, *, on_values: Any, on_end: Any, **options: Any) -> None:
    """What `run_jobs` does, in this process, for trials that end by themselves or raise."""
    for job in jobs:
        place = Path(folder) / job.name
        place.mkdir(parents=True, exist_ok=True)
        status, error = "finished", ""
        try:
            trial(place, **{**job.arguments, "pause": 0.0})
        except ValueError as raised:
            status, error = "failed", f"ValueError: {raised}"
        for number, values in enumerate(read_validation(place), 1):
            if on_values(job, values):
                status = "pruned"
                lines = (place / VALIDATION_FILE).read_text().splitlines(keepends=True)
                (place / VALIDATION_FILE).write_text("".join(lines[:number]))
                break
        on_end(job, summarise(job.name, place, status, error))
        time.sleep(job.arguments["pause"])


if __name__ == "__main__":
    from tests.tuning.search_jobs import SPACE, run  # the name by which jobs import it

    run(sys.argv[1], SPACE, **json.loads(sys.argv[2]))
