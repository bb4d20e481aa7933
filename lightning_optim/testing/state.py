"""Checks of the state: saving and loading."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import difference, snapshot, tensors_in
from lightning_optim.testing.subject import CheckFailed, CheckSkipped, Subject

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device, torch.Size)


@check(
    why="A checkpoint with objects of a class needs that class, unchanged, to be read; tensors as keys are lost.",
    fix="Keep tensors and numbers in `self.state[param]` and in the groups, nothing else.",
)
def state_dict_plain(subject: Subject) -> None:
    """`state_dict()` has tensors, numbers, strings, lists, tuples and dicts with plain keys, and nothing else."""
    optimizer, _ = subject.run(3)
    state = optimizer.state_dict()
    if not {"state", "param_groups"} <= state.keys():
        raise CheckFailed(f"its keys are {sorted(state)}, without 'state' and 'param_groups'")
    odd = _odd(state, "state_dict()")
    if odd is not None:
        raise CheckFailed(odd)


def _odd(thing: Any, path: str) -> str | None:
    if isinstance(thing, dict):
        for key, value in thing.items():
            if not isinstance(key, str | int):
                return f"{path} has a key that is a {type(key).__name__}"
            if (found := _odd(value, f"{path}[{key!r}]")) is not None:
                return found
        return None
    if isinstance(thing, list | tuple):
        return next((f for i, v in enumerate(thing) if (f := _odd(v, f"{path}[{i}]")) is not None), None)
    return None if isinstance(thing, _PLAIN) else f"{path} is a {type(thing).__name__}"


@check(
    why="A resumed run must go on as if nothing had happened; what is kept outside of the state starts anew.",
    fix="Keep all that the next step needs in `self.state` or in the groups: counts, averages, estimates.",
)
def state_round_trip(subject: Subject) -> None:
    """A new optimizer that loads the state goes on bit-equal."""
    _resumes(subject, lambda state: state, "resumed from a state dict")


def _resumes(subject: Subject, through: Any, what: str) -> None:
    params = subject.parameters()
    grads = subject.gradients(params, 8)
    optimizer, _ = subject.run(params=params, grads=grads[:4])
    saved = through(snapshot(optimizer.state_dict()))
    again = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = subject.make(again)
    fresh.load_state_dict(saved)
    torch.manual_seed(1)
    subject.run(params=params, grads=grads[4:], optimizer=optimizer)
    torch.manual_seed(1)
    subject.run(params=again, grads=grads[4:], optimizer=fresh)
    subject.same(again, params, f"{what}, after four further steps")


@check(
    why="`torch.load` reads checkpoints with `weights_only=True` by default, which refuses classes of your own.",
    fix="Plain values only in the state; see state_dict_plain.",
)
def weights_only(subject: Subject) -> None:
    """`torch.save` and `torch.load(weights_only=True)` keep the state."""

    def through(state: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    optimizer, _ = subject.run(2)
    state = optimizer.state_dict()
    if (found := difference(state, through(state), "state_dict()")) is not None:
        raise CheckFailed(f"after saving and loading {found}")


@check(
    why="torch's load_state_dict casts floating state to the parameter's dtype: float32 averages become bfloat16.",
    fix="Override load_state_dict so that each tensor keeps its dtype, and moves to its parameter's device.",
)
def state_dtype_kept(subject: Subject) -> None:
    """With bfloat16 parameters loading changes neither dtype nor value of any tensor of the state."""
    params = subject.parameters(dtype=torch.bfloat16)
    try:
        optimizer, _ = subject.run(3, params=params)
    except Exception as error:
        raise CheckSkipped(f"it does not train bfloat16: {type(error).__name__}") from None
    saved = snapshot(optimizer.state_dict())
    fresh = subject.make([nn.Parameter(p.detach().clone()) for p in params])
    fresh.load_state_dict(snapshot(saved))
    found = difference(saved["state"], fresh.state_dict()["state"], "state")
    if found is not None:
        raise CheckFailed(f"after loading {found}")


@check(
    why="State of other parameters trains wrongly without an error.",
    fix="Keep torch's load_state_dict, or compare numbers of groups and parameters in your own.",
)
def state_of_others(subject: Subject) -> None:
    """Loading the state of other groups is refused: another number of groups, or of parameters in one."""
    optimizer, params = subject.run(2)
    for what, groups in (
        ("two groups of one parameter into one group of two", [{"params": [p]} for p in params]),
        ("one parameter into two", [{"params": params[:1]}]),
    ):
        saved = subject.make(groups).state_dict()
        try:
            optimizer.load_state_dict(saved)
        except Exception:  # any refusal is one
            continue
        raise CheckFailed(f"it has loaded {what}")


@check(
    why="Rates of layers and heads are values of groups; after loading they must be where they were.",
    fix="Keep torch's load_state_dict, which gives each group its saved values, and read them from there.",
)
def state_groups(subject: Subject) -> None:
    """Loading gives each of two groups its saved values, and the run goes on bit-equal."""
    lr = subject.value("lr")
    if not isinstance(lr, float | int):
        raise CheckSkipped(f"its lr is {lr!r}")
    params = subject.parameters()
    grads = subject.gradients(params, 6)
    optimizer = subject.make([{"params": params[:1]}, {"params": params[1:], "lr": lr / 2}])
    subject.run(params=params, grads=grads[:3], optimizer=optimizer)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = subject.make([{"params": [p]} for p in again])
    fresh.load_state_dict(snapshot(optimizer.state_dict()))
    rates = [[group["lr"] for group in each.param_groups] for each in (optimizer, fresh)]
    if rates[0] != rates[1]:
        raise CheckFailed(f"rates of the groups after loading are {rates[1]}, were {rates[0]}")
    subject.run(params=params, grads=grads[3:], optimizer=optimizer)
    subject.run(params=again, grads=grads[3:], optimizer=fresh)
    subject.same(again, params, "resumed with two groups, after three further steps")


@check(
    why="Groups in another order give each parameter another one's averages; such a run is wrong in silence.",
    fix="Let shapes that do not fit raise, at the latest in the next step; make no new state in their place.",
)
def state_order(subject: Subject) -> None:
    """State of groups in another order is refused, by load_state_dict or by the next step, if shapes differ."""
    params = subject.parameters()
    grads = subject.gradients(params, 3)
    optimizer = subject.make([{"params": [p]} for p in params])
    subject.run(params=params, grads=grads[:2], optimizer=optimizer)
    saved = snapshot(optimizer.state_dict())
    if not any(t.shape == params[0].shape for _, t in tensors_in(saved["state"])):
        raise CheckSkipped("its state has no tensors of the parameters' shapes")
    swapped = [params[1], params[0]]
    fresh = subject.make([{"params": [p]} for p in swapped])
    try:
        fresh.load_state_dict(saved)
        subject.run(params=swapped, grads=[grads[2][::-1]], optimizer=fresh)
    except Exception:
        return
    raise CheckFailed("it has loaded the state of a matrix of another shape and made a step")


@check(
    why="A model is often moved after a checkpoint was loaded, or loaded on another device.",
    fix="Move each tensor of the state to its parameter's device in load_state_dict, as torch's own does.",
)
def state_device(subject: Subject) -> None:
    """State that was saved on the CPU is, after loading, on the device of the parameters, and training goes on."""
    if subject.device.type == "cpu":
        raise CheckSkipped("it needs an accelerator: device='cuda'")

    def through(state: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True, map_location="cpu")

    _resumes(subject, through, "resumed from a state on the CPU")


@check(
    why="To load a sharded checkpoint torch.distributed.checkpoint makes a step with gradients of zero at lr = 0.",
    fix="Make all state at the first step, whatever the gradient, and change nothing at lr = 0. In "
    "load_state_dict, take keys from the saved groups' `params`: they may be names.",
)
def distributed_checkpoint(subject: Subject) -> None:
    """torch.distributed.checkpoint's trial step changes no weight, and a run resumed through it goes on bit-equal."""
    from torch.distributed.checkpoint import state_dict as dcp

    lr = subject.make(subject.parameters()).param_groups[0].get("lr")
    if lr is None:
        raise CheckSkipped("its groups have no lr")

    def module(params: list[nn.Parameter]) -> nn.Module:
        model = nn.Module()
        for index, param in enumerate(params):
            model.register_parameter(f"p{index}", param)
        return model

    params = subject.parameters()
    grads = subject.gradients(params, 6)
    optimizer, _ = subject.run(params=params, grads=grads[:3])
    saved = snapshot(dcp.get_optimizer_state_dict(module(params), optimizer))
    again = [nn.Parameter(p.detach().clone()) for p in params]
    before, model, fresh = snapshot(list(again)), module(again), subject.make(again)
    made: Any = dcp.get_optimizer_state_dict(model, fresh)
    subject.same(again, before, "the trial step has changed a weight")
    for name, kept in saved["state"].items():
        if missing := kept.keys() - made["state"].get(name, {}).keys():
            raise CheckFailed(f"after the trial step the state of a parameter has no {', '.join(sorted(missing))}")
    dcp.set_optimizer_state_dict(model, fresh, saved)
    subject.run(params=params, grads=grads[3:], optimizer=optimizer)
    subject.run(params=again, grads=grads[3:], optimizer=fresh)
    subject.same(again, params, "resumed, after three further steps")


@check(
    why="Memory for state decides which model fits.",
    fix="Nothing to fix: this check notes what the state holds.",
)
def state_size(subject: Subject) -> None:
    """The state is tensors whose size is known; values and bytes per weight are noted."""
    params = subject.parameters(((64, 64), (64, 64)))
    optimizer, _ = subject.run(2, params=params)
    weights = sum(p.numel() for p in params)
    # Not only `state`: some keep it in groups, or in one buffer for all.
    found = {id(t): t for _, t in tensors_in([list(optimizer.state.values()), _extras(optimizer)])}
    for param in params:
        found.pop(id(param), None)
    numbers = sum(t.numel() for t in found.values())
    size = sum(t.numel() * t.element_size() for t in found.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in found.values() if t.numel() > 1})
    kinds = f" ({', '.join(dtypes)})" if dtypes else ""
    subject.fact("state", f"{numbers / weights:.2g} values, {size / weights:.3g} bytes per weight{kinds}")


def _extras(optimizer: Any) -> list[Any]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
