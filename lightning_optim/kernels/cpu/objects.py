"""Whether tensors, and the lists and dicts that hold them, are as they were: by compiled loops over their memory.

A loop compares words of memory with what they were. "Unchanged" is certain; anything else may be a change or not, and
has to be found out in Python. All objects that a loop reads are kept alive by references, and the GIL is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_optim.core.placements import PLAIN
from lightning_optim.kernels.cpu import disk_cache, launch
from lightning_optim.kernels.cpu.object_layout import KIND_WORDS, Layout, kind_of, layout, words

_MOST = 5  # dimensions, as in object_layout

_TEXT = f"""\
@inner
def same_kind(impl, sizes, kind, mask):
    dims = word(kind, 0)
    if word(impl, sizes) != dims:
        return False
    for i in range(1, 1 + dims):
        if word(impl, sizes + i) != word(kind, i) or word(impl, sizes + {_MOST} + i) != word(kind, {_MOST} + i):
            return False
    place = {1 + 2 * _MOST}
    if word(impl, sizes + place) != word(kind, place) or word(impl, sizes + place + 1) != word(kind, place + 1):
        return False
    if (word(impl, sizes + place + 2) & mask) != word(kind, place + 2):
        return False
    return word(impl, sizes + place + 3) == word(kind, place + 3)


@inner
def same_lists(rows, count):
    for i in range(count):
        row = rows + i * {3 * 8}
        held, size, items = word(row, 0), word(row, 1), word(row, 2)
        if word(held, 2) != size:
            return False
        present = word(held, 3)
        for j in range(size):
            if word(present, j) != word(items, j):
                return False
    return True


@inner
def same_dicts(rows, count, tag):
    for i in range(count):
        row = rows + i * {2 * 8}
        if word(word(row, 0), tag) != word(row, 1):
            return False
    return True


def kernel(launch):
    impl_at, storage_at, autograd_at, python_at = word(launch, 1), word(launch, 2), word(launch, 3), word(launch, 4)
    sizes_at, grad_at, data_at, bytes_at = word(launch, 5), word(launch, 6), word(launch, 7), word(launch, 8)
    no_grad, mask, tag_at = word(launch, 9), word(launch, 10), word(launch, 11)
    tensor_type, kinds = word(launch, 12), word(launch, 13)
    if not same_lists(word(launch, 14), word(launch, 15)) or not same_dicts(word(launch, 16), word(launch, 17), tag_at):
        return
    tensors, count = word(launch, 18), word(launch, 19)
    for i in range(count):
        row = tensors + i * {7 * 8}
        held = word(row, 0)
        impl = word(held, impl_at)
        if word(held, 1) != word(row, 1) or impl != word(row, 2):
            return
        storage = word(impl, storage_at)
        if storage != word(row, 3) or word(storage, data_at) != word(row, 4) or word(storage, bytes_at) != word(row, 5):
            return
        if not same_kind(impl, sizes_at, kinds + word(row, 6) * {KIND_WORDS * 8}, mask):
            return
    params, count, found = word(launch, 20), word(launch, 21), word(launch, 22)
    for i in range(count):
        row = params + i * {5 * 8}
        impl = word(word(row, 0), impl_at)
        if impl != word(row, 1):
            return
        autograd, kind = word(impl, autograd_at), word(row, 2)
        grad = no_grad if autograd == 0 else word(autograd, grad_at)
        if kind < 0:
            if grad != no_grad:
                return
            continue
        if grad == no_grad or grad == 0:
            return
        held = word(grad, python_at) & -8
        if held != 0 and word(held, 1) != tensor_type:
            return
        if not same_kind(grad, sizes_at, kinds + kind * {KIND_WORDS * 8}, mask):
            return
        storage = word(grad, storage_at)
        data = word(storage, data_at)
        if word(storage, bytes_at) != word(row, 3) or data == 0:
            return
        set_word(found, 0, data + word(row, 4))
        found += 8
    set_word(launch, 0, 1)
