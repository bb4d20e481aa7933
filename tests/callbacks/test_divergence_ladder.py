"""Faults put into real runs, and what the guard makes of them."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_optim as lo
from lightning_optim.divergence import LRCut, Rollback, Spikes
from tests.helpers import (
    ADAMWS,
    PRECISIONS,
    Net,
    Snapshots,
    TwoOptimizers,
    batches,
    bit_equal,
    make_trainer,
    precision,
)


@pytest.fixture(autouse=True)
def _expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step ")
        yield


class Faulty(Net):
    """Its loss is multiplied by something at some batches, counted over the whole run."""

    def __init__(self, factor, seed=0):
        super().__init__(seed=seed)
        self.factor, self.batch = factor, 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.factor(self.batch)
        self.batch += 1
        return loss


QUICK = Spikes(warmup=16, window=32)


def _configure(kind="ours", lr=0.01, **more):
    return lo.ConfigureOptimizers(**ADAMWS[kind], lr=lr, **more)


def _kinds(guard):
    return [entry.kind for entry in guard.report.entries]


def test_the_batches_of_the_first_step_are_known_too():
    guard = lo.DivergenceGuard()
    make_trainer([_configure(), guard], accumulate_grad_batches=4).fit(Net(nan_batches=[0]), batches(8))
    (entry,) = guard.report.entries
    assert (entry.step, entry.batches) == (0, [0, 1, 2, 3])


class Factors(L.Callback):
    """The guard's factor on the learning rate after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        (guard,) = (callback for callback in trainer.callbacks if isinstance(callback, lo.DivergenceGuard))
        self.seen.append(guard.health_points()["lr_cut"])


@pytest.mark.parametrize("lasting", [True, False])
def test_weights_that_are_worse_are_rolled_back_and_data_that_are_different_are_not_rolled_back_twice(lasting):
    class Changes(Faulty):
        """Three times the loss from step 60 on: of other data, or until the weights are those of before."""

        def training_step(self, batch, batch_idx):
            spoilt = self.batch >= 60 and (lasting or not guard.rollback_count)
            loss = super().training_step(batch, batch_idx)
            return loss * 3 if spoilt else loss

    guard = lo.DivergenceGuard(QUICK, rollback=Rollback(every=20, clean=10), judge_loss=True)
    trainer = make_trainer([_configure(lr=1e-4), guard, factors := Factors()])
    trainer.fit(Changes(lambda k: 1.0), batches(200, batch_size=1024))
    did, *undone = [entry for entry in guard.report.entries if entry.kind == "did"]
    assert did.text.startswith("back to the state after step 39")
    assert did.step < 80
    assert [entry.text.split(",")[0] for entry in undone] == ["the learning rate is what it was before"] * lasting
    assert min(factors.seen) == 0.5
    assert factors.seen[-1] == (1.0 if lasting else 0.5)
    told = [entry.text for entry in guard.report.entries if entry.kind == "new_level"]
    assert any("with the weights of the snapshot" in text for text in told) is lasting
    assert max(entry.step for entry in guard.report.entries if entry.kind != "lr_too_low") < 110


def test_a_cut_is_taken_back_when_its_level_turns_out_to_be_that_of_the_data():
    class Rises(Faulty):
        """1.8 times the loss from step 60 on, reached within 12 steps, so that at first it is no level."""

    guard, factors = lo.DivergenceGuard(QUICK, rollback=None, judge_loss=True), Factors()
    model = Rises(lambda k: min(1.8, 1 + max(0, k - 60) / 15))
    make_trainer([_configure(lr=1e-4), guard, factors]).fit(model, batches(200, batch_size=1024))
    did = [(entry.step, entry.text.split(",")[0]) for entry in guard.report.entries if entry.kind == "did"]
    assert [text for _, text in did] == [
        "learning rate times 0.5 for 100 steps",
        "the learning rate is what it was before",
    ]
    assert did[1][0] < did[0][0] + 60
    assert factors.seen[did[0][0] :].count(0.5) == did[1][0] - did[0][0]
    assert factors.seen[-1] == 1.0
    assert guard.ladder.used == {"lr_cut": 0, "rollback": 0}


