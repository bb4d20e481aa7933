"""A response to the loss is undone if a new level follows soon, because then the data was the cause."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from lightning_optim.callbacks._guard import responses
from lightning_optim.callbacks._guard.responses import Responses
from lightning_optim.callbacks._guard.step_batches import StepLocation
from lightning_optim.divergence import Ladder, LRCut
from lightning_optim.divergence.alarms import alarm


class Cut:
    """The factors of an optimizer's learning rate, as plain numbers."""

    def __init__(self) -> None:
        self.factor = self.lasting = 1.0

    def start(self, factor: float, hold: int, recover: int) -> None:
        self.factor *= factor

    def undo(self, lasting: float) -> None:
        self.factor = lasting


@pytest.mark.parametrize(("later", "undone"), [(20, True), (450, False)])
def test_only_a_level_that_follows_soon_undoes_a_response(
    monkeypatch: pytest.MonkeyPatch, later: int, undone: bool
) -> None:
    now = [100]
    monkeypatch.setattr(responses, "logging_step", lambda trainer: now[0])
    guarded: Any = SimpleNamespace(cut=Cut(), judge=MagicMock(), watch=MagicMock())
    trainer: Any = None
    ours = Responses(Ladder(LRCut(), None), MagicMock(), lambda: [guarded], lambda: None)
    assert ours.respond(trainer, alarm("slow_divergence", 100, ""), StepLocation()) == "lr_cut"
    now[0] += later
    ours.undo(trainer, alarm("new_level", now[0], ""), StepLocation())
    assert (guarded.cut.factor == 1.0) is undone
