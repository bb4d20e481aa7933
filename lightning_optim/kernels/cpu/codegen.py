"""Builds one compiled loop per rule and set of dtypes: read, update, write and sum, over blocks of many tensors.

The loop is text, because its arguments (states, scalars, dtypes) differ by rule and numba wants them spelled out; the
arithmetic in it is the rule's own function, rebound. Print `source(...)` to read one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np

from lightning_optim.kernels.compiled import scalar_names
from lightning_optim.kernels.cpu import disk_cache
from lightning_optim.kernels.cpu import quantized as cpu_quantized
from lightning_optim.kernels.cpu.memory import compiled, load, named_functions, store, sum_functions
from lightning_optim.kernels.quantization import BLOCK
from lightning_optim.kernels.rounding import KEY_COLUMNS, kahan_pending, kahan_rest, noise, slot_key
from lightning_optim.kernels.rules import UpdateRule, rebind
from lightning_optim.kernels.weight_decay import CHANGES, DECAYS

CHUNK = 4096
"""Elements summed in the arithmetic dtype before their sum joins a float64 total: bounds rounding, keeps the speed."""


Terms = dict[str, tuple[str, ...]]
"""What one element adds to each sum, as an expression or as two factors."""


@dataclass(frozen=True)
class Kernel:
    """A compiled loop and what it expects.

    Args:
        run: `run(first, last, blocks, addresses, scalars, sums)`: blocks [blocks, 3] of (tensor, first element, end),
            addresses [tensors, slots] of parameter, gradient, states, scalars [tensors, columns], sums [blocks, sums].
        scalars: Names of the columns of ``scalars``.
        sums: Names of the columns of ``sums``.
    """

    run: Callable[..., None]
    scalars: tuple[str, ...]
    sums: tuple[str, ...]


@cache
def build(
    rule: type[UpdateRule],
    dtypes: tuple[str, ...],
    purpose: str,
    cautious: bool = False,
    decay_form: str = "shrink",
    kahan: bool = False,
    stochastic: tuple[str, ...] = (),
    quantized: tuple[str, ...] = (),
) -> Kernel:
    """The loop for ``rule`` over tensors of ``dtypes`` (parameter, gradient, states in order).

    Args:
        rule: Whose arithmetic to run.
        dtypes: Names of torch dtypes.
        purpose: See `CompiledBackend.run`.
        cautious: See `CompiledBackend.run`.
        decay_form: Which of `weight_decay.CHANGES` to subtract.
        kahan: Whether the slot after the states is the parameter's compensation.
        stochastic: Names of the slots that are rounded stochastically.
        quantized: States that are codes; their scales are the last slots.
    """
    columns = scalar_names(rule, purpose, cautious)
    columns += KEY_COLUMNS if stochastic and purpose.startswith("step") else ()
    text, sums = source(rule, dtypes, purpose, columns, cautious, decay_form, kahan, stochastic, quantized)
    function = rule.sums_update if purpose == "sums" else rule.update
    wide = "float64" if dtypes[0] == "float64" else "float32"
    named = named_functions(wide)
    names: dict[str, Any] = (
        (cpu_quantized.names() if quantized else {})
        | sum_functions()
        | {
            "__name__": __name__,  # numba looks for a cached function's module
            "rule_function": rebind(function, named, compiled),
            "change": rebind(CHANGES[decay_form], named, compiled),
            "kahan_pending": compiled(kahan_pending),
            "kahan_rest": compiled(kahan_rest),
            "noise": rebind(noise, {}, compiled),
            "slot_key": rebind(slot_key, {}, compiled),
            "sqrt": named["sqrt"],
            "maximum": named["maximum"],
            "absolute": abs,
            "float": getattr(numba, wide),
        }
    )
    decayed = [DECAYS[decay_form]] if "decay_sq" in sums and decay_form in DECAYS else []
    for part in decayed:
        names["decayed"] = rebind(part, named, compiled)
    for slot, dtype in enumerate(dtypes):
        names[f"load_{slot}"] = load(dtype, slot, len(dtypes))
        names[f"store_{slot}"] = store(
            dtype, slot, len(dtypes), slot in _slots(rule, stochastic) and dtype == "bfloat16"
        )
    fingerprint = disk_cache.fingerprint(
        text + repr(dtypes),
        (
            function,
            CHANGES[decay_form],
            *decayed,
            kahan_pending,
            kahan_rest,
            noise,
            slot_key,
            *(cpu_quantized.SOURCES if quantized else ()),
        ),
    )
    name = f"{rule.__name__}-{fingerprint}"
    return Kernel(_compile(rule.__name__, text, names, name, dtypes), columns, sums)


def _compile(what: str, text: str, names: dict[str, Any], kept_as: str, dtypes: tuple[str, ...]) -> Any:
    """The function ``kernel`` of ``text``, with the signature that `Kernel.run` has, from disk if it is there."""
    exec(compile(text, f"<{what}>", "exec"), names)
    dispatcher = numba.njit(names["kernel"], nogil=True, error_model="numpy")
    disk_cache.keep_on_disk(dispatcher, kept_as)
    wide = "float64" if dtypes[0] == "float64" else "float32"
    with disk_cache.SaysIfSlow(
        lambda: f"Compiling the CPU kernel of {what} for {', '.join(dict.fromkeys(dtypes))}{disk_cache.kept_where()}"
    ):
        dispatcher.compile(f"void(int64, int64, int64[:, ::1], int64[:, ::1], {wide}[:, ::1], float64[:, ::1])")
    return dispatcher


def _slots(rule: type[UpdateRule], names: tuple[str, ...]) -> list[int]:
    return [0 if name == "param" else 2 + rule.state.index(name) for name in names]


def source(
    rule: type[UpdateRule],
    dtypes: tuple[str, ...],
    purpose: str,
    columns: tuple[str, ...],
    cautious: bool,
    decay_form: str = "shrink",
    kahan: bool = False,
    stochastic: tuple[str, ...] = (),
    quantized: tuple[str, ...] = (),
) -> tuple[str, tuple[str, ...]]:
    """The kernel's text, and the names of its sums."""
    rounded = _slots(rule, stochastic) if purpose.startswith("step") else []
    states = range(len(rule.state))
    old = [f"old_{i}" for i in states]
    new = [f"new_{i}" for i in states]
    scalar = {name: f"scalar_{i}" for i, name in enumerate(columns)}
    own = rule.sums_scalars() if purpose == "sums" else rule.update_scalars()
    arguments = ", ".join(["param", "grad", *old, *(scalar[name] for name in own)])

    body = ["param = load_0(address_0, i)", f"raw = load_1(address_1, i) * {scalar['inverse_divisor']}"]
    body += [f"grad = raw + {scalar['l2']} * param"]
    codes = {i: f"codes_{rule.compressible[name]}" for i, name in enumerate(rule.state) if name in quantized}
    scales = dict(zip(codes, range(len(dtypes) - len(quantized), len(dtypes)), strict=True))
    for i in states:
        value = f"load_{i + 2}(address_{i + 2}, i)"
        body.append(f"{old[i]} = {codes[i]}[{value}] * scale_{i}" if i in codes else f"{old[i]} = {value}")
    terms: Terms = {}
    if purpose == "sums":
        terms = {name: (f"term_{i}",) for i, name in enumerate(rule.sums)}
        body.append(f"{', '.join(term for (term,) in terms.values())}, = rule_function({arguments})")
    else:
        body.append(f"{', '.join(['delta', *new])}{'' if new else ','} = rule_function({arguments})")
        agrees = "float(1) if delta * grad > zero else zero"
        if cautious:
            body.append(f"delta = delta * ({scalar['mask_scale']} if delta * grad > zero else zero)  # NaN stays NaN")
        if purpose == "agreement":
            terms = {"agreement": (agrees,)}
        elif purpose == "moved_sq":
            body.append("moved = param - delta")
            terms = {"moved_sq": ("moved", "moved")}
        else:
            random = {slot: f", noise(i, key_{slot})" for slot in rounded}
            for i in states:
                if i in codes:
                    body += [f"buffer_{i}[i - tile] = {new[i]}", f"max_{i} = maximum(absolute({new[i]}), max_{i})"]
                else:
                    body.append(f"{new[i]} = store_{i + 2}(address_{i + 2}, i, {new[i]}{random.get(i + 2, '')})")
            slot = 2 + len(rule.state)
            initial = f", load_{slot + kahan}(address_{slot + kahan}, i)" if decay_form == "pull" else ""
            parts = f"(param, delta, {scalar['decay']}{initial})"
            change = f"change{parts}"
            measured = purpose == "step+sums"
            if measured and decay_form in DECAYS and rule.decays_beside:
                body.append(f"decaying = decayed{parts}")  # before the parameter is written
                terms["decay_sq"] = ("decaying", "decaying")
            if kahan:
                body.append(f"pending = kahan_pending(load_{slot}(address_{slot}, i), {change})")
                body.append("after = store_0(address_0, i, param + pending)")
                body.append(f"store_{slot}(address_{slot}, i, kahan_rest(pending, after, param))")
            else:
                body.append(f"after = store_0(address_0, i, param - {change}{random.get(0, '')})")
            if measured:
                body += _step_terms(rule, scalar, terms)

    totals = [f"total_{i}" for i in range(len(terms))]
    lines = ["def kernel(first, last, blocks, addresses, scalars, sums):", "    zero = float(0)"]
    lines += ["    for block in range(first, last):"]
    lines += ["        tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]"]
    lines += [f"        address_{i} = addresses[tensor, {i}]" for i in range(len(dtypes))]
    lines += [f"        scalar_{i} = scalars[tensor, {i}]" for i in range(len(columns))]
    if rounded:
        high, low = (scalar[name] for name in KEY_COLUMNS)
        lines += [f"        key_{slot} = slot_key(int({high}) * 65536 + int({low}), {slot})" for slot in rounded]
    lines += [f"        {total} = 0.0" for total in totals]
    lines += [f"        for chunk in range(start, end, {CHUNK}):"]
    lines += [f"            sum_{i} = zero" for i in range(len(terms))]
    body += [_added(f"sum_{i}", term) for i, term in enumerate(terms.values())]
    if codes:
        lines[2:2] = [f"    buffer_{i} = np.empty({BLOCK}, np.float32)" for i in codes]
        lines += [f"            for tile in range(chunk, min(chunk + {CHUNK}, end), {BLOCK}):"]
        lines += [f"                scale_{i} = load_{scales[i]}(address_{scales[i]}, tile // {BLOCK})" for i in codes]
        lines += [f"                max_{i} = zero" for i in codes]
        lines += [f"                for i in range(tile, min(tile + {BLOCK}, end)):"]
        lines += [f"                    {line}" for line in body]
        for i in codes if purpose.startswith("step") else ():
            sign = codes[i].removeprefix("codes_")
            tables = f"codes_{sign}, guesses_{sign}"
            code = f"encode_{sign}(buffer_{i}[i - tile], max_{i}, noise(i, key_{i + 2}), {tables})"
            lines += [f"                max_{i} += max_{i} * zero  # NaN if not finite"]
            lines += [f"                store_{scales[i]}(address_{scales[i]}, tile // {BLOCK}, max_{i})"]
            lines += [f"                for i in range(tile, min(tile + {BLOCK}, end)):"]
            lines += [f"                    store_{i + 2}(address_{i + 2}, i, {code})"]
    else:
        lines += [f"            for i in range(chunk, min(chunk + {CHUNK}, end)):"]
        lines += [f"                {line}" for line in body]
    lines += [f"            {total} += sum_{i}" for i, total in enumerate(totals)]
    lines += [f"        sums[block, {i}] = {total}" for i, total in enumerate(totals)]
    return "\n".join(lines) + "\n", tuple(terms)


