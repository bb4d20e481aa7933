"""A recipe: a configuration as text, with the source of each number, and what can be made of it."""

from __future__ import annotations

import importlib
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as L
import yaml

from lightning_optim.callbacks import ConfigureOptimizers, DivergenceGuard, GradientClipping, OptimizerMonitor
from lightning_optim.core.suggest import nearest

_KEYS: dict[str, type[L.Callback]] = {
    "optim": ConfigureOptimizers,
    "clip": GradientClipping,
    "guard": DivergenceGuard,
    "monitor": OptimizerMonitor,
}
"""The keys of the command line, in its order (`lightning_optim.cli.keys.KEYS`), without its packages."""

_RULES = {
    "linear": ("B / {size}", "multiply lr by B / {size:,}"),
    "sqrt": ("sqrt(B / {size})", "multiply lr by the square root of B / {size:,}"),
}
_WIDTH = 120


@dataclass(frozen=True)
class Batch:
    """The batch size of a recipe's source, and what another one does to the learning rate.

    Args:
        size: Samples, or whatever ``unit`` is, per optimizer step.
        source: Key of the source of the size.
        unit: What is counted.
        rule: ``"linear"``, ``"sqrt"``, or None if no source gives a rule for this kind of model.
        rule_source: Key of the source of the rule; None for that of the size.
    """

    size: int
    source: str
    unit: str = "samples"
    rule: str | None = None
    rule_source: str | None = None

    def factor(self, size: int) -> float:
        """Compute the factor on the learning rate for a batch of ``size``.

        Args:
            size: The batch size, at least 1, in the same unit.

        Raises:
            ValueError: The size is not positive, or there is no rule.

        Example:
            >>> Batch(256, "goyal", rule="linear").factor(64)
            0.25
        """
        if size < 1:
            raise ValueError(f"Invalid batch_size={size!r}: must be at least 1.")
        if self.rule is None:
            raise ValueError(
                f"Invalid batch_size={size!r}: the sources of this recipe give no rule for other batches than "
                f"{self.size:,} {self.unit}. Leave batch_size out, and search the rate."
            )
        ratio = size / self.size
        return ratio if self.rule == "linear" else math.sqrt(ratio)

    def __str__(self) -> str:
        text = f"{self.size:,} {self.unit} per step [{self.source}]. "
        if self.rule is None:
            return text + "No source gives a rule for others: search the rate."
        rule = _RULES[self.rule][1].format(size=self.size)
        return text + f"For B {self.unit}, {rule} [{self.rule_source or self.source}]: --batch-size B writes it so."


