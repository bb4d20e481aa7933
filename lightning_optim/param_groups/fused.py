"""Fused projections: parameters that are several matrices in one, recognised by modules and usual names.

A layer that computes query, key and value, or gate and up projection, in one product has one weight. What its parts are
is known by the name of the layer; where they lie, by its shape, the numbers of heads that the attention module has, and
the layer that takes the result. What does not follow from these is left whole, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_optim.param_groups.attention_heads import AttentionHeads
from lightning_optim.param_groups.parts import NamedParameter, is_stack


class Fused(NamedTuple):
    """What a fused projection is made of.

    Args:
        kind: `qkv`, `kv` or `gate_up`.
        split: A number of equal blocks, or the size of each; None if that is not known.
        split_dim: -2 if the rows are split, -1 if the columns are.
        split_repeats: How often the blocks are repeated; blocks of the same place form one matrix.
        why_whole: Reason why ``split`` is not known, as a sentence without its subject.
    """

    kind: str
    split: int | tuple[int, ...] | None
    split_dim: int = -2
    split_repeats: int = 1
    why_whole: str | None = None


_QKV = re.compile(r"(\w+_)?w?qkv(_(proj|projection|linear|fused))?|c_attn|att_proj|in_proj_weight", re.IGNORECASE)
_PER_HEAD = re.compile(r"query_key_value|linear_qkv")
"""Names by which Megatron, GPT-NeoX, BLOOM and Falcon have query, key and value of one head next to each other."""
_PER_HEAD_CLASSES = re.compile(r"(GPTBigCode|MiniMaxLightning)Attention")
_KV = re.compile(r"(to_|linear_)?kv|key_value", re.IGNORECASE)
_GATE_UP = re.compile(r"(\w+_)?(gate_up|up_gate|gate_and_up)(_proj)?|w13(_weight)?|w12|w1_?w3")
_GATED = {"fc1": "fc2", "Wi": "Wo", "weights_in": "weights_out", "input_linear": "output_linear"}
"""Names of layers that may be gate and up projection, each with the layer that takes the result."""
_DOWN = ("down_proj", "down", "w2", "w2_weight", "w3", "linear_out")


def find_fused(one: NamedParameter, modules: Mapping[str, nn.Module]) -> Fused | None:
    """Return what a parameter is made of if its layer is called like a fused projection; None if it is not.

    Args:
        one: The parameter.
        modules: All modules of the model by name.

    Example:
        >>> from lightning_optim.param_groups import named_parameters
        >>> model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
        >>> (fused,) = filter(None, (find_fused(one, dict(model.named_modules())) for one in named_parameters(model)))
        >>> fused.kind, fused.split, fused.split_dim
        ('qkv', 3, -2)
    """
    if isinstance(one.parameter, UninitializedParameter) or one.dim < 2:
        return None
    for name, owner in zip(one.names, one.modules, strict=True):
        found = _found(name, one.parameter, owner, modules)
        if found is not None:
            return found
    return None


def fused_by_name(name: str, param: Tensor) -> Fused | None:
    """Return what a parameter is made of, by its name and shape alone; None if that is not known.

    Args:
        name: Its name in the model.
        param: The parameter.

    Example:
        >>> import torch
        >>> fused_by_name("blocks.0.attn.qkv.weight", torch.zeros(12, 4)).split
        3
    """
    layer = _layer(name)
    if isinstance(param, UninitializedParameter) or param.dim() != 2:
        return None
    rows, columns = param.shape
    why = "needs the modules to tell how; use the groups of muon_param_groups(model), which inspects them"
    if _PER_HEAD.fullmatch(layer):
        return Fused("qkv", None, why_whole=why)
    if _QKV.fullmatch(layer):
        if rows == 3 * columns or columns == 3 * rows:
            return Fused("qkv", 3, -2 if rows > columns else -1)
        return Fused("qkv", None, why_whole=why)
    if _GATE_UP.fullmatch(layer):
        fits = rows > columns and rows % 2 == 0
        return Fused("gate_up", 2) if fits else Fused("gate_up", None, why_whole=why)
    return None


def _layer(name: str) -> str:
    """Return the name of the layer that a parameter belongs to, without its path."""
    return re.sub(r"(\.parametrizations)?\.weight(\.original\d?)?$", "", name).rpartition(".")[2]


def _found(name: str, param: Tensor, owner: nn.Module, modules: Mapping[str, nn.Module]) -> Fused | None:
    layer = _layer(name)
    around = list(_around(name, owner, modules))
    sides = list(_sides(param, owner))
    if _PER_HEAD.fullmatch(layer) or _QKV.fullmatch(layer):
        return _qkv(layer, sides, around)
    if _KV.fullmatch(layer) and type(around[0]).__name__ != "HaloAttn":  # whose keys and values alternate by heads
        heads = AttentionHeads.of(around)
        fitting = [dim for dim, out, into in sides if out == 2 * into or (heads and out == 2 * (heads.width or 0))]
        return Fused("kv", 2, fitting[0]) if len(fitting) == 1 else None
    if _GATE_UP.fullmatch(layer):
        return _gate_up(sides, around, param.dim())
    if layer in _GATED and around:
        gated = layer != "fc1" or re.search(r"GLU|Glu|Gated", type(around[0]).__name__) is not None
        fitting = [dim for dim, out, into in sides if gated and _takes(around, (_GATED[layer],), dim, out, into)]
        return Fused("gate_up", 2, fitting[0]) if len(fitting) == 1 else None
    return None


def _around(name: str, owner: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the module that computes with a projection, and the one around it: the owner of a bare parameter first."""
    path = re.sub(r"\.parametrizations\..*$", ".weight", name).split(".")[:-1]
    if _is_layer(owner) or name.endswith((".original", ".original0", ".original1")):
        path = path[:-1]
    for length in (len(path), len(path) - 1):
        if length >= 0 and (module := modules.get(".".join(path[:length]))) is not None:
            yield module


