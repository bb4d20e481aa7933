"""Groups that join an optimizer in the middle of a run, as Lightning's BaseFinetuning adds them when it unfreezes."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

_JOINED = "joined"
"""Marks the groups that were added later; saved with them."""


def track_added_groups(optimizer: Optimizer, model: nn.Module) -> None:
    """Support groups that are added to ``optimizer`` later, also when its state is loaded.

    torch refuses a group of plain parameters where other groups have named ones: the names are added from the model,
    and the group is called ``added_1``, ``added_2``, ... if it has no name. A callback that froze the parameters
    before training freezes them again before a run is resumed (`BaseFinetuning` does), although their group is in the
    checkpoint: parameters of an added group are made trainable when the state is loaded.

    Args:
        optimizer: The optimizer, made of named parameters.
        model: The model.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        >>> optimizer = torch.optim.SGD(model["head"].named_parameters("head"), lr=0.1)
        >>> track_added_groups(optimizer, model)
        >>> optimizer.add_param_group({"params": model["body"].parameters(), "lr": 0.01})
        >>> optimizer.param_groups[1]["name"], optimizer.param_groups[1]["param_names"]
        ('added_1', ['body.weight', 'body.bias'])
    """
    of_model = weakref.ref(model)
    of_optimizer = weakref.ref(optimizer)
    initial = len(optimizer.param_groups)

    def add_param_group(param_group: dict[str, Any]) -> None:
        model, optimizer = of_model(), of_optimizer()
        assert model is not None
        assert optimizer is not None
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        if all(param in names for param in params):
            params = [(names[param], param) for param in params]
        name = f"added_{len(optimizer.param_groups) - initial + 1}"
        type(optimizer).add_param_group(optimizer, {"name": name, **param_group, "params": params, _JOINED: True})

    def make_trainable(optimizer: Optimizer) -> None:
        joined = {param for group in optimizer.param_groups if group.get(_JOINED) for param in group["params"]}
        for param in joined:
            param.requires_grad_(True)
        if joined and (model := of_model()) is not None:
            for module in model.modules():
                if isinstance(module, _BatchNorm) and joined & set(module.parameters(recurse=False)):
                    module.track_running_stats = True

    # torch has no hook for this method, and Lightning's BaseFinetuning calls it on optimizers of any library; so it is
    # overridden on the instance.
    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    optimizer.register_load_state_dict_post_hook(make_trainable)


welcome_late_groups = track_added_groups
"""The name of `track_added_groups` up to 0.1. Remove in 0.2."""
