"""One row per optimizer: its settings, and what each is compared with. All tests in this folder run over all rows.

Adding an optimizer adds a row to `CASES`, and no test.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lion_pytorch
import optimi
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import optim
from tests.optim import published

# Triton runs on the CPU under its interpreter only, which must be asked for before it is imported.
BACKENDS = ("reference", "cpu", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []))


@dataclass(frozen=True)
class Setting:
    """Constructor arguments, and the published optimizer that does the same.

    Args:
        name: Shown in test names.
        arguments: For ours; for the published one too unless ``theirs`` is given.
        theirs: Arguments of the published one.
        reference: Makes the published one from groups and arguments; None for the row's.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] | None = None
    reference: Callable[..., Optimizer] | None = None


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Args:
        optimizer: Ours; of any arguments, for each takes its own.
        reference: The published one.
        settings: Each is compared with the published one, step by step, and goes through every other test.
        torch_twin: torch's optimizer whose state dicts load into ours and back.
        tolerance: Largest difference after 30 float64 steps.
        shapes: Shapes of parameters in the comparison; Muon and SOAP take matrices only, say.
        elementwise: Whether the rule is an `UpdateRule`.
        one_lr: Whether the published one refuses groups that differ in learning rate.
        decays_frozen: Whether the published one decays the weights of a group whose learning rate is 0.
        group_steps: Whether the published one counts steps by group, where ours counts them for each parameter.
    """

    optimizer: Any
    reference: Callable[..., Optimizer]
    settings: tuple[Setting, ...]
    torch_twin: type[Optimizer] | None = None
    tolerance: float = 1e-12
    shapes: tuple[tuple[int, ...], ...] = ((7, 5), (3,), (2, 3, 4), (11,))
    elementwise: bool = True
    one_lr: bool = False
    decays_frozen: bool = False
    group_steps: bool = False


_CAUTIOUS = {"cautious": True}
_MATRICES = ((7, 5), (6, 9), (12, 4), (8, 8))  # no two of one shape, for the published ones do not batch
_OPTIMI = {"foreach": False, "triton": False}


def _lamb(*args: Any, **kwargs: Any) -> Optimizer:
    optimizer: Optimizer = published.timm("lamb").Lamb(*args, max_grad_norm=None, **kwargs)
    return optimizer


def _prodigy(*args: Any, **kwargs: Any) -> Optimizer:
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: Optimizer = prodigyopt.Prodigy(*args, **kwargs)
    return optimizer


class _NorMuon(pytorch_optimizer.NorMuon):
    """With its defaults in groups that join late, which it forgets."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        first = self.param_groups[0] if self.param_groups else {}
        super().add_param_group({k: v for k, v in first.items() if k not in ("params", "step")} | param_group)


def _normuon(params: Any, **kwargs: Any) -> Optimizer:
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    groups = [{"lr": kwargs["lr"], **group, "use_muon": True} for group in groups]
    return _NorMuon(groups, foreach=False, **kwargs)


def _torch_nadam(*args: Any, **kwargs: Any) -> Optimizer:
    """torch's NAdam with its product of momenta in float64, as ours keeps it."""
    optimizer = torch.optim.NAdam(*args, **kwargs)
    optimizer.register_step_pre_hook(lambda *_: torch.set_default_dtype(torch.float64))
    optimizer.register_step_post_hook(lambda *_: torch.set_default_dtype(torch.float32))
    return optimizer


def _schedule_free(*args: Any, **kwargs: Any) -> Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(*args, **kwargs)
    optimizer.train()
    return optimizer


