"""The configuration files of a command line, as they are written: contents, lines, keys that occur twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_optim.core.suggest import nearest


class SourceError(ValueError):
    """A configuration file that cannot be read; the message is for users."""


@dataclass(frozen=True)
class Source:
    """A configuration file.

    Args:
        path: As given.
        data: Its contents, of the subcommand; {} for a file of another place than this machine.
        node: The same with line numbers; None if there is none.
    """

    path: str
    data: dict[str, Any]
    node: yaml.Node | None

    def line(self, keys: Sequence[str | int]) -> int | None:
        """Return the line of a key, counted from 1, or of the nearest one above it that the file has.

        Args:
            keys: Keys and numbers of entries from the top.
        """
        node, line = self.node, None
        for key in keys:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == key), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                found = (node.value[key], node.value[key])
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def config_files(args: Sequence[str]) -> list[str]:
    """Return the paths that follow ``-c`` and ``--config``, in order."""
    found = []
    for index, arg in enumerate(args):
        if arg in ("-c", "--config") and index + 1 < len(args):
            found.append(args[index + 1])
        elif arg.startswith("--config="):
            found.append(arg.partition("=")[2])
    return found


def read_sources(args: Sequence[str], subcommand: str | None) -> list[Source]:
    """Read the configuration files of a command line.

    Args:
        args: The command line.
        subcommand: Name of the subcommand, below which a file for all subcommands has its settings.

    Raises:
        SourceError: A file is missing, is no UTF-8 text, is no YAML, has a key twice, or is no mapping.
    """
    place = list(args).index(subcommand) if subcommand is not None and subcommand in args else 0
    of_all = len(config_files(args[:place]))
    sources = []
    for number, path in enumerate(config_files(args)):
        source = read_mapping(path)
        if number < of_all and subcommand is not None:
            inner = source.data.get(subcommand)
            node = _child(source.node, subcommand)
            source = Source(path, inner if isinstance(inner, dict) else {}, node)
        sources.append(source)
    return sources


def read_mapping(path: str, needs: str = "keys such as `model:` and `trainer:`") -> Source:
    """Read a YAML file that is to have a mapping at its top.

    Args:
        path: The file.
        needs: What the mapping has, for the message.

    Raises:
        SourceError: The file is missing, is no UTF-8 text, is no YAML, has a key twice, is empty, or is no mapping.
    """
    if "://" in path or path.lstrip().startswith("{"):
        return Source(path, {}, None)
    text = _text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SourceError(_syntax(path, error)) from None
    except (ValueError, RecursionError) as error:  # a date that is none, say
        raise SourceError(f"{path}: this is not valid YAML: {error}.") from None
    if data is None:
        raise SourceError(f"{path} is empty: it must have {needs}.")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"the {type(data).__name__} {str(data)[:40]!r}"
        raise SourceError(f"{path} has {kind} at its top: it must be a mapping, with {needs}.")
    for keys, line in _twice(node):
        raise SourceError(f"{path}, line {line}: the key {'.'.join(map(str, keys))} occurs twice. Remove one.")
    return Source(path, data, node)


def _text(path: str) -> str:
    file = Path(path)
    if file.is_dir():
        raise SourceError(f"{path} is a folder: --config takes a file.")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        near = ""
        if isinstance(error, FileNotFoundError):
            folder = file.parent if file.parent.is_dir() else Path()
            others = [str(each) for end in ("*.yaml", "*.yml", "*.json") for each in sorted(folder.glob(end))]
            near = nearest(path, others) if others else ""
            near = f" {near}" if near.startswith("Did you mean") else ""
        raise SourceError(f"{path}: {error.strerror or error}.{near}") from None


def _syntax(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return f"{path}: this is not valid YAML: {problem}."
    snippet = mark.get_snippet(indent=2, max_length=80) or ""
    tab = " (a tab: YAML is indented by spaces)" if "'\\t'" in problem else ""
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {problem}{tab}" + (
        f"\n{snippet}" if snippet else ""
    )


def _twice(
    node: yaml.Node | None, above: tuple[str | int, ...] = (), visited: set[int] | None = None
) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Keys that a mapping has twice, each with its second line."""
    visited = set() if visited is None else visited
    if id(node) in visited:  # an alias, which may contain itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = key.value if isinstance(key.value, str) else str(key.start_mark.line)
            if name in seen and name != "<<":
                yield (*above, name), key.start_mark.line + 1
            seen.add(name)
            yield from _twice(value, (*above, name), visited)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _twice(value, (*above, index), visited)


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for k, value in node.value if k.value == key), None)
    return None
