"""Classes by name, one registry for each kind of thing a user can name; open to users' own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar, overload

from lightning_optim.core.suggest import nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)

_registries: list[Registry[Any]] = []


class Registry(Generic[T]):
    """The classes of one kind by name: those of this package, and what users `register`.

    Names are lower case with underscores; a hyphen and capitals are accepted when looking up.

    Args:
        kind: What messages call one of them, for instance "schedule".
        base: What all of them derive from.
        aliases: Further names, for instance those of other libraries: alias to name.

    Example:
        >>> tables = Registry("table", dict)
        >>> tables.add(dict, "plain")
        >>> tables.get("Plain")
        <class 'dict'>
        >>> tables.get("plane")
        Traceback (most recent call last):
        ValueError: Unknown table 'plane'. Did you mean 'plain'?
        >>> tables.close()
    """

    def __init__(self, kind: str, base: type, aliases: Mapping[str, str] | None = None) -> None:
        self.kind, self.base = kind, base
        self._classes: dict[str, type[T]] = {}
        self._aliases = dict(aliases or {})
        _registries.append(self)

    def add(self, cls: type[T], name: str) -> None:
        """Register ``cls`` under ``name``.

        Raises:
            TypeError: ``cls`` is not a class of this kind.
            ValueError: Another class has that name.
        """
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"Cannot register {cls!r} as {self.kind} {name!r}: needed is a {self.base.__name__} class.")
        key = _key(name)
        taken = self._classes.get(self._aliases.get(key, key))
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The {self.kind} name {name!r} belongs to {taken.__module__}.{taken.__qualname__}: choose another for "
                f"{cls.__module__}.{cls.__qualname__}."
            )
        self._classes[key] = cls  # the same class again: a notebook's cell that is run twice

    def remove(self, name: str) -> None:
        """Forget ``name``, for tests and notebooks; an unknown name is no error."""
        self._classes.pop(_key(name), None)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Forget at the end of the block what was registered in it, for tests."""
        classes = dict(self._classes)
        try:
            yield
        finally:
            self._classes = classes

    def close(self) -> None:
        """Take no more part in `register`."""
        _registries.remove(self)

    def get(self, name: str) -> type[T]:
        """The class called ``name``.

        Raises:
            ValueError: There is none; the message names the nearest.
        """
        if (cls := self._classes.get(name)) is not None:  # each step asks for the rule of each group
            return cls
        key = _key(name)
        cls = self._classes.get(self._aliases.get(key, key))
        if cls is None:
            raise ValueError(f"Unknown {self.kind} {name!r}. {nearest(key, [*self._classes, *self._aliases])}")
        return cls

    def make(self, name: str, arguments: Mapping[str, Any]) -> T:
        """An instance of the class called ``name``.

        Raises:
            ValueError: The name is unknown, or the class takes no such argument; the message names the nearest.
        """
        cls = self.get(name)
        known = list(inspect.signature(cls).parameters)
        for argument in arguments:
            if argument not in known:
                raise ValueError(f"The {self.kind} {name!r} takes no {argument!r}. {nearest(argument, known)}")
        return cls(**arguments)

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell-style ``pattern``, sorted; aliases are not among them."""
        return sorted(name for name in self._classes if fnmatchcase(name, pattern.lower()))

    def items(self, pattern: str = "*") -> Iterable[tuple[str, type[T]]]:
        """(name, class) pairs, sorted by name, of the names that match ``pattern``."""
        return [(name, self._classes[name]) for name in self.names(pattern)]


@overload
def register(cls: C, *, name: str | None = None) -> C: ...
@overload
def register(cls: None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Give a class of one's own a name, to be used wherever the package's own names are: Python, YAML, groups, plan.

    A class decorator. What the class is (optimizer, schedule, clip rule, detector, diagnostic) follows from its base
    class.

    Args:
        cls: The class.
        name: Its name; by default the class name in lower case with underscores.

    Raises:
        TypeError: The class derives from none of the bases that have names.
        ValueError: Another class of that kind has the name.

    Example:
        >>> import lightning_optim as lo
        >>> @lo.register(name="half")
        ... class Half(lo.schedules.Constant):
        ...     '''Half of the peak, all the time.'''
        ...
        ...     def shape(self, progress):
        ...         return 0.5
        >>> lo.schedules.get_schedule("half").__name__
        'Half'
        >>> lo.schedules.registry.SCHEDULES.remove("half")
    """
    if cls is None:
        return lambda decorated: register(decorated, name=name)
    for registry in _registries:
        if isinstance(cls, type) and issubclass(cls, registry.base):
            registry.add(cls, name or snake_case(cls.__name__))
            return cls
    bases = ", ".join(registry.base.__name__ for registry in _registries)
    raise TypeError(f"Cannot register {cls!r}: it derives from none of {bases}.")


def one_or_several(given: Any) -> tuple[Any, ...]:
    """``given`` as a tuple: a single name or object stands for a list of one, and is not read letter by letter.

    Example:
        >>> one_or_several("spikes"), one_or_several(["spikes", "nan"]), one_or_several(())
        (('spikes',), ('spikes', 'nan'), ())
    """
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def snake_case(name: str) -> str:
    """``name`` of a class in lower case with underscores.

    Example:
        >>> snake_case("OneCycle"), snake_case("AdaGC"), snake_case("WSD")
        ('one_cycle', 'ada_gc', 'wsd')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _key(name: str) -> str:
    return name.lower().replace("-", "_")
