"""A look at a model before it is trained."""

from lightning_optim.tuning.inspection.findings import Finding
from lightning_optim.tuning.inspection.inspection import Inspection, LossValue, Row
from lightning_optim.tuning.inspection.look import inspect_model

__all__ = ["Finding", "Inspection", "LossValue", "Row", "inspect_model"]
