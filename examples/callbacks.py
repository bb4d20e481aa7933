"""The run of ``char_lm.yaml`` from Python: callbacks on a Trainer, the module as it was.

Run with ``python examples/callbacks.py [MAX_STEPS]``.
"""

import sys

import lightning as L
from char_lm import CharLM, StdlibText
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_optim as lo


def main(max_steps: int = -1) -> L.Trainer:
    """Train and print the summary.

    Args:
        max_steps: Optimizer steps at most; -1 for one epoch.
    """
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=1,
        max_steps=max_steps,
        accelerator="cpu",
        log_every_n_steps=10,
        enable_model_summary=False,
        logger=TensorBoardLogger("runs", name="char_lm", default_hp_metric=False),
        callbacks=[
            lo.ConfigureOptimizers(
                "adamw",
                lr=3e-3,
                weight_decay=0.1,
                optimizer_kwargs={"betas": (0.9, 0.95)},
                schedule=lo.schedules.Cosine(warmup="5%", final=0.1),
            ),
            lo.GradientClipping(max_norm=1.0),
            lo.DivergenceGuard(),
            lo.OptimizerMonitor(),
            lo.RunSummary({"val_loss": "validation loss (nats per byte)"}),
        ],
    )
    trainer.fit(CharLM(), datamodule=StdlibText())
    return trainer


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
