"""Source text of Triton kernels, which read, update, write and sum over blocks of many tensors.

The kernel is generated as text, because its slots, scalars and sums depend on the rule; it calls the rule's own
function for the arithmetic. Print `source(spec, aligned)` to read a kernel, or see ``tests/kernels/golden``. All
arguments of a kernel are pointers, and Triton specialises on none of them, so no value that changes from step to step
can cause a recompilation.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_optim.kernels.averages import names_of
from lightning_optim.kernels.kernel_spec import KernelSpec
from lightning_optim.kernels.step_sums import TINY
from lightning_optim.kernels.weight_decay import INITIAL

THREADS = 128
"""Number of threads of one program."""
ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
ARGUMENTS = ("blocks", "addresses", "scalars", "skip", "sums")

_CONSTANTS = {"zero": "0.0", "one": "1.0", "tiny": repr(TINY)}
_AGREES = "tl.where(delta * grad > 0, 1.0, 0.0)"
_IF_MASKED_LOAD, _IF_MASKED_STORE = "<masked load>", "<masked store>"  # Placeholders in generated lines.


def source(spec: KernelSpec, aligned: bool) -> str:
    """Return the text of the function ``kernel`` for ``spec``.

    Args:
        spec: Specification of the kernel, without low-precision storage, which this backend does not support.
        aligned: Whether every address is a multiple of 16; full vectors are then read and written 16 bytes at a time.
    """
    body = [*_loads(spec), *_update(spec), *(_stores(spec) if spec.writes else [])]
    lines, terms = _terms(spec)
    slots = dict(zip(spec.slots, spec.dtypes, strict=True))
    scalars = [spec.variable[name] for name in spec.scalars]
    return kernel_text(slots, scalars, [*body, *lines], terms, aligned)


def load(slot: str, dtype: str) -> str:
    """Return the expression that loads a vector of ``slot`` in the dtype of the arithmetic."""
    return f"tl.load({slot}_pointer + start + lanes{_IF_MASKED_LOAD}).to({_wide(dtype)})"


def block_shape(dtypes: tuple[str, ...]) -> tuple[int, int]:
    """Return the number of vectors that one program reads at once, and the number of elements in each vector.

    A vector is 16 bytes of the widest slot and belongs to one thread. If it were longer, narrow and wide slots would
    assign elements to different threads, and values would be exchanged through shared memory. If all slots have the
    same width, a thread may have several vectors, and needs them if the slots are few: 48 bytes in flight per thread
    saturate the memory.
    """
    sizes = [ITEMSIZE[dtype] for dtype in dtypes]
    vector, vectors = 16 // max(sizes), THREADS
    while min(sizes) == max(sizes) and sum(sizes) * vector * vectors < 48 * THREADS:
        vectors *= 2
    return vectors, vector


def kernel_text(
    slots: Mapping[str, str], scalars: list[str], body: list[str], terms: Mapping[str, str], aligned: bool
) -> str:
    """Return the text of a kernel: a loop over full vectors without a mask, then the rest of the tensor with one.

    Args:
        slots: Dtype of each array by name.
        scalars: Variables of the scalars.
        body: Lines for one vector of elements.
        terms: Expressions that are added to each sum, by its name.
        aligned: As for `source`.
    """
    dtypes = tuple(slots.values())
    (vectors, vector), wide = block_shape(dtypes), _wide(dtypes[0])
    size = vectors * vector
    pointers = {
        slot: f"tl.load(addresses + tensor * {len(slots)} + {i}).to(tl.pointer_type(tl.{dtype}))"
        for i, (slot, dtype) in enumerate(slots.items())
    }
    if aligned:  # The hint has to come after the cast, which would drop it.
        pointers = {slot: f"tl.multiple_of({pointer}, 16)" for slot, pointer in pointers.items()}
    # The elements of a vector are added at once, so that a running total takes one register per vector.
    added = f"tl.sum(tl.reshape({{}}, [{vectors}, {vector}]), axis=1)"
    whole = [*body, *(f"total_{name} += {added.format(term)}" for name, term in terms.items())]
    masked = {name: f"tl.where(mask, {term}, 0.0)" for name, term in terms.items()}
    rest = [*body, *(f"total_{name} += {added.format(term)}" for name, term in masked.items())]

    lines = [f"def kernel({', '.join(ARGUMENTS)}):"]
    lines += ["    row = blocks + tl.program_id(0) * 3"]
    lines += ["    tensor = tl.load(row)", "    start = tl.load(row + 1)", "    end = tl.load(row + 2)"]
    lines += ["    if tl.load(skip) == 0:"]
    lines += [f"        {slot}_pointer = {pointer}" for slot, pointer in pointers.items()]
    table = f"scalars + tensor * {len(scalars)}"
    lines += [f"        {variable} = tl.load({table} + {i})" for i, variable in enumerate(scalars)]
    lines += [f"        lanes = tl.arange(0, {size})"]
    lines += [f"        total_{name} = tl.zeros([{vectors}], {wide})" for name in terms]
    lines += [f"        while start + {size} <= end:", "            start = tl.multiple_of(start, 16)"]
    lines += [f"            {line.replace(_IF_MASKED_LOAD, '').replace(_IF_MASKED_STORE, '')}" for line in whole]
    lines += [f"            start += {size}"]
    lines += ["        if start < end:", "            mask = lanes < end - start"]
    lines += [
        f"            {line.replace(_IF_MASKED_LOAD, ', mask=mask, other=0').replace(_IF_MASKED_STORE, ', mask=mask')}"
        for line in rest
    ]
    out = f"sums + tl.program_id(0) * {len(terms)}"
    lines += [f"        tl.store({out} + {i}, tl.sum(total_{name}))" for i, name in enumerate(terms)]
    return "\n".join(lines) + "\n"


def _loads(spec: KernelSpec) -> list[str]:
    dtypes = dict(zip(spec.slots, spec.dtypes, strict=True))
    scale, l2 = spec.variable["inverse_divisor"], spec.variable["l2"]
    lines = [f"param = {load('param', dtypes['param'])}", f"raw_grad = {load('grad', dtypes['grad'])} * {scale}"]
    lines += [f"grad = raw_grad + {l2} * param"]
    return lines + [f"{name}_old = {load(name, dtypes[name])}" for name in spec.rule.state]


def _update(spec: KernelSpec) -> list[str]:
    """Return the lines that call the rule's function and apply the cautious mask."""
    if spec.purpose == "sums":
        return [f"{', '.join(f'term_{name}' for name in spec.sums)}, = sums_update({spec.arguments})"]
    results = ["delta", *(f"{name}_new" for name in spec.rule.state)]
    lines = [f"{', '.join(results)}, = update({spec.arguments})"]
    return lines + ([f"delta = delta * ({_AGREES} * {spec.variable['mask_scale']})"] if spec.cautious else [])


