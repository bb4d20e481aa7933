"""The hub: what several callbacks of one Trainer share, and what a fit leaves behind."""

from __future__ import annotations

import gc
import itertools
import signal
import weakref
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_optim as lo
from lightning_optim.callbacks._hub import Hub
from lightning_optim.diagnostics import Diagnostic
from lightning_optim.schedules import Cosine, Linear, Scheduler
from tests.helpers import (
    ADAMWS,
    BareNet,
    Net,
    NetWith,
    Recorder,
    batches,
    bit_equal,
    count_reads,
    make_trainer,
    precision,
    read_events,
)


def _all(**options):
    return [
        lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine", warmup=2, **options),
        lo.GradientClipping(0.5),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
    ]


@pytest.mark.filterwarnings("ignore:Step .* skipped")
def test_the_order_of_the_callbacks_does_not_matter(tmp_path):
    results = []
    for index, order in enumerate(itertools.permutations(range(4))):
        parts = _all()
        model = Net(nan_batches=[2])
        logger = L.loggers.TensorBoardLogger(tmp_path, name="run", version=str(index))
        trainer = make_trainer([parts[i] for i in order], logger=logger)
        trainer.fit(model, batches(5))
        events = read_events(logger.log_dir)
        last = {
            tag: points[-1]
            for tag, points in events.items()
            if tag.startswith("optim_") and not tag.startswith("optim_speed/")  # the clock's, and never the same
        }
        results.append((dict(model.state_dict()), trainer.optimizers[0].state_dict(), last))
    assert all(bit_equal(results[0], result) for result in results[1:])


def test_the_gradients_are_read_once_per_step(monkeypatch, logger):
    reads = count_reads(monkeypatch)
    make_trainer(_all(), logger=logger, log_every_n_steps=3).fit(Net(), batches(6))
    assert reads == [6] * 6


@pytest.mark.parametrize("of_the_instance", [False, True])
def test_a_member_is_asked_once_in_a_batch_for_its_report(of_the_instance):
    asked, reports = [], []

    def report_due(trainer):
        asked.append(trainer.fit_loop.batch_idx)
        return trainer.fit_loop.batch_idx % 2 == 1

    class Reports(lo.GradientClipping):
        def report_due(self, trainer):
            return report_due(trainer)

        def on_report(self, trainer, optimizer_index, record):
            reports.append(record.steps)

    class Late(lo.GradientClipping):
        on_report = Reports.on_report

    member = Late() if of_the_instance else Reports()
    if of_the_instance:
        member.report_due = report_due
    make_trainer([member]).fit(Net(), batches(5))
    assert asked == [0, 1, 2, 3, 4]
    assert reports == [2, 4]


# Two owners of one thing.


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lo.ConfigureOptimizers("sgd", lr=0.1), lo.ConfigureOptimizers("adamw", lr=0.2)),
        (lo.GradientClipping(1.0), lo.GradientClipping(2.0)),
    ],
    ids=["configure", "clipping"],
)
@pytest.mark.parametrize("between", [False, True])
def test_two_of_a_kind_are_refused_before_the_first_step_and_both_are_named(one, two, between):
    model, recorder = Net(), Recorder()
    parts = [recorder, one, *([lo.DivergenceGuard()] if between else []), two]
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer(parts).fit(model, batches(4))
    assert repr(one) in str(caught.value)
    assert repr(two) in str(caught.value)
    assert recorder.rates == []
    assert "configure_optimizers" not in vars(model)


@pytest.mark.parametrize("cls", [lo.DivergenceGuard, lo.OptimizerMonitor, lo.RunSummary])
def test_two_of_any_other_kind_are_refused_too(cls):
    with pytest.raises(MisconfigurationException, match=f"Two {cls.__name__}"):
        make_trainer([cls(), cls()]).fit(Net(), batches(4))


def _scheduled(*makes):
    """A module whose optimizer has several schedulers, made by ``makes`` from it."""

    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"} for make in makes]

    return NetWith(configure)


@pytest.mark.parametrize("ours_first", [True, False])
def test_two_schedules_of_one_optimizer_are_refused_before_the_first_step_and_both_are_named(ours_first):
    makes = [partial(Scheduler, schedule=Cosine()), partial(torch.optim.lr_scheduler.StepLR, step_size=1)]
    model, recorder = _scheduled(*makes[:: 1 if ours_first else -1]), Recorder()
    with pytest.raises(MisconfigurationException, match="Two schedules") as caught:
        make_trainer([lo.DivergenceGuard(), recorder]).fit(model, batches(4))
    assert "Cosine(" in str(caught.value)
    assert "StepLR" in str(caught.value)
    assert recorder.rates == []


