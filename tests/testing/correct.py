"""An optimizer in plain torch that passes every check, in pieces that a defect can replace."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class Correct(Optimizer):
    """AdamW that computes and keeps its state in float32, or in float64 for float64 parameters."""

    def __init__(self, params, lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, maximize=False, foreach=False):
        self.validate(lr)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, "foreach": foreach})

    def validate(self, lr):
        if not lr >= 0:
            raise ValueError(f"Invalid lr={lr}: must not be negative.")

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.evaluate(closure)
        for group in self.param_groups:
            self.update_group(group, [p for p in group["params"] if p.grad is not None])
        return self.result(loss)

    def result(self, loss):
        return loss

    def evaluate(self, closure):
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def update_group(self, group, params):
        for param in params:
            self.update(group, param, self.gradient(group, param))

    def gradient(self, group, param):
        grad = param.grad
        if grad.is_sparse:
            raise RuntimeError("Correct does not support sparse gradients.")
        if grad.is_complex():
            raise RuntimeError("Correct does not support complex parameters.")
        grad = grad.detach().to(self.dtype(param))
        return -grad if group["maximize"] else grad

    def dtype(self, param):
        return torch.float64 if param.dtype == torch.float64 else torch.float32

    def state_of(self, param, grad):
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["m"], state["v"] = torch.zeros_like(grad), torch.zeros_like(grad)
        return state

    def update(self, group, param, grad):
        state = self.state_of(param, grad)
        state["step"] += 1
        lr, (beta1, beta2), step = self.lr(group), self.betas(group), self.count(state)
        value = self.decayed(group, param.to(grad.dtype), lr)
        state["m"].lerp_(grad, 1 - beta1)
        state["v"].lerp_(grad.square(), 1 - beta2)
        denominator = self.denominator(group, state["v"] / (1 - beta2**step))
        self.write(param, value - lr * (state["m"] / (1 - beta1**step)) / denominator)

    def lr(self, group):
        return group["lr"]

    def betas(self, group):
        return group["betas"]

    def count(self, state):
        return state["step"]

    def decayed(self, group, value, lr):
        return value * (1 - lr * group["weight_decay"])

    def denominator(self, group, v):
        return v.sqrt() + group["eps"]

    def write(self, param, value):
        param.copy_(value)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # Keys are what the saved groups list under "params": numbers, or names under torch.distributed.checkpoint.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, param in zip(keys, params, strict=True):
            kept = state_dict["state"].get(key, {})
            self.state[param] = {k: v.clone().to(param.device) if torch.is_tensor(v) else v for k, v in kept.items()}


def formula(param, grad, state, step, *, lr, betas, eps, weight_decay, **_):
    """The same update as a plain function of one parameter."""
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * grad
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * grad**2
    m, v = state["m"] / (1 - betas[0] ** step), state["v"] / (1 - betas[1] ** step)
    return param - lr * weight_decay * param - lr * m / (v.sqrt() + eps)
