"""Reinforcement learning: losses of either sign that say little about how well it goes, and returns that do."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.healthy.base import Healthy, mlp
from tests.benchmarks.healthy.environments import Grid, Pole


class Reinforce(Healthy):
    """REINFORCE on the field: whole episodes, and returns less their mean."""

    steps = 600
    metric = "mean return"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.actor = mlp(25, 64, 4)

    def make_batch(self, step: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(1)  # what is learned from is what the actor does

    def episodes(self, copies: int, longest: int = 20) -> tuple[Tensor, ...]:
        """Play; return observations, actions, rewards, and whether the episode still ran, each [time, copies, ...]."""
        env, running = Grid(copies), torch.ones(copies, dtype=torch.bool)
        played = []
        for _ in range(longest):
            seen = env.observe()
            with torch.no_grad():
                action = draw(self.actor(seen))
            reward, done = env.step(action)
            played.append((seen, action, reward * running, running))
            running = running & ~done
        return tuple(torch.stack(part) for part in zip(*played, strict=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seen, actions, rewards, running = self.episodes(16)
        returns = rewards.flip(0).cumsum(0).flip(0)
        gain = returns - returns[running].mean()
        return -(log_prob(self.actor(seen), actions) * gain)[running].mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=5e-3)

    def score(self) -> float:
        return float(self.episodes(256)[2].sum(0).mean())


class ActorCritic(Healthy):
    """Advantage actor-critic on the pole; the critic's part of the loss grows with the returns."""

    steps = 600
    metric = "mean return"
    horizon: ClassVar[int] = 8
    discount: ClassVar[float] = 0.97

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.actor, self.critic = mlp(4, 64, 2), mlp(4, 64, 1)
        self.env = Pole(32)

    def make_batch(self, step: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(1)

    @torch.no_grad()
    def play(self) -> tuple[Tensor, Tensor, Tensor]:
        """Play on; return observations, actions and discounted returns, each [horizon, copies, ...]."""
        seen, actions, rewards, ends = [], [], [], []
        for _ in range(self.horizon):
            seen.append(self.env.observe())
            actions.append(draw(self.actor(seen[-1])))
            reward, done = self.env.step(actions[-1])
            self.env.reset(done)
            rewards.append(reward)
            ends.append(done)
        value = self.critic(self.env.observe())[:, 0]
        returns = []
        for reward, done in zip(reversed(rewards), reversed(ends), strict=True):
            value = reward + self.discount * value * ~done
            returns.append(value)
        return torch.stack(seen), torch.stack(actions), torch.stack(returns[::-1])

    def losses(self) -> tuple[Tensor, Tensor]:
        """Return the losses of actor and critic."""
        seen, actions, returns = self.play()
        values, logits = self.critic(seen)[..., 0], self.actor(seen)
        gain = (returns - values).detach()
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return -(log_prob(logits, actions) * gain).mean() - 0.01 * entropy, (values - returns).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        actor, critic = self.losses()
        return actor + 0.5 * critic

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    @torch.no_grad()
    def score(self) -> float:
        env, running, total = Pole(64), torch.ones(64, dtype=torch.bool), 0.0
        while running.any():
            _, done = env.step(draw(self.actor(env.observe())))
            total += float(running.sum()) / 64
            running = running & ~done
        return total


class TwoOptimizersActorCritic(ActorCritic):
    """The same in manual optimization, with an optimizer of the actor and one of the critic."""

    steps = 400

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.losses(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=3e-3) for part in (self.actor, self.critic)]


class QLearning(Healthy):
    """Q-learning on the pole with a replay buffer and a target network: the loss rises as the values grow."""

    steps = 800
    metric = "mean return"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.actor = mlp(4, 64, 2)
        self.target = copy.deepcopy(self.actor).requires_grad_(False)
        self.env = Pole(16)
        self.replay: list[tuple[Tensor, ...]] = []

    def make_batch(self, step: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(1)

    @torch.no_grad()
    def explore(self, share: float) -> None:
        """Add a step of all copies to the buffer, of which a share is random."""
        seen = self.env.observe()
        action = torch.where(torch.rand(16) < share, torch.randint(2, (16,)), self.actor(seen).argmax(1))
        reward, done = self.env.step(action)
        self.replay = [*self.replay[-999:], (seen, action, reward, self.env.observe(), done)]
        self.env.reset(done)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 25 == 0:
            self.target.load_state_dict(self.actor.state_dict())
        for _ in range(2):
            self.explore(max(0.05, 1 - batch_idx / 200))
        chosen = [self.replay[int(i)] for i in torch.randint(len(self.replay), (8,))]
        seen, action, reward, after, done = (torch.cat(part) for part in zip(*chosen, strict=True))
        with torch.no_grad():
            goal = reward + 0.97 * self.target(after).amax(1) * ~done
        return F.mse_loss(self.actor(seen).gather(1, action[:, None])[:, 0], goal)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.actor.parameters(), lr=5e-3)

    @torch.no_grad()
    def score(self) -> float:
        env, running, total = Pole(64), torch.ones(64, dtype=torch.bool), 0.0
        while running.any():
            _, done = env.step(self.actor(env.observe()).argmax(1))
            total += float(running.sum()) / 64
            running = running & ~done
        return total


def draw(logits: Tensor) -> Tensor:
    """Return an action for each row of [copies, actions], by the Gumbel trick, which is quicker than a distribution."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Return the logarithm of the probability of each action."""
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
