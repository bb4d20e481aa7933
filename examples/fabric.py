"""The same parts in Lightning Fabric: ``digits`` with a loop of one's own, in any precision.

Run with ``python examples/fabric.py [EPOCHS]``.
"""

import sys
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.divergence import NonFiniteGradient


def main(epochs: int = 20, precision: Any = "bf16-mixed") -> float:
    """Train on handwritten digits and return the share of them that is recognised.

    Args:
        epochs: Passes over the data.
        precision: Fabric's: ``"32-true"``, ``"bf16-mixed"``, ``"bf16-true"``, ``"16-mixed"``.
    """
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    fabric.seed_everything(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    data = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    loader: Any = fabric.setup_dataloaders(data)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))

    # Groups, optimizer and schedule, as `ConfigureOptimizers` makes them for a Trainer.
    horizon = lo.Horizon(total_steps=epochs * len(loader), steps_per_epoch=len(loader))
    factory = lo.OptimizerFactory("adamw", lr=3e-3, weight_decay=0.1, schedule="cosine", warmup="5%")
    optimizer, scheduler = factory.build(model, horizon)
    model, optimizer = fabric.setup(model, optimizer)

    # From here on `optimizer.step()` clips and skips by itself; no call of `fabric.clip_gradients`.
    pipeline = lo.StepPipeline(optimizer, clip=GlobalNorm(max_norm=1.0), detectors=[NonFiniteGradient()])
    scheduler.hold_on(lambda: pipeline.counts().skipped)

    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        accuracy: float = (model(fabric.to_device(images)).argmax(-1).cpu() == labels).float().mean().item()
    fabric.print(f"recognised {accuracy:.1%}, {pipeline.counts()}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
