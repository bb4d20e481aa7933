"""One pass over one optimizer step: measure, decide, apply, report."""

from lightning_optim.step.pipeline import StepPipeline
from lightning_optim.step.release import release_gradients
from lightning_optim.step.released import ReleasedPipeline

__all__ = ["ReleasedPipeline", "StepPipeline", "release_gradients"]
