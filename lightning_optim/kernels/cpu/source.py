"""Source text of CPU kernels: one loop over blocks of many tensors that reads, updates, writes and sums.

The loop is generated as text, because its arguments (states, scalars, dtypes) depend on the rule and numba needs them
spelled out; it calls the rule's own function for the arithmetic. Print `source(spec)` to read a kernel, or see
``tests/kernels/golden``.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_optim.kernels.averages import names_of
from lightning_optim.kernels.cpu.launch import kernel_text
from lightning_optim.kernels.kernel_spec import KernelSpec
from lightning_optim.kernels.quantization import BLOCK
from lightning_optim.kernels.rounding import KEY_COLUMNS
from lightning_optim.kernels.weight_decay import INITIAL

CHUNK = 4096
"""Number of elements summed in the arithmetic dtype before their sum is added to a float64 total, which bounds the
rounding error at full speed."""

ELEMENTWISE_TABLES = ("blocks", "addresses", "scalars", "sums")
"""Tables of a kernel: blocks, int64, [blocks, 3] of (tensor, first element, end), with 8-bit codes [blocks, 4] of these
and the size of rows; addresses, int64, [tensors, slots]; scalars, [tensors, columns], in the dtype of the arithmetic;
and sums, float64, [blocks, sums]."""

_CONSTANTS = {"zero": "zero", "one": "one", "tiny": "tiny"}


def source(spec: KernelSpec) -> str:
    """Return the text of the function ``kernel(launch)`` for ``spec``."""
    body = [*_loads(spec), *_update(spec), *(_stores(spec) if spec.writes else []), *_sums(spec)]
    names = [*spec.slots, *spec.rounded]
    before = ["zero, one, tiny = float(0), float(1), float(1e-18)"]
    before += [f"{name}_buffer = np.empty({BLOCK}, np.float32)" for name in spec.quantized]
    lines = ["tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]"]
    lines += [f"{name}_address = addresses[tensor, {slot}]" for slot, name in enumerate(spec.slots)]
    lines += [f"{spec.variable[name]} = scalars[tensor, {i}]" for i, name in enumerate(spec.scalars)]
    if spec.rounded:
        high, low = (spec.variable[name] for name in KEY_COLUMNS)
        key = f"slot_key(int({high}) * 65536 + int({low}), "
        lines += [f"{name}_key = {key}{names.index(name)})" for name in spec.rounded]
    lines += [f"total_{name} = 0.0" for name in spec.sums]
    lines += _in_tiles(spec, body) if spec.quantized else _in_chunks(spec, body)
    lines += [f"sums[block, {i}] = total_{name}" for i, name in enumerate(spec.sums)]
    return kernel_text(ELEMENTWISE_TABLES, before, lines)


def _loads(spec: KernelSpec) -> list[str]:
    """Return the lines that load weight, gradient and states of one element."""
    scale, l2 = spec.variable["inverse_divisor"], spec.variable["l2"]
    lines = ["param = load_param(param_address, i)", f"raw_grad = load_grad(grad_address, i) * {scale}"]
    lines += [f"grad = raw_grad + {l2} * param"]
    for name in spec.rule.state:
        value = f"load_{name}({name}_address, i)"
        if name in spec.quantized:
            value = f"codes_{spec.rule.compressible[name]}[{value}] * {name}_scale"
        lines.append(f"{name}_old = {value}")
    return lines


def _update(spec: KernelSpec) -> list[str]:
    """Return the lines that call the rule's function and apply the cautious mask."""
    if spec.purpose == "sums":
        return [f"{', '.join(f'term_{name}' for name in spec.sums)}, = sums_update({spec.arguments})"]
    results = ["delta", *(f"{name}_new" for name in spec.rule.state)]
    lines = [f"{', '.join(results)}{'' if spec.rule.state else ','} = update({spec.arguments})"]
    if spec.cautious:
        mask = f"({spec.variable['mask_scale']} if delta * grad > zero else zero)"
        lines.append(f"delta = delta * {mask}  # NaN stays NaN")
    return lines


