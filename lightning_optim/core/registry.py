"""Registries of classes by name, one for each kind of component; users can register classes of their own."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar, overload

from lightning_optim.core.suggest import nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)

_registries: list[Registry[Any]] = []


@dataclass
class Offer:
    """One entry point of an installed package.

    Args:
        name: Name of the entry.
        target: `module:attribute` of the class.
        package: Name of the distribution.
        entry_point: Its object from `importlib.metadata`.
    """

    name: str
    target: str
    package: str
    entry_point: Any = field(repr=False)

    @property
    def owner(self) -> str:
        """The class and its package, for messages."""
        return f"{self.target.replace(':', '.')} of the installed package {self.package!r}"

    def is_of(self, cls: type) -> bool:
        """Return whether this is the entry point of ``cls`` itself, which its module may also register."""
        return self.target == f"{cls.__module__}:{cls.__qualname__}"

    def load(self, kind: str, base: type) -> type | None:
        """Import the class; None with a warning if the package is broken.

        Args:
            kind: Name of the kind, for the message.
            base: Base class that it must have.
        """
        try:
            cls = self.entry_point.load()
        except Exception as error:  # An import of somebody else's package may fail in any way.
            problem = f"{type(error).__name__}: {error}"
        else:
            if isinstance(cls, type) and issubclass(cls, base):
                return cls
            problem = f"{self.target} is {cls!r}, but must be a {base.__name__} class"
        warnings.warn(
            f"The installed package {self.package!r} offers the {kind} {self.name!r}, which cannot be used "
            f"({problem}). Everything else works; update or remove the package to end this warning.",
            stacklevel=2,
        )
        return None


def offers(group: str) -> list[Offer]:
    """Return the entry points of a group, of the distributions on `sys.path` as it is now.

    Args:
        group: Name of the group, such as `lightning_optim.optimizers`.
    """
    from importlib import metadata

    found = {}
    for each in metadata.entry_points(group=group):
        package = each.dist.name if each.dist is not None else "?"
        found[(each.name, each.value, package)] = Offer(each.name, each.value, package, each)
    return list(found.values())


class Registry(Generic[T]):
    """Registry of the classes of one kind by name.

    They are those of this package, those that users `register`, and those that installed packages bring as entry
    points. Names are lower case with underscores; look-ups also accept hyphens and capitals. Entry points are searched
    at the first look-up, and again when a name is unknown, and each is imported when its name is first used. One that
    cannot be imported, or whose name is taken, causes a warning with the name of its package, and nothing else.

    Args:
        kind: Name of the kind in messages, for instance "schedule".
        base: Base class of all entries.
        aliases: Name of each alias, for instance for the names of other libraries.
        known: What is nearest, as a sentence, by names that mean something which no class here is.
        group: Entry-point group in which installed packages offer classes; None for no entry points.
        reserved: Owners of names that belong to something else than a class of this registry.

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
        group: str | None = None,
        reserved: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.base, self.group = kind, base, group
        self._reserved = dict(reserved or {})
        self._offers: dict[str, Offer] = {}  # entry points that have not been imported, by key
        self._searched, self._told = group is None, set[tuple[str, str]]()
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
        offer = self._offers.get(key)
        owner = self._reserved.get(key)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            owner = _path(taken)
        elif taken is None and offer is not None and not offer.is_of(cls):
            owner = offer.owner
        if owner is not None:
            raise ValueError(f"The {self.kind} name {name!r} belongs to {owner}: choose another for {_path(cls)}.")
        self._classes[key] = cls  # A notebook cell that runs twice defines an equal class again.
        self._offers.pop(key, None)

    def remove(self, name: str) -> None:
        """Remove ``name``, for tests and notebooks; an unknown name is ignored."""
        self._classes.pop(_key(name), None)

    @overload
    def register(self, cls: C, *, name: str | None = None) -> C: ...
    @overload
    def register(self, cls: str | None = None, *, name: str | None = None) -> Callable[[C], C]: ...
    def register(self, cls: Any = None, *, name: str | None = None) -> Any:
        """Register a class of your own under a name, which Python, YAML, `list`, `plan` and groups then accept.

        It can be used as a class decorator: `@register`, `@register("name")` or `@register(name="name")`.

        Args:
            cls: The class, or its name if this is a decorator.
            name: Its name; by default the class name in lower case with underscores.

        Returns:
            The class itself; a decorator if ``cls`` is a name or None.

        Raises:
            TypeError: The class does not derive from the base class of this registry.
            ValueError: Another class, or that of an installed package, has the name.
        """
        if cls is None or isinstance(cls, str):
            return lambda decorated: self.register(decorated, name=name if cls is None else cls)
        self._search()
        self.add(cls, name or snake_case(getattr(cls, "__name__", str(cls))))
        return cls

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Remove at the end of the block all names registered or found in it, for tests."""
        classes, found, told = dict(self._classes), dict(self._offers), set(self._told)
        self._searched = self.group is None
        try:
            yield
        finally:
            self._classes, self._offers, self._told = classes, found, told
            self._searched = self.group is None

    def close(self) -> None:
        """Exclude this registry from `register`."""
        _registries.remove(self)

    def __contains__(self, name: str) -> bool:
        key = _key(name)
        if key not in self._classes:
            self._load(key)
        return key in self._classes

    def get(self, name: str) -> type[T]:
        """Return the class called ``name``.

        Raises:
            ValueError: No class has that name; the message suggests the nearest one.
        """
        # Each step asks for the rule of each group.
        if (cls := self._classes.get(name)) is not None and self._searched:
            return cls
        key = _key(name)
        self._search()
        cls = self._classes.get(self._aliases.get(key, key))
        if cls is None:
            cls = self._load(key)
        if cls is None:
            advice = self._known.get(key) or nearest(key, self.names(), also=self._aliases)
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
        self._search()
        return sorted(name for name in {*self._classes, *self._offers} if fnmatchcase(name, pattern.lower()))

    def items(self, pattern: str = "*") -> Iterable[tuple[str, type[T]]]:
        """Return the pairs (name, class) whose names match a shell-style ``pattern``, sorted by name.

        Entry points that match are imported; those that cannot be are left out.
        """
        found = ((name, self._classes.get(name) or self._load(name)) for name in self.names(pattern))
        return [(name, cls) for name, cls in found if cls is not None]

    def _search(self, *, again: bool = False) -> None:
        """Take up the entry points of installed packages, once or ``again``, without importing them."""
        if self.group is None or (self._searched and not again):
            return
        self._searched = True
        found: dict[str, Offer] = {}
        for offer in offers(self.group):
            key = _key(offer.name)
            taken = self._classes.get(self._aliases.get(key, key))
            if key in self._reserved:
                self._refuse(offer, self._reserved[key])
            elif taken is not None and not offer.is_of(taken):
                self._refuse(offer, _path(taken))
            elif taken is None and key in found:
                self._refuse(offer, found[key].owner)
            elif taken is None and (key, offer.package) not in self._told:
                found[key] = offer
        self._offers = found

    def _refuse(self, offer: Offer, owner: str) -> None:
        if (_key(offer.name), offer.package) in self._told:
            return
        self._told.add((_key(offer.name), offer.package))
        warnings.warn(
            f"The {self.kind} name {offer.name!r} belongs to {owner}, so {offer.owner} is not used under this name. "
            f"Rename its entry point in the group {self.group!r}, or remove one of the packages.",
            stacklevel=4,
        )

    def _load(self, key: str) -> type[T] | None:
        """Import the class that an installed package offers; None if there is none that can be imported."""
        if self._offers.get(key) is None:
            self._search(again=True)  # A package may have been installed since.
        offer = self._offers.pop(key, None)
        if offer is None:
            return None
        cls = offer.load(self.kind, self.base)
        if cls is None:
            self._told.add((key, offer.package))
            return None
        self._classes[key] = cls  # Its module may have registered it as well, which is the same.
        return cls


@overload
def register(cls: C, *, name: str | None = None) -> C: ...
@overload
def register(cls: str | None = None, *, name: str | None = None) -> Callable[[C], C]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Register a class of your own under a name, which Python, YAML, parameter groups and `plan` then accept.

    It can be used as a class decorator. The kind of the class (optimizer, schedule, clip rule, detector, diagnostic,
    kind of weight decay) follows from its base class. Each room has the same for its kind alone:
    `lightning_optim.optim.register`, and those of `schedules`, `clipping`, `divergence` and `diagnostics`.

    Args:
        cls: The class, or its name if this is a decorator.
        name: Its name; by default the class name in lower case with underscores.

    Returns:
        The class itself; a decorator if ``cls`` is a name or None.

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
    if cls is None or isinstance(cls, str):
        return lambda decorated: register(decorated, name=name if cls is None else cls)
    for registry in _registries:
        if isinstance(cls, type) and issubclass(cls, registry.base):
            return registry.register(cls, name=name)
    bases = ", ".join(registry.base.__name__ for registry in _registries)
    raise TypeError(f"Cannot register {cls!r}: it derives from none of {bases}.")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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
