"""Runs that learn what data look like: a variational autoencoder, contrastive learning, diffusion."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.healthy.base import Classifier, digits, mlp


class Annealed(Classifier):
    """A variational autoencoder whose KL term grows from nothing to its full weight: the loss rises for long."""

    metric = "-loss on test images"
    beta: ClassVar[float] = 4.0
    lr = 3e-3

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net, self.decoder = mlp(64, 64, 16), mlp(8, 64, 64)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstruction and KL, in nats per image."""
        mean, log_var = self.net(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_var / 2).exp()
        reconstruction = (self.decoder(code) - x).square().sum() / (2 * 0.02)  # Gaussian, less a constant
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum() / 2
        return reconstruction / len(x), kl / len(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        reconstruction, kl = self.terms(batch[0])
        share = (batch_idx / self.steps - 0.2) / 0.6
        return reconstruction + self.beta * min(1.0, max(0.0, share)) * kl

    def score(self) -> float:
        reconstruction, kl = self.terms(digits("test")[0])
        return -float(reconstruction + self.beta * kl)


class GrowingBatch(Classifier):
    """Contrastive learning with a batch that doubles: with more to tell apart the loss is higher."""

    steps = 600
    metric = "accuracy of the nearest neighbour"
    temperature: ClassVar[float] = 0.2

    def network(self) -> Any:
        return mlp(64, 128, 32)

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, _ = digits("train")
        self.batch_size = 16 * 2 ** (5 * step // self.steps)  # type: ignore[misc]
        rows = torch.randperm(len(x), generator=rng)[: self.batch_size]
        return augmented(x[rows], rng), augmented(x[rows], rng)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = (F.normalize(self(x)) for x in batch)
        return F.cross_entropy(one @ other.T / self.temperature, torch.arange(len(one)))

    def score(self) -> float:
        (x, y), (test, classes) = digits("train"), digits("test")
        nearest = (F.normalize(self(test)) @ F.normalize(self(x)).T).argmax(1)
        return float((y[nearest] == classes).float().mean())


class GrowingQueue(GrowingBatch):
    """Contrastive learning against a queue of past codes that fills slowly, by a network that follows its weights."""

    longest: ClassVar[int] = 4096

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.follower = self.network().requires_grad_(False)
        self.follower.load_state_dict(self.net.state_dict())
        self.register_buffer("queue", torch.empty(0, 32), persistent=False)
        self.queue: Tensor

    def make_batch(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, _ = digits("train")
        rows = torch.randperm(len(x), generator=rng)[:16]
        return augmented(x[rows], rng), augmented(x[rows], rng)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        query = F.normalize(self(batch[0]))
        with torch.no_grad():
            key = F.normalize(self.follower(batch[1]))
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], dim=1)
        self.queue = torch.cat([self.queue, key])[-self.longest :]
        return F.cross_entropy(scores / self.temperature, torch.zeros(len(query), dtype=torch.long))

    def on_train_batch_end(self, *args: Any) -> None:
        torch._foreach_lerp_(list(self.follower.parameters()), list(self.net.parameters()), 0.02)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)


class Diffusion(Classifier):
    """Prediction of the noise over an image: the loss of a small batch depends on how much noise was drawn."""

    steps = 800
    batch_size = 16
    metric = "-loss on test images"

    def network(self) -> Any:
        return mlp(65, 128, 128, 64)

    def loss(self, x: Tensor) -> Tensor:
        time, noise = torch.rand(len(x), 1), torch.randn_like(x)
        noisy = time.cos() * (2 * x - 1) + time.sin() * noise
        errors = (self.net(torch.cat([noisy, time], dim=1)) - noise).square().mean(1, keepdim=True)
        return (errors / time.clamp(min=0.05).square()).mean()  # all amounts of noise count alike in the signal

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def score(self) -> float:
        x, _ = digits("test")
        return -float(sum(self.loss(x) for _ in range(10)) / 10)


def augmented(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return images with noise and a tenth of the pixels left out."""
    kept = torch.rand(x.shape, generator=rng) > 0.1
    return x * kept + 0.1 * torch.randn(x.shape, generator=rng)
