"""The gradients of one step, and the statistics that are read from them and from the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.core.flat_shards import FlatShards
from lightning_optim.core.host import read
from lightning_optim.core.placements import PLAIN, gradient_of
from lightning_optim.core.sharding import local, sum_over_shards
from lightning_optim.core.stats import DECAYS, GradStats, UnitNorms
from lightning_optim.core.transfer import upload
from lightning_optim.kernels.base import MANY
from lightning_optim.kernels.measures import Moment, over_second_moments
from lightning_optim.kernels.plain import as_real
from lightning_optim.step.known_gradients import MEMORIES, PresentGrads, remember
from lightning_optim.step.measure import measure_largest, measure_norm_sq, measure_units

_NO_NAMES: Mapping[Tensor, str] = {}


class Gradients:
    """All gradients that the coming step of an optimizer uses.

    Args:
        optimizer: The optimizer.
        scale: The loss scale that the gradients still contain, shape []; None for none.
        names: Names of parameters that the optimizer itself does not know.
        shards: The flat shards, if parameters are such shards; None otherwise. Each of these parameters belongs to the
            step, because other ranks may hold a part of one of which this rank holds none.

    Attributes:
        params: The parameters that have a gradient, in the order of the groups.
        grads: Their gradients.
        plain: Whether all of these are plain tensors, none a DTensor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scale: Tensor | None = None,
        names: Mapping[Tensor, str] = _NO_NAMES,
        shards: FlatShards | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.scale = scale
        self.shards = shards
        self._names = names
        self._norm_sq: Tensor | None = None
        self.params: Sequence[Tensor]
        self.grads: Sequence[Tensor]
        self.group_sizes: tuple[int, ...]
        self.parameters: int
        memory = None if shards is not None else MEMORIES.get(optimizer)
        self._known = None if memory is None else memory.present(optimizer)
        if self._known is not None:
            self.params = self._known.params
            self.grads, self.plain = PresentGrads(self.params), True
            self.group_sizes, self.parameters = self._known.group_sizes, self._known.parameters
            return
        # This runs at every step over perhaps thousands of parameters, so it calls no function for each of them.
        if shards is None:
            groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
            grads = [p.grad for group in groups for p in group]
        else:
            groups = [[p for p in group["params"] if self._takes_part(p)] for group in optimizer.param_groups]
            grads = [p.new_empty(0) if p.grad is None else p.grad for group in groups for p in group]
        self.params = [p for group in groups for p in group]
        self.grads = grads
        self.group_sizes = tuple(len(group) for group in groups)
        self.parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        self.plain = {*map(type, self.params), *map(type, grads)}.issubset(PLAIN)
        if not self.plain:
            self._redistribute(grads)
        elif shards is None and len(grads) >= MANY:
            remember(self)

    def norm_sq_now(self) -> Tensor:
        """Read the gradients again, and return their present square sums, shape [tensors]."""
        if self._known is not None and (norm_sq := self._known.norm_sq()) is not None:
            return self._unscaled_sq(norm_sq)
        return self._unscaled_sq(self.sum_shards(measure_norm_sq(self.grads)))

    def present(self) -> list[int] | None:
        """Return the indices of the tensors that have a gradient on this rank; None if all have."""
        held = [i for i, param in enumerate(self.params) if param.grad is not None]
        return None if len(held) == len(self.params) else held

    def sum_shards(self, values: Tensor) -> Tensor:
        """Sum values of flat shards, [tensors] or [tensors, columns], over the shards of each tensor."""
        return values if self.shards is None else self.shards.sum(values, self.params)

    def _takes_part(self, param: Tensor) -> bool:
        return param.grad is not None or (self.shards is not None and param in self.shards and param.requires_grad)

    def _redistribute(self, grads: list[Tensor]) -> None:
        """Give each gradient the placements of its parameter, because all statistics read local shards."""
        for i, param in enumerate(self.params):
            grad = gradient_of(param, partial(self._label, i))
            if grad is not None:  # It is None for a flat shard of which this rank holds no part.
                grads[i] = grad

    def _label(self, index: int) -> str:
        name = self.names()[index]
        return f"parameter {name!r}" if name else f"a parameter of shape {tuple(self.params[index].shape)}"

    def places(self) -> Tensor | None:
        """Return the index of each tensor among all parameters of the optimizer, int64, shape [tensors], or None."""
        if self._known is not None and self._known.places is not None:
            return self._known.places
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        places = [place for place, p in enumerate(everything) if self._takes_part(p)]
        return upload(places, self.params[0].device, torch.int64) if places else None

    def _unscaled_sq(self, values: Tensor) -> Tensor:
        return values if self.scale is None else values / self.scale.to(values.device).square()

    def numel(self) -> tuple[int, ...]:
        """Return the number of elements of each tensor over all shards; a complex element counts as two."""
        if self._known is not None:
            return self._known.numel
        return tuple(numbers(p) if self.shards is None else self.shards.numel(p) for p in self.params)

    def read_norm_sq(self) -> Tensor:
        """Return the square sum of each gradient, shape [tensors], from an earlier read that yielded it if possible."""
        return self.norm_sq_now() if self._norm_sq is None else self._norm_sq

    def names(self) -> tuple[str | None, ...]:
        """Return the name of each tensor, or None where it is not known."""
        groups = [(group["params"], names_of(group, self._names)) for group in self.optimizer.param_groups]
        known = {param: name for params, names in groups for param, name in zip(params, names, strict=True)}
        return tuple(known[p] for p in self.params)

    def read_largest(self) -> Tensor:
        """Return the largest absolute value in each gradient, shape [tensors]."""
        largest = measure_largest(self.grads)
        largest = largest if self.shards is None else self.shards.max(largest, self.params)
        return largest if self.scale is None else largest / self.scale.to(largest.device)

    def read_units(self) -> UnitNorms:
        """Return the norms of each output unit, and keep their square sums as those of the gradients."""
        units = measure_units(self.grads, self.params, self.scale)
        self._norm_sq = units.norm_sq()
        return units

    @cached_property
    def _groups(self) -> list[dict[str, Any]]:
        """The parameter group of each tensor."""
        groups = zip(self.optimizer.param_groups, self.group_sizes, strict=True)
        return [group for group, size in groups for _ in range(size)]

    def _states(self, *names: str, wanted: str) -> list[tuple[int, str]]:
        """Find the tensors that have one of the states called ``names``.

        Args:
            *names: Names of the states, the preferred one first.
            wanted: The feature that needs the state, for the message.

        Returns:
            Index of each such tensor, and the name of its state.

        Raises:
            ValueError: The optimizer keeps none of these states, or keeps it in 8 bits.
        """
        found = []
        for index, param in enumerate(self.params):
            state = self.optimizer.state.get(param)  # Unlike indexing, `get` creates no state.
            name = next((name for name in names if state and isinstance(state.get(name), Tensor)), None)
            if name is not None and state[name].dtype == torch.uint8:  # type: ignore[index]
                raise ValueError(f"{wanted} cannot read state in 8 bits. Set state_bits to 16 or 32.")
            if name is not None:
                found.append((index, name))
            elif state:
                raise ValueError(
                    f"{wanted} needs an optimizer that keeps {' or '.join(map(repr, names))}; "
                    f"{type(self.optimizer).__name__} keeps {', '.join(map(repr, state))}."
                )
        return found

    def read_momentum_norm_sq(self, norm_sq: Tensor) -> Tensor:
        """Return the square sum of each first moment, scaled to an average of gradients, shape [tensors].

        It is 0 where there is no first moment yet.

        Args:
            norm_sq: The square sum of each gradient, whose dtype and device the result takes, shape [tensors].
        """
        found = self._states("exp_avg", "momentum_buffer", wanted="Clipping by the ratio to the momentum")
        norm_sq = torch.zeros_like(norm_sq)
        if not found:
            return self.sum_shards(norm_sq)
        device = norm_sq.device
        measured = measure_norm_sq([self.optimizer.state[self.params[i]][name] for i, name in found])
        share = [1.0 if name == "exp_avg" else _share(self._groups[i]) for i, name in found]
        rows = upload([i for i, _ in found], device, torch.int64)
        weight = upload(share, device, norm_sq.dtype).square()
        return self.sum_shards(norm_sq.scatter(0, rows, measured.to(norm_sq.dtype) * weight))

    def read_grad_sq_over_exp_avg_sq(self) -> Tensor:
        """Return Σ g²/v̂ of each tensor, with v̂ after this step, shape [tensors].

        The same read of the gradients yields their square sums.
        """
        kept = {i for i, _ in self._states("exp_avg_sq", wanted="Clipping by the RMS of the update")}
        grads = [as_real(local(grad.detach())) for grad in self.grads]
        moments = [self._moment(i) if i in kept else Moment(None, 0.0, 0.0, 0.0) for i in range(len(grads))]
        sums = over_second_moments(grads, self.scale, moments, self.grads[0].device)
        both = self.sum_shards(sum_over_shards(sums, self.params))
        self._norm_sq = both[:, 0]
        return both[:, 1]

    def _moment(self, index: int) -> Moment:
        """Return the second moment of one tensor as it is before the step."""
        group, state = self._groups[index], self.optimizer.state[self.params[index]]
        step = state["step"]
        step = read(step) if isinstance(step, Tensor) and step.device.type == "cpu" else step
        exp_avg_sq = as_real(local(state["exp_avg_sq"].detach()))
        return Moment(exp_avg_sq, step, group["betas"][1], group["eps"])


