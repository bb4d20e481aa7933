from __future__ import annotations

import math
import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch

import lightning_optim as lo
from lightning_optim.divergence import Detector
from tests.helpers import (
    ADAMWS,
    SGDS,
    Net,
    NetWith,
    Recorder,
    Snapshots,
    TwoOptimizers,
    batches,
    bit_equal,
    make_trainer,
    precision,
    read_events,
)


@pytest.fixture(autouse=True)
def _expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where reports go
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step .* skipped")
        yield


def _configure(optimizer=ADAMWS["ours"]):
    return lo.ConfigureOptimizers(**optimizer, lr=0.01, schedule="cosine", warmup=3)


KINDS = pytest.mark.parametrize("kind", ADAMWS)


@KINDS
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("clipped", "bad"), [(True, 0), (False, 0), (True, 5)])
@pytest.mark.parametrize("table", [ADAMWS, SGDS], ids=["adamw", "sgd"])
def test_a_bad_batch_changes_nothing_and_training_continues(logger, table, kind, name, clipped, bad):
    model, guard, snapshots, recorder = Net(nan_batches=[bad]), lo.DivergenceGuard(), Snapshots(), Recorder()
    parts = [_configure(table[kind]), guard, lo.OptimizerMonitor(), snapshots, recorder]
    parts += [lo.GradientClipping(0.5)] if clipped else []
    make_trainer(parts, logger=logger, **precision(name)).fit(model, batches(12))
    assert guard.skipped_steps == 1
    for step in range(12):
        before, after = snapshots.before[step], snapshots.after[step]
        assert bit_equal(before["parameters"], after["parameters"]) is (step == bad), step
        assert bit_equal(before["schedulers"], after["schedulers"]) is (step == bad), step
        if step != bad or bad > 0:  # the first step makes the moments, of zeros
            assert bit_equal(before["optimizers"], after["optimizers"]) is (step == bad), step
    states = snapshots.after[-1]["optimizers"][0]["state"].values()
    assert all(float(state["step"]) == 11 for state in states if "step" in state)
    assert [state["last_epoch"] for state in snapshots.after[-1]["schedulers"]] == [11]
    events = read_events(logger.log_dir)
    assert [value for step, value in events["optim_health/skipped_steps"] if step < bad] == [0.0] * bad
    assert {value for step, value in events["optim_health/skipped_steps"] if step >= bad} == {1.0}


@KINDS
@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
@pytest.mark.parametrize("bad", [0, 4])
def test_the_run_is_the_one_that_never_saw_the_bad_batch(kind, name, bad):
    class SkipsBatches(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in self.nan_batches else super().training_step(batch, batch_idx)

    def fit(model):
        recorder = Recorder()
        # One rate throughout: Lightning moves the schedule of a step that the module itself leaves out.
        configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01)
        make_trainer([configure, lo.DivergenceGuard(), recorder], **precision(name)).fit(model, batches(8))
        return recorder.weights

    guarded, reference = fit(Net(nan_batches=[bad])), fit(SkipsBatches(nan_batches=[bad]))
    if name == "32-true":
        assert bit_equal(guarded, reference)
    else:  # the scaler lowers its scale
        torch.testing.assert_close(guarded, reference, rtol=1e-2, atol=1e-3)


@KINDS
def test_the_schedule_stands_still_on_skipped_steps(kind):
    recorder = Recorder()
    make_trainer([_configure(ADAMWS[kind]), lo.DivergenceGuard(), recorder]).fit(
        Net(nan_batches=[1, 2, 6]), batches(10)
    )
    peak = [0.01 * (k + 1) / 3 if k < 3 else 0.01 * (1 + math.cos(math.pi * (k - 3) / 7)) / 2 for k in range(10)]
    # An update that is left out in the kernel still passes torch's hooks; one whose call is left out does not.
    happened = [0, 1, 1, 1, 2, 3, 4, 4, 5, 6] if kind != "torch" else range(7)
    assert [rates[0] for rates in recorder.rates] == pytest.approx([peak[k] for k in happened])


def test_each_skip_is_warned_about_with_its_step():
    with pytest.warns(UserWarning, match=r"Step 2 skipped.*1 skipped so far") as caught:
        make_trainer([_configure(), lo.DivergenceGuard()]).fit(Net(nan_batches=[2, 4]), batches(6))
    told = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert len(told) == 2
    assert "Step 4 skipped" in told[1]


def test_it_needs_no_logger_and_no_other_callback():
    model = NetWith(lambda module: torch.optim.RMSprop(module.parameters(), lr=0.01, momentum=0.9), nan_batches=[0, 3])
    guard = lo.DivergenceGuard()
    make_trainer([guard]).fit(model, batches(6))
    assert guard.skipped_steps == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_it_the_same_batch_ruins_the_model():
    model = Net(nan_batches=[3])
    make_trainer([_configure(), lo.OptimizerMonitor()]).fit(model, batches(6))
    assert all(p.isnan().all() for p in model.parameters())


