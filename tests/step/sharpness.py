"""Optimizers that evaluate their closure more than once, and such that step by another one inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Sam(Optimizer):
    """Sharpness-aware minimization: climbs along the gradient, evaluates again, goes back and steps by ``base``.

    Args:
        base: Makes the optimizer inside from parameter groups.
        rho: How far to climb.
    """

    def __init__(self, params: Any, base: Callable[[Any], Optimizer], rho: float = 0.5) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups
        self.steps = 0

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def climb(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.params]).norm() + 1e-12
        for p in self.params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))

    def back(self) -> None:
        for p in self.params:
            p.data = self.state[p]["old"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.steps += 1
        self.climb()
        with torch.enable_grad():
            closure()
        self.back()
        self.base_optimizer.step()
        return loss


class OneCallSam(Sam):
    """The same for gradients that lie ready: the closure makes the second ones, after the weights have been moved."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        self.climb()
        with torch.enable_grad():
            loss = closure()
        self.back()
        self.base_optimizer.step()
        return loss


class SumSam(Sam):
    """Steps with the sum of both gradients, which only exists right before the step inside."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.steps += 1
        first = [p.grad.clone() for p in self.params]
        self.climb()
        with torch.enable_grad():
            closure()
        self.back()
        for p, grad in zip(self.params, first, strict=True):
            p.grad.add_(grad)
        self.base_optimizer.step()
        return loss


class LookSam(Sam):
    """Climbs in every third step only, and evaluates once in the others."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        if self.steps % 3 == 0:
            return super().step(closure)
        with torch.enable_grad():
            loss = closure()
        self.steps += 1
        self.base_optimizer.step()
        return loss


class Lookahead(Sam):
    """Hands its closure on to the optimizer inside, and goes half of the way back after every other step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for p in self.params if self.steps == 0 else []:
            self.state[p]["slow"] = p.detach().clone()
        loss = self.base_optimizer.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for p in self.params:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class OwnSam(Sam):
    """Has no optimizer inside: it goes back and updates by itself."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.5) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "rho": rho})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        self.climb()
        with torch.enable_grad():
            closure()
        self.back()
        for p in self.params:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        self.steps += 1
        return loss


class Clipped(torch.optim.SGD):
    """SGD that clips the gradients it is called with, as torch does."""

    max_norm = 0.1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_norm)
        super().step()
        return loss