def numbers(param: Tensor) -> int:
    """Return the number of real numbers in a parameter; as in torch's optimizers, a complex element is two."""
    return param.numel() * (2 if param.is_complex() else 1)


class ReadGradStats(GradStats):
    """Gradient statistics that are read from gradients and state on first use, and cached.

    `Gradients` does not refer back to them: a cycle would keep the gradients of past steps in memory until Python's
    collector of cycles runs, which counts objects and not their bytes.

    Args:
        gradients: The gradients to read.
    """

    def __init__(self, gradients: Gradients) -> None:
        places = None if len(gradients.params) == gradients.parameters else gradients.places()
        names, total = group_names_of(gradients.optimizer), gradients.parameters
        super().__init__(None, gradients.group_sizes, group_names=names, places=places, parameters=total)
        self._gradients = gradients

    @cached_property
    def norm_sq(self) -> Tensor:
        """See `GradStats`."""
        return self._gradients.read_norm_sq()

    @cached_property
    def numel(self) -> tuple[int, ...]:
        """See `GradStats`."""
        return self._gradients.numel()

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """See `GradStats`."""
        return self._gradients.names()

    @cached_property
    def decays(self) -> tuple[tuple[float, float], ...]:
        """See `GradStats`."""
        return tuple(decays_of(group) for group in self._gradients.optimizer.param_groups)

    @cached_property
    def largest(self) -> Tensor:
        """See `GradStats`."""
        return self._gradients.read_largest()

    @cached_property
    def units(self) -> UnitNorms:
        """See `GradStats`."""
        return self._gradients.read_units()

    @cached_property
    def momentum_norm_sq(self) -> Tensor:
        """See `GradStats`."""
        return self._gradients.read_momentum_norm_sq(self.norm_sq)

    @cached_property
    def grad_sq_over_exp_avg_sq(self) -> Tensor:
        """See `GradStats`."""
        return self._gradients.read_grad_sq_over_exp_avg_sq()


