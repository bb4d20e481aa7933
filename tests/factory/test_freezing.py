"""Groups that are frozen until their time, by our own rule and by Lightning's BaseFinetuning, and their resumes."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lightning_optim as lo
from lightning_optim.factory.run_length import horizon_of
from tests.distributed.ranks import run_ranks
from tests.helpers import (
    ADAMWS,
    Net,
    NetWith,
    Recorder,
    SaveAt,
    StatefulLoader,
    batches,
    bit_equal,
    make_trainer,
    precision,
    read_events,
)

BODY = ("body.weight", "body.bias", "norm.weight", "norm.bias")


class Watch(L.Callback):
    """What of the body happens in each batch: whether it moves, has state, and needs gradients."""

    def __init__(self):
        self.moved, self.state, self.needs_grad = [], [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.needs_grad.append(pl_module.body.weight.requires_grad)
        self._before = [p.detach().clone() for p in (*pl_module.body.parameters(), *pl_module.norm.parameters())]

    def on_train_batch_end(self, trainer, pl_module, *args):
        body = (*pl_module.body.parameters(), *pl_module.norm.parameters())
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(self._before, body, strict=True)))
        state = trainer.optimizers[0].state
        self.state.append(sum(len(state.get(p, ())) > 0 for p in body))


def _rules(until, **options):
    return [
        "no_decay",
        lo.ParamGroupRule(name="body", pattern="^(body|norm)", frozen_until=until, overlay=True, **options),
    ]


def _configure(until="1 epoch", kind="ours", **options):
    return lo.ConfigureOptimizers(
        **ADAMWS[kind], lr=0.05, weight_decay=0.1, schedule="cosine", param_groups=_rules(until), **options
    )


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("own_hooks_only", [False, True])
def test_a_frozen_group_stands_still_until_its_time_and_then_starts_fresh(kind, accumulate, own_hooks_only):
    watch, recorder = Watch(), Recorder()
    callbacks = (
        [watch, recorder] if own_hooks_only else [_configure(kind=kind), lo.GradientClipping(0.5), watch, recorder]
    )
    trainer = make_trainer(callbacks, max_epochs=3, accumulate_grad_batches=accumulate)
    trainer.fit(NetWith(_configure(kind=kind)) if own_hooks_only else Net(), batches(6))
    assert watch.moved == [batch >= 6 and (batch + 1) % accumulate == 0 for batch in range(18)]
    assert watch.state == [0 if batch < 5 + accumulate else 4 for batch in range(18)]
    # Gradients that nobody uses are not computed, but for the first step of who has no hook before it.
    late = accumulate if own_hooks_only else 0
    assert watch.needs_grad == [batch < late or batch >= 6 for batch in range(18)]
    # The schedule runs on all the while, for all groups alike.
    assert all(len(set(row)) == 1 for row in recorder.rates)
    # Moments start fresh: two epochs' worth of steps, not three.
    state, model = trainer.optimizers[0].state, cast(Net, trainer.lightning_module)
    assert float(state[model.body.weight]["step"]) == 12 / accumulate
    assert float(state[model.head.weight]["step"]) == 18 / accumulate


def test_until_then_it_is_as_if_the_body_was_never_in_the_optimizer():
    """Clipping, decay and all: the head's weights in the frozen time are those of a model whose body is constant."""

    def fit(net, configure):
        make_trainer([configure, lo.GradientClipping(0.1)], max_steps=4).fit(net, batches(6))
        return net

    frozen = fit(Net(), _configure("4 steps"))
    constant = Net()
    constant.body.requires_grad_(False)
    constant.norm.requires_grad_(False)
    fit(constant, lo.ConfigureOptimizers("adamw", lr=0.05, weight_decay=0.1, schedule="cosine"))
    assert bit_equal(dict(frozen.state_dict()), dict(constant.state_dict()))


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_resume_before_and_after_unfreezing_is_bit_exact(tmp_path, kind, accumulate, at):
    path = tmp_path / "a.ckpt"

    def fit(loader, extra=(), ckpt_path=None):
        model, recorder, watch = Net(), Recorder(), Watch()
        trainer = make_trainer(
            [_configure(kind=kind), recorder, watch, *extra], max_epochs=3, accumulate_grad_batches=accumulate
        )
        trainer.fit(model, loader, ckpt_path=ckpt_path)
        return model, trainer.optimizers[0].state_dict(), recorder.rates, watch

    whole = fit(StatefulLoader(4 * accumulate, []), [SaveAt(at, path)])
    rest = fit(StatefulLoader(4 * accumulate, []), ckpt_path=path)
    assert bit_equal(dict(rest[0].state_dict()), dict(whole[0].state_dict()))
    assert bit_equal(rest[1], whole[1])
    assert rest[2] == whole[2][at:]
    assert rest[3].moved == whole[3].moved[at * accumulate :]
    assert rest[3].needs_grad == whole[3].needs_grad[at * accumulate :]
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize(
    ("until", "moved"), [("6 steps", [False] * 2 + [True] * 6), (None, [True] * 8), ("4 steps", [True] * 8)]
)
def test_a_resume_by_the_configuration_takes_its_end_of_the_frost(tmp_path, kind, until, moved):
    path, watch = tmp_path / "a.ckpt", Watch()
    make_trainer([_configure("5 steps", kind=kind), SaveAt(4, path)], max_epochs=3).fit(Net(), StatefulLoader(4, []))
    resumed = [_configure(until, kind=kind, on_resume="config"), watch]
    make_trainer(resumed, max_epochs=3).fit(Net(), StatefulLoader(4, []), ckpt_path=path)
    assert watch.moved == moved


