"""Every quantity of the monitor, at every step, by plain arithmetic in float64 on copies of what was there."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import lightning_optim as lo
from tests.helpers import RULES, Net, batches, make_trainer, read_events

MAX_NORM = 0.5


class Family:
    """How an optimizer is made, and what its quantities are made of.

    Args:
        optimizer: As for ConfigureOptimizers.
        first: Its first moment.
        second: Its second moment.
        corrected: Whether that is divided by 1 − βᵗ.
        beta: Which of the betas that is.
        decay: How its weight decay's part of an update is found: ``twin``, by what an optimizer without decay does from
            the same state; ``solved``, where decay changes the length of the rest as well; ``stated``, as lr·λ·w; None
            if there is no such part.
        options: Arguments of the optimizer.
    """

    def __init__(self, optimizer, first=None, second=None, corrected=True, decay="twin", beta=1, **options):
        self.arguments = {"optimizer": optimizer, "optimizer_kwargs": options}
        self.first, self.second, self.corrected, self.beta, self.decay = first, second, corrected, beta, decay

    def of(self, group) -> Family:
        """That of a group, which may have a rule of its own."""
        return self if group.get("rule") is None else FAMILIES[group["rule"]]


FAMILIES = {
    "adamw": Family("adamw", "exp_avg", "exp_avg_sq"),
    "adamw-reference": Family("adamw", "exp_avg", "exp_avg_sq", backend="reference"),
    "adamw-large-eps": Family("adamw", "exp_avg", "exp_avg_sq", eps=1e-2),
    "adamw-cautious": Family("adamw", "exp_avg", "exp_avg_sq", cautious=True),
    "adam-l2": Family("adam", "exp_avg", "exp_avg_sq", decay=None),
    "amsgrad": Family("adamw", "exp_avg", "max_exp_avg_sq", amsgrad=True),
    "sgd": Family("sgd", decay=None),
    "momentum": Family("sgd", "momentum_buffer", decay=None, momentum=0.9),
    "nesterov": Family("sgd", "momentum_buffer", decay=None, momentum=0.9, nesterov=True),
    "lion": Family("lion", "exp_avg"),
    "rmsprop": Family("rmsprop", None, "square_avg", corrected=False, decay=None),
    "adagrad": Family("adagrad", None, "sum", corrected=False, decay=None),
    "nadam": Family("nadam", "exp_avg", "exp_avg_sq", decay=None),
    "adan": Family("adan", "exp_avg", "exp_avg_sq", beta=2, decay="solved"),
    "ademamix": Family("ademamix", "exp_avg", "exp_avg_sq"),
    "adopt": Family("adopt", "exp_avg", "exp_avg_sq", corrected=False),
    "schedule-free": Family("schedulefreeadamw", None, "exp_avg_sq", decay=None),
    "stableadamw": Family("stableadamw", "exp_avg", "exp_avg_sq", corrected=False),
    "lamb": Family("lamb", "exp_avg", "exp_avg_sq", decay="solved"),
    "lars": Family("lars", "momentum_buffer", decay=None, momentum=0.9),
    "adafactor": Family("adafactor"),
    "muon": Family("muon", "momentum_buffer"),
    "normuon": Family("normuon", "momentum_buffer"),
    "soap": Family("soap", "exp_avg", decay="solved"),
    "prodigy": Family("prodigy", "exp_avg", d0=0.1),
    **{
        f"adamw-{kind}": Family("adamw", "exp_avg", "exp_avg_sq", weight_decay_kind=kind)
        for kind in ("independent", "corrected", "l1", "l2_sp", "cautious", "norm")
    },
    "torch-adamw": Family(torch.optim.AdamW, "exp_avg", "exp_avg_sq", decay="stated", fused=False),
    "torch-adamw-fused": Family(torch.optim.AdamW, "exp_avg", "exp_avg_sq", decay="stated", fused=True),
    "torch-nadam": Family(torch.optim.NAdam, "exp_avg", "exp_avg_sq", decay="stated", decoupled_weight_decay=True),
    "torch-momentum": Family(torch.optim.SGD, "momentum_buffer", decay=None, momentum=0.9),
    "torch-ascent": Family(torch.optim.SGD, "momentum_buffer", decay=None, momentum=0.9, maximize=True),
    "torch-rmsprop": Family(torch.optim.RMSprop, None, "square_avg", corrected=False, decay=None),
    "torch-adagrad": Family(torch.optim.Adagrad, None, "sum", corrected=False, decay=None),
    "torch-adafactor": Family(torch.optim.Adafactor, decay=None),
    "other-lion": Family("lion_pytorch.Lion", "exp_avg", decay=None),
    "other-adabelief": Family("pytorch_optimizer.AdaBelief", "exp_avg", decay=None),
}


class Witness(L.Callback):
    """Takes copies around each update, and computes from them."""

    def __init__(self, family: Family, clips: bool) -> None:
        self.family, self.clips = family, clips
        self.rows: list[dict[str, float]] = []

        self._groups: list = []
        self._twins: dict = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        everything = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = _norm([_double(p.grad) for p in everything])
        coefficient = min(1.0, MAX_NORM / total) if self.clips else 1.0
        row = {"optim_grad_norm/total": total, "optim_grad_norm_clipped/total": coefficient * total}
        self._groups = []
        for group in optimizer.param_groups:
            name, params = group["name"], [p for p in group["params"] if p.grad is not None]
            grads = [_double(p.grad) for p in params]
            moments = [optimizer.state.get(p, {}).get(self.family.of(group).first) for p in params]
            self._groups.append(
                {
                    "options": {k: v for k, v in group.items() if k != "params"},
                    "params": params,
                    "before": [_double(p) for p in params],
                    "grads": [g * coefficient for g in grads],
                    "moments": None if any(m is None for m in moments) else [_double(m) for m in moments],
                }
            )
            row[f"optim_lr/{name}"] = float(group["lr"])
            row[f"optim_weight_decay/{name}"] = group["weight_decay"]
            row[f"optim_grad_norm/{name}"] = _norm(grads)
            row[f"optim_grad_norm_clipped/{name}"] = coefficient * _norm(grads)
            row[f"optim_grad_norm_clipped/coefficient/{name}"] = coefficient
            row[f"optim_grad/zero/{name}"] = _mean([(g == 0).double() for g in grads])
        if self.family.decay in ("twin", "solved"):
            self._twins = _step_without_decay(optimizer, coefficient)
        row["optim_health/nonfinite_gradients"] = 0
        row["optim_grad_norm/interval_mean"] = row["optim_grad_norm/interval_max"] = total
        self.rows.append(row)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if not self._groups:
            return
        (optimizer,) = trainer.optimizers
        for group in self._groups:
            self.rows[-1] |= self._after(optimizer, group)
        self._groups = []

    def _after(self, optimizer, group) -> dict[str, float]:
        options, before, grads = group["options"], group["before"], group["grads"]
        family = self.family.of(options)
        name, params = options["name"], group["params"]
        change = [_double(p) - q for p, q in zip(params, before, strict=True)]
        row = {
            f"optim_param_norm/{name}": _norm(before),
            f"optim_param_norm/rms/{name}": math.sqrt(_mean([p**2 for p in before])),
            f"optim_update_norm/{name}": _norm(change),
            f"optim_update_ratio/{name}": _norm(change) / _norm(before),
            f"optim_lr/effective/{name}": math.sqrt(_mean([c**2 for c in change])),
        }
        lost = None
        if self.family.decay == "stated":
            lost = [options["lr"] * options["weight_decay"] * p for p in before]
        elif self.family.decay is not None:
            alone = [p - self._twins[q] for p, q in zip(before, params, strict=True)]
            lost = [-c - d for c, d in zip(change, alone, strict=True)]
            if self.family.decay == "solved" and options["weight_decay"]:
                lost = [_solved(-c, d, p) for c, d, p in zip(change, alone, before, strict=True)]
        if lost is not None and _norm(change) > 0:
            row[f"optim_weight_decay/share/{name}"] = _norm(lost) / _norm(change)
        if group["moments"] is not None and _norm(group["moments"]) > 0:
            sign = -1 if options.get("maximize") else 1
            dot = sum(float((g * m).sum()) for g, m in zip(grads, group["moments"], strict=True)) * sign
            row[f"optim_grad/cosine/{name}"] = dot / (_norm(grads) * _norm(group["moments"]))
        if family.second is not None:
            roots = [_double(optimizer.state[p][family.second]).sqrt() for p in params]
            if family.corrected:
                steps = [float(optimizer.state[p]["step"]) for p in params]
                roots = [
                    r / math.sqrt(1 - options["betas"][family.beta] ** t) for r, t in zip(roots, steps, strict=True)
                ]
            ratios = [torch.where(r > 0, g / r, 0.0) ** 2 for g, r in zip(grads, roots, strict=True)]
            row[f"optim_grad/over_second_moment/{name}"] = math.sqrt(_mean(ratios))
            row[f"optim_grad/below_eps/{name}"] = _mean([(r < options["eps"]).double() for r in roots])
        return row


class Rectified(Net):
    """Has dead units, whose gradients are exactly 0, and gradients above and below the limit by turns."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x)) - 1))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (0.1 if batch_idx % 3 else 10)


