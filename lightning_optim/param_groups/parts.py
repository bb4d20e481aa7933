"""A model's parameters as the rules see them, and which part of the model each one is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

HEAD = r"(((lm|cls|mlm|classification)_)?heads?|classifier|logits|unembed)"
NOT_HIDDEN = (
    rf"(^|[._])(\w*embed(ding)?s?|embed_\w+|wte|wpe|{HEAD})([._]|$)"
    r"|^((model|module|net|network|backbone)\.)*(fc|output|out)\."
)
"""Names of embeddings and of the layers that make the output: matrices, but not hidden ones."""

_NOT_HIDDEN = re.compile(NOT_HIDDEN, re.IGNORECASE)
_HEAD = re.compile(rf"(^|\.){HEAD}\.|^((model|module|net|network|backbone)\.)*(fc|output|out)\.", re.IGNORECASE)
_BIAS = re.compile(r"(^|[._])bias(_[^.]*)?$")  # bias, in_proj_bias, bias_ih_l0

_PARTS = {
    "bias": "biases, whatever they add to",
    "norm": "normalisation layers of any family, weights and biases",
    "embedding": "nn.Embedding and nn.EmbeddingBag",
    "head": "the layer that makes the output: what the model says itself (timm's get_classifier, Hugging Face's "
    "get_output_embeddings), else what is called head, lm_head, classifier, fc or the like",
    "hidden_matrix": "matrices and kernels between hidden activations: neither vectors nor embeddings nor the head",
    "undecayed": "biases, norms, embeddings, and what the model names in timm's no_weight_decay()",
}


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the rules see it.

    Args:
        parameter: The parameter itself.
        names: Every name the model has for it, the first one first; a tied weight has several.
        modules: The modules that hold it, in the order of ``names``.
        parts: Which parts of the model it belongs to (`list_parts`).
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    parts: frozenset[str] = field(default=frozenset())

    @property
    def name(self) -> str:
        """The name used in messages, checkpoints and ``param_names``."""
        return self.names[0]


def list_parts() -> dict[str, str]:
    """The parts of a model that a rule's ``part`` may name, each with what it is.

    Example:
        >>> print(*list_parts())
        bias norm embedding head hidden_matrix undecayed
    """
    return dict(_PARTS)


def named_parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """Every distinct parameter of the model with all of its names."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((_join(prefix, name), module))
    heads = _heads(model)
    undecayed = _named_undecayed(model)
    for parameter, places in found.items():
        names, modules = zip(*places, strict=True)
        parts = set(_parts_of(parameter, names, modules))
        if heads & {id(module) for module in modules} if heads else any(_HEAD.search(name) for name in names):
            parts.add("head")
            parts.discard("hidden_matrix")
        if undecayed.intersection(names):
            parts.add("undecayed")
        yield NamedParameter(parameter, names, modules, frozenset(parts))


def is_hidden_matrix(param: Tensor, names: Sequence[str] = (), modules: Sequence[nn.Module] = ()) -> bool:
    """Whether ``param`` maps hidden activations to hidden activations, and so may be orthogonalised.

    Convolution kernels do, flattened to output channels × the rest. Vectors do not (biases, norms, and whatever has
    more than one dimension but only one row or column, such as class tokens), nor embeddings and output layers, which
    are known by the module that holds them or, without a model to look at, by name (`NOT_HIDDEN`).

    Args:
        param: The parameter.
        names: Its names in the model, if known.
        modules: The modules that hold it, if known.

    Example:
        >>> is_hidden_matrix(nn.Linear(4, 4).weight, ["blocks.0.mlp.fc1.weight"])
        True
        >>> is_hidden_matrix(nn.Linear(4, 4).weight, ["head.weight"])
        False
    """
    if param.dim() < 2 or min(param.shape[0], param.numel() // max(param.shape[0], 1)) < 2:
        return False
    if any(_is_embedding(module) for module in modules):
        return False
    return not any(_NOT_HIDDEN.search(name) for name in names)


def _parts_of(parameter: nn.Parameter, names: Sequence[str], modules: Sequence[nn.Module]) -> Iterator[str]:
    bias = any(_BIAS.search(name) for name in names)
    norm = any(_is_norm(module) for module in modules)
    embedding = any(_is_embedding(module) for module in modules)
    kinds = {"bias": bias, "norm": norm, "embedding": embedding, "undecayed": bias or norm or embedding}
    yield from (kind for kind, holds in kinds.items() if holds)
    if is_hidden_matrix(parameter, names, modules):
        yield "hidden_matrix"


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    # By name, because every model family brings norms of its own (LlamaRMSNorm, LayerNorm2d, FrozenBatchNorm2d).
    return any(re.search(r"Norm(\dd)?$", base.__name__) for base in type(module).__mro__)


def _heads(model: nn.Module) -> set[int]:
    """The modules, by id, that the model itself, or its outermost part that has an opinion, says are its head."""
    for _, module in model.named_modules():
        for method in ("get_classifier", "get_output_embeddings"):
            if not callable(getattr(module, method, None)):
                continue
            answer = getattr(module, method)()
            given = answer if isinstance(answer, tuple | list) else [answer]
            heads = {id(part) for head in given if isinstance(head, nn.Module) for part in head.modules()}
            if heads:
                return heads
    return set()


def _named_undecayed(model: nn.Module) -> set[str]:
    return {
        _join(prefix, name)
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
