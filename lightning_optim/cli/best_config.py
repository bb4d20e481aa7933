"""`best.yaml`: what a search has found, as a file that is given behind those of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_optim.cli.fit_config import ConfigError, FitConfig, read_fit
from lightning_optim.cli.keys import KEYS
from lightning_optim.cli.merge import is_spec
from lightning_optim.core.imports import import_object


def write_best(path: Path, of_fit: Sequence[str], flags: Sequence[str], title: str) -> list[str]:
    """Write a configuration file that changes a run as flags do.

    Args:
        path: The file.
        of_fit: The command line of the fit, after ``fit``.
        flags: The flags.
        title: First line of the file, as a comment.

    Returns:
        Flags that are needed in addition to the file; empty where it says everything.
    """
    wanted = read_fit([*of_fit, *flags])
    content = difference(read_fit(of_fit), wanted)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100) if content else "{}\n"
    path.write_text(f"# {title}\n{text}", encoding="utf-8")
    try:
        found = read_fit([*of_fit, "--config", str(path)])
    except ConfigError:
        return list(flags)
    same = _without_files(found.data) == _without_files(wanted.data)
    return [] if same else list(flags)


def _without_files(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "config"}


def difference(base: FitConfig, wanted: FitConfig) -> dict[str, Any]:
    """Return what a later configuration file must have to change a configuration into another one.

    Args:
        base: The configuration.
        wanted: The other one.
    """
    found: dict[str, Any] = {}
    for key, value in wanted.data.items():
        if key == "config" or value == base.data.get(key):
            continue
        if key == "trainer":
            trainer = {k: v for k, v in value.items() if k != "callbacks" and v != base.data[key].get(k)}
            found |= {"trainer": trainer} if trainer else {}
            found |= _of_callbacks(base.data[key].get("callbacks"), value.get("callbacks"))
        else:
            found[key] = _changed(base.data.get(key), value)
    return found


def _changed(base: Any, wanted: Any) -> Any:
    """The class with the arguments that differ; all arguments where the class is another."""
    if not (is_spec(base) and is_spec(wanted)) or base["class_path"] != wanted["class_path"]:
        return wanted
    before, after = base.get("init_args") or {}, wanted.get("init_args") or {}
    changed = {name: value for name, value in after.items() if value != before.get(name)}
    return {"class_path": wanted["class_path"], "init_args": changed}


def _of_callbacks(base: Any, wanted: Any) -> dict[str, Any]:
    """The keys of this package's callbacks, with the arguments that differ."""
    found: dict[str, Any] = {}
    for key, cls in KEYS.items():
        before, after = _entry(base, cls), _entry(wanted, cls)
        if before == after:
            continue
        if after is None:
            found[key] = False
            continue
        old, new = (before or {}).get("init_args") or {}, after.get("init_args") or {}
        found[key] = {name: value for name, value in new.items() if name not in old or value != old[name]}
    return found


def _entry(callbacks: Any, cls: type) -> dict[str, Any] | None:
    for entry in callbacks if isinstance(callbacks, list) else []:
        path = entry["class_path"] if is_spec(entry) else entry
        try:
            found = import_object(path, "callback", object)
        except ValueError:
            continue
        if isinstance(found, type) and issubclass(found, cls):
            return entry if is_spec(entry) else {"class_path": path}
    return None
