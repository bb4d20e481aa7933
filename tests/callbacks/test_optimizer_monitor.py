from __future__ import annotations

import csv
import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim as lo
from lightning_optim import transfer
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, Diagnostic
from tests.helpers import ADAMWS, Net, batches, make_trainer, read_events

RULES = [lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10), "no_decay"]


def _configure(**options):
    return lo.ConfigureOptimizers(
        **{"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.2, "param_groups": RULES, **options}
    )


class Witness(L.Callback):
    """Measures for itself, in the plainest way, what the monitor should show."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        row = {}
        for group in optimizer.param_groups:
            name = group["name"]
            row[f"optim_grad_norm/{name}"] = _norm([p.grad for p in group["params"]])
            row[f"optim_param_norm/{name}"] = _norm(group["params"])
            row[f"optim_lr/{name}"] = float(group["lr"])
            row[f"optim_weight_decay/{name}"] = group["weight_decay"]
        row["optim_grad_norm/total"] = _norm([p.grad for g in optimizer.param_groups for p in g["params"]])
        self._before = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]
        self.rows.append(row)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        for group, before in zip(trainer.optimizers[0].param_groups, self._before, strict=True):
            update = _norm([p - q for p, q in zip(group["params"], before, strict=True)])
            self.rows[-1][f"optim_update_ratio/{group['name']}"] = update / _norm(before)


class NowAndThen(Net):
    """Has gradients far above and far below the limit by turns."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e-2 if batch_idx % 3 else 10)


def _norm(tensors) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("clipped", [True, False])
def test_event_file_holds_what_was_measured_by_hand(logger, kind, clipped):
    witness = Witness()
    parts = [witness, _configure(**ADAMWS[kind], schedule="cosine", warmup=3), lo.OptimizerMonitor()]
    parts += [lo.GradientClipping(0.5)] if clipped else []
    make_trainer(parts, logger=logger).fit(NowAndThen(), batches(8))
    events = read_events(logger.log_dir)
    for tag in witness.rows[0]:
        assert [step for step, _ in events[tag]] == list(range(8)), tag
        expected = [row[tag] for row in witness.rows]
        assert [value for _, value in events[tag]] == pytest.approx(expected, rel=1e-4, abs=1e-7), tag
    norms = [row["optim_grad_norm/total"] for row in witness.rows]
    over = [norm > 0.5 for norm in norms]
    assert over == [step % 3 == 0 for step in range(8)]
    after = [min(norm, 0.5) if clipped else norm for norm in norms]
    assert [value for _, value in events["optim_grad_norm_clipped/total"]] == pytest.approx(after, rel=1e-4)
    heads = [
        row["optim_grad_norm/head"] * post / norm for row, norm, post in zip(witness.rows, norms, after, strict=True)
    ]
    assert [value for _, value in events["optim_grad_norm_clipped/head"]] == pytest.approx(heads, rel=1e-4)
    assert [value for _, value in events["optim_health/clip_rate"]] == [float(clipped and each) for each in over]
    assert {value for _, value in events["optim_health/skipped_steps"]} == {0.0}
    assert {tag for tag in events if tag.startswith("optim_")} == {
        *witness.rows[0],
        *(f"optim_grad_norm_clipped/{name}" for name in ("head", "no_decay", "default", "total")),
        "optim_health/clip_rate",
        "optim_health/skipped_steps",
    }


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
        assert [step for step, _ in events[tag]] == steps, tag
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


@pytest.mark.parametrize("kind", ["ours", "torch-fused"])
def test_between_logging_steps_the_host_asks_for_nothing_and_on_them_once(kind, monkeypatch, logger):
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
        lo.OptimizerMonitor(),
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
    assert len(points) == 10
    assert set(map(tuple, points.values())) == {(49, 99)}


# Where it goes.


def test_every_logger_gets_every_point(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "a", name=""), CSVLogger(tmp_path / "b", name="")]
    make_trainer([_configure(), lo.OptimizerMonitor()], logger=loggers).fit(Net(), batches(4))
    written = read_events(loggers[0].log_dir)["optim_grad_norm/total"]
    assert len(written) == 4
    with open(loggers[1].experiment.metrics_file_path) as file:
        told = [(int(row["step"]), float(row["optim_grad_norm/total"])) for row in csv.DictReader(file)]
    assert told == [(step, pytest.approx(value)) for step, value in written]


def test_without_a_logger_nothing_is_measured(monkeypatch):
    monitor = lo.OptimizerMonitor()
    monkeypatch.setattr(monitor, "on_report", lambda *args: pytest.fail("measured for nobody"))
    make_trainer([_configure(), monitor]).fit(Net(), batches(4))


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
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.AdamW(self.head.parameters(), lr=0.2)]

    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(Manual(), batches(4))
    events = read_events(logger.log_dir)
    assert [value for _, value in events["optim_lr/0.0"]] == pytest.approx([0.1] * 4)
    assert [value for _, value in events["optim_lr/1.0"]] == pytest.approx([0.2] * 4)
    assert [step for step, _ in events["optim_grad_norm/0.total"]] == [0, 1, 2, 3]
    assert [step for step, _ in events["optim_grad_norm/1.total"]] == [0, 1, 2, 3]


def test_group_tags_of_an_optimizer_without_names_are_numbers(logger):
    class Own(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(
                [{"params": self.body.parameters()}, {"params": self.head.parameters(), "lr": 0.3}], 0.1
            )

    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(Own(), batches(2))
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
