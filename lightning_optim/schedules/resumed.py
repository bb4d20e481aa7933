"""Comparison of a scheduler with the one in a checkpoint: its schedules, and the length of its run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_FORMER_NAMES = re.compile(r"^(Multi)?Step\(")
"""Schedules in checkpoints that were saved before `StepDecay` and `MultiStepDecay` had these names."""

Tell = Callable[[str, bool], None]


def check_schedules(saved: Mapping[str, str], present: Mapping[str, str], from_config: bool, tell: Tell) -> None:
    """Compare the schedules of a checkpoint with those configured.

    Args:
        saved: The checkpoint's, as text, by what they drive.
        present: Those configured.
        from_config: Whether the configuration takes precedence.
        tell: Reports the differences, if it does.

    Raises:
        ValueError: They differ, and the checkpoint takes precedence.
    """
    saved = {key: _FORMER_NAMES.sub(r"\1StepDecay(", written) for key, written in saved.items()}
    present = {key: _FORMER_NAMES.sub(r"\1StepDecay(", written) for key, written in present.items()}
    changes = [
        f"{key}: {saved.get(key, 'none')} → {present.get(key, 'none')}"
        for key in {**saved, **present}
        if saved and saved.get(key) != present.get(key)
    ]
    if not changes:
        return
    if not from_config:
        raise ValueError(
            f"The checkpoint's schedule is not the one configured: {'; '.join(changes)}. Configure the former, or "
            'say on_resume="config" to go on with the latter from the step reached.'
        )
    tell(f"Resumed with the configuration's schedule: {'; '.join(changes)}.", False)


def tell_of_stretch(saved: int, present: int | None, tell: Tell) -> None:
    """Report that a resumed run has another length than its schedule had, and that the schedule is stretched to it.

    Args:
        saved: Length of the run in the checkpoint, in steps.
        present: Length of this run; None if nothing bounds it.
        tell: Reports it.
    """
    tell(f"Resumed with the schedule stretched: {_lengths(saved, present)}.", False)


def tell_of_old_curve(saved: int, present: int | None, step: int, last: float, tell: Tell) -> None:
    """Report that a resumed run has another length than its schedule, which stays as it was.

    Args:
        saved: Length of the run in the checkpoint, in steps.
        present: Length of this run; None if nothing bounds it.
        step: Steps taken.
        last: Multiplier of the peaks at the end of the old curve.
        tell: Reports it.
    """
    message = f"Resumed on the old curve, constant beyond its end: {_lengths(saved, present)}."
    beyond = None if present is None else present - max(saved, step)
    if last == 0 and (beyond is None or beyond > 0):
        count = "all steps" if beyond is None else f"{beyond} steps"
        where = "here" if step >= saved else f"step {saved}"
        message += f" The learning rate is 0 from {where} on: {count} to come will change nothing."
    tell(f'{message} Say on_resume="config" to stretch it.', True)


def _lengths(saved: int, present: int | None) -> str:
    return f"the checkpoint's schedule ends at step {saved}, this run at {present}"
