"""Small tasks with real data, one of each kind that a recipe is for and that runs here."""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import inspect
import logging
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Data = tuple[Tensor, ...]
BATCH = 32


@dataclass(frozen=True)
class Task:
    """What is trained, and what is measured.

    Args:
        recipe: The recipe of its kind.
        what: The task in words.
        network: Makes the network, from the global seed.
        data: Tensors to train on and to measure with.
        loss: Of the network and a batch.
        score: What is reported, smaller is better; None for the loss.
        lr: The rate that the recipe says for this task, where it is not that of its batch rule.
    """

    recipe: str
    what: str
    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Data, Data]]
    loss: Callable[..., Tensor]
    score: Callable[..., Tensor] | None = None
    lr: Callable[[nn.Module], float] | None = None


def _split(*tensors: Tensor, held_out: int = 4, most: int | None = None) -> tuple[Data, Data]:
    """Every fourth sample is held out; at most so many of the others are trained on."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    tensors = tuple(tensor[order] for tensor in tensors)
    train = tuple(tensor[torch.arange(len(tensor)) % held_out > 0][:most] for tensor in tensors)
    return train, tuple(tensor[::held_out] for tensor in tensors)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(y)


@functools.cache
def _windows() -> tuple[Tensor, Tensor]:
    """Windows of 33 bytes out of five modules of the standard library, and which module each is from."""
    found, which = [], []
    for number, module in enumerate((argparse, ast, inspect, logging, typing)):
        text = torch.tensor(list(inspect.getsource(module).encode("ascii", "replace")))
        windows = text[: len(text) // 33 * 33].view(-1, 33)[:1500]
        found.append(windows)
        which.append(torch.full((len(windows),), number))
    return torch.cat(found), torch.cat(which)


# Language.


def _layer(dim: int) -> nn.Module:
    return nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)


class Transformer(nn.Module):
    """Two causal layers over bytes."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(129, dim), nn.Embedding(33, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.ModuleList(_layer(dim) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 129)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embed(text) + self.position.weight[:length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def _next_byte(network: nn.Module, text: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(network(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def _kaplan(network: nn.Module) -> float:
    hidden = sum(param.numel() for name, param in network.named_parameters() if not name.startswith(("embed", "pos")))
    return 0.003239 - 0.0001395 * math.log(hidden)


class LSTM(nn.Module):
    """Over bytes."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(129, dim),
            nn.LSTM(dim, dim, batch_first=True),
            nn.Linear(dim, 129),
        )

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(text))[0])


class EncoderDecoder(nn.Module):
    """Reads 16 bytes, writes the next."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.shared, self.position = nn.Embedding(129, dim), nn.Embedding(33, dim)
        self.transformer = nn.Transformer(dim, 2, 1, 1, 2 * dim, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(dim, 129)

    def forward(self, read: Tensor, written: Tensor) -> Tensor:
        source = self.shared(read) + self.position.weight[: read.shape[1]]
        target = self.shared(written) + self.position.weight[: written.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(written.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True))


def _continuation(network: nn.Module, text: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(network(text[:, :16], text[:, 16:-1]).flatten(0, 1), text[:, 17:].flatten())


class LowRank(nn.Module):
    """A frozen linear layer with a low-rank correction."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 4.0 * x @ self.lora_A.T @ self.lora_B.T


# Images.


class ViT(nn.Module):
    """Patches of 2 x 2 of a digit."""

    def __init__(self, dim: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, dim, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.blocks = nn.ModuleList(_layer(dim) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def no_weight_decay(self) -> set[str]:
        """As timm has it."""
        return {"position"}

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def _resnet(classes: int = 10) -> nn.Sequential:
    stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16, 1), Residual(16, 32, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


class ConvNextBlock(nn.Module):
    """A depthwise kernel, then a perceptron of the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 5, 1, 2, groups=dim), nn.LayerNorm(dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x).movedim(1, -1)))))
        return x + (self.gamma * y).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Two blocks."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, dim, 2, 2), nn.Sequential(ConvNextBlock(dim), ConvNextBlock(dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images)).mean((2, 3))))


