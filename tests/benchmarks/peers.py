"""The fastest published implementations of each optimizer, as their users would construct them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from tests.optim.published import timm

Make = Callable[[Iterable[Any]], Optimizer]


def peers(name: str) -> dict[str, Make]:
    """Candidates for the fastest published form of the optimizer called ``name``."""
    import optimi
    import prodigyopt
    import pytorch_optimizer as po
    import schedulefree
    from lion_pytorch import Lion

    t = torch.optim
    table: dict[str, dict[str, Make]] = {
        "sgd": {"torch fused": lambda p: t.SGD(p, lr=1e-3, momentum=0.9, fused=True)},
        "adagrad": {"torch fused": lambda p: t.Adagrad(p, fused=True)},
        "rmsprop": {
            "torch foreach": lambda p: t.RMSprop(p, foreach=True),
            "torch": lambda p: t.RMSprop(p, foreach=False),
        },
        "adam": {"torch fused": lambda p: t.Adam(p, fused=True)},
        "adamw": {"torch fused": lambda p: t.AdamW(p, fused=True)},
        "nadam": {"torch foreach": lambda p: t.NAdam(p, foreach=True), "torch": lambda p: t.NAdam(p, foreach=False)},
        "radam": {
            "torch foreach": lambda p: t.RAdam(p, foreach=True),
            "optimi": lambda p: optimi.RAdam(p, lr=1e-3, triton=False),
        },
        "nadamw": {"timm": lambda p: timm("nadamw").NAdamW(p, lr=1e-3)},
        "lion": {
            "optimi": lambda p: optimi.Lion(p, lr=1e-4, triton=False),
            "lion-pytorch": lambda p: Lion(p, lr=1e-4),
            "timm": lambda p: timm("lion").Lion(p, lr=1e-4),
        },
        "adafactor": {
            "torch foreach": lambda p: t.Adafactor(p, foreach=True),
            "torch": lambda p: t.Adafactor(p, foreach=False),
        },
        "stableadamw": {"optimi": lambda p: optimi.StableAdamW(p, lr=1e-3, triton=False)},
        "lamb": {"timm": lambda p: timm("lamb").Lamb(p, lr=1e-3, max_grad_norm=None)},
        "lars": {"timm": lambda p: timm("lars").Lars(p, lr=1e-3, momentum=0.9)},
        "muon": {"torch": lambda p: t.Muon(p)},
        "normuon": {"pytorch_optimizer": lambda p: po.NorMuon([{"params": list(p), "use_muon": True}])},
        "soap": {"pytorch_optimizer": lambda p: po.SOAP(p)},
        "schedulefreeadamw": {"schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, foreach=True)},
        "adopt": {"timm": lambda p: timm("adopt").Adopt(p, lr=1e-3), "pytorch_optimizer": lambda p: po.ADOPT(p)},
        "ademamix": {"pytorch_optimizer": lambda p: po.AdEMAMix(p)},
        "prodigy": {"prodigyopt": lambda p: prodigyopt.Prodigy(p)},
        "adan": {"optimi": lambda p: optimi.Adan(p, lr=1e-3, triton=False), "pytorch_optimizer": lambda p: po.Adan(p)},
    }
    return table.get(name, {})
