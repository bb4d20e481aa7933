"""The same parts in a plain torch loop, without Lightning.

Run with ``python examples/plain_torch.py [EPOCHS]``.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.clipping import GlobalNorm
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, StepReport
from lightning_optim.divergence import NonFiniteGradient


def main(epochs: int = 20) -> float:
    """Train on handwritten digits and return the loss of the last step.

    Args:
        epochs: Passes over the data.
    """
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))

    # Groups, optimizer and schedule; `OptimizerFactory.build` does these three steps in one.
    groups = lo.build_param_groups(model, ["no_decay"])
    optimizer = lo.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
    horizon = lo.Horizon(total_steps=epochs * len(loader), steps_per_epoch=len(loader))
    scheduler = lo.schedules.Scheduler(optimizer, lo.schedules.Cosine(warmup="5%"), horizon)

    # From here on `optimizer.step()` clips, skips and measures by itself.
    pipeline = lo.StepPipeline(
        optimizer,
        clip=GlobalNorm(max_norm=1.0),
        detectors=[NonFiniteGradient()],
        report_due=lambda: step % 100 == 0,
        on_report=lambda record: print(f"step {step:4d}:", summarize(StepReport(record, DEFAULT_DIAGNOSTICS, at=step))),
    )
    scheduler.hold_on(lambda: pipeline.counts().skipped)

    step = 0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
    print(f"last loss {loss.item():.4f}, {pipeline.counts()}")
    return loss.item()


def summarize(report: StepReport) -> str:
    """Pick a few of the report's values, by their tags."""
    values = report.read()
    shown = ("optim_lr/default", "optim_grad_norm/total", "optim_update_ratio/default")
    return ", ".join(f"{tag.removeprefix('optim_')} {values[tag]:.3g}" for tag in shown)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
