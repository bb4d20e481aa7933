"""Checks of parameters in every shape, layout and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import change, snapshot, wide
from lightning_optim.testing.subject import MATRICES, CheckFailed, CheckSkipped, Subject


def _trains(subject: Subject, shapes: Sequence[tuple[int, ...]], what: str) -> None:
    """Check that parameters of these shapes train, and go downhill, unless they are refused when the optimizer is made.

    Raises:
        CheckSkipped: They are refused.
    """
    params = subject.parameters(shapes)
    start = snapshot(params)
    optimizer = _admitted(subject, params, what)
    grads = subject.gradients(params, 1) * 8
    subject.run(params=params, grads=grads, optimizer=optimizer)
    subject.finite(params, f"{what}, after some steps")
    subject.moved(params, start, f"{what}, after some steps")


def _admitted(subject: Subject, params: Sequence[Tensor], what: str) -> object:
    """Return an optimizer of the parameters.

    Raises:
        CheckSkipped: They are refused when it is made, as is right for a method that is not defined for them.
    """
    try:
        return subject.make(params, **subject.without_decay())
    except (TypeError, ValueError) as error:
        raise CheckSkipped(f"it refuses {what}: {' '.join(str(error).split())[:120]}") from None


@check(
    why="Biases and the gains of norms are vectors.",
    fix="Treat a tensor with fewer than two dimensions elementwise, or refuse it in __init__.",
)
def vectors(subject: Subject) -> None:
    """A vector trains, or is refused when the optimizer is made."""
    _trains(subject, ((7,),), "a vector")


@check(
    why="Temperatures and gates are parameters without dimensions.",
    fix="No `param.shape[0]`, `param[0]` or `len(param)` without looking at `param.ndim`.",
)
def scalars(subject: Subject) -> None:
    """A parameter without dimensions trains, or is refused when the optimizer is made."""
    _trains(subject, ((),), "a scalar")


@check(
    why="Convolutions have four dimensions, and some expert layers five.",
    fix="Flatten to a matrix where the method needs one (`grad.flatten(1)`), and back.",
)
def many_dimensions(subject: Subject) -> None:
    """Tensors of four and five dimensions train, or are refused when the optimizer is made."""
    _trains(subject, ((4, 3, 2, 2), (2, 3, 2, 2, 2)), "tensors of four and five dimensions")


@check(
    why="A shard of FSDP may have no elements; a mean over nothing is NaN, a maximum over nothing an error.",
    fix="Skip tensors with `numel() == 0`.",
)
def empty(subject: Subject) -> None:
    """A parameter without elements beside another raises nothing and does not disturb it."""
    params = subject.parameters(((0, 3), (4, 3)))
    start = snapshot(params)
    optimizer = _admitted(subject, params, "an empty tensor")
    subject.run(8, params=params, optimizer=optimizer)
    subject.finite(params, "beside a parameter without elements")
    subject.moved(params, start, "beside a parameter without elements")


def _laid_out(subject: Subject, lay: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]], what: str) -> None:
    """Check that parameters in another layout train as contiguous ones do."""
    plain = subject.parameters(shapes)
    grads = subject.gradients(plain, 4)
    start = snapshot(plain)
    optimizer = _admitted(subject, plain, f"shapes {shapes}")
    subject.run(params=plain, grads=grads, optimizer=optimizer)
    params = [nn.Parameter(lay(s)) for s in start]
    strides = [p.stride() for p in params]
    found = _admitted(subject, params, what)
    laid = [[torch.empty_like(p).copy_(g) for g, p in zip(each, params, strict=True)] for each in grads]
    subject.run(params=params, grads=laid, optimizer=found)
    subject.close(params, plain, f"{what} against contiguous ones", start=start, rtol=1e-3)
    if [p.stride() for p in params] != strides:
        raise CheckFailed(f"{what}: the strides of a parameter have changed")


@check(
    why="Tied and transposed weights are views that are not contiguous; `view(-1)` fails, raw memory is misread.",
    fix="Use `reshape`, or torch's elementwise operations, and write back into the parameter.",
)
def non_contiguous(subject: Subject) -> None:
    """Parameters that are transposed in memory, or every second column of a tensor, train as contiguous ones do."""
    _laid_out(subject, lambda s: s.t().contiguous().t(), MATRICES, "transposed parameters")
    _laid_out(subject, lambda s: s.repeat_interleave(2, dim=1)[:, ::2], MATRICES, "strided parameters")


@check(
    why="`model.to(memory_format=torch.channels_last)` is the usual layout of convolutions on GPUs.",
    fix="Make state with `torch.zeros_like(param)`, which keeps the layout, and do not mix layouts in raw memory.",
)
def channels_last(subject: Subject) -> None:
    """Parameters in channels_last train as contiguous ones do, and stay in that layout."""
    _laid_out(
        subject, lambda s: s.contiguous(memory_format=torch.channels_last), ((4, 3, 2, 2),), "channels_last parameters"
    )


@check(
    why="Flat buffers (FSDP, DDP, apex) hold all parameters as views of one storage.",
    fix="Never write beyond a parameter's elements, nor identify parameters by their storage.",
)
def shared_storage(subject: Subject) -> None:
    """Parameters that are views of one buffer train as separate ones do, and what lies between them stays."""
    _, wanted = subject.run(4)
    start = subject.parameters()
    buffer = torch.full((5 + 12 + 3 + 15 + 5,), 9.0, device=subject.device)
    views = [buffer[5:17].view(4, 3), buffer[20:35].view(3, 5)]
    params = []
    for view, value in zip(views, start, strict=True):
        view.copy_(value.detach())
        params.append(nn.Parameter(view))
    subject.run(4, params=params)
    subject.close(params, wanted, "views of one buffer against separate tensors", rtol=1e-4)
    subject.same(views, params, "the buffer against its parameters, after some steps")
    if not bool((torch.cat([buffer[:5], buffer[17:20], buffer[35:]]) == 9.0).all()):
        raise CheckFailed("elements between the parameters have changed")


@check(
    why="A single gradient element of zero gives 0/0 where eps underflows in float16.",
    fix="Compute in float32 (`grad.float()`), keep state in float32, and round once at the end.",
)
def float16(subject: Subject) -> None:
    """float16 parameters, with a gradient element of zero, go where float32 goes, up to rounding."""
    _low_precision(subject, torch.float16)


@check(
    why="bfloat16 has 8 bits; averages kept in it stop moving: 1 - 0.999 is below its resolution.",
    fix="Compute in float32, keep state in float32, and round once at the end.",
)
def bfloat16(subject: Subject) -> None:
    """bfloat16 parameters, with a gradient element of zero, go where float32 goes, up to rounding."""
    _low_precision(subject, torch.bfloat16)


def _low_precision(subject: Subject, dtype: torch.dtype) -> None:
    steps = 10
    low = subject.parameters(dtype=dtype, scale=0.01)
    high = [nn.Parameter(p.detach().float()) for p in low]
    start = snapshot(high)
    optimizer = _admitted(subject, low, str(dtype))
    grads = subject.gradients(low, steps)
    for each in grads:
        for grad in each:
            grad.flatten()[0] = 0
    subject.run(params=low, grads=grads, optimizer=optimizer)
    subject.finite(low, f"{dtype} after {steps} steps")
    if any(p.dtype != dtype for p in low):
        raise CheckFailed(f"parameters have become {low[0].dtype}")
    exact = [[g.float() for g in each] for each in grads]
    subject.run(params=high, grads=exact, **subject.without_decay())
    way = max(float((wide(h) - wide(s)).abs().max()) for h, s in zip(high, start, strict=True))
    size = max(float(h.abs().max()) for h in high)
    gap = max(float((wide(a.detach()) - wide(b.detach())).abs().max()) for a, b in zip(low, high, strict=True))
    rounding = torch.finfo(dtype).eps * size * steps
    if not gap <= 0.1 * way + rounding:
        raise CheckFailed(f"{dtype} differs by {gap:.2g} from float32, where ten steps have moved weights by {way:.2g}")
    for each in optimizer.state.values():  # type: ignore[attr-defined]
        for name, value in each.items():
            if isinstance(value, Tensor) and value.numel() == 1 and value.dtype == dtype and float(value) == steps:
                most = round(2 / torch.finfo(dtype).eps)
                raise CheckFailed(f"the state {name!r} counts steps in {dtype}, which ends at {most}")
    state = {t.dtype for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.numel() > 1}  # type: ignore[attr-defined]
    kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in state)) or "none"
    subject.fact(f"state of {str(dtype).removeprefix('torch.')} weights", kinds)


@check(
    why="Physics and tests of gradients need double precision throughout.",
    fix="Make state in the parameter's dtype, and cast nothing to float32 that came in float64.",
)
def float64(subject: Subject) -> None:
    """float64 parameters stay float64, and go where float32 goes."""
    params = subject.parameters(dtype=torch.float64)
    optimizer = _admitted(subject, params, "float64")
    grads = subject.gradients(params, 5)
    subject.run(params=params, grads=grads, optimizer=optimizer)
    if any(p.dtype != torch.float64 for p in params):
        raise CheckFailed(f"parameters have become {params[0].dtype}")
    _, single = subject.run(5, **subject.without_decay())
    subject.close(single, params, "float32 against float64", rtol=0.01)

    def nudged(by: float) -> list[Tensor]:
        other = snapshot(grads)
        other[0][0][0, 0] += by
        return list(subject.run(grads=other, params=subject.parameters(dtype=torch.float64), **options)[1])

    options = subject.without_decay()
    if change(nudged(1e-3), params) is not None and change(nudged(1e-11), params) is None:
        raise CheckFailed("a gradient that differs by 1e-11 has the same effect: it is rounded to float32")


@check(
    why="Norms are kept in float32 beside weights in bfloat16.",
    fix="Group tensors by dtype before a foreach or fused call.",
)
def mixed_dtypes(subject: Subject) -> None:
    """Parameters of several dtypes in one group train, each in its dtype."""
    kinds = (torch.float32, torch.float64, torch.float32)
    params = [subject.parameters(((4, 3),), dtype=kind, seed=i)[0] for i, kind in enumerate(kinds)]
    start = snapshot(params)
    optimizer = _admitted(subject, params, "mixed dtypes")
    subject.run(8, params=params, optimizer=optimizer)
    subject.finite(params, "mixed dtypes")
    subject.moved(params, start, "mixed dtypes")
    if [p.dtype for p in params] != list(kinds):
        raise CheckFailed("the dtype of a parameter has changed")