def _added(total: str, term: tuple[str, ...]) -> str:
    return f"{total} = {'add' if len(term) == 1 else 'add_product'}({total}, {', '.join(term)})"


def _step_terms(rule: type[UpdateRule], scalar: dict[str, str], terms: Terms) -> list[str]:
    """Fill ``terms`` with what one element adds to each of the step sums that the rule has; lines they need first."""
    lines = ["moved = after - param"]
    terms["param_sq"] = ("param", "param")
    terms["update_sq"] = ("moved", "moved")
    terms["zero_grad"] = ("(float(1) if raw == zero else zero)",)
    if rule.first_moment is not None:
        slot = rule.state.index(rule.first_moment)
        terms["grad_exp_avg"] = ("raw", f"old_{slot}")
        terms["momentum_sq"] = (f"old_{slot}", f"old_{slot}")
    if rule.second_moment is not None:
        lines.append(f"root = sqrt(new_{rule.state.index(rule.second_moment)}) / {scalar['bias_correction2_sqrt']}")
        # Where v̂ is 0 the gradient has always been 0, and the term is 0 rather than 0/0.
        lines.append("ratio = raw / maximum(root, float(1e-18))")
        terms["grad_sq_over_exp_avg_sq"] = ("ratio", "ratio")
        terms["below_eps"] = (f"(float(1) if root < {scalar['eps']} else zero)",)
    return lines


