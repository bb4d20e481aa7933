"""The fastest published implementations of each optimizer, as their users would construct them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from tests.optim.published import timm

Make = Callable[[Iterable[Any]], Optimizer]


class StackedMuon(Optimizer):
    """Muon as microsoft/dion computes it on one device: foreach operations, and one stack of matrices per shape."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.01, "mu": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all parameters, of which each must have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                self._step_of(params, shape, group["lr"], group["mu"], group["weight_decay"])

    def _step_of(self, params: list[Any], shape: torch.Size, lr: float, mu: float, decay: float) -> None:
        grads = [param.grad for param in params]
        for param in params:
            if param not in self.state:
                self.state[param]["momentum"] = torch.zeros_like(param)
        momenta = [self.state[param]["momentum"] for param in params]
        torch._foreach_mul_(momenta, mu)
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(torch._foreach_mul(momenta, mu), grads)
        x = torch.stack([u.bfloat16() for u in ahead])
        x = x.mT if shape[0] > shape[1] else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for a, b, c in (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.mT if shape[0] > shape[1] else x
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_sub_(params, [u.float() for u in x], alpha=lr * (shape[0] / shape[1]) ** 0.5)


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
        "muon": {
            "torch": lambda p: t.Muon(p),
            "timm": lambda p: timm("muon").Muon(p, lr=1e-3),
            "pytorch_optimizer": lambda p: po.Muon([{"params": list(p), "use_muon": True}]),
            "dion's formula": StackedMuon,
        },
        "normuon": {"pytorch_optimizer": lambda p: po.NorMuon([{"params": list(p), "use_muon": True}])},
        "soap": {"pytorch_optimizer": lambda p: po.SOAP(p)},
        "schedulefreeadamw": {"schedulefree": lambda p: schedulefree.AdamWScheduleFree(p, foreach=True)},
        "adopt": {"timm": lambda p: timm("adopt").Adopt(p, lr=1e-3), "pytorch_optimizer": lambda p: po.ADOPT(p)},
        "ademamix": {"pytorch_optimizer": lambda p: po.AdEMAMix(p)},
        "prodigy": {"prodigyopt": lambda p: prodigyopt.Prodigy(p)},
        "adan": {"optimi": lambda p: optimi.Adan(p, lr=1e-3, triton=False), "pytorch_optimizer": lambda p: po.Adan(p)},
    }
    return table.get(name, {})