def test_a_cut_for_bad_batches_stays_when_the_data_changes_and_is_no_sign_of_an_unstable_run():
    guard, factors = lo.DivergenceGuard(QUICK, lr_cut=LRCut(0.5, steps=60), rollback=None), Factors()
    model = Faulty(lambda k: float("nan") if 40 <= k < 45 else 3.0 if k >= 60 else 1.0)
    make_trainer([_configure(lr=1e-4), guard, factors]).fit(model, batches(120, batch_size=1024))
    assert [entry.text for entry in guard.report.entries if entry.kind == "did"] == [
        "learning rate times 0.5 for 60 steps"
    ]
    assert "new_level" in _kinds(guard)
    assert factors.seen[45:100] == [0.5] * 55


@pytest.mark.parametrize(("judge_loss", "acts"), [(None, False), (True, True), (False, False)])
def test_losses_of_several_optimizers_are_watched_and_not_judged(judge_loss, acts):
    """One loss ten times as high at one step, three times as high from another one on, and then NaN."""

    def factor(index, batch_idx):
        spike = 10.0 if batch_idx == 40 else 3.0 if batch_idx >= 60 else 1.0
        return float("nan") if batch_idx == 120 else spike if index == 1 else 1.0

    make = partial(torch.optim.Adam, lr=1e-5)
    guard = lo.DivergenceGuard(QUICK, health=None, judge_loss=judge_loss)
    make_trainer([guard]).fit(TwoOptimizers(make, make, factor=factor), batches(125, batch_size=512))
    assert [e.step for e in guard.report.entries if e.kind == "spike"][:2] == [40, 60]
    assert any(e.kind == "did" for e in guard.report.entries) is acts
    assert {e.step for e in guard.report.entries if e.kind == "nonfinite"} == {120}
    if acts:
        assert guard.skipped_steps > 2
    else:  # the NaN, which both gradients have
        assert guard.skipped_steps == 2
        assert "new_level" in _kinds(guard)


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("memory", ["device", "cpu", "disk"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_rollback_is_bit_equal_to_the_snapshot_and_so_is_the_second(kind, memory, name):
    bad = {*range(20, 25), *range(30, 35)}
    guard = lo.DivergenceGuard(
        lr_cut=None, rollback=Rollback(every=12, clean=4, memory=memory, lr_factor=1.0, budget=2), cooldown=1
    )
    model, snapshots = Faulty(lambda k: float("nan") if k in bad else 1.0), Snapshots()
    parts = [guard, snapshots, _configure(kind, schedule="cosine", warmup=3), lo.GradientClipping(method="zclip")]
    trainer = make_trainer(parts, **precision(name))
    trainer.fit(model, batches(40))
    did = [(entry.step, entry.text) for entry in guard.report.entries if entry.kind == "did"]
    assert [step for step, _ in did] == [24, 34]
    assert guard.rollback_count == 2
    for step, text in did:
        (back,) = re.findall(r"back to the state after step (\d+)", text)
        assert int(back) in (11, 23)
        assert bit_equal(snapshots.after[int(back)], snapshots.after[step])
    assert trainer.global_step == 40
    assert all(p.isfinite().all() for p in model.parameters())


def test_when_all_budgets_are_used_up_training_stops_with_the_reason(tmp_path):
    guard = lo.DivergenceGuard(
        lr_cut=LRCut(budget=1), rollback=Rollback(budget=1), cooldown=1, report_dir=str(tmp_path / "told")
    )
    trainer = make_trainer([_configure(), guard])
    trainer.fit(Faulty(lambda k: float("nan") if k >= 10 else 1.0), batches(60))
    assert trainer.global_step == 25
    told = json.loads((tmp_path / "told" / "divergence_report.json").read_text())
    assert told["entries"][-1]["text"].startswith(
        "training is stopped, because all other responses are used up (lr_cut: 1"
    )
    assert len(told["last_steps"]) == 25
    assert told["last_steps"][-1]["values"]["loss"] is None
    text = (tmp_path / "told" / "divergence_report.md").read_text()
    assert "| 14 | 0 | 14 | did | learning rate times 0.5 for 100 steps |" in text
    assert "## What to change" in text


def test_the_report_is_beside_the_checkpoints_and_in_tensorboard(logger, tmp_path):
    guard = lo.DivergenceGuard(save_batches=True)
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
    trainer = make_trainer([_configure(), guard, checkpoints], logger=logger, enable_checkpointing=True)
    trainer.fit(Faulty(lambda k: float("nan") if k == 3 else 1.0), batches(6))
    assert (tmp_path / "checkpoints" / "divergence_report.md").exists()
    accumulator = EventAccumulator(logger.log_dir)
    accumulator.Reload()
    assert "optim_health/divergence/text_summary" in accumulator.Tags()["tensors"]
    ((x, _),) = torch.load(tmp_path / "checkpoints" / "divergence_batches" / "step3_rank0.pt")
    assert torch.equal(x, list(batches(6))[3][0])


def test_a_healthy_run_writes_nothing(tmp_path):
    make_trainer([_configure(), lo.DivergenceGuard(report_dir=str(tmp_path / "none"))]).fit(Net(), batches(20))
    assert not (tmp_path / "none").exists()


def test_a_cut_of_the_rate_stays_and_returns_and_no_schedule_minds():
    class Rates(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.rows = []
            trainer.optimizers[0].register_step_post_hook(lambda o, *_: self.rows.append(o.param_groups[0]["lr"]))

    class Own(Faulty):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9, fused=True)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5**0.1), "interval": "step"}
            ]

    guard = lo.DivergenceGuard(lr_cut=LRCut(0.25, steps=4, recover=1), rollback=None, patience=2, cooldown=0)
    rates = Rates()
    trainer = make_trainer([rates, guard])
    model = Own(lambda k: float("nan") if k in (3, 4) else 0.01)
    # `rates` hangs on the optimizer before the guard, and so sees the rates as the step uses them.
    trainer.fit(model, batches(14))
    factors = [rate / 0.5 ** (0.1 * k) for k, rate in enumerate(rates.rows)]
    assert factors == pytest.approx([1.0] * 5 + [0.25] * 4 + [0.5] + [1.0] * 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**1.4)


