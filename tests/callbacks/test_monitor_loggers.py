"""The monitor under loggers of other packages, run for real, without a network."""

from __future__ import annotations

import json
import time
import zipfile

import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger

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
    config = dict(logger.experiment.config)
    wandb.finish()
    assert (config["optim/lr"], config["optim/optimizer"], config["trainer/batch_size"]) == (0.01, "AdamW", 2)
    for tag in TAGS:
        assert summary[tag] == pytest.approx(monitor.latest[tag])
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30
    while b"optim_grad_norm/total" not in file.read_bytes():  # written by a process of its own
        assert time.monotonic() < end
        time.sleep(0.1)


def test_mlflow_in_local_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("e", tracking_uri=f"file:{tmp_path / 'runs'}")
    monitor = _fit(logger)
    params = logger.experiment.get_run(logger.run_id).data.params
    assert (params["optim/lr"], params["optim/optimizer"], params["optim/guard"]) == ("0.01", "AdamW", "none")
    for tag in TAGS:
        history = logger.experiment.get_metric_history(logger.run_id, tag)
        assert [point.step for point in history] == list(range(STEPS)), tag
        assert history[-1].value == pytest.approx(monitor.latest[tag])


def test_comet_in_an_archive(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    # Not `CometLogger(online=False)`, which Lightning 2.6 makes a disabled experiment, that writes nothing.
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    quiet = dict.fromkeys(
        ("log_code", "log_graph", "log_git_metadata", "log_env_details", "auto_output_logging"), False
    )
    logger = CometLogger(project="p", offline_directory=str(tmp_path), display_summary_level=0, **quiet)
    monitor = _fit(logger)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = [json.loads(line) for line in files.read("messages.json").splitlines()]
    points = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    params = [message["payload"]["param"] for message in messages if message["type"] == "parameter_msg"]
    assert {"optim/lr", "optim/schedule"} <= {param["paramName"] for param in params}
    for tag in TAGS:
        found = {point["step"]: point["metricValue"] for point in points if point["metricName"] == tag}
        assert sorted(found) == list(range(STEPS)), tag
        assert found[STEPS - 1] == pytest.approx(monitor.latest[tag])