@KINDS
def test_overflows_of_the_scaler_count_and_hold_the_schedule_without_a_guard(kind):
    snapshots, recorder = Snapshots(), Recorder()
    model = Net(nan_batches=[0, 4])
    make_trainer([_configure(ADAMWS[kind]), snapshots, recorder], **precision("16-mixed")).fit(model, batches(8))
    assert [state["last_epoch"] for state in snapshots.after[-1]["schedulers"]] == [6]
    assert all(p.isfinite().all() for p in model.parameters())


def test_only_the_optimizer_with_bad_gradients_is_skipped():
    model = TwoOptimizers(
        partial(torch.optim.AdamW, lr=0.01, fused=True),
        partial(torch.optim.AdamW, lr=0.01),
        factor=lambda index, batch_idx: float("nan") if (index, batch_idx) == (1, 2) else 1.0,
    )
    guard, snapshots = lo.DivergenceGuard(), Snapshots()
    make_trainer([guard, snapshots]).fit(model, batches(4))
    assert guard.skipped_steps == 1
    before, after = snapshots.before[2]["parameters"], snapshots.after[2]["parameters"]
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["body.weight"], after["body.weight"])


def test_a_skip_at_the_last_step_of_an_epoch_does_not_end_training():
    class Count(L.Callback):
        epochs = 0

        def on_train_epoch_end(self, trainer, pl_module):
            self.epochs += 1

    count, guard = Count(), lo.DivergenceGuard()
    trainer = make_trainer([_configure(), guard, count], max_epochs=3)
    trainer.fit(Net(nan_batches=[3]), batches(4))
    assert (count.epochs, guard.skipped_steps, trainer.global_step) == (3, 3, 12)


class EveryThird(Detector):
    """Of each three steps the last; counts those that happened."""

    reason = "it is a third step"

    def __init__(self):
        self.seen, self.taken = 0, 0

    def __call__(self, stats):
        self.seen += 1
        return torch.tensor(self.seen % 3 == 0)

    def commit(self, skip):
        self.taken += int(skip == 0)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class GuardWithADetector(lo.DivergenceGuard):
    def detectors(self):
        return (*super().detectors(), EveryThird())


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        (lambda: lo.DivergenceGuard(detectors=[EveryThird()]), "every_third: it is a third step"),
        (GuardWithADetector, "another detector of the step requested it"),
    ],
)
def test_a_users_detector_skips_steps_and_each_is_reported(guard, said):
    guard, snapshots = guard(), Snapshots()
    with pytest.warns(UserWarning, match=said) as told:
        make_trainer([_configure(), guard, snapshots]).fit(Net(), batches(9))
    assert guard.skipped_steps == 3
    skipped = [step for step in range(9) if bit_equal(snapshots.before[step], snapshots.after[step])]
    assert skipped == [2, 5, 8]
    assert len([w for w in told if "skipped" in str(w.message)]) == 3
    assert [entry.kind for entry in guard.report.entries] == ["detected"] * 3


def test_a_detector_continues_from_a_checkpoint(tmp_path):
    def fit(steps, **options):
        guard, snapshots = lo.DivergenceGuard(detectors=[EveryThird()]), Snapshots()
        trainer = make_trainer([guard, snapshots], max_steps=steps)
        trainer.fit(Net(), batches(9), **options)
        return trainer, snapshots

    fit(4)[0].save_checkpoint(tmp_path / "four.ckpt")
    _, snapshots = fit(9, ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    same = [step for step in range(5) if bit_equal(snapshots.before[step], snapshots.after[step])]
    assert same == [1, 4]  # steps 5 and 8 of the whole run


def test_a_rollback_takes_a_detector_back_too():
    class RollsBack(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                (detector,) = guard._guarded[0].watch.detectors
                before = dict(detector.state_dict())
                guard._snapshots.restore()
                counts.extend([before, detector.state_dict()])

    guard, counts = lo.DivergenceGuard(detectors=[EveryThird()]), []
    make_trainer([guard, RollsBack()]).fit(Net(), batches(5))
    assert counts[0] != counts[1]
    assert counts[1] == EveryThird().state_dict()  # that of the first snapshot, before training


def test_what_is_no_detector_is_refused():
    with pytest.raises(TypeError, match=r"must be an instance of lightning_optim\.divergence\.Detector"):
        lo.DivergenceGuard(detectors=[len])
    with pytest.raises(ValueError, match=r"Unknown detector .non_finite.\. Did you mean .non_finite_gradient."):
        lo.DivergenceGuard(detectors=["non_finite"])
