"""Numba building blocks: typed loads and stores at raw addresses, and the named functions of rules.

Loads and stores carry LLVM's alias scopes, which declare that parameter, gradient and states never overlap. Without
them LLVM does not vectorise a loop over more than four arrays, as it would need too many overlap checks at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# An update is computed by IEEE 754, operation by operation, without fast-math flags. With any flag, results would
# depend on the surrounding code, but a step with statistics must equal one without them bit for bit; this also gives
# torch's sign of zero. Only sums may be reordered and fused, so that they vectorise; NaN and infinity keep their
# meaning.
FAST_SUMS = {"reassoc", "contract", "nsz"}

WITHIN_KERNELS: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of functions that only kernels call; wrappers for Python and C would take a quarter of all compilation."""

STORAGE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}
"""Size in bytes of each element type that can be loaded and stored."""


def load(dtype: str, slot: int, slots: int) -> Any:
    """Return a function (address, index) -> float32 or float64 that reads array number ``slot`` of ``slots``."""
    result = _type(dtype)

    @intrinsic
    def load_element(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(_element(builder, dtype, args), align=STORAGE[dtype])
            _declare_aliasing(builder, loaded, slot, slots)
            return _widen(builder, dtype, loaded)

        return result(types.int64, types.int64), codegen

    return load_element


def store(dtype: str, slot: int, slots: int, stochastic: bool = False) -> Any:
    """Return a function (address, index, value) that writes array number ``slot`` of ``slots``.

    The function returns the value as rounded to ``dtype``. If ``stochastic``, it takes random bits as a fourth argument
    and rounds like `rounding.round_stochastically`.
    """
    wide = _type(dtype)

    if stochastic:
        assert dtype == "bfloat16"

        @intrinsic
        def store_rounded(typingctx: Any, address: Any, index: Any, value: Any, noise: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                narrow = _narrow_stochastically(builder, args[2], args[3])
                _declare_aliasing(
                    builder, builder.store(narrow, _element(builder, dtype, args), align=STORAGE[dtype]), slot, slots
                )
                return _widen(builder, dtype, narrow)

            return wide(types.int64, types.int64, wide, types.int64), codegen

        return store_rounded

    @intrinsic
    def store_element(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            narrow = _narrow(builder, dtype, args[2])
            _declare_aliasing(
                builder, builder.store(narrow, _element(builder, dtype, args), align=STORAGE[dtype]), slot, slots
            )
            return _widen(builder, dtype, narrow)

        return wide(types.int64, types.int64, wide), codegen

    return store_element


def _type(dtype: str) -> Any:
    """Return the numba type of an element of ``dtype`` inside a kernel; an integer for 8-bit codes."""
    return {"float64": types.float64, "uint8": types.int64, "int8": types.int64}.get(dtype, types.float32)


def _element(builder: Any, dtype: str, args: Any) -> Any:
    kinds = {
        "float32": ir.FloatType(),
        "float64": ir.DoubleType(),
        "bfloat16": ir.IntType(16),
        "float16": ir.HalfType(),
        "uint8": ir.IntType(8),
        "int8": ir.IntType(8),
    }
    base = builder.inttoptr(args[0], ir.PointerType(kinds[dtype]))
    return builder.gep(base, [args[1]], inbounds=True)


def _declare_aliasing(builder: Any, instruction: Any, slot: int, slots: int) -> None:
    module = builder.module
    domain = module.add_metadata(["lightning_optim"])
    scopes = [module.add_metadata([f"lightning_optim.{i}", domain]) for i in range(slots)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    others = [scope for i, scope in enumerate(scopes) if i != slot]
    if others:
        instruction.set_metadata("noalias", module.add_metadata(others))


def _widen(builder: Any, dtype: str, value: Any) -> Any:
    if dtype == "bfloat16":  # A bfloat16 is the upper half of a float32.
        bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())
    if dtype == "uint8":
        return builder.zext(value, ir.IntType(64))
    if dtype == "int8":
        return builder.sext(value, ir.IntType(64))
    return builder.fpext(value, ir.FloatType()) if dtype == "float16" else value


def _narrow(builder: Any, dtype: str, value: Any) -> Any:
    if dtype == "float16":
        return builder.fptrunc(value, ir.HalfType())
    if dtype in ("uint8", "int8"):
        return builder.trunc(value, ir.IntType(8))
    if dtype != "bfloat16":
        return value
    # Round to nearest, ties to even: add 0x7fff, and one more if the last kept bit is set; a NaN stays a (quiet) NaN.
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    last = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
    return _upper_half(builder, value, builder.add(bits, builder.add(last, ir.Constant(word, 0x7FFF))))


def _narrow_stochastically(builder: Any, value: Any, noise: Any) -> Any:
    word = ir.IntType(32)
    below = builder.and_(builder.trunc(noise, word), ir.Constant(word, 0xFFFF))
    return _upper_half(builder, value, builder.add(builder.bitcast(value, word), below))


def _upper_half(builder: Any, value: Any, rounded: Any) -> Any:
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    is_nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(is_nan, builder.or_(bits, ir.Constant(word, 0x400000)), rounded)
    return builder.trunc(builder.lshr(bits, ir.Constant(word, 16)), ir.IntType(16))


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a helper that kernels call, without fast-math flags."""
    return numba.njit(function, error_model="numpy", inline="never", **WITHIN_KERNELS)


def _add(total: Any, term: Any) -> Any:
    return total + term


def _add_product(total: Any, x: Any, y: Any) -> Any:
    return total + x * y


def sum_functions() -> dict[str, Any]:
    """Return the functions by which kernels add; they are separate because fast-math flags apply to whole functions."""
    fast = numba.njit(error_model="numpy", fastmath=FAST_SUMS, **WITHIN_KERNELS)
    return {function.__name__[1:]: fast(function) for function in (_add, _add_product)}


def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def _maximum(x: Any, y: Any) -> Any:
    return x if x > y or x != x else y


def _minimum(x: Any, y: Any) -> Any:
    return x if x < y or x != x else y


def _sign_of(dtype: Any) -> Any:
    one, zero = dtype(1), dtype(0)  # A literal would be float64.

    def sign(x: Any) -> Any:
        return (one if x > zero else zero) - (one if x < zero else zero)

    return sign


@cache
def named_functions(dtype: str) -> dict[str, Any]:
    """Return the named functions of rules for numba, over values of ``dtype``."""
    return {
        "sqrt": math.sqrt,
        "absolute": abs,
        "sign": compiled(_sign_of(np.dtype(dtype).type)),
        "where": compiled(_where),
        "maximum": compiled(_maximum),
        "minimum": compiled(_minimum),
    }
