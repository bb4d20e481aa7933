"""Show in the reference what `lightning-optim list optimizers` knows: a hook of MkDocs and an extension of Griffe."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

from lightning_optim.factory.state_sizes import bytes_per_parameter
from lightning_optim.optim import FusedOptimizer
from lightning_optim.optim.base import OPTIMIZERS

MARKER = "<!-- table of optimizers -->"
"""Where on a page the table of all of them stands."""


def classes() -> dict[str, type[FusedOptimizer]]:
    """Return the optimizers of this package, by the name that a configuration uses."""
    return {name: cls for name, cls in OPTIMIZERS.items() if issubclass(cls, FusedOptimizer)}


def rates(cls: type[FusedOptimizer]) -> tuple[str, str]:
    """Return the default learning rate of an optimizer and the usual ones, formatted.

    Args:
        cls: The optimizer.
    """
    usual = cls.usual_lr_of(cls.hyperparameters())
    return (
        f"{inspect.signature(cls).parameters['lr'].default:g}",
        "-" if usual is None else f"{usual[0]:g} to {usual[1]:g}",
    )


def sizes(cls: type[FusedOptimizer]) -> str:
    """Return the bytes of state per parameter with 32, 16 and 8 bits, as cells of a table.

    Args:
        cls: The optimizer.
    """
    found = (bytes_per_parameter(cls, bits) for bits in (32, 16, 8))
    return " | ".join("-" if size is None else f"{size:.3g}" for size in found)


def paper(cls: type[FusedOptimizer]) -> str:
    """Return a link to the publication of an optimizer.

    Args:
        cls: The optimizer.
    """
    found = re.search(r"arxiv\.org/abs/(\S+)", cls.paper)
    return f"[{f'arXiv {found[1]}' if found else cls.paper.split('/')[2].removeprefix('www.')}]({cls.paper})"


def facts(cls: type[FusedOptimizer]) -> str:
    """Return the facts of one optimizer, as Markdown.

    Args:
        cls: The optimizer.
    """
    lr, usual = rates(cls)
    return (
        f"**When to use it.** {cls.when_to_use}\n\n"
        "| default lr | usual lr | state per parameter | bytes | in 16 bits | in 8 bits | paper |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {lr} | {usual} | {cls.memory} | {sizes(cls)} | {paper(cls)} |"
    )


def table() -> str:
    """Return the table of all optimizers, as Markdown."""
    rows = [
        "| name | when to use it | default lr | usual lr | state per parameter | bytes | in 16 bits | in 8 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cls in classes().items():
        lr, usual = rates(cls)
        link = f"[`{name}`][lightning_optim.optim.{cls.__name__}]"
        rows.append(f"| {link} | {cls.when_to_use} | {lr} | {usual} | {cls.memory} | {sizes(cls)} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table where a page has the marker; called by MkDocs for each page.

    Args:
        markdown: The page.
        **_: What else MkDocs hands over.
    """
    return markdown.replace(MARKER, table()) if MARKER in markdown else markdown


class OptimizerFacts(griffe.Extension):
    """Puts the facts of an optimizer below the first line of its docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._by_path = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes().values()}

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Every module, class, function and attribute comes by here."""
        if obj.docstring is not None and (cls := self._by_path.get(obj.path)) is not None:
            first, _, rest = obj.docstring.value.partition("\n\n")
            obj.docstring.value = f"{first}\n\n{facts(cls)}\n\n{rest}"
