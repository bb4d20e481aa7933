"""A look at a model before it is trained."""

from lightning_optim.tuning.inspection.coordinates import CoordinateCheck, CoordinateRow, coordinate_check
from lightning_optim.tuning.inspection.findings import Finding
from lightning_optim.tuning.inspection.inspection import Inspection, LossValue, Row
from lightning_optim.tuning.inspection.look import inspect_model

__all__ = [
    "CoordinateCheck",
    "CoordinateRow",
    "Finding",
    "Inspection",
    "LossValue",
    "Row",
    "coordinate_check",
    "inspect_model",
]
