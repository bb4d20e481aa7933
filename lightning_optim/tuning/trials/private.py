"""Everything private of Lightning that trials rely on: how a fit gets its batches, and how it trains on one.

``tests/tuning/test_trials.py`` says what is relied on.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning.pytorch as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.utilities import _select_data_fetcher
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch.utils._pytree import tree_unflatten


@contextmanager
def fetcher_of(trainer: L.Trainer) -> Iterator[Any]:
    """Give what ``epoch_loop.advance`` takes batches from, on copies of the loaders; its workers end with it.

    Args:
        trainer: A Trainer that fits.

    Yields:
        The fetcher.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None, "only while the Trainer fits"
    parts = [_own(loader) for loader in combined.flattened]
    own = CombinedLoader(tree_unflatten(parts, combined._spec), combined._mode)
    own.limits = combined.limits
    fetcher = _select_data_fetcher(trainer, RunningStage.TRAINING)
    fetcher.setup(own)
    try:
        yield fetcher
    finally:
        fetcher.teardown()


def check_loaders(trainer: L.Trainer) -> None:
    """Check that the training data can be read more than once.

    Raises:
        MisconfigurationException: A loader is an iterator.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None, "only while the Trainer fits"
    for loader in combined.flattened:
        if isinstance(loader, Iterator):  # which `iter` returns as it is
            raise MisconfigurationException(
                f"The training data are an iterator, {type(loader).__name__}, which can be read once: a trial would "
                "take its batches from the run. Give the Trainer a DataLoader, or anything whose `__iter__` begins "
                "anew."
            )


def _own(loader: Any) -> Any:
    """A loader with the same dataset and sampler, which can be iterated while the other one is."""
    if "_iterator" not in getattr(loader, "__dict__", ()):
        return loader
    own = copy.copy(loader)
    # Persistent workers are busy with the batches of the fit. DataLoader refuses to set some attributes.
    vars(own).update(_iterator=None)
    if "persistent_workers" in vars(own):
        vars(own).update(persistent_workers=False)
    return own


def reseed(fetcher: Any, seed: int, rank: int) -> None:
    """Seed all random numbers anew, those by which samplers shuffle too, so that data come in another order.

    Args:
        fetcher: What `fetcher_of` gives.
        seed: The seed, above 0.
        rank: Number of the process: ranks share the order of the data, and nothing else.
    """
    own = seed + 1000 * rank
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    for loader in fetcher.combined_loader.flattened:
        batch_sampler, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
        for part in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(seed)
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(seed)


def begin_epoch(trainer: L.Trainer, fetcher: Any) -> None:
    """Begin the data anew, and the count of batches with them.

    Raises:
        RuntimeError: There is no batch.
    """
    loop = trainer.fit_loop.epoch_loop
    iter(fetcher)
    for progress in (loop.batch_progress, loop.scheduler_progress, loop.automatic_optimization.optim_progress):
        progress.reset_on_run()
    if fetcher.done:
        raise RuntimeError("The training data have no batch.")


def train_batch(trainer: L.Trainer, fetcher: Any) -> bool:
    """Train on the next batch, with all hooks of a batch, as a fit does.

    Returns:
        Whether the epoch goes on.
    """
    loop = trainer.fit_loop.epoch_loop
    try:
        loop.advance(fetcher)
    except StopIteration:  # The module ends the epoch.
        return False
    if not loop._should_accumulate():
        loop._batches_that_stepped += 1
    return not fetcher.done


def leave_fit() -> NoReturn:
    """End a fit from within, with the teardown of one that has been through.

    Raises:
        _TunerExitException: Always; Lightning catches it.
    """
    raise _TunerExitException
