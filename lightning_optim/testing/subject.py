"""The optimizer under test, and runs of it with given gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.suggest import nearest
from lightning_optim.testing.compare import change

MATRICES = ((4, 3), (3, 5))
"""Shapes of the parameters unless a check is about shapes: matrices, which every optimizer can train."""


class CheckFailed(Exception):  # noqa: N818 - it is an outcome
    """The optimizer does something else than expected; the message says what was seen."""


class CheckSkipped(Exception):  # noqa: N818 - it is an outcome
    """The check does not apply; the message says why."""


class Subject:
    """The optimizer under test.

    Args:
        factory: A function that makes the optimizer of parameters, or its class.
        hyperparameters: Arguments of the class.
        reference: The update as a plain function, see `lightning_optim.testing.check_optimizer`.
        device: Device of the parameters.
        claims: Facts that must come out so.

    Attributes:
        facts: What the checks have found out, by name.

    Raises:
        TypeError: ``factory`` cannot be called, or has no such argument.
        ValueError: There is no such device here.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        hyperparameters: dict[str, Any] | None = None,
        *,
        reference: Callable[..., Any] | None = None,
        device: str = "cpu",
        claims: dict[str, str] | None = None,
    ) -> None:
        self.options = dict(hyperparameters or {})
        while isinstance(factory, functools.partial) and not factory.args:
            self.options = {**factory.keywords, **self.options}
            factory = factory.func
        if not callable(factory):
            raise TypeError(f"Invalid factory={factory!r}: must be a class, or a function that makes an optimizer.")
        self.factory = factory
        self.name = getattr(factory, "__name__", type(factory).__name__)
        self.arguments, self.takes_any = _arguments(factory)
        for name in self.options:
            if not self.takes_any and name not in self.arguments:
                known = nearest(name, self.arguments) if self.arguments else "It takes parameters alone."
                raise TypeError(f"{self.name} has no argument {name!r}. {known}")
        self.reference = reference
        self.device = _device(device)
        self.claims = dict(claims or {})
        self.facts: dict[str, str] = {}

    # Making one.

    @property
    def is_class(self) -> bool:
        """Whether arguments can be given, because the factory is a class."""
        return inspect.isclass(self.factory)

    def make(self, params: Iterable[Any], **options: Any) -> Any:
        """Make an optimizer.

        Args:
            params: Parameters or groups.
            **options: Hyperparameters that differ: arguments of the class, or values of every group.

        Raises:
            CheckSkipped: There is no such hyperparameter.
            TypeError: The factory makes something else.
        """
        given = {n: v for n, v in options.items() if self.is_class and n in self.arguments}
        optimizer = self.factory(params, **{**self.options, **given})
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise TypeError(f"{self.name} makes no optimizer but {type(optimizer).__name__}")
        for name in options.keys() - given.keys():
            for group in optimizer.param_groups:
                if name not in group:
                    raise CheckSkipped(f"it has no hyperparameter {name!r}")
                group[name] = options[name]
        if callable(train := getattr(optimizer, "train", None)):
            train()  # Schedule-free optimizers hold the weights of training and those of evaluation.
        return optimizer

    def value(self, name: str) -> Any:
        """Return the value of a hyperparameter as the first group has it.

        Raises:
            CheckSkipped: There is no such hyperparameter.
        """
        group = self.make(self.parameters()).param_groups[0]
        if name not in group:
            raise CheckSkipped(f"its groups have no {name!r}")
        return group[name]

    def without_decay(self) -> dict[str, Any]:
        """Return the options of an optimizer that only follows the gradient."""
        return {"weight_decay": 0.0} if self.has("weight_decay") else {}

    def has(self, name: str) -> bool:
        """Return whether there is a hyperparameter of that name."""
        if self.is_class and name in self.arguments:
            return True
        return name in self.make(self.parameters()).param_groups[0]

    # Parameters and gradients.

    def parameters(
        self,
        shapes: Sequence[tuple[int, ...]] = MATRICES,
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 0.5,
        seed: int = 1,
    ) -> list[nn.Parameter]:
        """Return parameters with normal entries, the same at each call."""
        values = normal(shapes, seed, scale)
        return [nn.Parameter(value.to(self.device, dtype)) for value in values]

    def gradients(self, params: Sequence[Tensor], steps: int, seed: int = 2, scale: float = 1.0) -> list[list[Tensor]]:
        """Return gradients for some steps: normal with a mean that stays, of the parameters' shapes and dtypes."""
        shapes = [tuple(p.shape) for p in params]
        mean = normal(shapes, seed + 100)
        draws = [normal(shapes, seed + step) for step in range(steps)]
        return [
            [(scale * (m + 0.5 * d)).to(p.device, p.dtype) for m, d, p in zip(mean, draw, params, strict=True)]
            for draw in draws
        ]

    # Steps.

    def step(self, optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor | None], fresh: bool = True) -> Any:
        """Do one step with the given gradients.

        Args:
            optimizer: The optimizer.
            params: The parameters.
            grads: A gradient for each; None for none.
            fresh: Whether each gradient is a new tensor; else it is written into the old one.
        """

        def fill() -> Tensor:
            for param, grad in zip(params, grads, strict=True):
                if fresh or param.grad is None or grad is None:
                    param.grad = None if grad is None else grad.clone()
                else:
                    param.grad.copy_(grad)
            draw_by(grads)
            return torch.zeros((), device=self.device)

        return self.evaluate(optimizer, fill)

    def evaluate(self, optimizer: Any, closure: Callable[[], Tensor]) -> Any:
        """Make gradients by a closure and do one step; the step gets the closure only where it needs one."""
        if needs_closure(optimizer):
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    def run(
        self,
        steps: int = 4,
        *,
        params: Sequence[nn.Parameter] | None = None,
        grads: Sequence[Sequence[Tensor | None]] | None = None,
        optimizer: Any = None,
        **options: Any,
    ) -> tuple[Any, list[nn.Parameter]]:
        """Do some steps and return the optimizer and its parameters.

        Args:
            steps: Number of steps; ignored where ``grads`` are given.
            params: The parameters; None for the usual ones.
            grads: Gradients for each step; None for the usual ones.
            optimizer: One that goes on; None for a new one.
            **options: Hyperparameters that differ.
        """
        params = self.parameters() if params is None else params
        grads = self.gradients(params, steps) if grads is None else grads
        optimizer = self.make(params, **options) if optimizer is None else optimizer
        for each in grads:
            self.step(optimizer, params, each)
        return optimizer, list(params)

    # Findings.

    def fact(self, name: str, value: str) -> None:
        """Note a fact.

        Raises:
            CheckFailed: Something else was claimed.
        """
        self.facts[name] = value
        claimed = self.claims.get(name)
        if claimed is not None and claimed != value:
            raise CheckFailed(f"{name} is {value!r}, claimed was {claimed!r}")

    def same(self, found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
        """Check that tensors are equal bit by bit.

        Raises:
            CheckFailed: They are not.
        """
        if (text := change(found, wanted)) is not None:
            raise CheckFailed(f"{what}: {text}")

    def close(
        self,
        found: Sequence[Tensor],
        wanted: Sequence[Tensor],
        what: str,
        *,
        start: Sequence[Tensor] | None = None,
        rtol: float = 1e-3,
    ) -> None:
        """Check that two runs end alike.

        Args:
            found: Parameters.
            wanted: What they should be.
            what: What differs, for the message.
            start: Where the runs began; the difference is compared with the way from there. None for the usual values.
            rtol: Largest difference as a fraction of the longest way of a weight.

        Raises:
            CheckFailed: They do not.
        """
        start = self.parameters() if start is None else start
        if (text := change(found, wanted, start=start, rtol=rtol)) is not None:
            raise CheckFailed(f"{what}: {text}")

    def finite(self, params: Sequence[Tensor], what: str) -> None:
        """Check that tensors are finite.

        Raises:
            CheckFailed: One is not.
        """
        if not all(bool(p.isfinite().all()) for p in params):
            raise CheckFailed(f"{what}: parameters are not finite")

    def moved(self, params: Sequence[Tensor], start: Sequence[Tensor], what: str) -> None:
        """Check that each of some tensors has changed.

        Raises:
            CheckFailed: One has not.
        """
        for index, (param, before) in enumerate(zip(params, start, strict=True)):
            if param.numel() and torch.equal(param.detach(), before.detach()):
                raise CheckFailed(f"{what}: parameter {index} has not changed")


def needs_closure(optimizer: Any) -> bool:
    """Return whether ``step`` cannot be called without a closure."""
    try:
        # Of the class: schedulers, and this package's clipping, put a function of their own into the instance.
        parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _device(name: str) -> torch.device:
    """Return a device that holds tensors.

    Raises:
        ValueError: There is none of that name here.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"Invalid device={name!r}: must be a device of this machine, as 'cpu' ({reason}).") from None


def draw_by(grads: Sequence[Tensor | None]) -> None:
    """Seed torch's generator from a step's gradients, whatever their scale, sign, dtype and layout.

    An optimizer that draws random numbers thereby draws equal ones in two runs that a check compares, and others at
    each step.
    """
    places = [int(g.abs().argmax()) for g in grads if g is not None and g.numel() and not g.is_sparse]
    torch.manual_seed(sum((place + 1) * 31**index for index, place in enumerate(places)) % 2**31)


def normal(shapes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[Tensor]:
    """Return float64 tensors with normal entries, the same at each call."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale for shape in shapes]


def _arguments(factory: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return names and defaults of what a class takes besides parameters, and whether it takes any others."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return {}, True
    named = [p for p in parameters[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)
