"""Small networks as textbooks have them, each with something that has no gradient by construction, and trained well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.divergence.trainings import RowByRow, Training, Transformer, _digits, _sources


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def cnn() -> nn.Module:
    """Biases of convolutions before batch norm."""
    last = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), _block(1, 16), nn.MaxPool2d(2), _block(16, 32), *last)


class Residual(nn.Module):
    """A block whose last scale starts at 0, so that nothing of it but that scale has a gradient in the first step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet() -> nn.Module:
    """Residual blocks that start as the identity."""
    body = (_block(1, 16), Residual(16), nn.MaxPool2d(2), Residual(16))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Attention(nn.Module):
    """A projection for each of queries, keys and values; the bias of the keys shifts all scores of a query alike."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patches of 2 x 2 pixels of an image of 8 x 8, with small scales on the branches, as in ConvNeXt."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, dim))
        self.attention = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), Attention(dim)) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.full((dim,), 1e-6)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image.reshape(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for attention, mlp, scale in zip(self.attention, self.mlps, self.scales, strict=True):
            x = x + attention(x)
            x = x + scale * mlp(x)
        return self.head(self.norm(x[:, 0]))


class FunctionalNorms(nn.Module):
    """Parameters of no module of their own, norms as functions, a transposed and a weight-normed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(0.3 * torch.randn(16, 1, 3, 3)), nn.Parameter(torch.zeros(16))
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.down = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 32, 3, 2, padding=1))
        self.first, self.second = nn.GroupNorm(16, 16), nn.InstanceNorm2d(32, affine=True)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.conv2d(image.reshape(-1, 1, 8, 8), self.kernel, self.shift, padding=1)
        x = F.relu(F.batch_norm(x, None, None, training=True))
        x = F.relu(self.first(self.up(x)))
        x = F.relu(self.second(self.down(x)))
        return self.head(x.amax((2, 3)))


class Experts(nn.Module):
    """A mixture of experts, each token to the best of them: some never get any, and one is not called then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(64, 32), nn.Linear(32, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(6))
        self.head = nn.Linear(32, 10)
        with torch.no_grad():
            self.router.bias[:3] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gates = self.router(x).softmax(-1)
        best = gates.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (best == i).nonzero()[:, 0]
            if i == 0 and not len(chosen):
                continue
            out = out.index_add(0, chosen, gates[chosen, i, None] * expert(x[chosen]))
        return self.head(x + out)


class LowRank(nn.Module):
    """A network that is fixed, in evaluation mode, with a low-rank correction that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).requires_grad_(False).eval()
        self.down, self.up = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
        nn.init.zeros_(self.up.weight)
        self.head = nn.Linear(64, 10)

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.base(x) + self.up(self.down(x))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "CNN": cnn,
    "ResNet": resnet,
    "ViT": ViT,
    "transformer": Transformer,
    "GRU": RowByRow,
    "functional norms": FunctionalNorms,
    "experts": Experts,
    "low rank": LowRank,
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "lr": 3e-3},
    "SGD": {"optimizer": "sgd", "lr": 0.05, "optimizer_kwargs": {"momentum": 0.9}},
    "Lion": {"optimizer": "lion", "lr": 1e-3},
    "Muon": {"optimizer": "muon", "lr": 0.01},
}


def training(network: str, optimizer: str, precision: str) -> Training:
    """A training of one of the networks by one of the optimizers."""
    configure = {"schedule": "cosine", "warmup": "10%", **OPTIMIZERS[optimizer]}
    lr = configure.pop("lr")
    if network == "transformer":
        data, loss = _sources, lambda outputs, targets: F.cross_entropy(outputs, targets.flatten())
    else:
        data, loss = _digits, F.cross_entropy
    return Training(NETWORKS[network], data, loss, lr, configure, precision)
