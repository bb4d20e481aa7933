"""Makes the text of a kernel a Triton function, with a rule's own functions in it."""

from __future__ import annotations

from functools import cache

from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.step_sums import FACTORS
from lightning_optim.kernels.triton.functions import MOST_SUMS, NAMED, SMALL, jit, jit_text
from lightning_optim.kernels.triton.source import ARGUMENTS, THREADS, kernel_text, load, source
from lightning_optim.kernels.weight_decay import APPLY_DECAY, DECAY_TERM

__all__ = ["OPTIONS", "THREADS", "build", "build_measure"]

OPTIONS = {"enable_fp_fusion": False}
"""Of every launch. Which multiply-adds fuse depends on what else a kernel computes, and a step that is measured must be
bit for bit one that is not; all wait for memory, so that this costs nothing."""


@cache
def build(spec: KernelSpec, aligned: bool) -> Kernel:
    """The kernel described by ``spec``.

    Args:
        spec: What it does.
        aligned: Whether every address is a multiple of 16.

    Returns:
        A kernel whose function takes: blocks int64 [blocks, 3] of (tensor, first element, end), `first` a multiple of
        16; addresses int64 [tensors, slots]; scalars [tensors, columns]; skip float32 []; sums [blocks, columns].
        Scalars and sums are in the dtype of the arithmetic.
    """
    assert len(spec.sums) <= MOST_SUMS, f"{spec.rule.__name__} has more than {MOST_SUMS} sums"
    functions = {"sums_update" if spec.purpose == "sums" else "update": spec.function}
    if spec.writes:
        functions["apply_decay"] = APPLY_DECAY[spec.decay_form]
    if spec.purpose == "step+sums":
        functions |= {f"{name}_factors": FACTORS[name] for name in spec.sums}
        functions |= {"take_decay": DECAY_TERM[spec.decay_form]} if "decay_sq" in spec.sums else {}
    names = NAMED | {name: rebind(function, NAMED, jit) for name, function in functions.items()}
    function = jit_text(source(spec, aligned), "kernel", names, do_not_specialize=ARGUMENTS)
    return Kernel(function, spec.scalars, spec.sums)


@cache
def build_measure(dtype: str, aligned: bool) -> Kernel:
    """The kernel that sums squares of tensors of ``dtype`` for `add_squares`; it has no scalars."""
    body = [f"grad = {load('grad', dtype)}", f"small = grad * {SMALL!r}"]
    terms = {"norm_sq": "grad * grad", "small_sq": "small * small"}
    text = kernel_text({"grad": dtype}, [], body, terms, aligned)
    return Kernel(jit_text(text, "kernel", {}, do_not_specialize=ARGUMENTS), (), tuple(terms))
