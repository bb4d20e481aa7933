from __future__ import annotations

import csv
import time
from functools import partial
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim as lo
from lightning_optim.core import transfer
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, Diagnostic, Histograms, PerTensor
from lightning_optim.divergence import LRCut, Rollback
from tests.helpers import (
    ADAMWS,
    RULES,
    Net,
    NetWith,
    TwoOptimizers,
    batches,
    count_reads,
    make_trainer,
    precision,
    read_events,
)


def _configure(**options):
    return lo.ConfigureOptimizers(
        **{"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.2, "param_groups": RULES, **options}
    )


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (50, {}, [49, 99]),
        (30, {}, [29, 59, 89]),
        (1, {"limit_train_batches": 3}, [0, 1, 2]),
        (10, {"accumulate_grad_batches": 4}, [9, 19]),
        (200, {}, []),
        (30, {"max_epochs": 2, "limit_train_batches": 40}, [29, 59]),
    ],
)
def test_points_are_at_lightnings_own_logging_steps(logger, every, options, steps):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

    make_trainer([_configure(), lo.OptimizerMonitor()], logger=logger, log_every_n_steps=every, **options).fit(
        Logs(), batches(100)
    )
    events = read_events(logger.log_dir)
    tags = [tag for tag in events if tag.startswith("optim_")]
    assert bool(tags) is bool(steps)
    for tag in tags:
        past = 1 if "optim_grad/cosine" in tag else 2 if "robust_z" in tag else 0
        assert [step for step, _ in events[tag]] == [step for step in steps if step >= past], tag
    if steps:
        assert [step for step, _ in events["train_loss"]] == steps


def test_clip_rate_is_the_share_since_the_last_point(logger):
    class Scaled(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e3 if batch_idx in (0, 4, 5, 6, 9) else 1e-6)

    make_trainer(
        [_configure(), lo.GradientClipping(1.0), lo.OptimizerMonitor()], logger=logger, log_every_n_steps=4
    ).fit(Scaled(), batches(12))
    assert read_events(logger.log_dir)["optim_health/clip_rate"] == [(3, 0.25), (7, 0.75), (11, 0.25)]


# What it costs: must not wait for the device.


class Wide(L.LightningModule):
    """Two hundred tensors, and nothing logged."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2, 2)) for _ in range(200)])

    def training_step(self, batch, batch_idx) -> Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


class Asked(TorchDispatchMode):
    """Counts how often the host asks for a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class PerBatch(L.Callback):
    """Notes, last in line, what has been counted since the last batch."""

    def __init__(self, read) -> None:
        self.read, self.rows = read, []

    def on_train_start(self, trainer, pl_module) -> None:
        self._last = self.read()

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        now = self.read()
        self.rows.append(tuple(after - before for after, before in zip(now, self._last, strict=True)))
        self._last = now


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ours", {}),
        ("torch-fused", {}),
        ("ours", {"per_tensor": PerTensor(heat_maps=(), every=1), "histograms": Histograms(every=1)}),
        ("torch-fused", {"per_tensor": PerTensor(heat_maps=(), every=1), "histograms": Histograms(every=1)}),
    ],
    ids=["ours", "torch-fused", "ours-details", "torch-fused-details"],
)
def test_between_logging_steps_the_host_asks_for_nothing_and_on_them_once(kind, options, monkeypatch, logger):
    transfers, asked = [], Asked()
    original = transfer.PendingValues.__init__
    monkeypatch.setattr(
        transfer.PendingValues, "__init__", lambda self, packed: (transfers.append(packed), original(self, packed))[1]
    )
    counter = PerBatch(lambda: (asked.count, len(transfers)))
    callbacks = [
        lo.ConfigureOptimizers(**ADAMWS[kind], lr=1e-3, schedule="cosine", warmup="10%"),
        lo.GradientClipping(1.0),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(**options),
        counter,
    ]
    with asked:
        torch.ones(()).item()
        assert asked.count == 1
        make_trainer(callbacks, logger=logger, log_every_n_steps=50).fit(Wide(), batches(100))
    assert counter.rows == [(0, 1 if step in (49, 99) else 0) for step in range(100)]
    assert len(transfers) == 2
    events = read_events(logger.log_dir)
    points = {tag: [step for step, _ in values] for tag, values in events.items() if tag.startswith("optim_")}
    assert len(points) > 20
    assert set(map(tuple, points.values())) == {(49, 99)}


# Where it goes.