def _step_without_decay(optimizer, coefficient: float) -> dict[Tensor, Tensor]:
    """By parameter, where an optimizer like this, in the same state, would take it."""
    twins, groups = {}, []
    for group in optimizer.param_groups:
        copies = {p: torch.nn.Parameter(p.detach().clone()) for p in group["params"]}
        for param, twin in copies.items():
            twin.grad = param.grad * coefficient
        twins |= copies
        groups.append({**group, "params": list(copies.values())})
    other = type(optimizer)(groups, lr=optimizer.defaults["lr"])
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["weight_decay"] = 0.0
    other.load_state_dict(saved)
    other.step()
    return {param: _double(twin) for param, twin in twins.items()}


def _solved(change: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """The second part of ``change`` = a·``direction`` + b·``weight``."""
    columns = torch.stack([direction.flatten(), weight.flatten()], 1)
    return torch.linalg.lstsq(columns, change.reshape(-1, 1)).solution[1] * weight


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone()


def _norm(tensors) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _mean(tensors) -> float:
    return sum(float(t.sum()) for t in tensors) / sum(t.numel() for t in tensors)


def train(logger, family: Family, clips: bool, count: int = 8, **options) -> list[dict[str, float]]:
    """What was to be shown at each step of a run."""
    witness = Witness(family, clips)
    # A rate this high makes weights move by more than their own rounding.
    configure = lo.ConfigureOptimizers(
        **family.arguments, lr=0.01, weight_decay=0.2, param_groups=RULES, schedule="cosine", warmup=2
    )
    parts = [configure, witness, lo.OptimizerMonitor(), *([lo.GradientClipping(MAX_NORM)] if clips else [])]
    make_trainer(parts, logger=logger, **options).fit(Rectified(), batches(count))
    return witness.rows


def fit(logger, family: Family, clips: bool, **options) -> tuple[list[dict[str, float]], dict]:
    """The same, and what was shown."""
    return train(logger, family, clips, **options), read_events(logger.log_dir)


def compare(rows, events, rel=2e-5) -> None:
    own = ("optim_loss/", "optim_speed/", "optim_health/", "optim_grad/noise", "optim_grad/batch")
    shown = {tag for tag in events if tag.startswith("optim_") and not tag.startswith(own)}
    assert shown == {tag for row in rows for tag in row if not tag.startswith(own)}
    for tag in shown:
        expected = [(step, row[tag]) for step, row in enumerate(rows) if tag in row]
        assert [step for step, _ in events[tag]] == [step for step, _ in expected], tag
        values = [value for _, value in events[tag]]
        least = 1e-6 if "share" in tag else 1e-9  # which is a difference
        assert values == pytest.approx([value for _, value in expected], rel=rel, abs=least), tag
