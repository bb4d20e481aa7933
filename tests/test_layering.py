"""Who may import whom, read off the sources, and what an import loads, seen in a fresh process."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_optim

ROOT = Path(lightning_optim.__file__).parent

ROOMS = {
    "cli": {
        "callbacks",
        "clipping",
        "core",
        "diagnostics",
        "divergence",
        "factory",
        "optim",
        "schedules",
        "testing",
        "tuning",
    },
    "tuning": {"callbacks", "core", "diagnostics", "factory", "optim", "param_groups", "schedules", "step"},
    "callbacks": {
        "clipping",
        "core",
        "diagnostics",
        "divergence",
        "factory",
        "kernels",
        "optim",
        "param_groups",
        "schedules",
        "step",
    },
    "testing": {"clipping", "core", "divergence", "step"},
    "step": {"clipping", "core", "divergence", "kernels", "optim"},
    "factory": {"core", "optim", "param_groups", "schedules"},
    "optim": {"core", "kernels", "param_groups"},
    "param_groups": {"core", "schedules"},
    "diagnostics": {"core", "kernels"},
    "clipping": {"core"},
    "divergence": {"core"},
    "schedules": {"core"},
    "kernels": {"core"},
    "core": set(),
}
"""What each folder, or file of the root, imports of the others, from the top down; docs/architecture.md has it, too.
`__init__` and `_version` aside: the one imports names on their first use, the other nothing."""

OUTSIDE = {
    "lightning": ("callbacks.", "cli", "tuning."),
    "pytorch_lightning": (),
    "numba": ("kernels.cpu.",),
    "triton": ("kernels.triton.",),
}
"""Which modules may load what, when they are imported; Lightning not even later."""


@functools.cache
def _modules() -> dict[str, Path]:
    """Every module by its name below the package, `__init__` of a folder included."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name: path for name, path in paths.items() if name not in ("__init__", "_version")}


def _imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Full names of what a file imports; without ``lazy`` only what it imports when it is loaded, or for its types."""
    found = set()

    def visit(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@functools.cache
def _ours(path: Path, *, lazy: bool = True) -> set[str]:
    """Modules of the package that a file imports, by their names below it."""
    known = _modules()
    names = {name.removeprefix("lightning_optim.") for name in _imports(path, lazy=lazy) if "lightning_optim." in name}
    return {name for name in names if name in known} | {f"{n}.__init__" for n in names if f"{n}.__init__" in known}


def test_every_module_is_in_a_room():
    assert {name.split(".")[0] for name in _modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_map_says(room):
    files = {name: path for name, path in _modules().items() if name.split(".")[0] == room}
    seen = {other.split(".")[0] for path in files.values() for other in _ours(path)}
    assert seen - {room} == ROOMS[room]


def test_arrows_point_down():
    below = list(ROOMS)
    upward = [
        (room, other) for room, others in ROOMS.items() for other in others if below.index(other) < below.index(room)
    ]
    assert not upward


def test_the_house_has_eight_floors():
    floors: dict[str, int] = {}
    for room in reversed(ROOMS):
        floors[room] = 1 + max((floors[below] for below in ROOMS[room]), default=0)
    assert max(floors.values()) == 8


def test_no_circle_not_even_inside_a_room_or_of_types_alone():
    graph = {name: _ours(path, lazy=False) - {name} for name, path in _modules().items()}
    # A folder's own `__init__` has been entered before any of its files; names are imported from the files themselves.
    inside = {
        name: {n for n in others if not name.startswith(n.removesuffix("__init__"))} for name, others in graph.items()
    }
    TopologicalSorter(inside).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("package", OUTSIDE)
def test_only_some_modules_know(package):
    lazy = "lightning" in package
    knowing = {n for n, p in _modules().items() for o in _imports(p, lazy=lazy) if o.split(".")[0] == package}
    assert bool(knowing) is bool(OUTSIDE[package])
    assert all(name.startswith(OUTSIDE[package]) for name in knowing)


def test_core_holds_only_what_two_rooms_need():
    files = {name for name in _modules() if name.startswith("core.") and name != "core.__init__"}
    users = {file: {n.split(".")[0] for n, path in _modules().items() if file in _ours(path)} for file in files}
    assert {file for file, rooms in users.items() if len(rooms) < 2} == {"core.moved_modules"}  # the package's


def test_the_table_in_the_docs_is_the_map():
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    assert [room for room, _ in rows] == list(ROOMS)
    assert {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows} == {
        room: others - {"core"} for room, others in ROOMS.items()
    }


HEAVY = ("lightning", "pytorch_lightning", "triton", "numba", "tensorboard", "jsonargparse", "rich", "torchmetrics")


STATEMENTS = (
    "import lightning_optim",
    "dir(lightning_optim)",
    "import lightning_optim.optim",
    "lightning_optim.optim.AdamW",
    "from lightning_optim import StepPipeline, build_param_groups, schedules, OptimizerFactory",
    "import lightning_optim.testing",
    "import lightning_optim.step, lightning_optim.diagnostics, lightning_optim.factory.run_length",
)


def test_what_needs_only_torch_loads_only_torch_and_the_package_alone_not_even_that():
    code = f"""
import sys
for statement in {STATEMENTS!r}:
    exec(statement)
    print(statement, [name for name in ("torch", *{HEAVY!r}) if name in sys.modules], sep="|")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert lines == [[s, "[]"] for s in STATEMENTS[:2]] + [[s, "['torch']"] for s in STATEMENTS[2:]]


# The public names.


@pytest.mark.parametrize("name", [name for name in lightning_optim.__all__ if name != "__version__"])
def test_every_public_name_resolves_and_is_documented(name):
    thing = getattr(lightning_optim, name)
    assert inspect.getdoc(thing)
    assert name in dir(lightning_optim)


def test_type_checkers_see_the_names_that_users_see():
    source = (ROOT / "__init__.py").read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname for node in imports for alias in node.names}
    assert seen == set(lightning_optim.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_optim.nothing  # noqa: B018


def _loaded(room):
    """The modules of a room that this machine can import; the backends' compilers may be missing."""
    for name in _modules():
        if name.split(".")[0] == room and not name.startswith(("kernels.cpu", "kernels.triton")):
            yield importlib.import_module("lightning_optim." + name.removesuffix(".__init__"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_class_function_and_method_is_documented(room):
    for module in _loaded(room):
        for key, thing in vars(module).items():
            if key.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{module.__name__}.{key}"
            if inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        assert inspect.getdoc(getattr(thing, method)), f"{module.__name__}.{key}.{method}"


def test_all_names_exist():
    modules = [module for room in ROOMS for module in _loaded(room) if hasattr(module, "__all__")]
    assert modules
    assert [(module.__name__, key) for module in modules for key in module.__all__ if not hasattr(module, key)] == []


def test_the_version_has_one_source():
    from importlib.metadata import version

    assert lightning_optim.__version__ == version("lightning-optim")
    assert (ROOT / "py.typed").exists()