def test_skipped_steps_do_not_count_as_time_gone_by():
    watch = Watch()
    callbacks = [_configure("3 steps"), lo.DivergenceGuard(), watch]
    with pytest.warns(UserWarning, match="skipped"):
        make_trainer(callbacks, max_epochs=1).fit(Net(nan_batches=[1, 2]), batches(8))
    assert watch.moved == [False] * 5 + [True] * 3


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ADAMWS)
def test_in_every_precision(name, kind):
    watch = Watch()
    make_trainer([_configure("2 steps", kind=kind), lo.GradientClipping(1.0), watch], **precision(name)).fit(
        Net(), batches(4)
    )
    assert watch.moved == [False, False, True, True]


def test_a_body_that_the_model_itself_has_frozen_is_thawed():
    model = Net()
    model.body.requires_grad_(False)
    watch = Watch()
    make_trainer([_configure("25%"), watch]).fit(model, batches(8))
    assert watch.moved == [False] * 2 + [True] * 6


def test_a_fit_that_ends_early_leaves_the_flags_as_they_were_and_another_fit_works():
    model = Net()
    for _ in range(2):
        make_trainer([_configure("100 steps")], max_steps=2).fit(model, batches(4))
        assert all(p.requires_grad for p in model.parameters())


def test_the_monitor_sees_only_what_moves(logger):
    make_trainer([_configure("2 steps"), lo.GradientClipping(1.0), lo.OptimizerMonitor()], logger=logger).fit(
        Net(), batches(4)
    )
    points = read_events(logger.log_dir)["optim_lr/body"]
    assert len(points) == 4


def test_in_a_plain_loop():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rules = [lo.ParamGroupRule(name="first", pattern="^0", frozen_until="30%")]
    factory = lo.OptimizerFactory("sgd", lr=0.1, schedule="linear", param_groups=rules)
    optimizer, scheduler = factory.build(model, lo.Horizon(total_steps=10))
    moved = []
    for _ in range(10):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        moved.append(not torch.equal(before, model[0].weight))
    assert moved == [False] * 3 + [True] * 7


