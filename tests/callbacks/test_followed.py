"""Optimizers that are replaced, added, reset or wrapped in mid-run, and manual optimization: each one's own steps."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_optim as lo
from lightning_optim.schedules import Linear, Scheduler
from tests.helpers import Net, batches, make_trainer, read_events

LIMIT = 0.1


class Norms:
    """The norm of the gradients that each update of an optimizer has seen."""

    def __init__(self):
        self.seen = []

    def watch(self, optimizer):
        optimizer.register_step_post_hook(self._note)
        return optimizer

    def _note(self, optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append(float(torch.stack([grad.norm() for grad in grads]).norm()))


def _rms(model, **options):
    """An optimizer without operands, whose gradients are clipped in place."""
    return torch.optim.RMSprop(model.parameters(), lr=0.01, **options)


class Own(Net):
    def configure_optimizers(self):
        return self.norms.watch(_rms(self))

    def __init__(self, **options):
        super().__init__(**options)
        self.norms = Norms()


def _setter(trainer, optimizer):
    trainer.optimizers = [optimizer]


def _strategy(trainer, optimizer):
    trainer.strategy.optimizers = [optimizer]


def _set_up_again(trainer, optimizer):
    trainer.lightning_module.configure_optimizers = lambda: optimizer
    trainer.strategy.setup_optimizers(trainer)


def _in_place(trainer, optimizer):
    trainer.optimizers[0] = optimizer


class Swaps(L.Callback):
    """Puts another optimizer in place at the start of an epoch, of a batch, or within one."""

    def __init__(self, how=_setter, where="on_train_epoch_start", make=_rms):
        self.how, self.make = how, make

        def hook(trainer, pl_module, *args):
            first_batch = where != "on_train_epoch_start"
            if trainer.current_epoch == 1 and not hasattr(self, "new") and (not first_batch or trainer.global_step > 3):
                (self.old,) = trainer.optimizers
                self.new = pl_module.norms.watch(self.make(pl_module))
                self.how(trainer, self.new)

        setattr(self, where, hook)


def _parts(tmp_path):
    return [
        lo.GradientClipping(LIMIT),
        lo.DivergenceGuard(report_dir=str(tmp_path)),
        lo.OptimizerMonitor(),
    ]


@pytest.mark.filterwarnings("ignore:Step .* skipped")
@pytest.mark.parametrize("how", [_setter, _strategy, _set_up_again])
def test_an_optimizer_in_the_place_of_another_is_protected_from_its_first_step(how, tmp_path, logger):
    model, parts, swaps = Own(nan_batches=[2]), _parts(tmp_path), Swaps(how)
    ends = []

    class Ends(L.Callback):
        def on_train_end(self, trainer, pl_module):
            ends.extend(parts[0].hub.counts())

    make_trainer([*parts, swaps, Ends()], logger=logger, max_epochs=2).fit(model, batches(4))
    assert swaps.new is not swaps.old
    assert len(model.norms.seen) == 6  # of 8 steps, two were skipped
    assert max(model.norms.seen) <= LIMIT * 1.001
    assert parts[1].skipped_steps == 2
    assert [(count.steps, count.skipped) for count in ends] == [(8, 2)]
    assert [step for step, _ in read_events(logger.log_dir)["optim_grad_norm/total"]] == list(range(8))
    for optimizer in (swaps.old, swaps.new):
        assert not optimizer._optimizer_step_pre_hooks
        assert "step" not in vars(optimizer)


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_before_zero_grad"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_that_comes_in_the_middle_of_a_batch_is_protected_or_refused(where, fused, tmp_path):
    def make(module):
        return torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)

    class Sees(Own):
        def configure_optimizers(self):
            return self.norms.watch(make(self))

    parts, swaps = _parts(tmp_path), Swaps(where=where, make=make)
    model = Sees()
    model.norms.watch = lambda optimizer: optimizer  # gradients are divided in the kernel
    make_trainer([*parts[:2], swaps], max_epochs=2).fit(model, batches(4))
    clipped = parts[0]._kept["lightning_optim"]["counts"]
    assert clipped == [[8, 8, 0]]


def test_a_skip_at_the_first_step_of_one_that_came_within_the_batch_ends_the_run(tmp_path):
    model = Own(nan_batches=[0])
    swaps = Swaps(where="on_train_batch_start")
    with pytest.raises(Exception, match="between two batches"), pytest.warns(UserWarning, match="skipped"):
        make_trainer([*_parts(tmp_path)[:2], swaps], max_epochs=2).fit(model, batches(4))
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_optimizer_that_the_trainer_does_not_have_is_refused_when_it_steps(tmp_path):
    class Manual(Own):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.mine = self.optimizers()
            if batch_idx == 1:
                self.trainer.optimizers = [_rms(self)]
            self.manual_backward(super().training_step(batch, 0))
            self.mine.step()
            self.mine.zero_grad()

    model = Manual()
    with pytest.raises(MisconfigurationException, match="none of the Trainer's optimizers"):
        make_trainer(_parts(tmp_path)).fit(model, batches(4))
    assert len(model.norms.seen) == 2


def test_one_that_is_put_into_the_list_behind_lightnings_back_is_refused(tmp_path):
    # Lightning goes on with the old one, and saves the new one in checkpoints.
    with pytest.raises(MisconfigurationException, match=r"trainer\.optimizers = "):
        make_trainer([*_parts(tmp_path), Swaps(_in_place)], max_epochs=2).fit(Own(), batches(4))


class Wrapper:
    """Not torch's, as some packages have; passes its step on, or does one of its own."""

    def __init__(self, optimizer, steps):
        self.optimizer, self.steps = optimizer, steps
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict
        self.zero_grad = optimizer.zero_grad

    def step(self, closure=None):
        if self.steps:
            return self.optimizer.step(closure)
        return closure()


