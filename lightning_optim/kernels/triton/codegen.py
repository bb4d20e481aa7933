"""Builds one Triton kernel per rule and set of dtypes: read, update, write and sum, over blocks of many tensors.

The kernel is text, because its slots, scalars and sums differ by rule; the arithmetic in it is the rule's own function,
rebound. Print `source(...)` to read one. Its arguments are pointers only, and Triton specialises on none of them: no
value that changes from step to step can cause a recompilation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_optim.kernels.compiled import scalar_names
from lightning_optim.kernels.rules import UpdateRule, rebind
from lightning_optim.kernels.triton.functions import MOST_SUMS, NAMED, SMALL, jit, jit_text
from lightning_optim.kernels.weight_decay import CHANGES, DECAYS

THREADS = 128
"""Of one program."""
OPTIONS = {"enable_fp_fusion": False}
"""Of every launch. Which multiply-adds fuse depends on what else a kernel computes, and a step that is measured must be
bit for bit one that is not; all wait for memory, so that this costs nothing."""
ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
ARGUMENTS = ("blocks", "addresses", "scalars", "skip", "sums")


@dataclass(frozen=True)
class Kernel:
    """A jit function and what it expects.

    Args:
        function: Arguments: blocks int64 [blocks, 3] of (tensor, first element, end), `first` a multiple of 16;
            addresses int64 [tensors, slots]; scalars [tensors, columns]; skip float32 []; sums [blocks, columns].
            Scalars and sums are in the dtype of the arithmetic.
        scalars: Names of the columns of scalars.
        sums: Names of the columns of sums.
    """

    function: Any
    scalars: tuple[str, ...]
    sums: tuple[str, ...]


@cache
def build(
    rule: type[UpdateRule], dtypes: tuple[str, ...], purpose: str, cautious: bool, decay_form: str, aligned: bool
) -> Kernel:
    """The kernel for ``rule`` over tensors of ``dtypes`` (parameter, gradient, states in order).

    Args:
        rule: Whose arithmetic to run.
        dtypes: Names of torch dtypes.
        purpose: See `CompiledBackend.run`.
        cautious: See `CompiledBackend.run`.
        decay_form: Which of `weight_decay.CHANGES` to subtract.
        aligned: Whether every address is a multiple of 16: then whole blocks are read and written 16 bytes at a time.
    """
    columns = scalar_names(rule, purpose, cautious)
    text, sums = source(rule, dtypes, purpose, columns, cautious, decay_form, aligned)
    assert len(sums) <= MOST_SUMS, f"{rule.__name__} has more than {MOST_SUMS} sums"
    function = rule.sums_update if purpose == "sums" else rule.update
    names = NAMED | {"rule_function": rebind(function, NAMED, jit), "change": rebind(CHANGES[decay_form], NAMED, jit)}
    if decay_form in DECAYS:
        names["decayed"] = rebind(DECAYS[decay_form], NAMED, jit)
    return Kernel(jit_text(text, "kernel", names, do_not_specialize=ARGUMENTS), columns, sums)


@cache
def build_measure(dtype: str, aligned: bool) -> Kernel:
    """The kernel that sums squares of tensors of ``dtype`` for `add_squares`; it has no scalars."""
    body = [f"raw = {_load(0, dtype)}", f"small = raw * {SMALL!r}"]
    terms = {"norm_sq": "raw * raw", "small_sq": "small * small"}
    text = _kernel_text((dtype,), (), body, terms, aligned)
    return Kernel(jit_text(text, "kernel", {}, do_not_specialize=ARGUMENTS), (), tuple(terms))


def block_shape(dtypes: tuple[str, ...]) -> tuple[int, int]:
    """Vectors that one program reads at once, and elements in each.

    A vector is 16 bytes of the widest slot and belongs to one thread; were it more, narrow and wide slots would differ
    in which thread has which element, and values would change places through shared memory. Where all slots are alike
    a thread may have several vectors, and needs them if the slots are few: 48 bytes per thread on their way keep the
    memory busy.
    """
    sizes = [ITEMSIZE[dtype] for dtype in dtypes]
    vector, vectors = 16 // max(sizes), THREADS
    while min(sizes) == max(sizes) and sum(sizes) * vector * vectors < 48 * THREADS:
        vectors *= 2
    return vectors, vector


def source(
    rule: type[UpdateRule],
    dtypes: tuple[str, ...],
    purpose: str,
    columns: tuple[str, ...],
    cautious: bool,
    decay_form: str,
    aligned: bool,
) -> tuple[str, tuple[str, ...]]:
    """The kernel's text, and the names of its sums."""
    states = range(len(rule.state))
    old = [f"old_{i}" for i in states]
    new = [f"new_{i}" for i in states]
    scalar = {name: f"scalar_{i}" for i, name in enumerate(columns)}
    own = rule.sums_scalars() if purpose == "sums" else rule.update_scalars()
    arguments = ", ".join(["param", "grad", *old, *(scalar[name] for name in own)])

    body = [f"param = {_load(0, dtypes[0])}", f"raw = {_load(1, dtypes[1])} * {scalar['inverse_divisor']}"]
    body += [f"grad = raw + {scalar['l2']} * param"]
    body += [f"{old[i]} = {_load(i + 2, dtypes[i + 2])}" for i in states]
    terms: dict[str, str] = {}
    if purpose == "sums":
        terms = {name: f"term_{i}" for i, name in enumerate(rule.sums)}
        body.append(f"{', '.join(terms.values())}, = rule_function({arguments})")
    else:
        body.append(f"{', '.join(['delta', *new])}, = rule_function({arguments})")
        agrees = _count("delta * grad > 0")
        if cautious:
            body.append(f"delta = delta * ({agrees} * {scalar['mask_scale']})")
        if purpose == "agreement":
            terms = {"agreement": agrees}
        elif purpose == "moved_sq":
            terms = {"moved_sq": "(param - delta) * (param - delta)"}
        else:
            last = len(dtypes) - 1
            initial = f", {_load(last, dtypes[last])}" if decay_form == "pull" else ""
            for i in states:
                body += _store(i + 2, dtypes[i + 2], new[i], new[i])
            parts = f"(param, delta, {scalar['decay']}{initial})"
            if purpose == "step+sums" and decay_form in DECAYS and rule.decays_beside:
                body.append(f"decaying = decayed{parts}")  # before the parameter is written
                terms["decay_sq"] = "decaying * decaying"
            body += _store(0, dtypes[0], "after", f"param - change{parts}")
            if purpose == "step+sums":
                body += _step_terms(rule, scalar, terms)
    return _kernel_text(dtypes, columns, body, terms, aligned), tuple(terms)


