"""Optimizers that are reset, copied, unhooked or kept from Lightning in the middle of a run."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn

import lightning_optim as lo
from tests.helpers import Net, batches, make_trainer, precision

LIMIT = 1e-3


class Moves(Net):
    """Records how far each batch moves the weights.

    Args:
        manual: Whether it steps by hand.
        cls: Class of its optimizer.
    """

    def __init__(self, manual=False, cls=torch.optim.SGD):
        super().__init__()
        self.automatic_optimization, self.cls, self.moved = not manual, cls, []

    def training_step(self, batch, batch_idx):
        self.before = nn.utils.parameters_to_vector(self.parameters()).detach().clone()
        loss = 100 * super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        self.by_hand(loss)
        return None

    def by_hand(self, loss):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_batch_end(self, *args):
        now = nn.utils.parameters_to_vector(self.parameters()).detach()
        self.moved.append((now - self.before).norm().item())

    def configure_optimizers(self):
        return self.cls(self.parameters(), lr=1.0)


class Changes(Callback):
    """Does something to the optimizer at the start of the second epoch, or of its first batch."""

    def __init__(self, change, hook="on_train_epoch_start"):
        self.change = change
        setattr(self, hook, self._do)

    def _do(self, trainer, module, *args):
        if trainer.global_step == 4:
            self.change(trainer, module)


def reset(trainer, module):
    trainer.optimizers[0].__init__(module.parameters(), lr=1.0)


def clear_hooks(trainer, module):
    trainer.optimizers[0]._optimizer_step_pre_hooks.clear()


def clear_post_hooks(trainer, module):
    trainer.optimizers[0]._optimizer_step_post_hooks.clear()


def copy_with_the_same_parameters(trainer, module):
    twin = copy.deepcopy(trainer.optimizers[0])
    for group, present in zip(twin.param_groups, trainer.optimizers[0].param_groups, strict=True):
        group["params"] = present["params"]
    trainer.optimizers = [twin]


def guard():
    return lo.DivergenceGuard(spikes=None, rollback=None, lr_cut=None, health=None)


def configure(supplied):
    return [lo.ConfigureOptimizers("sgd", lr=1.0, schedule="linear", param_groups=[])] if supplied else []


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("supplied", [False, True])
@pytest.mark.parametrize("change", [reset, clear_hooks, clear_post_hooks, copy_with_the_same_parameters])
def test_an_optimizer_that_lost_its_hooks_is_followed_anew(change, supplied, manual, hook):
    model = Moves(manual)
    # The callback that changes it comes behind ours, so that it is seen at the step.
    make_trainer([lo.GradientClipping(LIMIT), *configure(supplied), Changes(change, hook)], max_epochs=2).fit(
        model, batches(4)
    )
    assert len(model.moved) == 8
    assert max(model.moved) < LIMIT * 1.01
    assert min(model.moved) > 0


@pytest.mark.parametrize("change", [reset, clear_hooks])
@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed"])
def test_in_16_bit_too(name, change):
    model = Moves(cls=lo.optim.SGD)
    callbacks = [lo.GradientClipping(LIMIT), Changes(change)]
    make_trainer(callbacks, max_epochs=2, **precision(name)).fit(model, batches(4))
    assert max(model.moved) < LIMIT * 1.01


def test_the_guard_goes_on_with_what_was_reset():
    class Bad(Moves):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step == 6 else loss

    model, watch = Bad(), guard()
    with pytest.warns(UserWarning, match="Step 6 skipped"):
        make_trainer([watch, lo.GradientClipping(LIMIT), Changes(reset)], max_epochs=2).fit(model, batches(4))
    assert watch.skipped_steps == 1
    assert model.moved[6] == 0.0


@pytest.mark.parametrize("supplied", [False, True])
@pytest.mark.parametrize("manual", [False, True])
def test_a_step_that_is_put_in_its_place_ends_the_run(manual, supplied):
    """Also where a schedule asks for skipped steps before the batch ends."""

    def change(trainer, module):
        optimizer = trainer.optimizers[0]

        def step(closure=None, **kwargs):
            loss = None if closure is None else closure()
            with torch.no_grad():
                for param in module.parameters():
                    param -= param.grad
            return loss

        optimizer.step = step

    model = Moves(manual)
    with pytest.raises(RuntimeError, match="its step hooks were not called"):
        make_trainer([lo.GradientClipping(LIMIT), *configure(supplied), Changes(change)], max_epochs=2).fit(
            model, batches(4)
        )
    assert len(model.moved) == 4


@pytest.mark.parametrize("manual", [False, True])
def test_a_deep_copy_that_would_train_nothing_is_refused(manual):
    def change(trainer, module):
        trainer.optimizers = copy.deepcopy(trainer.optimizers)

    model = Moves(manual)
    with pytest.raises(MisconfigurationException, match=r"another SGD, and none of its parameters is one of Moves"):
        make_trainer([lo.GradientClipping(LIMIT), Changes(change)], max_epochs=2).fit(model, batches(4))
    assert len(model.moved) == 4


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def another(lr, **group):
    def change(trainer, module):
        trainer.optimizers = [torch.optim.SGD([{"params": list(module.parameters()), **group}], lr=lr, momentum=0.5)]

    return change


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(
    ("change", "peak"),
    [(another(0.25), 0.5), (another(0.3, initial_lr=0.8), 0.8), (copy_with_the_same_parameters, 1.0)],
    ids=["at its present rate", "with its peak", "a copy"],
)
def test_a_schedule_goes_on_with_the_optimizer_in_the_place_of_its_own(change, peak, manual, hook):
    rates = Rates()
    make_trainer([*configure(True), rates, Changes(change, hook)], max_epochs=2).fit(Moves(manual), batches(4))
    expected = [1 - k / 8 for k in range(1, 5)] + [peak * (1 - k / 8) for k in range(5, 9)]
    assert rates.seen == pytest.approx(expected, abs=1e-9)


def test_that_is_reported_once_and_other_hyperparameters_go_along():
    said, seen = [], []

    class Momentum(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.optimizers[0].param_groups[0]["momentum"])

    supplier = lo.ConfigureOptimizers(
        "sgd", lr=1.0, optimizer_kwargs={"momentum": 0.8}, param_groups=[], schedules={"momentum": "linear"}
    )
    supplier._tell = lambda message, warn: said.append(message)
    make_trainer([supplier, Momentum(), Changes(another(0.25))], max_epochs=2).fit(Moves(), batches(4))
    assert seen == pytest.approx([0.8 * (1 - k / 8) for k in range(1, 5)] + [0.5 * (1 - k / 8) for k in range(5, 9)])
    assert said == [
        "SGD has come in the place of another optimizer: Constant() drives it from step 4 on, from its present "
        "learning rate of 0.25."
    ]


def test_one_without_a_scheduled_hyperparameter_is_refused():
    def change(trainer, module):
        trainer.optimizers = [torch.optim.Adagrad(module.parameters(), lr=0.1)]

    supplier = lo.ConfigureOptimizers(
        "sgd", lr=1.0, optimizer_kwargs={"momentum": 0.8}, param_groups=[], schedules={"momentum": "linear"}
    )
    model = Moves()
    with pytest.raises(ValueError, match=r"Adagrad has no hyperparameter 'momentum' to schedule\. Available"):
        make_trainer([supplier, Changes(change)], max_epochs=2).fit(model, batches(4))
    assert len(model.moved) == 4


def test_a_scheduler_of_torch_that_stays_behind_is_reported():
    step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    supplier = lo.ConfigureOptimizers("sgd", lr=1.0, schedule=step_lr)
    with pytest.warns(UserWarning, match=r"in the place of SGD, which StepLR still sets.*lr_scheduler_configs") as said:
        make_trainer([supplier, Changes(another(0.25))], max_epochs=2).fit(Moves(), batches(4))
    assert len([each for each in said if "StepLR still" in str(each.message)]) == 1


class Keeps(Moves):
    """Steps an optimizer that Lightning does not know."""

    def __init__(self):
        super().__init__(manual=True)
        self.kept = torch.optim.SGD(self.parameters(), lr=1.0)

    def by_hand(self, loss):
        self.kept.zero_grad()
        self.manual_backward(loss)
        self.kept.step()


@pytest.mark.parametrize("protection", [lambda: lo.GradientClipping(LIMIT), guard])
@pytest.mark.parametrize("supplied", [False, True])
def test_an_optimizer_that_lightning_does_not_have_is_refused_before_it_steps(protection, supplied):
    model = Keeps()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MisconfigurationException, match=r"SGD is about to step parameters of Keeps.*Return it from"):
        make_trainer([protection(), *configure(supplied)]).fit(model, batches(4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("callback", [lo.OptimizerMonitor, lambda: configure(True)[0]])
def test_without_protection_it_is_said_once(callback):
    model = Keeps()
    with pytest.warns(UserWarning, match="SGD is about to step parameters of Keeps") as said:
        make_trainer([callback()]).fit(model, batches(4))
    assert len([each for each in said if "about to step" in str(each.message)]) == 1
    assert len(model.moved) == 4


def test_an_optimizer_of_something_else_is_left_alone():
    elsewhere = [nn.Parameter(torch.ones(1))]

    class Also(Moves):
        def by_hand(self, loss):
            super().by_hand(loss)
            elsewhere[0].grad = torch.ones(1)
            other.step()

    other = torch.optim.SGD(elsewhere, lr=0.25)
    make_trainer([lo.GradientClipping(LIMIT)]).fit(Also(manual=True), batches(4))
    assert elsewhere[0].item() == 0.0


class Around(torch.optim.Optimizer):
    """Steps another optimizer inside its own step, as Lookahead does."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("manual", [False, True])
