"""What a run's page of TensorBoard holds beside scalars, read back from its event files."""

from __future__ import annotations

import re
from functools import partial

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

import lightning_optim as lo
from lightning_optim.callbacks._monitor.page import log_scalars
from lightning_optim.callbacks._monitor.schedule_image import group_rates, schedule_image
from lightning_optim.callbacks._monitor.settings import main_settings
from lightning_optim.core.durations import Horizon
from lightning_optim.diagnostics import tensorboard
from tests.distributed.monitor_fits import Drift, drifting
from tests.helpers import RULES, Net, NetWith, SaveAt, TwoOptimizers, batches, make_trainer, read_events


def _callbacks(schedule="cosine", **options):
    return [
        lo.ConfigureOptimizers(
            optimizer="adamw",
            lr=0.01,
            weight_decay=0.2,
            param_groups=RULES,
            schedule=schedule,
            warmup=None if schedule == "constant" else 2,
        ),
        lo.GradientClipping(1.0),
        lo.OptimizerMonitor(**options),
    ]


def _page(logger) -> EventAccumulator:
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def _hyperparameters(page: EventAccumulator) -> tuple:
    """The record of the experiment and that of the start of the session."""
    found = []
    for tag in ("experiment", "session_start_info"):
        data = plugin_data_pb2.HParamsPluginData.FromString(
            page.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        )
        found.append(getattr(data, tag))
    return tuple(found)


def _texts(page: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in page.Tensors(f"{tag}/text_summary")]


def _charts(page: EventAccumulator) -> dict[str, list[str]]:
    layout = layout_pb2.Layout()
    layout.ParseFromString(page.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    first, *of_groups = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in first.chart}
    return charts | {each.title: [tag for chart in each.chart for tag in chart.multiline.tag] for each in of_groups}


def test_the_screen_covers_all_tags_and_no_chart_is_empty(logger):
    make_trainer(_callbacks(), logger=logger, accumulate_grad_batches=2).fit(Net(), batches(12))
    page = _page(logger)
    tags = page.Tags()["scalars"]
    charts = _charts(page)
    assert next(iter(charts)) == "loss: training and validation"
    shown = {tag for patterns in charts.values() for p in patterns for tag in tags if re.search(p, tag)}
    assert {tag for tag in tags if tag.startswith(("optim_loss", "optim_lr", "optim_grad_norm/"))} <= shown
    for patterns in charts.values():
        for pattern in patterns:
            assert any(re.search(pattern, tag) for tag in tags), pattern


def test_the_screen_of_several_optimizers_shows_each_and_the_run_once(logger):
    make = partial(torch.optim.AdamW, lr=0.1)
    make_trainer([lo.DivergenceGuard(), lo.OptimizerMonitor()], logger=logger).fit(
        TwoOptimizers(make, make), batches(6)
    )
    page = _page(logger)
    tags = page.Tags()["scalars"]
    found = {title: {t for p in ps for t in tags if re.search(p, t)} for title, ps in _charts(page).items()}
    assert found["loss: training and validation"] == {"optim_loss/mean", "optim_loss/max"}
    assert found["gradient norm of each group"] == {"optim_grad_norm/0.0", "optim_grad_norm/1.0"}
    assert {"optim_grad_norm/0.total", "optim_grad_norm/1.total"} <= found["gradient norm"]
    guard = {"optim_health/rollbacks", "optim_health/lr_cut", "optim_health/lr_cuts"}
    assert found["the guard: rollbacks, and its cut of the rate"] == guard
    for title in (
        "effective rate",
        "cosine of gradient and momentum",
        "share of weight decay",
        "below eps, and exactly zero",
    ):
        assert {tag.split("/")[1].split(".")[0] for tag in found[title]} == {"0", "1"}, title
    assert found["clipped, skipped, not finite"] >= {"optim_health/0.skipped_steps", "optim_health/1.skipped_steps"}


