"""A self-contained page about one run, or several side by side, from their event files; to attach to an issue."""

from lightning_optim.diagnostics.run_report.analysis import convergence, generalisation, reached, stability
from lightning_optim.diagnostics.run_report.page import write_report
from lightning_optim.diagnostics.run_report.run import Points, Run, loss_tags, read_run, read_runs

__all__ = [
    "Points",
    "Run",
    "convergence",
    "generalisation",
    "loss_tags",
    "reached",
    "read_run",
    "read_runs",
    "stability",
    "write_report",
]
