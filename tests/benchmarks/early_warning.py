"""How many steps before the other alarms an early warning comes: ``python -m tests.benchmarks.early_warning``.

Three networks are trained by AdamW, and diverge because something is made wrong at step 300. Nothing is skipped. For
each run: the step after the fault at which an update is first called too large, and that of the first alarm about the
loss or the gradient norm (spike, slow divergence, not finite). Prints Markdown; takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_optim import optim
from lightning_optim.divergence import DivergenceJudge, EarlyWarning, SlowDivergence, Spikes, StepGuard
from lightning_optim.step import StepPipeline
from tests.benchmarks.timing import table
from tests.divergence.trainings import TRAININGS, Training

AT = 300
"""The step at which something goes wrong."""

RATES = {"perceptron": 0.003, "GRU": 0.005, "transformer": 0.003}
"""Good learning rates of AdamW."""

OTHERS = ("spike", "slow_divergence", "jump", "nonfinite")


@dataclass(frozen=True)
class Fault:
    """What is made wrong.

    Args:
        rate: Factor on the learning rate at a step, counted from the fault on.
        beta2: Decay of the second moment at a step.
        gradient: Factor on the gradient of the victim, a matrix in the middle of the network, or of all layers.
        everywhere: Whether all layers are victims.
    """

    rate: Callable[[int], float] = lambda k: 1.0
    beta2: Callable[[int], float] = lambda k: 0.999
    gradient: Callable[[int], float] = lambda k: 1.0
    everywhere: bool = False


FAULTS: dict[str, Fault] = {
    "none": Fault(),
    "rate x30": Fault(rate=lambda k: 30.0 if k >= 0 else 1.0),
    "rate x10": Fault(rate=lambda k: 10.0 if k >= 0 else 1.0),
    "rate grows by 5 % a step": Fault(rate=lambda k: 1.05 ** max(k, 0)),
    "β₂ becomes 0.1": Fault(beta2=lambda k: 0.1 if k >= 0 else 0.999),
    "lull of one layer, then gradients x1000": Fault(rate=lambda k: 10.0, gradient=lambda k: 1e-3 if k < 0 else 1.0),
    "lull of all layers, then gradients x1000": Fault(
        rate=lambda k: 10.0, gradient=lambda k: 1e-3 if k < 0 else 1.0, everywhere=True
    ),
    "one layer's gradient x-3": Fault(gradient=lambda k: -3.0 if k >= 0 else 1.0),
    "one layer's gradient x-30": Fault(gradient=lambda k: -30.0 if k >= 0 else 1.0),
    "one layer's gradient x-1": Fault(gradient=lambda k: -1.0 if k >= 0 else 1.0),
}
"""All faults by name."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run; steps count from the fault on.

    Args:
        early: First step whose update was called too large; None for none.
        other: First step with an alarm about loss or gradient norm; None for none.
        before: Number of steps before the fault whose update was called too large.
        loss: Mean of the last 20 losses over that of the 20 before the fault.
        worst: Indices of the parameters named first.
        victim: Index of the parameter that is the victim.
    """

    early: int | None
    other: int | None
    before: int
    loss: float
    worst: tuple[int, ...]
    victim: int


def run(network: str, fault: str, seed: int, steps: int = 500, limits: EarlyWarning | None = None) -> Outcome:
    """Train one network, and note when it is noticed that something is wrong.

    Args:
        network: Name of one of `RATES`.
        fault: Name of one of `FAULTS`.
        seed: Seed of weights and batches.
        steps: Number of steps.
        limits: When an update is too large; None for the defaults.
    """
    torch.manual_seed(seed)
    training, what = _training(network), FAULTS[fault]
    model: nn.Module = training.network()
    inputs, targets = training.data()
    params = list(model.parameters())
    matrices = [place for place, param in enumerate(params) if param.dim() > 1]
    victim = matrices[len(matrices) // 2]
    optimizer = optim.AdamW(params, lr=RATES[network], weight_decay=0.0)
    losses: list[Tensor] = []
    guard = StepGuard(Spikes().window_of(2), (), lambda: losses[-1], early_warning=limits or EarlyWarning())
    judge = DivergenceJudge(SlowDivergence())
    pipeline = StepPipeline(optimizer, detectors=[guard])
    rng = torch.Generator().manual_seed(seed)
    early: list[int] = []
    other: list[int] = []
    worst: tuple[int, ...] = ()
    for step in range(steps):
        after = step - AT
        group = optimizer.param_groups[0]
        group["lr"] = RATES[network] * min(1.0, (step + 1) / 50) * what.rate(after)
        group["betas"] = (0.9, what.beta2(after))
        rows = torch.randint(len(inputs), (training.batch_size,), generator=rng)
        optimizer.zero_grad()
        loss = training.loss(model(inputs[rows]), targets[rows])
        loss.backward()
        losses.append(loss.detach())
        for param in params if what.everywhere else [params[victim]]:
            assert param.grad is not None
            param.grad.mul_(what.gradient(after))
        optimizer.step()
        for seen in guard.read():
            if seen.early:
                early.append(after)
                worst = worst or (seen.early[0].worst if after >= 0 else ())
            other += [after for alarm in judge.update(seen, {}) if alarm.kind in OTHERS]
    pipeline.close()
    mean = [float(torch.stack(part).mean()) for part in (losses[AT - 20 : AT], losses[-20:])]
    return Outcome(_first(early), _first(other), sum(k < 0 for k in early), mean[1] / mean[0], worst, victim)


def _first(steps: Sequence[int]) -> int | None:
    return next((step for step in steps if step >= 0), None)


def _training(network: str) -> Training:
    return next(training for name, training in TRAININGS.items() if name.startswith(network))


def row(network: str, fault: str, outcomes: Sequence[Outcome]) -> list[object]:
    """Return the row of one fault: when each run was noticed, and how much earlier the warning came."""
    leads = [o.other - o.early for o in outcomes if o.early is not None and o.other is not None]
    pairs = (f"{'-' if o.early is None else o.early} / {'-' if o.other is None else o.other}" for o in outcomes)
    first = sum(o.early is not None and (o.other is None or o.early < o.other) for o in outcomes)
    rise = sorted(o.loss for o in outcomes)[len(outcomes) // 2]
    lead = sorted(leads)[(len(leads) - 1) // 2] if leads else "-"
    rises = f"{rise:.3g}" if math.isfinite(rise) else "∞"
    return [fault, network, rises, ", ".join(pairs), f"{first} of {len(outcomes)}", lead]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="*", default=list(RATES))
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = ["fault", "network", "loss, times", "warning / other alarm, after steps", "earlier", "by steps, median"]
    for index, fault in enumerate(arguments.faults):
        for network in arguments.networks:
            outcomes = [run(network, fault, seed) for seed in arguments.seeds]
            lines = table(header, [row(network, fault, outcomes)]).splitlines()
            print("\n".join(lines if index == 0 and network == arguments.networks[0] else lines[2:]), flush=True)


if __name__ == "__main__":
    main()
