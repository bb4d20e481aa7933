"""Keys for the callbacks of this package, in YAML and as flags: ``optim``, ``clip``, ``guard`` and ``monitor``."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from jsonargparse import Namespace, get_loader
from lightning.pytorch.utilities import rank_zero_info

from lightning_optim.callbacks import ConfigureOptimizers, DivergenceGuard, GradientClipping, OptimizerMonitor
from lightning_optim.cli.merge import ChangeError, is_spec, plain, set_argument, set_path
from lightning_optim.cli.sources import Source, SourceError, read_sources
from lightning_optim.core.imports import import_object

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

KEYS: dict[str, type[L.Callback]] = {
    "optim": ConfigureOptimizers,
    "clip": GradientClipping,
    "guard": DivergenceGuard,
    "monitor": OptimizerMonitor,
}
"""Each key and the callback whose arguments it takes."""

_PATH = re.compile(rf"--({'|'.join(KEYS)})\.(\w+\.[^=\s]+?)(?:=(.*))?", re.DOTALL)
_SWITCH = re.compile(rf"--({'|'.join(KEYS)})(?:=(.*))?", re.DOTALL)


@dataclass
class Flags:
    """What the flags of a command line say beyond the arguments of the callbacks themselves.

    Args:
        rest: The command line without them.
        paths: Key, path and value of each flag for an argument within an argument: ``--optim.schedule.final 0.1``.
        switches: Whether a callback is to be there at all: ``--guard false``.
        named: Keys of which the command line has a flag.
    """

    rest: list[str] = field(default_factory=list)
    paths: list[tuple[str, list[str], Any]] = field(default_factory=list)
    switches: dict[str, bool] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)


def read_flags(args: Sequence[str]) -> Flags:
    """Separate the flags that jsonargparse does not know.

    Args:
        args: The command line.

    Example:
        >>> read_flags(["fit", "--optim.lr=0.1", "--optim.schedule.final=1e-2"]).paths
        [('optim', ['schedule', 'final'], 0.01)]
    """
    flags, load, rest = Flags(), get_loader("yaml"), list(args)
    while rest:
        arg = rest.pop(0)
        if (path := _PATH.fullmatch(arg)) and not path[2].endswith((".help", "+")):
            value = path[3] if path[3] is not None else (rest.pop(0) if rest else "null")
            flags.paths.append((path[1], path[2].split("."), load(value)))
            flags.named.add(path[1])
            continue
        if switch := _SWITCH.fullmatch(arg):
            value = switch[2] if switch[2] is not None else (rest[0] if rest else "")
            if value in ("true", "false", "null", "{}"):
                del rest[: switch[2] is None]
                flags.switches[switch[1]] = value in ("true", "{}")
                continue
        if arg.startswith("--"):
            flags.named.add(re.split(r"[.=]", arg[2:])[0])
        flags.rest.append(arg)
    flags.named &= KEYS.keys()
    return flags


class OptimKeys:
    """The keys ``optim``, ``clip``, ``guard`` and ``monitor`` for a LightningCLI, on the command line and in YAML.

    Each takes the arguments of a callback: ``optim`` those of `ConfigureOptimizers`, ``clip`` of `GradientClipping`,
    ``guard`` of `DivergenceGuard` and ``monitor`` of `OptimizerMonitor`. An empty mapping, or ``true``, adds the
    callback with its defaults.

    On the command line they reach every argument, also those within an argument: ``--optim.lr 1e-3``,
    ``--optim.optimizer.betas '[0.9, 0.95]'``, ``--optim.schedule.final 0.1``, ``--guard.spikes.threshold 8``,
    ``--optim.optimizers.generator.lr 1e-4``. If ``trainer.callbacks`` has the callback already, flags change its
    arguments, and so do keys in a later configuration file; ``--guard false`` removes it. Keys and a callback of one
    role in the same file are refused.

    What is parsed is a list of callbacks, and so is what is saved: ``config.yaml`` of a run works with stock
    LightningCLI, too.

    Example:
        >>> from lightning.pytorch.cli import LightningCLI
        >>> class CLI(OptimKeys, LightningCLI):
        ...     pass
    """

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys after Lightning's own."""
        super().add_core_arguments_to_parser(parser)  # type: ignore[misc]
        for key, cls in KEYS.items():
            parser.add_class_arguments(cls, key, fail_untyped=False, instantiate=False, sub_configs=True)
        for action in parser._actions:
            if action.dest.partition(".")[0] in KEYS and action.default is not argparse.SUPPRESS:
                # What is not given must be told from what is given as its default. The help shows the default.
                if "." in action.dest and action.help:
                    action.help += f" (default: {_shown(action.default)})"
                action.default = argparse.SUPPRESS
                parser._defaults.pop(action.dest, None)

    replaced: Sequence[str] = ()
    """Sentences about callbacks of one configuration file that a later one drops."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then write the keys into the list of callbacks."""
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list | tuple):
            super().parse_arguments(parser, args)  # type: ignore[misc]
            self._write_keys(parser, Flags(), [])
            return
        flags = read_flags(given)
        printing = [arg for arg in flags.rest if arg.split("=")[0] == "--print_config"]
        rest = [arg for arg in flags.rest if arg not in printing]
        if rest == list(given):
            super().parse_arguments(parser, args)  # type: ignore[misc]
        else:
            self.config = parser.parse_args(rest)
        subcommand = self.config.get("subcommand")
        try:
            sources = read_sources(rest, subcommand)
        except SourceError as error:
            parser.error(str(error))
        self.replaced = _dropped(sources)
        self._write_keys(parser, flags, sources)
        if printing:
            self._print_config(parser, subcommand, printing[-1].partition("=")[2].split(","))

    def _write_keys(self, parser: LightningArgumentParser, flags: Flags, sources: Sequence[Source]) -> None:
        subcommand = self.config.get("subcommand")
        config = self.config if subcommand is None else self.config[subcommand]
        in_files = {key: source.data[key] for source in sources for key in KEYS if key in source.data}
        for key, value in in_files.items():
            if value is None:
                parser.error(
                    f"The key {key} has no value: write `{key}: {{}}` for its defaults, `{key}: false` for none."
                )
            if value == {} and key not in config:  # which jsonargparse drops
                config[key] = Namespace()  # type: ignore[no-untyped-call]
        if not (flags.paths or flags.switches or any(key in config for key in KEYS)):
            return
        try:
            callbacks = _callbacks(config)
            for key, cls in KEYS.items():
                _write_key(key, cls, callbacks, config, flags, sources)
        except (ChangeError, ValueError) as error:
            parser.error(str(error))
        whole = plain(self.config)
        (whole if subcommand is None else whole[subcommand])["trainer"]["callbacks"] = callbacks
        config["trainer"]["callbacks"] = callbacks  # for an explanation of what is refused
        self.config = parser.parse_object(whole)

    def _print_config(self, parser: LightningArgumentParser, subcommand: str | None, options: Sequence[str]) -> None:
        shown = self.config if subcommand is None else self.config[subcommand]
        of = parser if subcommand is None else self._subcommand_parsers[subcommand]  # type: ignore[attr-defined]
        sys.stdout.write(of.dump(shown, skip_default="skip_default" in options, skip_validation=True))
        parser.exit()


