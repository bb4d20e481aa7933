"""The monitor under loggers of other packages, run for real, without a network."""

from __future__ import annotations

import json
import time
import zipfile

import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

import lightning_optim as lo
from lightning_optim.callbacks._boards import TensorBoardBoard
from lightning_optim.diagnostics import Histograms, PerTensor
from tests.helpers import Net, batches, make_trainer

STEPS = 4
TAGS = ("optim_grad_norm/total", "optim_lr/default", "optim_loss/mean", "optim_health/clip_rate")


DETAILS = {"per_tensor": PerTensor(heat_maps=["grad_norm"], every=2), "histograms": Histograms(["grad"], every=2)}
ALARM = "Step 2: 6 gradients are not finite, the first that of `body.bias`."


def _steps(tag: str) -> list[int]:
    """The steps of a tag: a loss that is not a number makes no point."""
    return [step for step in range(STEPS) if step != 2 or tag != "optim_loss/mean"]


def _fit(logger, folder) -> lo.OptimizerMonitor:
    """Four steps, the third with a gradient that is not finite, and all details."""
    monitor = lo.OptimizerMonitor(**DETAILS)
    guard = lo.DivergenceGuard(report_dir=str(folder))
    parts = [lo.ConfigureOptimizers("adamw", lr=0.01, schedule="cosine"), guard, monitor]
    with pytest.warns(UserWarning, match="Step 2 skipped"):
        make_trainer(parts, logger=logger).fit(Net(nan_batches=[2]), batches(STEPS))
    assert monitor.alarms == [ALARM]
    return monitor


@pytest.mark.pictures
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p", settings=wandb.Settings(console="off"))
    monitor = _fit(logger, tmp_path / "guard")
    summary = dict(logger.experiment.summary)
    config = dict(logger.experiment.config)
    histogram = summary["optim_grad/histogram/default"]
    wandb.finish()
    for tag in ("optim/groups", "optim/tensors", "optim/alarms", "optim_health/divergence"):
        assert summary[tag]["_type"] == "table-file", tag
    assert summary["optim/tensors/grad_norm"]["_type"] == summary["optim/schedule"]["_type"] == "image-file"
    assert (histogram["_type"], len(histogram["bins"])) == ("histogram", len(histogram["values"]) + 1)
    assert sum(histogram["values"]) == 8 * 4 + 8 * 2
    (alarms,) = tmp_path.glob("wandb/offline-run-*/files/media/table/optim/alarms_*.table.json")
    assert json.loads(alarms.read_text())["data"][0] == ["2", ALARM]
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
    monitor = _fit(logger, tmp_path / "guard")
    data = logger.experiment.get_run(logger.run_id).data
    params = data.params
    artifacts = tmp_path / "runs" / logger.experiment_id / logger.run_id / "artifacts"
    table = json.loads((artifacts / "optim" / "groups" / "step_00000000.json").read_text())
    assert (table["columns"][0], [row[0] for row in table["data"]]) == ("group", ["no_decay", "default"])
    assert (artifacts / "optim" / "tensors" / "step_00000003.json").exists()
    histogram = json.loads((artifacts / "optim_grad" / "histogram" / "default" / "step_00000000.json").read_text())
    assert sum(histogram["count"]) == 8 * 4 + 8 * 2
    assert len(list((artifacts / "images").glob("optim*tensors*grad_norm*.png"))) == 2
    assert (data.tags["optim/alarms"], (artifacts / "optim" / "alarms.md").read_text()) == (ALARM, f"Step 2: {ALARM}")
    assert (params["optim/lr"], params["optim/optimizer"], params["optim/clipping"]) == ("0.01", "AdamW", "none")
    for tag in TAGS:
        history = logger.experiment.get_metric_history(logger.run_id, tag)
        assert [point.step for point in history] == _steps(tag), tag
        assert history[-1].value == pytest.approx(monitor.latest[tag])


@pytest.mark.pictures
def test_comet_in_an_archive(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    # Not `CometLogger(online=False)`, which Lightning 2.6 makes a disabled experiment, that writes nothing.
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    quiet = dict.fromkeys(
        ("log_code", "log_graph", "log_git_metadata", "log_env_details", "auto_output_logging"), False
    )
    logger = CometLogger(project="p", offline_directory=str(tmp_path), display_summary_level=0, **quiet)
    monitor = _fit(logger, tmp_path / "guard")
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = [json.loads(line) for line in files.read("messages.json").splitlines()]
    points = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
    tables = {upload["additional_params"].get("fileName") for upload in uploads if upload["upload_type"] == "asset"}
    assert {"optim_groups_step_00000000.csv", "optim_tensors_step_00000003.csv"} <= tables
    pictures = [upload["additional_params"].get("figName") for upload in uploads]
    assert pictures.count("optim/tensors/grad_norm") == pictures.count("optim/schedule") == 2
    kinds = [(upload["upload_type"], upload["additional_params"].get("fileName")) for upload in uploads]
    assert kinds.count(("histogram3d", "optim_grad/histogram/default")) == 2
    others = [message["payload"] for message in messages if message["type"] == "log_other"]
    assert [other["value"] for other in others if other["key"] == "optim/alarms"] == [ALARM]
    params = [message["payload"]["param"] for message in messages if message["type"] == "parameter_msg"]
    assert {"optim/lr", "optim/schedule"} <= {param["paramName"] for param in params}
    for tag in TAGS:
        found = {point["step"]: point["metricValue"] for point in points if point["metricName"] == tag}
        assert sorted(found) == _steps(tag), tag
        assert found[STEPS - 1] == pytest.approx(monitor.latest[tag])


def test_a_logger_of_scalars_is_named_once_with_what_it_does_not_get(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        monitor = lo.OptimizerMonitor(**DETAILS)
        make_trainer([monitor], logger=CSVLogger(tmp_path)).fit(Net(), batches(STEPS))
    (said,) = [record.getMessage() for record in caplog.records if "nothing of" in record.getMessage()]
    assert said.startswith("CSVLogger gets the scalars of OptimizerMonitor, but nothing of per_tensor and histograms: ")


def test_without_details_nothing_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        make_trainer([lo.OptimizerMonitor()], logger=CSVLogger(tmp_path)).fit(Net(), batches(STEPS))
    assert "nothing of" not in caplog.text


def test_what_a_logger_cannot_show_costs_one_warning(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("no space")

    monkeypatch.setattr(TensorBoardBoard, "histogram", fails)
    trainer = make_trainer([lo.OptimizerMonitor(histograms=Histograms(every=1))], logger=TensorBoardLogger(tmp_path))
    with pytest.warns(UserWarning, match="histogram") as warned:
        trainer.fit(Net(), batches(STEPS))
    about = [str(warning.message) for warning in warned if "histogram" in str(warning.message)]
    assert len(about) == 1
    assert about[0].startswith(
        "A histogram cannot be shown by TensorBoardLogger: OSError: no space. Training continues"
    )
    assert trainer.global_step == STEPS
