"""Several optimizers of one module, each of a part of it: a generator and a discriminator, an actor and a critic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core.suggest import nearest
from lightning_optim.core.typed import typed
from lightning_optim.factory.about import about
from lightning_optim.factory.factory import OptimizerFactory
from lightning_optim.param_groups import Entry
from lightning_optim.schedules import Schedule, Warmup

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@typed(own=("optimizer", "schedule", "schedules", "name", "part"))
@dataclass(frozen=True, kw_only=True)
class PartOptimizer:
    """The optimizer of one part of a module; the arguments from ``optimizer`` on are those of `OptimizerFactory`.

    Args:
        name: Name of the optimizer in plans, tags, messages and checkpoints: letters, digits, ``_`` and ``-``.
        part: Path of a submodule as in ``named_modules``, or of a parameter: ``gen``, ``net.encoder``; or several.
        optimizer: Which optimizer.
        lr: Peak learning rate.
        weight_decay: Weight decay of the groups without their own.
        betas: Short for ``optimizer_kwargs={"betas": ...}``.
        optimizer_kwargs: Further arguments of the optimizer.
        schedule: The schedule of the learning rate; it moves with the steps of this optimizer.
        warmup: Length of the warmup for a schedule given by name.
        param_groups: Rules, which see the names that the whole module has for its parameters: ``gen.0.weight``.
        schedules: Schedules of other hyperparameters.

    Raises:
        ValueError: The name is no word, or no part is named.
    """

    name: str
    part: str | Sequence[str]
    optimizer: str | Callable[[Iterable[Any]], Optimizer] | Mapping[str, Any] = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    betas: Sequence[float] | None = None
    optimizer_kwargs: dict[str, Any] | None = None
    schedule: str | Schedule | Callable[[Any], Any] | Mapping[str, Any] | None = None
    warmup: int | str | Warmup | None = None
    param_groups: Sequence[Entry] | None = None
    schedules: Mapping[str, str | Schedule] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"Invalid name={self.name!r} of an optimizer: it must be a word of letters, digits, '_' and '-' that "
                "does not begin with a digit, for instance 'generator'."
            )
        if (
            not isinstance(self.part, str | list | tuple)
            or not self.paths
            or not all(isinstance(path, str) and path for path in self.paths)
        ):
            raise ValueError(
                f"Invalid part={self.part!r} of optimizer {self.name!r}: it must be the path of a submodule, for "
                "instance 'net.encoder', or a list of them."
            )
        self.factory("checkpoint", OptimizerFactory)  # refuses what is wrong now, not where the list is used

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its parts."""
        return (self.part,) if isinstance(self.part, str) else tuple(self.part)

    def factory(self, on_resume: str, make: Callable[..., OptimizerFactory]) -> OptimizerFactory:
        """Make the factory of this optimizer.

        Args:
            on_resume: Its resume policy.
            make: The class.

        Raises:
            ValueError: As `OptimizerFactory`, with the optimizer's name.
            TypeError: As `OptimizerFactory`, with the optimizer's name.
        """
        kwargs = dict(self.optimizer_kwargs or {})
        try:
            if self.betas is not None:
                if "betas" in kwargs:
                    raise ValueError("'betas' is given twice: in optimizer_kwargs and separately.")
                kwargs["betas"] = tuple(self.betas)
            return make(
                optimizer=self.optimizer,
                lr=self.lr,
                weight_decay=self.weight_decay,
                optimizer_kwargs=kwargs,
                schedule=self.schedule,
                warmup=self.warmup,
                param_groups=self.param_groups,
                schedules=self.schedules,
                on_resume=on_resume,
            )
        except (ValueError, TypeError) as error:
            raise type(error)(_of(self.name, error)) from error


