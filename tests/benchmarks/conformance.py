"""The conformance checks on the optimizers of this package, of torch and of other libraries, as Markdown tables.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.conformance          # print the tables
    OMP_NUM_THREADS=1 python -m tests.benchmarks.conformance --write  # and put them into docs/conformance.md
    OMP_NUM_THREADS=1 python -m tests.benchmarks.conformance -v Lion  # what was seen, of the classes of that name

Foreign optimizers are not put to the checks of compilation, and none to those of two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

import lightning_optim
from lightning_optim.testing import Report, check_optimizer, checks
from tests.optim.published import timm

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

OPTIMI = ("Adam", "AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW")
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"lr": 0.1, "momentum": 0.9},
    "pytorch_optimizer.SGDP": {"lr": 0.1},
    "pytorch_optimizer.QHM": {"lr": 0.1},
    **{f"optimi.{name}": {"lr": 1e-3, "triton": False} for name in OPTIMI},
    "optimi.SGD": {"lr": 0.1, "triton": False},
}
"""Arguments other than the defaults."""

TORCH = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD"
PYTORCH_OPTIMIZER = (
    "ADOPT AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaMax AdaMod AdaNorm AdaPNM AdaShift AdaSmooth "
    "Adai AdamG AdamMini AdamP AdamS AdamW Adan AggMo Aida Amos AvaGrad CAME DAdaptAdam DAdaptLion DiffGrad FAdam "
    "FOCUS FTRL Fromage Grams Gravity Kate Kron LARS LaProp Lamb Lion MADGRAD MARS MSVAG NAdam Nero NovoGrad "
    "PAdam PID PNM Prodigy QHAdam QHM RAdam Ranger SGDP SGDW SM3 SOAP SPAM SRMM SWATS ScheduleFreeAdamW Shampoo "
    "SignSGD StableAdamW Tiger Yogi"
)
OTHERS = (
    "lion_pytorch.Lion",
    "prodigyopt.Prodigy",
    "schedulefree.AdamWScheduleFree",
    "schedulefree.SGDScheduleFree",
    "schedulefree.RAdamScheduleFree",
    "transformers.Adafactor",
    *(f"optimi.{name}" for name in OPTIMI),
)
TIMM = {
    "adafactor": "Adafactor",
    "adamp": "AdamP",
    "adan": "Adan",
    "adopt": "Adopt",
    "lamb": "Lamb",
    "laprop": "LaProp",
    "lars": "Lars",
    "lion": "Lion",
    "madgrad": "MADGRAD",
    "mars": "Mars",
    "nadamw": "NAdamW",
    "nvnovograd": "NvNovoGrad",
    "rmsprop_tf": "RMSpropTF",
    "sgdp": "SGDP",
    "sgdw": "SGDW",
}
HEAVYBALL = "AdamW ADOPT AdEMAMix AdamC LaProp NAdam RMSprop SGD SFAdamW Muon SOAP PSGDKron"
PACKAGES = {
    "torch": "torch",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
    "optimi": "torch-optimi",
    "transformers": "transformers",
    "heavyball": "heavyball",
}
"""Modules and the packages they come with."""


def cases() -> dict[str, Any]:
    """Every class by its name in the table."""
    ours = [n for n in lightning_optim.optim.__all__ if n.lower() in lightning_optim.optim.list_optimizers()]
    names = [
        *(f"lightning_optim.optim.{name}" for name in ours),
        *(f"torch.optim.{name}" for name in TORCH.split()),
        *(f"pytorch_optimizer.{name}" for name in PYTORCH_OPTIMIZER.split()),
        *OTHERS,
    ]
    found = {}
    for name in names:
        module, _, cls = name.rpartition(".")
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            found[name] = getattr(importlib.import_module(module), cls)
    for file, cls in TIMM.items():
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            found[f"timm.optim.{cls}"] = getattr(timm(file), cls)
    with contextlib.suppress(ModuleNotFoundError):  # Not among our requirements: pip install --no-deps heavyball
        heavyball = importlib.import_module("heavyball")
        heavyball.utils.compile_mode = None  # or each class is compiled for each list of shapes, for minutes
        found |= {f"heavyball.{name}": getattr(heavyball, name) for name in HEAVYBALL.split()}
    return found


def report(name: str, cls: Any) -> Report:
    """Check one class; what it prints is left out."""
    skip = [] if name.startswith("lightning_optim") else ["compile"]
    with contextlib.redirect_stdout(io.StringIO()):
        return check_optimizer(functools.partial(cls, **OPTIONS.get(name, {})), skip=skip)


def results_table(reports: dict[str, Report]) -> str:
    """One row for each class."""
    lines = [
        "| class | weight decay | state of bfloat16 weights | passed | checks with another result |",
        "|" + "---|" * 5,
    ]
    for name, found in reports.items():
        decay, state = (found.facts.get(fact, "-") for fact in ("weight decay", "state of bfloat16 weights"))
        passed = len(found.results) - len(found.failures) - len(found.skipped)
        failed = ", ".join(f"`{r.check.name}`" for r in found.failures) or "-"
        lines.append(f"| `{name}` | {decay} | {state} | {passed} | {failed} |")
    return "\n".join(lines)


def checks_table() -> str:
    """One row for each check."""
    lines = ["| check | what is expected | why it matters | what to change |", "|---|---|---|---|"]
    for check in checks(only=["default", "compile", "distributed", "gpu"]):
        cells = [text.replace("|", "\\|") for text in (check.expected, check.why, check.fix)]
        lines.append(f"| `{check.name}` ({check.family}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def versions() -> str:
    found = {}
    for package in PACKAGES.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return ", ".join(f"{package} {version}" for package, version in found.items())


def between(text: str, mark: str, new: str) -> str:
    """Put a table between two marks of the page."""
    head, rest = text.split(f"<!-- {mark} -->\n", 1)
    tail = rest.split(f"<!-- end of {mark} -->", 1)[1]
    return f"{head}<!-- {mark} -->\n{new}\n<!-- end of {mark} -->{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names, whose rows alone are written; all without")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what was seen")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/conformance.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    reports = {}
    for name, cls in cases().items():
        if options.names and not any(part in name for part in options.names):
            continue
        reports[name] = report(name, cls)
        if options.verbose:
            for result in reports[name].failures:
                print(f"{name}: {result.check.name}: {result.seen}", flush=True)
    print(results_table(reports))
    print(f"\n{len(reports)} classes; {versions()}; {sum(r.seconds for r in reports.values()):.0f} s")
    if options.write:
        rows = {row.split("`")[1]: row for row in results_table(reports).splitlines() if row.startswith("| `")}
        before = PAGE.read_text().split("<!-- results -->")[1].split("<!-- end of results -->")[0].splitlines()
        kept = {row.split("`")[1]: row for row in before if row.startswith("| `")} if options.names else {}
        table = [*results_table({}).splitlines(), *(row for n in cases() if (row := {**kept, **rows}.get(n)))]
        text = between(PAGE.read_text(), "results", "\n".join(["", *table, "", f"Versions: {versions()}.", ""]))
        PAGE.write_text(between(text, "checks", f"\n{checks_table()}\n"))


if __name__ == "__main__":
    main()
