"""Parameter groups of fused projections: which parameters share a `split`, and the sentence about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_optim.optim.matrix_form import AUTO, matrix_form
from lightning_optim.param_groups.fused import Fused, fused_by_name

FUSED = "fused projection"
"""Words that every sentence about them has, in whichever case."""


def cut_by_fused(group: Mapping[str, Any], fused: Sequence[Fused | None]) -> Iterator[dict[str, Any]]:
    """Set `split` of ``group`` for its fused projections; split the group if not all are alike.

    Args:
        group: The parameter group, whose parameters have names; one with a `split` of its own is left as it is.
        fused: What each parameter is made of. The groups have the kinds by name under `fused_projections`, for plans.

    Yields:
        The groups that are not empty.
    """
    params = list(group["params"])
    if group.get("split", AUTO) != AUTO or not any(fused):
        yield dict(group)
        return
    cuts: dict[Fused | None, list[Any]] = {None: []}  # What is whole comes first, under the name of the group.
    whole: dict[str, str] = {}
    for entry, one in zip(params, fused, strict=True):
        if one is not None and one.split is None:
            whole[entry[0]] = one.why_whole or ""
        cuts.setdefault(None if one is None or one.split is None else one, []).append(entry)
    names: set[str] = set()
    cuts = {one: entries for one, entries in cuts.items() if entries}
    for one, entries in cuts.items():
        part = {**group, "params": entries}
        if one is not None:
            part |= {"split": one.split, "split_dim": one.split_dim, "split_repeats": one.split_repeats}
            part["fused_projections"] = dict.fromkeys((name for name, _ in entries), one.kind)
            if "name" in group and len(cuts) > 1:
                name = f"{group['name']}_{one.kind}"
                number = next(i for i in range(1, len(cuts) + 1) if (name if i == 1 else f"{name}_{i}") not in names)
                part["name"] = name if number == 1 else f"{name}_{number}"
                names.add(part["name"])
        elif whole:
            part["fused_projections"] = whole
        yield part


def resolve_split(group: dict[str, Any], default: Any) -> Iterator[dict[str, Any]]:
    """Replace `auto` of ``group`` by what the names of its parameters tell, and what was found by what was given.

    Args:
        group: A parameter group, with a list of parameters; one for AdamW is left as it is.
        default: `split` of the optimizer.

    Yields:
        Groups whose `split`, where it is their own, is not `auto`.
    """
    if group.get("rule") == "adamw":
        yield group
        return
    if default != AUTO and "fused_projections" in group:  # The user has decided otherwise.
        found = {"split", "split_dim", "split_repeats", "fused_projections"}
        group = {key: value for key, value in group.items() if key not in found}
    if group.get("split", default) != AUTO:
        yield group
        return
    group = {key: value for key, value in group.items() if key != "split"}
    params = list(group["params"])
    named = all(isinstance(entry, tuple) for entry in params)
    by_name = [fused_by_name(*entry) for entry in params] if named and "fused_projections" not in group else []
    for part in cut_by_fused(group, by_name) if by_name else [group]:
        yield {"split": None, **part}


def fused_note(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence about the fused projections that were found, and those that could not be split.

    Args:
        groups: Parameter groups with names and the key `fused_projections`, as `muon_param_groups` makes them.
    """
    texts = []
    found = [group for group in groups if group.get("fused_projections") and group.get("split") is not None]
    if found:
        kinds = []
        for group in found:
            forms = {str(matrix_form(param, group)) for param in group["params"]}
            cut = forms.pop() if len(forms) == 1 else f"by split={group['split']!r}"
            kinds.append(f"{_listed(list(group['fused_projections']))} {cut}")
        texts.append(
            "Fused projections are updated as the matrices that they consist of: "
            f"{'; '.join(kinds)}. The key 'split' of a group, None for whole matrices, overrides this."
        )
    whole = [group.get("fused_projections", {}) for group in groups if group.get("split") is None]
    left = {name: why for names in whole for name, why in names.items()}
    for why in dict.fromkeys(left.values()):
        names = [name for name, its in left.items() if its == why]
        texts.append(
            f"{_listed(names)} may be a fused projection and is updated as one matrix, because it {why}. Give it a "
            "group with 'split', for instance 3 or a list of sizes, or split=None if it is one matrix."
        )
    return " ".join(texts) or None


def _listed(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
