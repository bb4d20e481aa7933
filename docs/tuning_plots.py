"""Draws the figures of the pages on tuning into docs/images/tuning: `python docs/tuning_plots.py [name ...]`.

Each figure is a few short trainings on data that come with packages; all take some minutes on two cores. What a figure
shows is printed, too, so that the text can say it in numbers.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`, which has the data of the text model

import lightning_optim as lo
from tests.divergence.trainings import Transformer, _sources

mpl.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "images" / "tuning"


@dataclass
class Curves:
    """What one run has shown."""

    train: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)


class Run(L.LightningModule):
    """A network with cross entropy, which keeps its curves."""

    def __init__(self, network: nn.Module, val: TensorDataset | None) -> None:
        super().__init__()
        self.network, self.curves, self.held_out = network, Curves(), val

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        inputs = batch[0].to(self.dtype) if batch[0].is_floating_point() else batch[0]
        return F.cross_entropy(self.network(inputs).float(), batch[1].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.curves.train.append(loss.item() if math.isfinite(loss.item()) else math.nan)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = [p.grad.float().norm() for p in self.parameters() if p.grad is not None]
        self.curves.norms.append(torch.stack(norms).norm().item())

    def on_train_batch_end(self, *_: Any) -> None:
        if self.held_out is not None and self.global_step % 20 == 0:
            self.eval()
            with torch.no_grad():
                self.curves.val.append((self.global_step, self.loss(self.held_out.tensors).item()))
            self.train()

    def configure_optimizers(self) -> None: ...


def run(
    network: Callable[[], nn.Module],
    data: TensorDataset,
    steps: int,
    callbacks: Sequence[L.Callback],
    val: TensorDataset | None = None,
    batch: int = 32,
    **trainer: Any,
) -> Curves:
    """Train, always from the same weights and on the same batches."""
    torch.manual_seed(0)
    module = Run(network(), val)
    loader = DataLoader(data, batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(1))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made = L.Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **quiet, **trainer)
    made.fit(module, loader)
    return module.curves


def digits(count: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """8 x 8 digits: ``count`` to train on, and 500 others."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, out = order[500:][:count], order[:500]
    return TensorDataset(x[train], y[train]), TensorDataset(x[out], y[out])


def text() -> TensorDataset:
    """Windows of 32 bytes of the standard library's sources."""
    return TensorDataset(*_sources())


def perceptron(width: int = 128) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def adamw(lr: float, **options: Any) -> lo.ConfigureOptimizers:
    return lo.ConfigureOptimizers("adamw", lr, **options)


def smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """The median of the last values, which shows a level in noise."""
    return [statistics.median(values[max(i - window, 0) : i + 1]) for i in range(len(values))]


