"""What a look relies on of Lightning's private parts, and of torch's."""

from __future__ import annotations

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_optim.tuning.inspection import _lightning as private
from lightning_optim.tuning.inspection.stillness import recomputing
from tests.helpers import Net, make_trainer


def test_a_fit_is_told_from_what_is_none():
    trainer, module, seen = make_trainer(max_epochs=1), Net(), []
    module.on_train_start = lambda: seen.append(private.is_fitting(trainer, module))
    module.on_fit_start = lambda: seen.append(private.is_fitting(trainer, module))
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 2)), 4)
    assert private.trainer_of(module) is None
    assert not private.is_fitting(trainer, module)
    trainer.fit(module, data)
    assert seen == [True, True]
    assert private.trainer_of(module) is trainer
    assert not private.is_fitting(trainer, module)
    assert (trainer.state.fn, trainer.state.status) == (TrainerFn.FITTING, TrainerStatus.FINISHED)


def test_batches_are_those_that_a_fit_would_draw():
    data = DataLoader(torch.arange(12.0), 4, shuffle=True)
    trainer, module = make_trainer(overfit_batches=1), Net()
    private.enter(trainer, module, None, data)
    (loader,) = (private._requested(trainer)[0],)
    assert isinstance(loader.sampler, SequentialSampler)  # which Lightning puts in place to overfit
    trainer = make_trainer()
    private.enter(trainer, module, None, data)
    iterables, mode = private._requested(trainer)
    assert isinstance(iterables.sampler, RandomSampler)
    assert mode == "max_size_cycle"
    (batch,) = private.training_batches(trainer, None, 1)
    assert len(set(batch.tolist()) & set(range(12))) == 4


def test_torch_tells_when_a_backward_pass_runs():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(recomputing()))
    y.sum().backward()
    assert seen == [True]
    assert not recomputing()
