"""Disk cache of compiled kernels.

Numba's own cache locates entries by the source file of a function, which a generated kernel does not have. This module
sets the location, and keys each entry by everything that it depends on: the text of the kernel, the bytecode of the
rule, the building blocks, and numba's version (numba itself adds Python's version and the processor).
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
    """Return the directory of the cache: in `NUMBA_CACHE_DIR` if set, otherwise in the user's cache directory.

    Raises:
        RuntimeError: The user has no home directory.
    """
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given) / "lightning_optim"
    path = Path(platformdirs.user_cache_dir("lightning_optim", appauthor=False))
    if not path.is_absolute():  # Without a home directory "~" is not expanded.
        raise RuntimeError("Could not determine home directory.")
    return path


def fingerprint(text: str, functions: tuple[Callable[..., Any], ...]) -> str:
    """Return a hash of a kernel's ``text`` and ``functions``, equal only for kernels that compile to the same code."""
    digest = hashlib.sha256(text.encode())
    for function in functions:
        for code in _codes(function):
            digest.update(marshal.dumps(_plain(code)))
    for building_blocks in ("memory.py", "launch.py"):
        digest.update((Path(__file__).parent / building_blocks).read_bytes())
    digest.update(f"{numba.__version__} {__name__}".encode())  # A cache entry refers to modules by name.
    return digest.hexdigest()[:16]


def _codes(function: Callable[..., Any]) -> Iterator[CodeType]:
    """Yield the code of ``function`` and of all helpers that it calls, directly or not, as `rules.rebind` does."""
    assert isinstance(function, FunctionType)
    yield function.__code__
    for name in function.__code__.co_names:
        helper = function.__globals__.get(name)
        if isinstance(helper, FunctionType) and name not in NAMED_FUNCTIONS:  # The backend replaces these.
            yield from _codes(helper)


def _plain(code: CodeType) -> CodeType:
    """Return ``code`` without file name and line numbers, so that an edit above the function does not change it."""
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"")


def cache_note() -> str:
    """Return the end of a message: the directory in which a kernel that is compiled now will be cached."""
    try:
        return f"; this happens once, the result is cached in {directory()}."
    except RuntimeError:  # The user has no home directory.
        return "."


def keep_on_disk(dispatcher: Any, name: str) -> None:
    """Make ``dispatcher`` load from and save to disk under ``name``, so that it is not compiled in every process.

    A problem with the disk causes a warning and a compilation, but never makes a step fail: a directory that is full,
    read-only, missing or not a directory, damaged files (which are rewritten), or other processes that write the same.

    This uses internals of numba, which has no public interface for it. If they change, kernels are not cached, and
    nothing else changes.
    """
    try:
        dispatcher._cache = _disk_cache(dispatcher.py_func, name)
    except Exception as error:
        _warn(name, "are not cached on disk", error)


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
        """Cache file with a digest before the data, because damaged machine code would load and then crash."""

        def _load_index(self) -> Any:
            try:
                return super()._load_index()  # type: ignore[no-untyped-call]
            except Exception as error:
                _warn(name, "could not be read from disk", error)
                return {}  # `save` then rewrites the index.

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
    """Warn of a problem with the cache, once per process and kind; repetitions most likely have the same cause."""
    log = logger.debug if what in _warned else logger.warning
    _warned.add(what)
    try:
        place = str(directory())
    except RuntimeError:
        place = "the user's cache directory, which does not exist without a home directory"
    log(
        "Compiled CPU kernels %s (%s in %s: %s). Training continues, and kernels are compiled again, which takes "
        "seconds for each. Set NUMBA_CACHE_DIR to use another directory.",
        what,
        name,
        place,
        error,
    )


class LogIfSlow(AbstractContextManager["LogIfSlow"]):
    """Context manager that logs ``message()`` as soon as the block has run for ``seconds``."""

    def __init__(self, message: Callable[[], str], seconds: float = 2.0) -> None:
        self._timer = threading.Timer(seconds, lambda: logger.warning("%s", message()))
        self._timer.daemon = True

    def __enter__(self) -> LogIfSlow:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