def test_without_a_length_it_says_what_is_missing():
    rules = [lo.ParamGroupRule(name="first", pattern="weight", frozen_until="30%")]
    optimizer, _ = lo.OptimizerFactory("sgd", lr=0.1, param_groups=rules).build(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"'first' is frozen until '30%'.*Horizon"):
        optimizer.step()


# Lightning's own.


class Unfreeze(BaseFinetuning):
    """The body joins after an epoch, at a tenth of the rate, as Lightning documents it."""

    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.body, pl_module.norm])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.body, pl_module.norm], optimizer)


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("in_module", [False, True])
def test_base_finetuning_follows_the_curve_at_its_ratio_and_survives_a_resume(tmp_path, kind, in_module):
    path = tmp_path / "a.ckpt"
    options = {**ADAMWS[kind], "lr": 0.05, "weight_decay": 0.1, "schedule": "cosine", "warmup": 2}

    def fit(extra=(), ckpt_path=None):
        model = NetWith(lo.OptimizerFactory(**options)) if in_module else Net()
        recorder, watch = Recorder(), Watch()
        ours = [] if in_module else [lo.ConfigureOptimizers(**options), lo.GradientClipping(1.0)]
        trainer = make_trainer([Unfreeze(), *ours, recorder, watch, *extra], max_epochs=3)
        trainer.fit(model, StatefulLoader(4, []), ckpt_path=ckpt_path)
        return model, trainer.optimizers[0], recorder.rates, watch

    whole = fit([SaveAt(6, path)])
    rest = fit(ckpt_path=path)
    assert [len(row) for row in whole[2]] == [2] * 4 + [3] * 8
    for row in whole[2][4:]:
        assert row[2] == pytest.approx(row[0] / 10)
    assert whole[3].moved == [False] * 4 + [True] * 8
    assert rest[3].moved == [True] * 6
    assert rest[2] == whole[2][6:]
    assert bit_equal(dict(rest[0].state_dict()), dict(whole[0].state_dict()))
    group = rest[1].param_groups[2]
    assert (group["name"], group["param_names"]) == ("added_1", list(BODY))
    assert all(p.requires_grad for p in rest[0].parameters())


def test_lightnings_rate_monitor_names_a_group_that_joined(logger):
    rates = LearningRateMonitor("step")
    trainer = make_trainer([Unfreeze(), lo.ConfigureOptimizers("adamw", lr=0.1), rates], max_epochs=2, logger=logger)
    trainer.fit(Net(), batches(4))
    assert any("added_1" in tag for tag in read_events(logger.log_dir))


def join_late() -> tuple[list[bool], list[list[float]]]:
    """Whether the group moved in each step, and the weights at the end."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    wrapped = DistributedDataParallel(model)
    rules = [lo.ParamGroupRule(name="first", pattern="^0", frozen_until="2 steps")]
    factory = lo.OptimizerFactory("adamw", lr=0.1, param_groups=rules)
    optimizer, scheduler = factory.build(model, lo.Horizon(total_steps=4))
    moved = []
    for step in range(4):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        wrapped(torch.full((1, 2), float(dist.get_rank() + step + 1))).sum().backward()
        optimizer.step()
        scheduler.step()
        moved.append(not torch.equal(before, model[0].weight))
    return moved, [p.tolist() for p in model.parameters()]


def test_ranks_agree_on_a_group_that_joins_the_reduction_after_its_start():
    first, second = run_ranks(join_late)
    assert first[0] == [False, False, True, True]
    assert first == second


def test_beside_a_scheduler_of_torchs_the_length_is_computed_once_per_epoch(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lightning_optim.factory.factory.horizon_of", lambda trainer: (asked.append(1), horizon_of(trainer))[1]
    )
    rules = [lo.ParamGroupRule(name="body", pattern="^body", frozen_until="1 epoch")]
    callback = lo.ConfigureOptimizers(
        "sgd", lr=0.1, param_groups=rules, schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 16)
    )
    make_trainer([callback], max_epochs=2).fit(Net(), batches(8))
    assert 1 <= len(asked) <= 4