@typed(own=("optimizers",))
class OptimizerFactories:
    """Makes several optimizers of one module, in the order given, each of its part, with groups and a schedule.

    Args:
        optimizers: A `PartOptimizer` each, or a mapping with its arguments.
        on_resume: Resume policy of all of them, as of `OptimizerFactory`.
        make: The class of the factory of each.

    Raises:
        ValueError: None or two of the same name are given, or an argument is unknown or out of range.
        TypeError: ``optimizers`` is no list of these.

    Example:
        In a module that optimizes manually:

        >>> factories = OptimizerFactories([
        ...     {"name": "generator", "part": "gen", "optimizer": "adam", "lr": 2e-4, "betas": (0.5, 0.999)},
        ...     {"name": "discriminator", "part": "disc", "optimizer": "adam", "lr": 1e-4, "schedule": "linear"},
        ... ])
        >>> factories.names
        ['generator', 'discriminator']

        and ``return factories(self)`` in ``configure_optimizers``.
    """

    def __init__(
        self,
        optimizers: Sequence[PartOptimizer | Mapping[str, Any]],
        on_resume: str = "checkpoint",
        make: Callable[..., OptimizerFactory] = OptimizerFactory,
    ) -> None:
        if isinstance(optimizers, str | Mapping | PartOptimizer) or not isinstance(optimizers, Iterable):
            raise TypeError(
                f"Invalid optimizers={optimizers!r}: it must be a list, for instance "
                '[{"name": "generator", "part": "gen", "optimizer": "adam", "lr": 2e-4}, ...].'
            )
        self._entries = [_entry(given, place) for place, given in enumerate(optimizers)]
        self.names = [entry.name for entry in self._entries]
        if not self.names:
            raise ValueError("Invalid optimizers=[]: it must name at least one, with its part.")
        if duplicates := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"Two optimizers are called {duplicates[0]!r}: each of {self.names} must be unique.")
        self._factories = [entry.factory(on_resume, make) for entry in self._entries]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of each, under ``<name>/<setting>``, for tables of runs."""
        each = zip(self.names, self._factories, strict=True)
        return {f"{name}/{key}": value for name, factory in each for key, value in factory.settings.items()}

    def __call__(self, module: Any) -> tuple[list[Optimizer], list[dict[str, Any]]]:
        """Return what Lightning expects of ``configure_optimizers``: optimizers and schedulers.

        Args:
            module: The LightningModule; it has to optimize manually if there are several optimizers.

        Raises:
            ValueError: The module optimizes automatically, a path is unknown, the rules do not fit a part, or a
                trainable parameter is in two parts or in none.
        """
        if len(self.names) > 1 and module.automatic_optimization:
            raise ValueError(
                f"{len(self.names)} optimizers ({', '.join(self.names)}) need manual optimization: Lightning's "
                "automatic optimization takes one. Write `self.automatic_optimization = False` in "
                f"{type(module).__name__}.__init__, and in training_step "
                f"`{', '.join(self.names).replace('-', '_')} = self.optimizers()`, `self.manual_backward(loss)`, and "
                "`zero_grad()` and `step()` of each. For other settings of some parameters in one optimizer, give it "
                "`param_groups`."
            )
        views = [_view(module, entry) for entry in self._entries]
        optimizers: list[Optimizer] = []
        schedulers: list[dict[str, Any]] = []
        for entry, factory, view in zip(self._entries, self._factories, views, strict=True):
            try:
                made = factory(view, owner=module)
            except ValueError as error:
                raise ValueError(_of(entry.name, error)) from error
            several = isinstance(made, tuple)
            optimizer = made[0][0] if several else made["optimizer"]
            about(optimizer).name = entry.name
            optimizers.append(optimizer)
            schedulers += made[1] if several else [made["lr_scheduler"]]
        self._check_shares(module, optimizers)
        return optimizers, schedulers

    def _check_shares(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Refuse parameters that two optimizers have, and trainable ones that none has."""
        names: dict[Tensor, str] = {param: name for name, param in module.named_parameters()}
        owners: dict[Tensor, str] = {}
        problems = []
        for owner, optimizer in zip(self.names, optimizers, strict=True):
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                if (other := owners.setdefault(param, owner)) != owner:
                    problems.append(
                        f"The parameter {names[param]!r} is in the parts of two optimizers, {other!r} and {owner!r}. "
                        "Each parameter belongs to one."
                    )
        left = [name for param, name in names.items() if param.requires_grad and param not in owners]
        if left:
            shown = f"{', '.join(map(repr, left[:5]))}{f' and {len(left) - 5} more' if len(left) > 5 else ''}"
            parts = ", ".join(f"{entry.name!r} has {' and '.join(entry.paths)}" for entry in self._entries)
            problems.append(
                f"No optimizer has {shown} of {type(module).__name__}: {parts}. Add "
                f"{' and '.join(map(repr, dict.fromkeys(_top(name) for name in left)))} to a `part`, or set "
                "requires_grad=False."
            )
        if problems:
            raise ValueError("\n".join(problems))

    def __repr__(self) -> str:
        each = zip(self.names, self._factories, strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}: {factory!r}' for name, factory in each)})"


class Part(nn.Module):
    """Some submodules and parameters of a module under the paths that they have there."""

    def place(self, path: str, what: nn.Module | nn.Parameter) -> None:
        """Add one of them.

        Args:
            path: Its path in the whole module.
            what: The submodule or parameter.
        """
        *parents, last = path.split(".")
        holder: nn.Module = self
        for name in parents:
            if holder._modules.get(name) is None:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        if isinstance(what, nn.Parameter):
            holder.register_parameter(last, what)
        else:
            holder.add_module(last, what)


def _view(module: nn.Module, entry: PartOptimizer) -> Part:
    modules = {path: each for path, each in module.named_modules(remove_duplicate=False) if path}
    known: dict[str, nn.Module | nn.Parameter] = dict(module.named_parameters(remove_duplicate=False)) | modules
    view = Part()
    for path in dict.fromkeys(entry.paths):
        if path not in known:
            raise ValueError(
                f"Optimizer {entry.name!r}: {type(module).__name__} has no part {path!r}. {nearest(path, known)}"
            )
        if not any(path.startswith(f"{other}.") for other in entry.paths):
            view.place(path, known[path])
    return view


def _entry(given: Any, place: int) -> PartOptimizer:
    if isinstance(given, PartOptimizer):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Invalid optimizers[{place}]={given!r}: it must be a PartOptimizer, or a mapping with its arguments."
        )
    options = [each.name for each in fields(PartOptimizer)]
    for key in given:
        if key not in options:
            raise ValueError(
                f"Unknown key {key!r} in optimizers[{place}]. {nearest(str(key), options)} Arguments of the optimizer "
                "itself stand in `optimizer_kwargs`."
            )
    for key in ("name", "part"):
        if key not in given:
            raise ValueError(f"optimizers[{place}] has no {key!r}. Needed are a name and a part of the module.")
    return PartOptimizer(**given)


def _of(name: str, error: Exception) -> str:
    """The message of an error, each line with the name of the optimizer."""
    return "\n".join(f"Optimizer {name!r}: {line}" for line in str(error).splitlines())


def _top(name: str) -> str:
    return name.split(".", 1)[0]
