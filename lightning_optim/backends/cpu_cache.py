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
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numba

logger = logging.getLogger(__name__)


def directory() -> Path:
    """Where kernels are kept: in `NUMBA_CACHE_DIR` if set, else in the user's cache directory."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given) / "lightning_optim"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lightning_optim"


def fingerprint(text: str, functions: tuple[Callable[..., Any], ...]) -> str:
    """A name for the kernel made of ``text`` and ``functions``, equal only if it would compile to the same code."""
    digest = hashlib.sha256(text.encode())
    for function in functions:
        assert isinstance(function, FunctionType)
        digest.update(marshal.dumps(_plain(function.__code__)))
        for name in function.__code__.co_names:  # helpers, as `rules.rebind` follows them
            helper = function.__globals__.get(name)
            if isinstance(helper, FunctionType):
                digest.update(marshal.dumps(_plain(helper.__code__)))
    digest.update((Path(__file__).parent / "cpu_memory.py").read_bytes())
    digest.update(numba.__version__.encode())
    return digest.hexdigest()[:16]


def _plain(code: CodeType) -> CodeType:
    """Without where it stands in which file: an edit above the function changes nothing."""
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"")


def keep_on_disk(dispatcher: Any, name: str) -> None:
    """Let ``dispatcher`` load from and save to disk under ``name``; without, it compiles in every process.

    Uses numba's internals, for want of a public way: if they have changed, there is no cache, and no harm.
    """
    try:
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

        class Cache(caching.FunctionCache):
            _impl_class = Implementation

            def load_overload(self, sig: Any, target_context: Any) -> Any:
                try:
                    return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
                except Exception as error:  # a damaged file must not end a training run
                    logger.debug("Kernel %s could not be loaded from disk: %s", name, error)
                    return None

        Locator().ensure_cache_path()  # type: ignore[no-untyped-call]
        dispatcher._cache = Cache(dispatcher.py_func)  # type: ignore[no-untyped-call]
    except (ImportError, AttributeError, TypeError, OSError, RuntimeError) as error:
        logger.debug("Compiled kernels are not kept on disk: %s", error)


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
