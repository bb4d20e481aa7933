"""Seven small real tasks with held-out data, each to be trained by any optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from examples.char_lm import CharLM, StdlibText
from tests.divergence.trainings import TRAININGS

STEPS = 200
"""Steps of a full run."""


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is trained, the optimizer aside.

    Args:
        network: Makes the network.
        data: Makes inputs and targets.
        loss: Of outputs and targets.
        schedule: Arguments of ConfigureOptimizers: schedule and warmup.
        clip: Gradient norm; None for no clipping.
        batch_size: Samples in a step.
        held_out: Share of the samples that is not trained on.
    """

    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    schedule: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    batch_size: int = 32
    held_out: float = 0.25

    @functools.cached_property
    def split(self) -> tuple[TensorDataset, TensorDataset]:
        """What is trained on and what is held out, always the same."""
        inputs, targets = self.data()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(17))
        cut = round(len(inputs) * self.held_out)
        out, train = order[:cut], order[cut:]
        return TensorDataset(inputs[train], targets[train]), TensorDataset(inputs[out], targets[out])

    def loader(self, seed: int) -> DataLoader[Any]:
        """Return the training data in an order by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.split[0], self.batch_size, shuffle=True, drop_last=True, generator=generator)

    @torch.no_grad()
    def loss_on(self, network: nn.Module, data: TensorDataset) -> float:
        """Return the mean loss over ``data`` (at most 1024 samples) in evaluation mode."""
        training = network.training
        network.eval()
        inputs, targets = (tensor[:1024] for tensor in data.tensors)
        loss = float(self.loss(network(inputs), targets))
        network.train(training)
        return loss


class Module(L.LightningModule):
    """Trains a network of a task, and has its losses and the held-out losses of the last tenth of the run."""

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lr = 1.0  # for Lightning's finder
        self.network, self.task, self.losses = task.network(), task, []
        self.held_out: list[float] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.task.loss(self.network(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


class _Symbols(nn.Module):
    """The demo's model in a reduced size, over flat targets."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CharLM(dim=32, num_layers=2, num_heads=2)

    def forward(self, text: Tensor) -> Tensor:
        return self.model(text).flatten(0, 1)


def _stdlib() -> tuple[Tensor, Tensor]:
    data = StdlibText(context=32, train_windows=6400, val_windows=1)
    data.setup("fit")
    windows = torch.stack([data.train[index] for index in range(len(data.train))])
    return windows[:, :-1], windows[:, 1:]


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 64), nn.GELU(), nn.Unflatten(1, (16, 2, 2))),
        *(nn.ConvTranspose2d(16, 8, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(8, 1, 2, stride=2), nn.Flatten()),
    )


def _table() -> nn.Module:
    """The network of the embeddings with dropout, without which 331 samples are learned by heart in 200 steps."""
    return nn.Sequential(
        *(nn.Embedding(200, 4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(40, 32)),
        *(nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 1)),
    )


def _tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.flatten())


def _digits() -> tuple[Tensor, Tensor]:
    return TRAININGS["perceptron, SGD"].data()


def _images() -> tuple[Tensor, Tensor]:
    images, _ = _digits()
    return images, images


def _of(name: str, **changes: Any) -> Task:
    training = TRAININGS[name]
    schedule = {key: training.configure[key] for key in ("schedule", "warmup") if key in training.configure}
    given: dict[str, Any] = {
        "network": training.network,
        "data": training.data,
        "loss": training.loss,
        "schedule": schedule,
        "clip": training.clip,
    }
    return Task(**given | changes)


TASKS: dict[str, Task] = {
    "perceptron": _of("perceptron, SGD"),
    "convolutions": _of("convolutions, AdamW, bf16"),
    "transformer": _of("transformer, AdamW", batch_size=16),
    "embeddings": _of("embeddings, RMSprop", network=_table),
    "demo": Task(_Symbols, _stdlib, _tokens, {"schedule": "cosine", "warmup": "5%"}, clip=1.0, batch_size=16),
    "GRU": _of("GRU, Lion"),
    "autoencoder": Task(_autoencoder, _images, F.mse_loss, {"schedule": "linear", "warmup": "5%"}),
}
HELD_OUT_TASKS = ("GRU", "autoencoder")
"""Tasks that the rules of suggestion were not designed on."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}},
    "adamw": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "rmsprop": {"optimizer": "rmsprop"},
}
