"""Keeps compiled kernels on disk.

Numba's own cache asks for a function's source file, and a kernel generated around a rule has none; so the cache is told
where to keep it, and is keyed by everything that goes into it: the kernel's text, the rule's bytecode, the building
blocks, and numba's version (numba itself adds Python's version and the processor).
"""

from __future__ import annotations

import hashlib
import logging
import marshal
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numba
import platformdirs

from lightning_optim.kernels.rules import NAMED_FUNCTIONS

logger = logging.getLogger(__name__)


def directory() -> Path:
    """Where kernels are kept: in `NUMBA_CACHE_DIR` if set, else in the user's cache directory.

    Raises:
        RuntimeError: The user has no home directory.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given) / "lightning_optim"
    path = Path(platformdirs.user_cache_dir("lightning_optim", appauthor=False))
    if not path.is_absolute():  # "~" has been left as it is
        raise RuntimeError("Could not determine home directory.")
    return path


def fingerprint(text: str, functions: tuple[Callable[..., Any], ...]) -> str:
    """A name for the kernel made of ``text`` and ``functions``, equal only if it would compile to the same code."""
    digest = hashlib.sha256(text.encode())
    for function in functions:
        for code in _codes(function):
            digest.update(marshal.dumps(_plain(code)))
    digest.update((Path(__file__).parent / "memory.py").read_bytes())
    digest.update(f"{numba.__version__} {__name__}".encode())  # what is kept names modules of this package
    return digest.hexdigest()[:16]


def _codes(function: Callable[..., Any]) -> Iterator[CodeType]:
    """The code of ``function`` and of all helpers that it calls, however deep, as `rules.rebind` follows them."""
    assert isinstance(function, FunctionType)
    yield function.__code__
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and name not in NAMED_FUNCTIONS:  # those are the backend's own
            yield from _codes(helper)


def _plain(code: CodeType) -> CodeType:
    """Without where it stands in which file: an edit above the function changes nothing."""
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"")


def kept_where() -> str:
    """For messages: where a kernel that is compiled now is looked for the next time."""
    try:
        return f"; this happens once, the result is kept in {directory()}."
    except RuntimeError:  # no home
        return "."


def keep_on_disk(dispatcher: Any, name: str) -> None:
    """Let ``dispatcher`` load from and save to disk under ``name``; without, it compiles in every process.

    Whatever is wrong with the disk costs a warning and a compilation, never a step: a folder that is full, read-only,
    gone or something else, files that are damaged (those are written anew), other processes that write the same.

    Uses numba's internals, for want of a public way: if they have changed, there is no cache, and no harm.
    """
    try:
        dispatcher._cache = _disk_cache(dispatcher.py_func, name)
    except Exception as error:
        _warn(name, "are not kept on disk", error)


def _disk_cache(function: Any, name: str) -> Any:
    from numba.core import caching

    class Locator(caching._CacheLocator):
        def get_cache_path(self) -> str:
            return str(directory())

        def get_source_stamp(self) -> str:
            return name

        def get_disambiguator(self) -> str:
            return name

        @classmethod
        def from_function(cls, py_func: Any, py_file: Any) -> Any:
            return cls()

    class Implementation(caching.CompileResultCacheImpl):
        _locator_classes: Any = (Locator,)

    class Files(caching.IndexDataCacheFile):
        """With a digest before the data: damaged machine code would not fail to load, but to run."""

        def _load_index(self) -> Any:
            try:
                return super()._load_index()  # type: ignore[no-untyped-call]
            except Exception as error:
                _warn(name, "could not be read from disk", error)
                return {}  # `save` then writes it anew

        def _load_data(self, file: str) -> Any:
            content = Path(self._data_path(file)).read_bytes()  # type: ignore[no-untyped-call]
            digest, data = content[:32], content[32:]
            if hashlib.sha256(data).digest() != digest:
                _warn(name, "could not be read from disk", f"{file} is damaged")
                return None
            return pickle.loads(data)

        def _save_data(self, file: str, data: Any) -> None:
            data = self._dump(data)  # type: ignore[no-untyped-call]
            with self._open_for_write(self._data_path(file)) as opened:  # type: ignore[no-untyped-call]
                opened.write(hashlib.sha256(data).digest() + data)

    class Cache(caching.FunctionCache):
        _impl_class = Implementation

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
            except Exception as error:
                _warn(name, "could not be read from disk", error)
                return None

        def save_overload(self, sig: Any, data: Any) -> None:
            try:
                super().save_overload(sig, data)  # type: ignore[no-untyped-call]
            except Exception as error:
                _warn(name, "could not be written to disk", error)

    cache = Cache(function)  # type: ignore[no-untyped-call]
    files = cache._cache_file
    cache._cache_file = Files(files._cache_path, cache._impl.filename_base, name)  # type: ignore[no-untyped-call]
    return cache


_warned: set[str] = set()


def _warn(name: str, what: str, error: object) -> None:
    """Say ``what`` happened to kernel ``name``, once per process: what follows is of the same cause."""
    say = logger.debug if what in _warned else logger.warning
    _warned.add(what)
    try:
        place = str(directory())
    except RuntimeError:
        place = "a folder of the user, who has no home"
    say(
        "Compiled CPU kernels %s (%s in %s: %s). Training goes on, and kernels are compiled anew, which takes seconds "
        "each. NUMBA_CACHE_DIR names another folder.",
        what,
        name,
        place,
        error,
    )


class SaysIfSlow(AbstractContextManager["SaysIfSlow"]):
    """Logs ``message()`` if the block takes longer than ``seconds``, while it does."""

    def __init__(self, message: Callable[[], str], seconds: float = 2.0) -> None:
        self._timer = threading.Timer(seconds, lambda: logger.warning("%s", message()))
        self._timer.daemon = True

    def __enter__(self) -> SaysIfSlow:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
