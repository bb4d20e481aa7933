"""The search for the mistake in a configuration, after jsonargparse or a constructor has refused it.

It reads the files again, key by key, so that it can name file, line and key, and the nearest name that exists. What is
accepted never comes here.
"""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser

from lightning_optim.cli.errors import condense, sentences
from lightning_optim.cli.keys import KEYS
from lightning_optim.cli.merge import is_spec, plain
from lightning_optim.cli.sources import Source, SourceError, read_sources
from lightning_optim.core.imports import import_object
from lightning_optim.core.suggest import nearest

Keys = tuple[str | int, ...]

SYNONYMS = {
    "clip_norm": "max_norm",
    "clip_val": "max_norm",
    "decay": "weight_decay",
    "epochs": "max_epochs",
    "gradient_clip_val": "max_norm",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "max_grad_norm": "max_norm",
    "num_warmup_steps": "warmup",
    "optim": "optimizer",
    "scheduler": "schedule",
    "steps": "max_steps",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "wd": "weight_decay",
}
"""What other libraries call an argument, where the names are not similar."""


def explain(
    message: str,
    args: Sequence[str],
    config: Any,
    parsers: Mapping[str, LightningArgumentParser],
    parser: LightningArgumentParser,
) -> str | None:
    """Return what is wrong with a command line, in a line or a few.

    Args:
        message: The message of the exception.
        args: The command line.
        config: The parsed configuration; None if it could not be parsed.
        parsers: The parser of each subcommand.
        parser: The parser of the command.

    Returns:
        The mistake with its place; None if it was not found, and the message is all there is.
    """
    subcommand = next((arg for arg in args if arg in parsers), None)
    try:
        sources = read_sources(args, subcommand)
    except SourceError as error:
        return str(error)
    diagnosis = _Diagnosis(parsers.get(subcommand or "", parser), args, sources, set(parsers))
    return diagnosis.of(message, None if config is None else config.get(subcommand or "", config))


