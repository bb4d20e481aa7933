"""Checks of copies of an optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch

from lightning_optim.testing.check import check
from lightning_optim.testing.compare import snapshot
from lightning_optim.testing.subject import Subject


@check(
    why="Trials, averaging and tests copy a model together with its optimizer.",
    fix="torch copies `defaults`, `state` and `param_groups` alone: bring other attributes along in `__getstate__`. "
    "Keep no closures, generators, streams or parameters by id.",
)
def deepcopy(subject: Subject) -> None:
    """A deep copy of parameters and optimizer goes on bit-equal, and leaves the original alone."""
    _copies(subject, copy.deepcopy, "a deep copy")


@check(
    why="Spawned processes and some trainers pickle optimizers; what is no plain value stops them.",
    fix="Bring attributes along in `__getstate__`, without lambdas or local functions; restore in `__setstate__` what "
    "cannot be pickled.",
)
def pickled(subject: Subject) -> None:
    """Parameters and optimizer that were pickled together go on bit-equal."""
    _copies(subject, lambda pair: pickle.loads(pickle.dumps(pair)), "a pickled copy")


def _copies(subject: Subject, through: Any, what: str) -> None:
    params = subject.parameters()
    grads = subject.gradients(params, 6)
    optimizer, _ = subject.run(params=params, grads=grads[:3])
    before = snapshot(list(params))
    copied_params, copied = through((params, optimizer))
    torch.manual_seed(1)
    subject.run(params=copied_params, grads=grads[3:], optimizer=copied)
    subject.same(params, before, f"steps of {what} have changed the original")
    torch.manual_seed(1)
    subject.run(params=params, grads=grads[3:], optimizer=optimizer)
    subject.same(copied_params, params, f"{what}, after three further steps")
