from __future__ import annotations

import itertools

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

import lightning_optim as lo
from lightning_optim.schedules import Cosine
from tests.helpers import ADAMWS, BareNet, Net, Ramp, Recorder, batches, make_trainer
from tests.schedules.cases import cosine


def _fit(model, *callbacks, count=20, **options):
    recorder = Recorder()
    trainer = make_trainer([*callbacks, recorder], **options)
    trainer.fit(model, batches(count))
    return trainer, recorder


@pytest.mark.parametrize("kind", ADAMWS)
def test_rates_used_equal_the_closed_form_at_every_step(kind):
    configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.3, schedule="cosine", warmup="10%")
    trainer, recorder = _fit(Net(), configure, max_epochs=2)
    (optimizer,) = trainer.optimizers
    assert type(optimizer).__name__ == "AdamW"
    assert isinstance(optimizer, torch.optim.AdamW) is (kind != "ours")
    if kind != "ours":
        assert all(bool(group["fused"]) is (kind == "torch-fused") for group in optimizer.param_groups)
    expected = [0.3 * cosine(step, 40, 4) for step in range(40)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)
    assert [rates[1] for rates in recorder.rates] == pytest.approx(expected)
    assert recorder.rates[0][0] == pytest.approx(0.3 / 4)  # 1 / warmup steps of the peak, never all of it


@pytest.mark.parametrize("inside", [False, True], ids=["callback", "module"])
def test_weights_move_by_the_closed_form(inside):
    options = {"lr": 0.5, "schedule": Cosine(warmup="10%", final=0.1)}

    class OwnFactory(Ramp):
        def configure_optimizers(self):
            return lo.OptimizerFactory("sgd", **options)(self)

    if inside:
        _, recorder = _fit(OwnFactory())
    else:
        _, recorder = _fit(Ramp(), lo.ConfigureOptimizers("sgd", **options))
    path = [0.0, *(weights[0].item() for weights in recorder.weights)]
    moved = [before - after for before, after in itertools.pairwise(path)]
    assert moved == pytest.approx([0.5 * cosine(step, 20, 2, 0.1) for step in range(20)], abs=1e-12)


def test_the_modules_own_optimizer_is_not_asked():
    class Refusing(Net):
        def configure_optimizers(self):
            raise AssertionError("asked")

    _fit(Refusing(), lo.ConfigureOptimizers("sgd", lr=0.1))


def test_groups_reach_the_optimizer_with_names_rates_and_decay():
    configure = lo.ConfigureOptimizers(
        "adamw",
        lr=0.01,
        weight_decay=0.2,
        param_groups=[lo.ParamGroupRule(name="head", pattern=r"^head\.", lr_multiplier=10), "no_decay"],
    )
    trainer, recorder = _fit(Net(), configure)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert list(groups) == ["head", "no_decay", "default"]
    assert groups["head"]["param_names"] == ["head.weight", "head.bias"]
    assert groups["no_decay"]["param_names"] == ["body.bias", "norm.weight", "norm.bias"]
    assert groups["default"]["param_names"] == ["body.weight"]
    assert [group["weight_decay"] for group in groups.values()] == [0.2, 0, 0.2]
    assert recorder.rates[0] == pytest.approx([0.1, 0.01, 0.01])


# Which parameters.


class Late(Net):
    """Makes a layer in configure_model, freezes another, ties two weights."""

    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(8, 8)
            self.late_tied = nn.Linear(8, 8)
            self.late_tied.weight = self.late.weight
            self.body.weight.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.body(x))
        return self.head(self.late_tied(self.late(x)))


def test_parameters_of_configure_model_are_in_frozen_ones_out_and_tied_ones_once():
    model = Late()
    frozen = model.body.weight.detach().clone()
    trainer, _ = _fit(model, lo.ConfigureOptimizers("adamw", lr=0.1, weight_decay=0.1))
    optimized = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(optimized) == sorted(trainable)
    assert len(set(optimized)) == len(optimized)
    assert id(model.late.weight) in optimized
    assert id(model.body.weight) not in optimized
    assert torch.equal(model.body.weight, frozen)


# Modules that define no configure_optimizers.


