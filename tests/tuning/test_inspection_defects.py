"""Real defects, each put into a model that has none, and the one finding that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_optim as lo

CLASSES, FEATURES, BATCH = 10, 16, 64


def batches(count: int = 2, classes: int = CLASSES, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, FEATURES), torch.randint(classes, (size,))) for _ in range(count)]


def perceptron(depth: int = 2, activation: Callable[[], nn.Module] = nn.ReLU, width: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(width if index else FEATURES, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def he(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def scaled(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def changed(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


def kinds(model: nn.Module, data: Any = None, loss: Any = F.cross_entropy, **options: Any) -> list[str]:
    inspection = lo.inspect_model(model, data or batches(), loss=None if "step" in options else loss, **options)
    assert all(finding.seen and finding.why and finding.advice for finding in inspection.findings)
    assert all(len(line) <= 80 for line in inspection.text().splitlines())
    return inspection.kinds


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _one_hot(batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.one_hot(batch[1], CLASSES)


def _negative_biases(model: Any) -> None:
    model[0].bias.fill_(-20.0)


def _equal_rows(model: Any) -> None:
    model[2].weight.copy_(model[2].weight[:1].expand_as(model[2].weight))


def _half_the_rows(model: Any) -> None:
    model[2].weight[16:] = model[2].weight[:16]


MODELS = {
    "all zero": (lambda: scaled(perceptron(), 0.0), "zero-weights"),
    "all zero, sigmoid": (lambda: scaled(perceptron(activation=nn.Sigmoid), 0.0), "zero-weights"),
    "all zero, tanh": (lambda: scaled(perceptron(3, nn.Tanh), 0.0), "zero-weights"),
    "constant": (lambda: changed(perceptron(), lambda m: [p.fill_(0.05) for p in m.parameters()]), "identical-units"),
    "equal rows": (lambda: changed(perceptron(), _equal_rows), "identical-units"),
    "half of the rows": (lambda: changed(perceptron(), _half_the_rows), "identical-units"),
    "ten times": (lambda: scaled(perceptron(), 10.0), "large-weights"),
    "ten times He": (lambda: scaled(he(perceptron(3)), 10.0), "large-weights"),
    "a hundredth": (lambda: scaled(perceptron(3), 0.01), "small-weights"),
    "a hundredth of He": (lambda: scaled(he(perceptron(4)), 0.01), "small-weights"),
    "standard normal": (
        lambda: changed(perceptron(width=64), lambda m: [p.normal_() for p in m.parameters() if p.ndim > 1]),
        "large-weights",
    ),
    "sigmoids": (lambda: perceptron(8, nn.Sigmoid), "vanishing-gradients"),
    "sigmoids after Xavier": (
        lambda: changed(
            perceptron(8, nn.Sigmoid), lambda m: [nn.init.xavier_normal_(p) for p in m.parameters() if p.ndim > 1]
        ),
        "vanishing-gradients",
    ),
    "dead": (lambda: changed(perceptron(), _negative_biases), "dead-units"),
    "dead GELU": (lambda: changed(perceptron(activation=nn.GELU), _negative_biases), "dead-units"),
    "no norm, PyTorch's initialisation": (lambda: perceptron(20), "vanishing-activations"),
    "no norm, twice He": (lambda: scaled(he(perceptron(16)), 2.0), "exploding-activations"),
    "softmax": (lambda: nn.Sequential(perceptron(), nn.Softmax(-1)), "softmax-before-cross-entropy"),
    "head ten times": (lambda: changed(perceptron(), lambda m: m[-1].weight.mul_(30)), "large-weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_defect_of_the_model_is_named(name):
    make, kind = MODELS[name]
    assert kinds(make()) == [kind]


def test_saturated_units_are_named():
    assert kinds(perceptron(2, nn.Tanh), [(12 * x, y) for x, y in batches()]) == ["saturated-units"]


LOSSES = {
    "sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "loss-reduction"),
    "none and sum": (lambda o, t: F.cross_entropy(o, t, reduction="none").sum(), "loss-reduction"),
    "mean of the mean": (lambda o, t: F.cross_entropy(o, t) / len(t), "loss-reduction"),
    "labels from 1": (lambda o, t: F.cross_entropy(o, t + 1), "target-range"),
    "labels below 0": (lambda o, t: F.cross_entropy(o, t - 1), "target-range"),
    "logits to nll": (F.nll_loss, "logits-to-nll"),
    "probabilities to nll": (lambda o, t: F.nll_loss(o.softmax(-1), t), "logits-to-nll"),
    "logits to bce": (lambda o, t: F.binary_cross_entropy(o, F.one_hot(t, CLASSES).float()), "logits-to-bce"),
    "sigmoid twice": (
        lambda o, t: F.binary_cross_entropy_with_logits(o.sigmoid(), F.one_hot(t, CLASSES).float()),
        "sigmoid-before-logits-loss",
    ),
    "one-hot integers": (lambda o, t: F.cross_entropy(o, F.one_hot(t, CLASSES)), "one-hot-targets"),
    "several labels": (
        lambda o, t: F.cross_entropy(o, (F.one_hot(t, CLASSES) + F.one_hot((t + 1) % CLASSES, CLASSES)).float()),
        "targets-not-probabilities",
    ),
    "floating indices": (lambda o, t: F.cross_entropy(o, t.float()), "target-dtype"),
    "indices to bce": (
        lambda o, t: F.binary_cross_entropy_with_logits(o, t[:, None].expand(-1, CLASSES).float()),
        "target-range",
    ),
    "classes last": (
        lambda o, t: F.cross_entropy(o[:, None].expand(-1, 5, -1), t[:, None].expand(-1, 5)),
        "shape-mismatch",
    ),
    "broadcast": (lambda o, t: F.mse_loss(o[:, :1], torch.randn(BATCH)), "shape-mismatch"),
    "broadcast by hand": (lambda o, t: ((o[:, :1] - t.float()) ** 2).mean(), "shape-mismatch"),
    "l1 broadcast": (lambda o, t: nn.L1Loss()(o[:, :1], torch.randn(BATCH)), "shape-mismatch"),
    "targets far away": (lambda o, t: F.mse_loss(o[:, 0], 300.0 + t), "target-scale"),
    "one class": (lambda o, t: F.cross_entropy(o, t * 0), "constant-targets"),
    "detached outputs": (lambda o, t: F.cross_entropy(o.detach(), t), "no-gradient"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_defect_of_the_loss_is_named(name):
    loss, kind = LOSSES[name]
    assert kinds(perceptron(), loss=loss) == [kind]


def test_inputs_that_are_not_normalised_are_named():
    data = [(torch.randint(256, (BATCH, 1, 8, 8)).float(), torch.randint(CLASSES, (BATCH,))) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES))
    assert kinds(net, data) == ["input-scale"]
    assert kinds(nn.Sequential(nn.BatchNorm2d(1), net), data) == []
    deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    assert kinds(deep, data) == ["input-scale"]


def test_the_first_place_that_is_not_finite_is_named():
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x).log()

    data = batches()
    data[0][0][3, 2] = float("nan")
    assert kinds(perceptron(), data) == ["non-finite-input"]
    inspection = lo.inspect_model(nn.Sequential(perceptron(), Log()), batches(), loss=F.cross_entropy)
    assert inspection.kinds == ["non-finite-activation"]


def test_what_is_frozen_by_mistake_is_named():
    model = perceptron(3)
    model[2].requires_grad_(False)
    inspection = lo.inspect_model(model, batches(), loss=F.cross_entropy)
    assert [(f.kind, f.where) for f in inspection.findings] == [("frozen-in-the-middle", "2")]


def test_what_is_not_used_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.forgotten = perceptron(), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    (found,) = lo.inspect_model(Net(), batches(), loss=F.cross_entropy).findings
    assert (found.kind, {found.where, *found.further}) == (
        "unused-parameters",
        {"forgotten.weight", "forgotten.bias", "scale"},
    )


def test_what_a_detach_cuts_off_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)).detach())

    (found,) = lo.inspect_model(Net(), batches(), loss=F.cross_entropy).findings
    assert (found.kind, found.where) == ("no-gradient", "first.weight")
    assert "detach" in found.seen


def test_a_model_with_nothing_to_train_is_named():
    inspection = lo.inspect_model(perceptron().requires_grad_(False), batches(), loss=F.cross_entropy)
    assert inspection.kinds == ["nothing-trainable"]
    assert "grad" in inspection.error


class Language(nn.Module):
    """A language model with or without what is wrong with it."""

    def __init__(self, vocabulary: int = 50, dim: int = 64, std: float | None = None, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, dim), nn.LayerNorm(dim)
        self.mix, self.head = nn.Linear(dim, dim), nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if std is not None:
            nn.init.normal_(self.embed.weight, std=std)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        return self.head(self.norm(x + self.mix(x))).flatten(0, 1)


def _text(vocabulary: int = 50) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(vocabulary, (8, 16)), torch.randint(vocabulary, (128,))) for _ in range(2)]


def test_a_tied_head_with_the_scale_of_an_embedding_is_named():
    assert kinds(Language(), _text()) == ["tied-head"]
    assert kinds(Language(std=0.02), _text()) == []
    assert kinds(Language(tied=False), _text()) == []


def test_an_index_without_a_row_is_named():
    assert kinds(Language(std=0.02), _text(51)) == ["index-out-of-range"]


def test_attention_that_is_saturated_is_named():
    class Attention(nn.Module):
        def __init__(self, scale: float, fused: bool) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(FEATURES, 96), nn.Linear(32, CLASSES)
            self.scale, self.fused = scale, fused

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.unflatten(0, (8, 8))).chunk(3, -1)
            q = q * self.scale
            by_hand = (q @ k.mT / 32**0.5).softmax(-1) @ v
            return self.out(F.scaled_dot_product_attention(q, k, v) if self.fused else by_hand).flatten(0, 1)

    for fused in (True, False):
        assert kinds(Attention(200.0, fused)) == ["attention-logits"]
        assert kinds(Attention(1.0, fused)) == []


def test_outputs_that_are_far_too_large_are_named():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return 100 * self.body(x)

    assert kinds(Scaled()) == ["output-scale"]


def test_classes_that_never_occur_are_named():
    wide = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 100))
    assert kinds(wide, batches(2, 5, 1024)) == ["unused-classes"]


def test_a_bias_that_a_normalisation_takes_away_is_a_note():
    def convolution(norm: nn.Module, bias: bool) -> list[Any]:
        net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=bias), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES))
        data = [(torch.randn(BATCH, 1, 8, 8), torch.randint(CLASSES, (BATCH,)))]
        return [(f.kind, f.where, f.level) for f in lo.inspect_model(net, data, loss=F.cross_entropy).findings]

    note = [("bias-before-norm", "0.bias", "note")]
    for norm in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(8, 8)):
        assert convolution(norm, bias=True) == note
        assert convolution(norm, bias=False) == []
    assert convolution(nn.GroupNorm(2, 8), bias=True) == []
    assert convolution(nn.LayerNorm((8, 6, 6)), bias=True) == []
    assert convolution(nn.BatchNorm2d(8).eval(), bias=True) == []


def test_an_activation_that_several_layers_share_is_told_apart():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(FEATURES, 32), nn.Linear(32, 32), nn.Linear(32, CLASSES)
            self.activation = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.activation(self.second(self.activation(self.first(x)))))

    model = Shared()
    inspection = lo.inspect_model(model, batches(), loss=F.cross_entropy)
    names = ["first", "activation", "second", "activation after second", "head"]
    assert ([row.name for row in inspection.rows], inspection.findings) == (names, [])
    nn.init.constant_(model.second.bias, -20.0)
    (found,) = lo.inspect_model(model, batches(), loss=F.cross_entropy).findings
    assert (found.kind, found.where) == ("dead-units", "activation after second")


def test_a_deep_convolutional_stack_without_normalisation_is_named():
    layers = [part for index in range(16) for part in (nn.Conv2d(16 if index else 3, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    data = [(torch.randn(16, 3, 16, 16), torch.randint(CLASSES, (16,)))]
    (found,) = lo.inspect_model(model, data, loss=F.cross_entropy).findings
    assert found.kind in ("vanishing-gradients", "vanishing-activations")
    assert "no normalisation in 16 layers" in found.seen
    assert "normalisation" in found.advice


def test_a_loss_written_with_softmax_by_hand_is_named():
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.exp() / outputs.exp().sum(1, keepdim=True), targets)

    assert kinds(perceptron(), loss=loss) == ["softmax-before-cross-entropy"]


class _InAList(nn.Module):
    """Layers that are kept in a list of Python, so that they are no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = [nn.Linear(FEATURES, FEATURES) for _ in range(2)], nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


def test_weights_that_the_optimizer_does_not_get_are_named():
    inspection = lo.inspect_model(_InAList(), batches(), loss=F.cross_entropy)
    assert inspection.kinds == ["unregistered-weights"]
    assert inspection.findings[0].seen == "2 weights with a gradient are not in parameters()."


@pytest.mark.parametrize(("factor", "kind"), [(0.0, "constant-input"), (1e-5, "input-scale")])
def test_inputs_that_say_next_to_nothing_are_named(factor, kind):
    assert kinds(perceptron(), [(factor * x, y) for x, y in batches()]) == [kind]


def test_one_constant_input_of_several_is_no_finding():
    def step(model: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x) + model(torch.zeros_like(x)), y)

    assert kinds(perceptron(), step=step) == []