def _is_layer(module: nn.Module) -> bool:
    """Return whether ``module`` only multiplies by its weight."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return bool(own) and all(name in ("weight", "bias") for name in own)


def _sides(param: Tensor, owner: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Yield the dimension that may be the outputs, its size and the size of the inputs; both ways if not known."""
    rows, columns = param.shape[-2:] if is_stack(param, [owner]) else (param.shape[0], param.shape[1:].numel())
    conv1d = any(base.__name__ == "Conv1D" for base in type(owner).__mro__)  # of Hugging Face, [in, out]
    known = isinstance(owner, nn.Linear | nn.MultiheadAttention) or (param.dim() > 2 and not is_stack(param, [owner]))
    if not conv1d:
        yield -2, rows, columns
    if not known or conv1d:
        yield -1, columns, rows


def _qkv(layer: str, sides: Sequence[tuple[int, int, int]], around: Sequence[nn.Module]) -> Fused:
    heads = AttentionHeads.of(around)
    owner = around[0] if around else nn.Module()
    per_head = bool(
        _PER_HEAD.fullmatch(layer)
        or getattr(owner, "head_first", False) is True
        or (_PER_HEAD_CLASSES.fullmatch(type(owner).__name__) and getattr(owner, "multi_query", False) is not True)
    )
    crossed = layer == "c_attn" and hasattr(owner, "q_attn")
    found = []
    for dim, out, into in sides:
        blocks = 4 if type(owner).__name__ == "CodeGenAttention" else None
        if blocks is not None and out % (3 * blocks) == 0:
            found.append(Fused("qkv", 3, dim, blocks))
        elif crossed and out == 2 * into:
            found.append(Fused("kv", 2, dim))
        elif heads is not None and (layout := heads.layout(out, per_head)) is not None:
            found.append(Fused("qkv", layout[0], dim, layout[1]))
        elif not per_head and out == 3 * into and (heads is None or not (heads.grouped or heads.width)):
            found.append(Fused("qkv", 3, dim))
    if len(found) == 1:
        return found[0]
    if len(found) == 2:
        why = "would fit the rows as well as the columns"
    elif per_head and heads is None:
        why = "has query, key and value of each head next to each other, and the number of heads is not known"
    else:
        why = "does not have the size that follows from its inputs or from the numbers of heads, as far as known"
    return Fused("qkv", None, why_whole=why)


def _gate_up(sides: Sequence[tuple[int, int, int]], around: Sequence[nn.Module], ndim: int) -> Fused:
    owner = around[0] if around else nn.Module()
    even = [(dim, out, into) for dim, out, into in sides if out % 2 == 0]
    fitting = [side for side in even if _takes(around, _DOWN, *side)]
    if not fitting and isinstance(transposed := getattr(owner, "is_transposed", None), bool):
        fitting = [side for side in even if side[0] == (-1 if transposed else -2)]
    if not fitting and len(sides) == 1 and not any(hasattr(owner, name) for name in _DOWN):
        fitting = even
    if len(fitting) != 1:
        return Fused("gate_up", None, why_whole="is not twice as large as the inputs of a layer that takes its result")
    dim, out, _ = fitting[0]
    # Hugging Face's experts say so; in GPT-OSS, gate and up alternate.
    alternate = getattr(owner, "is_concatenated", True) is False
    return Fused("gate_up", 2, dim, out // 2 if alternate else 1)


def _takes(around: Sequence[nn.Module], names: Sequence[str], dim: int, out: int, into: int) -> bool:
    """Return whether a layer next to the projection has half as many inputs as that has outputs.

    Args:
        around: The modules around the projection.
        names: Names that the layer may have.
        dim: Dimension of the outputs of the projection; the layer is stored alike.
        out: Outputs of the projection.
        into: Inputs of the projection.
    """
    for name in names:
        found = getattr(around[0], name, None) if around else None
        weight = found if isinstance(found, Tensor) else getattr(found, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter) or weight.dim() < 2:
            continue
        wanted = (into, out // 2) if dim == -2 else (out // 2, into)
        sizes = tuple(weight.shape[-2:]) if not isinstance(found, nn.modules.conv._ConvNd) else tuple(weight.shape[:2])
        if sizes == wanted or (isinstance(found, nn.Linear) and found.in_features * 2 == out and dim == -2):
            return True
    return False
