"""bfloat16 under Triton's interpreter, as hardware has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def round_as_hardware_does(setattr_: Any = setattr) -> None:
    """Have the interpreter round to nearest, ties to even, and multiply matrices of bfloat16, as every GPU does.

    It cuts the low bits off, and multiplies the bits of bfloat16 as if they were integers.

    Args:
        setattr_: What replaces the interpreter's function: `setattr`, or that of a `MonkeyPatch`.
    """
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name == "fp32" and target.name == "bf16":
            floats = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
            return floats.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        return original(values, source, target, mode)

    setattr_(interpreter, "_convert_float", convert)

    product = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.name != "bf16":
            return handle
        wide = original(handle.data, handle.dtype, interpreter.tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return product(self, widened(a), widened(b), *others)

    setattr_(interpreter.InterpreterBuilder, "create_dot", dot)