def test_two_optimizers_are_guarded_apart():
    make = partial(torch.optim.Adam, lr=1e-3)
    model = TwoOptimizers(make, make, factor=lambda index, batch_idx: 50.0 if (index, batch_idx) == (1, 40) else 1.0)
    guard = lo.DivergenceGuard(QUICK, health=None)
    make_trainer([guard]).fit(model, batches(60, batch_size=32))
    (entry,) = guard.report.entries
    assert (entry.kind, entry.step, entry.optimizer) == ("spike", 40, 1)
    assert set(entry.names) <= {"head.weight", "head.bias", "body.weight", "body.bias", "norm.weight", "norm.bias"}
    assert entry.names[0].startswith("head")


@pytest.mark.parametrize("kind", ADAMWS)
def test_overflows_while_the_scaler_finds_its_scale_are_counted_and_enter_nothing(kind):
    guard = lo.DivergenceGuard(QUICK)
    seen = []

    class Windows(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            (watch,) = trainer.callbacks[0].hub.pipelines[0].detectors
            seen.append(watch.spikes.state_dict())

    trainer = make_trainer([guard, _configure(kind), Windows()], **precision("16-mixed", init_scale=2.0**30))
    trainer.fit(Net(), batches(40, batch_size=32))
    overflows = guard.overflow_steps
    assert overflows > 3
    assert guard.skipped_steps == overflows
    assert guard.report.entries == []
    assert seen[overflows - 1]["accepted"] == [[], []]
    assert [len(values) for values in seen[-1]["accepted"]] == [40 - overflows] * 2


def test_a_loss_that_is_not_finite_is_reported_under_a_scaler_as_well():
    guard = lo.DivergenceGuard()
    make_trainer([guard, _configure()], **precision("16-mixed")).fit(
        Faulty(lambda k: float("nan") if k == 3 else 1.0), batches(6)
    )
    assert [(entry.step, entry.kind) for entry in guard.report.entries] == [(3, "nonfinite")]
    assert guard.overflow_steps == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LRCut(factor=1.5), "factor=1.5 of LRCut.*for instance 0.5"),
        (lambda: LRCut(budget=0), "budget=0 of LRCut"),
        (lambda: Rollback(memory="gpu"), "memory='gpu' of Rollback: must be 'auto', 'device', 'cpu' or 'disk'"),
        (lambda: Rollback(lr_factor=0), "lr_factor=0 of Rollback"),
        (lambda: Rollback(checkpoint_mb=-1), "checkpoint_mb=-1 of Rollback: must be a number of megabytes"),
        (lambda: Rollback(checkpoint_mb=float("nan")), "checkpoint_mb=nan of Rollback"),
        (lambda: Rollback(checkpoint_mb=True), "checkpoint_mb=True of Rollback"),
        (lambda: Spikes(threshold=-1), "threshold=-1"),
        (lambda: lo.DivergenceGuard(patience=0), "patience=0"),
        (lambda: lo.DivergenceGuard(cooldown=-1), "cooldown=-1 of the ladder"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
