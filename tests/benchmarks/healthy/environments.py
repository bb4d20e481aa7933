"""Two small environments, many copies of each stepped at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Grid:
    """A field of 5 × 5 cells, from a random one to the corner: 1 for arriving, a small cost for each step.

    Args:
        copies: Number of copies.
    """

    features, actions = 25, 4
    _MOVES = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])

    def __init__(self, copies: int) -> None:
        self.place = torch.zeros(copies, 2, dtype=torch.long)
        self.reset(torch.ones(copies, dtype=torch.bool))

    def reset(self, which: Tensor) -> None:
        """Begin anew in the copies where ``which`` is True."""
        self.place = torch.where(which[:, None], torch.randint(4, self.place.shape), self.place)

    def observe(self) -> Tensor:
        """Return the cell of each copy, shape [copies, features]."""
        return F.one_hot(self.place[:, 0] * 5 + self.place[:, 1], 25).float()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Move; return the rewards, and where the goal is reached, each of shape [copies]."""
        self.place = (self.place + self._MOVES[actions]).clamp(0, 4)
        done = (self.place == 4).all(1)
        return done.float() - 0.05, done


class Pole:
    """A pole on a cart, to be kept upright for up to 200 steps: 1 for each (Barto, Sutton and Anderson, 1983).

    Args:
        copies: Number of copies.
    """

    features, actions = 4, 2

    def __init__(self, copies: int) -> None:
        self.state, self.age = torch.zeros(copies, 4), torch.zeros(copies)
        self.reset(torch.ones(copies, dtype=torch.bool))

    def reset(self, which: Tensor) -> None:
        """Begin anew in the copies where ``which`` is True."""
        self.state = torch.where(which[:, None], 0.1 * torch.rand_like(self.state) - 0.05, self.state)
        self.age = torch.where(which, 0.0, self.age)

    def observe(self) -> Tensor:
        """Return position, speed, angle and its speed of each copy, shape [copies, features]."""
        return self.state

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Push to the left or right; return the rewards, and where the pole is down or the time over."""
        x, v, angle, spin = self.state.unbind(1)
        force, sin, cos = 20.0 * actions - 10.0, angle.sin(), angle.cos()
        push = (force + 0.05 * spin.square() * sin) / 1.1
        bend = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        speed = push - 0.05 * bend * cos / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * speed, angle + 0.02 * spin, spin + 0.02 * bend], dim=1)
        self.age = self.age + 1
        down = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.21)
        return torch.ones(len(x)), down | (self.age >= 200)
