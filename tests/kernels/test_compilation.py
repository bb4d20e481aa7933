"""What is compiled for a kernel: nothing that is not called, because a first step waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim.kernels.cpu import memory, quantized


def twice(x: Any) -> Any:
    return x + x


@pytest.mark.parametrize(
    ("dispatcher", "signature"),
    [
        (memory.compiled(twice), "float32(float32)"),
        (memory.sum_functions()["add_product"], "float32(float32, float32, float32)"),
        (quantized.encode, "int64(float32, float32, int64, float32[::1], uint8[::1])"),
    ],
)
def test_functions_within_kernels_have_no_wrappers_for_python_and_c(dispatcher: Any, signature: str) -> None:
    dispatcher.compile(signature)
    compiled = next(iter(dispatcher.overloads.values()))
    text = compiled.library.get_llvm_str()
    assert compiled.fndesc.mangled_name in text
    assert compiled.fndesc.llvm_cpython_wrapper_name not in text
    assert compiled.fndesc.llvm_cfunc_wrapper_name not in text
