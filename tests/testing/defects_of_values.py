"""Defects of hyperparameters, and of work with others."""

from __future__ import annotations

import torch

from tests.testing.correct import Correct
from tests.testing.defects import fails

# Hyperparameters.


@fails("hyperparameters_live")
class KeepsBetas(Correct):
    def __init__(self, params, lr=0.05, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=False):
        super().__init__(params, lr, betas, 1e-8, weight_decay, maximize, foreach)
        self.kept = betas

    def __setstate__(self, state):
        super().__setstate__(state)
        self.kept = self.param_groups[0]["betas"]

    def betas(self, group):
        return self.kept


@fails("hyperparameters_live")
class KeepsAnInteger(Correct):
    def __init__(self, params, lr=0.05, weight_decay=0, maximize=False, foreach=False):
        super().__init__(params, lr, (0.9, 0.99), 1e-8, weight_decay, maximize, foreach)
        self.kept = weight_decay

    def __getstate__(self):
        return {**super().__getstate__(), "kept": self.kept}

    def decayed(self, group, value, lr):
        return super().decayed({**group, "weight_decay": self.kept}, value, lr)


@fails("lr_zero", "distributed_checkpoint", "compiled_step")
class DividesByTheRate(Correct):
    def lr(self, group):
        return group["lr"] * (group["lr"] / group["lr"] if torch.is_tensor(group["lr"]) else self.one(group["lr"]))

    def one(self, lr):
        return float(torch.tensor(lr) / torch.tensor(lr))


@fails("lr_tensor")
class ReadsTheTensorOnce(Correct):
    def lr(self, group):
        lr = group["lr"]
        return self.__dict__.setdefault("number", float(lr)) if torch.is_tensor(lr) else lr


@fails("negative_lr")
class TakesANegativeRate(Correct):
    def validate(self, lr):
        pass


@fails("group_options")
class UsesTheFirstGroupsRate(Correct):
    def lr(self, group):
        return self.param_groups[0]["lr"]


@fails("two_groups")
class CountsGroups(Correct):
    def lr(self, group):
        return group["lr"] / len(self.param_groups)


@fails("two_groups")
class SharesMomentumByShape(Correct):
    """Parameters of one shape share a momentum, which is saved and loaded with the state."""

    def update(self, group, param, grad):
        super().update(group, param, grad)
        state, params = self.state[param], self.param_groups[0]["params"]
        same = [self.state[p] for p in params if p.shape == param.shape and p.grad is not None]
        if len(same) > 1 and "m" in same[0]:
            state["m"].copy_(same[0]["m"])


@fails("late_group")
class SetsOptionsInInit(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["factor"] = 1.0


@fails("parameters_once")
class ReadsParametersTwice(Correct):
    def __init__(self, params, *args, **kwargs):
        self.total = len(list(params))
        super().__init__(params, *args, **kwargs)


# Weight decay.


@fails("weight_decay")
class Grows(Correct):
    def decayed(self, group, value, lr):
        return value * (1 + lr * group["weight_decay"])


@fails("weight_decay")
class ForgetsToDecay(Correct):
    def decayed(self, group, value, lr):
        return value


# Integration.


@fails("grad_scaler", "clipping", "guard")
class ClaimsToScale(Correct):
    _step_supports_amp_scaling = True


@fails("lr_schedulers")
class WritesItsRate(Correct):
    def update_group(self, group, params):
        super().update_group(group, params)
        if "initial_lr" in group:
            group["lr"] *= 0.99


@fails("step_hooks", "clipping", "guard", "monitor")
class HidesItsStep(Correct):
    def register_step_pre_hook(self, hook):
        return super().register_step_post_hook(lambda *_: None)


@fails("torch_optimizer")
class ShowsNothing(Correct):
    def __repr__(self):
        return "ShowsNothing()"


@fails("compiled_step")
class DiffersWhenCompiled(Correct):
    def lr(self, group):
        return group["lr"] * (2 if torch.compiler.is_compiling() else 1)


# Under this package.


@fails("guard", "distributed_checkpoint")
class CountsInAHook(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_step_pre_hook(lambda *_: self.state_counts())

    def state_counts(self):
        for state in self.state.values():
            state["calls"] = state.get("calls", 0) + 1


@fails("clipping", "closure_gradients")
class ReadsGradientsInAHook(Correct):
    was = {}  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_step_pre_hook(lambda *_: self.read())

    def read(self):
        params = [p for group in self.param_groups for p in group["params"]]
        self.was = {p: p.grad.clone() for p in params if p.grad is not None}

    def gradient(self, group, param):
        found = super().gradient(group, param)
        if param not in self.was:
            return found
        grad = self.was[param].detach().to(found.dtype)
        return -grad if group["maximize"] else grad
