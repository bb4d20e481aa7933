"""Whatever happens to shapes, layouts, dtypes and state between two steps: right, or refused by name; never a death."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.kernels.cpu.backend import CpuBackend
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.batches import Batches
from tests.optim.fuzz import check
from tests.optim.fuzz_examples import Example, Part
from tests.optim.memory_cells import Cell
from tests.own_process import run_module

EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "")
"""How many, instead of 500 and, in the slow run, 20 000."""
SEED = os.environ.get("FUZZ_SEED", "0")
FUZZ = "tests.optim.fuzz"
TRITON = {"TRITON_INTERPRET": "1"}


def test_a_few_hundred_examples(tmp_path: Path) -> None:
    run_module(FUZZ, tmp_path / "journal", EXAMPLES or "500", SEED, **TRITON)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_thousand_examples_of_everything(tmp_path: Path) -> None:
    run_module(FUZZ, tmp_path / "journal", EXAMPLES or "20000", SEED, "everything", timeout=7000, **TRITON)


@pytest.mark.slow
def test_what_corrupts_the_process_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)written outside of|died of"):
        run_module(FUZZ, tmp_path / "journal", "5", "0", PLANTED_FAULT="end", **TRITON)


def test_a_death_is_found_and_what_it_was_at(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)died of SIGABRT, at:\nan abort"):
        run_module("tests.own_process", tmp_path / "journal")


ORDINARY = Example(Cell("adamw", {"lr": 1e-2}), (Part((3, 4)), Part((5,), gradient="none"), Part((4, 4), "transposed")))


def test_an_ordinary_example_steps() -> None:
    assert check(ORDINARY) == "stepped"


def _raise(message: str) -> Any:
    def apply(self: FusedOptimizer, sorted_: Batches) -> None:
        if len(sorted_.numel) < len(ORDINARY.parts):
            raise RuntimeError(message)

    return apply


def test_a_refusal_that_names_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedOptimizer, "_apply", _raise("sizes differ"))
    with pytest.raises(AssertionError, match="RuntimeError names neither parameter nor option: sizes differ"):
        check(ORDINARY)


def test_a_refusal_of_what_is_legal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedOptimizer, "_apply", _raise("layers.0.weight is not liked"))
    with pytest.raises(AssertionError, match=r"refused, and is legal: layers\.0\.weight"):
        check(ORDINARY)


def test_a_refusal_in_the_middle_of_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: CpuBackend, batch: Any, **kwargs: Any) -> None:
        batch.states[0]["exp_avg"].add_(1)
        raise ValueError("layers.2.weight is wrong")

    illegal = Part((3, 4), states=((0, "other"),))
    monkeypatch.setattr(CpuBackend, "apply", apply)
    with pytest.raises(AssertionError, match=r"state 'exp_avg' of layers\.0\.weight was written by what then raised"):
        check(Example(ORDINARY.cell, (illegal, *ORDINARY.parts[1:]), before=0))


def test_another_result_than_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = CpuBackend.apply

    def nearly(self: CpuBackend, batch: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            batch.params[-1].view(-1)[0] += 1e-3
        return apply(self, batch, **kwargs)

    monkeypatch.setattr(CpuBackend, "apply", nearly)
    with pytest.raises(AssertionError, match=r"layers\.2\.weight differs from reference"):
        check(Example(ORDINARY.cell, (Part((3, 4)), Part((5,)), Part((4, 4)))))
