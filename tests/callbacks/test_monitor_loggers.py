"""The monitor under loggers of other packages, run for real, without a network."""

from __future__ import annotations

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

import lightning_optim as lo
from tests.helpers import Net, batches, make_trainer

STEPS = 4
TAGS = ("optim_grad_norm/total", "optim_lr/default", "optim_loss/mean", "optim_health/clip_rate")


def _fit(logger) -> lo.OptimizerMonitor:
    monitor = lo.OptimizerMonitor()
    make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01), monitor], logger=logger).fit(Net(), batches(STEPS))
    return monitor


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p", settings=wandb.Settings(console="off"))
    monitor = _fit(logger)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    for tag in TAGS:
        assert summary[tag] == pytest.approx(monitor.latest[tag])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"optim_grad_norm/total" in file.read_bytes()


def test_mlflow_in_local_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("e", tracking_uri=f"file:{tmp_path / 'runs'}")
    monitor = _fit(logger)
    for tag in TAGS:
        history = logger.experiment.get_metric_history(logger.run_id, tag)
        assert [point.step for point in history] == list(range(STEPS)), tag
        assert history[-1].value == pytest.approx(monitor.latest[tag])
