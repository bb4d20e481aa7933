"""Who may import whom, read off the sources, and what an import loads, seen in a fresh process."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_optim

ROOT = Path(lightning_optim.__file__).parent

# From the top to the bottom; a module imports from its own layer or those below.
LAYERS = [
    ("cli",),
    ("callbacks",),
    ("factory", "plan", "plan_report", "run_report"),
    ("optimizer_choice",),
    ("step", "resume", "diagnostics", "tensorboard", "training_length", "freezing", "late_groups", "foreign_decay"),
    ("foreign_update", "histograms", "snapshots"),
    ("operands", "gradients", "measure", "flat_shards", "interval"),
    ("optim",),
    ("backends", "trial_step"),
    ("clipping", "divergence", "schedules", "param_groups"),
    ("weight_decay", "peak_lr", "rules", "stats", "durations", "transfer", "closure", "room", "uncompiled"),
    ("imports",),
    ("messages", "_version"),
]
# These import nothing of the package but what is named here.
LEAVES = {
    "clipping": {"clipping", "messages", "stats", "transfer"},
    "divergence": {"divergence", "messages", "room", "stats", "transfer", "uncompiled"},
    "schedules": {"schedules", "durations", "imports", "messages"},
    "param_groups": {"param_groups", "durations", "messages", "schedules"},
    "weight_decay": {"messages", "rules"},
    "peak_lr": {"messages", "rules", "weight_decay"},
    "stats": set(),
    "rules": set(),
    "durations": set(),
    "transfer": set(),
    "imports": {"messages"},
    "room": {"messages"},
    "messages": set(),
    "uncompiled": set(),
}


def _modules() -> dict[str, Path]:
    """Every module by its name below the package."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


def _imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Full names of what a file imports; without ``lazy`` only what it imports when it is loaded."""
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def _ours(path: Path) -> set[str]:
    """Which top-level modules of the package a file imports."""
    modules = _modules()
    names = {name.split(".", 1)[1] for name in _imports(path) if name.startswith("lightning_optim.")}
    return {name.split(".")[0] for name in names if name.split(".")[0] in modules}


def _layer(name: str) -> int:
    for depth, names in enumerate(LAYERS):
        if name.split(".")[0] in names:
            return depth
    raise AssertionError(f"{name} is in no layer: put it into one, here and in docs/architecture.md")


@pytest.mark.parametrize("name", sorted(_modules()))
def test_imports_point_down(name):
    upward = {other for other in _ours(_modules()[name]) if _layer(other) < _layer(name)}
    assert not upward


@pytest.mark.parametrize("name", sorted(_modules()))
def test_only_callbacks_and_cli_know_lightning(name):
    known = {other for other in _imports(_modules()[name]) if other.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert not known or name.split(".")[0] in ("callbacks", "cli")


@pytest.mark.parametrize("name", [name for name in sorted(_modules()) if name.split(".")[0] in LEAVES])
def test_leaves_import_nothing_above_them(name):
    assert _ours(_modules()[name]) <= LEAVES[name.split(".")[0]]


@pytest.mark.parametrize("name", sorted(_modules()))
def test_numba_and_triton_are_loaded_by_their_backends_alone(name):
    known = {other.split(".")[0] for other in _imports(_modules()[name], lazy=False)} & {"numba", "triton"}
    assert not known or name.startswith("backends.")


HEAVY = ("lightning", "pytorch_lightning", "triton", "numba", "tensorboard", "jsonargparse", "rich", "torchmetrics")


STATEMENTS = (
    "import lightning_optim",
    "dir(lightning_optim)",
    "import lightning_optim.optim",
    "lightning_optim.optim.AdamW",
    "from lightning_optim import StepPipeline, build_param_groups, schedules, OptimizerFactory",
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
    seen = {alias.asname for node in block.body for alias in node.names}
    assert seen == set(lightning_optim.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_optim.nothing  # noqa: B018


def _public_modules():
    return [
        info.name
        for info in pkgutil.walk_packages(lightning_optim.__path__, "lightning_optim.")
        if "backends" not in info.name
    ]


@pytest.mark.parametrize("name", _public_modules())
def test_every_public_class_function_and_method_is_documented(name):
    module = importlib.import_module(name)
    for key, thing in vars(module).items():
        if key.startswith("_") or getattr(thing, "__module__", None) != name:
            continue
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name}.{key}"
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert inspect.getdoc(getattr(thing, method)), f"{name}.{key}.{method}"


@pytest.mark.parametrize("name", _public_modules())
def test_all_names_exist(name):
    module = importlib.import_module(name)
    assert all(hasattr(module, key) for key in getattr(module, "__all__", ()))


def test_the_version_has_one_source():
    from importlib.metadata import version

    assert lightning_optim.__version__ == version("lightning-optim")
    assert (ROOT / "py.typed").exists()
