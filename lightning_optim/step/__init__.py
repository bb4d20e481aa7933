"""One pass over one optimizer step: measure, decide, apply, report."""

from lightning_optim.step.pipeline import StepPipeline

__all__ = ["StepPipeline"]