def group_names_of(optimizer: Optimizer) -> tuple[str, ...]:
    """Return the name of each parameter group, or its index where it has none."""
    return tuple(str(group.get("name", index)) for index, group in enumerate(optimizer.param_groups))


def decays_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the decays by which an optimizer averages gradients and their squares in one of its groups.

    These are ``betas`` or ``momentum``, and ``betas``, ``alpha`` (RMSprop) or ``rho`` (Adadelta). Where the optimizer
    has none, or one that is no decay, or has it on a device, which the host would have to wait for, it is that of
    `DECAYS`. Of three ``betas`` the last belongs to the squares in Adan, and the second in AdEMAMix.
    """
    betas: tuple[Any, ...] = group.get("betas") or (group.get("momentum"), group.get("alpha", group.get("rho")))
    second = betas[2] if len(betas) == 3 and "alpha" not in group else betas[1]
    first, second = (
        float(beta) if isinstance(beta, float | int) and 0 < beta < 1 else default
        for beta, default in zip((betas[0], second), DECAYS, strict=True)
    )
    return first, second


def names_of(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> list[str | None]:
    """Return the name of each parameter of a group, from ``names`` or the group, or None where it is not known."""
    own: list[str | None] = group.get("param_names") or [None] * len(group["params"])
    return [names.get(param, name) for param, name in zip(group["params"], own, strict=True)]


def _share(group: Mapping[str, Any]) -> float:
    """Return the factor that turns SGD's momentum buffer into an average of gradients."""
    return float((1 - group.get("momentum", 0)) / max(1 - group.get("dampening", 0), 1e-3))