def test_a_wrapper_that_passes_its_step_on_is_followed(tmp_path):
    model = Own()
    swaps = Swaps(lambda trainer, _: _setter(trainer, Wrapper(trainer.optimizers[0], steps=True)))
    make_trainer([*_parts(tmp_path), swaps], max_epochs=2).fit(model, batches(4))
    assert len(model.norms.seen) == 8
    assert max(model.norms.seen) <= LIMIT * 1.001


def test_a_wrapper_that_steps_by_itself_ends_the_run(tmp_path):
    swaps = Swaps(lambda trainer, _: _setter(trainer, Wrapper(trainer.optimizers[0], steps=False)))
    with pytest.raises(RuntimeError, match="step hooks were not called"):
        make_trainer([*_parts(tmp_path), swaps], max_epochs=2).fit(Own(), batches(4))


def test_something_without_step_hooks_is_refused(tmp_path):
    class Duck(Own):
        def configure_optimizers(self):
            wrapper = Wrapper(_rms(self), steps=True)
            del wrapper.optimizer
            return wrapper

    with pytest.raises(MisconfigurationException, match="no step hooks"):
        make_trainer(_parts(tmp_path)).fit(Duck(), batches(2))


def test_a_scheduler_that_comes_with_a_new_optimizer_ends_where_training_ends():
    class Renews(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.configure_optimizers = lambda: {
                    "optimizer": (optimizer := torch.optim.SGD(pl_module.parameters(), lr=1.0)),
                    "lr_scheduler": {"scheduler": Scheduler(optimizer, Linear()), "interval": "step"},
                }
                trainer.strategy.setup_optimizers(trainer)

        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    make_trainer([Renews(), lo.GradientClipping(LIMIT)], max_epochs=2).fit(Own(), batches(4))
    assert rates[5:] == pytest.approx([0.75, 0.5, 0.25])


def test_the_trial_of_lightnings_finder_in_mid_run_counts_nothing(tmp_path):
    class Finder(L.callbacks.LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    parts = _parts(tmp_path)
    finder = Finder(num_training_steps=3, update_attr=False)
    make_trainer([*parts, finder], max_epochs=2, default_root_dir=tmp_path).fit(Own(), batches(4))
    assert parts[0]._kept["lightning_optim"]["counts"][0][0] == 8


# Manual optimization.


class Gan(Net):
    """Two optimizers: the first steps ``critic_steps`` times per batch, the second in each ``every``-th batch."""

    def __init__(self, critic_steps=1, every=1, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.critic_steps, self.every = critic_steps, every

    def configure_optimizers(self):
        parts = [self.body.parameters(), self.head.parameters()]
        return [torch.optim.SGD(part, lr=0.01) for part in parts], []

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()  # type: ignore[attr-defined]
        for _ in range(self.critic_steps):
            self.manual_backward(super().training_step(batch, batch_idx))
            critic.step()
            self.zero_grad()
        if (batch_idx + 1) % self.every == 0:
            self.manual_backward(super().training_step(batch, batch_idx))
            generator.step()
            self.zero_grad()


@pytest.mark.parametrize(
    ("options", "log_every", "critic", "generator"),
    [
        ({"every": 5}, 1, list(range(12)), [4, 9]),
        ({"every": 5}, 4, [3, 7, 11], [4, 9]),  # never in a batch that is due: at the next step of its own
        ({"critic_steps": 3}, 1, list(range(12)), list(range(12))),
        ({"critic_steps": 3, "every": 4}, 6, [5, 11], [7, 11]),
    ],
)
def test_each_optimizer_is_reported_at_its_own_steps_once_per_batch_due(options, log_every, critic, generator, logger):
    monitor = lo.OptimizerMonitor()
    make_trainer([monitor], logger=logger, log_every_n_steps=log_every).fit(Gan(**options), batches(12))
    events = read_events(logger.log_dir)
    for index, expected in enumerate((critic, generator)):
        assert [step for step, _ in events[f"optim_grad_norm/{index}.total"]] == expected


def test_the_mean_between_reports_is_over_the_optimizers_own_steps(logger):
    class Weighted(Gan):
        """The gradient of the generator's only tensor is the number of the batch, from 1."""

        def configure_optimizers(self):
            first, _ = super().configure_optimizers()[0]
            self.bias = torch.nn.Parameter(torch.zeros(1))
            return [first, torch.optim.SGD([self.bias], lr=0.0)], []

        def training_step(self, batch, batch_idx):
            critic, generator = self.optimizers()  # type: ignore[attr-defined]
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            critic.step()
            if batch_idx % 2:
                self.manual_backward((self.bias * (batch_idx + 1.0)).sum())
                generator.step()
            self.zero_grad()

    parts = [lo.GradientClipping(1e6), lo.OptimizerMonitor()]  # so that each step is measured
    make_trainer(parts, logger=logger, log_every_n_steps=4).fit(Weighted(), batches(8))
    means = read_events(logger.log_dir)["optim_grad_norm/1.interval_mean"]
    assert means == [(3, pytest.approx(3.0)), (7, pytest.approx(7.0))]


@pytest.mark.parametrize("options", [{"critic_steps": 3}, {"critic_steps": 70}, {"every": 3}])
def test_a_skipped_step_of_any_optimizer_is_found_in_its_batch(options, tmp_path):
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), rollback=None, lr_cut=None, stop=False)
    with pytest.warns(UserWarning, match="Step 2 skipped"):
        make_trainer([guard]).fit(Gan(nan_batches=[2], **options), batches(4))
    skips = [entry for entry in guard.report.entries if entry.kind == "nonfinite"]
    assert {entry.step for entry in skips} == {2}
    assert {tuple(entry.batches) for entry in skips if entry.optimizer == 0} == {(2,)}
    if "every" in options:
        assert [entry.batches for entry in skips if entry.optimizer == 1] == [[0, 1, 2]]