class _Diagnosis:
    """The search in one command line."""

    def __init__(
        self, parser: LightningArgumentParser, args: Sequence[str], sources: Sequence[Source], commands: set[str]
    ) -> None:
        self.args, self.sources, self.commands = args, sources, commands
        names = (action.dest for action in parser._actions)
        self.known = _tree(
            name for name in names if name not in ("help", "print_config") and not name.endswith(".help")
        )

    def of(self, message: str, config: Any) -> str | None:
        for find in (self._unknown_flags, self._required):
            if (found := find(message)) is not None:
                return found
        for source in self.sources:
            for keys, problem in self._misplaced(source.data, (), self.known):
                return f"{self._place(source, keys)}: {problem}"
        if (found := self._class_flags() or self._in_callbacks(config)) is not None:
            return found
        return self._by_key(message)

    # What the message of jsonargparse says by itself.

    def _unknown_flags(self, message: str) -> str | None:
        found = re.match(r"unrecognized arguments: (\S+)", message.strip())
        if found is None:
            return None
        flag = found[1].partition("=")[0]
        if not flag.startswith("-"):
            return f"Unexpected argument {flag!r}: options begin with --, for instance --trainer.max_epochs 3."
        name = flag.lstrip("-")
        options = list(_leaves(self.known))
        above, _, last = name.rpartition(".")
        same = [option for option in options if option in (name, f"{above}.{SYNONYMS.get(last)}")]
        same += [option for option in options if not above and option.rpartition(".")[2] in (name, SYNONYMS.get(name))]
        hint = f"Did you mean --{same[0]}?" if same else _nearest_flag(name, options)
        return f"Unknown option {flag}. {hint}"

    def _required(self, message: str) -> str | None:
        found = re.search(r'arguments are required: (\S+)|[Kk]ey "(\S+)" is required', message)
        if found is None:
            return None
        name = (found[1] or found[2]).removeprefix("fit.").split(".", 1)
        if not set(name) & (self.known.keys() | self.commands):
            return None
        key = name[1] if name[0] in self.commands and len(name) > 1 else ".".join(name)
        example = {"model": "my_package.MyModule", "data": "my_package.MyData"}.get(key, "...")
        where = f" in {self.sources[-1].path}" if self.sources else ""
        return f"No {key}: write `{key}: {example}`{where}, or --{key} {example}."

    def _class_flags(self) -> str | None:
        """What is wrong with a module or data module, or with its arguments, in flags such as `--model.width 3`."""
        flags = dict(_flags(self.args))
        for key, base in (("model", L.LightningModule), ("data", L.LightningDataModule)):
            if self.known.get(key) != {}:  # The command takes no class here, or one of its own.
                continue
            path: Any = flags.get(f"--{key}.class_path", flags.get(f"--{key}"))
            if path is None:
                path = next((_path_of(s.data[key]) for s in reversed(self.sources) if key in s.data), None)
            elif not path.lstrip().startswith("{") and not Path(path).exists():
                for _, problem in _wrong_spec(path, (key,), base):
                    return f"--{key}: {problem}"
            if (cls := _class_of(path, base)) is None:
                continue
            taken = inspect.signature(cls).parameters
            if any(each.kind is each.VAR_KEYWORD for each in taken.values()):
                continue
            for flag in flags:
                name = flag.removeprefix(f"--{key}.").removeprefix("init_args.").partition(".")[0]
                if flag.startswith(f"--{key}.") and name not in (*taken, "class_path", "dict_kwargs", "help"):
                    return f"{flag}: {path} takes no {name!r}. {_nearest(name, taken)}"
        return None

    def _by_key(self, message: str) -> str | None:
        found = re.findall(r'Parser key "([\w.]+)"', message)
        if not found:
            return None
        path = found[0]
        for command in self.commands:
            path = path.removeprefix(f"{command}.")
        text = re.sub(rf"^Invalid \S*{re.escape(path)}:", f"Invalid {path}:", condense(message))
        keys: Keys = tuple(path.split("."))
        if any(arg.partition("=")[0] == f"--{path}" for arg in self.args):
            return text
        for source in reversed(self.sources):
            inner = _find(source.data.get(keys[0]), str(keys[-1])) if keys[0] in ("model", "data") else None
            if inner is not None:
                return f"{self._place(source, (keys[0], *inner))}: {text}"
            if _has(source.data, keys):
                return f"{self._place(source, keys)}: {text.removeprefix(f'Invalid {path}: ')}"
        return text

    # What the files say.

    def _misplaced(self, data: Any, above: Keys, known: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
        """Keys that do not exist where they are, and class paths that lead nowhere."""
        for key, value in data.items():
            keys = (*above, key)
            if key not in known:
                yield keys, self._unknown_key(key, above, known)
            elif keys == ("trainer", "callbacks"):
                yield from _wrong_callbacks(value, keys)
            elif keys in (("model",), ("data",)) and not known[key]:
                base = L.LightningModule if key == "model" else L.LightningDataModule
                yield from _wrong_spec(value, keys, base)
            elif not known[key] and (is_spec(value) or (isinstance(value, list) and any(map(is_spec, value)))):
                for at, spec in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    if is_spec(spec):
                        yield from _wrong_spec(spec, keys if at is None else (*keys, at), object)
            elif known[key] and isinstance(value, dict):
                yield from self._misplaced(value, keys, known[key])
            elif known[key] and value is not None and not isinstance(value, str | bool):
                yield keys, f"it must be a mapping, with keys such as {_few(known[key])}; got {value!r:.60}."

    def _unknown_key(self, key: Any, above: Keys, known: dict[str, Any]) -> str:
        where = f" of {'.'.join(map(str, above))}" if above else ""
        if not isinstance(key, str):
            return f"the key {key!r} must be a name."
        if key in self.commands:
            return f"a file with `{key}:` comes before the command: lightning-optim --config FILE {key}."
        if not above and key in ("class_path", "init_args"):
            return f"{key!r} belongs into an entry of trainer.callbacks, or under model or data."
        places = [path for path in _leaves(self.known, whole=True) if path.rpartition(".")[2] == key]
        near = _nearest(key, known)
        if places and not near.startswith("Did you mean"):
            return f"unknown key{where}. It belongs under {places[0].rpartition('.')[0] or 'no other key, at the top'}."
        return f"unknown key{where}. {near}"

    def _in_callbacks(self, config: Any) -> str | None:
        """The first callback that its parser or its constructor refuses."""
        source = next((s for s in reversed(self.sources) if _list_of(s.data) is not None), None)
        listed = [] if source is None else _list_of(source.data) or []
        entries: list[Any] = listed
        if config is not None:
            entries = plain(config.get("trainer", {}).get("callbacks")) or []
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            path = entry["class_path"] if is_spec(entry) else entry
            cls = _class_of(path, L.Callback)
            if cls is None:
                continue
            arguments = (entry.get("init_args") if isinstance(entry, dict) else None) or {}
            if (problem := _trial(cls, arguments)) is not None:
                same = index < len(listed) and _class_of(_path_of(listed[index]), L.Callback) is cls
                return self._placed(cls, problem, source if same else None, ("trainer", "callbacks", index))
        for role, cls in KEYS.items():
            for source in self.sources:
                arguments = source.data.get(role)
                if isinstance(arguments, dict) and (problem := _trial(cls, arguments)) is not None:
                    return self._placed(cls, problem, source, (role,))
        return None

    def _placed(self, cls: type, problem: str, source: Source | None, keys: Keys) -> str:
        """A problem of a callback with the flag or the place in a file that it comes from."""
        name = re.search(r"Invalid (\w+)[=:\[]|takes no '(\w+)'|(\w+)=", problem)
        argument = next((group for group in (name.groups() if name else ()) if group), None)
        role = next((role for role, of in KEYS.items() if issubclass(cls, of)), None)
        for arg in self.args:
            flag = arg.partition("=")[0]
            if flag.startswith(f"--{role}.") and argument is not None and argument in flag.split("."):
                return f"{flag}: {problem}"
        for index, each in enumerate(self.sources):
            if source is None and role in each.data:
                source, keys = self.sources[index], (role,)
        if source is None:
            return f"{cls.__name__}: {problem}"
        inside = _at(source.data, keys)
        inner = _find(inside, argument) if argument else None
        if inner is None:
            words = re.findall(r"'([^']+)'|(-?\d+(?:\.\d+)?(?:e-?\d+)?)", problem)
            numbers = [number for _, number in words if number][:1]
            places = (_find(inside, word) for word in [*(quoted for quoted, _ in words if quoted), *numbers])
            inner = next((place for place in places if place is not None), None)
        return f"{self._place(source, (*keys, *(inner or ())))}: {problem}"

    def _place(self, source: Source, keys: Keys) -> str:
        line = source.line(keys)
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        return f"{source.path}{'' if line is None else f', line {line}'}, {path}"


def _trial(cls: type, arguments: Mapping[str, Any]) -> str | None:
    """Why a callback cannot be made of these arguments."""
    known = list(inspect.signature(cls).parameters)
    for name in arguments:
        if name not in known:
            near = _nearest(name, known)
            if "optimizer_kwargs" in known and not near.startswith("Did you mean"):
                near = f"An argument of the optimizer itself: optimizer_kwargs: {{{name}: ...}}."
            return f"{cls.__name__} takes no {name!r}. {near}"
    for name, example in (("optimizer", "adamw"), ("schedule", "cosine"), ("method", "agc")):
        if isinstance(value := arguments.get(name), dict) and "class_path" not in value:
            return f"Invalid {name}={value}: a mapping needs class_path. A name stands alone, as {name}: {example}."
    if (problem := _unknown_argument(arguments)) is not None:
        return problem
    parser = LightningArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        parser.instantiate_classes(parser.parse_object({"it": dict(arguments)}))
    except ArgumentError as error:
        return _own_words(cls, arguments) or _reason(str(error)).replace("Invalid it.", "Invalid ")
    except (ValueError, TypeError) as error:
        return _reason(str(error))
    except Exception:  # The callback of a user, say, which is not in question here.
        return None
    return None


def _unknown_argument(value: Any) -> str | None:
    """An argument that a class within the arguments does not take."""
    if is_spec(value) and (cls := _class_of(value["class_path"], object)) is not None:
        known = inspect.signature(cls).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            for name in value.get("init_args") or ():
                if name not in known:
                    return f"{cls.__name__} takes no {name!r}. {_nearest(name, [n for n in known if n != 'params'])}"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((problem for each in inner if (problem := _unknown_argument(each)) is not None), None)


def _own_words(cls: type, arguments: Mapping[str, Any]) -> str | None:
    """What the constructor says about those arguments that are numbers and names, in place of jsonargparse."""
    simple = {name: value for name, value in arguments.items() if isinstance(value, str | int | float)}
    try:
        cls(**simple)
    except (ValueError, TypeError) as error:
        # One of Python itself, such as "must be real number, not str", says less than jsonargparse.
        return str(error) if re.match("Invalid |Unknown |Cannot ", str(error)) else None
    return None


def _reason(message: str) -> str:
    """The sentence of a constructor within a message of jsonargparse, or else the message in short."""
    if found := sentences(message):
        return found[0]
    option = re.search(r"Problem with given class_path '([\w.]+)':\s*Option '(\w+)' is not accepted", message)
    if option is not None and (cls := _class_of(option[1], object)) is not None:
        return f"{cls.__name__} takes no {option[2]!r}. {_nearest(option[2], inspect.signature(cls).parameters)}"
    return condense(message)


def _wrong_callbacks(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    if value is None or isinstance(value, bool):
        return
    entries = value if isinstance(value, list) else [value]
    for index, entry in enumerate(entries):
        at = (*keys, index) if isinstance(value, list) else keys
        yield from _wrong_spec(entry, at, L.Callback)


def _wrong_spec(value: Any, keys: Keys, base: type) -> Iterator[tuple[Keys, str]]:
    """What is wrong with a class given by its path, with or without arguments."""
    kinds = {L.Callback: "callback", L.LightningModule: "module", L.LightningDataModule: "data module"}
    kind = kinds.get(base, "class")
    if isinstance(value, dict):
        known = ("class_path", "init_args", "dict_kwargs")
        if "class_path" not in value:
            if len(value) == 1 and isinstance(path := next(iter(value)), str) and "." in path:
                yield keys, f"write `class_path: {path}`, and its arguments under `init_args:`."
            else:
                yield keys, f"a {kind} needs `class_path:`; its arguments come under `init_args:`. Got {list(value)}."
            return
        path = value["class_path"]
    else:
        path = value
    if not isinstance(path, str):
        yield keys, f"a {kind} is the path of a class, or a mapping with `class_path:`; got {path!r:.60}."
        return
    if "." in path:
        try:
            found = import_object(path, kind, base)
        except ValueError as error:
            yield keys, str(error)
            return
        except Exception as error:  # whatever the user's module raises when it is imported
            yield keys, f"Cannot import the {kind} {path!r}: {type(error).__name__}: {error}."
            return
        if not isinstance(found, type) and not callable(found):
            yield keys, f"{path} is no class."
        elif isinstance(found, type) and not issubclass(found, base):
            yield keys, f"{path} is no {base.__name__}."
    elif base is not object and path not in (names := {each.__name__ for each in _subclasses(base)}):
        near = nearest(path, names)
        hint = near if near.startswith("Did you mean") else "Write its whole path, such as my_package.MyClass."
        yield keys, f"{path!r} is no {kind} that is known by its name. {hint}"
        return
    if isinstance(value, dict):
        for key in value:
            if key not in known:
                yield (*keys, key), f"{key!r} is an argument of {path}: write it under `init_args:`."
        arguments = value.get("init_args")
        if arguments is not None and not isinstance(arguments, dict):
            yield (*keys, "init_args"), f"it must be a mapping of arguments, got {arguments!r:.60}."
        elif base is not L.Callback and isinstance(arguments, dict) and (cls := _class_of(path, base)) is not None:
            taken = inspect.signature(cls).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
                for name in arguments:
                    if name not in taken:
                        yield (*keys, "init_args", name), f"{path} takes no {name!r}. {_nearest(name, taken)}"


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each flag with its value, or with an empty string."""
    for index, arg in enumerate(args):
        flag, is_set, value = arg.partition("=")
        if flag.startswith("--"):
            after = args[index + 1] if index + 1 < len(args) else ""
            yield flag, value if is_set else "" if after.startswith("--") else after


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield cls
        yield from _subclasses(cls)


def _path_of(entry: Any) -> Any:
    return entry["class_path"] if is_spec(entry) else entry


def _class_of(path: Any, base: type) -> type | None:
    if not isinstance(path, str):
        return None
    try:
        found = import_object(path, "class", base) if "." in path else None
    except Exception:  # It was reported where it is given.
        return None
    return found if isinstance(found, type) else None


def _list_of(data: Mapping[str, Any]) -> Any:
    trainer = data.get("trainer")
    return trainer.get("callbacks") if isinstance(trainer, dict) else None


def _tree(paths: Any) -> dict[str, Any]:
    """Dotted names as nested dicts."""
    tree: dict[str, Any] = {}
    for path in paths:
        node = tree
        for key in path.split("."):
            node = node.setdefault(key, {})
    return tree


def _leaves(tree: Mapping[str, Any], above: str = "", whole: bool = False) -> Iterator[str]:
    for key, inner in tree.items():
        if not inner or whole:
            yield above + key
        if inner:
            yield from _leaves(inner, f"{above}{key}.", whole)


def _nearest(given: Any, known: Iterable[str]) -> str:
    """A suggestion, by the names of other libraries, too."""
    known = list(known)
    return f"Did you mean {SYNONYMS[given]!r}?" if SYNONYMS.get(given) in known else nearest(str(given), known)


def _nearest_flag(name: str, options: Sequence[str]) -> str:
    head = name.partition(".")[0]
    same = [option for option in options if option.partition(".")[0] == head] or options
    found = nearest(name, same)
    if not found.startswith("Did you mean"):
        tops = sorted({option.partition(".")[0] for option in options})
        return f"See --help; options begin with {', '.join('--' + top for top in tops)}." if same is options else found
    return found.replace("'", "").replace(" mean ", " mean --").replace(" or ", " or --")


def _has(data: Any, keys: Keys) -> bool:
    return _at(data, keys) is not None


def _at(data: Any, keys: Keys) -> Any:
    for key in keys:
        of_list = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if not of_list and not (isinstance(data, dict) and key in data):
            return None
        data = data[key]
    return data


def _find(data: Any, name: str) -> Keys | None:
    """Where a key or value of this name is, the outermost first."""
    items: list[tuple[Any, Any]] = []
    if isinstance(data, dict | list):
        items = list(data.items() if isinstance(data, dict) else enumerate(data))
    for key, value in items:
        if isinstance(key, str) and (key == name or (isinstance(value, str | int | float) and str(value) == name)):
            return (key,)
    for key, value in items:
        if (inner := _find(value, name)) is not None:
            return (key, *inner)
    return None


def _few(tree: Mapping[str, Any]) -> str:
    return ", ".join(list(tree)[:4])
