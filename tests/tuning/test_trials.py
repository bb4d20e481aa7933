"""Trials inside a fit: what they run under, and that the fit which follows is the one without them, bit for bit."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_optim as lo
from lightning_optim.tuning.trials.fit import FitTrials
from tests.helpers import FEATURES, RULES, Net, make_trainer, precision


class Trying(L.Callback):
    """Runs trials before the first batch, and keeps what they gave."""

    finds_rates = True

    def __init__(self, steps: int = 6) -> None:
        self.steps, self.trials, self.is_done = steps, [], False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.is_done:
            return
        self.is_done = True
        trials = FitTrials(trainer)
        done = []
        for place in range(len(trainer.optimizers)):
            done.append(trials.sweep(place, [1e-4 * 3**i for i in range(self.steps)]))
            done.append(trials.at(place, 0.01, self.steps))
            done.append(trials.at(place, 0.01, self.steps))
        self.trials = done


class Noisy(Net):
    """With everything that a trial could leave behind: buffers, counters, random numbers, an average."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.batch_norm = nn.Dropout(0.3), nn.BatchNorm1d(8)
        self.seen, self.by_name, self.ema = 0, {"losses": []}, copy.deepcopy(self.head)
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.batch_norm(self.norm(self.body(x))))))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        x, y = batch
        noise = random.random() + np.random.rand() + self.rng.random()
        loss = nn.functional.mse_loss(self(x), y) * (1 + 0.1 * noise)
        self.by_name["losses"].append(loss.item())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for average, param in zip(self.ema.parameters(), self.head.parameters(), strict=True):
                average.lerp_(param, 0.1)


class ByHand(Noisy):
    """Two optimizers, stepped by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer, factor in zip(self.optimizers(), (1.0, 0.5), strict=True):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx) * factor)
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        one = torch.optim.SGD([*self.body.parameters(), *self.norm.parameters()], lr=0.1, momentum=0.9)
        two = torch.optim.Adam(self.head.parameters(), lr=0.01)
        return [one, two], [torch.optim.lr_scheduler.StepLR(o, 3) for o in (one, two)]


def samples(count: int = 48) -> TensorDataset:
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, 3 * torch.stack([inputs[:, 0] + inputs[:, 1], inputs[:, 2]], dim=1))


class Stateful:
    """A loader that counts what it has given, and goes on from there."""

    def __init__(self) -> None:
        self.data, self.place = samples(), 0
        self.order = torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist()

    def __len__(self) -> int:
        return 12

    def __iter__(self):
        for _ in range(len(self)):
            rows = [self.order[(self.place + i) % 48] for i in range(4)]
            self.place += 4
            yield [torch.stack(column) for column in zip(*(self.data[row] for row in rows), strict=True)]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Stream(IterableDataset):
    """Samples without a length, from a generator of random numbers that it keeps."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self):
        for _ in range(40):
            value = self.random.random()
            yield torch.full((FEATURES,), value), torch.tensor([value, -value])


def everything(trainer: Any, model: Any) -> dict[str, Any]:
    optimizers = [o.state_dict() for o in trainer.optimizers]
    return {
        "model": model.state_dict(),
        "optimizers": optimizers,
        "schedules": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
        "python": (model.seen, model.by_name, model.rng.bit_generator.state),
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "loops": trainer.fit_loop.state_dict(),
        "metrics": trainer.callback_metrics,
    }


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


OURS = {
    "groups": lambda: [lo.ConfigureOptimizers("adamw", 0.01, schedule="cosine", warmup=3, param_groups=RULES)],
    "all": lambda: [
        lo.ConfigureOptimizers("muon", 0.01, schedule="wsd", warmup="10%"),
        lo.GradientClipping(0.5),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
    ],
    "schedule_free": lambda: [lo.ConfigureOptimizers("schedule_free_adamw", 0.01), lo.ScheduleFree()],
    "average": lambda: [lo.ConfigureOptimizers("adamw", 0.01, optimizer_kwargs={"ema": 0.9}), lo.WeightAverage()],
    "torch": lambda: [
        lo.ConfigureOptimizers(torch.optim.Adam, 0.01, optimizer_kwargs={"fused": True}, schedule="cosine"),
        lo.GradientClipping(method="adagc"),
    ],
}


def fit(model: Any, callbacks: list[Any], loader: Any, trying: list[Any], path: Any, **trainer: Any) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    options = precision(trainer.pop("precision", "32-true"))
    made = make_trainer([*callbacks, *trying], **{"max_steps": 20, "max_epochs": -1, **trainer, **options})
    made.fit(model, loader)
    return everything(made, model)


