"""`lightning-optim batch-size`: the largest batch that fits, how large is worth it, and the rates that go with it."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_optim.cli.own_parser import OwnParser

if TYPE_CHECKING:
    from lightning_optim.cli.fit_config import FitConfig
    from lightning_optim.tuning.batch_size.critical import CriticalBatch
    from lightning_optim.tuning.batch_size.largest import Largest

_EXAMPLE = "Example: lightning-optim batch-size --config run.yaml"


def add_batch_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``batch-size``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("--key", help="flag of the batch size, as data.batch_size (default: the batch_size there is)")
    parser.add_argument("--start", type=int, help="first size to be tried (default: that of the configuration)")
    parser.add_argument("--max", type=int, default=8192, help="last size to be tried (default: 8192)")
    parser.add_argument("--steps", type=int, default=40, help="steps that measure the noise scale; 0 for none (40)")
    parser.add_argument("--timeout", type=float, help="seconds after which a size counts as too large")


def run_batch_size(args: Sequence[str]) -> None:
    """Find the largest batch that fits a configuration, and print advice; nothing is changed.

    Args:
        args: The command line after ``batch-size``: its own flags, and any of ``fit``.

    Raises:
        SystemExit: The configuration is wrong, or its fit fails for another reason than memory.
    """
    from lightning_optim.cli.fail import fail, said_of
    from lightning_optim.cli.fit_config import ConfigError, read_fit
    from lightning_optim.tuning.batch_size.critical import critical_batch
    from lightning_optim.tuning.batch_size.largest import Fit, largest_batch, run_fit

    parser = OwnParser(
        "batch-size",
        "Find the largest batch that fits, and advise on batch size and learning rate. Takes the flags of `fit` as "
        "well, and changes nothing.",
        _EXAMPLE,
    )
    add_batch_size_arguments(parser)
    options, of_fit = parser.split(args)
    try:
        config = read_fit(of_fit)
        key, size = _batch_size(config, options.key)
        read_fit([*of_fit, f"--{key}={options.start or size}"])
        accumulated = config.data["trainer"]["accumulate_grad_batches"] or 1

        def try_size(size: int) -> Fit:
            fit = run_fit(of_fit, key, size, 3, timeout=options.timeout)
            _say(f"batch size {size}: {_outcome(fit)}")
            return fit

        found = largest_batch(try_size, options.start or size, options.max)
        measured, critical = None, None
        if options.steps > 0 and found.size is not None:
            micro = min(size, found.size)
            several = accumulated if accumulated > 1 else 4
            measured = run_fit(of_fit, key, micro, options.steps, accumulate=several, noise=True)
            if pairs := measured.found.get("pairs"):
                critical = critical_batch(pairs, measured.found["small"], measured.found["large"])
            else:
                _say(f"The critical batch size is not known: {_why_unmeasured(measured)}.")
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        fail(said_of(error))
    except KeyboardInterrupt:
        fail("Interrupted. The same command begins again; --start gives the size it begins with.", 130)
    ranks = _ranks(found, size)
    for line in _report(config, key, size, accumulated * ranks, found, critical):
        print(line if line.startswith("  --") else textwrap.fill(line, 100, subsequent_indent="    "))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _why_unmeasured(fit: Any) -> str:
    """Why a fit has no gradients of a part of the batch and of all of it."""
    if fit.status != "ok":
        return str(fit.message).splitlines()[0].rstrip(".")
    return "no step had two whole micro-batches, or the module optimizes by itself (automatic_optimization=False)"


def _outcome(fit: Any) -> str:
    from lightning_optim.core.sizes import format_bytes

    if fit.status != "ok":
        return str(fit.message)
    speed = "" if fit.samples_per_second is None else f", {fit.samples_per_second:,.0f} samples/s"
    return f"fits, {format_bytes(fit.memory)}{speed}"


def _batch_size(config: FitConfig, key: str | None) -> tuple[str, int]:
    """The flag of the batch size, and its present value."""
    from lightning_optim.cli.fit_config import ConfigError

    found = {}
    for part in ("data", "model"):
        entry = config.data.get(part)
        arguments = entry.get("init_args", entry) if isinstance(entry, dict) else {}
        if isinstance(arguments, dict) and isinstance(arguments.get("batch_size"), int):
            found[f"{part}.batch_size"] = arguments["batch_size"]
    if key is None and not found:
        raise ConfigError(
            "No batch_size among the arguments of data and model. Name the flag that sets it: --key data.samples"
        )
    if key is None:
        return next(iter(found.items()))
    key = key.lstrip("-")
    value: Any = config.data
    for name in key.split("."):
        value = value.get(name, value.get("init_args", {}).get(name)) if isinstance(value, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"Invalid --key {key}: its value must be a number of samples, and is {value!r:.60}.")
    return key, value


def _ranks(found: Largest, size: int) -> int:
    """On how many devices the fits ran."""
    first = next((fit.found for fit in found.fits if fit.found.get("large") and fit.found.get("accumulated")), None)
    return 1 if first is None else first["large"] // (first["small"] * first["accumulated"])


def _report(
    config: FitConfig, key: str, size: int, times: int, found: Largest, critical: CriticalBatch | None
) -> list[str]:
    from lightning_optim.tuning.batch_size.critical import advice

    lines = [f"Largest batch that fits  {found.size or 'none'}: {found.reason}."]
    speeds = [(fit.size, fit.samples_per_second) for fit in found.fits if fit.samples_per_second]
    if speeds:
        fastest = max(speeds, key=lambda pair: pair[1])
        enough = min(batch for batch, speed in speeds if speed >= 0.9 * fastest[1])
        lines.append(
            f"Fastest                  {fastest[0]}: {fastest[1]:,.0f} samples/s; 90 % of it from {enough} on."
        )
    if critical is not None:
        lines.append(advice(critical, size * times))
        if critical.size is not None:
            lines.append("That is at the start, and it mostly grows: OptimizerMonitor logs optim_grad/noise_scale.")
    if found.size is not None:
        others = [2 * size]
        if critical is not None and critical.size is not None:
            others.append(_power_of_two(critical.size / times))
        sizes = sorted({size, found.size, *(other for other in others if 1 <= other <= found.size)})
        lines += ["", *_rates(config, key, size, times, sizes)]
    return lines


def _power_of_two(size: float) -> int:
    return int(2 ** round(math.log2(max(size, 1.0))))


def _rates(config: FitConfig, key: str, size: int, times: int, sizes: Sequence[int]) -> list[str]:
    """Flags for other sizes, with the rule that gives them."""
    from lightning_optim.callbacks import ConfigureOptimizers
    from lightning_optim.tuning.batch_size.rules import scale_lr

    configure = config.only(ConfigureOptimizers)
    now = {} if configure is None else configure.settings
    if not isinstance(now.get("optimizer"), str) or not isinstance(now.get("lr"), float):
        return ["With another size: SGD's rate grows with it, that of Adam-like optimizers with its square root."]
    lines, rule = [], None
    for other in sizes:
        scaled = scale_lr(now["lr"], size * times, other * times, now["optimizer"], now)
        flags = f"--{key} {other} --optim.lr {scaled.lr:.4g}"
        decay = scaled.others.pop("weight_decay", None)
        flags += "" if decay is None else f" --optim.weight_decay {decay:.4g}"
        for name, value in scaled.others.items():
            shown = f"'[{', '.join(f'{v:.6g}' for v in value)}]'" if isinstance(value, tuple) else f"{value:.4g}"
            flags += f" --optim.optimizer.{name} {shown}"
        lines.append(f"  {flags}" + ("  (now)" if other == size else ""))
        rule = scaled
        lines += [f"    {note}" for note in scaled.notes if other != size]
    assert rule is not None
    kind = {"unchanged": "unchanged", "linear": "by the linear rule"}.get(rule.rule, "by the square root rule")
    source = f" ({rule.source})" if rule.source else ""
    head = f"Rates of {now['optimizer']} for other sizes, {kind}{source}."
    return [head, "Near the critical batch size and above it rates grow less than that: try them.", *lines]
