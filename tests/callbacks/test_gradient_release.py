"""GradientRelease in fits: the weights of a usual fit without gradients, its company, resuming, and refusals."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger

import lightning_optim as lo
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.core.stats import StepCounts
from lightning_optim.diagnostics import Histograms
from tests.callbacks.test_members import HOOKS
from tests.helpers import RULES, Net, StatefulLoader, TwoOptimizers, batches, bit_equal, make_trainer

CLIP = {"method": "block_rms", "method_kwargs": {"max_rms": 0.01}}


class Sees(L.Callback):
    """Notes whether there is any gradient when there are most of them, and the counts after each batch."""

    def __init__(self):
        self.kept, self.counts = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.kept.append(any(parameter.grad is not None for parameter in pl_module.parameters()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.kept.append(any(parameter.grad is not None for parameter in pl_module.parameters()))
        release = next((c for c in trainer.callbacks if isinstance(c, (lo.GradientRelease, lo.GradientClipping))), None)
        if release is not None:
            self.counts = release.hub.counts()


def _callbacks(optimizer="adamw", **options):
    return [lo.ConfigureOptimizers(optimizer, lr=0.01, schedule="cosine", warmup="20%", **options)]


def _fit(callbacks, model=None, steps=8, ckpt=None, **options):
    model = Net() if model is None else model
    sees = Sees()
    trainer = make_trainer([*callbacks, sees], max_steps=steps, limit_val_batches=0, **options)
    trainer.fit(model, StatefulLoader(steps, []), ckpt_path=ckpt)
    return trainer, model, sees


@pytest.mark.parametrize("clip", [{}, CLIP], ids=["", "clipped"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fit_has_the_weights_of_a_usual_one_and_no_gradient(optimizer, clip):
    clipping = [lo.GradientClipping(**clip)] if clip else []
    _, model, sees = _fit([*_callbacks(optimizer), *clipping])
    _, ours, without = _fit([*_callbacks(optimizer), *clipping, lo.GradientRelease()])
    assert bit_equal(list(ours.parameters()), list(model.parameters()))
    assert any(sees.kept)
    assert not any(without.kept)
    assert without.counts == sees.counts or not clip
    assert without.counts == [StepCounts(steps=8, clipped=8 if clip else 0)]


def test_groups_and_their_rates_are_as_ever():
    runs = [_fit([*_callbacks(param_groups=RULES), *extra])[1] for extra in ([], [lo.GradientRelease()])]
    assert bit_equal(*(list(model.parameters()) for model in runs))


def test_the_monitor_reports_what_it_reports_of_usual_steps(tmp_path):
    latest = []
    for extra in ([], [lo.GradientRelease()]):
        monitor = lo.OptimizerMonitor(diagnostics=None)
        callbacks = [*_callbacks(), lo.GradientClipping(**CLIP), monitor, *extra]
        _fit(callbacks, logger=CSVLogger(tmp_path / str(len(extra))), log_every_n_steps=2)
        latest.append({k: v for k, v in monitor.latest.items() if "time" not in k and "per_second" not in k})
    assert latest[0].keys() == latest[1].keys()
    assert "optim_grad_norm/total" in latest[0]
    for tag, value in latest[0].items():
        if not tag.startswith("optim_speed") and "throughput" not in tag:
            assert latest[1][tag] == pytest.approx(value, rel=1e-5, nan_ok=True), tag


def test_a_batch_whose_loss_is_nan_changes_nothing_and_holds_the_schedule():
    _, model, sees = _fit([*_callbacks(), lo.GradientRelease()], Net(nan_batches=[3]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sees.counts == [StepCounts(steps=8, skipped=1)]
    _, usual, _ = _fit([*_callbacks(), lo.GradientClipping(max_norm=1e9)], Net(nan_batches=[3]))
    assert bit_equal(list(model.parameters()), list(usual.parameters()))


def test_the_last_norm_is_an_explicit_choice():
    with pytest.raises(ValueError, match="use_last_norm=True"):
        _fit([*_callbacks(), lo.GradientRelease(), lo.GradientClipping(max_norm=0.1)])
    _, _, sees = _fit([*_callbacks(), lo.GradientRelease(use_last_norm=True), lo.GradientClipping(max_norm=0.1)])
    assert sees.counts[0].clipped > 0


def test_resuming_goes_on_bit_for_bit(tmp_path):
    def callbacks():
        clip = lo.GradientClipping(method="update_rms", method_kwargs={"max_rms": 0.5, "patience": 2})
        return [*_callbacks(), clip, lo.GradientRelease()]

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    _, whole, counts = _fit([*callbacks(), Saves()])
    trainer, again, resumed = _fit(callbacks(), Net(seed=1), ckpt=tmp_path / "half.ckpt")
    assert trainer.global_step == 8
    assert bit_equal(list(again.parameters()), list(whole.parameters()))
    assert resumed.counts == counts.counts
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["lightning_optim"]["clip"][0]
    assert state["state"]["flags"].any()


def test_manual_optimization_with_one_optimizer():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.optimizers().zero_grad()

    runs = [_fit([*_callbacks(), *extra], Manual())[1] for extra in ([], [lo.GradientRelease()])]
    assert bit_equal(*(list(model.parameters()) for model in runs))


def test_a_fit_afterwards_keeps_gradients():
    model, callbacks = Net(), _callbacks()
    trainer, *_ = _fit([*callbacks, lo.GradientRelease()], model)
    assert not trainer.optimizers[0]._updates_in_backward
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_subclass_that_overrides_every_hook_without_super_works():
    silent = type("Mine", (lo.GradientRelease,), dict.fromkeys(HOOKS, lambda self, *args, **kwargs: None))
    with pytest.warns(UserWarning, match="of Mine is called when"):
        _, model, sees = _fit([*_callbacks(), silent()])
    _, usual, _ = _fit(_callbacks())
    assert bit_equal(list(model.parameters()), list(usual.parameters()))
    assert not any(sees.kept)


def test_hooks_that_will_see_no_gradient_are_named():
    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            """As one would log norms."""

    with pytest.warns(UserWarning, match=r"`on_before_optimizer_step` of Norms .* finds `grad` None everywhere"):
        _fit([*_callbacks(), lo.GradientRelease(), Norms()])


class Clips(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 1.0, "norm")


class Sgds(TwoOptimizers):
    def __init__(self):
        super().__init__(lo.optim.SGD, lo.optim.SGD)


@pytest.mark.parametrize(
    ("members", "options", "model", "message"),
    [
        ([lo.DivergenceGuard()], {}, Net, "DivergenceGuard decides from all gradients"),
        ([lo.OptimizerMonitor(histograms=Histograms())], {}, Net, r"OptimizerMonitor\(histograms=...\) needs all"),
        ([], {"accumulate_grad_batches": 2}, Net, "accumulate_grad_batches=2 adds up"),
        ([GradientAccumulationScheduler({3: 2})], {}, Net, "GradientAccumulationScheduler adds up"),
        ([], {"gradient_clip_val": 1.0}, Net, r"Trainer\(gradient_clip_val=1.0\) clips after the backward pass"),
        ([], {}, Clips, "Clips.configure_gradient_clipping is called after the backward pass"),
        ([], {"strategy": "ddp", "devices": 1}, Net, "DDPStrategy handles gradients after"),
    ],
)
def test_what_needs_gradients_is_refused_before_the_first_step(members, options, model, message):
    model = model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        _fit([*_callbacks(), lo.GradientRelease(), *members], model, **options)
    assert bit_equal([parameter.detach() for parameter in model.parameters()], before)


def test_accumulation_that_begins_in_mid_run_is_refused():
    class Begins(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.accumulate_grad_batches = 2 if batch_idx == 3 else 1

    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2 adds up"):
        _fit([*_callbacks(), lo.GradientRelease(), Begins()])


def test_several_optimizers_are_refused():
    with pytest.raises(MisconfigurationException, match="There are 2 optimizers"):
        _fit([lo.GradientRelease()], Sgds())


def test_groups_that_are_frozen_for_a_time_are_refused():
    head = lo.ParamGroupRule(name="head", pattern="^head", frozen_until="2 steps")
    with pytest.raises(MisconfigurationException, match="frozen_until"):
        _fit([*_callbacks(param_groups=[head]), lo.GradientRelease()])


def test_a_grad_scaler_is_refused(monkeypatch):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="scales the loss"):
        _fit([*_callbacks(), lo.GradientRelease()], plugins=[plugin])


def test_torchs_optimizers_are_refused():
    with pytest.raises(TypeError, match=r"needed is an optimizer of lightning_optim\.optim"):
        _fit([lo.GradientRelease()])


def test_the_plan_shows_it_and_what_it_refuses():
    def plan(*members, **options):
        trainer = make_trainer([*_callbacks(), lo.GradientRelease(), *members], max_steps=8, **options)
        return make_plan(trainer, Net(), batches(8))

    alone = plan()
    assert alone.facts["Gradients"].startswith("used and dropped in the backward pass")
    assert not alone.conflicts
    assert any("DivergenceGuard decides" in conflict for conflict in plan(lo.DivergenceGuard()).conflicts)
    assert any("use_last_norm=True" in conflict for conflict in plan(lo.GradientClipping()).conflicts)
    assert any("adds up" in conflict for conflict in plan(accumulate_grad_batches=2).conflicts)