def test_an_optimizer_inside_another_one_is_a_part_of_it(manual):
    def change(trainer, module):
        trainer.optimizers = [Around(torch.optim.SGD(module.parameters(), lr=1.0))]

    for callbacks in ([Changes(change)], [Changes(lambda trainer, module: None)]):
        model = Moves(manual, cls=lambda params, lr: Around(torch.optim.SGD(params, lr=lr)))
        make_trainer([lo.GradientClipping(LIMIT), *callbacks], max_epochs=2).fit(model, batches(4))
        assert len(model.moved) == 8
        assert max(model.moved) < LIMIT * 1.01
        assert min(model.moved) > 0


def test_parameters_of_other_shapes_are_clipped_on():
    class Narrow(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.global_step == 4:
                module.head = nn.Linear(8, 2)
                for group in trainer.optimizers[0].param_groups:
                    group["params"] = list(module.parameters())
            if trainer.global_step == 8:
                with torch.no_grad():
                    module.body.weight.data = module.body.weight.data[:4].clone()
                    module.body.bias.data = module.body.bias.data[:4].clone()
                    module.norm, module.head = nn.LayerNorm(4), nn.Linear(4, 2)
                for group in trainer.optimizers[0].param_groups:
                    group["params"] = list(module.parameters())

    for cls in (torch.optim.SGD, lo.optim.SGD):
        model = Moves(cls=cls)
        make_trainer([lo.GradientClipping(LIMIT), guard(), Narrow()], max_epochs=3).fit(model, batches(4))
        assert len(model.moved) == 12
        assert max(model.moved) < LIMIT * 1.01
        assert min(model.moved) > 0


def test_a_scheduler_that_comes_after_skipped_steps_ends_where_training_ends():
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.nan_batches = set()
                optimizer, scheduler = lo.OptimizerFactory("sgd", lr=1.0, schedule="linear").build(pl_module)
                trainer.optimizers = [optimizer]
                trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(scheduler, interval="step")]

    trainer = make_trainer(
        [lo.ConfigureOptimizers("sgd", lr=1.0, schedule="linear"), lo.DivergenceGuard(), Replaces()], max_epochs=2
    )
    with pytest.warns(UserWarning, match="skipped"):
        trainer.fit(Net(nan_batches=[1, 3]), batches(5))
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.horizon.total_steps == scheduler.last_epoch == 5
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
