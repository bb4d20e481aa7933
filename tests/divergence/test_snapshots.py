"""Two snapshots, of which one has still to prove itself; and everything of a run that they bring back."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
from torch import nn

import lightning_optim as lo
from lightning_optim.divergence import Rollback
from lightning_optim.divergence.snapshots import SnapshotPair, Tensors
from tests.helpers import ADAMWS, Net, batches, bit_equal, make_trainer, precision


@pytest.fixture
def pair():
    weight = nn.Linear(1, 1)
    parts = [Tensors(lambda: [weight])]
    pair = SnapshotPair("cpu", clean=4)
    pair.capture_first(parts, 0)
    pair.capture(parts, 10)
    return pair


def test_a_snapshot_is_good_after_a_clean_stretch(pair):
    pair.confirm(13)
    assert pair.good.step == 0
    pair.confirm(14)
    assert pair.good.step == 10


def test_a_skipped_step_puts_that_off_and_trouble_ends_it(pair):
    pair.mark_suspect(12)
    pair.confirm(14)
    assert pair.good.step == 0
    pair.confirm(16)
    assert pair.good.step == 10
    parts = [Tensors(lambda: [nn.Linear(1, 1)])]
    pair.capture(parts, 20)
    pair.discard()
    pair.confirm(100)
    assert pair.good.step == 10


def test_returns_to_the_same_snapshot_are_counted(pair):
    parts = [Tensors(lambda: [nn.Linear(1, 1)])]
    for times in (1, 2):
        pair.good.restore(parts)
        assert pair.good.returns == times
    pair.confirm(14)
    assert pair.good.returns == 0


class Beside(L.Callback):
    """What a rollback brings back beside weights and optimizer state, after each batch."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        (pipeline,) = trainer.callbacks[0].hub.pipelines
        parts = [pipeline.clip_state(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
        parts += [d.spikes.state_dict() for d in pipeline.detectors if hasattr(d, "spikes")]
        self.after.append(copy.deepcopy([trainer.precision_plugin.state_dict(), *parts]))


@pytest.mark.filterwarnings("ignore:Step ")
@pytest.mark.parametrize("kind", ADAMWS)
def test_scaler_schedule_clip_rule_and_baselines_go_back_too(kind, tmp_path):
    back = Rollback(every=12, clean=4, lr_factor=1.0)
    guard, beside = lo.DivergenceGuard(lr_cut=None, rollback=back, report_dir=str(tmp_path)), Beside()
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01, schedule="cosine", warmup=3)
    parts = [guard, configure, lo.GradientClipping(method="zclip"), beside]
    make_trainer(parts, **precision("16-mixed")).fit(Net(nan_batches=range(20, 25)), batches(40))
    assert guard.rollback_count == 1
    for then, now, before in zip(beside.after[11], beside.after[24], beside.after[23], strict=True):
        assert bit_equal(then, now)
        assert not bit_equal(then, before)
    assert beside.after[-1][2]["last_epoch"] == 12 + 15