class _ScheduleFreeWrapper(schedulefree.ScheduleFreeWrapper):
    """With what it needs of groups, of those too that join late."""

    def __init__(self, base: Optimizer, **kwargs: Any) -> None:
        super().__init__(base, **kwargs)
        for group in base.param_groups:
            self._begin(group)
        self.train()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._begin(self.param_groups[-1])

    def _begin(self, group: dict[str, Any]) -> None:
        # At a rate of 0 the wrapper divides by the sum of weights, 0; the same authors' AdamW averages nothing there.
        group["weight_sum"] = 5e-324  # which nothing that is added will show
        for param in group["params"]:
            # torch's makes its state where there is none, and the wrapper has put z there by then.
            zeros = {name: torch.zeros_like(param, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.state[param] = {"step": torch.tensor(0.0), **zeros}


def _schedule_free_around_adamw(params: Any, momentum: float, weight_decay_at_y: float, **kwargs: Any) -> Any:
    inner = torch.optim.AdamW(params, weight_decay=0.0, **kwargs)
    return _ScheduleFreeWrapper(inner, weight_decay_at_y=weight_decay_at_y, momentum=momentum)


CASES = (
    Case(
        optim.AdamW,
        torch.optim.AdamW,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("no_decay", {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-4}),
            Setting("amsgrad", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
            Setting("maximize", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
            Setting(
                "cautious",
                {"lr": 1e-2, "weight_decay": 0.1, **_CAUTIOUS},
                {"lr": 1e-2, "weight_decay": 0.1, "caution": True},
                lambda *args, **kwargs: published.timm("adamw").AdamWLegacy(*args, **kwargs),
            ),
        ),
        torch_twin=torch.optim.AdamW,
    ),
    Case(
        optim.Adam,
        torch.optim.Adam,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
            Setting("amsgrad", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
            Setting(
                "decoupled",
                {"lr": 1e-2, "weight_decay": 0.1, "weight_decay_kind": "decoupled"},
                {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
            ),
        ),
        torch_twin=torch.optim.Adam,
    ),
    Case(
        optim.SGD,
        torch.optim.SGD,
        (
            Setting("plain", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1}),
            Setting("momentum", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
            Setting("dampening", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
            Setting("nesterov", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "maximize": True}),
        ),
        torch_twin=torch.optim.SGD,
    ),
    Case(
        optim.Lion,
        lambda *args, **kwargs: lion_pytorch.Lion(*args, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.95, 0.98)}),
            Setting(
                "cautious",
                {"lr": 1e-2, "weight_decay": 0.1, "maximize": True, **_CAUTIOUS},
                {"lr": 1e-2, "weight_decay": 0.1, "maximize": True, "caution": True, "foreach": False},
                lambda *args, **kwargs: published.timm("lion").Lion(*args, **kwargs),
            ),
        ),
    ),
    Case(
        optim.Adagrad,
        torch.optim.Adagrad,
        (
            Setting("default", {"lr": 1e-2}),
            Setting(
                "all",
                {"lr": 1e-2, "weight_decay": 0.1, "lr_decay": 0.03, "initial_accumulator_value": 0.1, "eps": 1e-4},
            ),
            Setting("maximize", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}),
        ),
        torch_twin=torch.optim.Adagrad,
    ),
    Case(
        optim.RMSprop,
        torch.optim.RMSprop,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "alpha": 0.9, "eps": 1e-4}),
            Setting("momentum", {"lr": 1e-2, "momentum": 0.9}),
            Setting("centered", {"lr": 1e-2, "centered": True, "eps": 1e-3, "maximize": True}),
            Setting("both", {"lr": 1e-2, "centered": True, "eps": 1e-3, "momentum": 0.8, "weight_decay": 0.1}),
        ),
        torch_twin=torch.optim.RMSprop,
    ),
    Case(
        optim.NAdam,
        _torch_nadam,
        (
            Setting("default", {"lr": 1e-2}),
            Setting(
                "decay", {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.02, "betas": (0.8, 0.95), "eps": 1e-4}
            ),
            Setting("decoupled", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
        ),
        torch_twin=torch.optim.NAdam,
    ),
    Case(
        optim.RAdam,
        torch.optim.RAdam,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
            Setting("never_rectified", {"lr": 1e-2, "betas": (0.5, 0.6)}),
            Setting("decoupled", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
        ),
        torch_twin=torch.optim.RAdam,
    ),
    Case(
        optim.NAdamW,
        lambda *args, **kwargs: published.timm("nadamw").NAdamW(*args, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting("maximize", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "maximize": True}),
            Setting(
                "cautious",
                {"lr": 1e-2, "weight_decay": 0.1, **_CAUTIOUS},
                {"lr": 1e-2, "weight_decay": 0.1, "caution": True},
            ),
        ),
    ),
    Case(
        optim.ADOPT,
        lambda *args, decoupled=True, **kwargs: published.timm("adopt").Adopt(*args, decoupled=decoupled, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "maximize": True}),
            Setting("no_clipping", {"lr": 1e-3, "eps": 1e-2, "clip_exp": None}),
            Setting(
                "l2",
                {"lr": 1e-2, "weight_decay": 0.1, "weight_decay_kind": "l2"},
                {"lr": 1e-2, "weight_decay": 0.1, "decoupled": False},
            ),
            Setting(
                "cautious",
                {"lr": 1e-2, "weight_decay": 0.1, **_CAUTIOUS},
                {"lr": 1e-2, "weight_decay": 0.1, "caution": True},
            ),
        ),
    ),
    Case(
        optim.AdEMAMix,
        lambda params, **kwargs: pytorch_optimizer.AdEMAMix(params, weight_decouple=True, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting(
                "decay",
                {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95, 0.99), "eps": 1e-4, "alpha": 3.0}
                | {"maximize": True},
            ),
            Setting(
                "warmup",
                {"lr": 1e-2, "weight_decay": 0.1, "alpha_warmup": 20, "beta3_warmup": 20},
                {"lr": 1e-2, "weight_decay": 0.1, "t_alpha_beta3": 20},
            ),
        ),
    ),
    Case(
        optim.Adan,
        lambda *args, **kwargs: pytorch_optimizer.Adan(*args, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting("proximal", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.8, 0.95), "eps": 1e-4}),
            # No maximize: the published one turns the first gradient around, but not what it takes a difference from.
            Setting(
                "no_prox",
                {"lr": 1e-2, "weight_decay": 0.1, "no_prox": True},
                {"lr": 1e-2, "weight_decay": 0.1, "weight_decouple": True},
            ),
        ),
    ),
    Case(
        optim.ScheduleFreeAdamW,
        _schedule_free,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("warmup", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4, "warmup_steps": 7}),
            Setting("weighted", {"lr": 1e-2, "r": 1.5, "weight_lr_power": 1.0}),
            Setting(
                "inner_momentum",
                {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "inner_momentum": 0.6},
                {"lr": 1e-2, "weight_decay_at_y": 0.1, "momentum": 0.8, "betas": (0.6, 0.95)},
                _schedule_free_around_adamw,
            ),
        ),
    ),
    Case(
        optim.StableAdamW,
        lambda *args, **kwargs: optimi.StableAdamW(*args, **kwargs),
        (
            Setting("default", {"lr": 1e-2}, {"lr": 1e-2, **_OPTIMI}),
            Setting(
                "no_decay",
                {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3},
                {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3, **_OPTIMI},
            ),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.3}, {"lr": 1e-2, "weight_decay": 0.3, **_OPTIMI}),
        ),
        group_steps=True,
    ),
    Case(
        optim.LAMB,
        _lamb,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("no_decay", {"lr": 1e-2, "weight_decay": 0.0, "bias_correction": False}),
            Setting("always_adapt", {"lr": 1e-2, "weight_decay": 0.0, "always_adapt": True}),
            Setting("trust_clip", {"lr": 1e-2, "weight_decay": 0.3, "trust_clip": True, "betas": (0.8, 0.95)}),
            Setting("decoupled", {"lr": 1e-2, "weight_decay": 0.3, "decoupled_decay": True}),
            Setting(  # without a trust ratio, before which the published one masks
                "cautious",
                {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-3, **_CAUTIOUS},
                {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-3, "caution": True},
            ),
        ),
        group_steps=True,
    ),
    Case(
        optim.LARS,
        lambda *args, **kwargs: published.timm("lars").Lars(*args, **kwargs),
        (
            Setting("default", {"lr": 0.1}),
            Setting("decay", {"lr": 0.1, "weight_decay": 0.1, "trust_coeff": 0.1}),
            Setting("momentum", {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1}),
            Setting("dampening", {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3, "eps": 0.1}),
            Setting(
                "nesterov", {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "trust_coeff": 0.02}
            ),
            Setting("trust_clip", {"lr": 0.1, "momentum": 0.9, "always_adapt": True, "trust_clip": True}),
        ),
    ),
    Case(
        optim.Prodigy,
        _prodigy,
        (
            Setting("default", {"lr": 1.0, "d0": 1e-3}),
            Setting("decay", {"lr": 1.0, "weight_decay": 0.1, "d0": 1e-2}),
            Setting(
                "bias_correction",
                {"lr": 1.0, "weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "d0": 1e-2},
            ),
            Setting(
                "l2",
                {"lr": 0.5, "weight_decay": 0.1, "weight_decay_kind": "l2", "d_coef": 2.0, "d0": 1e-2},
                {"lr": 0.5, "weight_decay": 0.1, "decouple": False, "d_coef": 2.0, "d0": 1e-2},
            ),
            Setting("safeguard_warmup", {"lr": 1.0, "safeguard_warmup": True, "d0": 1e-2, "eps": 1e-3}),
            Setting("growth_rate", {"lr": 1.0, "growth_rate": 1.1, "beta3": 0.9, "d0": 1e-2}),
        ),
        one_lr=True,
        decays_frozen=True,
        group_steps=True,
    ),
    Case(
        optim.Adafactor,
        torch.optim.Adafactor,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 0.1, "weight_decay": 0.1, "eps": (1e-3, 1e-2), "d": 1.5, "beta2_decay": -0.5}),
            Setting("maximize", {"lr": 1e-2, "maximize": True}),
        ),
        torch_twin=torch.optim.Adafactor,
        shapes=((7, 5), (3,), (2, 3, 4), (300, 257)),
        elementwise=False,
    ),
    Case(
        optim.Muon,
        torch.optim.Muon,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("plain", {"lr": 1e-2, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0, "eps": 0.1}),
            Setting(
                "match_rms",
                {"lr": 1e-2, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
            ),
        ),
        torch_twin=torch.optim.Muon,
        shapes=_MATRICES,
        elementwise=False,
    ),
    Case(
        optim.NorMuon,
        _normuon,
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.1, "nesterov": False, "beta2": 0.8, "maximize": True}),
            Setting(
                "match_rms",
                {"lr": 1e-2, "adjust_lr_fn": "match_rms_adamw"},
                {"lr": 1e-2, "update_scale": "match_rms"},
            ),
        ),
        shapes=(*_MATRICES, (4, 3, 2, 5)),
        elementwise=False,
    ),
    Case(
        optim.SOAP,
        lambda *args, **kwargs: pytorch_optimizer.SOAP(*args, **kwargs),
        (
            Setting("default", {"lr": 1e-2}),
            Setting("decay", {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.8), "precondition_frequency": 3}),
            Setting(
                "shampoo_beta", {"lr": 1e-2, "weight_decay": 0.0, "shampoo_beta": 0.7, "precondition_frequency": 5}
            ),
            Setting("max_dim", {"lr": 1e-2, "max_precondition_dim": 5, "precondition_frequency": 2}),
        ),
        shapes=((5, 5), (8, 8), (4,), (6, 6)),  # of full rank: elsewhere the first bases are not unique
        elementwise=False,
        group_steps=True,
    ),
)


