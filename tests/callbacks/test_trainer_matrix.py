"""A matrix of Trainer configurations: weights, steps, rates and points are those of stock Lightning in each of them."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lightning_optim as lo
from tests.helpers import ADAMWS, PRECISIONS, RULES, Net, Recorder, batches, make_trainer, precision, read_events

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 0.1
EPOCHS, BATCHES = 3, 9
CONFIGURATIONS = 160

Case = dict[str, Any]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "precision": PRECISIONS,
    "optimization": ("automatic", "manual"),
    "accumulation": (1, 3, "scheduler"),
    "length": ("epochs", "steps", "both-steps-end-it", "both-epochs-end-it"),
    "limit": (None, 6, 0.5),
    "validation": (None, 2, 0.5, "by-steps"),
    "reload": (0, 1, 2),
    "where": ("callback", "module"),
    "resume": ("whole", "middle-of-epoch", "last-batch", "after-epoch"),
    "optimizer": tuple(ADAMWS),
    "schedule": ("cosine", "linear", "wsd"),
    "groups": ("one", "several"),
    "log": (1, 2, 3),
    "guard": (False, True),
    "order": ("first-to-last", "last-to-first"),
}
"""What can be chosen, and from what."""


IMPOSSIBLE = [
    {("optimization", "manual"), ("accumulation", "scheduler")},  # Lightning refuses it.
    # With max_steps, Lightning leaves out an epoch that follows a checkpoint of on_train_epoch_end.
    *[{("resume", "after-epoch"), ("length", length)} for length in OPTIONS["length"] if length != "epochs"],
    # Three batches by hand do not divide an epoch of four: there are one or two steps in it.
    {("optimization", "manual"), ("accumulation", 3), ("limit", 0.5)},
]
"""Combinations in which stock Lightning is no measure."""


def is_valid(case: Case) -> bool:
    return not any(each <= set(case.items()) for each in IMPOSSIBLE)


def sample(count: int) -> list[Case]:
    """Draw ``count`` configurations, each of which has many combinations of three options that came least often."""
    draw, seen, cases = random.Random(0), dict[Any, int](), list[Case]()
    while len(cases) < count:
        candidates = [{name: draw.choice(values) for name, values in OPTIONS.items()} for _ in range(12)]
        candidates = [case for case in candidates if is_valid(case) and case not in cases]
        if candidates:
            best = max(candidates, key=lambda case: sum(0.1 ** seen.get(each, 0) for each in combinations(case, 3)))
            for each in combinations(best, 3):
                seen[each] = seen.get(each, 0) + 1
            cases.append(best)
    return cases


def combinations(case: Case, size: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    return itertools.combinations(case.items(), size)


CASES = sample(CONFIGURATIONS)


# What is right, by hand.


def batches_per_epoch(case: Case) -> int:
    return {None: BATCHES, 6: 6, 0.5: BATCHES // 2}[case["limit"]]


def accumulation_in(case: Case, epoch: int) -> int:
    if case["accumulation"] == "scheduler":
        return 2 if epoch == 0 else 3
    return int(case["accumulation"])


def steps_in(case: Case, epoch: int) -> int:
    return math.ceil(batches_per_epoch(case) / accumulation_in(case, epoch))


def total_steps(case: Case) -> int:
    of_epochs = sum(steps_in(case, epoch) for epoch in range(EPOCHS))
    return {"steps": of_epochs * 2 // 3, "both-steps-end-it": of_epochs - 1}.get(case["length"], of_epochs)


def multiplier(case: Case) -> Callable[[int], float]:
    """The schedule in closed form, as a function of the steps taken."""
    total = total_steps(case)

    def cosine(step: int) -> float:
        return (step + 1) / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (total - 2))) / 2

    def linear(step: int) -> float:
        return 1 - step / total

    def wsd(step: int) -> float:
        return min(1.0, (step + 1) / 2, (total - step) / 2)

    return {"cosine": cosine, "linear": linear, "wsd": wsd}[case["schedule"]]


SCHEDULES: dict[str, Callable[[], Any]] = {
    "cosine": lambda: lo.schedules.Cosine(warmup=2, final=0.1),
    "linear": lambda: lo.schedules.Linear(),
    "wsd": lambda: lo.schedules.WSD(warmup=2, cooldown=lo.schedules.Cooldown(2, shape="linear")),
}


def points_due(case: Case) -> dict[int, int]:
    """Which steps the monitor shows, by their places on Lightning's axis: those of which Lightning logs."""
    every, steps = case["log"], range(total_steps(case))
    if case["optimization"] == "automatic":
        return {step: step for step in steps if (step + 1) % every == 0}
    # Lightning counts the batches; where one that is due has no step, the next step reports.
    window = accumulation_in(case, 0)
    ends = {window * (step + 1) - 1: step for step in steps}
    return {
        end: step
        for end, step in ends.items()
        if any((batch + 1) % every == 0 for batch in range(end - window + 1, end + 1))
    }


