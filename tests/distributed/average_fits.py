"""Fits on two ranks with averages of weights in shards (FSDP2); called on each rank by test_averages.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lightning_optim as lo
from lightning_optim.callbacks._gathered import free_gathered
from tests.distributed.fsdp2_fits import Bad, Sharded, sharding, whole_weights
from tests.distributed.test_fsdp1 import loss
from tests.distributed.test_fsdp1 import sharded as flat_model
from tests.helpers import SaveAt, StatefulLoader, batches, make_trainer

STEPS, SAVED = 8, 7
EMA = [0.9, "power 0.1"]


class Seen:
    """Keeps the loss of each validation, and the weights of training where a checkpoint is saved."""

    seen: list[float]
    saved: Any = None

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == SAVED:  # type: ignore[attr-defined]
            self.saved = [weight.clone() for weight in whole_weights(self)]

    def on_validation_epoch_end(self) -> None:
        self.seen.append(float(self.trainer.callback_metrics["val_loss"]))  # type: ignore[attr-defined]


class SeenSharded(Seen, Sharded):
    """In shards."""


class SeenWhole(Seen, Bad):
    """On one device."""


def fit(
    sharded: bool,
    save: Path | None = None,
    resume: Path | None = None,
    distributed_checkpoint: bool = False,
    precision: str = "32-true",
) -> dict[str, Any]:
    """Losses in validation, the final average, and the weights of training behind it; a step on the way is skipped."""
    optimizer = lo.ConfigureOptimizers("adamw", lr=0.01, schedule="constant", optimizer_kwargs={"ema": EMA})
    callbacks = [optimizer, lo.WeightAverage(), lo.DivergenceGuard(rollback=None)]
    trainer = make_trainer(
        [*callbacks, *([SaveAt(SAVED, save)] if save else [])],
        max_steps=STEPS,
        val_check_interval=2,
        precision=precision,
        **(sharding(distributed_checkpoint) if sharded else {}),
    )
    model = (SeenSharded if sharded else SeenWhole)(seed=7)
    model.seen = []
    trainer.fit(model, StatefulLoader(STEPS, [], batch_size=4), batches(1), ckpt_path=resume)
    average = [weight.detach().clone() for weight in whole_weights(model)]
    other = {name: _whole(value) for name, value in lo.optim.ema_state_dict(model, trainer.optimizers[0], 1).items()}
    lo.optim.swap_out_average(trainer.optimizers[0])
    counts = [float(_whole(state["ema_step"])) for state in trainer.optimizers[0].state.values()]
    training = [weight.detach().clone() for weight in whole_weights(model)]
    kept = {"seen": model.seen, "saved": model.saved, "counts": counts}
    return {"average": average, "other": other, "training": training, **kept}


def fit_schedule_free(
    sharded: bool, save: Path | None = None, resume: Path | None = None, distributed_checkpoint: bool = False
) -> list[torch.Tensor]:
    """The final average of Schedule-Free, which validates at another point than it trains, too."""
    optimizer = lo.ConfigureOptimizers("schedulefreeadamw", lr=0.01, schedule="constant")
    trainer = make_trainer(
        [optimizer, lo.ScheduleFree(), *([SaveAt(3, save)] if save else [])],
        max_steps=4,
        val_check_interval=2,
        **(sharding(distributed_checkpoint) if sharded else {}),
    )
    model = (Sharded if sharded else Bad)(seed=7)
    trainer.fit(model, StatefulLoader(4, [], batch_size=4), batches(1), ckpt_path=resume)
    return [weight.detach().clone() for weight in whole_weights(model)]


def fit_all(folder: Path) -> dict[str, Any]:
    """Every fit, by name."""
    path = folder / "schedule-free"
    found: dict[str, Any] = {
        "schedule-free": fit_schedule_free(True, save=path, distributed_checkpoint=True),
        "schedule-free-resumed": fit_schedule_free(True, resume=path, distributed_checkpoint=True),
    }
    for distributed in (False, True):
        for precision in ("32-true", "bf16-true"):
            name = f"{precision}-{distributed}"
            options = {"distributed_checkpoint": distributed, "precision": precision}
            found[name] = fit(True, save=folder / name, **options)
            found[f"{name}-resumed"] = fit(True, resume=folder / name, **options)
    return found


def flat(use_orig_params: bool) -> list[list[float]]:
    """Sums of the weights after each step of FSDP1, without validation at the average and with it."""
    runs = []
    for validates in (False, True):
        model = flat_model(use_orig_params)
        optimizer = lo.optim.AdamW(model.parameters(), lr=0.01, ema=0.9)
        sums = []
        for step in range(3):
            optimizer.zero_grad()
            loss(model, step, slice(dist.get_rank(), None, 2)).backward()
            optimizer.step()
            if validates:
                with lo.optim.averaged_weights(optimizer), torch.no_grad():
                    model(torch.ones(1, 4))
                    free_gathered(model)
            sums.append(sum(weight.double().sum().item() for weight in model.parameters()))
        runs.append(sums)
    return runs


def _whole(value: Any) -> Any:
    return value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
