from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_optim as lo
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
    read_events,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Step .* skipped"),
    pytest.mark.filterwarnings("ignore:Resumed on the old curve"),  # runs that are prolonged, see test_on_resume
]


def _parts(kind="ours"):
    return [
        lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.05, weight_decay=0.1, schedule="cosine", warmup="20%"),
        lo.GradientClipping(0.5),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
    ]


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize(("accumulate", "at", "done"), [(1, 4, 4), (1, 13, 13), (3, 2, 6), (3, 6, 16)])
@pytest.mark.parametrize("bad", [None, 2])
def test_a_resumed_run_goes_on_with_the_next_batch_and_ends_bit_equal(
    tmp_path, logger, kind, accumulate, at, done, bad
):
    path = tmp_path / "middle.ckpt"
    nan_batches = [] if bad is None else [bad]

    def fit(loader, extra=(), logger=False, ckpt_path=None):
        model, parts, recorder = Net(nan_batches), _parts(kind), Recorder()
        trainer = make_trainer(
            [*parts, recorder, *extra], max_epochs=2, accumulate_grad_batches=accumulate, logger=logger
        )
        trainer.fit(model, loader, ckpt_path=ckpt_path)
        state = (dict(model.state_dict()), trainer.optimizers[0].state_dict())
        scheduler = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        return state, scheduler, recorder.rates, parts[2].skipped_steps

    whole = fit(StatefulLoader(10, []), [SaveAt(at, path)])
    seen: list[int] = []
    rest = fit(StatefulLoader(10, seen), logger=logger, ckpt_path=path)
    assert seen == [batch % 10 for batch in range(done, 20)]
    assert bit_equal(rest[0], whole[0])
    assert rest[1] == whole[1]
    assert rest[2] == whole[2][len(whole[2]) - len(rest[2]) :]
    assert rest[3] == whole[3]
    assert len(rest[2]) > 0
    assert min(step for step, _ in read_events(logger.log_dir)["optim_lr/default"]) == at


def test_checkpoints_load_with_weights_only(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer([*_parts(), save], enable_checkpointing=True, max_epochs=1)
    trainer.fit(Net(nan_batches=[1]), batches(4))
    for file in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint["lightning_optim"] == {"counts": [[4, checkpoint["lightning_optim"]["counts"][0][1], 1]]}
        assert checkpoint["lr_schedulers"][0]["last_epoch"] == 3
        assert {group["name"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {"no_decay", "default"}
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


@pytest.mark.parametrize("after_the_fit", [False, True])
def test_counts_go_on(tmp_path, after_the_fit):
    trainer = make_trainer([*_parts(), SaveAt(4, tmp_path / "a.ckpt")])
    trainer.fit(Net(nan_batches=[1, 2]), batches(4))
    if after_the_fit:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    parts = _parts()
    make_trainer([*parts, SaveAt(8, tmp_path / "b.ckpt")], max_epochs=2).fit(
        Net(nan_batches=[0]), batches(4), ckpt_path=tmp_path / "a.ckpt"
    )
    assert parts[2].skipped_steps == 3
    counts = torch.load(tmp_path / "b.ckpt", weights_only=True)["lightning_optim"]["counts"]
    assert [(steps, skipped) for steps, _, skipped in counts] == [(8, 3)]


def test_the_first_clip_rate_after_a_resume_is_since_the_resume(logger, tmp_path):
    class Quiet(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1e-6 if self.current_epoch else 1e3)

    make_trainer([*_parts(), SaveAt(4, tmp_path / "a.ckpt")]).fit(Quiet(), batches(4))
    make_trainer(_parts(), logger=logger, max_epochs=2).fit(Quiet(), batches(4), ckpt_path=tmp_path / "a.ckpt")
    assert read_events(logger.log_dir)["optim_health/clip_rate"] == [(step, 0.0) for step in range(4, 8)]


def test_a_checkpoint_resumes_under_other_callbacks_of_ours(tmp_path):
    trainer = make_trainer(_parts())
    trainer.fit(Net(), batches(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    parts = _parts()
    finals = []
    for others in ([parts[0], lo.RunSummary()], parts[:1]):
        model, trainer = Net(), make_trainer(others, max_epochs=2)
        trainer.fit(model, batches(4), ckpt_path=tmp_path / "a.ckpt")
        assert trainer.global_step == 8
        finals.append(dict(model.state_dict()))
    assert bit_equal(*finals)


def test_a_checkpoint_made_without_us_resumes_with_us(tmp_path):
    def own():
        return NetWith(lambda module: torch.optim.AdamW(module.parameters(), lr=0.01))

    trainer = make_trainer()
    trainer.fit(own(), batches(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    guard = lo.DivergenceGuard()
    resumed = make_trainer([lo.GradientClipping(0.5), guard, lo.OptimizerMonitor()], max_epochs=2)
    resumed.fit(own(), batches(4), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 8


def test_a_checkpoint_made_with_us_loads_without_us(tmp_path):
    class Own(Net):
        def configure_optimizers(self):
            return lo.OptimizerFactory("adamw", lr=0.01, schedule="cosine")(self)

    recorder = Recorder()
    trainer = make_trainer([lo.GradientClipping(0.5), lo.DivergenceGuard()], max_epochs=1)
    trainer.fit(Own(), batches(4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make_trainer([recorder], max_epochs=2).fit(Own(), batches(4), ckpt_path=tmp_path / "a.ckpt")
    assert len(recorder.rates) == 4
    Own.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_a_schedule_inside_a_module_resumes_at_its_place(tmp_path):
    def own():
        return NetWith(lo.OptimizerFactory("sgd", lr=1.0, schedule="linear"))

    whole = Recorder()
    make_trainer([whole, SaveAt(3, tmp_path / "a.ckpt")], max_epochs=2).fit(own(), StatefulLoader(4, []))
    rest = Recorder()
    make_trainer([rest], max_epochs=2).fit(own(), StatefulLoader(4, []), ckpt_path=tmp_path / "a.ckpt")
    assert [rates[0] for rates in whole.rates] == pytest.approx([1 - k / 8 for k in range(8)])
    assert rest.rates == whole.rates[3:]