def test_validation_is_in_the_first_chart_and_each_group_has_a_chart_of_its_own(logger):
    class Accurate(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_acc", 0.5)

    make_trainer(_callbacks(), logger=logger).fit(Accurate(), batches(4), batches(2))
    layout = layout_pb2.Layout()
    layout.ParseFromString(_page(logger).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    first, *others = layout.category
    assert list(first.chart[0].multiline.tag) == ["^val_loss$", "^optim_loss/(mean|max)$"]
    assert [chart.title for chart in first.chart[:2]] == [
        "loss: training and validation",
        "acc: training and validation",
    ]
    rates = next(category for category in others if category.title == "learning rate")
    found = {chart.title: list(chart.multiline.tag) for chart in rates.chart}
    assert found == {name: [f"^optim_lr/{name}$"] for name in ("default", "head", "no_decay")}


def test_the_image_of_the_schedule_has_each_group():
    head = lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10, schedule="linear")
    factory = lo.OptimizerFactory("adamw", lr=0.01, schedule="cosine", param_groups=[head, "no_decay"])
    _, scheduler = factory.build(Net(), Horizon(total_steps=10))
    rates = group_rates(scheduler, scheduler.horizon)
    assert {name: rate(0) for name, rate in rates.items()} == {"head": 0.1, "no_decay, default": 0.01}
    assert rates["head"](5) == pytest.approx(0.05)
    assert schedule_image(scheduler, scheduler.horizon, 3).shape[2] == 3


@pytest.mark.filterwarnings("ignore:Resumed on the old curve")
def test_the_screen_is_the_same_after_a_resume(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0")
    trainer = make_trainer(_callbacks("constant"), logger=logger, max_steps=4)
    trainer.fit(Net(), batches(8))
    first = _charts(_page(logger))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    again = TensorBoardLogger(tmp_path, name="run", version="0")
    make_trainer(_callbacks("constant"), logger=again, max_steps=8).fit(
        Net(), batches(8), ckpt_path=tmp_path / "last.ckpt"
    )
    assert _charts(_page(again)) == first


@pytest.mark.filterwarnings("ignore:Resumed on the old curve")
def test_points_after_the_step_of_a_resume_are_forgotten(tmp_path):
    """Eight steps, then from the checkpoint of the fourth again, on other data: each step has one point, the new."""
    trainer = make_trainer(_callbacks("constant"), logger=False, max_steps=4)
    trainer.fit(Net(), batches(8))
    trainer.save_checkpoint(tmp_path / "four.ckpt", weights_only=False)
    points = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        logger = TensorBoardLogger(tmp_path, name="run", version="0")
        data = batches(8, scale=1 + seed)
        options = {"ckpt_path": tmp_path / "four.ckpt"} if seed else {}
        make_trainer(_callbacks("constant"), logger=logger, max_steps=8).fit(Net(), data, **options)
        points.append(read_events(logger.log_dir)["optim_loss/mean"])
    before, after = points
    assert [step for step, _ in before] == [step for step, _ in after] == list(range(8))
    assert after[:4] == before[:4]
    assert all(new != old for new, old in zip(after[4:], before[4:], strict=True))


def test_the_last_point_before_a_checkpoint_within_an_epoch_stays(tmp_path, monkeypatch, logger):
    """Lightning corrects the step of such a checkpoint only when the first batch begins."""
    purged = []
    monkeypatch.setattr(tensorboard, "purge_from", lambda writer, step: purged.append(step))
    save = SaveAt(4, tmp_path / "four.ckpt")
    make_trainer([*_callbacks("constant"), save], max_steps=4).fit(Net(), batches(8))
    trainer = make_trainer(_callbacks("constant"), logger=logger, max_steps=8)
    trainer.fit(Net(), batches(8), ckpt_path=tmp_path / "four.ckpt")
    assert purged == [read_events(logger.log_dir)["optim_loss/mean"][0][0]] == [4]


def test_groups_and_configuration_are_tables(logger):
    make_trainer(_callbacks(), logger=logger).fit(Net(), batches(4))
    page = _page(logger)
    ((step, groups),) = _texts(page, "optim/groups")
    assert step == 0
    assert "| head | 2 | 18 | 0.1 | 0.2 | adamw |" in groups
    ((_, configuration),) = _texts(page, "optim/configuration")
    for line in ("optim/optimizer | AdamW", "optim/lr | 0.01", "optim/schedule", "optim/clipping | GlobalNorm("):
        assert line in configuration


def test_gradients_that_are_not_finite_are_in_a_log(logger):
    make_trainer(_callbacks(), logger=logger).fit(Net(nan_batches=[2]), batches(6))
    ((step, text),) = _texts(_page(logger), "optim/alarms")
    assert step == 2
    assert "Step 2: 6 gradients are not finite, the first that of `head.weight`." in text


def test_advice_on_the_batch_is_given_once(logger):
    monitor = lo.OptimizerMonitor()
    trainer = make_trainer([monitor], logger=logger, accumulate_grad_batches=2)
    trainer.fit(Drift(), drifting(200, spread=0.05, batch_size=2))
    ((step, text),) = _texts(_page(logger), "optim/advice")
    assert step >= 19
    assert monitor.advice == [text]
    assert text.startswith("The batch of 4 samples is far above the gradient noise scale (about 0.0")


@pytest.mark.pictures
def test_the_schedule_is_drawn_at_its_start_and_end(logger):
    make_trainer(_callbacks(), logger=logger).fit(Net(), batches(6))
    images = _page(logger).Images("optim/schedule")
    assert [image.step for image in images] == [0, 6]
    assert images[0].width > 400
    assert images[0].encoded_image_string != images[1].encoded_image_string


@pytest.mark.pictures
def test_in_a_long_run_the_schedule_is_drawn_now_and_then(logger, monkeypatch):
    monkeypatch.setattr("lightning_optim.callbacks._monitor.page.REDRAW_SECONDS", 0.0)
    monkeypatch.setattr("lightning_optim.callbacks._monitor.page.REDRAW_SHARE", 0.5)
    make_trainer(_callbacks(), logger=logger).fit(Net(), batches(12))
    assert [image.step for image in _page(logger).Images("optim/schedule")] == [0, 6, 12]


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_runs_are_compared_by_a_real_metric(tmp_path, default_hp_metric):
    class Own(Net):
        def __init__(self, width: int = 3):
            super().__init__()
            self.save_hyperparameters()

    logger = TensorBoardLogger(tmp_path, name="run", version="0", default_hp_metric=default_hp_metric)
    make_trainer(_callbacks(hp_metrics=["val_loss"]), logger=logger).fit(Own(), batches(4), batches(2))
    page = _page(logger)
    found = {}
    for tag in ("experiment", "session_start_info"):
        content = page.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        found[tag] = plugin_data_pb2.HParamsPluginData.FromString(content)
    metrics = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert metrics == ["val_loss", "hp_metric"][: 1 + default_hp_metric]
    assert page.Scalars("val_loss")
    hparams = found["session_start_info"].session_start_info.hparams
    assert hparams["width"].number_value == 3
    assert hparams["optim/lr"].number_value == 0.01
    assert metadata.PLUGIN_NAME == "hparams"


class LogsItself(Net):
    """Logs hyperparameters with a metric of its own, as Lightning documents it."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()

    def on_train_start(self):
        self.logger.log_hyperparams(self.hparams, {"hp/accuracy": 0.0})


def test_hyperparameters_of_the_user_and_ours_are_one_record_with_the_users_metric_first(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0", default_hp_metric=False)
    make_trainer(_callbacks(), logger=logger).fit(LogsItself(), batches(4))
    experiment, session = _hyperparameters(_page(logger))
    assert [info.name.tag for info in experiment.metric_infos] == ["hp/accuracy", "optim_loss/mean"]
    assert session.hparams["width"].number_value == 3
    assert session.hparams["optim/lr"].number_value == 0.01
    assert {"width", "optim/lr"} <= {info.name for info in experiment.hparam_infos}
    assert "add_summary" not in vars(logger.experiment._get_file_writer())


def test_the_first_columns_of_the_page_of_hyperparameters_are_what_runs_differ_in(logger):
    make_trainer([*_callbacks(), lo.DivergenceGuard()], logger=logger).fit(Net(), batches(4))
    infos = _hyperparameters(_page(logger))[0].hparam_infos
    as_shown = sorted((not info.differs, info.name) for info in infos)  # TensorBoard's order
    first = ["optim/clipping", "optim/lr", "optim/optimizer", "optim/schedule", "optim/weight_decay"]
    assert [name for _, name in as_shown[:5]] == first
    assert "optim/lr" in sorted(info.name for info in infos)[:5]


def test_what_the_user_logged_stays_if_training_never_begins(tmp_path):
    class Fails(LogsItself):
        def on_train_epoch_start(self):
            raise KeyError("own")

    logger = TensorBoardLogger(tmp_path, name="run", version="0", default_hp_metric=False)
    with pytest.raises(KeyError, match="own"):
        make_trainer(_callbacks(), logger=logger).fit(Fails(), batches(4))
    logger.save()
    experiment, session = _hyperparameters(_page(logger))
    assert [info.name.tag for info in experiment.metric_infos] == ["hp/accuracy"]
    assert session.hparams["width"].number_value == 3


def test_without_metrics_of_ours_the_page_of_hyperparameters_is_the_users(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="0", default_hp_metric=False)
    make_trainer(_callbacks(hp_metrics=[]), logger=logger).fit(Net(), batches(2))
    logger.log_hyperparams({"width": 3}, {"test_accuracy": 0.5})
    logger.save()
    assert [info.name.tag for info in _hyperparameters(_page(logger))[0].metric_infos] == ["test_accuracy"]


def test_settings_are_those_of_the_optimizers_there_are(tmp_path):
    class Ordered(CSVLogger):
        def log_hyperparams(self, params=None):
            given.append(list(params))
            super().log_hyperparams(params)

    given = []
    logger = Ordered(tmp_path, name="run", version="0")
    make = partial(torch.optim.AdamW, lr=0.125)
    clip = lo.GradientClipping({"0": 0.5, "1": None})
    make_trainer([clip, lo.OptimizerMonitor()], logger=logger).fit(TwoOptimizers(make, make), batches(2))
    logger.save()
    found = yaml.safe_load((tmp_path / "run" / "0" / "hparams.yaml").read_text())
    assert given[-1][:3] == ["optim/0/lr", "optim/0/optimizer", "optim/0/weight_decay"]
    assert (found["optim/0/lr"], found["optim/1/optimizer"], found["optim/1/schedule"]) == (0.125, "AdamW", "constant")
    assert (found["optim/0/clipping"], found["optim/1/clipping"]) == ("GlobalNorm(max_norm=0.5)", "none")
    assert (found["optim/guard"], found["trainer/batch_size"]) == ("none", 2)


def test_settings_of_an_optimizer_without_a_rate_are_those_it_has():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    assert main_settings(optimizer) == {"lr": 0.1, "optimizer": "SGD", "weight_decay": 0.0}
    for group in optimizer.param_groups:
        del group["lr"], group["weight_decay"]
    assert main_settings(optimizer) == {"lr": None, "optimizer": "SGD", "weight_decay": None}


def test_the_rate_of_muon_is_not_that_of_what_it_leaves_to_adamw():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer, _ = lo.OptimizerFactory("muon", lr=0.03).build(net)
    assert len(optimizer.param_groups[0]["params"]) > 1
    assert main_settings(optimizer)["lr"] == 0.03


def test_a_logger_that_takes_no_hyperparameters_costs_a_warning(tmp_path):
    class Refuses(CSVLogger):
        def log_hyperparams(self, params=None):
            raise RuntimeError("changed value of a parameter")

    trainer = make_trainer([lo.OptimizerMonitor()], logger=Refuses(tmp_path))
    with pytest.warns(UserWarning, match="Refuses has not taken the settings of the optimizer.*changed value"):
        trainer.fit(Net(), batches(2))
    assert trainer.global_step == 2


def test_scalars_are_one_record(logger, monkeypatch):
    written = []
    writer = logger.experiment._get_file_writer()
    monkeypatch.setattr(writer, "add_summary", lambda summary, step: written.append((step, len(summary.value))))
    log_scalars(logger, {"a/b": 1.0, "a/c": 2.0}, 7)
    assert written == [(7, 2)]


def test_a_logger_of_ones_own_gets_what_log_metrics_gets(tmp_path):
    class Own(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics({f"mine/{key}": value for key, value in metrics.items()}, step)

    own, prefixed = Own(tmp_path, name="own"), TensorBoardLogger(tmp_path, name="prefixed", prefix="p")
    for logger in (own, prefixed):
        log_scalars(logger, {"a": 1.0}, 0)
        logger.save()
    assert list(read_events(own.log_dir)) == ["mine/a"]
    assert list(read_events(prefixed.log_dir)) == ["p-a"]


class Counted(torch.optim.AdamW):
    """Draws random numbers in its steps, and must not be made or stepped by anybody else."""

    made = steps = 0

    def __init__(self, *args, **kwargs):
        type(self).made += 1
        super().__init__(*args, **kwargs)

    def step(self, closure=None):
        type(self).steps += 1
        loss = super().step(closure)
        torch.rand(1)
        return loss


def test_the_table_of_groups_makes_and_steps_no_optimizer_and_is_filled_in_from_the_real_state(logger):
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # from now on torch calls hooks within super().step(), too
    Counted.made = Counted.steps = 0
    model = NetWith(lambda module: Counted(module.parameters(), lr=0.1))
    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(model, batches(4))
    assert (Counted.made, Counted.steps) == (1, 4)
    (_, before), (step, after) = _texts(_page(logger), "optim/groups")
    numel = sum(p.numel() for p in Net().parameters())
    assert "| after the first step |" in before
    assert step <= 2
    assert f"| {8 * numel + 4 * 6} B |" in after  # two moments, and a step count for each of six tensors


def test_the_state_of_ours_is_told_before_it_is_made(logger, monkeypatch):
    sizes, original = [], torch.zeros_like

    def zeros_like(param, *args, **kwargs):
        sizes.append((param.device.type, kwargs.get("dtype")))
        return original(param, *args, **kwargs)

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                assert {device for device, _ in sizes} == {"meta"}
                assert not trainer.optimizers[0].state

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    make_trainer([*_callbacks(), Looks()], logger=logger).fit(Net(), batches(2))
    ((_, groups),) = _texts(_page(logger), "optim/groups")
    assert "| head | 2 | 18 | 0.1 | 0.2 | adamw | 152 B |" in groups