def end(values: Sequence[float], count: int = 20) -> float:
    finite = [value for value in values[-count:] if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def lines(
    name: str,
    panels: Sequence[tuple[str, dict[str, tuple[Sequence[float], Sequence[float]]], bool]],
    x_label: str = "optimizer step",
) -> None:
    """Draw panels side by side; each has a label, its lines, and whether its axis is logarithmic."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.0), squeeze=False)
    for axis, (label, each, log) in zip(axes[0], panels, strict=True):
        for legend, (x, y) in each.items():
            axis.plot(x, y, label=legend, linewidth=1.4)
        axis.set_xlabel(x_label)
        axis.set_title(label, fontsize=10)
        if log:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(name, figure)


def save(name: str, figure: Any) -> None:
    figure.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close(figure)


def over_steps(curves: dict[str, Sequence[float]], window: int = 15) -> dict[str, Any]:
    return {name: (range(len(y)), smooth(y, window)) for name, y in curves.items()}


def rate() -> None:
    """Too low, right, too high."""
    found = {f"lr {lr:g}": run(Transformer, text(), 300, [adamw(lr, schedule="cosine")]) for lr in (1e-4, 1e-2, 0.3)}
    print({name: round(end(curves.train), 3) for name, curves in found.items()})
    lines("rate", [("training loss", over_steps({n: c.train for n, c in found.items()}), False)])


def warmup() -> None:
    """A high rate from the first step, and reached in 10 % of the steps."""
    found = {
        f"lr {lr:g}, {label}": run(Transformer, text(), 300, [adamw(lr, schedule="cosine", warmup=length)])
        for lr in (0.01, 0.05)
        for label, length in (("no warmup", 0), ("warmup 10%", "10%"))
    }
    print({name: round(end(curves.train), 3) for name, curves in found.items()})
    lines("warmup", [("training loss", over_steps({n: c.train for n, c in found.items()}), False)])


def decay() -> None:
    """A constant rate, and the same one decayed to 0."""
    found = {
        name: run(Transformer, text(), 300, [adamw(0.03, schedule=name, warmup="10%")])
        for name in ("constant", "cosine", "wsd")
    }
    print({name: round(end(curves.train), 3) for name, curves in found.items()})
    lines("decay", [("training loss", over_steps({n: c.train for n, c in found.items()}), False)])


def betas() -> None:
    """beta2 on data whose gradients change."""
    found = {}
    for beta2 in (0.9, 0.95, 0.999, 0.9999):
        configure = adamw(0.01, schedule="cosine", warmup="5%", optimizer_kwargs={"betas": [0.9, beta2]})
        found[f"beta2 {beta2}"] = run(Transformer, text(), 300, [configure])
    print({name: round(end(curves.train), 3) for name, curves in found.items()})
    lines("betas", [("training loss", over_steps({n: c.train for n, c in found.items()}), False)])


def eps() -> None:
    """Epsilon as large as the gradients makes AdamW a slow SGD with momentum."""
    found = {
        f"eps {eps:g}": run(Transformer, text(), 300, [adamw(0.01, schedule="cosine", optimizer_kwargs={"eps": eps})])
        for eps in (1e-8, 1e-4, 1e-2)
    }
    print({name: round(end(curves.train), 3) for name, curves in found.items()})
    lines("eps", [("training loss", over_steps({n: c.train for n, c in found.items()}), False)])


def weight_decay() -> None:
    """100 digits, learned by heart unless something holds the weights."""
    train, out = digits(100)
    found = {
        f"weight decay {value:g}": run(perceptron, train, 600, [adamw(3e-3, weight_decay=value)], out)
        for value in (0.0, 1.0, 10.0, 100.0)
    }
    for name, curves in found.items():
        held_out = [value for _, value in curves.val]
        print(name, round(end(curves.train), 4), round(min(held_out), 3), round(held_out[-1], 3))
    vals = {n: ([s for s, _ in c.val], [v for _, v in c.val]) for n, c in found.items()}
    lines(
        "weight_decay",
        [("training loss", over_steps({n: c.train for n, c in found.items()}), True), ("held-out loss", vals, False)],
    )


def batch() -> None:
    """The same samples in batches of 16, 64 and 256, at the rate of 16 and at the scaled one."""
    train, _ = digits()
    panels: dict[str, Any] = {}
    for size in (16, 64, 256):
        for label, lr in (("same rate", 1e-3), ("rate x root", 1e-3 * math.sqrt(size / 16))):
            if size == 16 and label != "same rate":
                continue
            curves = run(perceptron, train, 9600 // size, [adamw(lr)], batch=size)
            samples = [step * size for step in range(len(curves.train))]
            panels[f"{size}, {label}"] = (samples, smooth(curves.train, max(240 // size, 3)))
            print(size, label, round(end(curves.train, max(1600 // size, 3)), 3))
    lines("batch", [("training loss", panels, True)], "samples")


def clipping() -> None:
    """A recurrent network whose gradients explode now and then."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(128, 32), nn.Linear(64, 128)
            self.rows = nn.RNN(32, 64, batch_first=True, nonlinearity="relu")
            with torch.no_grad():
                self.rows.weight_hh_l0.copy_(1.02 * torch.eye(64))

        def forward(self, windows: Tensor) -> Tensor:
            return self.head(self.rows(self.embed(windows))[0]).flatten(0, 1)

    def sgd() -> lo.ConfigureOptimizers:
        return lo.ConfigureOptimizers("sgd", 0.05, optimizer_kwargs={"momentum": 0.9})

    found = {
        "no clipping": run(Reader, text(), 300, [sgd()]),
        "norm 1": run(Reader, text(), 300, [sgd(), lo.GradientClipping(1.0)]),
    }
    print({name: (round(end(c.train), 3), round(max(c.norms), 1)) for name, c in found.items()})
    lines(
        "clipping",
        [
            ("training loss", over_steps({n: c.train for n, c in found.items()}), True),
            ("gradient norm before clipping", {n: (range(len(c.norms)), c.norms) for n, c in found.items()}, True),
        ],
    )


def precision() -> None:
    """Weights in bfloat16 stop where an update is less than half of their last bit."""
    train, out = digits()
    kahan = {"optimizer_kwargs": {"kahan_sum": True}}
    found = {
        "32-true": run(perceptron, train, 600, [adamw(1e-4)], out),
        "bf16-true": run(perceptron, train, 600, [adamw(1e-4)], out, precision="bf16-true"),
        "bf16-true, kahan_sum": run(perceptron, train, 600, [adamw(1e-4, **kahan)], out, precision="bf16-true"),
    }
    print({name: round(end(c.train), 4) for name, c in found.items()})
    lines("precision", [("training loss", over_steps({n: c.train for n, c in found.items()}), True)])


def overfitting() -> None:
    """Where the held-out loss turns while the training loss goes on."""
    train, out = digits(200)
    curves = run(lambda: perceptron(256), train, 800, [adamw(1e-3)], out)
    steps, values = zip(*curves.val, strict=True)
    turn = steps[values.index(min(values))]
    print({"turns at": turn, "held-out then": round(min(values), 3), "at the end": round(values[-1], 3)})
    both = {"training": (range(len(curves.train)), smooth(curves.train)), f"held-out, least at {turn}": (steps, values)}
    lines("overfitting", [("loss", both, True)])


def depth() -> None:
    """The RMS of each layer's gradient at the start, by depth."""

    def stack(activation: type[nn.Module], gain: float) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(12):
            linear = nn.Linear(64, 64)
            nn.init.normal_(linear.weight, std=gain / 8)
            layers += [linear, activation()]
        return nn.Sequential(*layers, nn.Linear(64, 10))

    train, _ = digits()
    figure, axis = plt.subplots(figsize=(5, 3))
    cases = {"sigmoid": (nn.Sigmoid, 1.0)}
    cases |= {f"ReLU, {label}": (nn.ReLU, gain) for label, gain in (("gain 1", 1.0), ("He", 2**0.5), ("gain 2", 2.0))}
    for label, (activation, gain) in cases.items():
        torch.manual_seed(0)
        network = stack(activation, gain)
        x, y = train.tensors
        F.cross_entropy(network(x[:256]), y[:256]).backward()
        grads = [m.weight.grad.square().mean().sqrt().item() for m in network if isinstance(m, nn.Linear)]
        print(label, f"{grads[0]:.1e} {grads[-2]:.1e}")
        axis.plot(range(1, 14), grads, marker=".", label=label)
    axis.set(xlabel="layer, from the input", yscale="log", title="RMS of the gradient at the start")
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save("depth", figure)


FIGURES = (rate, warmup, decay, betas, eps, weight_decay, batch, clipping, precision, overfitting, depth)


def main() -> None:
    """Draw those that are named, or all."""
    names = {figure.__name__: figure for figure in FIGURES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names, []], help="which (default: all)")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in parser.parse_args().names or names:
        print(f"{name}:", end=" ", flush=True)
        names[name]()


if __name__ == "__main__":
    main()
