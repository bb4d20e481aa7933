"""Compiled kernels on disk: whatever is wrong there costs one warning and a compilation, never a step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")

from lightning_optim.kernels.cpu import disk_cache  # noqa: E402
from tests.helpers import file_size_limit  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_cache, "_warned", set())
    return tmp_path / "cache"


def kernel(name: str = "doubling") -> tuple[Any, bool]:
    """A function compiled as kernels are, and whether it came from disk."""
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile("def kernel(x):\n    return x + x\n", "<test>", "exec"), names)
    dispatcher = numba.njit(names["kernel"])
    disk_cache.keep_on_disk(dispatcher, name)
    dispatcher.compile("int64(int64)")
    assert dispatcher(21) == 42
    return dispatcher, bool(dispatcher.stats.cache_hits)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_it_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    assert [kernel()[1], kernel()[1]] == [False, True]
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("ending", ["nbc", "nbi"])
@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "other"])
def test_a_damaged_file_is_written_anew(
    folder: Path, ending: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernel()
    (file,) = folder.rglob(f"*.{ending}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes({"short": content[:40], "empty": b"", "flipped": content, "other": b"not a cache"}[damage])
    assert not kernel()[1]
    if (ending, damage) != ("nbi", "flipped"):  # which may read as another key, and then there simply is no entry
        (message,) = warnings_in(caplog)
        assert str(folder) in message
    assert kernel()[1]


def test_no_room(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file_size_limit(64):
        assert not kernel("one")[1]
        assert not kernel("two")[1]
    (message,) = warnings_in(caplog)
    assert "NUMBA_CACHE_DIR" in message
    assert not list(folder.rglob("*.tmp.*"))
    kernel("one")
    assert kernel("one")[1]


def test_a_file_in_the_place_of_the_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("")
    assert not kernel()[1]
    assert 1 <= len(warnings_in(caplog)) <= 2  # neither read nor written


def test_a_folder_that_vanishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel()
    shutil.rmtree(folder)
    assert not kernel()[1]
    assert kernel()[1]


def test_what_is_there_is_read_where_nothing_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from numba.core import caching

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(30, "Read-only file system")

    kernel("before")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", refuse)
    assert kernel("before")[1]
    assert warnings_in(caplog) == []
    assert not kernel("new")[1]
    (message,) = warnings_in(caplog)
    assert "Read-only" in message


def test_two_that_write_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's file arrives between our look and our own write; and an index that is ahead of its data."""
    from numba.core import caching

    real = caching.IndexDataCacheFile.save
    inside: list[bool] = []

    def save(self: Any, key: Any, data: Any) -> None:
        if not inside:
            inside.append(True)
            kernel()
        real(self, key, data)

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", save)
    assert not kernel()[1]
    assert kernel()[1]
    (data,) = folder.rglob("*.nbc")
    data.unlink()
    assert not kernel()[1]
    assert kernel()[1]


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user without a home
    assert not kernel()[1]
    assert disk_cache.cache_note() == "."
    assert len(warnings_in(caplog)) == 1


def test_a_kernel_is_another_one_if_a_helper_of_a_helper_is() -> None:
    def made(body: str) -> Any:
        names: dict[str, Any] = {}
        inner, outer = f"def inner(x):\n    return {body}\n", "def outer(x):\n    return inner(x)\n"
        exec(inner + outer + "def update(x):\n    return outer(x)\n", names)
        return names["update"]

    first, same, other = (disk_cache.fingerprint("text", (made(body),)) for body in ("x + x", "x + x", "x * x"))
    assert first == same
    assert first != other
