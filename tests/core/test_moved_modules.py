"""Old import paths lead to the new modules, and say so."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from lightning_optim.core.moved_modules import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_the_new_module_is_there(old):
    importlib.import_module(f"lightning_optim.{MOVED[old]}")


def test_an_old_path_works_and_warns():
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from lightning_optim.durations import Horizon
    import lightning_optim.rules as rules
from lightning_optim.core import durations
assert Horizon is durations.Horizon
assert rules.UpdateRule.__module__ == "lightning_optim.kernels.rules"
print([str(w.message) for w in seen if w.category is DeprecationWarning])
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "lightning_optim.durations has moved to lightning_optim.core.durations." in done.stdout


def test_an_unknown_path_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"lightning_optim\.nothing"):
        importlib.import_module("lightning_optim.nothing")
