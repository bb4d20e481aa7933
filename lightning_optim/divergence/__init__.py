"""Detection of a run that diverges, and the response to it; plain torch and plain Python.

Whether to skip the step must be known before the update, so it is decided on the device (`StepGuard`). Everything else
is judged on the host, from rows of numbers that arrive a few steps later, so that training never waits for them.
"""

from lightning_optim.divergence.alarms import ALARM_KINDS, Alarm, AlarmKind
from lightning_optim.divergence.base import DETECTORS, Detector, NonFiniteGradient
from lightning_optim.divergence.early_warning import EarlySign, EarlyWarning
from lightning_optim.divergence.health import ParameterHealth
from lightning_optim.divergence.health_limits import HealthLimits
from lightning_optim.divergence.inspection import Inspection
from lightning_optim.divergence.judge import DivergenceJudge
from lightning_optim.divergence.ladder import Ladder, LRCut, Rollback
from lightning_optim.divergence.lr_cutter import LRCutter
from lightning_optim.divergence.observation import SIGNALS, StepObservation
from lightning_optim.divergence.report import DivergenceReport
from lightning_optim.divergence.spike_score import SpikeScore
from lightning_optim.divergence.spikes import Spikes, SpikeWindow
from lightning_optim.divergence.step_log import LogRow, StepLog
from lightning_optim.divergence.trend import SlowDivergence
from lightning_optim.divergence.watch import StepGuard

Judge, Watch = DivergenceJudge, StepGuard
"""Former names of these two classes, used up to version 0.1. Remove in 0.2."""

__all__ = [
    "ALARM_KINDS",
    "DETECTORS",
    "SIGNALS",
    "Alarm",
    "AlarmKind",
    "Detector",
    "DivergenceJudge",
    "DivergenceReport",
    "EarlySign",
    "EarlyWarning",
    "HealthLimits",
    "Inspection",
    "Judge",
    "LRCut",
    "LRCutter",
    "Ladder",
    "LogRow",
    "NonFiniteGradient",
    "ParameterHealth",
    "Rollback",
    "SlowDivergence",
    "SpikeScore",
    "SpikeWindow",
    "Spikes",
    "StepGuard",
    "StepLog",
    "StepObservation",
    "Watch",
    "register",
]

register = DETECTORS.register
"""[`lightning_optim.register`][] for detectors alone. An installed package brings its own as entry points of the group
`lightning_optim.detectors`."""