@dataclass(frozen=True)
class Recipe:
    """Published settings for one kind of model: optimizer, groups, schedule, clipping, length, batch and precision.

    Args:
        name: Its name.
        description: The kind of model that it is for.
        sources: Its publications by the key that stands in brackets behind each number: author, title, year, URL.
        batch: The batch size of the source; None where none applies.
        settings_yaml: The configuration: the keys ``trainer``, ``optim``, ``clip``, ``guard`` and ``monitor``, with the
            source of each number as a comment on its line.
        advice: Sentences on what to change, and when.

    Example:
        >>> from lightning_optim import recipe
        >>> resnet = recipe("resnet")
        >>> resnet.optimizer, resnet.lr, resnet.schedule
        ('sgd', 0.1, 'cosine')
        >>> resnet.scaled_to(64).lr
        0.025
        >>> print(*resnet.callbacks()[:1])
        ConfigureOptimizers(SGD(momentum=0.9, nesterov=True, lr=0.1, weight_decay=0.0001), Cosine(warmup='4%'))
        >>> resnet.trainer
        {'max_epochs': 120, 'precision': 'bf16-mixed'}
    """

    name: str
    description: str
    sources: Mapping[str, str]
    batch: Batch | None
    settings_yaml: str
    advice: tuple[str, ...] = field(default=())

    @property
    def yaml(self) -> str:
        """The recipe as a configuration for ``lightning-optim fit --config``, without model and data."""
        head = [f"Recipe {self.name}: {self.description}", "", "Sources, by the key behind each number:"]
        head += [f"  [{key}] {source}" for key, source in self.sources.items()]
        notes = ([] if self.batch is None else [f"Batch: {self.batch}"]) + list(self.advice)
        lines = [part for line in [*head, "", *notes] for part in _wrapped(line)]
        return "\n".join(["\n".join(f"# {line}".rstrip() for line in lines), "", _PLACEHOLDERS, self.settings_yaml])

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain data."""
        settings: dict[str, Any] = yaml.safe_load(self.settings_yaml)
        return settings

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer other than callbacks: length, precision and the like."""
        return {key: value for key, value in self.settings.get("trainer", {}).items() if key != "callbacks"}

    @property
    def optimizer(self) -> str:
        """The optimizer's name; of several, each that differs."""
        optim = self.settings["optim"]
        names = [entry["optimizer"] for entry in optim.get("optimizers", [optim])]
        return " and ".join(dict.fromkeys(names))

    @property
    def lr(self) -> float | None:
        """The peak learning rate; of several optimizers the first one's. None for the optimizer's default."""
        optim = self.settings["optim"]
        lr: float | None = optim.get("optimizers", [optim])[0].get("lr")
        return lr

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        optim = self.settings["optim"]
        given = optim.get("optimizers", [optim])[0].get("schedule", "constant")
        if isinstance(given, str):
            return given
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", given["class_path"].rpartition(".")[2]).lower()

    @property
    def paper(self) -> str:
        """URL of the first source."""
        found = re.search(r"https?://[^\s,]+", next(iter(self.sources.values())))
        assert found is not None, "a source without a URL"
        return found[0]

    def scaled_to(self, batch_size: int) -> Recipe:
        """Return the recipe with the learning rate for another batch size, by the rule of its source.

        Args:
            batch_size: What one optimizer step sees, on all devices and with accumulation, in the unit of `batch`.

        Raises:
            ValueError: The size is not positive, or the sources give no rule.
        """
        if self.batch is None or self.lr is None:
            raise ValueError(f"Invalid batch_size={batch_size!r}: the recipe {self.name!r} has none to scale from.")
        lr = float(f"{self.lr * self.batch.factor(batch_size):.4g}")
        rule = _RULES[self.batch.rule or "linear"][0].format(size=self.batch.size)
        note = f"  # {self.lr:g} x {rule}, B = {batch_size} [{self.batch.rule_source or self.batch.source}]; "
        text = re.sub(
            r"^(  lr: )[\d.e+-]+ +# ",
            lambda found: f"{found[1]}{_yaml_float(lr)}{note}",
            self.settings_yaml,
            count=1,
            flags=re.MULTILINE,
        )
        return replace(self, settings_yaml=text)

    def callbacks(self, parts: Mapping[str, str] | None = None) -> list[L.Callback]:
        """Make the callbacks of the recipe for ``Trainer(callbacks=..., **recipe.trainer)``.

        Args:
            parts: For a recipe of several optimizers, the path of each one's part of the module:
                ``{"generator": "gen", "discriminator": "disc"}``. None for the paths in the recipe.

        Returns:
            New objects at each call, in the order that the command line gives them.

        Raises:
            ValueError: ``parts`` names an optimizer that the recipe does not have.
        """
        settings = self.settings
        entries = settings["optim"].get("optimizers", [])
        for name, path in (parts or {}).items():
            if name not in (names := [entry["name"] for entry in entries]):
                raise ValueError(
                    f"Invalid parts={parts!r}: no optimizer {name!r} in {self.name!r}. {nearest(name, names)}"
                )
            entries[names.index(name)]["part"] = path
        others = settings.get("trainer", {}).get("callbacks", [])
        made: list[L.Callback] = [_instance(other) for other in others]
        return made + [cls(**settings[key]) for key, cls in _KEYS.items() if key in settings]

    def __repr__(self) -> str:
        lr = "" if self.lr is None else f", lr={self.lr:g}"
        return f"Recipe({self.name!r}, optimizer={self.optimizer!r}{lr}, schedule={self.schedule!r})"


_PLACEHOLDERS = """\
# model: my_package.MyModule  # your LightningModule, or --model my_package.MyModule; no configure_optimizers needed
# data: my_package.MyData  # your LightningDataModule, or --data my_package.MyData; none for a module with own loaders
"""


def _wrapped(line: str) -> list[str]:
    """A line in lines of a comment, except a URL that is longer."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        _WIDTH - 2,
        initial_indent="",
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [""]


def _yaml_float(value: float) -> str:
    """A number as YAML 1.1 reads it, with a point in its mantissa."""
    mantissa, sign, exponent = f"{value:g}".partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}{sign}{exponent}"


def _instance(spec: Mapping[str, Any]) -> L.Callback:
    module, _, name = spec["class_path"].rpartition(".")
    callback: L.Callback = getattr(importlib.import_module(module), name)(**spec.get("init_args", {}))
    return callback
