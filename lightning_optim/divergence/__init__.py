"""Noticing that a run goes wrong, and what to do about it; plain torch and plain Python.

What must be known before the update is decided on the device (`Watch`): whether to skip the step. All else is judged by
the host, from rows of numbers that arrive a little later and that nobody waits for.
"""

from lightning_optim.divergence.alarms import ALARM_KINDS, Alarm, AlarmKind
from lightning_optim.divergence.base import DETECTORS, Detector, NonFiniteGradient
from lightning_optim.divergence.health import Health, HealthLimits
from lightning_optim.divergence.judge import Judge
from lightning_optim.divergence.ladder import Ladder, LRCut, Rollback
from lightning_optim.divergence.rate_cut import RateCut
from lightning_optim.divergence.report import Report
from lightning_optim.divergence.rows import Row, Rows
from lightning_optim.divergence.spikes import Spikes, SpikeWindow
from lightning_optim.divergence.trend import SlowDivergence
from lightning_optim.divergence.watch import SIGNALS, StepSeen, Watch

__all__ = [
    "ALARM_KINDS",
    "DETECTORS",
    "SIGNALS",
    "Alarm",
    "AlarmKind",
    "Detector",
    "Health",
    "HealthLimits",
    "Judge",
    "LRCut",
    "Ladder",
    "NonFiniteGradient",
    "RateCut",
    "Report",
    "Rollback",
    "Row",
    "Rows",
    "SlowDivergence",
    "SpikeWindow",
    "Spikes",
    "StepSeen",
    "Watch",
]