def _stores(spec: KernelSpec) -> list[str]:
    """Return the lines that store new states and weight, and rebind each name to the value as stored."""
    dtypes = dict(zip(spec.slots, spec.dtypes, strict=True))
    lines = [line for name in spec.rule.state for line in _store(name, dtypes[name], f"{name}_new", f"{name}_new")]
    initial = f", {load(INITIAL, dtypes[INITIAL])}" if INITIAL in dtypes else ""
    if "decay_sq" in spec.sums:
        lines.append(f"decay_term = take_decay({spec.decay_arguments}{initial})")
    new = f"param - apply_decay({spec.decay_arguments}{initial})"
    lines += _store("param", dtypes["param"], "after", new)
    for name, weight in names_of(spec.averages):
        moved = f"average_moved({load(name, dtypes[name])}, after, {spec.variable[weight]})"
        lines += _store(name, dtypes[name], f"{name}_new", moved)
    return lines


def _terms(spec: KernelSpec) -> tuple[list[str], dict[str, str]]:
    """Return the lines that compute the terms of one vector, and the term of each sum by name."""
    if spec.purpose == "sums":
        return [], {name: f"term_{name}" for name in spec.sums}
    if spec.purpose == "agreement":
        return [], {"agreement": _AGREES}
    if spec.purpose == "moved_sq":
        return ["moved = param - delta"], {"moved_sq": "moved * moved"}
    lines: list[str] = []
    for name in spec.sums:
        lines += [f"left, right = {spec.factors_call(name, _CONSTANTS)}", f"term_{name} = left * right"]
    return lines, {name: f"term_{name}" for name in spec.sums}


def _store(slot: str, dtype: str, name: str, value: str) -> list[str]:
    """Return the lines that store ``value`` and bind ``name`` to the value as stored."""
    return [
        f"{name} = ({value}).to(tl.{dtype})",
        f"tl.store({slot}_pointer + start + lanes, {name}{_IF_MASKED_STORE})",
        f"{name} = {name}.to({_wide(dtype)})",
    ]


def _wide(dtype: str) -> str:
    return "tl.float64" if dtype == "float64" else "tl.float32"
