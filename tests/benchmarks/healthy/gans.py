"""Generative adversarial networks, in manual optimization: neither loss is expected to fall."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.healthy.base import Healthy, mlp

_MODES = 5
_SPREAD = 0.1
_LATENT = 8


class Gan(Healthy):
    """Five Gaussians on a circle, by the usual loss (binary cross-entropy, not saturating)."""

    steps = 500  # of both networks
    metric = "share of good samples"
    critic_steps: ClassVar[int] = 1
    lr: ClassVar[float] = 2e-3
    betas: ClassVar[tuple[float, float]] = (0.0, 0.9)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.automatic_optimization = False
        self.generator = mlp(_LATENT, 64, 64, 2)
        self.critic = mlp(2, 64, 64, 1, activation=nn.LeakyReLU)

    def make_batch(self, step: int, rng: torch.Generator) -> Tensor:
        angles = torch.randint(_MODES, (128,), generator=rng) * (2 * math.pi / _MODES)
        modes = torch.stack([angles.cos(), angles.sin()], dim=1)
        return modes + _SPREAD * torch.randn(128, 2, generator=rng)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()  # type: ignore[attr-defined]
        for _ in range(self.critic_steps):
            fake = self.generate(len(batch)).detach()
            for_critic.zero_grad()
            self.manual_backward(self.critic_loss(batch, fake))
            for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(self.generator_loss(self.critic(self.generate(len(batch)))))
        for_generator.step()

    def generate(self, samples: int) -> Tensor:
        result: Tensor = self.generator(torch.randn(samples, _LATENT))
        return result

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()

    def generator_loss(self, scores: Tensor) -> Tensor:
        return F.softplus(-scores).mean()

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.critic
        return [torch.optim.Adam(part.parameters(), lr=self.lr, betas=self.betas) for part in parts]

    def score(self) -> float:
        samples = self.generate(2000)
        angles = torch.arange(_MODES) * (2 * math.pi / _MODES)
        modes = torch.stack([angles.cos(), angles.sin()], dim=1)
        return float((torch.cdist(samples, modes).amin(1) < 3 * _SPREAD).float().mean())


class HingeGan(Gan):
    """The hinge loss."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - self.critic(real)).mean() + F.relu(1 + self.critic(fake)).mean()

    def generator_loss(self, scores: Tensor) -> Tensor:
        return -scores.mean()


class LeastSquaresGan(Gan):
    """Least squares."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return (self.critic(real) - 1).square().mean() + self.critic(fake).square().mean()

    def generator_loss(self, scores: Tensor) -> Tensor:
        return (scores - 1).square().mean()


class WassersteinGan(HingeGan):
    """The Wasserstein distance with a gradient penalty, and three steps of the critic for each of the generator."""

    steps = 300
    critic_steps = 3
    penalty: ClassVar[float] = 1.0
    lr = 4e-3

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + self.penalty * penalty
