"""Nothing of a fit stays alive after it: weak references to Trainer, module, optimizer and state are dead."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device

import lightning_optim as lo
from lightning_optim import optim
from tests.helpers import Net, batches, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:ScheduleFreeAdamW")  # which is tried without what goes with it
FROZEN = [lo.ParamGroupRule(name="head", part="head", frozen_until="2 steps")]


def _configure(optimizer="adamw", **options):
    return lo.ConfigureOptimizers(optimizer, lr=0.01, schedule="cosine", **options)


CALLBACKS = {
    "ConfigureOptimizers": lambda: [_configure()],
    "frozen_until": lambda: [_configure(param_groups=FROZEN)],
    "frozen_until, torch's": lambda: [_configure(torch.optim.AdamW, param_groups=FROZEN)],
    "GradientClipping": lambda: [lo.GradientClipping(method="adagc", schedule="cosine")],
    "DivergenceGuard": lambda: [lo.DivergenceGuard()],
    "OptimizerMonitor": lambda: [lo.OptimizerMonitor()],
    "RunSummary": lambda: [lo.RunSummary()],
    "WeightDecay": lambda: [lo.WeightDecay(0.1)],
    "ScheduleFree": lambda: [_configure("schedulefreeadamw"), lo.ScheduleFree()],
    "WeightAverage": lambda: [_configure(optimizer_kwargs={"ema": 0.9}), lo.WeightAverage()],
    "all": lambda: [
        _configure(param_groups=FROZEN),
        lo.GradientClipping(),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
        lo.RunSummary(),
    ],
}


class Own(Net):
    error: BaseException | None = None

    def training_step(self, batch, batch_idx):
        if self.error is not None and batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)


class WithFactory(Own):
    def configure_optimizers(self):
        return lo.OptimizerFactory("adamw", lr=0.01, schedule="cosine", param_groups=FROZEN)(self)


def _fit(parts, keep=lambda trainer, model: None, model=Own, error=None, test=False):
    """Fit, and return what ``keep`` keeps of it, and weak references to what was there, by name."""

    def run():
        module, trainer = model(), make_trainer(parts, max_epochs=1)
        module.error = error
        if error is None:
            trainer.fit(module, batches(4), batches(1))
        else:
            with pytest.raises((type(error), SystemExit)):
                trainer.fit(module, batches(4), batches(1))
            error.__traceback__ = error.__context__ = None
        kept = keep(trainer, module)
        (optimizer,) = trainer.optimizers
        states = [value for entry in optimizer.state.values() for value in entry.values()]
        found = {"trainer": trainer, "module": module, "optimizer": optimizer, "state": states[0] if states else module}
        refs = {name: weakref.ref(value) for name, value in found.items()}
        if test:
            trainer.test(module, batches(1), verbose=False)
        module.error = None
        return kept, refs

    return run()


def _alive(refs):
    """The names of what has stayed alive."""
    gc.collect()
    return {(of, name) for of, several in refs.items() for name, ref in several.items() if ref() is not None}


@pytest.mark.pictures
@pytest.mark.parametrize("how", ["fit", "test", "error", "interrupt"])
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_callbacks_keep_nothing_of_a_fit(how):
    parts = {name: make() for name, make in CALLBACKS.items()}
    error = {"error": RuntimeError, "interrupt": KeyboardInterrupt}.get(how, lambda text: None)
    refs = {name: _fit(part, error=error("mine"), test=how == "test")[1] for name, part in parts.items()}
    assert _alive(refs) == set()


def test_no_kind_of_optimizer_keeps_anything():
    parts = {name: [_configure(name), lo.GradientClipping(), lo.OptimizerMonitor()] for name in optim.list_optimizers()}
    assert _alive({name: _fit(part)[1] for name, part in parts.items()}) == set()


def test_an_optimizer_or_scheduler_that_is_kept_keeps_no_trainer_and_no_module():
    def keep(trainer, model):
        return [trainer.optimizers[0], *(config.scheduler for config in trainer.lr_scheduler_configs)]

    fits = {name: _fit(make(), keep) for name, make in CALLBACKS.items()}
    fits["factory"] = _fit([], keep, WithFactory)
    alive = _alive({name: refs for name, (_, refs) in fits.items()})
    assert {name for _, name in alive} <= {"optimizer", "state"}


def test_a_fit_that_is_kept_lets_go_of_state_that_is_moved_or_dropped():
    """As Lightning does at the end of a fit on an accelerator, where it moves all state to the CPU."""
    trainer = make_trainer([_configure()], max_epochs=1)
    trainer.fit(Own(), batches(4))
    (optimizer,) = trainer.optimizers
    old = [weakref.ref(entry["exp_avg"]) for entry in optimizer.state.values()]
    for param, entry in optimizer.state.items():
        optimizer.state[param] = {name: value.clone() for name, value in entry.items()}
    del entry
    _optimizer_to_device(optimizer, torch.device("cpu"))
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)


def test_state_that_is_replaced_by_a_loaded_one_is_freed_at_once():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    old = weakref.ref(optimizer.state[weight]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert old() is None
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 2
