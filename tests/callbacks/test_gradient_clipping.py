from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_optim as lo
from tests.helpers import (
    ADAMWS,
    PRECISIONS,
    Net,
    Ramp,
    Recorder,
    TwoOptimizers,
    batches,
    make_trainer,
    precision,
    read_events,
)

LOUD = 30.0  # makes gradients far above a norm of 1


def _run(logger, name, kind, callbacks=(), **options):
    """Norms before and after clipping, as the event file has them, and the final weights."""
    model = Net()
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=1e-3)
    trainer = make_trainer(
        [configure, lo.GradientClipping(max_norm=1.0), lo.OptimizerMonitor(), *callbacks],
        logger=logger,
        **precision(name),
        **options,
    )
    trainer.fit(model, batches(8, scale=LOUD))
    logger.experiment.flush()
    events = read_events(logger.log_dir)
    return events, [p.detach() for p in model.parameters()]


def _values(events, tag):
    return [value for _, value in events[tag]]


@pytest.fixture
def loggers(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    return [TensorBoardLogger(tmp_path, name="run", version=str(index)) for index in range(2)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ["ours", "torch-fused"])
def test_fused_equals_non_fused_and_the_norm_ends_at_the_limit(loggers, kind, name, accumulate):
    fused, weights = _run(loggers[0], name, kind, accumulate_grad_batches=accumulate)
    plain, expected = _run(loggers[1], name, "torch", accumulate_grad_batches=accumulate)
    rtol = 1e-5 if name == "32-true" else 1e-2
    before = _values(fused, "optim_grad_norm/total")
    assert len(before) == math.ceil(8 / accumulate)
    assert before == pytest.approx(_values(plain, "optim_grad_norm/total"), rel=rtol)
    assert min(before) > 2
    for events in (fused, plain):
        after = _values(events, "optim_grad_norm_clipped/total")
        assert max(after) <= 1 + 1e-6
        assert min(after) > 0.99
        assert _values(events, "optim_health/clip_rate") == [1.0] * len(after)
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_logged_norms_are_those_of_the_gradients(logger, name, kind):
    events, _ = _run(logger, name, kind, limit_train_batches=1)
    model = Net()
    x, y = next(iter(batches(8, scale=LOUD)))
    nn.functional.mse_loss(model(x), y).backward()  # in full precision, without a scaler
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    rtol = 1e-5 if name == "32-true" else 3e-2
    assert _values(events, "optim_grad_norm/total") == pytest.approx([norm], rel=rtol)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_weights_are_those_of_lightnings_own_clipping(optimizer):
    finals = []
    for ours in (True, False):
        model = Net()
        callbacks = [lo.ConfigureOptimizers(optimizer, lr=0.01, optimizer_kwargs={"foreach": True})]
        options = {} if ours else {"gradient_clip_val": 0.3}
        make_trainer([*callbacks, *([lo.GradientClipping(0.3)] if ours else [])], **options).fit(model, batches(8))
        finals.append(list(model.parameters()))
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-7)


def test_gradients_below_the_limit_change_not_one_bit():
    finals = []
    for callbacks in ([lo.GradientClipping(1e6), lo.DivergenceGuard()], []):
        model = Net()
        make_trainer([lo.ConfigureOptimizers("adamw", lr=0.1), *callbacks]).fit(model, batches(8))
        finals.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_works_with_the_modules_own_optimizer_and_no_callback_for_it():
    class Own(Ramp):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    recorder = Recorder()
    make_trainer([lo.GradientClipping(0.25), recorder]).fit(Own(), batches(4))
    path = [0.0, *(weights[0].item() for weights in recorder.weights)]
    assert path == pytest.approx([0, -0.25, -0.5, -0.75, -1.0], rel=1e-5)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_manual_optimization_with_two_optimizers_is_clipped_each(name, fused):
    make = partial(torch.optim.SGD, lr=1.0, fused=fused)
    model, recorder = TwoOptimizers(make, make, factor=lambda index, batch_idx: 10.0), Recorder()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = make_trainer([lo.GradientClipping(0.25), recorder], limit_train_batches=1, **precision(name))
    trainer.fit(model, batches(4))
    moved = [b - a for a, b in zip(recorder.weights[0], before, strict=True)]
    body, norm, head = moved[:2], moved[2:4], moved[4:]
    for part in (body, head):
        assert math.sqrt(sum(float(t.square().sum()) for t in part)) == pytest.approx(0.25, rel=1e-3)
    assert all((t == 0).all() for t in norm)


def test_the_trainers_own_clipping_beside_it_is_refused_and_both_are_named():
    recorder = Recorder()
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer([lo.GradientClipping(2.0), recorder], gradient_clip_val=0.5).fit(Net(), batches(4))
    assert "Trainer(gradient_clip_val=0.5)" in str(caught.value)
    assert "GradientClipping(max_norm=2.0)" in str(caught.value)
    assert recorder.rates == []


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, math.inf])
def test_unusable_limits_are_refused_at_construction(max_norm):
    with pytest.raises(ValueError, match="max_norm"):
        lo.GradientClipping(max_norm)
