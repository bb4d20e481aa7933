from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.step.foreign_decay import ForeignDecay
from tests.helpers import Net, Recorder, batches, bit_equal, make_trainer, precision

LR, WEIGHT_DECAY, STEPS = 0.1, 0.3, 8


class OneBadBatch(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 3 else loss


def train(optimizer, callbacks, model_class=OneBadBatch, kwargs=None, **options):
    configure = lo.ConfigureOptimizers(optimizer, lr=LR, schedule="cosine", warmup=2, optimizer_kwargs=kwargs or {})
    model, recorder = model_class(seed=3), Recorder()
    trainer = make_trainer([configure, lo.DivergenceGuard(), *callbacks, recorder], **options)
    trainer.fit(model, batches(STEPS))
    return [p.detach().clone() for p in model.parameters()], recorder


@pytest.mark.filterwarnings("ignore:Step 3 skipped")
@pytest.mark.parametrize("mode", ["32-true", "16-mixed"])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_without_its_decay_and_ours_is_adamw_bit_for_bit(fused, mode):
    kwargs = {"fused": fused}
    theirs, _ = train(torch.optim.AdamW, [], kwargs=kwargs | {"weight_decay": WEIGHT_DECAY}, **precision(mode))
    ours, _ = train(
        torch.optim.AdamW, [lo.WeightDecay(WEIGHT_DECAY)], kwargs=kwargs | {"weight_decay": 0.0}, **precision(mode)
    )
    none, _ = train(torch.optim.AdamW, [], kwargs=kwargs | {"weight_decay": 0.0}, **precision(mode))
    # The fused kernel rounds (1 - lr·λ)·w in its own registers.
    same = torch.equal if not fused else lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not bit_equal(ours, none)


@pytest.mark.parametrize("kind", ["decoupled", "independent", "corrected"])
def test_each_kind_takes_its_share_at_the_rate_of_the_step(kind):
    class Still(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0

    model_weights, recorder = train("torch.optim.SGD", [lo.WeightDecay(WEIGHT_DECAY, kind)], Still)
    kept = 1.0
    for _, lr in recorder.rates:
        kept *= 1 - {"decoupled": lr, "independent": lr / LR, "corrected": lr * lr / LR}[kind] * WEIGHT_DECAY
    start = [p.detach() for p in Still(seed=3).parameters()]
    torch.testing.assert_close(model_weights[0], start[0] * kept)
    assert torch.equal(model_weights[1], start[1])  # the bias, in the group no_decay


def test_groups_have_their_own():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [weight], "name": name} for weight, name in zip(weights, "abc", strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    decay = ForeignDecay(optimizer, 0.2, groups={"b": 0.0, "c": 1.0})
    for weight in weights[:2]:
        weight.grad = torch.zeros(2)
    optimizer.step()
    assert [weight[0].item() for weight in weights] == [pytest.approx(0.9), 1.0, 1.0]  # the last has no gradient
    decay.close()
    optimizer.step()
    assert weights[0][0].item() == pytest.approx(0.9)


def test_a_rate_on_the_device_and_a_closure():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.5))
    ForeignDecay(optimizer, 0.2)
    calls = []

    def closure():
        calls.append(1)
        weight.grad = torch.zeros(2)
        return torch.tensor(7.0)

    assert optimizer.step(closure).item() == 7.0
    assert len(calls) == 1
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))


def test_one_foreach_call(monkeypatch):
    calls = []
    real = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: (calls.append(len(args[0])), real(*args)))
    weights = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    groups = [{"params": weights[:3]}, {"params": weights[3:], "lr": 0.1}]
    optimizer = torch.optim.Rprop(groups, lr=0.5)
    for weight in weights:
        weight.grad = torch.zeros(2)
    ForeignDecay(optimizer, 0.2)
    optimizer.step()
    assert calls[0] == 6
    assert weights[5][0].item() == pytest.approx(0.98)


def params():
    return [nn.Parameter(torch.ones(1))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lo.WeightDecay(0.0), r"Invalid weight_decay=0.0: .* above 0"),
        (lambda: lo.WeightDecay(math.nan), r"Invalid weight_decay=nan"),
        (lambda: lo.WeightDecay(True), r"Invalid weight_decay=True"),
        (lambda: lo.WeightDecay(0.1, groups={"a": -1}), r"Invalid groups\['a'\]=-1"),
        (lambda: lo.WeightDecay(0.1, "decopled"), r"Did you mean 'decoupled'"),
        (lambda: lo.WeightDecay(0.1, "l1"), r"kind='l1'.*must be one of 'decoupled'"),
        (lambda: ForeignDecay(lo.optim.AdamW(params()), 0.1), r"AdamW has every kind of weight decay built in"),
        (
            lambda: ForeignDecay(torch.optim.AdamW(params()), 0.1),
            r"decay twice: AdamW has weight_decay=0.01 in group 0",
        ),
        (lambda: ForeignDecay(torch.optim.SGD(params(), 0.1), 0.1, groups={"0": 0, "x": 1}), r"no parameter group 'x'"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_decaying_twice_is_refused_before_the_first_step_and_leaves_nothing_behind():
    model = Net(seed=0)
    configure = lo.ConfigureOptimizers(torch.optim.AdamW, lr=LR, weight_decay=0.1)
    callback = lo.WeightDecay(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="decay twice"):
        make_trainer([configure, callback]).fit(model, batches(2))
    assert bit_equal(before, [p.detach() for p in model.parameters()])
    trainer = make_trainer([lo.ConfigureOptimizers(torch.optim.AdamW, lr=LR, weight_decay=0.0), callback])
    trainer.fit(model, batches(2))
    hooks = trainer.optimizers[0]._optimizer_step_pre_hooks.values()
    assert not any(isinstance(getattr(hook, "__self__", None), ForeignDecay) for hook in hooks)
