"""`lightning-optim list`: what there is, by name, with what it is for and what it costs."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_optim.core.suggest import nearest

if TYPE_CHECKING:
    from lightning_optim.optim import FusedOptimizer


@dataclass(frozen=True)
class Entry:
    """One entry of a list.

    Args:
        name: What a configuration calls it.
        facts: Short facts, which share a line.
        use: A sentence on what it does, or when to use it.
        paper: URL of the publication; empty if there is none.
    """

    name: str
    facts: tuple[str, ...] = ()
    use: str = ""
    paper: str = ""

    def format(self, width: int) -> str:
        """Return the entry in lines of at most ``width`` columns, except a URL that is longer.

        Args:
            width: Columns.
        """
        blocks = (self.use, "; ".join(self.facts), self.paper)
        lines = [f"  {line}" for block in blocks if block for line in _wrap(block, width - 2)]
        return "\n".join([self.name, *lines])


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def optimizers() -> list[Entry]:
    """List the optimizers: learning rates, state, use and paper."""
    from lightning_optim.optim import FusedOptimizer
    from lightning_optim.optim.base import OPTIMIZERS

    entries = []
    for name, cls in OPTIMIZERS.items():
        if not issubclass(cls, FusedOptimizer) or not hasattr(cls, "when_to_use"):
            entries.append(Entry(name, use=_first_line(cls)))  # registered by a user
            continue
        facts = [f"lr {inspect.signature(cls).parameters['lr'].default:g}"]
        if (usual := cls.usual_lr_of(cls.hyperparameters())) is not None:
            facts[0] += f" (usual {usual[0]:g} to {usual[1]:g})"
        facts.append(f"state {cls.memory}")
        if cls.__module__.startswith("lightning_optim."):  # A user's own may do anything when it is made.
            facts.append(_bytes_of_state(cls))
        entries.append(Entry(name, tuple(facts), cls.when_to_use, cls.paper))
    return entries


def _bytes_of_state(cls: type[FusedOptimizer]) -> str:
    """Bytes per parameter in 32 bits and in fewer."""
    from lightning_optim.factory.state_sizes import bytes_per_parameter

    full, *fewer = (bytes_per_parameter(cls, bits) for bits in (32, 16, 8))
    low = [f"{size:.3g} in {bits} bits" for bits, size in zip((16, 8), fewer, strict=True) if size is not None]
    return ", ".join([f"{full:.3g} bytes per parameter", *low])


_SCHEDULE_USES = {
    "constant": "Fine-tuning, Schedule-Free, runs of unknown length.",
    "cosine": "The usual choice for a run of known length.",
    "cosine_restarts": "Several good weights from one run, as for ensembles.",
    "exponential": "Where the rate is to fall by the same share in each step.",
    "inverse_sqrt": "Runs of unknown length; the original Transformer.",
    "linear": "Fine-tuning, and short budgets.",
    "multi_step": "Published recipes of convolutional networks.",
    "one_cycle": "Short runs at a high rate, with momentum the other way.",
    "polynomial": "Segmentation, with power 0.9.",
    "reduce_on_plateau": "Where a validation metric decides, and the length is open.",
    "rex": "Small budgets.",
    "step": "Published recipes of convolutional networks.",
    "tanh": "Published recipes that use it.",
    "wsd": "Runs that may be extended: the decay comes at the end only.",
}


def schedules() -> list[Entry]:
    """List the schedules."""
    from lightning_optim.schedules.registry import SCHEDULES

    return [
        Entry(name, (), f"{_first_line(cls)} {_SCHEDULE_USES.get(name, '')}".strip(), _paper(cls))
        for name, cls in SCHEDULES.items()
    ]


_CLIP_STATES = {
    "adagc": "1 number per tensor",
    "autoclip": "512 norms",
    "momentum_ratio": "1 count per tensor",
    "update_rms": "1 count per tensor",
    "zclip": "128 norms",
}


def clipping() -> list[Entry]:
    """List the clipping methods."""
    from lightning_optim.clipping.choice import CLIP_RULES

    return [
        Entry(name, (*_defaults(cls), f"state {_CLIP_STATES.get(name, 'none')}"), _first_line(cls), _paper(cls))
        for name, cls in CLIP_RULES.items()
    ]


_DECAYS = {
    "decoupled": ("w - u - lr*λ*w", "The usual kind: torch's AdamW.", "https://arxiv.org/abs/1711.05101"),
    "independent": (
        "w - u - lr/peak*λ*w",
        "λ stays right when lr is tuned; it is the share lost per step at the peak, so far smaller (1e-4).",
        "https://arxiv.org/abs/1711.05101",
    ),
    "corrected": (
        "w - u - lr²/peak*λ*w",
        "Keeps gradient and weight norms in balance while lr falls.",
        "https://arxiv.org/abs/2506.02285",
    ),
    "l2": ("λ*w is added to the gradient", "As in torch's Adam and SGD; enters the moments.", ""),
    "l1": ("w - u, then towards 0 by lr*λ", "Weights that are exactly 0.", ""),
    "l2_sp": (
        "w - u - lr*λ*(w - w0)",
        "Fine-tuning: stay near the weights at the first step; state 1 value.",
        "https://arxiv.org/abs/1802.01483",
    ),
    "cautious": (
        "w - u - lr*λ*w where u*w >= 0",
        "Decay that never works against the gradient.",
        "https://arxiv.org/abs/2510.12402",
    ),
    "norm": (
        "w - u, rescaled to a root mean square of λ",
        "Weights kept at one size (λ about 0.02).",
        "https://arxiv.org/abs/2305.17212",
    ),
}


def weight_decay() -> list[Entry]:
    """List the kinds of weight decay, for ``weight_decay_kind``."""
    from lightning_optim.optim import DECAY_KINDS

    own = [Entry(name, (), _first_line(cls), _paper(cls)) for name, cls in DECAY_KINDS.items()]
    return [Entry(name, (form,), use, paper) for name, (form, use, paper) in _DECAYS.items()] + own


def detectors() -> list[Entry]:
    """List detectors by name, and what `DivergenceGuard` watches by arguments of its own."""
    from lightning_optim import divergence

    named = [Entry(name, (), _first_line(cls)) for name, cls in divergence.DETECTORS.items()]
    own = {
        "spikes": divergence.Spikes,
        "early_warning": divergence.EarlyWarning,
        "health": divergence.HealthLimits,
    }
    return named + [Entry(name, ("argument of DivergenceGuard",), _first_line(cls)) for name, cls in own.items()]


def diagnostics() -> list[Entry]:
    """List the diagnostics of `OptimizerMonitor`."""
    from lightning_optim.diagnostics import DIAGNOSTICS

    return [Entry(name, (), _first_line(cls), _paper(cls)) for name, cls in DIAGNOSTICS.items()]


def recipes() -> list[Entry]:
    """List the recipes: optimizer, rate, schedule, the kind of model, and the first source."""
    from lightning_optim.tuning.recipes import RECIPES

    entries = []
    for each in RECIPES.values():
        facts = [f"optimizer {each.optimizer}", f"schedule {each.schedule}"]
        if each.lr is not None:
            facts.insert(1, f"lr {each.lr:g}")
        use = each.description[:1].upper() + each.description[1:]
        entries.append(Entry(each.name, tuple(facts), f"{use}.", each.paper))
    return entries


KINDS: dict[str, tuple[Callable[[], list[Entry]], str]] = {
    "optimizers": (optimizers, "ConfigureOptimizers(optimizer=...)"),
    "schedules": (schedules, "ConfigureOptimizers(schedule=...)"),
    "clipping": (clipping, "GradientClipping(method=...)"),
    "weight-decay": (weight_decay, "weight_decay_kind of any optimizer"),
    "detectors": (detectors, "DivergenceGuard(detectors=[...])"),
    "diagnostics": (diagnostics, "OptimizerMonitor(diagnostics=[...])"),
    "recipes": (recipes, "lightning-optim recipe NAME > run.yaml"),
}
"""Each kind of entry: what lists it, and where its names are written."""


def matching(entries: Iterable[Entry], pattern: str) -> list[Entry]:
    """Return the entries whose names match.

    Args:
        entries: All of a kind.
        pattern: A shell-style wildcard; a word without one matches the names that contain it.
    """
    wild = pattern.lower().replace("-", "_")
    wild = wild if re.search(r"[*?\[]", wild) else f"*{wild}*"
    return [entry for entry in entries if fnmatchcase(entry.name.replace("-", "_"), wild)]


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``list``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(KINDS)}; all counts if left out")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a wildcard such as 'adam*'")


def run_list(args: Sequence[str]) -> None:
    """Print what there is of a kind.

    Args:
        args: The command line after ``list``.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-optim list",
        description="Show names that a configuration may use: what each is for, its rates, its state, its paper.",
        epilog="Example: lightning-optim list optimizers adam",
    )
    add_list_arguments(parser)
    options = parser.parse_args(args)
    if options.kind is None:
        for kind, (lists, where) in KINDS.items():
            print(f"{kind:<13} {len(lists()):>3}  {where}")
        return
    kind = options.kind.lower().replace("_", "-")
    if kind not in KINDS:
        _fail(f"Unknown kind {options.kind!r}. {nearest(options.kind, KINDS)}")
    entries = KINDS[kind][0]()
    found = entries if options.pattern is None else matching(entries, options.pattern)
    if not found:
        _fail(f"No entry of {kind} matches {options.pattern!r}. {nearest(options.pattern, [e.name for e in entries])}")
    width = min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else 80
    print("\n\n".join(entry.format(width) for entry in found))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _first_line(cls: type) -> str:
    text = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r"``([^`]*)``|`([^`]*)`", lambda match: match[1] or match[2], text)


def _paper(cls: type) -> str:
    found = re.search(r"https?://[^\s;,)]+", inspect.getdoc(cls) or "")
    return found[0].rstrip(".") if found else ""


def _defaults(cls: type) -> list[str]:
    """The constructor's numbers, as they are written in a configuration."""
    shown: list[Any] = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if isinstance(parameter.default, int | float):
            shown.append(f"{name} {parameter.default:g}")
    return shown
