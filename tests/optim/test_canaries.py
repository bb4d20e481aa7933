"""No step writes, or takes anything from, outside of its tensors; and canaries tell when one does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optim.kernels import compiled
from lightning_optim.kernels.cpu import backend as cpu
from lightning_optim.kernels.cpu import factored
from tests.canaries import Canaries
from tests.optim.memory_cells import SIZES, Cell, quick, run

_SPLIT, _SPLIT_ROWS = compiled.split, compiled.split_rows


@pytest.mark.parametrize("cell", quick(), ids=str)
def test_nothing_outside_a_tensor_is_written_or_used(cell: Cell) -> None:
    among_numbers = run(cell, Canaries("numbers"))
    among_nan = run(cell, Canaries("nan"))
    for a, b in zip(among_numbers, among_nan, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (Cell("adamw", {"lr": 1e-2}), ("layers.4.weight", "state 'exp_avg' of layers.4.weight", "'exp_avg_sq'")),
        (Cell("lion", {"lr": 1e-2}), ("layers.18.weight", "state 'exp_avg' of layers.2.weight")),
        (Cell("sgd", {"lr": 1e-2}), ("layers.8.weight",)),
        (Cell("adamw", {"kahan_sum": True}, "bfloat16"), ("layers.4.weight", "state 'kahan_comp' of layers.4.weight")),
        (Cell("lion", {"state_bits": 8}, "bfloat16"), ("state 'exp_avg' of layers.8.weight",)),
    ],
    ids=str,
)
def test_one_element_too_many_is_found(cell: Cell, named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert SIZES[4][0] == (256,)

    def too_long(numel: tuple[int, ...], size: int) -> Any:
        blocks = _SPLIT(numel, size).copy()
        blocks[blocks[:, 2] == np.array(numel)[blocks[:, 0]], 2] += 1
        return blocks

    def too_long_rows(numel: tuple[int, ...], row_sizes: tuple[int, ...], size: int) -> Any:
        blocks = _SPLIT_ROWS(numel, row_sizes, size).copy()
        vectors = blocks[:, 3] == np.array(numel)[blocks[:, 0]]
        blocks[vectors, 2:] += 1
        return blocks

    monkeypatch.setattr(cpu, "split", too_long)
    monkeypatch.setattr(cpu, "split_rows", too_long_rows)
    with pytest.raises(AssertionError, match="written outside of") as caught:
        run(cell, Canaries())
    for name in named:
        assert name in str(caught.value)


def test_a_step_that_takes_from_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    find = compiled.find

    def one_further(batch: Any) -> Any:
        addresses, *others = find(batch)
        addresses[:, 1] += 4  # gradients
        return addresses, *others

    monkeypatch.setattr(compiled, "find", one_further)
    cell = Cell("adamw", {"lr": 1e-2})
    results = [run(cell, Canaries(fill)) for fill in ("numbers", "nan")]
    assert not all(map(torch.equal, *results))


@settings(max_examples=100, deadline=None)
@given(
    numel=st.lists(st.one_of(st.integers(0, 70_000), st.sampled_from([4095, 4096, 4097, 65535, 65536, 65537]))),
    size=st.sampled_from([4096, 16384, 65536]),
)
def test_blocks_are_a_partition_of_each_tensor(numel: list[int], size: int) -> None:
    """No element in two blocks, which two threads may run, and none in none."""
    blocks = compiled.split(tuple(numel), size)
    assert (blocks[:, 2] - blocks[:, 1] <= size).all()
    _partition([(0, n) for n in numel], blocks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=4))
def test_blocks_of_factored_tensors_are_a_partition_of_their_rows(shapes: list[tuple[int, int, int]]) -> None:
    blocks, with_parts = factored._blocks(tuple(shapes))
    rows = [
        (tensor, matrix * shapes[tensor][1] + top, matrix * shapes[tensor][1] + bottom)
        for tensor, start, end, top, bottom, _ in blocks.tolist()
        for matrix in range(start, end)
    ]
    _partition([(0, matrices * height) for matrices, height, _ in shapes], np.array(rows))
    places = [
        (tensor, matrix * with_parts[tensor, 3] + part)
        for tensor, start, end, _, _, part in blocks.tolist()
        for matrix in range(start, end)
    ]
    assert len(places) == len(set(places)), "two blocks keep their column sums in one place"


def _partition(wanted: list[tuple[int, int]], runs: Any) -> None:
    """Assert that ``runs``, of (tensor, first, end), fill for each tensor what is ``wanted``: first and end."""
    for tensor, (first, end) in enumerate(wanted):
        reached = first
        for start, stop in sorted((start, stop) for which, start, stop in runs.tolist() if which == tensor):
            assert start == reached
            assert stop > start
            reached = stop
        assert reached == end


def test_sizes_are_around_what_is_done_at_a_time() -> None:
    numels = {torch.Size(shape).numel() for shape, _ in SIZES}
    assert {0, 1, 255, 256, 257, 4095, 4096, 4097} <= numels
