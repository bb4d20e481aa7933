"""`release_gradients`, by which a plain training loop has no gradients in memory beyond that of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.clipping import ClipRule
from lightning_optim.core.typed import checked
from lightning_optim.step.released import ReleasedPipeline


@checked(own=("optimizer",))
def release_gradients(
    optimizer: Optimizer,
    clip: ClipRule | None = None,
    *,
    clip_limit: Callable[[int], float] | None = None,
    skip_nonfinite: bool = True,
    use_last_norm: bool = False,
    names: Mapping[Tensor, str] | None = None,
) -> ReleasedPipeline:
    """Update each parameter in the backward pass as soon as its gradient is there, and drop the gradient at once.

    Gradients of all parameters then never exist together: the memory of gradients is that of the largest tensor. The
    weights are those of usual steps, bit for bit. ``optimizer.step()`` is called as ever after each backward pass: it
    has no update left, and ends the step, for schedulers and counts. In Lightning, use the callback `GradientRelease`.

    What is decided for a step as a whole cannot be had, and is refused: clip rules over all tensors, a GradScaler,
    several backward passes for one step, DistributedDataParallel, and optimizers with sums over all gradients (Prodigy)
    or that are not of this package. Learning rates have to be set before the backward pass. A step is not left whole,
    but tensor by tensor, where a gradient is not finite; one that all tensors left out counts as skipped.

    Args:
        optimizer: An optimizer of `lightning_optim.optim`.
        clip: A clip rule that limits each tensor by itself (``spans = "tensor"``): `BlockRMS`, `AGC`, `UpdateRMS`,
            `MomentumRatio`, `Value`; or, with ``use_last_norm``, `GlobalNorm` or `AdaGC`. None for no clipping.
        clip_limit: Factor on the limit of the clip rule, as a function of the number of steps so far; None for 1.
        skip_nonfinite: Whether a tensor whose gradient is not finite is left out of the step, its state included;
            costs one read of each gradient. With a clip rule this is always so.
        use_last_norm: Whether a rule that needs the norm of all gradients gets that of the step before, or that of the
            gradients of this step so far, if that is larger.
        names: Names of parameters, for clip rules and messages; not needed where the optimizer has named parameters.

    Returns:
        The pipeline of the optimizer, with `counts`, `left_out`, `clip_state` and `load_clip_state`; its ``remove()``
        has gradients kept again.

    Raises:
        TypeError: The optimizer is not of `lightning_optim.optim`.
        ValueError: The optimizer, the clip rule or the detectors need all gradients together.
        RuntimeError: Parameters are whole on each of several processes; in training: a second backward pass before
            ``step``, a gradient that something else has set, or a GradScaler.

    Example:
        >>> import torch
        >>> import lightning_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> optimizer = lo.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = lo.release_gradients(optimizer, lo.clipping.BlockRMS(0.1))
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> [parameter.grad for parameter in model.parameters()]
        [None, None, None, None]
        >>> optimizer.step()
        >>> handle.counts().steps
        1
        >>> handle.remove()
    """
    return ReleasedPipeline(
        optimizer,
        clip=clip,
        clip_limit=clip_limit,
        skip_nonfinite=skip_nonfinite,
        use_last_norm=use_last_norm,
        names=names,
    )
