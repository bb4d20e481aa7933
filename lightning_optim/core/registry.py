"""Registries of classes by name, one for each kind of component; users can register classes of their own."""

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
    """Registry of the classes of one kind by name: those of this package, and those that users `register`.

    Names are lower case with underscores; look-ups also accept hyphens and capitals.

    Args:
        kind: Name of the kind in messages, for instance "schedule".
        base: Base class of all entries.
        aliases: Name of each alias, for instance for the names of other libraries.
        known: What is nearest, as a sentence, by names that mean something which no class here is.

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

    def __init__(
        self,
        kind: str,
        base: type,
        aliases: Mapping[str, str] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.base = kind, base
        self._classes: dict[str, type[T]] = {}
        self._aliases, self._known = dict(aliases or {}), dict(known or {})
        _registries.append(self)

    def add(self, cls: type[T], name: str) -> None:
        """Register ``cls`` under ``name``.

        Raises:
            TypeError: ``cls`` is not a subclass of the base class.
            ValueError: Another class has the name.
        """
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"Cannot register {cls!r} as {self.kind} {name!r}: must be a {self.base.__name__} class.")
        key = _key(name)
        taken = self._classes.get(self._aliases.get(key, key))
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The {self.kind} name {name!r} belongs to {taken.__module__}.{taken.__qualname__}: choose another for "
                f"{cls.__module__}.{cls.__qualname__}."
            )
        self._classes[key] = cls  # A notebook cell that runs twice defines an equal class again.

    def remove(self, name: str) -> None:
        """Remove ``name``, for tests and notebooks; an unknown name is ignored."""
        self._classes.pop(_key(name), None)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Remove at the end of the block all names registered in it, for tests."""
        classes = dict(self._classes)
        try:
            yield
        finally:
            self._classes = classes

    def close(self) -> None:
        """Exclude this registry from `register`."""
        _registries.remove(self)

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._classes

    def get(self, name: str) -> type[T]:
        """Return the class called ``name``.

        Raises:
            ValueError: No class has that name; the message suggests the nearest one.
        """
        if (cls := self._classes.get(name)) is not None:  # each step asks for the rule of each group
            return cls
        key = _key(name)
        cls = self._classes.get(self._aliases.get(key, key))
        if cls is None:
            advice = self._known.get(key) or nearest(key, self._classes, also=self._aliases)
            raise ValueError(f"Unknown {self.kind} {name!r}. {advice}")
        return cls

    def make(self, name: str, arguments: Mapping[str, Any]) -> T:
        """Create an instance of the class called ``name`` with ``arguments``.

        Raises:
            ValueError: The name or an argument is unknown; the message suggests the nearest one.
        """
        cls = self.get(name)
        known = list(inspect.signature(cls).parameters)
        for argument in arguments:
            if argument not in known:
                raise ValueError(f"The {self.kind} {name!r} takes no {argument!r}. {nearest(argument, known)}")
        return cls(**arguments)

    def names(self, pattern: str = "*") -> list[str]:
        """Return the registered names that match a shell-style ``pattern``, sorted and without aliases."""
        return sorted(name for name in self._classes if fnmatchcase(name, pattern.lower()))

    def items(self, pattern: str = "*") -> Iterable[tuple[str, type[T]]]:
        """Return the pairs (name, class) whose names match a shell-style ``pattern``, sorted by name."""
        return [(name, self._classes[name]) for name in self.names(pattern)]


@overload
def register(cls: C, *, name: str | None = None) -> C: ...
@overload
def register(cls: None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Register a class of your own under a name, which Python, YAML, parameter groups and `plan` then accept.

    It can be used as a class decorator. The kind of the class (optimizer, schedule, clip rule, detector, diagnostic)
    follows from its base class.

    Args:
        cls: The class.
        name: Its name; by default the class name in lower case with underscores.

    Returns:
        The class itself; a decorator if ``cls`` is None.

    Raises:
        TypeError: The class does not derive from the base class of any registry.
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
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else (given,)


def snake_case(name: str) -> str:
    """Convert the name of a class to lower case with underscores.

    Example:
        >>> snake_case("OneCycle"), snake_case("AdaGC"), snake_case("WSD")
        ('one_cycle', 'ada_gc', 'wsd')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _key(name: str) -> str:
    return name.lower().replace("-", "_")
