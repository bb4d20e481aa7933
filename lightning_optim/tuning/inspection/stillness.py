"""What has to hold still while a model is looked at: hooks of others, compiled code, and recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def recomputing() -> bool:
    """Return whether a backward pass runs in this thread, as when activation checkpointing computes again."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def suppress_compilation() -> Iterator[None]:
    """Run what torch.compile has compiled as it is written, so that its parts are seen."""
    with torch.compiler.set_stance("force_eager"):
        yield


def silence_hooks(stack: ExitStack, parameter: nn.Parameter) -> None:
    """Keep hooks of others from acting on gradients of a look, such as an optimizer that steps within backward."""
    kept: Any = parameter
    for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(kept, key, None)
        if hooks:
            # torch looks into the mapping when a gradient arrives, so it is emptied rather than replaced.
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        elif key == "_backward_hooks" and hooks is None:
            stack.callback(setattr, kept, key, None)
