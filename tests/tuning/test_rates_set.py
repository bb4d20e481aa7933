"""A rate that is set in the middle of things: with any scheduler of torch the run is one that was configured so."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as schedulers

import lightning_optim as lo
from lightning_optim.tuning.rates.apply import rate_of, set_rate
from tests.helpers import NetWith, Recorder, batches, make_trainer


class Sets(L.Callback):
    def __init__(self, lr: float) -> None:
        self.lr, self.configured = lr, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.configured = rate_of(trainer, 0)
            set_rate(trainer, 0, self.lr)


class Foreign:
    """A scheduler of another library: it keeps its rates where nobody knows."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self._own = optimizer, [group["lr"] for group in optimizer.param_groups]

    def step(self, *_: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._own, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


SCHEDULES = {
    "none": lambda o, lr: None,
    "lambda": lambda o, lr: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o, lr: schedulers.OneCycleLR(o, [3 * lr, lr], total_steps=8),
    "cyclic": lambda o, lr: schedulers.CyclicLR(o, [0.3 * lr, 0.1 * lr], [3 * lr, lr], 3, cycle_momentum=False),
    "sequence": lambda o, lr: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.LambdaLR(o, lambda step: 0.5**step)], [3]
    ),
    "chain": lambda o, lr: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o, lr: schedulers.ReduceLROnPlateau(o),
    "foreign": lambda o, lr: Foreign(o),
}


def run(schedule: str, lr: float, *callbacks: L.Callback) -> list[list[float]]:
    def configure(net):
        groups = [{"params": net.body.parameters(), "lr": 3 * lr}, {"params": net.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        made = SCHEDULES[schedule](optimizer, lr)
        config = {"scheduler": made, "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, **({} if made is None else {"lr_scheduler": config})}

    class Logs(NetWith):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(*([metric] if schedule == "plateau" else []))

    recorder = Recorder()
    make_trainer([*callbacks, recorder]).fit(Logs(configure), batches(7))
    return recorder.rates


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "foreign"])
def test_a_run_whose_rate_is_set_has_the_rates_of_one_configured_so(schedule):
    sets = Sets(0.02)
    for found, configured in zip(run(schedule, 0.01, sets), run(schedule, 0.02), strict=True):
        assert found == pytest.approx(configured)
    assert sets.configured == pytest.approx(0.01)


def test_a_scheduler_that_is_not_known_is_reported():
    with pytest.warns(UserWarning, match="Foreign, which is not one of torch's schedulers, may set them back"):
        run("foreign", 0.01, Sets(0.02))


def test_a_rate_of_zero_has_no_multiples():
    with pytest.raises(MisconfigurationException, match="SGD has lr=0, and trials set multiples"):
        lo.find_lr(make_trainer(), NetWith(lambda net: torch.optim.SGD(net.parameters(), lr=0.0)), batches(7))