def each_setting(cases: tuple[Case, ...] = CASES) -> list[Any]:
    """Parameters `case, setting` of a test over all settings of all optimizers."""
    return [pytest.param(c, s, id=f"{c.optimizer.__name__}-{s.name}") for c in cases for s in c.settings]


def each_kernel(cases: tuple[Case, ...] = CASES) -> list[Any]:
    """As `each_setting`; settings that need no other kernel than one before them of their optimizer are slow."""
    seen = set()
    params = []
    for param in each_setting(cases):
        case, setting = param.values
        group = case.optimizer.hyperparameters() | setting.arguments
        kernel = (case.optimizer, type(case.optimizer.rule(group)), group.get("cautious", False))
        marks = [pytest.mark.slow] if kernel in seen else []
        params.append(pytest.param(case, setting, id=param.id, marks=marks))
        seen.add(kernel)
    return params


def each_case(cases: tuple[Case, ...] = CASES) -> list[Any]:
    """Parameter `case` of a test over all optimizers."""
    return [pytest.param(c, id=c.optimizer.__name__) for c in cases]


def parameters(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, shapes: tuple[tuple[int, ...], ...] | None = None
) -> list[Tensor]:
    """Fresh parameters of the case's shapes; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes or case.shapes
    ]


def copies(params: list[Tensor]) -> list[Tensor]:
    """Independent parameters of equal values."""
    return [param.detach().clone().requires_grad_() for param in params]


def groups_of(params: list[Tensor], lr: float, case: Case | None = None) -> list[dict[str, Any]]:
    """Two parameter groups, the second with a learning rate of its own.

    With a ``case``, four, as far as its published optimizer can: of the given rate, another one, 0, and the first.
    """
    if case is None:
        half = len(params) // 2
        return [{"params": params[:half]}, {"params": params[half:], "lr": lr / 2}]
    rates = [lr, lr if case.one_lr else lr / 2, 0.0, lr]
    groups: list[dict[str, Any]] = [{"params": [p], "lr": rate} for p, rate in zip(params[:3], rates, strict=False)]
    groups.append({"params": params[3:], "lr": rates[3]})
    if case.decays_frozen:
        groups[2]["weight_decay"] = 0.0
    return groups


def gradients(params: list[Tensor], steps: int, seed: int = 1) -> Iterator[list[Tensor]]:
    """Gradients for ``steps`` steps, some exactly zero; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [
            (torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
            * (torch.rand(p.shape, generator=generator) > 0.05)
            for p in params
        ]


def give(params: list[Tensor], grads: list[Tensor]) -> None:
    """Set gradients."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()


def run(optimizer: Optimizer, params: list[Tensor], steps: int, seed: int = 1) -> None:
    """Take ``steps`` steps."""
    for grads in gradients(params, steps, seed):
        give(params, grads)
        optimizer.step()


def assert_same(first: Any, second: Any) -> None:
    """Bit-equal values, dtypes and structure."""
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        assert first.dtype == second.dtype
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second