def _callbacks(config: Any) -> list[Any]:
    """The list of callbacks as plain data, which may be changed."""
    present = plain(config["trainer"].get("callbacks"))
    if present is None:
        return []
    return present if isinstance(present, list) else [present]


def _write_key(
    key: str, cls: type[L.Callback], callbacks: list[Any], config: Any, flags: Flags, sources: Sequence[Source]
) -> None:
    """Add a callback to the list, or change it there.

    Raises:
        ChangeError: The key and the list contradict each other, or a path leads nowhere.
    """
    has_key = key in config
    given = plain(config.pop(key)) if has_key else None
    present = [each for each in callbacks if _is_a(each, cls)]
    switch = flags.switches.get(key, given if isinstance(given, bool) else None)
    if switch is False:
        callbacks[:] = [each for each in callbacks if each not in present]
        return
    if given is not None and not isinstance(given, dict | bool):
        raise ChangeError(
            f"Invalid {key}: {given!r}. It takes the arguments of {cls.__name__}, for instance {key}: {{}}"
        )
    paths = [(path, value) for of, path, value in flags.paths if of == key]
    if not (has_key or paths or switch):
        return
    if present and has_key:
        _check_owner(key, cls, present, flags, sources)
    if len(present) > 1:
        raise ChangeError(f"--{key} is ambiguous: trainer.callbacks has {len(present)} callbacks {cls.__name__}.")
    if not present:
        present = [{"class_path": f"lightning_optim.{cls.__name__}", "init_args": {}}]
        callbacks += present
    entry = present[0]
    arguments = entry["init_args"] = entry.get("init_args") or {}
    for name, value in (given if isinstance(given, dict) else {}).items():
        if (lost := set_argument(arguments, name, value)) is not None:
            rank_zero_info(f"{key}.{lost}")
    for path, value in paths:
        try:
            set_path(arguments, path, value)
        except ChangeError as error:
            raise ChangeError(f"Invalid --{key}.{'.'.join(path)}={value!r}: {error}") from None


