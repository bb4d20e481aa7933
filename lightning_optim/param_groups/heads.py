"""The output layers of a model, found by its own methods, by their names, and by its structure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

_ATTENTION = r"(?!(multi|per|attn|attention|talking|num|n)_?heads?)"
_ANYWHERE = rf"({_ATTENTION}(\w+_)?heads?|head_dist|(\w+_)?classifier|(to_)?logits|unembed)"
_LEAF = r"(decoder|scores?|qa_outputs|seq_relationship|output_projection)"
_OUTERMOST = (
    r"(fc|fc_?out|out|outputs?|(out|output|last|final)_(layer|linear|proj|projection|fc)|final|proj_out|lin(ear)?_out"
    r"|predict(or|ions?)|readout|regressor)"
)
_WRAPPERS = r"((model|module|net|network|backbone|transformer|decoder|_orig_mod)\.)*"

HEAD = rf"(^|\.){_ANYWHERE}\.|^{_WRAPPERS}{_OUTERMOST}\.|^(?!.*\.\d+\.)(\w+\.)*{_LEAF}\.(weight|bias)$"
"""Names of output layers: some at any position, some only as the last part of a name outside of repeated blocks
(`decoder` is a layer in one model, and a stack of blocks in another), and some only at the top of the model."""

_HEAD = re.compile(HEAD, re.IGNORECASE)


def is_head_name(name: str) -> bool:
    """Return whether a parameter of this name belongs to the output layer, judged by the name alone.

    Example:
        >>> [is_head_name(name) for name in ("lm_head.weight", "decoder.weight", "decoder.layers.0.fc1.weight")]
        [True, True, False]
    """
    return _HEAD.search(name) is not None


def output_layers(model: nn.Module) -> set[int]:
    """Find the output layers of ``model``.

    The result of a method of the model takes precedence (timm's `get_classifier`, Hugging Face's
    `get_output_embeddings`). Otherwise the output layers are those with such a name (`is_head_name`), linear layers
    that share an embedding's weight, and a linear layer with as many outputs as the largest embedding has rows, if it
    is the only one. Where there are none of these, see `last_linear`.

    Args:
        model: The model.

    Returns:
        The `id` of each module; empty if there is no evidence.
    """
    declared = _declared(model)
    if declared:
        return declared
    found = {id(module) for name, module in model.named_modules() if _holds(module) and is_head_name(f"{name}.weight")}
    return found | {id(module) for module in _sharing_an_embedding(model)}


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _declared(model: nn.Module) -> set[int]:
    """Return the ids of the heads that a method of the model, or of its outermost part with such a method, returns."""
    for module in model.modules():
        for method in ("get_classifier", "get_output_embeddings"):
            if not callable(getattr(module, method, None)):
                continue
            answer = getattr(module, method)()
            given = answer if isinstance(answer, tuple | list) else [answer]
            heads = {id(part) for head in given if isinstance(head, nn.Module) for part in head.modules()}
            if heads:
                return heads
    return set()


def _sharing_an_embedding(model: nn.Module) -> Iterator[nn.Module]:
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    if not embeddings:
        return
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    rows = max(embedding.num_embeddings for embedding in embeddings)
    as_wide = [linear for linear in linears if linear.out_features == rows]
    if len(as_wide) == 1:
        yield from as_wide
    yield from (linear for linear in linears if any(_same(linear.weight, table.weight) for table in embeddings))


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two parameters share their memory; False where one is not a plain tensor."""
    if a is b:
        return True
    plain = {type(a), type(b)} <= {Tensor, nn.Parameter} and a.device == b.device and a.device.type != "meta"
    return plain and a.dtype == b.dtype and a.numel() > 0 and a.is_set_to(b)


def last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the last layer in the order of definition if it is linear, else None.

    Lists and modules with a single child are searched. A module with frozen parameters only (a teacher, an average of
    the weights) is ignored, unless it is a linear layer itself.
    """
    module, in_list = model, False
    while True:
        children = [m for m in module.children() if any(_is_linear(m) or p.requires_grad for p in m.parameters())]
        if not children:
            return None
        last = children[-1]
        if isinstance(last, nn.Linear):
            return last
        is_list = isinstance(last, nn.Sequential | nn.ModuleList)
        if not is_list and (in_list or len(children) > 1):
            return None
        module, in_list = last, in_list or is_list
