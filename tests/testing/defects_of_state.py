"""Defects of the state: saving, loading and copies."""

from __future__ import annotations

import contextlib

import torch

from tests.testing.correct import Correct
from tests.testing.defects import fails


class Counter:
    value = 0


@fails("state_dict_plain", "weights_only")
class KeepsAnObject(Correct):
    def state_of(self, param, grad):
        state = super().state_of(param, grad)
        state.setdefault("counter", Counter())
        return state


@fails("state_round_trip", "state_groups", "distributed_checkpoint", "compiled_step")
class CountsInTheInstance(Correct):
    steps = 0

    def evaluate(self, closure):
        self.steps += 1
        return super().evaluate(closure)

    def count(self, state):
        return max(self.steps, 1)

    def __getstate__(self):
        return {**super().__getstate__(), "steps": self.steps}


@fails("state_dtype_kept")
class LoadsAsTorchDoes(Correct):
    load_state_dict = torch.optim.Optimizer.load_state_dict


@fails("state_of_others")
class LoadsAnything(Correct):
    def load_state_dict(self, state_dict):
        with contextlib.suppress(ValueError):
            super().load_state_dict(state_dict)


@fails("state_groups")
class KeepsItsOwnRates(Correct):
    def load_state_dict(self, state_dict):
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


@fails("state_order")
class MakesNewStateInstead(Correct):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            if "m" in state and state["m"].shape != param.shape:
                state.clear()


@fails("deepcopy")
class CopiesNothing(Correct):
    def __deepcopy__(self, memo):
        return self


@fails("deepcopy", "pickled")
class LosesAnAttribute(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = lambda lr: lr

    def lr(self, group):
        return self.scale(group["lr"])


@fails("distributed_checkpoint")
class NoStateForZeros(Correct):
    def update(self, group, param, grad):
        if grad.any():
            super().update(group, param, grad)
