"""Training jobs in processes of their own: one folder each, in parallel, with an outcome that survives what they do.

`lightning_optim.tuning.runs.python_fit.python_job` and `lightning_optim.cli.job.fit_job` describe fits as jobs.
"""

from lightning_optim.tuning.runs.description import describe, digest
from lightning_optim.tuning.runs.job import Job
from lightning_optim.tuning.runs.result import JobResult
from lightning_optim.tuning.runs.runner import run_jobs

__all__ = ["Job", "JobResult", "describe", "digest", "run_jobs"]