def loader_of(kind: str) -> Any:
    return {
        "shuffled": lambda: DataLoader(samples(), 4, shuffle=True),
        "own generator": lambda: DataLoader(samples(), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
        "stateful": Stateful,
        "stream": lambda: DataLoader(Stream(), 4),
        "workers": lambda: DataLoader(samples(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    }[kind]()


CASES = [
    *[(name, "shuffled", {}) for name in OURS],
    ("groups", "own generator", {"precision": "bf16-mixed"}),
    ("all", "shuffled", {"precision": "16-mixed"}),
    ("all", "stateful", {"accumulate_grad_batches": 3}),
    ("torch", "stream", {"accumulate_grad_batches": 2, "precision": "16-mixed"}),
    ("groups", "workers", {}),
]


@pytest.mark.filterwarnings("ignore:Running statistics of batch norm")
@pytest.mark.parametrize(("callbacks", "loader", "trainer"), CASES, ids=lambda each: str(each))
def test_the_fit_that_follows_is_bit_equal_to_one_without_trials(callbacks, loader, trainer, tmp_path):
    fits = []
    for trying in ([], [Trying()]):
        model = Noisy()
        fits.append(fit(model, OURS[callbacks](), loader_of(loader), trying, tmp_path, **trainer))
    assert_equal(*fits)
    sweep, first, again = trying[0].trials
    assert [len(each.losses) for each in trying[0].trials] == [6, 6, 6]
    assert [each.error for each in trying[0].trials] == [None] * 3
    assert first.losses == again.losses != sweep.losses


def test_two_optimizers_of_a_module_that_steps_itself(tmp_path):
    fits = [fit(ByHand(), [], loader_of("shuffled"), trying, tmp_path) for trying in ([], [Trying()], [Trying()])]
    assert_equal(*fits[:2])
    trying = [Trying()]
    fit(ByHand(), [lo.GradientClipping(1.0)], loader_of("shuffled"), trying, tmp_path)
    assert [len(each.losses) for each in trying[0].trials] == [6] * 6
    assert trying[0].trials[0].losses[0] > 1.5 * trying[0].trials[3].losses[0]  # each its own loss


class Thrice(Noisy):
    """Three steps in each batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Warms(Thrice):
    """With rates of its own, as Lightning's guide has it for a warmup."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    training_step = Noisy.training_step

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class Refuses(Noisy):
    """Takes no step for every other batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


USED: list[float] = []
"""Rates of steps; a variable of a module, which no snapshot follows."""


class Rates(L.Callback):
    """Notes the rate of each step of the trials, from torch's own hook."""

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        optimizer.register_step_post_hook(lambda *_: USED.append(optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize(("cls", "steps_per_loss"), [(Thrice, 1), (Warms, 1), (Refuses, 2)])
def test_each_step_of_a_sweep_has_its_rate_whoever_steps(cls, steps_per_loss, tmp_path):
    trying, fits = [Trying(7)], []
    for each in ([], trying):
        USED.clear()
        fits.append(fit(cls(), [Rates()], loader_of("shuffled"), each, tmp_path, max_steps=12))
    assert_equal(*fits)
    sweep = trying[0].trials[0]
    assert sweep.error is None
    assert len(sweep.losses) == 7
    assert USED[: 7 * steps_per_loss : steps_per_loss] == pytest.approx([1e-4 * 3**i for i in range(7)])


def test_a_trial_that_fails_holds_no_memory(tmp_path):
    held = []

    class Fails(Noisy):
        def training_step(self, batch, batch_idx):
            trainer: Any = self.trainer
            if type(trainer.callbacks[0]).__name__ == "_Steering":
                activations = self(batch[0])
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError(str(activations.shape))
            return super().training_step(batch, batch_idx)

    trying = [Trying()]
    fit(Fails(), OURS["groups"](), loader_of("shuffled"), trying, tmp_path)
    assert [type(trial.error) for trial in trying[0].trials] == [torch.OutOfMemoryError] * 3
    assert [activations() for activations in held] == [None] * 3


def test_a_trial_that_fails_on_one_of_several_ranks_ends_the_run(tmp_path, monkeypatch):
    class Fails(Noisy):
        def training_step(self, batch, batch_idx):
            monkeypatch.setattr(L.Trainer, "world_size", 2)
            raise torch.OutOfMemoryError("here")

    with pytest.raises(RuntimeError, match="failed on rank 0 of 2 with OutOfMemoryError: here") as error:
        fit(Fails(), OURS["groups"](), loader_of("shuffled"), [Trying()], tmp_path)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
