"""What many tests share: a tiny model, its data, quiet Trainers, recorders, and a reader of event files."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_optim as lo
from lightning_optim.step import gradients

FEATURES = 4

# A head of a rate of its own; with `no_decay` three groups of `Net`.
RULES = [lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10), "no_decay"]

# One optimizer in the three ways that take divisor and skip differently, as arguments of ConfigureOptimizers.
ADAMWS: dict[str, dict[str, Any]] = {
    "ours": {"optimizer": "adamw"},
    "torch-fused": {"optimizer": torch.optim.AdamW, "optimizer_kwargs": {"fused": True}},
    "torch": {"optimizer": torch.optim.AdamW, "optimizer_kwargs": {"fused": False}},
}
SGDS: dict[str, dict[str, Any]] = {
    "ours": {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}},
    "torch-fused": {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9, "fused": True}},
    "torch": {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9, "fused": False}},
}


class Net(L.LightningModule):
    """A body, a norm and a head, in the module anyone has, with an optimizer that nobody wants.

    Args:
        nan_batches: Batches whose loss is NaN.
        seed: Seed of the weights.
    """

    def __init__(self, nan_batches: Iterable[int] = (), seed: int = 0) -> None:
        super().__init__()
        self.nan_batches = set(nan_batches)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Linear(FEATURES, 8)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        return loss * float("nan") if batch_idx in self.nan_batches else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=123.0)


class SeesWeights(Net):
    """Keeps the weights that each evaluation sees, and raises where told to.

    Args:
        raise_in: "training", at the third batch, or "validation".
        nan_batches: As for `Net`.
    """

    def __init__(self, raise_in: str = "", nan_batches: Iterable[int] = ()) -> None:
        super().__init__(nan_batches)
        self.seen: list[list[Tensor]] = []
        self.raise_in = raise_in

    def training_step(self, batch, batch_idx):
        if self.raise_in == "training" and batch_idx == 2:
            raise ArithmeticError
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.append(weights(self))
        if self.raise_in == "validation":
            raise ArithmeticError
        super().validation_step(batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.seen.append(weights(self))


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of the weights of a module, and of its buffers."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


class BareNet(Net):
    """The same without ``configure_optimizers``, which Lightning finds out from the class."""

    configure_optimizers = L.LightningModule.configure_optimizers


class NetWith(Net):
    """The same with optimizers of a test's own.

    Args:
        configure: What ``configure_optimizers`` does with the module.
        options: As for `Net`.
    """

    def __init__(self, configure: Callable[[Net], Any], **options: Any) -> None:
        super().__init__(**options)
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class TwoOptimizers(Net):
    """Manual optimization: an optimizer of the body and one of the head, each of which steps once in a batch.

    Args:
        makes: What makes each of the two from its parameters.
        factor: By what the loss is multiplied, from the optimizer's number and the batch's.
    """

    def __init__(
        self,
        *makes: Callable[[Iterator[nn.Parameter]], Optimizer],
        factor: Callable[[int, int], float] = lambda index, batch_idx: 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.makes, self.factor = makes, factor

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for index, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss * self.factor(index, batch_idx))
            optimizer.step()
        return loss

    def configure_optimizers(self) -> list[Optimizer]:
        return [make(part.parameters()) for make, part in zip(self.makes, (self.body, self.head), strict=True)]


class Ramp(L.LightningModule):
    """One weight whose gradient is 1 whatever the batch, so that plain SGD moves it by the rate it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * 1.0

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=123.0)


def samples(count: int, scale: float = 1.0) -> TensorDataset:
    """The same ``count`` inputs and targets every time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x * scale, torch.randn(count, 2, generator=generator) * scale)


def batches(count: int, batch_size: int = 2, scale: float = 1.0) -> DataLoader[Any]:
    """A loader of ``count`` batches, in a fixed order."""
    return DataLoader(samples(count * batch_size, scale), batch_size=batch_size)


class Data(L.LightningDataModule):
    """The same as a data module, for the command line.

    Args:
        count: How many batches.
    """

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader[Any]:
        return batches(self.count)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches(2)

    test_dataloader = predict_dataloader = val_dataloader


class StatefulLoader:
    """Batches in a fixed order, which remembers where it was, as torchdata's loader does."""

    def __init__(self, count: int, seen: list[int], batch_size: int = 2) -> None:
        self.count, self.seen, self.position = count, seen, 0
        self._batches = list(zip(*(t.split(batch_size) for t in samples(batch_size * count).tensors), strict=True))

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        self.position %= self.count  # Lightning takes no batch beyond the last, so nothing ran after its `yield`
        while self.position < self.count:
            index, self.position = self.position, self.position + 1
            self.seen.append(index)
            yield self._batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(self.count))


def make_trainer(callbacks: Iterable[L.Callback] = (), **options: Any) -> L.Trainer:
    """A Trainer on the CPU without noise, logger and checkpoints, for one epoch unless told otherwise."""
    length = {} if options.keys() & {"max_epochs", "max_steps", "max_time", "fast_dev_run"} else {"max_epochs": 1}
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **length, **options})


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def precision(name: str, init_scale: float = 1024.0) -> dict[str, Any]:
    """Trainer options for a precision; 16-mixed with a GradScaler, which Lightning itself makes for CUDA only."""
    if name == "16-mixed":
        return {"plugins": [MixedPrecision(name, "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))]}
    return {"precision": name}


class Recorder(L.Callback):
    """Notes, from torch's own hooks and behind ours, what each update used, and what it left.

    Attributes:
        rates: Learning rate of every group, one row per update that happened.
        weights: A copy of all parameters after each batch.
    """

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.weights: list[list[Tensor]] = []
        self._handles: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._note))

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class SaveAt(L.Callback):
    """Saves one checkpoint, behind the first batch after which the run has taken ``step`` steps.

    Args:
        step: Value of ``trainer.global_step``.
        path: File or folder of the checkpoint.
    """

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path, self._saved = step, path, False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and not self._saved:
            self._saved = True
            trainer.save_checkpoint(self.path)


class Snapshots(L.Callback):
    """Copies, around every batch, everything that a skipped step must leave alone."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.before.append(_snapshot(trainer, pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.after.append(_snapshot(trainer, pl_module))


def _snapshot(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "parameters": dict(pl_module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
    )


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many gradients each measurement of them is, from now on; whoever measures."""
    reads: list[int] = []
    read = gradients.measure_norm_sq  # type: ignore[attr-defined]
    monkeypatch.setattr(gradients, "measure_norm_sq", lambda tensors: (reads.append(len(tensors)), read(tensors))[1])
    return reads


def through_a_file(state: Any) -> Any:
    """What is left of ``state`` in a checkpoint, which may hold nothing but plain values and tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def bit_equal(a: Any, b: Any) -> bool:
    """Whether two nests of containers, numbers and tensors are the same, dtypes and NaNs included."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool(((a == b) | (a.isnan() & b.isnan())).all())
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(bit_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(bit_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def read_events(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the event files under ``folder``, as (step, value) points under its tag."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes, as under a quota."""
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