def test_two_of_our_schedules_are_refused():
    model = _scheduled(partial(Scheduler, schedule=Cosine()), partial(Scheduler, schedule=Linear()))
    with pytest.raises(MisconfigurationException, match=r"Cosine\(.*Linear\("):
        make_trainer([lo.GradientClipping()]).fit(model, batches(4))


def test_schedules_of_others_are_left_to_them():
    model = _scheduled(torch.optim.lr_scheduler.ConstantLR, partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9))
    recorder = Recorder()
    trainer = make_trainer([lo.GradientClipping(), recorder])
    trainer.fit(model, batches(4))
    constant, exponential = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert (constant.last_epoch, exponential.last_epoch) == (4, 4)
    # ConstantLR takes a third until its fifth step; the other multiplies on top of it.
    rates = [0.1 / 3 * 0.9**step for step in range(4)]
    assert [row[0] for row in recorder.rates] == pytest.approx(rates)


# What a fit leaves behind, however it ends.


class Fails(Net):
    """Raises in the middle of an epoch, while ``error`` is set, at one of the places where a user's code runs."""

    def __init__(self):
        super().__init__()
        self.error, self.where = None, ""

    def _maybe(self, place, batch_idx):
        if self.error is not None and place == self.where and batch_idx == 2:
            raise self.error("mine")

    def training_step(self, batch, batch_idx):
        self._maybe("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._maybe("validation_step", 2)
        return super().validation_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._maybe("on_train_batch_end", batch_idx)

    def on_fit_start(self):
        self._maybe("on_fit_start", 2)

    def on_train_start(self):
        self._maybe("on_train_start", 2)


PLACES = ["on_fit_start", "on_train_start", "training_step", "on_train_batch_end", "validation_step"]
ERRORS = [RuntimeError, KeyboardInterrupt]


def _interrupted_fit(model, callbacks, error, where, **options):
    """Fits until the error; gives the Trainer and its optimizers."""
    model.error, model.where = error, where
    trainer = make_trainer(callbacks, **options)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(model, batches(6), batches(1))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further Ctrl-C for good
        model.error = None
    return trainer


def _assert_clean(model, before, optimizers, callbacks):
    assert set(vars(model)) - before <= {"_hparams", "_trainer", "_fabric"}
    assert "configure_optimizers" not in vars(model)
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks.keys() - _factory_hooks(optimizer)
        assert not optimizer._optimizer_step_post_hooks
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        assert not hasattr(vars(optimizer).get("step"), "__wrapped__") or vars(optimizer)["step"]._wrapped_by_lr_sched
    assert all(callback._hub is None for callback in callbacks)


def _factory_hooks(optimizer):
    # The scheduler leaves one on its optimizer, which asks for the length of the run.
    return {
        key
        for key, hook in optimizer._optimizer_step_pre_hooks.items()
        if "FollowsRun._before_step" in hook.__qualname__
    }


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", PLACES)
def test_an_interrupted_fit_leaves_no_trace(error, where, logger):
    model, callbacks = Fails(), _all()
    before = set(vars(model))
    trainer = _interrupted_fit(model, callbacks, error, where, logger=logger)
    _assert_clean(model, before, trainer.optimizers, callbacks)
    assert not any(isinstance(callback, Hub) for callback in trainer.callbacks)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("same_callbacks", [True, False])
def test_fitting_again_with_the_callbacks_is_a_first_fit(error, where, same_callbacks, logger):
    model, callbacks = Fails(), _all()
    _interrupted_fit(model, callbacks, error, where)
    model.load_state_dict(Fails().state_dict())
    make_trainer(callbacks if same_callbacks else _all(), logger=logger).fit(model, batches(6))
    reference = Fails()
    make_trainer(_all()).fit(reference, batches(6))
    assert bit_equal(dict(model.state_dict()), dict(reference.state_dict()))
    norms = read_events(logger.log_dir)["optim_grad_norm_clipped/total"]
    assert [step for step, _ in norms] == list(range(6))
    assert max(value for _, value in norms) <= 0.5 + 1e-6


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", PLACES)
def test_fitting_again_without_the_callbacks_is_plain_lightning(error, where):
    class Own(Fails):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.7)

    model = Own()
    _interrupted_fit(model, _all(), error, where)
    model.load_state_dict(Own().state_dict())
    trainer = make_trainer()
    trainer.fit(model, batches(6))
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    reference = Own()
    make_trainer().fit(reference, batches(6))
    assert bit_equal(dict(model.state_dict()), dict(reference.state_dict()))


