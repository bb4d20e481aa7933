"""Jobs in parallel, each in a process and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_optim.tuning.runs.job import Job, written_hash
from lightning_optim.tuning.runs.lock import lock, require_posix
from lightning_optim.tuning.runs.progress import Progress
from lightning_optim.tuning.runs.records import CURVE_FILE, FACTS_FILE, VALIDATION_FILE, read_validation
from lightning_optim.tuning.runs.result import (
    COMPLETE,
    KILLED,
    PRUNED,
    RESULT_FILE,
    TIMED_OUT,
    JobResult,
    read_result,
    summarise,
    write_result,
)
from lightning_optim.tuning.runs.slot import PRELOAD, Slot, environment_of
from lightning_optim.tuning.runs.worker import IN_JOB, LOG_FILE

_POLL = 0.05

OnValues = Callable[[Job, dict[str, Any]], bool | None]
"""Called with a job and one validation of it (step, seconds, epoch, metrics); True ends the job as pruned."""


def run_jobs(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    workers: int | None = None,
    devices: Sequence[int] | None = None,
    changed: str = "refuse",
    preload: Sequence[str] = PRELOAD,
    pool: Pool | None = None,
    title: str = "jobs",
    progress: bool = True,
    on_start: Callable[[Job], None] | None = None,
    on_values: OnValues | None = None,
    on_end: Callable[[Job, JobResult], None] | None = None,
) -> dict[str, JobResult]:
    """Run jobs in processes of their own, and return their results; what is finished already is not run again.

    A job that raises, diverges, runs out of memory, is killed or takes too long has a result that says so, and leaves
    the others alone. If this process ends, its jobs end as well; the next call with the same folder runs what has not
    finished.

    Args:
        jobs: The jobs. An iterator is asked for its next job when a worker is free, so that a search can choose it by
            the results so far.
        folder: Folder in which each job has its own, by its name.
        workers: Number of jobs at a time; None for one per GPU of ``devices``, else one per core, 8 at most.
        devices: Indices of GPUs, shared evenly by the workers; None or empty for the CPU.
        changed: What to do with a job whose folder has a result of another description: ``"refuse"``, or ``"rerun"``.
        preload: Modules that the jobs need, imported once for all of them; those of any fit by default.
        pool: Workers that other calls have used, whose imports are saved; it takes the place of ``workers``,
            ``devices`` and ``preload``. None for workers of its own.
        title: What the progress bar calls the jobs.
        progress: Whether to show a progress bar on stderr.
        on_start: Called with each job that starts.
        on_values: Called with each validation of a job, while it runs; if it returns True, the job ends as pruned.
        on_end: Called with each job and its result; also with results that were there before.

    Returns:
        The results by the names of the jobs, in their order.

    Raises:
        FileExistsError: A folder has a result of another description, or another process runs the job.
        ValueError: Two jobs have one name, or an argument is out of range.
        NotImplementedError: The system is neither Linux nor macOS.
        RuntimeError: It is called by a job.
        KeyboardInterrupt: Ctrl-C; the jobs have ended.
    """
    if IN_JOB in os.environ:
        raise RuntimeError(
            "A job cannot start jobs. If this comes from your program, which jobs load for the functions that it "
            "defines, put its start under `if __name__ == '__main__':`."
        )
    require_posix()
    if changed not in ("refuse", "rerun"):
        raise ValueError(f"Invalid changed={changed!r}: must be 'refuse' or 'rerun'.")
    if workers is None and isinstance(jobs, Sequence):  # Fewer jobs than workers get more threads each.
        workers = min(len(devices) if devices else min(available_cores(), 8), max(len(jobs), 1))
    own = Pool(workers, devices, preload) if pool is None else None
    root = Path(folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    if isinstance(jobs, Sequence):
        _check(jobs, root, changed)
    total = len(jobs) if isinstance(jobs, Sequence) else None
    with contextlib.ExitStack() as stack:
        slots = (stack.enter_context(own) if own is not None else pool or Pool()).slots
        shown = stack.enter_context(Progress(title, total, progress))
        study = _Study(iter(jobs), root, changed, shown, on_start, on_values, on_end)
        try:
            study.run(slots)
        except BaseException:
            for slot in slots:  # Those of a pool would go on.
                slot.close()
            raise
    return study.results


class Pool:
    """Workers for several calls of `run_jobs`: a context, whose end ends them.

    Args:
        workers: Number of jobs at a time; None for one per GPU of ``devices``, else one per core, 8 at most.
        devices: Indices of GPUs, shared evenly by the workers; None or empty for the CPU.
        preload: Modules that the jobs need, imported once for all of them; those of any fit by default.

    Raises:
        ValueError: ``workers`` is below 1.
    """

    def __init__(
        self,
        workers: int | None = None,
        devices: Sequence[int] | None = None,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"Invalid workers={workers!r}: must be a whole number of at least 1.")
        cores = available_cores()
        count = workers or (len(devices) if devices else min(cores, 8))
        # A process begins with the first job that a slot gets.
        self.slots = [Slot(max(1, cores // count), name, preload) for name in environment_of(devices, count)]

    def __enter__(self) -> Pool:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        for slot in self.slots:
            slot.close()


class _Running:
    """A job in a slot."""

    def __init__(self, job: Job, folder: Path, lock: Any) -> None:
        self.job, self.folder, self.lock = job, folder, lock
        self.values = 0
        self.ending = ""
        """Why it was ended by this process: `PRUNED` or `TIMED_OUT`; empty if it was not."""


class _Study:
    """The loop over jobs and slots."""

    def __init__(
        self,
        jobs: Iterator[Job],
        root: Path,
        changed: str,
        progress: Progress,
        on_start: Callable[[Job], None] | None,
        on_values: OnValues | None,
        on_end: Callable[[Job, JobResult], None] | None,
    ) -> None:
        self._jobs, self._root, self._changed, self._progress = jobs, root, changed, progress
        self._on_start, self._on_values, self._on_end = on_start, on_values, on_end
        self._exhausted = False
        self.results: dict[str, JobResult] = {}

    def run(self, slots: Sequence[Slot]) -> None:
        running: dict[Slot, _Running] = {}
        while True:
            for slot in slots:
                if slot not in running and not self._exhausted and (job := self._next()) is not None:
                    running[slot] = self._start(slot, job)
            if not running:
                return
            for slot, one in list(running.items()):
                self._follow(slot, one)
                if (code := slot.poll()) is not None:
                    self._follow(slot, one)
                    del running[slot]
                    self._end(one, code)
            self._progress.show([(one.job, one.folder) for one in running.values()])
            time.sleep(_POLL)

    def _next(self) -> Job | None:
        """Return the next job that has to run; those with a result are passed over."""
        for job in self._jobs:
            if job.name in self.results:
                raise ValueError(f"Two jobs have the name {job.name!r}; each needs a folder of its own.")
            _check([job], self._root, self._changed)
            folder = self._root / job.name
            result = read_result(folder)
            if result is None or result.status not in COMPLETE or written_hash(folder) != job.hash:
                self.results[job.name] = JobResult(job.name, str(folder), KILLED)  # keeps the order
                return job
            self._note(job, result)
        self._exhausted = True
        return None

    def _start(self, slot: Slot, job: Job) -> _Running:
        folder = self._root / job.name
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder, f"the job {job.name!r}")
        for name in (RESULT_FILE, CURVE_FILE, VALIDATION_FILE, FACTS_FILE, LOG_FILE):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("events/*tfevents*"):
            path.unlink()
        job.write(folder)
        if self._on_start is not None:
            self._on_start(job)
        slot.start(folder)
        return _Running(job, folder, held)

    def _follow(self, slot: Slot, one: _Running) -> None:
        """Pass new validations on, and end a job that is to be pruned or has taken too long."""
        if one.ending:
            return
        if self._on_values is not None:
            for values in read_validation(one.folder, one.values):
                one.values += 1
                if self._on_values(one.job, values):
                    one.ending = PRUNED
                    break
        limit = one.job.timeout
        if not one.ending and limit is not None and slot.started and time.monotonic() - slot.started > limit:
            one.ending = TIMED_OUT
        if one.ending and slot.folder is not None:
            slot.stop()

    def _end(self, one: _Running, code: int) -> None:
        result = read_result(one.folder)
        if result is None:
            result = summarise(one.job.name, one.folder, *_how_it_ended(one, code))
            write_result(result)
        elif one.ending == PRUNED:  # It ended by itself in the same moment.
            one.ending = ""
        one.lock.close()
        self._note(one.job, result)

    def _note(self, job: Job, result: JobResult) -> None:
        self.results[job.name] = result
        self._progress.end(result)
        if self._on_end is not None:
            self._on_end(job, result)


def _how_it_ended(one: _Running, code: int) -> tuple[str, str]:
    """Return status and message of a job that has left no result."""
    if one.ending == PRUNED:
        return PRUNED, ""
    if one.ending == TIMED_OUT:
        return TIMED_OUT, f"It had not ended after {one.job.timeout:g} seconds."
    if code >= 0:
        return KILLED, f"The process ended with exit code {code}, without a result; see {LOG_FILE}."
    name = signal.Signals(-code).name
    memory = " If you did not send it, the system was out of memory." if name == "SIGKILL" else ""
    return KILLED, f"The process was ended by {name}.{memory}"


def _check(jobs: Sequence[Job], root: Path, changed: str) -> None:
    """Refuse two jobs of one name, and folders with the result of another job."""
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two jobs have the name {twice!r}; each needs a folder of its own.")
    if changed == "rerun":
        return
    others = [job.name for job in jobs if (found := written_hash(root / job.name)) is not None and found != job.hash]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise FileExistsError(
            f"{root} has runs of another configuration: {others[0]!r}{more}. Give another folder, or have them run "
            "again (changed='rerun', at the shell --rerun)."
        )


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
