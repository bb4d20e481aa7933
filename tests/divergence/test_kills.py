"""Runs that are killed at any moment, and go on from their last checkpoint."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.divergence.survivor import BAD_STEPS, survive
from tests.helpers import bit_equal


def _final(folder: Path) -> dict[str, object]:
    return torch.load(folder / "final.pt", weights_only=True)


def _run_and_kill(folder: Path, rollback: bool, chance: random.Random) -> str | None:
    """What it was doing when it was killed; None if it was at its end already."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = forked.start(survive, folder, rollback, there)
    there.close()
    doing = "start"
    try:
        for _ in range(chance.randint(0, 30)):  # a step says three or four things
            doing = here.recv()
        time.sleep(0.01 * chance.random())
        while here.poll():
            doing = here.recv()
    except EOFError:
        process.join(60)
        assert process.exitcode == 0
        return None
    process.kill()
    process.join(60)
    return doing if process.exitcode else None


@pytest.mark.parametrize("rollback", [True, False], ids=["rollback", "no rollback"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, kills, rollback):
    whole = tmp_path / "whole"
    whole.mkdir()
    forked.start(survive, whole, rollback).join(60)
    expected = _final(whole)
    assert expected["skipped"] == len(BAD_STEPS)

    chance, killed = random.Random(kills), []
    for attempt in itertools.count():
        folder = tmp_path / f"killed{attempt}"
        folder.mkdir()
        while len(killed) < kills:
            if (doing := _run_and_kill(folder, rollback, chance)) is None:
                break
            killed.append(doing)
        forked.start(survive, folder, rollback).join(60)
        assert bit_equal(_final(folder), expected)
        if len(killed) == kills:
            break
    if kills >= 20:  # while it computed, between two micro-batches, while it wrote its checkpoint
        assert {"step", "accumulation", "save"} <= set(killed), killed