@pytest.mark.parametrize("error", ERRORS)
def test_the_same_trainer_can_fit_again_after_an_error(error):
    model, callbacks = Fails(), _all()
    trainer = _interrupted_fit(model, callbacks, error, "training_step")
    trainer.fit(model, batches(6))
    assert callbacks[0]._hub is None
    assert all(p.isfinite().all() for p in model.parameters())


# Not fused ones in 16-mixed: an exception there leaves behind what the GradScaler itself sets on the optimizer.
@pytest.mark.parametrize(("kind", "name"), [*((kind, "32-true") for kind in ADAMWS), ("torch", "16-mixed")])
def test_a_diagnostic_that_fails_leaves_no_trace(name, kind, logger):
    class Failing(Diagnostic):
        name = "failing"

        def compute(self, record):
            raise RuntimeError("mine")

    model = Net(nan_batches=[0])
    before = set(vars(model))
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.1)
    parts = [configure, lo.GradientClipping(0.5), lo.OptimizerMonitor([Failing()])]
    trainer = make_trainer(parts, logger=logger, **precision(name))
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(model, batches(4))
    _assert_clean(model, before, trainer.optimizers, parts)


def test_many_fits_do_not_pile_up_hooks():
    class Own(Net):
        """Keeps its optimizer from fit to fit."""

        def configure_optimizers(self):
            if not hasattr(self, "kept"):
                self.kept = [torch.optim.RMSprop(self.parameters(), lr=0.1)]
            return self.kept[0]

    model = Own()
    for _ in range(3):
        make_trainer([lo.GradientClipping(0.5), lo.DivergenceGuard(), lo.OptimizerMonitor()]).fit(model, batches(2))
        (optimizer,) = model.kept
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert "step" not in vars(optimizer)


def test_an_optimizer_kept_from_an_interrupted_fit_is_not_clipped_any_more():
    class Own(Fails):
        def configure_optimizers(self):
            if not hasattr(self, "kept"):
                self.kept = [torch.optim.SGD(self.parameters(), lr=1.0)]
            return self.kept[0]

    model = Own()
    _interrupted_fit(model, [lo.GradientClipping(1e-6), lo.DivergenceGuard()], RuntimeError, "training_step")
    (optimizer,) = model.kept
    weight = model.head.bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(weight - model.head.bias.detach(), torch.ones(2))


def test_a_module_keeps_what_was_attached_by_hand():
    model, configure = BareNet(), lo.ConfigureOptimizers("sgd", lr=0.1)
    lo.attach(model, configure)
    attached = vars(model)["configure_optimizers"]
    for callbacks in ([configure], [configure], []):
        trainer = make_trainer(callbacks)
        trainer.fit(model, batches(2))
        assert vars(model)["configure_optimizers"] is attached
        assert type(trainer.optimizers[0]) is lo.optim.SGD
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_hub_does_not_keep_its_trainer_alive():
    trainer = make_trainer(_all())
    trainer.fit(Net(), batches(2))
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None


# Strategies and modules that cannot be served.


def test_lbfgs_is_refused_before_the_first_step():
    model = NetWith(lambda module: torch.optim.LBFGS(module.parameters()))
    with pytest.raises(TypeError, match="LBFGS"):
        make_trainer([lo.GradientClipping()]).fit(model, batches(2))


def test_a_module_that_returns_no_loss_now_and_then_is_served(logger):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    guard = lo.DivergenceGuard()
    make_trainer([lo.GradientClipping(0.5), guard, lo.OptimizerMonitor()], logger=logger).fit(Sometimes(), batches(6))
    assert guard.skipped_steps == 0
    assert [step for step, _ in read_events(logger.log_dir)["optim_grad_norm/total"]] == [0, 2, 4]


def test_embeddings_with_sparse_gradients_are_served(logger):
    class Sparse(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 3, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.embed(torch.tensor([1, 1, batch_idx])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.parameters(), lr=0.1)

    parts = [lo.GradientClipping(0.5), lo.DivergenceGuard(), lo.OptimizerMonitor()]
    make_trainer(parts, logger=logger).fit(Sparse(), batches(4))
    norms = [value for _, value in read_events(logger.log_dir)["optim_grad_norm_clipped/total"]]
    assert norms == pytest.approx([0.5] * 4, rel=1e-4)