@cache
def build_subtraction(dtypes: tuple[str, ...]) -> Kernel:
    """The loop of `shrink` for deltas that are made already: parameters and deltas of ``dtypes``."""
    wide = "float64" if dtypes[0] == "float64" else "float32"
    text = """def kernel(first, last, blocks, addresses, scalars, sums):
    for block in range(first, last):
        tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
        address_0, address_1, decay = addresses[tensor, 0], addresses[tensor, 1], scalars[tensor, 0]
        for i in range(start, end):
            param = load_0(address_0, i)
            store_0(address_0, i, param - change(param, load_1(address_1, i), decay))
"""
    names: dict[str, Any] = {
        "__name__": __name__,
        "change": rebind(CHANGES["shrink"], named_functions(wide), compiled),
        "load_0": load(dtypes[0], 0, 2),
        "load_1": load(dtypes[1], 1, 2),
        "store_0": store(dtypes[0], 0, 2),
    }
    name = f"subtraction-{disk_cache.fingerprint(text + repr(dtypes), (CHANGES['shrink'],))}"
    return Kernel(_compile("subtraction", text, names, name, dtypes), ("decay",), ())


@cache
def build_measure(dtype: str) -> Kernel:
    """The loop that sums squares of tensors of ``dtype``."""
    text = f"""def kernel(first, last, blocks, addresses, scalars, sums):
    for block in range(first, last):
        tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
        address = addresses[tensor, 0]
        total = 0.0
        for chunk in range(start, end, {CHUNK}):
            sum = zero
            for i in range(chunk, min(chunk + {CHUNK}, end)):
                x = load_0(address, i)
                sum = add_product(sum, x, x)
            if sum - sum == zero:
                total += sum
            else:  # not finite, or squares beyond float32
                for i in range(chunk, min(chunk + {CHUNK}, end)):
                    wide_x = double(load_0(address, i))
                    total = add_product(total, wide_x, wide_x)
        sums[block, 0] = total
"""
    wide = "float64" if dtype == "float64" else "float32"
    names: dict[str, Any] = {"__name__": __name__, "load_0": load(dtype, 0, 1), "double": numba.float64}
    names |= sum_functions() | {"zero": np.dtype(wide).type(0)}
    name = f"measure-{disk_cache.fingerprint(text + dtype, ())}"
    return Kernel(_compile("gradient norms", text, names, name, (dtype,)), (), ("norm_sq",))
