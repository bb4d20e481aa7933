"""One launch of a kernel: its tables by address, its blocks from an atomic counter, so that any thread can run it.

A kernel is a function of one integer, the address of a record that `threads.run_blocks` fills in. Every thread calls it
with the same address and takes runs of blocks until none is left. It needs neither Python objects nor the GIL, so
threads that know nothing of Python can run it, such as those of OpenMP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lightning_optim.kernels.cpu import disk_cache

NEXT, DONE, BLOCKS, RUN, TABLES = 0, 8, 16, 17, 18
"""Places in the record, int64 each: the first block not yet taken, the number of blocks done, the number of blocks,
how many are taken at a time, and then (address, rows, columns) of each table. What threads write lies 64 bytes apart
from what others write or read, because a cache line has one writer at a time."""


@dataclass(frozen=True)
class BlockLoop:
    """A compiled kernel.

    Args:
        dispatcher: numba's function of the address of a record, to call from Python; it releases the GIL.
        address: Address of the same function in C, ``void (*)(void *)``.
    """

    dispatcher: Any
    address: int


def kernel_text(tables: Sequence[str], before: Sequence[str], block: Sequence[str]) -> str:
    """Return the text of a kernel.

    Args:
        tables: Names of the tables, which `names` must be given as well.
        before: Lines that each thread runs once, without indentation.
        block: Lines that run for each ``block``, without indentation.
    """
    lines = ["def kernel(launch):"]
    for i, table in enumerate(tables):
        place = TABLES + 3 * i
        shape = f"(word(launch, {place + 1}), word(launch, {place + 2}))"
        lines.append(f"    {table} = carray(pointer_{table}(word(launch, {place})), {shape})")
    lines += [f"    {line}" for line in before]
    lines += [f"    count, run = word(launch, {BLOCKS}), word(launch, {RUN})"]
    lines += [f"    first = add_to_word(launch, {NEXT}, run)", "    while first < count:"]
    lines += ["        for block in range(first, min(first + run, count)):"]
    lines += [f"            {line}" for line in block]
    lines += [f"        add_to_word(launch, {DONE}, min(first + run, count) - first)"]
    lines += [f"        first = add_to_word(launch, {NEXT}, run)"]
    return "\n".join(lines) + "\n"


def names(tables: dict[str, str]) -> dict[str, Any]:
    """Return the globals that `kernel_text` and other kernels refer to, for tables of the given dtypes."""
    pointers = {f"pointer_{table}": _pointer(dtype) for table, dtype in tables.items()}
    return {
        "carray": numba.carray,  # type: ignore[attr-defined]
        "word": _word,
        "add_to_word": _add_to_word,
        "set_word": _set_word,
        **pointers,
    }


def compile_loop(what: str, text: str, names: dict[str, Any], kept_as: str, *, holds_gil: bool = False) -> BlockLoop:
    """Compile the function ``kernel`` that ``text`` defines, or load it from disk.

    Args:
        what: Description of the kernel for messages.
        text: Text of the kernel, from `kernel_text`.
        names: Globals that the text refers to.
        kept_as: Name of the entry on disk.
        holds_gil: Whether it reads Python objects, so that it must not release the GIL.
    """
    exec(compile(text, f"<{kept_as}>", "exec"), names)
    dispatcher = numba.njit(names["kernel"], nogil=not holds_gil, error_model="numpy")
    disk_cache.keep_on_disk(dispatcher, kept_as)
    with disk_cache.LogIfSlow(lambda: f"Compiling the CPU kernel {what}{disk_cache.cache_note()}"):
        dispatcher.compile("void(int64)")
    (compiled,) = dispatcher.overloads.values()
    # This is how numba itself passes compiled functions as pointers; `numba.cfunc` offers no choice of the cache.
    return BlockLoop(dispatcher, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


_INT64 = ir.IntType(64)


def _place(builder: Any, launch: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(launch, _INT64.as_pointer()), [index])


@intrinsic
def _word(typingctx: Any, launch: Any, index: Any) -> Any:
    """Read one place of the record."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_place(builder, *args))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _add_to_word(typingctx: Any, launch: Any, index: Any, amount: Any) -> Any:
    """Add to one place of the record, atomically; return what was there before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, args[0], args[1]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _set_word(typingctx: Any, launch: Any, index: Any, value: Any) -> Any:
    """Write one place of the record."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _place(builder, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _pointer(dtype: str) -> Any:
    pointer_type: Any = types.CPointer(getattr(types, dtype))  # type: ignore[no-untyped-call]

    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return pointer_type(types.int64), codegen

    return pointer
