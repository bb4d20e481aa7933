"""Where the tensors of a step come from: of each the function that made it, back to batch and parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_optim.tuning.inspection.sites import Site


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

    def root(self) -> Node:
        """Return where it comes from, reshapes and views aside."""
        node = self
        while node.kind == "view" and node.parents:
            node = node.parents[0]
        return node

    def place(self) -> str:
        """Return the name of the place that it comes from; empty where that is none, or several."""
        node = self
        while node.site is None and len(node.parents) == 1:
            node = node.parents[0]
        return "" if node.site is None else node.site.name


class Nodes:
    """The nodes of all tensors that are alive.

    Args:
        parameters: Names and parameters of the model.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.names = {id(parameter): name for name, parameter in parameters}
        """Names of the parameters by their ids."""
        self.touched: set[str] = set()
        """Names of the parameters that something has been computed from."""
        self._of: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Forget all tensors."""
        self._of = WeakIdKeyDictionary()

    def __setitem__(self, tensor: Tensor, node: Node) -> None:
        """Note where a tensor comes from."""
        self._of[tensor] = node

    def known(self, tensor: Tensor) -> Node | None:
        """Return the node of a tensor; None where none was noted."""
        return self._of.get(tensor)  # type: ignore[no-any-return]

    def __getitem__(self, tensor: Tensor) -> Node:
        """Return the node of a tensor; what nothing is known of is a parameter or of another place."""
        node = self.known(tensor)
        if node is None:
            parameter = self.names.get(id(tensor))
            node = Node("other" if parameter is None else "parameter", parameter or "")
            if parameter is not None:
                self.touched.add(parameter)
            self._of[tensor] = node
        return node

    def source(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view of."""
        node = self[tensor].root()
        return node.name if node.kind == "parameter" else None

    def origin(self, tensor: Tensor) -> tuple[str, bool]:
        """Return the name of the function that made a tensor, and whether it comes from the batch alone."""
        node = self[tensor]
        return node.root().name, node.data
