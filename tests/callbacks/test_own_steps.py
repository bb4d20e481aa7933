"""Manual optimization in every precision: each optimizer is reported and judged at its own steps."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.core.stats import GradStats
from lightning_optim.divergence import Detector
from tests.helpers import ADAMWS, PRECISIONS, Net, batches, make_trainer, precision, read_events


class Critics(Net):
    """Two optimizers of one weight each; the gradient of the first is the number of its step, from 1.

    Args:
        critic_steps: Steps of the first in each batch.
        every: The second accumulates by hand, and steps in each ``every``-th batch.
        bad: Batches in which the first loss of the first optimizer is NaN.
    """

    def __init__(self, critic_steps: int, every: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.generator = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.critic_steps, self.every, self.bad, self.taken = critic_steps, every, bad, 0

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([param], lr=0.0) for param in (self.critic, self.generator)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        critic, generator = optimizers
        for number in range(self.critic_steps):
            self.taken += 1
            is_bad = batch_idx in self.bad and number == 0
            self.manual_backward((self.critic * (float("nan") if is_bad else float(self.taken))).sum())
            critic.step()
            critic.zero_grad()
        self.manual_backward((self.generator * 1.0).sum())
        if (batch_idx + 1) % self.every == 0:
            generator.step()
            generator.zero_grad()


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(("critic_steps", "every", "log_every"), [(3, 1, 1), (3, 4, 2), (1, 2, 4), (5, 3, 3)])
def test_interval_means_and_maxima_are_of_ones_own_steps(critic_steps, every, log_every, name, logger):
    model = Critics(critic_steps, every)
    # Clipping measures each step, so that the interval has them all.
    parts = [lo.GradientClipping(1e9), lo.OptimizerMonitor()]
    make_trainer(parts, logger=logger, log_every_n_steps=log_every, **precision(name)).fit(model, batches(12))
    events = read_events(logger.log_dir)
    seen, due = 0, [batch for batch in range(12) if (batch + 1) % log_every == 0]
    means, maxima = [], []
    for batch in due:  # the report is of the first step in the batch
        last = batch * critic_steps + 1
        own = range(seen + 1, last + 1)
        means.append((batch, pytest.approx(sum(own) / len(own), rel=1e-3)))
        maxima.append((batch, pytest.approx(last, rel=1e-3)))
        seen = last
    assert events["optim_grad_norm/0.interval_mean"] == means
    assert events["optim_grad_norm/0.interval_max"] == maxima
    steps = [step for step, _ in events["optim_grad_norm/1.total"]]
    assert steps
    assert len(set(steps)) == len(steps)
    assert all((step + 1) % every == 0 for step in steps)
    assert [value for _, value in events["optim_grad_norm/1.interval_max"]] == pytest.approx([every] * len(steps))


@pytest.mark.filterwarnings("ignore:Step .* skipped")
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(("critic_steps", "every"), [(3, 1), (1, 2), (5, 3)])
def test_a_bad_step_is_that_of_its_optimizer_and_batch(critic_steps, every, name, tmp_path, logger):
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), rollback=None, lr_cut=None, stop=False, spikes=None)
    model = Critics(critic_steps, every, bad=(4,))
    parts = [guard, lo.OptimizerMonitor()]
    trainer = make_trainer(parts, logger=logger, **precision(name))
    trainer.fit(model, batches(8))
    counts = state_of_last_fit(trainer)["lightning_optim"]["counts"]
    assert [count[0] for count in counts] == [8 * critic_steps, 8 // every]
    assert [count[2] for count in counts] == [1, 0]
    found = [(entry.step, entry.optimizer) for entry in guard.report.entries if entry.kind == "nonfinite"]
    assert found == ([] if name == "16-mixed" else [(4, 0)])  # an overflow of the scaler, and its gradients are gone
    for tag, points in read_events(logger.log_dir).items():
        steps = [step for step, _ in points]
        assert len(set(steps)) == len(steps), tag
        assert min(steps) >= 0


class Sees(Detector):
    """Skips nothing, and keeps the norm of each step that it is asked about."""

    norms: ClassVar[list[float]] = []

    def __call__(self, stats: GradStats) -> Tensor:
        self.norms.append(float(stats.total_norm()))
        return torch.tensor(False)


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_step_that_is_left_out_is_not_measured_by_the_gradients_of_the_next(zeroed, tmp_path):
    class Zeroes(Critics):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            if not zeroed:
                super().training_step(batch, batch_idx)
                return
            critic = self.optimizers()[0]  # type: ignore[index]
            for number in range(self.critic_steps):
                self.taken += 1
                is_bad = batch_idx in self.bad and number == 0
                critic.zero_grad()
                self.manual_backward((self.critic * (float("nan") if is_bad else float(self.taken))).sum())
                critic.step()

    Sees.norms.clear()
    guard = lo.DivergenceGuard(
        report_dir=str(tmp_path), rollback=None, lr_cut=None, stop=False, spikes=None, detectors=[Sees()]
    )
    trainer = make_trainer([guard], **precision("16-mixed"))
    trainer.fit(Zeroes(3, 100, bad=(1,)), batches(3))
    finite = [norm for norm in Sees.norms if norm == norm]
    assert finite == pytest.approx([1, 2, 3, 5, 6, 7, 8, 9])
    assert len(Sees.norms) == 8
    assert state_of_last_fit(trainer)["lightning_optim"]["counts"][0] == [9, 0, 1]


class Raises(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 3:
            raise RuntimeError("mine")


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_that_an_exception_came_before_is_not_counted(name, kind):
    clipping = lo.GradientClipping(1e9)
    parts = [lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01), clipping]
    trainer = make_trainer(parts, **precision(name))
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(Raises(), batches(6))
    assert state_of_last_fit(trainer)["lightning_optim"]["counts"] == [[3, 0, 0]]