IF_MASKED_LOAD, IF_MASKED_STORE = "<masked load>", "<masked store>"  # places in a line of text


def _load(slot: int, dtype: str) -> str:
    return f"tl.load(pointer_{slot} + start + lanes{IF_MASKED_LOAD}).to({_wide((dtype,))})"


def _store(slot: int, dtype: str, name: str, value: str) -> list[str]:
    """Write ``value``; ``name`` is then what was written, rounded as it was."""
    return [
        f"{name} = ({value}).to(tl.{dtype})",
        f"tl.store(pointer_{slot} + start + lanes, {name}{IF_MASKED_STORE})",
        f"{name} = {name}.to({_wide((dtype,))})",
    ]


def _wide(dtypes: tuple[str, ...]) -> str:
    return "tl.float64" if dtypes[0] == "float64" else "tl.float32"


def _count(condition: str) -> str:
    return f"tl.where({condition}, 1.0, 0.0)"


def _step_terms(rule: type[UpdateRule], scalar: dict[str, str], terms: dict[str, str]) -> list[str]:
    """Fill ``terms`` with what one element adds to each of the step sums that the rule has; lines they need first."""
    lines = ["moved = after - param"]
    terms |= {"param_sq": "param * param", "update_sq": "moved * moved", "zero_grad": _count("raw == 0")}
    if rule.first_moment is not None:
        slot = rule.state.index(rule.first_moment)
        terms |= {"grad_exp_avg": f"raw * old_{slot}", "momentum_sq": f"old_{slot} * old_{slot}"}
    if rule.second_moment is not None:
        slot = rule.state.index(rule.second_moment)
        lines.append(f"root = sqrt(new_{slot}) / {scalar['bias_correction2_sqrt']}")
        # Where v̂ is 0 the gradient has always been 0, and the term is 0 rather than 0/0.
        lines.append("ratio = raw / maximum(root, 1e-18)")
        terms |= {"grad_sq_over_exp_avg_sq": "ratio * ratio", "below_eps": _count(f"root < {scalar['eps']}")}
    return lines


def _kernel_text(
    dtypes: tuple[str, ...], columns: tuple[str, ...], body: list[str], terms: dict[str, str], aligned: bool
) -> str:
    """Whole blocks in a loop without masks, then what is left of the tensor under one."""
    (vectors, vector), wide = block_shape(dtypes), _wide(dtypes)
    size = vectors * vector
    pointers = [
        f"tl.load(addresses + tensor * {len(dtypes)} + {slot}).to(tl.pointer_type(tl.{dtype}))"
        for slot, dtype in enumerate(dtypes)
    ]
    if aligned:  # after the cast; before it the hint is lost
        pointers = [f"tl.multiple_of({pointer}, 16)" for pointer in pointers]
    # What one thread has side by side is added at once: one register for a running total, where there were several.
    added = f"tl.sum(tl.reshape({{}}, [{vectors}, {vector}]), axis=1)"
    whole = [*body, *(f"total_{i} += {added.format(term)}" for i, term in enumerate(terms.values()))]
    masked = [f"tl.where(mask, {term}, 0.0)" for term in terms.values()]
    rest = [*body, *(f"total_{i} += {added.format(term)}" for i, term in enumerate(masked))]

    lines = [f"def kernel({', '.join(ARGUMENTS)}):"]
    lines += ["    row = blocks + tl.program_id(0) * 3"]
    lines += ["    tensor = tl.load(row)", "    start = tl.load(row + 1)", "    end = tl.load(row + 2)"]
    lines += ["    if tl.load(skip) == 0:"]
    lines += [f"        pointer_{i} = {pointer}" for i, pointer in enumerate(pointers)]
    lines += [f"        scalar_{i} = tl.load(scalars + tensor * {len(columns)} + {i})" for i in range(len(columns))]
    lines += [f"        lanes = tl.arange(0, {size})"]
    lines += [f"        total_{i} = tl.zeros([{vectors}], {wide})" for i in range(len(terms))]
    lines += [f"        while start + {size} <= end:", "            start = tl.multiple_of(start, 16)"]
    lines += [f"            {line.replace(IF_MASKED_LOAD, '').replace(IF_MASKED_STORE, '')}" for line in whole]
    lines += [f"            start += {size}"]
    lines += ["        if start < end:", "            mask = lanes < end - start"]
    lines += [
        f"            {line.replace(IF_MASKED_LOAD, ', mask=mask, other=0').replace(IF_MASKED_STORE, ', mask=mask')}"
        for line in rest
    ]
    out = f"sums + tl.program_id(0) * {len(terms)}"
    lines += [f"        tl.store({out} + {i}, tl.sum(total_{i}))" for i in range(len(terms))]
    return "\n".join(lines) + "\n"