def _stores(spec: KernelSpec) -> list[str]:
    """Return the lines that store new states and weight, and rebind each name to the value as stored.

    States that are quantized are written to a buffer.
    """
    lines: list[str] = []
    random = {name: f", noise(i, {name}_key)" for name in spec.rounded}
    for name in spec.rule.state:
        if name in spec.quantized:
            lines.append(f"{name}_buffer[i - tile] = {name}_new")
            lines.append(f"{name}_max = maximum(absolute({name}_new), {name}_max)")
        else:
            lines.append(f"{name}_new = store_{name}({name}_address, i, {name}_new{random.get(name, '')})")
    initial = f", load_{INITIAL}({INITIAL}_address, i)" if INITIAL in spec.slots else ""
    if "decay_sq" in spec.sums:
        lines.append(f"decay_term = take_decay({spec.decay_arguments}{initial})")
    change = f"apply_decay({spec.decay_arguments}{initial})"
    if spec.corrected:
        lines.append("code = load_kahan_comp(kahan_comp_address, i)")
        lines.append(f"pending = kahan_pending(correction(param, code), {change})")
        lines.append(f"after, code = cut(param + pending{random['kahan_comp']})")
        lines.append("after = store_param(param_address, i, after)")
        lines.append("store_kahan_comp(kahan_comp_address, i, code)")
    elif spec.kahan:
        lines.append(f"pending = kahan_pending(load_kahan_comp(kahan_comp_address, i), {change})")
        lines.append("after = store_param(param_address, i, param + pending)")
        lines.append("store_kahan_comp(kahan_comp_address, i, kahan_rest(pending, after, param))")
    else:
        lines.append(f"after = store_param(param_address, i, param - {change}{random.get('param', '')})")
    for name, weight in names_of(spec.averages):
        new = f"average_moved(load_{name}({name}_address, i), after, {spec.variable[weight]})"
        lines.append(f"store_{name}({name}_address, i, {new})")
    return lines


def _sums(spec: KernelSpec) -> list[str]:
    """Return the lines that add one element to each sum."""
    if spec.purpose == "sums":
        return [f"sum_{name} = add(sum_{name}, term_{name})" for name in spec.sums]
    if spec.purpose == "agreement":
        return ["sum_agreement = add(sum_agreement, one if delta * grad > zero else zero)"]
    if spec.purpose == "moved_sq":
        return ["moved = param - delta", "sum_moved_sq = add_product(sum_moved_sq, moved, moved)"]
    lines: list[str] = []
    for name in spec.sums:
        lines.append(f"left, right = {spec.factors_call(name, _CONSTANTS)}")
        lines.append(f"sum_{name} = add_product(sum_{name}, left, right)")
    return lines


def _in_chunks(spec: KernelSpec, body: list[str]) -> list[str]:
    """Return the loop of ``body`` over chunks whose sums are added up in the dtype of the arithmetic."""
    inner = [f"sum_{name} = zero" for name in spec.sums]
    inner += _elements("chunk", f"min(chunk + {CHUNK}, end)", body)
    inner += [f"total_{name} += sum_{name}" for name in spec.sums]
    return [f"for chunk in range(start, end, {CHUNK}):", *_indented(4, inner)]


def _in_tiles(spec: KernelSpec, body: list[str]) -> list[str]:
    """Return the loop of ``body`` over tiles that share a scale; the codes of a tile are written after its values."""
    inner = ["column = tile % row_size"]
    inner += [f"stop = min(tile + {BLOCK}, tile - column + row_size)"]
    inner += [f"place = tile // row_size * ((row_size + {BLOCK - 1}) // {BLOCK}) + column // {BLOCK}"]
    inner += [f"{name}_scale = load_{name}_scale({name}_scale_address, place)" for name in spec.quantized]
    inner += [f"{name}_max = zero" for name in spec.quantized]
    inner += [f"sum_{name} = zero" for name in spec.sums]
    inner += _elements("tile", "stop", body)
    inner += [f"total_{name} += sum_{name}" for name in spec.sums]
    for name in spec.quantized if spec.writes else ():
        sign = spec.rule.compressible[name]
        value = f"{name}_buffer[i - tile], {name}_max, noise(i, {name}_key)"
        code = f"encode_{sign}({value}, codes_{sign}, guesses_{sign})"
        inner += [f"{name}_max += {name}_max * zero  # NaN if not finite"]
        inner += [f"store_{name}_scale({name}_scale_address, place, {name}_max)"]
        inner += _elements("tile", "stop", [f"store_{name}({name}_address, i, {code})"])
    return ["row_size = blocks[block, 3]", "tile = start", "while tile < end:", *_indented(4, [*inner, "tile = stop"])]


def _elements(first: str, end: str, body: list[str]) -> list[str]:
    return [f"for i in range({first}, {end}):", *_indented(4, body)]


def _indented(by: int, lines: Iterable[str]) -> list[str]:
    return [" " * by + line for line in lines]