"""


class Watch:
    """Tensors and their holders, to be compared with what they were.

    Args:
        lists: Lists whose items must be the same.
        dicts: Dicts which must not have been changed.
        tensors: Plain tensors whose class, metadata and memory must be the same.
        params: Plain parameters whose gradients are looked for.
        grads: The gradient of each of ``params`` at present; None for those that have none and must have none.

    Raises:
        ValueError: It cannot be known whether these are unchanged, or some of them cannot be described.
    """

    def __init__(
        self,
        lists: Sequence[list[Any]],
        dicts: Sequence[Mapping[Any, Any]],
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> None:
        known = layout()
        if known is None:
            raise ValueError("It is not known where tensors keep their memory.")
        if not all(type(held) is list for held in lists) or not all(isinstance(held, dict) for held in dicts):
            raise ValueError("Only lists and dicts are known.")
        self._kinds: dict[tuple[int, ...], int] = {}
        items = [_table([[id(item)] for item in held]) for held in lists]
        parts = [
            _table([[id(held), len(held), _address(ids)] for held, ids in zip(lists, items, strict=True)], 3),
            _table([[id(held), words(id(held), known.tag + 1)[known.tag]] for held in dicts], 2),
            _table([self._tensor(tensor, known) for tensor in tensors], 7),
            _table([self._gradient(*pair, known) for pair in zip(params, grads, strict=True)], 5),
        ]
        self._found = np.zeros(sum(grad is not None for grad in grads), dtype=np.int64)
        kinds = _table([list(kind) for kind in self._kinds], KIND_WORDS)
        record = [0, *known.words(), id(Tensor), _address(kinds)]
        for part in parts:
            record += [_address(part), len(part)]
        self._record = np.array([*record, _address(self._found)], dtype=np.int64)
        self._address = _address(self._record)
        self._kept = lists, dicts, tensors, params, items, parts, kinds
        self._loop = _build()
        present = self.gradients()
        wanted = [grad.data_ptr() for grad in grads if grad is not None]
        if present is None or present.tolist() != wanted:
            raise ValueError("The memory of tensors is not as expected.")

    def gradients(self) -> npt.NDArray[np.int64] | None:
        """Return the addresses of the gradients, int64, [gradients], or None if anything may have changed.

        Each gradient has the class, the metadata and the size of storage of the one before. The array is overwritten by
        the next call.
        """
        self._record[0] = 0
        self._loop.dispatcher(self._address)
        return self._found if self._record[0] else None

    def _kind(self, tensor: Tensor, known: Layout) -> int:
        return self._kinds.setdefault(kind_of(tensor, known), len(self._kinds))

    def _tensor(self, tensor: Tensor, known: Layout) -> list[int]:
        if type(tensor) not in PLAIN:
            raise ValueError("Only plain tensors are known.")
        storage = tensor.untyped_storage()
        memory = [storage._cdata, storage.data_ptr(), int(storage.nbytes())]
        return [id(tensor), id(type(tensor)), tensor._cdata, *memory, self._kind(tensor, known)]

    def _gradient(self, param: Tensor, grad: Tensor | None, known: Layout) -> list[int]:
        if type(param) not in PLAIN:
            raise ValueError("Only plain tensors are known.")
        if grad is None:
            return [id(param), param._cdata, -1, 0, 0]
        if type(grad) is not Tensor or grad.data_ptr() == 0:
            raise ValueError("Only plain gradients with memory are known.")
        kind, offset = self._kind(grad, known), int(grad.storage_offset()) * grad.element_size()
        return [id(param), param._cdata, kind, int(grad.untyped_storage().nbytes()), offset]


def _table(rows: Sequence[Sequence[int]], width: int = 1) -> npt.NDArray[np.int64]:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _address(array: npt.NDArray[np.int64]) -> int:
    return array.ctypes.data


@cache
def _build() -> launch.BlockLoop:
    names: dict[str, Any] = {**launch.names({}), "__name__": __name__, "inner": numba.njit(error_model="numpy")}
    kept_as = f"objects-{disk_cache.fingerprint(_TEXT, ())}"
    return launch.compile_loop("that compares tensors with what they were", _TEXT, names, kept_as, holds_gil=True)