def _check_owner(
    key: str, cls: type[L.Callback], present: Sequence[Any], flags: Flags, sources: Sequence[Source]
) -> None:
    """Refuse a key that comes from the same file as the callback, or from an earlier one."""
    keyed = [index for index, source in enumerate(sources) if key in source.data]
    listed = [index for index, source in enumerate(sources) if _lists(source.data, cls)]
    in_flags = key in flags.named
    if (keyed and listed and keyed[0] > listed[-1]) or (not keyed and in_flags):
        return
    where = f" in {sources[keyed[0]].path}" if keyed else ""
    raise ChangeError(
        f"Two owners of one role: the key `{key}`{where}, and {present[0]['class_path']} under trainer.callbacks"
        f"{f' in {sources[listed[-1]].path}' if listed else ''}. Keep one. Flags such as --{key}.{_example(cls)} "
        "change either."
    )


def _lists(data: Mapping[str, Any], cls: type[L.Callback]) -> bool:
    trainer = data.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    return any(_is_a(each, cls) for each in (callbacks if isinstance(callbacks, list) else [callbacks]))


def _dropped(sources: Sequence[Source]) -> list[str]:
    """What a list of callbacks in one file had, and the list of a later file, which takes its place, has not."""
    notes = []
    lists = [(source.path, found) for source in sources if (found := _class_names(source.data)) is not None]
    for (before, old), (after, new) in itertools.pairwise(lists):
        if gone := [name for name in old if name not in new]:
            notes.append(
                f"trainer.callbacks of {after} takes the place of that of {before}, without {', '.join(gone)}. A list "
                "is replaced as a whole; keys such as optim: {lr: 1e-3} change single arguments."
            )
    return notes


def _class_names(data: Mapping[str, Any]) -> list[str] | None:
    trainer = data.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(callbacks, list):
        return None
    paths = [each.get("class_path") if isinstance(each, dict) else each for each in callbacks]
    return [str(path).rpartition(".")[2] for path in paths]


def _is_a(entry: Any, cls: type[L.Callback]) -> bool:
    path = entry.get("class_path") if is_spec(entry) else entry
    if not isinstance(path, str):
        return False
    if "." not in path:
        return path == cls.__name__
    try:
        found = import_object(path, "callback", L.Callback)
    except ValueError:
        return False
    return isinstance(found, type) and issubclass(found, cls)


def _example(cls: type[L.Callback]) -> str:
    return {"ConfigureOptimizers": "lr", "GradientClipping": "max_norm", "DivergenceGuard": "patience"}.get(
        cls.__name__, "progress_bar"
    )


def _shown(default: Any) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