def test_every_logger_gets_every_point(tmp_path):
    loggers: list[Any] = [TensorBoardLogger(tmp_path / "a", name=""), CSVLogger(tmp_path / "b", name="")]
    make_trainer([_configure(), lo.OptimizerMonitor()], logger=loggers).fit(Net(), batches(4))
    written = read_events(loggers[0].log_dir)["optim_grad_norm/total"]
    assert len(written) == 4
    with open(loggers[1].experiment.metrics_file_path) as file:
        told = [(int(row["step"]), float(row["optim_grad_norm/total"])) for row in csv.DictReader(file)]
    assert told == [(step, pytest.approx(value)) for step, value in written]


def test_without_a_logger_nothing_is_measured(logger, monkeypatch):
    measured = count_reads(monkeypatch)
    for destination in (False, logger):
        monitor = lo.OptimizerMonitor()
        reports = Mock(wraps=monitor.on_report)
        monkeypatch.setattr(monitor, "on_report", reports)
        make_trainer([_configure(), monitor], logger=destination).fit(Net(), batches(4))
        assert reports.call_count == len(measured) == (4 if destination else 0)


def test_points_are_written_even_if_training_fails(logger):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("mine")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="mine"):
        make_trainer([_configure(), lo.OptimizerMonitor()], logger=logger).fit(Failing(), batches(8))
    assert [step for step, _ in read_events(logger.log_dir)["optim_lr/head"]] == [0, 1, 2]


def test_several_optimizers_get_tags_of_their_own(logger):
    model = TwoOptimizers(partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.2))
    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(model, batches(4))
    events = read_events(logger.log_dir)
    assert [value for _, value in events["optim_lr/0.0"]] == pytest.approx([0.1] * 4)
    assert [value for _, value in events["optim_lr/1.0"]] == pytest.approx([0.2] * 4)
    assert [step for step, _ in events["optim_grad_norm/0.total"]] == [0, 1, 2, 3]
    assert [step for step, _ in events["optim_grad_norm/1.total"]] == [0, 1, 2, 3]


def test_group_tags_of_an_optimizer_without_names_are_numbers(logger):
    def configure(module):
        groups = [{"params": module.body.parameters()}, {"params": module.head.parameters(), "lr": 0.3}]
        return torch.optim.SGD(groups, 0.1)

    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(NetWith(configure), batches(2))
    events = read_events(logger.log_dir)
    assert [events[f"optim_lr/{index}"][0][1] for index in (0, 1)] == pytest.approx([0.1, 0.3])


def test_a_diagnostic_of_ones_own_is_shown(logger):
    class GradMeanSquare(Diagnostic):
        name = "grad_sq"

        def compute(self, record):
            return record.grad.group_norms().square()

    make_trainer([_configure(), lo.OptimizerMonitor([*DEFAULT_DIAGNOSTICS, GradMeanSquare()])], logger=logger).fit(
        Net(), batches(3)
    )
    events = read_events(logger.log_dir)
    expected = [value**2 for _, value in events["optim_grad_norm/head"]]
    assert [value for _, value in events["optim_grad_sq/head"]] == pytest.approx(expected, rel=1e-5)


def test_two_diagnostics_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'grad_norm'"):
        lo.OptimizerMonitor([DEFAULT_DIAGNOSTICS[0], DEFAULT_DIAGNOSTICS[0]])


def test_weights_are_the_same_with_and_without(logger):
    finals = []
    for callbacks in ([_configure()], [lo.OptimizerMonitor(), _configure()]):
        model = Net()
        make_trainer(callbacks, logger=logger).fit(model, batches(6))
        finals.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


# What belongs to the run rather than to a group.


