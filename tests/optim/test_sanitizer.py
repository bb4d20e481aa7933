"""Kernels between guard pages: nothing outside a tensor is so much as read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.own_process import run_module

SANITIZER = "tests.optim.sanitizer"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["end", "begin"])
def test_one_element_too_many_is_found(fault: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"died of SIG(SEGV|BUS), at:\n(right|left) side of Cell"):
        run_module(SANITIZER, tmp_path / "journal", "cpu", "0/300", PLANTED_FAULT=fault)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_cell_between_guard_pages(backend: str, tmp_path: Path) -> None:
    run_module(SANITIZER, tmp_path / "journal", backend, timeout=3500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_cell_between_guard_pages_under_tritons_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_module(SANITIZER, tmp_path / "journal", "triton", timeout=3500, TRITON_INTERPRET="1")
