"""Compilation of kernels from generated text and the functions of a rule by Triton."""

from __future__ import annotations

from functools import cache

from lightning_optim.kernels import averages
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.step_sums import FACTORS
from lightning_optim.kernels.triton.functions import MOST_SUMS, NAMED, SMALL, jit, jit_text
from lightning_optim.kernels.triton.source import ARGUMENTS, THREADS, kernel_text, load, source
from lightning_optim.kernels.weight_decay import APPLY_DECAY, DECAY_TERM

__all__ = ["OPTIONS", "THREADS", "build", "build_measure"]

OPTIONS = {"enable_fp_fusion": False}
"""Options of every launch. Which multiply-adds are fused would depend on what else a kernel computes, but a step with
statistics must equal one without them bit for bit. Kernels are memory-bound, so this costs nothing."""


@cache
def build(spec: KernelSpec, aligned: bool) -> Kernel:
    """Build the kernel described by ``spec``.

    Args:
        spec: Specification of the kernel.
        aligned: Whether every address is a multiple of 16.

    Returns:
        A kernel whose function takes: blocks, int64, [blocks, 3] of (tensor, first element, end), the first element a
        multiple of 16; addresses, int64, [tensors, slots]; scalars, [tensors, columns]; skip, float32, []; and sums,
        [blocks, columns]. Scalars and sums are in the dtype of the arithmetic.
    """
    assert len(spec.sums) <= MOST_SUMS, f"{spec.rule.__name__} has more than {MOST_SUMS} sums"
    functions = {"sums_update" if spec.purpose == "sums" else "update": spec.function}
    if spec.writes:
        functions["apply_decay"] = APPLY_DECAY[spec.decay_form]
        functions |= {"average_moved": averages.moved} if spec.averages else {}
    if spec.purpose == "step+sums":
        functions |= {f"{name}_factors": FACTORS[name] for name in spec.sums}
        functions |= {"take_decay": DECAY_TERM[spec.decay_form]} if "decay_sq" in spec.sums else {}
    names = NAMED | {name: rebind(function, NAMED, jit) for name, function in functions.items()}
    function = jit_text(source(spec, aligned), "kernel", names, do_not_specialize=ARGUMENTS)
    return Kernel(function, spec.scalars, spec.sums)


@cache
def build_measure(dtype: str, aligned: bool) -> Kernel:
    """Build the kernel that computes square sums of tensors of ``dtype`` for `add_squares`; it has no scalars."""
    body = [f"grad = {load('grad', dtype)}", f"small = grad * {SMALL!r}"]
    terms = {"norm_sq": "grad * grad", "small_sq": "small * small"}
    text = kernel_text({"grad": dtype}, [], body, terms, aligned)
    return Kernel(jit_text(text, "kernel", {}, do_not_specialize=ARGUMENTS), (), tuple(terms))
