"""The watch over a forward and a backward pass: every torch function that runs, in order, and the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_optim.tuning.inspection import operations
from lightning_optim.tuning.inspection.attention import largest_of_attention, largest_of_scores
from lightning_optim.tuning.inspection.losses import LossCall, see_loss
from lightning_optim.tuning.inspection.nodes import Node, Nodes
from lightning_optim.tuning.inspection.operations import kind_of, name_of
from lightning_optim.tuning.inspection.sites import Site, Sums, Weight, numbers_of
from lightning_optim.tuning.inspection.stillness import recomputing, silence_hooks, suppress_compilation
from lightning_optim.tuning.inspection.units import (
    MOST_ROWS,
    cancels_mean,
    flat_tensors,
    tensors_in,
    unit_axis,
)
from lightning_optim.tuning.inspection.weights import bias_in, measured, weight_in

_SITES = ("linear", "product", "norm", "activation", "embedding", "recurrent", "attention", "softmax")


class StoppedError(Exception):
    """What ends a step that cannot succeed, before torch's own error, which may leave a GPU unusable."""


@dataclass
class Parameter:
    """What was seen of one parameter."""

    name: str
    numel: int
    requires_grad: bool
    gradient: Sums = field(default_factory=Sums)
    rms: float = 0.0
    same_gradients: bool = False


