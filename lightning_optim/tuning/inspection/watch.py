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
from lightning_optim.tuning.inspection.losses import LossCall, see_loss
from lightning_optim.tuning.inspection.operations import argument, fans, kind_of, name_of
from lightning_optim.tuning.inspection.sites import Site, Sums, Weight
from lightning_optim.tuning.inspection.units import (
    MOST_ROWS,
    cancels_mean,
    flat_tensors,
    repeated_units,
    tensors_in,
    unit_axis,
)

_SITES = ("linear", "product", "norm", "activation", "embedding", "recurrent", "attention", "softmax")


class StoppedError(Exception):
    """What ends a step that cannot succeed, before torch's own error, which may leave a GPU unusable."""


@dataclass(eq=False)
class Node:
    """Where a tensor comes from.

    Args:
        kind: Kind of the function, or ``"data"``, ``"parameter"``.
        name: Its name.
        site: Where it ran.
        parents: Where its inputs come from.
        axis: Dimension of its units.
        data: Whether it is computed from the batch and from nothing that is trained.
        cut: Name of the module that has detached it from what is trained, if one has.
    """

    kind: str
    name: str
    site: Site | None = None
    parents: tuple[Node, ...] = ()
    axis: int = -1
    data: bool = False
    cut: str | None = None


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
        self.touched: set[str] = set()
        self.detached: dict[str, str] = {}
        self.problems: list[tuple[str, str, str]] = []
        """What torch is about to refuse: kind, where, and what was seen."""
        self.broadcasts: dict[str, str] = {}
        self.tied: set[str] = set()
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
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._embeddings: set[int] = set()
        self._nodes: Any = WeakIdKeyDictionary()
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
                _still(stack, parameter)
                if parameter.requires_grad:
                    hooked: Any = parameter
                    stack.callback(hooked.register_hook(self._got_gradient(name)).remove)
            yield

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Record one step on a batch."""
        self._nodes = WeakIdKeyDictionary()
        self._stack, self.backwards = [], []
        for path, tensor in tensors_in(batch):
            self._nodes[tensor] = Node("data", path or "batch", data=True)
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
        self._nodes, self._weighted = WeakIdKeyDictionary(), []

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
                node = self._nodes.get(output) or Node("other", type(module).__name__)
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    node.site = self._site("module", type(module).__name__, name)
                    self._record(node.site, output, node.axis, None)
                self._nodes[output] = node

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
        if not self._on or recomputing() or name in _QUIET:
            return func(*args, **kwargs)
        kind = kind_of(name)
        if kind == "backward":
            self._see_backward(args[0])
            return func(*args, **kwargs)
        if name == "grad" and getattr(func, "__module__", "") == "torch.autograd":
            return self._without_hooks(func, args, kwargs)
        inputs = [tensor for value in (*args, *kwargs.values()) for tensor in flat_tensors(value)]
        parents = tuple(self._node(tensor) for tensor in inputs)
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

    def _node(self, tensor: Tensor) -> Node:
        node = self._nodes.get(tensor)
        if node is None:
            parameter = self._names.get(id(tensor))
            node = Node("other" if parameter is None else "parameter", parameter or "")
            if parameter is not None:
                self.touched.add(parameter)
            self._nodes[tensor] = node
        return node  # type: ignore[no-any-return]

    def _before(
        self, func: Any, kind: str, name: str, args: Any, kwargs: Any, inputs: list[Tensor], parents: tuple[Node, ...]
    ) -> None:
        where = self._stack[-1][0] if self._stack else ""
        if kind == "loss":
            call, problem = see_loss(func, name, args, kwargs, where, self._origin)
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
            self._see_attention(where, inputs[0], inputs[1], kwargs.get("scale"))
        elif name == "softmax" and inputs and inputs[0].ndim >= 3 and inputs[0].shape[-1] > 1:
            self._see_scores(where, inputs[0][:4].flatten(0, -3)[:64].float())

    def _see_attention(self, where: str, query: Tensor, key: Tensor, scale: float | None) -> None:
        if query.ndim < 3 or query.shape[:-2] != key.shape[:-2]:
            return
        query, key = query.flatten(0, -3)[:8, :64].float(), key.flatten(0, -3)[:8].float()
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        self._see_scores(where, scores)

    def _see_scores(self, where: str, scores: Tensor) -> None:
        """Keep the median, over queries, of the largest weight that one key gets: [..., queries, keys]."""
        if scores.shape[-1] > 2:  # masks of large negative numbers take no part in the largest
            self.attention[where] = float(scores.softmax(-1).amax(-1).nanmedian())

    def _entered(self, kind: str, inputs: list[Tensor]) -> tuple[Sums, bool] | None:
        """The inputs of what has a weight, before it may write over them, and whether they are all one number."""
        if kind not in ("linear", "product", "norm", "module") or not inputs or not inputs[0].is_floating_point():
            return None
        sums = Sums()
        if not inputs[0].numel():
            return None
        with torch.no_grad():
            sums.add(inputs[0])
            values = inputs[0].detach()
            return sums, bool(values.max() == values.min())

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
        weight = self._weight_of(kind, name, args, kwargs, inputs, parents)
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
                site.bias = site.bias or self._bias_of(name, args, kwargs)
            before = inputs[0] if inputs and inputs[0] is not output else None
            self._record(site, output, axis, before)
            for other in outputs[1:] if kind == "recurrent" else ():
                self._follow_gradient(site, other)
            good_inputs = all(bool(torch.isfinite(each).all()) for each in inputs if each.is_floating_point())
            site.bad_from_good = site.bad_from_good or (site.output.bad > 0 and good_inputs)
        if kind in ("linear", "product", "recurrent", "attention"):
            self._weighted.append(node)
        if kind != "view":
            for parent in parents:
                self._consumed(parent, node, kwargs, args)
        for each in outputs:
            self._nodes[each] = node

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
        behind = _behind(parents[0]) if kind in ("activation", "softmax") and parents else ""
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

    def _weight_of(
        self, kind: str, name: str, args: Any, kwargs: Any, inputs: list[Tensor], parents: tuple[Node, ...]
    ) -> Weight | None:
        if kind == "linear" or name in operations.LINEAR:
            tensor = argument(args, kwargs, 1, "weight")
        elif kind == "product" and len(inputs) >= 2:
            index = 2 if name in ("addmm", "baddbmm") else 1
            if index >= len(inputs):
                return None
            tensor, node = inputs[index], parents[index]
            while node.kind == "view" and node.parents:
                node = node.parents[0]
            if node.kind != "parameter":
                return None
        else:
            return None
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return None
        source = self._source(tensor)
        where = self._stack[-1][0] if self._stack else ""
        if source is not None and id(dict(self.model.named_parameters()).get(source)) in self._embeddings:
            self.tied.add(source)
        known = self.sites.get((where, name, ""))
        if known is not None and known.weight is not None:
            return known.weight
        groups = argument(args, kwargs, 7 if name.startswith("conv_t") else 6, "groups", 1)
        # conv_transpose has output_padding before groups.
        groups = groups if isinstance(groups, int) else 1
        found = fans(name, tensor, groups if name != "linear" else 1, argument(args, kwargs, 3, "stride", 1))
        if found is None:
            return None
        rms = Sums()
        rms.add(tensor)
        depthwise = name.startswith("conv") and tensor.shape[1] == 1 and groups > 1
        repeated = 0 if depthwise else repeated_units(tensor, found.rows)
        return Weight(
            source or f"{where}.weight",
            tuple(tensor.shape),
            found,
            rms.rms,
            tensor.requires_grad,
            source is not None,
            repeated,
            depthwise,
        )

    def _source(self, tensor: Tensor) -> str | None:
        """Name of the parameter that a tensor is, or is a view of."""
        node = self._node(tensor)
        while node.kind == "view" and node.parents:
            node = node.parents[0]
        return node.name if node.kind == "parameter" else None

    def _bias_of(self, name: str, args: Any, kwargs: Any) -> str | None:
        bias = argument(args, kwargs, 2, "bias") if name in operations.LINEAR else None
        return self._names.get(id(bias)) if isinstance(bias, Tensor) and bias.requires_grad else None

    def _origin(self, tensor: Tensor) -> tuple[str, bool]:
        """Name of the function that made a tensor, reshapes aside, and whether it comes from the batch alone."""
        node = self._node(tensor)
        data = node.data
        while node.kind == "view" and node.parents:
            node = node.parents[0]
        return node.name, data


_QUIET = {
    *("shape", "dtype", "device", "requires_grad", "is_leaf", "grad_fn", "ndim", "layout", "is_cuda", "is_sparse"),
    *(
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "is_complex",
        "__len__",
        "grad",
        "__set__",
        "register_hook",
    ),
    *(
        "is_contiguous",
        "is_nested",
        "__repr__",
        "item",
        "tolist",
        "__bool__",
        "__float__",
        "__int__",
        "numpy",
        "is_meta",
    ),
    *("has_names", "is_mkldnn", "is_quantized", "is_mps", "is_xla", "names", "__format__", "__hash__", "_version"),
} - {"grad", "requires_grad"}


def _behind(node: Node) -> str:
    """Name of the place that a tensor comes from."""
    while node.site is None and len(node.parents) == 1:
        node = node.parents[0]
    return "" if node.site is None else node.site.name


def recomputing() -> bool:
    """Return whether a backward pass runs in this thread, as when activation checkpointing computes again."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def suppress_compilation() -> Iterator[None]:
    """What torch.compile has compiled runs as it is written, so that its parts are seen."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _still(stack: ExitStack, parameter: nn.Parameter) -> None:
    """Keep hooks of others from acting on gradients of a look, such as an optimizer that steps within backward."""
    kept: Any = parameter
    for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(kept, key, None)
        if hooks:
            # torch looks into the mapping when a gradient arrives, so it is emptied rather than replaced.
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        elif key == "_backward_hooks" and hooks is None:
            stack.callback(setattr, kept, key, None)
