"""Defects of direction, gradients, closures and updates."""

from __future__ import annotations

import random

import torch

from tests.testing.correct import Correct
from tests.testing.defects import fails

# Direction.


@fails("descent_convex", "descent_curved", "sign", "reference_formula")
class GoesUphill(Correct):
    def gradient(self, group, param):
        return -super().gradient(group, param)


@fails("descent_convex", "descent_curved")
class TurnsAfterTwelveSteps(Correct):
    def write(self, param, value):
        late = self.state[param]["step"] > 12
        super().write(param, param + 3 * (param - value) if late else value)


@fails("maximize")
class IgnoresMaximize(Correct):
    def gradient(self, group, param):
        return super().gradient({**group, "maximize": False}, param)


@fails("maximize")
class MaximizesAfterDecay(Correct):
    def gradient(self, group, param):
        grad = super().gradient({**group, "maximize": False}, param) + group["weight_decay"] * param
        return -grad if group["maximize"] else grad

    def decayed(self, group, value, lr):
        return value


@fails("zero_gradient", "distributed_checkpoint", "reference_formula")
class DividesByTheNorm(Correct):
    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return grad / grad.norm() if grad.numel() else grad


@fails("gradient_scale")
class OverflowsAt65504(Correct):
    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return torch.where(grad.abs() > 65504, torch.inf, grad)


# Gradients.


@fails("none_gradients", "no_gradients")
class NeedsEveryGradient(Correct):
    def step(self, closure=None):
        loss = self.evaluate(closure)
        with torch.no_grad():
            for group in self.param_groups:
                self.update_group(group, group["params"])
        return loss


@fails("none_gradients")
class DecaysWhatHasNoGradient(Correct):
    def update_group(self, group, params):
        for param in group["params"]:
            if param.grad is None:
                param.mul_(1 - group["lr"] * group["weight_decay"])
        super().update_group(group, params)


@fails("no_gradients")
class NeedsOneGradient(Correct):
    def update_group(self, group, params):
        torch.stack([p.grad.to_dense().norm() for p in params])
        super().update_group(group, params)


@fails("gradients_unchanged")
class ScalesTheGradientInPlace(Correct):
    def update(self, group, param, grad):
        super().update(group, param, grad)
        param.grad.mul_(0.5)


@fails("gradients_unchanged")
class DecaysInTheGradient(Correct):
    def gradient(self, group, param):
        if group["weight_decay"]:
            param.grad.add_(param, alpha=-group["weight_decay"] if group["maximize"] else group["weight_decay"])
        return super().gradient(group, param)

    def decayed(self, group, value, lr):
        return value


@fails("gradients_unchanged")
class NegatesInPlace(Correct):
    def gradient(self, group, param):
        if group["maximize"]:
            param.grad.neg_()
        return super().gradient({**group, "maximize": False}, param)


@fails("gradients_not_kept", "reference_formula")
class KeepsTheGradient(Correct):
    def update(self, group, param, grad):
        state = self.state_of(param, grad)
        last = state.get("last")
        if last is not None:
            grad = grad + 1e-3 * (-last if group["maximize"] else last).to(grad.dtype)
        super().update(group, param, grad)
        state["last"] = param.grad.detach()


@fails("zero_grad")
class AlwaysSetsToNone(Correct):
    def zero_grad(self, set_to_none=True):
        super().zero_grad()


@fails("gradient_layout")
class ReadsMemoryInOrder(Correct):
    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return torch.as_strided(grad, grad.shape, param.stride()) if param.is_contiguous() else grad


@fails("sparse_gradients")
class SparseGradientsAreUnclear(Correct):
    def gradient(self, group, param):
        if param.grad.is_sparse:
            raise RuntimeError("unsupported operation")
        return super().gradient(group, param)


@fails("sparse_gradients")
class OverwritesRowsListedTwice(Correct):
    def update_group(self, group, params):
        for param in params:
            if param.grad.is_sparse:
                rows = param.grad._indices()[0]
                param[rows] = param[rows] - group["lr"] * param.grad._values()
        super().update_group(group, [param for param in params if not param.grad.is_sparse])


@fails("complex_parameters")
class TakesTheRealPart(Correct):
    def gradient(self, group, param):
        if param.grad.is_complex():
            return -param.grad
        return super().gradient(group, param)

    def denominator(self, group, v):
        return v.abs().sqrt() + group["eps"]


# Closures.


@fails("closure_once")
class CallsTwice(Correct):
    def evaluate(self, closure):
        super().evaluate(closure)
        return super().evaluate(closure)


@fails("closure_loss")
class ReturnsNothing(Correct):
    def result(self, loss):
        return None


@fails("closure_grad_enabled")
class NoGradInTheClosure(Correct):
    def evaluate(self, closure):
        return None if closure is None else closure()


@fails("closure_gradients")
class ReadsBeforeTheClosure(Correct):
    @torch.no_grad()
    def step(self, closure=None):
        before = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        loss = self.evaluate(closure)
        for param, grad in before:
            param.grad = param.grad if grad is None else grad
        for group in self.param_groups:
            self.update_group(group, [p for p in group["params"] if p.grad is not None])
        return loss


# Updates.


@fails("updated_in_place", "shared_storage", "version_counter")
class AssignsData(Correct):
    def write(self, param, value):
        new = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype)
        param.data = new.copy_(value)


@fails("version_counter")
class WritesData(Correct):
    def write(self, param, value):
        param.data.copy_(value)


@fails("no_graph")
class KeepsTheGraph(Correct):
    def update(self, group, param, grad):
        super().update(group, param, grad)
        with torch.enable_grad():
            self.state[param]["last"] = param.grad * 1


@fails("memory_flat")
class KeepsHistory(Correct):
    def update(self, group, param, grad):
        super().update(group, param, grad)
        self.__dict__.setdefault("history", []).append(grad)


@fails("memory_flat")
class KeepsHistoryInATensor(Correct):
    def update(self, group, param, grad):
        super().update(group, param, grad)
        state = self.state[param]
        state["history"] = torch.cat([state.get("history", grad.new_zeros(0)), grad.norm()[None]])


@fails("deterministic", "compiled_step")
class IsNoisyInTheEnd(Correct):
    def lr(self, group):
        late = any(state["step"] > 8 for state in self.state.values())
        return super().lr(group) * (1 + 1e-2 * random.SystemRandom().random() * late)


@fails("independent_instances", "two_groups")
class SharesByShape(Correct):
    momenta = {}  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.momenta.clear()

    def update(self, group, param, grad):
        super().update(group, param, grad)
        state = self.state[param]
        if state["step"] == 2:
            state["m"].copy_(self.momenta.setdefault((param.shape, param.dtype), state["m"].clone()))


@fails("reference_formula")
class EpsInsideTheRoot(Correct):
    def denominator(self, group, v):
        return (v + group["eps"]).sqrt()


@fails("foreach")
class ForeachHasAnotherEps(Correct):
    def denominator(self, group, v):
        return v.sqrt() + (1e-2 if group["foreach"] else group["eps"])