class Watch(TorchFunctionMode):
    """Records what runs between `begin` and `end` of a step.

    Args:
        model: The model, whose modules give the names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sites: dict[tuple[str, str, str], Site] = {}
        self.losses: list[LossCall] = []
        self.executed: set[str] = set()
        self.detached: dict[str, str] = {}
        self.problems: list[tuple[str, str, str]] = []
        """What torch is about to refuse: kind, where, and what was seen."""
        self.broadcasts: dict[str, str] = {}
        self.tied: set[str] = set()
        self.unregistered: Any = WeakIdKeyDictionary()
        """Weights that are trained with, and are no parameters of the model, and where."""
        self.backwards: list[float] = []
        """Values on which backward was called in this step."""
        self.scale = 1.0
        self.attention: dict[str, float] = {}
        self.data = Sums()
        self.data_names: dict[str, Sums] = {}
        self.entrances: dict[str, tuple[Site, Sums]] = {}
        self.parameters = {
            name: Parameter(name, parameter.numel(), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        self._own = dict(model.named_parameters())
        self._embeddings: set[int] = set()
        self.nodes = Nodes(model.named_parameters())
        self._stack: list[tuple[str, int]] = []
        self.modules = dict(model.named_modules())
        self._on = False
        self._asked_gradients = False
        self._weighted: list[Node] = []

    # The span of a look.

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all modules and parameters while the look lasts."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                before = module.register_forward_pre_hook(self._entering(name))
                after = module.register_forward_hook(self._leaving(name), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            for name, parameter in self.model.named_parameters():
                silence_hooks(stack, parameter)
                if parameter.requires_grad:
                    hooked: Any = parameter
                    stack.callback(hooked.register_hook(self._got_gradient(name)).remove)
            yield

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Record one step on a batch."""
        self.nodes.clear()
        self._stack, self.backwards = [], []
        for path, tensor in tensors_in(batch):
            self.nodes[tensor] = Node("data", path or "batch", data=True)
            if tensor.is_floating_point() and tensor.numel():
                self.data_names.setdefault(path or "batch", Sums()).add(tensor)
        with suppress_compilation(), self:
            self._on = True
            try:
                yield
            finally:
                self._on = False
        self._finish()

    def _finish(self) -> None:
        """Note which places something with a weight follows, then forget where the tensors came from."""
        waiting = [parent for node in self._weighted for parent in node.parents]
        visited: set[int] = set()
        while waiting:
            node = waiting.pop()
            if id(node) not in visited:
                visited.add(id(node))
                waiting += node.parents
                if node.site is not None:
                    node.site.last = False
        self.nodes.clear()
        self._weighted = []

    # Hooks.

    def _entering(self, name: str) -> Callable[..., None]:
        def entering(module: nn.Module, args: Any) -> None:
            if self._on and not recomputing():
                self._stack.append((name, len(self.sites)))
                self.executed.add(name)

        return entering

    def _leaving(self, name: str) -> Callable[..., None]:
        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            if not self._on or recomputing() or not self._stack or self._stack[-1][0] != name:
                return
            _, sites = self._stack.pop()
            leaf = not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))
            seen = any(site.module == name for site in self.sites.values())
            if leaf and not seen and sites == len(self.sites) and isinstance(output, Tensor):
                node = self.nodes.known(output) or Node("other", type(module).__name__)
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    node.site = self._site("module", type(module).__name__, name)
                    self._record(node.site, output, node.axis, None)
                self.nodes[output] = node

        return leaving

    def _got_gradient(self, name: str) -> Callable[[Tensor], None]:
        seen = self.parameters[name]

        def got(gradient: Tensor) -> None:
            if not self._on or self._asked_gradients:
                return
            with torch.no_grad(), torch._C.DisableTorchFunction():
                values = gradient.coalesce().values() if gradient.is_sparse else gradient
                if values.numel():
                    seen.gradient.add(self._unscaled(values))
                if values.ndim >= 2 and 1 < len(values) <= MOST_ROWS:
                    rows = values.flatten(1)
                    spread = float((rows - rows[0]).abs().max())
                    seen.same_gradients = spread <= 1e-6 * float(rows.abs().max())

        return got

    # Functions.

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function and record what it did."""
        kwargs = kwargs or {}
        name = name_of(func)
        if not self._on or recomputing() or name in operations.QUIET:
            return func(*args, **kwargs)
        kind = kind_of(name)
        if kind == "backward":
            self._see_backward(args[0])
            return func(*args, **kwargs)
        if name == "grad" and getattr(func, "__module__", "") == "torch.autograd":
            return self._without_hooks(func, args, kwargs)
        inputs = [tensor for value in (*args, *kwargs.values()) for tensor in flat_tensors(value)]
        parents = tuple(self.nodes[tensor] for tensor in inputs)
        unseen = len(self.losses)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self._before(func, kind, name, args, kwargs, inputs, parents)
        entered = self._entered(kind, inputs)
        if kind != "loss":
            result = func(*args, **kwargs)
        else:
            with warnings.catch_warnings():  # What torch warns of, with our line, is a finding.
                warnings.filterwarnings("ignore", "Using a target size")
                result = func(*args, **kwargs)
            for loss in self.losses[unseen:]:
                loss.result(result)
        outputs = list(flat_tensors(result))
        if not outputs or (len(outputs) == 1 and outputs[0].numel() == 0):
            return result
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self._after(kind, name, args, kwargs, inputs, parents, outputs, entered)
        return result

    def _without_hooks(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Gradients that the step asks for itself, as for a penalty, are no part of the backward pass."""
        self._asked_gradients = True
        try:
            return func(*args, **kwargs)
        finally:
            self._asked_gradients = False

    def _see_backward(self, loss: Tensor) -> None:
        with torch.no_grad():
            self.backwards.append(float(loss.detach().float().sum()) / self.scale)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.scale == 1 else gradient.float() / self.scale

    def _before(
        self, func: Any, kind: str, name: str, args: Any, kwargs: Any, inputs: list[Tensor], parents: tuple[Node, ...]
    ) -> None:
        where = self._stack[-1][0] if self._stack else ""
        if kind == "loss":
            call, problem = see_loss(func, name, args, kwargs, where, self.nodes.origin)
            if call is not None:
                self.losses.append(call)
            if problem is not None:
                self.problems.append((problem[0], name, problem[1]))
                raise StoppedError(problem[1])
        elif kind == "embedding" and len(inputs) >= 2 and not inputs[0].is_floating_point() and inputs[0].numel():
            top, low, size = int(inputs[0].max()), int(inputs[0].min()), len(inputs[1])
            self._embeddings.add(id(inputs[1]))
            if top >= size or low < 0:
                text = f"indices from {low} to {top} for an embedding of {size} rows"
                self.problems.append(("index-out-of-range", where or name, text))
                raise StoppedError(text)
        elif name in operations.DIFFERENCES and len(inputs) == 2:
            a, b = inputs
            trained = (a.requires_grad, b.requires_grad)
            data = (parents[0].data, parents[1].data)
            if (trained[0] and data[1]) or (trained[1] and data[0]):
                shapes = sorted((tuple(a.shape), tuple(b.shape)), key=len)
                if (
                    len(shapes[1]) == 2
                    and len(shapes[0]) == 1
                    and shapes[1][1] == 1
                    and shapes[0][0] == shapes[1][0] > 1
                ):
                    self.broadcasts[where] = f"{list(a.shape)} minus {list(b.shape)}"
        elif name == "scaled_dot_product_attention" and len(inputs) >= 2:
            self._note_attention(where, largest_of_attention(inputs[0], inputs[1], kwargs.get("scale")))
        elif name == "softmax" and inputs:
            self._note_attention(where, largest_of_scores(inputs[0]))

    def _note_attention(self, where: str, largest: float | None) -> None:
        if largest is not None:
            self.attention[where] = largest

    def _entered(self, kind: str, inputs: list[Tensor]) -> tuple[Sums, bool] | None:
        """The inputs of what has a weight, before it may write over them, and whether they are all one number."""
        if kind not in ("linear", "product", "norm", "module") or not inputs or not inputs[0].is_floating_point():
            return None
        sums = Sums()
        if not inputs[0].numel():
            return None
        with torch.no_grad():
            sums.add(inputs[0])
            values = numbers_of(inputs[0])
            return sums, bool(values.numel() and values.max() == values.min())

    def _after(
        self,
        kind: str,
        name: str,
        args: Any,
        kwargs: Any,
        inputs: list[Tensor],
        parents: tuple[Node, ...],
        outputs: list[Tensor],
        entered: tuple[Sums, bool] | None,
    ) -> None:
        output = outputs[0]
        weight = self._weight(kind, name, args, kwargs, inputs, parents)
        if kind == "product" and weight is None:
            kind = "other"
        axis = unit_axis(kind, name, output, parents[0].axis if parents else -1, inputs)
        known = [parent.data for parent in parents if parent.parents or parent.kind != "other"]
        data = bool(known) and all(known) and not output.requires_grad
        node = Node(kind, name, None, parents, axis, data)
        where = self._stack[-1][0] if self._stack else ""
        if name in operations.DETACHING and inputs and inputs[0].requires_grad:
            node.cut = where
        if output.requires_grad:
            self._note_cuts(parents)
        if kind in _SITES and output.is_floating_point():
            site = node.site = self._site(kind, name, where, parents)
            if entered is not None:
                site.entered.squares += entered[0].squares
                site.entered.count += entered[0].count
                site.entered.bad += entered[0].bad
                site.entered.largest = max(site.entered.largest, entered[0].largest)
                site.constant_input = site.constant_input and entered[1]
                site.input_requires_grad = site.input_requires_grad or inputs[0].requires_grad
                if kind != "norm" and parents[0].data:
                    self.entrances[site.name] = (site, site.entered)
            if weight is not None:
                site.weight = weight if site.weight is None else site.weight
                site.bias = site.bias or bias_in(name, args, kwargs, self.nodes)
            before = inputs[0] if inputs and inputs[0] is not output else None
            self._record(site, output, axis, before)
            for other in outputs[1:] if kind == "recurrent" else ():
                self._follow_gradient(site, other)
            good_inputs = all(
                bool(torch.isfinite(numbers_of(each)).all()) for each in inputs if each.is_floating_point()
            )
            site.bad_from_good = site.bad_from_good or (site.output.bad > 0 and good_inputs)
        if kind in ("linear", "product", "recurrent", "attention"):
            self._weighted.append(node)
        if kind != "view":
            for parent in parents:
                self._consumed(parent, node, kwargs, args)
        for each in outputs:
            self.nodes[each] = node

    def _note_cuts(self, nodes: tuple[Node, ...]) -> None:
        """Note where something that goes on to be trained with was detached."""
        for node in nodes:
            while node.cut is None and node.kind == "view" and node.parents:
                node = node.parents[0]
            if node.cut is not None:
                self.detached.setdefault(node.cut, node.name)

    def _record(self, site: Site, output: Tensor, axis: int, before: Tensor | None) -> None:
        site.see(output, axis, before)
        self._follow_gradient(site, output)

    def _follow_gradient(self, site: Site, output: Any) -> None:
        if output.requires_grad and not output.is_leaf:
            output.register_hook(self._activation_gradient(site))

    def _activation_gradient(self, site: Site) -> Callable[[Tensor], None]:
        def got(gradient: Tensor) -> None:
            if self._on and not self._asked_gradients and gradient.numel():
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    site.gradient.add(self._unscaled(gradient))

        return got

    def _site(self, kind: str, name: str, where: str, parents: tuple[Node, ...] = ()) -> Site:
        # One activation module may follow several layers, and each is a place of its own.
        behind = parents[0].place() if kind in ("activation", "softmax") and parents else ""
        key = (where, name, behind)
        if key not in self.sites:
            module = self.modules.get(where)
            alone = module is not None and where and (kind == "attention" or not any(True for _ in module.children()))
            others = [other for other in self.sites if other[0] == where]
            shown = where if alone and all(other[1] == name for other in others) else f"{where}:{name}".lstrip(":")
            if any(other[1] == name for other in others):
                shown = f"{shown} after {behind}"
            self.sites[key] = Site(shown, where, kind, name, len(self.sites))
        return self.sites[key]

    def _consumed(self, node: Node, by: Node, kwargs: Any, args: Any) -> None:
        """Note what the output of a place goes into, through what only reshapes it."""
        direct = True
        while node.kind == "view":
            direct = direct and node.name in operations.RESHAPES
            if not node.parents:
                return
            node = node.parents[0]
        if node.site is None:
            return
        node.site.followed_by.add(f"{by.kind}:{by.name}")
        if by.kind == "norm" and direct and cancels_mean(by.name, args, kwargs):
            node.site.cancelled_by = self._stack[-1][0] if self._stack else by.name

    def _weight(
        self, kind: str, name: str, args: Any, kwargs: Any, inputs: list[Tensor], parents: tuple[Node, ...]
    ) -> Weight | None:
        tensor = weight_in(kind, name, args, kwargs, inputs, parents)
        if tensor is None:
            return None
        source = self.nodes.source(tensor)
        where = self._stack[-1][0] if self._stack else ""
        if source is None and tensor.requires_grad and tensor.is_leaf:
            self.unregistered[tensor] = f"{where}:{name}".lstrip(":")
        if source is not None and id(self._own[source]) in self._embeddings:
            self.tied.add(source)
        known = self.sites.get((where, name, ""))
        if known is not None and known.weight is not None:
            return known.weight
        return measured(tensor, name, args, kwargs, source, where)