def _label(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


@functools.cache
def _pretrained(make: Callable[[int], nn.Module]) -> dict[str, Tensor]:
    """Weights of a network that tells the digits 0 to 4, without its head."""
    torch.manual_seed(0)
    network, (images, labels) = make(5), _digits()
    images, labels = images[labels < 5], labels[labels < 5]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(200):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        _label(network, images[batch], labels[batch]).backward()
        optimizer.step()
    return {name: value for name, value in network.state_dict().items() if not name.startswith(("7.", "head."))}


def _tuned_resnet() -> nn.Module:
    network = _resnet(5)
    network.load_state_dict(copy.deepcopy(_pretrained(_resnet)), strict=False)
    return network


def _tuned_vit() -> ViT:
    network = ViT(classes=5)
    network.load_state_dict(copy.deepcopy(_pretrained(_vit)), strict=False)
    return network


def _vit(classes: int) -> ViT:
    return ViT(classes=classes)


def _adapted() -> ViT:
    network = _tuned_vit().requires_grad_(False)
    for block in network.blocks:
        block.linear1, block.linear2 = LowRank(block.linear1), LowRank(block.linear2)
    network.head.requires_grad_(True)
    return network


def _probed() -> ViT:
    network = _tuned_vit().requires_grad_(False)
    network.head.requires_grad_(True)
    return network


def _other_digits() -> tuple[Data, Data]:
    images, labels = _digits()
    return _split(images[labels >= 5], labels[labels >= 5] - 5, most=200)


class UNet(nn.Module):
    """Down once and up again, with a time step or without."""

    def __init__(self, outputs: int, timed: bool = False, dim: int = 16) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, dim, 3, padding=1), nn.InstanceNorm2d(dim, affine=True), nn.LeakyReLU())
        self.down2 = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.InstanceNorm2d(2 * dim, affine=True), nn.LeakyReLU()
        )
        self.up, self.out = nn.ConvTranspose2d(2 * dim, dim, 2, 2), nn.Conv2d(2 * dim, outputs, 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, dim)) if timed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        x = self.down1(x)
        if self.time_mlp is not None and time is not None:
            x = x + self.time_mlp(time)[..., None, None]
        return self.out(F.leaky_relu(torch.cat([x, self.up(self.down2(x))], 1)))


def _ink(network: nn.Module, images: Tensor, *_: Tensor) -> Tensor:
    noisy = images + 0.7 * torch.randn_like(images)
    return F.binary_cross_entropy_with_logits(network(noisy), (images > 0).float())


def _noise(network: nn.Module, images: Tensor, *_: Tensor) -> Tensor:
    time, noise = torch.rand(len(images), 1), torch.randn_like(images)
    share = torch.cos(time * math.pi / 2)[..., None, None]
    return F.mse_loss(network(share * images + (1 - share**2).sqrt() * noise, time), noise)


# Tables and physics.


def _measurements() -> tuple[Tensor, Tensor]:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def _squares(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(network(inputs)[:, 0], targets)


def _pairs() -> tuple[Data, Data]:
    """Which pairs of bytes a window has, as 31 rows of a table each, and whether it is from typing or argparse."""
    text, which = _windows()
    chosen = (which == 0) | (which == 4)
    text = text[chosen]
    return _split(text[:, :-1] * 128 + text[:, 1:], (which[chosen] == 4).float())


def _bags() -> nn.Module:
    table = nn.EmbeddingBag(128 * 128, 16, mode="sum", sparse=True)
    return nn.Sequential(table, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def _binary(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(network(inputs)[:, 0], targets)


def _oscillation(network: nn.Module, times: Tensor) -> Tensor:
    """y'' = -4 y, y(0) = 1, y'(0) = 0."""
    with torch.enable_grad():
        times = times.clone().requires_grad_(True)
        start = torch.zeros(1, 1, requires_grad=True)
        y, y0 = network(times), network(start)
        (slope,) = torch.autograd.grad(y.sum(), times, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), times, create_graph=True)
        (slope0,) = torch.autograd.grad(y0.sum(), start, create_graph=True)
        return ((bend + 4 * y) ** 2).mean() + 10 * ((y0 - 1) ** 2 + slope0**2).sum()


def _deviation(network: nn.Module, times: Tensor) -> Tensor:
    return F.mse_loss(network(times), torch.cos(2 * times)).sqrt()


def _smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def _text() -> tuple[Data, Data]:
    return _split(*_windows())


def _all_digits() -> tuple[Data, Data]:
    return _split(*_digits())


TASKS = (
    Task("gpt", "next byte of sources", Transformer, _text, _next_byte, lr=_kaplan),
    Task("gpt-muon", "next byte of sources", Transformer, _text, _next_byte, lr=_kaplan),
    Task("t5", "next 16 bytes of sources", EncoderDecoder, _text, _continuation),
    Task("lstm", "next byte of sources", LSTM, _text, _next_byte),
    Task("bert-finetune", "digits 5 to 9, transformer of 0 to 4", _tuned_vit, _other_digits, _label),
    Task("lora", "the same, low-rank adapters", _adapted, _other_digits, _label),
    Task("linear-probe", "the same, only the head", _probed, _other_digits, _label),
    Task("vit", "digits", ViT, _all_digits, _label),
    Task("resnet", "digits", _resnet, _all_digits, _label),
    Task("convnext", "digits", ConvNeXt, _all_digits, _label),
    Task("vision-finetune", "digits 5 to 9, convolutions of 0 to 4", _tuned_resnet, _other_digits, _label),
    Task("segmentation", "ink of noisy digits", lambda: UNet(1), _all_digits, _ink),
    Task("diffusion", "noise of digits", lambda: UNet(1, timed=True), _all_digits, _noise),
    Task("sparse-embeddings", "module by pairs of bytes", _bags, _pairs, _binary),
    Task(
        "pinn",
        "oscillator, error of its path",
        _smooth,
        lambda: _split(2 * torch.rand(2000, 1)),
        _oscillation,
        _deviation,
    ),
    Task("mlp", "diabetes", _perceptron, lambda: _split(*_measurements()), _squares),
)
"""In the order of the recipes."""
