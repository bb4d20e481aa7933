"""Memory of a whole step: no copy of a tensor beside the update, and no growth over thousands of steps."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import weakref
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo
from lightning_optim.clipping import AGC, ClipRule, GlobalNorm, UpdateRMS
from lightning_optim.diagnostics import Histograms, PerTensor
from lightning_optim.divergence import NonFiniteGradient
from lightning_optim.kernels import rounding
from tests.allocations import python_peak, torch_peak
from tests.helpers import Net, batches, make_trainer


def test_what_is_allocated_is_seen_also_within_an_operator() -> None:
    values = [torch.ones(10_000), torch.ones(10_000)]
    assert torch_peak(lambda: None) == 0
    assert 40_000 <= torch_peak(lambda: values[0] + 1) < 41_000
    # The foreach form makes both sums before it returns them.
    assert 80_000 <= torch_peak(lambda: torch._foreach_add(values, 1.0)) < 82_000
    assert 80_000 <= python_peak(lambda: np.ones(10_000)) < 100_000


def clipped_step(
    optimizer: torch.optim.Optimizer, rule: ClipRule, records: list[object], steps: int = 2
) -> lo.StepPipeline:
    pipeline = lo.StepPipeline(optimizer, clip=rule, detectors=[NonFiniteGradient()], on_report=records.append)
    for _ in range(steps):
        optimizer.step()
    records.clear()
    return pipeline


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (GlobalNorm(max_norm=1e-3), torch.float32),
        (GlobalNorm(max_norm=1e-3), torch.bfloat16),
        (UpdateRMS(max_rms=1e-3, patience=9), torch.float32),
        (UpdateRMS(max_rms=1e-3, patience=9), torch.bfloat16),
        (AGC(), torch.float32),
    ],
)
def test_a_step_of_adamw_that_clips_skips_and_sums_takes_less_than_one_percent(
    rule: ClipRule, dtype: torch.dtype
) -> None:
    params = [torch.nn.Parameter(torch.randn(512, 1024).to(dtype)) for _ in range(4)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = lo.optim.AdamW(params, backend="cpu")
    records: list[object] = []
    pipeline = clipped_step(optimizer, rule, records)
    weights = sum(param.numel() * param.element_size() for param in params)
    # Parameters, gradients and two moments.
    limit = 4 * weights / 100
    assert torch_peak(optimizer.step) < limit
    assert python_peak(optimizer.step) < limit
    assert isinstance(rule, AGC) or pipeline.counts().clipped == 4
    assert len(records) == 2


@pytest.mark.parametrize("clipped", [True, False])
def test_adafactor_with_sums_takes_its_largest_tensor_once(clipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rounding.PIECE, "cpu", 2_000)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(300, 400), (500, 400), (400,)]]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = lo.optim.Adafactor(params, backend="cpu")
    records: list[object] = []
    clipped_step(optimizer, GlobalNorm(max_norm=1e-3 if clipped else 1e9), records)
    assert torch_peak(optimizer.step) < 1.3 * params[1].numel() * 4
    assert python_peak(optimizer.step) < 0.2 * params[1].numel() * 4
    assert len(records) == 2


@pytest.mark.parametrize(("step", "matrices"), [(1, 5), (2, 1), (4, 4)])
def test_soap_takes_few_matrices_as_large_as_its_largest_basis(
    step: int, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The new Gram matrix; in the first step also its copy, eigenvectors and LAPACK's workspace of two, and in those
    # that refresh the basis their product with it, Q and R.
    monkeypatch.setitem(rounding.PIECE, "cpu", 2_000)
    param = torch.nn.Parameter(torch.randn(400, 20))
    param.grad = torch.randn_like(param)
    optimizer = lo.optim.SOAP([param], precondition_frequency=3)
    optimizer.collect_step_stats = True
    for _ in range(step - 1):
        optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[param].values())
    peak = torch_peak(optimizer.step) - (0 if state else sum(v.nbytes for v in optimizer.state[param].values()))
    assert peak < (matrices + 0.6) * 400 * 400 * 4


class Allocated(L.Callback):
    """Bytes in Python objects and numpy arrays that lines of the package have made and that still live.

    Args:
        at: Steps at which they are added up.
    """

    def __init__(self, *at: int) -> None:
        self._at = at
        self.found: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self._at:
            gc.collect()
            ours = tracemalloc.Filter(True, str(Path(lo.__file__).parent / "*"))
            now = tracemalloc.take_snapshot().filter_traces([ours])
            self.found.append(sum(trace.size for trace in now.traces))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_callbacks_keep_as_much_after_5000_steps_as_after_1000(tmp_path: Any) -> None:
    allocated = Allocated(1_000, 5_000)
    callbacks = [
        lo.ConfigureOptimizers("adamw", lr=1e-4, schedule="constant"),
        lo.GradientClipping(max_norm=1.0),
        lo.DivergenceGuard(rollback=None, lr_cut=None, stop=False),
        lo.OptimizerMonitor(per_tensor=PerTensor(every=100), histograms=Histograms(every=100)),
        allocated,
    ]
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(callbacks, max_steps=5_000, max_epochs=None, logger=logger, log_every_n_steps=2)
    tracemalloc.start()
    try:
        trainer.fit(Net(), batches(5_000))
    finally:
        tracemalloc.stop()
    early, late = allocated.found
    assert late - early < 100_000


class Kept(L.Callback):
    """Bytes of all tensors, and number of objects, that live.

    Args:
        at: Steps at which they are counted.
    """

    def __init__(self, *at: int) -> None:
        self._at = at
        self.nbytes: list[int] = []
        self.objects: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self._at:
            gc.collect()
            found = gc.get_objects()
            tensors = [t for t in found if type(t) in KINDS and t.layout is torch.strided]  # others are of other tests
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            self.nbytes.append(sum(storages.values()))
            self.objects.append(sum(not _notes_a_type(each) for each in found))


KINDS = (torch.Tensor, torch.nn.Parameter)


def _notes_a_type(thing: Any) -> bool:
    """Whether it is half of what pybind11 keeps of each class it has met, once: a weak reference with its callback.

    How many classes it meets late, as matplotlib's when it draws, depends on the tests that have run before.
    """
    if type(thing) is weakref.ReferenceType:
        return isinstance(thing(), type)
    return type(thing) is BuiltinFunctionType and isinstance(thing.__self__, weakref.ReferenceType)


def test_the_callbacks_keep_no_tensor_and_few_objects_more_from_step_to_step(tmp_path: Any) -> None:
    kept = Kept(300, 400, 500, 600)
    callbacks = [
        lo.ConfigureOptimizers("adamw", lr=1e-4, schedule="constant"),
        lo.GradientClipping(max_norm=1.0),
        lo.DivergenceGuard(rollback=None, lr_cut=None, stop=False),
        lo.OptimizerMonitor(per_tensor=PerTensor(every=50), histograms=Histograms(every=50)),
        kept,
    ]
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(callbacks, max_steps=600, max_epochs=None, logger=logger, log_every_n_steps=10)
    trainer.fit(Net(), batches(600))
    early, *_, late = kept.nbytes
    assert early > 0
    assert late - early < 1_000
    # What is kept at each of 100 steps grows in every part; in a process with other tests something else may in some.
    assert min(after - before for before, after in itertools.pairwise(kept.objects)) < 80