# The two that are compared.


class Model(Net):
    """Trains automatically or by hand; its gradients are clipped in some batches and not in others.

    Args:
        case: The configuration.
        configure: Its ``configure_optimizers``; None for one that must not be asked.
        is_stock: Whether, by hand, it clips and moves the schedule itself.
    """

    def __init__(self, case: Case, configure: Callable[[Net], Any] | None, is_stock: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = case["optimization"] == "automatic"
        self.case, self.configure, self.is_stock = case, configure, is_stock

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) * (1.0, 0.05, 4.0, 0.02)[batch_idx % 4]
        if self.automatic_optimization:
            return loss
        window = accumulation_in(self.case, 0)
        optimizer: Any = self.optimizers()
        self.manual_backward(loss / window)
        if (batch_idx + 1) % window == 0:
            optimizer.step()
            optimizer.zero_grad()
            if self.is_stock:
                self.lr_schedulers().step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # `clip_gradients` in `training_step` would clip gradients that still have the loss scale.
        if self.is_stock and not self.automatic_optimization:
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)

    def configure_optimizers(self) -> Any:
        assert self.configure is not None, "the callback supplies the optimizer"
        return self.configure(self)


def stock(case: Case) -> tuple[Model, list[L.Callback], dict[str, Any]]:
    """Lightning alone, with torch's AdamW, LambdaLR at each step, and its own clipping."""

    def configure(module: Net) -> Any:
        groups: list[dict[str, Any]] = [{"params": list(module.parameters())}]
        if case["groups"] == "several":
            norms = [module.body.bias, *module.norm.parameters()]
            groups = [
                {"params": list(module.head.parameters()), "lr": 10 * LR},
                {"params": norms, "weight_decay": 0.0},
                {"params": [module.body.weight]},
            ]
        optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=False)
        scheduler = LambdaLR(optimizer, multiplier(case))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    options = {"gradient_clip_val": CLIP} if case["optimization"] == "automatic" else {}
    return Model(case, configure, is_stock=True), [], options


def ours(case: Case, folder: Path) -> tuple[Model, list[L.Callback], dict[str, Any]]:
    """The same by the callbacks, in either order, or with the factory in the module."""
    arguments = {
        **ADAMWS[case["optimizer"]],
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "schedule": SCHEDULES[case["schedule"]](),
        "param_groups": RULES if case["groups"] == "several" else [],
    }
    callbacks: list[L.Callback] = [lo.GradientClipping(CLIP), lo.OptimizerMonitor()]
    if case["guard"]:
        callbacks.append(lo.DivergenceGuard(report_dir=str(folder)))
    if case["where"] == "callback":
        callbacks.insert(0, lo.ConfigureOptimizers(**arguments))
    model = Model(case, None if case["where"] == "callback" else lo.OptimizerFactory(**arguments))
    logger = TensorBoardLogger(folder, name="", version=f"part{len(list(folder.glob('part*')))}")
    return model, callbacks if case["order"] == "first-to-last" else callbacks[::-1], {"logger": logger}


class Killed(Exception):
    """The end of the first part of a run that is resumed."""


