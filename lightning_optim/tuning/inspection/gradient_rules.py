"""Findings about which parameters get a gradient, and about what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightning_optim.tuning.inspection.findings import Finding, finding
from lightning_optim.tuning.inspection.signal_rules import ordered
from lightning_optim.tuning.inspection.sites import Site
from lightning_optim.tuning.inspection.watch import Parameter, Watch


def finite_findings(watch: Watch, loss_is_bad: bool) -> Iterator[Finding]:
    """Where something became NaN or infinite first."""
    sites = ordered(watch)
    # In 16-bit training the first scales may be too large; GradScaler skips these steps, and lowers it.
    bad_gradient = watch.scale == 1 and any(seen.gradient.bad for seen in watch.parameters.values())
    nans = any(site.output.nans for site in sites)
    if not (loss_is_bad or bad_gradient or nans):
        return
    for name, sums in watch.data_names.items():
        if sums.bad:
            yield finding(
                "non-finite-input", f"batch {name}", f"{sums.bad:,} of {sums.count:,} numbers are not finite."
            )
            return
    for site in sites:
        if site.bad_from_good or (site.output.bad and site.kind == "module"):
            seen = f"{site.output.bad:,} of {site.output.count:,} outputs are NaN or infinite, from finite inputs."
            yield finding("non-finite-activation", site.name, seen)
            return
    first = next((site for site in sites if site.output.bad or site.entered.bad), None)
    if first is not None:
        yield finding("non-finite-activation", first.name, "what goes into it is NaN or infinite.")
    elif loss_is_bad or bad_gradient:
        where = "the loss" if loss_is_bad else next(n for n, seen in watch.parameters.items() if seen.gradient.bad)
        yield finding("non-finite-activation", where, "NaN or infinite, though all activations are finite.")


def gradient_findings(watch: Watch) -> Iterator[Finding]:
    """Parameters without a gradient: unused, cut off, or frozen."""
    if any(seen.gradient.count for seen in watch.parameters.values()):
        yield from _without(watch)
        yield from _frozen(watch)
    elif any(seen.requires_grad for seen in watch.parameters.values()):
        cut = next(iter(watch.detached), None)
        hint = "" if cut is None else f"; {cut or 'the model or its step'} calls {watch.detached[cut]}()"
        yield finding("no-gradient", "model", f"no parameter gets a gradient{hint}.")
    else:
        yield finding("nothing-trainable", "model", "no parameter requires a gradient.")


def unregistered_findings(watch: Watch) -> Iterator[Finding]:
    """Weights that get a gradient and that the optimizer does not know."""
    if watch.unregistered:
        places = list(dict.fromkeys(watch.unregistered.values()))
        count = len(watch.unregistered)
        seen = f"{count} weight{'s' * (count > 1)} with a gradient {'are' if count > 1 else 'is'} not in parameters()."
        yield finding("unregistered-weights", places, seen)


def _without(watch: Watch) -> Iterator[Finding]:
    trained = {n: seen for n, seen in watch.parameters.items() if seen.requires_grad and not seen.gradient.count}
    if not trained:
        return
    with torch.no_grad():
        copies = _copies(watch, trained)
    trained = {name: seen for name, seen in trained.items() if name not in copies and not _is_routed(watch, name)}
    used = [name for name in trained if _was_used(watch, name)]
    unused = [name for name in trained if name not in used]
    for kind, names in (("unused-parameters", unused), ("no-gradient", used)):
        if not names:
            continue
        numbers = sum(trained[name].numel for name in names)
        seen_text = (
            f"{len(names)} trainable tensor{'s' if len(names) > 1 else ''} ({numbers:,} numbers) without a gradient"
        )
        if kind == "no-gradient" and watch.detached:
            where = next(iter(watch.detached))
            seen_text += f"; {where or 'the model or its step'} calls {watch.detached[where]}()"
        yield finding(kind, names, seen_text + ".")


def _was_used(watch: Watch, name: str) -> bool:
    """Whether the module of a parameter ran, or a place with it as a weight."""
    module = name.rpartition(".")[0]
    owner = watch.modules.get(module, watch.model)
    if any(site.weight is not None and site.weight.name == name for site in watch.sites.values()):
        return True
    # A module with children may run without its own parameters.
    return module in watch.executed and (name in watch.nodes.touched or not any(True for _ in owner.children()))


def _copies(watch: Watch, names: dict[str, Parameter]) -> set[str]:
    """Those that are equal to another parameter that learns: a target network, an average, a teacher."""
    own = dict(watch.model.named_parameters())
    learn: dict[tuple[int, ...], list[str]] = {}
    for name, seen in watch.parameters.items():
        if seen.gradient.count:
            learn.setdefault(tuple(own[name].shape), []).append(name)
    found = set()
    for name in names:
        module = name.partition(".")[0]
        others = learn.get(tuple(own[name].shape), [])
        if any(other.partition(".")[0] != module and torch.equal(own[name], own[other]) for other in others):
            found.add(name)
    # Biases of zeros are equal to any other; matrices tell.
    roots = {name.partition(".")[0] for name in found if own[name].ndim > 1}
    return {name for name in names if name.partition(".")[0] in roots}


def _is_routed(watch: Watch, name: str) -> bool:
    """Whether a parameter is of one of several modules of a kind among which samples are divided."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = watch.modules.get(".".join(path[: depth - 1]))
        if not isinstance(parent, nn.ModuleList | nn.ModuleDict):
            continue
        prefix = ".".join(path[: depth - 1])
        start = f"{prefix}." if prefix else ""
        siblings = [f"{start}{child}" for child, _ in parent.named_children()]
        rows = [
            {count for site in watch.sites.values() if _within(site, sibling) for count in site.rows}
            for sibling in siblings
        ]
        rows = [counts for counts in rows if counts]
        if len(rows) >= 1 and (len({frozenset(counts) for counts in rows}) > 1 or any(len(c) > 1 for c in rows)):
            return True
    return False


def _within(site: Site, module: str) -> bool:
    return site.module == module or site.module.startswith(f"{module}.")


def _frozen(watch: Watch) -> Iterator[Finding]:
    """A layer that does not learn between layers that do, where most do."""
    weighted = [s for s in ordered(watch) if s.weight is not None and s.weight.parameter]
    frozen = [s for s in weighted if not any(p.requires_grad for p in _all(watch, s))]
    if not frozen or len(frozen) > len(weighted) / 3:
        return
    middle = [
        s
        for s in frozen
        if s.input_requires_grad
        and any(o.order > s.order and o.gradient.count and o not in frozen for o in weighted)
        and any(o.order < s.order and o not in frozen for o in weighted)
    ]
    if middle:
        seen = f"frozen ({len(middle)} of {len(weighted)} layers), while layers before and after it learn."
        yield finding("frozen-in-the-middle", [site.name for site in middle], seen)


def _all(watch: Watch, site: Site) -> list[nn.Parameter]:
    """The parameters that could make a layer learn: those of its module and of one that wraps it, such as LoRA."""
    module = watch.modules[site.module]
    own = list(module.parameters())
    parent_name = site.module.rpartition(".")[0]
    parent = watch.modules[parent_name]
    adapted = list(parent.named_children())
    around = list(parent.parameters(recurse=False))
    if parent_name and len(adapted) > 1 and not isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        around += [p for key, child in adapted for p in child.parameters() if "lora" in key.lower() or "adapt" in key]
    return own + around
