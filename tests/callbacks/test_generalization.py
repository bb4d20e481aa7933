"""The gap between validation and training of a real run, and the advice where they part."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo
from lightning_optim.diagnostics.generalization import Generalization, Look
from tests.helpers import Net, batches, make_trainer, read_events


class Scripted(Net):
    """Logs what a test says, epoch by epoch.

    Args:
        validation: Values by name of a metric of validation.
        training: The same of training, logged for each epoch.
    """

    def __init__(self, validation: dict[str, list[float]], training: dict[str, list[float]]) -> None:
        super().__init__()
        self.validation, self.training_values = validation, training

    def training_step(self, batch, batch_idx):
        for name, values in self.training_values.items():
            self.log(name, values[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        for name, values in self.validation.items():
            self.log(name, values[self.current_epoch])


def _fit(model: L.LightningModule, logger, epochs: int = 6) -> lo.OptimizerMonitor:
    monitor = lo.OptimizerMonitor()
    make_trainer([monitor], logger=logger, max_epochs=epochs, num_sanity_val_steps=2).fit(model, batches(2), batches(1))
    return monitor


def test_the_gap_of_each_metric_is_that_of_the_same_epoch_and_positive_where_validation_is_worse(logger):
    model = Scripted(
        {"val_loss": [1.0, 0.75, 0.5], "val/acc": [0.25, 0.5, 0.5], "val_temperature": [3.0, 3.0, 3.0]},
        {"train_loss": [1.0, 0.5, 0.125], "train/acc": [0.5, 0.75, 1.0]},
    )
    monitor = _fit(model, logger, epochs=3)
    found = read_events(logger.log_dir)
    assert [value for _, value in found["optim_generalization_gap/loss"]] == [0.0, 0.25, 0.375]
    assert [value for _, value in found["optim_generalization_gap/acc"]] == [0.25, 0.25, 0.5]
    steps = [[step for step, _ in found[tag]] for tag in ("optim_generalization_gap/loss", "val_loss")]
    assert steps[0] == steps[1]  # where Lightning puts the metrics of the same validation
    assert not [tag for tag in found if "temperature" in tag and tag.startswith("optim")]
    assert monitor.advice == []


@pytest.mark.parametrize("validation", ["val_loss", "valid/acc"])
def test_advice_is_given_once_when_validation_gets_worse_while_training_gets_better(logger, validation):
    losses = [1.0, 0.5, 0.625, 0.75, 0.875, 1.0], [1.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    values, training = losses if "loss" in validation else [[1 - value for value in curve] for curve in losses]
    name = "train_loss" if "loss" in validation else "train/acc"
    monitor = _fit(Scripted({validation: values}, {name: training}), logger)
    (advice,) = monitor.advice
    assert advice.startswith(f"{validation} has {'risen' if 'loss' in validation else 'fallen'} from 0.5 (step 3) to ")
    for remedy in ("EarlyStopping", "weight decay (it is 0)", "dropout", "augmented data"):
        assert remedy in advice


def test_without_a_logged_training_loss_the_monitors_own_is_taken(logger):
    class Silent(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(5.0))

    _fit(Silent(), logger, epochs=2)
    found = read_events(logger.log_dir)
    means = [value for _, value in found["optim_loss/mean"]]
    gaps = [value for _, value in found["optim_generalization_gap/loss"]]
    assert gaps == pytest.approx([5 - sum(means[:2]) / 2, 5 - sum(means[2:]) / 2], rel=1e-5)


def test_values_of_single_batches_are_averaged_over_the_time_since_the_last_validation(tmp_path):
    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", float(batch_idx))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 10.0)

    logger = TensorBoardLogger(tmp_path)
    make_trainer([lo.OptimizerMonitor()], logger=logger).fit(Noisy(), batches(9), batches(1))
    ((_, gap),) = read_events(logger.log_dir)["optim_generalization_gap/loss"]
    assert gap == pytest.approx(10 - 3.5, abs=0.51)  # the metrics of a step are seen at the next one


@pytest.mark.parametrize(
    "looks",
    [
        [(1.0, 1.0), (0.5, 0.5), (0.502, 0.4), (0.503, 0.3), (0.504, 0.2)],  # a plateau
        [(1.0, 1.0), (0.5, 0.5), (0.7, 0.6), (0.8, 0.7), (0.9, 0.8)],  # both get worse: no overfitting
        [(1.0, 1.0), (0.5, 0.5), (0.7, 0.4), (0.45, 0.3), (0.6, 0.2), (0.44, 0.1)],  # it recovers
        [(1.0, 1.0), (0.5, 0.5), (0.9, 0.4), (0.8, 0.3), (0.6, 0.2)],  # on its way back
        [(1.0, 1.0), (0.5, 0.5), (float("nan"), 0.4), (0.6, 0.3), (0.7, 0.2)],
    ],
)
def test_no_advice_without_a_reason(looks):
    watch = Generalization(patience=3)
    found = [watch.update("val_loss", "loss", Look(step, *look)) for step, look in enumerate(looks)]
    assert found == [None] * len(looks)


def test_advice_returns_after_a_new_best():
    watch = Generalization(patience=2)
    looks = [(1.0, 1.0), (1.1, 0.9), (1.2, 0.8), (1.3, 0.7), (0.9, 0.6), (1.0, 0.5), (1.1, 0.4)]
    found = [watch.update("val_loss", "loss", Look(step, *look)) for step, look in enumerate(looks)]
    assert [text is not None for text in found] == [False, False, True, False, False, False, True]


@pytest.mark.parametrize("patience", [0, -1, 2.5, True, "3"])
def test_a_patience_that_is_none_is_refused(patience):
    with pytest.raises(ValueError, match="Invalid overfitting_patience="):
        lo.OptimizerMonitor(overfitting_patience=patience)
