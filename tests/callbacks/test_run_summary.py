from __future__ import annotations

import builtins

import pytest

import lightning_optim as lo
from tests.helpers import RULES, Net, batches, bit_equal, make_trainer


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