def test_a_module_without_one_works_once_attached():
    model = BareNet()
    configure = lo.ConfigureOptimizers("sgd", lr=0.1)
    lo.attach(model, configure)
    _, recorder = _fit(model, configure)
    assert len(recorder.rates) == 20


def test_a_module_without_one_works_with_a_factory_attached_and_no_callback():
    model = BareNet()
    lo.attach(model, lo.OptimizerFactory("sgd", lr=0.2, schedule="cosine"))
    _, recorder = _fit(model)
    assert [rates[0] for rates in recorder.rates] == pytest.approx([0.2 * cosine(step, 20) for step in range(20)])


def test_a_module_without_one_is_refused_with_both_ways_out():
    with pytest.raises(MisconfigurationException) as caught:
        _fit(BareNet(), lo.ConfigureOptimizers("sgd", lr=0.1))
    message = str(caught.value)
    assert "BareNet" in message
    assert "lightning_optim.attach(" in message
    assert "OptimCLI" in message


def test_other_misconfigurations_keep_lightnings_message():
    class NoTrainingStep(Net):
        training_step = L.LightningModule.training_step  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match="training_step"):
        _fit(NoTrainingStep(), lo.ConfigureOptimizers("sgd", lr=0.1))


def test_a_bare_module_with_another_mistake_keeps_lightnings_message_about_that():
    class Nothing(BareNet):
        training_step = L.LightningModule.training_step  # type: ignore[assignment]

    model = Nothing()
    with pytest.raises(MisconfigurationException, match="training_step"):
        _fit(model, lo.ConfigureOptimizers("sgd", lr=0.1))


def test_attaching_a_second_owner_is_refused_and_names_both():
    model = BareNet()
    lo.attach(model, lo.OptimizerFactory("sgd", lr=0.1))
    with pytest.raises(MisconfigurationException) as caught:
        lo.attach(model, lo.OptimizerFactory("adamw", lr=0.2))
    assert "SGD" in str(caught.value)
    assert "AdamW" in str(caught.value)


def test_an_attached_factory_beside_another_callback_is_refused_and_names_both():
    model = Net()
    lo.attach(model, lo.OptimizerFactory("sgd", lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"Two owners.*AdamW.*SGD"):
        _fit(model, lo.ConfigureOptimizers("adamw", lr=0.2))


# Optimizers given in other ways.


class Plain(Optimizer):
    """An optimizer that is neither torch's nor ours."""

    def __init__(self, params, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (Plain, {"lr": 0.4}),
        (lambda params: Plain(params, lr=0.4), {}),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.4}}, {}),
        ("torch.optim.SGD", {"lr": 0.4}),
    ],
    ids=["class", "callable", "class_path", "path"],
)
def test_any_optimizer_follows_the_schedule(given, options):
    _, recorder = _fit(Ramp(), lo.ConfigureOptimizers(given, schedule="linear", warmup=4, **options))
    expected = [0.4 * ((step + 1) / 4 if step < 4 else 1 - (step - 4) / 16) for step in range(20)]
    assert [rates[0] for rates in recorder.rates] == pytest.approx(expected)
    path = [0.0, *(weights[0].item() for weights in recorder.weights)]
    assert [a - b for a, b in itertools.pairwise(path)] == pytest.approx(expected)


def test_validation_between_steps_changes_nothing():
    _, plain = _fit(Net(), lo.ConfigureOptimizers("adamw", lr=0.1, schedule="cosine"))
    recorder = Recorder()
    trainer = make_trainer(
        [lo.ConfigureOptimizers("adamw", lr=0.1, schedule="cosine"), recorder],
        val_check_interval=3,
        num_sanity_val_steps=2,
    )
    trainer.fit(Net(), batches(20), batches(2))
    assert recorder.rates == plain.rates
    assert all(torch.equal(a, b) for a, b in zip(recorder.weights[-1], plain.weights[-1], strict=True))


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_other_entry_points_are_left_alone(method):
    class Evaluated(Net):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    model = Evaluated()
    callbacks = [
        lo.ConfigureOptimizers("sgd", lr=0.1),
        lo.GradientClipping(),
        lo.DivergenceGuard(),
        lo.OptimizerMonitor(),
    ]
    before = set(vars(model))
    getattr(make_trainer(callbacks), method)(model, batches(2))
    assert set(vars(model)) - before <= {"_hparams"}  # Lightning's own
