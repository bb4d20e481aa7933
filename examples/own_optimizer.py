"""An optimizer of one's own: a rule, a class with a name, one step under observation, then a Lightning Trainer.

The rule is Tiger, a momentum of which only the sign is used: https://github.com/bojone/tiger

Run with ``python examples/own_optimizer.py [MAX_EPOCHS]``.
"""

import sys

import lightning as L
from digits import Digits, DigitsNet
from torch.nn import functional as F

import lightning_optim as lo
from lightning_optim.kernels.rules import UpdateRule, sign


class TigerRule(UpdateRule):
    """m ← β·m + (1 − β)·g, and each weight moves by lr·sign(m)."""

    state = ("exp_avg",)
    first_moment = "exp_avg"  # so that the monitor knows the momentum
    counts_steps = False
    compressible = {"exp_avg": True}  # noqa: RUF012 - `state_bits` may store it in 16 or 8 bits

    def scalars(self, group, step, **scalar_state):
        """Return the numbers of one step, computed once for each tensor."""
        return {"lr": group["lr"], "beta": group["beta"], "rest": 1 - group["beta"]}

    @staticmethod
    def update(param, grad, exp_avg, lr, beta, rest):
        """Return what is subtracted from one weight, and its new momentum."""
        exp_avg = beta * exp_avg + rest * grad
        return lr * sign(exp_avg), exp_avg


@lo.optim.register("tiger")
class Tiger(lo.optim.FusedOptimizer):
    """Sign of a momentum, with one value of state per parameter.

    Args:
        params: Parameters, groups, or (name, parameter) pairs.
        lr: Learning rate, the size of each step.
        beta: Decay rate of the momentum, in [0, 1).
        weight_decay: λ ≥ 0; its meaning is ``weight_decay_kind``.
        **options: Options that all optimizers share; see `lightning_optim.optim.SharedOptions`.
    """

    when_to_use = "Half of AdamW's state."
    memory = "1 value"
    paper = "https://github.com/bojone/tiger"

    def __init__(self, params, lr=1e-3, beta=0.965, weight_decay=0.01, **options):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay}, **options)

    @classmethod
    def rule(cls, group):
        """Return the rule of a parameter group."""
        return TigerRule()


def look() -> None:
    """Print what one step does to each tensor; nothing is trained."""
    L.seed_everything(0)
    model, data = DigitsNet(width=16), Digits()
    data.setup("fit")
    optimizer = Tiger(model.named_parameters(), lr=1e-3)
    images, labels = next(iter(data.train_dataloader()))
    F.cross_entropy(model(images), labels).backward()
    report = lo.debug_step(optimizer, model=model, undo=True)
    print(report)
    assert report.ok


def main(max_epochs: int = 4) -> float:
    """Train on the digits, and return the accuracy on those held out.

    Args:
        max_epochs: Epochs.
    """
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lo.ConfigureOptimizers("tiger", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup="5%"),
            lo.GradientClipping(max_norm=1.0),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(),
        ],
    )
    trainer.fit(DigitsNet(width=16), datamodule=Digits())
    return float(trainer.callback_metrics["val_acc"])


if __name__ == "__main__":
    look()
    print(f"\naccuracy {main(*map(int, sys.argv[1:2])):.3f}")
