"""Defects of hyperparameters, state, shapes and of work with others."""

from __future__ import annotations

import contextlib

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


# State.


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


# Shapes and dtypes.


@fails("vectors", "scalars")
class NeedsMatrices(Correct):
    def update(self, group, param, grad):
        assert grad.shape[1] is not None
        super().update(group, param, grad)


@fails("scalars")
class NeedsALength(Correct):
    def update(self, group, param, grad):
        assert len(grad) >= 0
        super().update(group, param, grad)


@fails("many_dimensions", "channels_last")
class NeedsTwoDimensions(Correct):
    def update(self, group, param, grad):
        assert grad.t() is not None
        super().update(group, param, grad)


@fails("empty")
class TakesTheMaximum(Correct):
    def update(self, group, param, grad):
        assert grad.max() is not None
        super().update(group, param, grad)


@fails("non_contiguous", "channels_last")
class ViewsAsAVector(Correct):
    def update(self, group, param, grad):
        assert param.view(-1) is not None
        super().update(group, param, grad)


@fails("channels_last")
class MixesLayouts(Correct):
    def update(self, group, param, grad):
        if grad.ndim == 4:
            flat = torch.as_strided(grad, (grad.numel(),), (1,))
            grad = flat.view(grad.shape)
        super().update(group, param, grad)


@fails("shared_storage")
class WritesTheWholeStorage(Correct):
    def write(self, param, value):
        super().write(param, value)
        storage = torch.empty(0, dtype=param.dtype).set_(param.untyped_storage())
        if param._is_view() is False and storage.numel() > 2 * param.numel():
            storage[-1] = 0


@fails("float16")
class ComputesInHalf(Correct):
    def dtype(self, param):
        return torch.float16 if param.dtype == torch.float16 else super().dtype(param)


@fails("bfloat16")
class FailsInBfloat16(Correct):
    def gradient(self, group, param):
        if param.dtype == torch.bfloat16:
            param.fill_(float("nan"))
        return super().gradient(group, param)


@fails("float64", "reference_formula")
class RoundsToFloat32(Correct):
    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return grad.float().to(grad.dtype)


@fails("mixed_dtypes")
class NeedsOneDtype(Correct):
    def update_group(self, group, params):
        assert len({p.dtype for p in params}) <= 1
        super().update_group(group, params)


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