class Kill(L.Callback):
    """Saves a checkpoint and ends the run there, in the middle of an epoch or at the end of one."""

    def __init__(self, case: Case, path: Path) -> None:
        self.case, self.path = case, path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        of_epoch = steps_in(self.case, 0)
        at = {"middle-of-epoch": max(of_epoch // 2, 1), "last-batch": of_epoch}.get(self.case["resume"])
        if trainer.global_step == at:
            self._save_and_end(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.case["resume"] == "after-epoch":
            self._save_and_end(trainer)

    def _save_and_end(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        raise Killed


class Accumulates(GradientAccumulationScheduler):
    """Lightning's, which forgets the factor of an epoch that is resumed in its middle."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)


def trainer_options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {**precision(case["precision"], 64.0), "log_every_n_steps": case["log"]}
    if case["optimization"] == "automatic" and case["accumulation"] != "scheduler":
        options["accumulate_grad_batches"] = case["accumulation"]
    if case["length"] != "steps":
        options["max_epochs"] = EPOCHS
    if case["length"] != "epochs":
        options["max_steps"] = total_steps(case) + (4 if case["length"] == "both-epochs-end-it" else 0)
    if case["limit"] is not None:
        options["limit_train_batches"] = case["limit"]
    options["reload_dataloaders_every_n_epochs"] = case["reload"]
    validation = {
        None: {"limit_val_batches": 0},
        "by-steps": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    }
    return options | validation.get(case["validation"], {"val_check_interval": case["validation"]})


def train(
    case: Case, folder: Path, make: Callable[[], tuple[Model, list[L.Callback], dict[str, Any]]]
) -> tuple[Model, L.Trainer, list[list[float]]]:
    """Train, in one part or two, and return module, Trainer, and the rates of each step."""
    rates: list[list[float]] = []
    path = folder / f"{make.__name__}.ckpt"
    parts = [True] if case["resume"] == "whole" else [False, True]
    for is_last in parts:
        model, callbacks, options = make()
        if case["accumulation"] == "scheduler":
            callbacks.insert(0, Accumulates({0: 2, 1: 3}))  # before ours, as an epoch would have begun
        recorder = Recorder()
        more = [recorder] if is_last else [recorder, Kill(case, path)]
        trainer = make_trainer([*callbacks, *more], **{**trainer_options(case), **options})
        ckpt_path = path if len(parts) == 2 and is_last else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
            if is_last:
                trainer.fit(model, batches(BATCHES), batches(1), ckpt_path=ckpt_path)
            else:
                with pytest.raises(Killed):
                    trainer.fit(model, batches(BATCHES), batches(1))
        rates += recorder.rates
    return model, trainer, rates


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{CASES.index(case)}-{'-'.join(map(str, case.values()))}")
def test_it_trains_as_stock_lightning_does(case: Case, tmp_path: Path) -> None:
    def theirs() -> Any:
        return stock(case)

    def mine() -> Any:
        return ours(case, tmp_path)

    expected_model, expected_trainer, expected_rates = train(case, tmp_path, theirs)
    model, trainer, rates = train(case, tmp_path, mine)
    curve = multiplier(case)
    peaks = [10 * LR, LR, LR] if case["groups"] == "several" else [LR]
    closed = [[peak * curve(step) for peak in peaks] for step in range(total_steps(case))]
    assert len(rates) == len(expected_rates) == len(closed)
    assert trainer.global_step == expected_trainer.global_step == len(closed)
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(closed), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected_rates), rtol=1e-6, atol=1e-9)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected_model.get_parameter(name), rtol=0, atol=2e-4, msg=name)

    tag = f"optim_lr/{'head' if case['groups'] == 'several' else 'default'}"
    points = [point for part in sorted(tmp_path.glob("part*")) for point in read_events(part).get(tag, [])]
    assert points == [(place, pytest.approx(closed[step][0])) for place, step in points_due(case).items()]


def test_every_pair_of_options_occurs() -> None:
    wanted = {
        ((one, a), (other, b))
        for (one, of_one), (other, of_other) in itertools.combinations(OPTIONS.items(), 2)
        for a, b in itertools.product(of_one, of_other)
        if {(one, a), (other, b)} not in IMPOSSIBLE
    }
    assert {pair for case in CASES for pair in combinations(case, 2)} == wanted
    assert len(CASES) == CONFIGURATIONS >= 150


def test_the_pair_that_is_left_out_is_refused_by_lightning() -> None:
    case = {**CASES[0], "optimization": "manual", "accumulation": "scheduler"}
    model, _, _ = stock(case)
    with pytest.raises(RuntimeError, match="Automatic gradient accumulation"):
        make_trainer([GradientAccumulationScheduler({0: 2})]).fit(model, batches(2))
