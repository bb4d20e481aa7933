"""What becomes of the error that a trial has raised."""

from __future__ import annotations

import traceback

import lightning.pytorch as L


def check_alone(trainer: L.Trainer, error: Exception) -> None:
    """Check that no other process takes part in a trial that has failed.

    The others may wait for this one in a collective, and would be out of step with it after that.

    Args:
        trainer: The Trainer.
        error: What the trial raised.

    Raises:
        RuntimeError: There are several processes.
    """
    if trainer.world_size > 1:
        raise RuntimeError(
            f"A trial failed on rank {trainer.global_rank} of {trainer.world_size} with {type(error).__name__}: "
            f"{error}. With several processes that ends the run: give a smaller range of rates (low=, high=), or find "
            "the rate on one device."
        ) from error


def forget_variables(error: BaseException | None) -> None:
    """Clear the variables of the functions through which an error came: they hold the memory that was short.

    Args:
        error: The error, whose causes are cleared as well.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
