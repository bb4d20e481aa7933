from __future__ import annotations

import builtins
from functools import partial

import lightning.pytorch as L
import pytest
import torch

import lightning_optim as lo
from lightning_optim.divergence import LRCut, Rollback
from tests.helpers import RULES, Net, TwoOptimizers, batches, bit_equal, make_trainer, precision


def _configure():
    return lo.ConfigureOptimizers("adamw", lr=0.01, weight_decay=0.2, schedule="cosine", param_groups=RULES)


def _lines(text, word):
    return [line for line in text.splitlines() if word in line]


def test_prints_metrics_speed_clips_skips_and_groups(capsys, logger):
    summary = lo.RunSummary({"val_loss": "validation loss"})
    parts = [_configure(), lo.GradientClipping(1e-9), lo.DivergenceGuard(), summary]
    with pytest.warns(UserWarning, match="skipped"):
        make_trainer(parts, logger=logger).fit(Net(nan_batches=[1]), batches(4), batches(2))
    out = capsys.readouterr().out
    assert len(_lines(out, "validation loss")) == 1
    assert _lines(out, "steps per second")
    assert "75.0% of 4" in _lines(out, "steps clipped")[0]
    assert "1" in _lines(out, "steps skipped")[0]
    assert "0.1" in _lines(out, "head")[0]
    assert "0.2" in _lines(out, "head")[0]
    assert _lines(out, "no_decay")
    assert _lines(out, "default")
    (line,) = _lines(out, "tensorboard --logdir")
    assert str(logger.save_dir) in line


def test_without_a_choice_every_logged_metric_is_shown(capsys):
    make_trainer([_configure(), lo.RunSummary()]).fit(Net(), batches(2), batches(2))
    out = capsys.readouterr().out
    assert _lines(out, "val_loss")
    assert "tensorboard" not in out


def test_a_metric_without_a_log_is_reported_as_not_logged(capsys):
    make_trainer([_configure(), lo.RunSummary({"val_los": "loss"})]).fit(Net(), batches(2))
    assert "not logged" in _lines(capsys.readouterr().out, "loss")[0]


@pytest.mark.filterwarnings("ignore:Step ")
@pytest.mark.parametrize("summary_first", [True, False])
@pytest.mark.parametrize("name", ["32-true", "16-mixed"])  # A GradScaler steps after the hook, not around it.
def test_it_shows_what_the_guard_did_and_the_rates_as_the_last_step_used_them(capsys, tmp_path, name, summary_first):
    guard = lo.DivergenceGuard(
        lr_cut=LRCut(0.5, steps=100), rollback=Rollback(every=5, clean=0, lr_factor=0.1), patience=2, cooldown=0
    )
    used = []

    class Rates(L.Callback):
        def on_train_start(self, trainer, pl_module):  # behind the cut
            trainer.optimizers[0].register_step_pre_hook(
                lambda optimizer, args, kwargs: used.append([group["lr"] for group in optimizer.param_groups])
            )

    parts = [lo.RunSummary({}), guard]
    parts = [*(parts if summary_first else reversed(parts)), _configure(), Rates()]
    trainer = make_trainer(parts, default_root_dir=tmp_path, **precision(name))
    trainer.fit(Net(nan_batches=range(70, 74)), batches(80))
    out = capsys.readouterr().out
    for label, value in {"rollbacks": "1", "cuts of the": "1", "steps skipped": "4", "score, loss": "0.000%"}.items():
        assert _lines(out, label)[0].split()[-2] == value
    head, no_decay, default = used[-1]
    assert head == pytest.approx(10 * default)
    for group, rate in {"head": head, "no_decay": no_decay, "default": default}.items():
        assert f"{rate:.3g}" in _lines(out, group)[0].split()


def test_without_a_guard_the_rate_is_that_of_the_last_step_and_nothing_is_said_of_a_guard(capsys):
    make_trainer([lo.RunSummary(), lo.ConfigureOptimizers("sgd", lr=1.0, schedule="linear")]).fit(Net(), batches(4))
    out = capsys.readouterr().out
    assert not _lines(out, "rollbacks")
    assert "0.25" in _lines(out, "default")[0].split()


def test_without_clipping_it_says_so_and_what_the_trainer_clips_is_not_counted(capsys):
    make_trainer([lo.RunSummary()]).fit(Net(), batches(2))
    assert _lines(capsys.readouterr().out, "steps clipped")[0].split()[-3:-1] == ["no", "clipping"]
    make_trainer([lo.RunSummary()], gradient_clip_val=0.5).fit(Net(), batches(2))
    assert "not counted: Trainer(norm 0.5)" in _lines(capsys.readouterr().out, "steps clipped")[0]


def test_clipped_steps_of_several_optimizers_are_those_of_each(capsys):
    make = partial(torch.optim.AdamW, lr=0.1)
    make_trainer([lo.RunSummary(), lo.GradientClipping({"0": 1e-9, "1": None})]).fit(
        TwoOptimizers(make, make), batches(4)
    )
    out = capsys.readouterr().out
    first, second = _lines(out, "steps clipped")
    assert "100.0% of 4" in first
    assert "no clipping" in second
    assert "of all optimizers" in _lines(out, "steps per second")[0]


def test_a_rate_that_is_a_tensor_is_shown(capsys):
    class OwnRate(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.125))

    make_trainer([lo.RunSummary(), lo.DivergenceGuard()]).fit(OwnRate(), batches(2))
    assert "0.125" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_run_without_a_step_is_summed_up_all_the_same(options, capsys):
    make_trainer([_configure(), lo.RunSummary()], **options).fit(Net(), batches(2))
    out = capsys.readouterr().out
    assert _lines(out, "steps clipped")[0].split()[-2] == "-"
    assert _lines(out, "steps skipped")[0].split()[-2] == "0"


def test_resuming_a_finished_run_is_harmless(tmp_path):
    trainer = make_trainer([_configure(), lo.RunSummary()])
    trainer.fit(Net(), batches(4))
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    model, again = Net(seed=1), make_trainer([_configure(), lo.RunSummary()])
    again.fit(model, batches(4), ckpt_path=tmp_path / "done.ckpt")
    assert again.global_step == 4
    assert bit_equal(dict(model.state_dict()), dict(trainer.lightning_module.state_dict()))


def test_without_rich_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-optim\[cli\]"):
        lo.RunSummary()
