"""Compilation of kernels from generated text and the functions of a rule, for the dtypes of the tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

from lightning_optim.kernels import averages
from lightning_optim.kernels.averages import weight_names
from lightning_optim.kernels.cpu import corrections as cpu_corrections
from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu import quantized as cpu_quantized
from lightning_optim.kernels.cpu.launch import BlockLoop, kernel_text
from lightning_optim.kernels.cpu.memory import compiled, load, named_functions, store, sum_functions
from lightning_optim.kernels.cpu.source import CHUNK, ELEMENTWISE_TABLES, source
from lightning_optim.kernels.kernel_spec import Kernel, KernelSpec
from lightning_optim.kernels.rounding import kahan_pending, kahan_rest, noise, slot_key
from lightning_optim.kernels.rules import rebind
from lightning_optim.kernels.step_sums import FACTORS
from lightning_optim.kernels.weight_decay import APPLY_DECAY, DECAY_TERM


@cache
def build(spec: KernelSpec) -> Kernel:
    """Compile the kernel described by ``spec``, or load it from disk; its tables are `ELEMENTWISE_TABLES`."""
    text = source(spec)
    named = named_functions(spec.wide)
    rules = {"sums_update" if spec.purpose == "sums" else "update": spec.function}
    if spec.writes:
        rules["apply_decay"] = APPLY_DECAY[spec.decay_form]
        rules |= {"average_moved": averages.moved} if spec.averages else {}
    if spec.purpose == "step+sums":
        rules |= {f"{name}_factors": FACTORS[name] for name in spec.sums}
        rules |= {"take_decay": DECAY_TERM[spec.decay_form]} if "decay_sq" in spec.sums else {}
    exact: dict[str, Any] = {f.__name__: f for f in (kahan_pending, kahan_rest, noise, slot_key)}
    names: dict[str, Any] = {
        **(cpu_quantized.names() if spec.quantized else {}),
        **(cpu_corrections.names() if spec.corrected else {}),
        **sum_functions(),
        **{name: rebind(function, named, compiled) for name, function in rules.items()},
        **{name: rebind(function, {}, compiled) for name, function in exact.items()},
        "__name__": __name__,  # numba looks up the module of a cached function.
        "maximum": named["maximum"],
        "absolute": abs,
        "float": getattr(numba, spec.wide),
    }
    for number, (slot, dtype) in enumerate(zip(spec.slots, spec.dtypes, strict=True)):
        names[f"load_{slot}"] = load(dtype, number, len(spec.dtypes))
        rounded = slot in spec.stochastic and dtype == "bfloat16"
        names[f"store_{slot}"] = store(dtype, number, len(spec.dtypes), rounded)
    sources = (*rules.values(), *exact.values(), *(cpu_quantized.SOURCES if spec.quantized else ()))
    sources += cpu_corrections.SOURCES if spec.corrected else ()
    kept_as = f"{spec.rule.__name__}-{disk_cache.fingerprint(text + repr(spec.dtypes), sources)}"
    return Kernel(_compile(spec.rule.__name__, text, names, kept_as, spec.dtypes), spec.scalars, spec.sums)


def _compile(what: str, text: str, names: dict[str, Any], kept_as: str, dtypes: tuple[str, ...]) -> BlockLoop:
    wide = "float64" if dtypes[0] == "float64" else "float32"
    names |= launch.names(dict(zip(ELEMENTWISE_TABLES, ("int64", "int64", wide, "float64"), strict=True)))
    return launch.compile_loop(f"of {what} for {', '.join(dict.fromkeys(dtypes))}", text, names, kept_as)


_SUBTRACTION = """\
tensor, start, end = blocks[block, 0], blocks[block, 1], blocks[block, 2]
address_0, address_1, decay = addresses[tensor, 0], addresses[tensor, 1], scalars[tensor, 0]
for i in range(start, end):
    param = load_0(address_0, i)
    after = store_0(address_0, i, param - change(param, load_1(address_1, i), decay))
""".splitlines()

_MEASURE = f"""\
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
""".splitlines()


@cache
def build_subtraction(dtypes: tuple[str, ...]) -> Kernel:
    """Compile the kernel that subtracts deltas and the decay of form `shrink`, and then moves averages.

    Args:
        dtypes: Names of the dtypes of parameter, delta and averages.
    """
    wide = "float64" if dtypes[0] == "float64" else "float32"
    count = len(dtypes) - 2
    lines = list(_SUBTRACTION)
    for k in range(2, len(dtypes)):
        address = f"addresses[tensor, {k}]"
        lines.append(f"    average = average_moved(load_{k}({address}, i), after, scalars[tensor, {k - 1}])")
        lines.append(f"    store_{k}({address}, i, average)")
    text = kernel_text(ELEMENTWISE_TABLES, (), lines)
    names: dict[str, Any] = {
        "__name__": __name__,
        "change": rebind(APPLY_DECAY["shrink"], named_functions(wide), compiled),
        "average_moved": rebind(averages.moved, {}, compiled),
    }
    for k, dtype in enumerate(dtypes):
        names |= {f"load_{k}": load(dtype, k, len(dtypes)), f"store_{k}": store(dtype, k, len(dtypes))}
    sources = (APPLY_DECAY["shrink"], *([averages.moved] if count else []))
    name = f"subtraction-{disk_cache.fingerprint(text + repr(dtypes), sources)}"
    return Kernel(_compile("subtraction", text, names, name, dtypes), ("decay", *weight_names(count)), ())


@cache
def build_measure(dtype: str) -> Kernel:
    """Compile the kernel that computes square sums of tensors of ``dtype``."""
    text = kernel_text(ELEMENTWISE_TABLES, (), _MEASURE)
    wide = "float64" if dtype == "float64" else "float32"
    names: dict[str, Any] = {"__name__": __name__, "load_0": load(dtype, 0, 1), "double": numba.float64}
    names |= sum_functions() | {"zero": np.dtype(wide).type(0)}
    name = f"measure-{disk_cache.fingerprint(text + dtype, ())}"
    return Kernel(_compile("gradient norms", text, names, name, (dtype,)), (), ("norm_sq",))