def test_loss_over_the_interval(logger):
    losses = []

    class Noted(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) * (10 if batch_idx == 6 else 1)
            losses.append(loss.item())
            return loss

    options = {"logger": logger, "log_every_n_steps": 4, "accumulate_grad_batches": 2}
    make_trainer([_configure(), lo.OptimizerMonitor()], **options).fit(Noted(), batches(16))
    events = read_events(logger.log_dir)
    parts = losses[:8], losses[8:]
    assert events["optim_loss/mean"] == [(3, pytest.approx(sum(parts[0]) / 8)), (7, pytest.approx(sum(parts[1]) / 8))]
    assert events["optim_loss/max"] == [(3, pytest.approx(max(parts[0]))), (7, pytest.approx(max(parts[1])))]
    for (_, shown), known, largest in zip(
        events["optim_loss/robust_z"], (losses[:8], losses), map(max, parts), strict=True
    ):
        median = sorted(known)[(len(known) - 1) // 2]
        spread = sorted(abs(loss - median) for loss in known)[(len(known) - 1) // 2]
        assert shown == pytest.approx((largest - median) / (1.4826 * spread), rel=1e-4)
    assert events["optim_loss/robust_z"][0][1] > 5


@pytest.mark.filterwarnings("ignore:Step .* skipped")
def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(logger):
    make_trainer([_configure(), lo.DivergenceGuard(), lo.OptimizerMonitor()], logger=logger, log_every_n_steps=4).fit(
        Net(nan_batches=[1]), batches(8)
    )
    events = read_events(logger.log_dir)
    assert [step for step, _ in events["optim_loss/mean"]] == [3, 7]
    assert all(value == value for tag in ("mean", "max") for _, value in events[f"optim_loss/{tag}"])


def test_the_largest_gradient_norm_of_the_interval_is_beside_its_mean(logger):
    norms = []

    class Spiky(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (100 if batch_idx == 1 else 1)

        def on_before_optimizer_step(self, optimizer):
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm().item())

    make_trainer(
        [_configure(), lo.GradientClipping(1.0), lo.OptimizerMonitor()], logger=logger, log_every_n_steps=4
    ).fit(Spiky(), batches(8))
    events = read_events(logger.log_dir)
    expected = [max(norms[:4]), max(norms[4:])]
    assert [value for _, value in events["optim_grad_norm/interval_max"]] == pytest.approx(expected)
    expected = [sum(norms[:4]) / 4, sum(norms[4:]) / 4]
    assert [value for _, value in events["optim_grad_norm/interval_mean"]] == pytest.approx(expected)
    assert [value for _, value in events["optim_grad_norm/total"]] == pytest.approx([norms[3], norms[7]])


@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
def test_noise_scale_from_accumulation(logger, name):
    """Each report equals the formula on gradients computed one micro-batch at a time."""
    pairs = []

    class Alone(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 4 == 0:
                self.grads = []
            loss = torch.nn.functional.mse_loss(pl_module(batch[0]), batch[1])
            grads = torch.autograd.grad(loss, list(pl_module.parameters()))
            self.grads.append(torch.cat([g.flatten() for g in grads]).double())
            if batch_idx % 4 == 3:
                pairs.append((self.grads[0].square().sum().item(), sum(self.grads).div(4).square().sum().item()))

    make_trainer(
        [_configure(), Alone(), lo.OptimizerMonitor()], logger=logger, accumulate_grad_batches=4, **precision(name)
    ).fit(Net(), batches(24))
    noise = signal = 0.0
    expected = []
    for step, (small, large) in enumerate(pairs):
        signal = 0.9 * signal + 0.1 * (8 * large - 2 * small) / 6
        noise = 0.9 * noise + 0.1 * (small - large) / (1 / 2 - 1 / 8)
        if signal > 0 and noise > 0:
            expected.append((step, pytest.approx(noise / signal, rel=1e-3 if name == "32-true" else 0.05)))
    events = read_events(logger.log_dir)
    assert len(expected) > 2
    assert events["optim_grad/noise_scale"] == expected
    assert {value for _, value in events["optim_grad/batch_size"]} == {8.0}


def test_without_accumulation_there_is_no_noise_scale(logger):
    make_trainer([_configure(), lo.OptimizerMonitor()], logger=logger).fit(Net(), batches(3))
    assert "optim_grad/noise_scale" not in read_events(logger.log_dir)


def test_speed_is_the_clocks_without_validation(logger):
    class Slow(Net):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            time.sleep(0.2)

    trainer = make_trainer([_configure(), lo.OptimizerMonitor()], logger=logger, log_every_n_steps=5, max_epochs=2)
    trainer.fit(Slow(), batches(5), batches(2))
    events = read_events(logger.log_dir)
    for _, rate in events["optim_speed/steps_per_second"]:
        assert 5 < rate < 50
    pairs = zip(events["optim_speed/samples_per_second"], events["optim_speed/steps_per_second"], strict=True)
    assert all(samples == pytest.approx(2 * steps) for (_, samples), (_, steps) in pairs)
    assert all(0 < share < 0.9 for _, share in events["optim_speed/optimizer_share"])


def test_of_many_alarms_the_first_and_the_last_ones_are_kept(logger, monkeypatch):
    monkeypatch.setattr("lightning_optim.callbacks.optimizer_monitor._MOST_ALARMS", 4)

    class Broken(Net):
        def on_before_optimizer_step(self, optimizer):
            self.norm.weight.grad[1] = float("inf")

    monitor = lo.OptimizerMonitor()
    make_trainer([_configure(), lo.GradientClipping(1.0), monitor], logger=logger).fit(Broken(), batches(7))
    assert [alarm.split(":")[0] for alarm in monitor.alarms] == ["Step 0", "Step 1", "Step 5", "Step 6"]


def test_gradients_that_are_not_finite_are_counted_and_the_first_is_named(logger):
    class Broken(Net):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 2:
                self.norm.weight.grad[1] = float("inf")
                self.norm.bias.grad[0] = float("nan")

    monitor = lo.OptimizerMonitor()
    make_trainer([_configure(), lo.GradientClipping(1.0), monitor], logger=logger).fit(Broken(), batches(4))
    assert monitor.alarms == ["Step 2: 2 gradients are not finite, the first that of `norm.weight`."]
    events = read_events(logger.log_dir)
    assert [value for _, value in events["optim_health/nonfinite_gradients"]] == [0, 0, 2, 0]
    assert [value for _, value in events["optim_health/skipped_steps"]] == [0, 0, 1, 1]
    assert "optim_update_ratio/head" in monitor.latest
    assert [step for step, _ in events["optim_update_ratio/head"]] == [0, 1, 3]  # there was no update


@pytest.mark.filterwarnings("ignore:Step ")
@pytest.mark.parametrize("guard_first", [True, False])
def test_what_the_guard_has_done_is_beside_it(logger, tmp_path, guard_first):
    """Bad steps 10 to 12 cut the rate, 13 to 15 roll back; each is known from the next report on."""
    guard = lo.DivergenceGuard(
        lr_cut=LRCut(0.5, steps=5, recover=0),
        rollback=Rollback(every=2, clean=0, lr_factor=0.25),
        patience=3,
        cooldown=0,
    )
    used = []

    class Rates(L.Callback):
        def on_train_start(self, trainer, pl_module):  # behind the cut
            trainer.optimizers[0].register_step_pre_hook(
                lambda optimizer, args, kwargs: used.append(optimizer.param_groups[0]["lr"] / 0.01)
            )

    pair = [guard, lo.OptimizerMonitor()]
    parts = [_configure(param_groups=[]), *(pair if guard_first else reversed(pair)), Rates()]
    make_trainer(parts, logger=logger, default_root_dir=tmp_path).fit(Net(nan_batches=range(10, 16)), batches(20))
    events = read_events(logger.log_dir)
    points = {
        name: [v for _, v in events[f"optim_health/{name}"]] for name in ("rollbacks", "lr_cut", "overflow_steps")
    }
    assert points["rollbacks"] == [0] * 16 + [1] * 4
    assert points["lr_cut"] == used
    assert {1.0, 0.5, 0.125, 0.25} == set(used)
    assert points["overflow_steps"] == [0] * 20
    assert [v for _, v in events["optim_lr/default"]] == pytest.approx([0.01 * factor for factor in used])


@pytest.mark.filterwarnings("ignore:Step ")
def test_the_skip_count_is_logged_once_per_step_by_monitor_or_guard(logger, tmp_path):
    parts = [_configure(), lo.DivergenceGuard(), lo.OptimizerMonitor()]
    trainer = make_trainer(parts, logger=logger, log_every_n_steps=4, default_root_dir=tmp_path)
    trainer.fit(Net(nan_batches=[3, 5]), batches(8))
    assert read_events(logger.log_dir)["optim_health/skipped_steps"] == [(3, 1), (5, 2), (7, 2)]


def test_overflows_are_counted(logger):
    parts = [_configure(), lo.DivergenceGuard(), lo.OptimizerMonitor()]
    make_trainer(parts, logger=logger, **precision("16-mixed", init_scale=2.0**30)).fit(Net(), batches(20, 32))
    events = read_events(logger.log_dir)
    skipped, overflows = (events[f"optim_health/{name}"] for name in ("skipped_steps", "overflow_steps"))
    assert overflows[-1] == skipped[-1]
    assert overflows[-1][1] > 3


def test_the_progress_bar_shows_the_norm_without_any_logger():
    seen = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(trainer.progress_bar_metrics.get("grad_norm"))

    monitor = lo.OptimizerMonitor()
    make_trainer([_configure(), monitor, Looks()], enable_progress_bar=True, log_every_n_steps=2).fit(Net(), batches(4))
    assert seen[0] is None
    assert seen[1] > 0
    assert seen[3] == monitor.latest["optim_grad_norm/total"]


def test_there_are_at_most_twelve_sections(logger):
    parts = [_configure(), lo.GradientClipping(1.0), lo.DivergenceGuard(), lo.OptimizerMonitor()]
    make_trainer(parts, logger=logger, accumulate_grad_batches=2, **precision("16-mixed")).fit(Net(), batches(12))
    sections = {tag.split("/")[0] for tag in read_events(logger.log_dir) if tag.startswith("optim_")}
    assert len(sections) == 11  # the guard's alarms are the twelfth
