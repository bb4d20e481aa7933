"""The parameters of a model as rules see them: names, modules, and the part of the model that each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_optim.param_groups.heads import is_head_name, last_linear, output_layers

NOT_HIDDEN = {
    "embedding": r"(^|[._])(\w*embed(ding)?s?|embed_\w+|wte|wpe)([._]|$)|(^|\.)relative_attention_bias\.",
    "table": r"(^|\.)(\w*_?table|(\w+_)?pos(itions?|itional)?(_?(emb\w*|enc\w*|bias\w*|[hw]))?|rel(ative)?_\w+|alibi\w*"
    r"|\w*_?(tokens?|latents?|queries|prototypes?|codebooks?|prompts?)|query|\w*bias(es)?(_\w+)?)$",
    "state space": r"(^|\.)((log_)?A(_?logs?|_real|_imag|_re|_im)|log_A\w*|(?-i:Ds?)|log_dt|inv_dt|dt_bias"
    r"|time_(decay|first|faaaa|mix_\w+))$",
}
"""Names of matrices that are not hidden, by kind. Tables and numbers of state spaces are direct parameters of a module,
without `.weight` at the end of the name."""

_NOT_HIDDEN = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in NOT_HIDDEN.items()}
_BIAS = re.compile(r"(^|[._])bias(_[^.]*)?$")  # bias, in_proj_bias, bias_ih_l0

_PARTS = {
    "bias": "biases of any layer",
    "norm": "normalisation layers of any family, weights and biases",
    "embedding": "nn.Embedding and nn.EmbeddingBag",
    "head": "the output layer: that which the model returns itself (timm's get_classifier, Hugging Face's "
    "get_output_embeddings), else one that is called head, lm_head, classifier, fc or the like, shares an "
    "embedding's weight, or is the last linear layer at the top of the model",
    "hidden_matrix": "matrices and kernels between hidden activations: neither vectors, embeddings and other tables, "
    "depthwise kernels nor the head",
    "undecayed": "biases, norms, embeddings, and the parameters that timm's no_weight_decay() of the model names",
}


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the rules see it.

    Args:
        parameter: The parameter itself.
        names: All of its names in the model, in order; a tied weight has several.
        modules: The modules that hold it, in the order of ``names``.
        parts: Parts of the model that it belongs to (`list_parts`).
        not_hidden: Its kind, as returned by `why_not_hidden`, if it is not a hidden matrix.
        ndim: Its number of dimensions, which is known of a lazy layer before its shape is; None for the parameter's.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    parts: frozenset[str] = field(default=frozenset())
    not_hidden: str | None = None
    ndim: int | None = None

    @property
    def dim(self) -> int:
        """Its number of dimensions."""
        return self.parameter.ndim if self.ndim is None else self.ndim

    @property
    def name(self) -> str:
        """The name used in messages, checkpoints and ``param_names``."""
        return self.names[0]


def list_parts() -> dict[str, str]:
    """Return the parts of a model that a rule's ``part`` may name, each with a description.

    Example:
        >>> print(*list_parts())
        bias norm embedding head hidden_matrix undecayed
    """
    return dict(_PARTS)


def named_parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """Yield every distinct parameter of the model with all of its names."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((_join(prefix, name), module))
    seen = []
    for parameter, places in found.items():
        names, modules = zip(*places, strict=True)
        form = _form_of(parameter, names[0], modules[0])
        reason = why_not_hidden(form, names, modules)
        seen.append(NamedParameter(parameter, names, modules, frozenset(_parts_of(names, modules)), reason, form.dim()))
    heads = output_layers(model)
    trained = any(one.parameter.requires_grad and not heads.isdisjoint(map(id, one.modules)) for one in seen)
    last = None if trained else last_linear(model)  # A frozen head may be that of a teacher.
    if last is not None and any(one.not_hidden is None and one.parameter is not last.weight for one in seen):
        heads = heads | {id(last)}
    undecayed = _named_undecayed(model)
    for one in seen:
        parts, reason = set(one.parts), one.not_hidden
        if any(id(module) in heads for module in one.modules):
            parts.add("head")
            reason = reason or "output layer"
        if reason is None:
            parts.add("hidden_matrix")
        if undecayed.intersection(one.names):
            parts.add("undecayed")
        yield replace(one, parts=frozenset(parts), not_hidden=reason)


def is_hidden_matrix(param: Tensor, names: Sequence[str] = (), modules: Sequence[nn.Module] = ()) -> bool:
    """Return whether ``param`` maps hidden activations to hidden activations, and so may be orthogonalised.

    `why_not_hidden` gives the reason if it does not.

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
    return why_not_hidden(param, names, modules) is None


def why_not_hidden(param: Tensor, names: Sequence[str] = (), modules: Sequence[nn.Module] = ()) -> str | None:
    """Return the kind of ``param`` if it is not a hidden matrix; None if it is one.

    Hidden matrices are the weights of linear layers and convolutions, and stacks of such weights. They do not include
    vectors (biases, norms, and tensors with more than one dimension but only one row or column, such as class tokens);
    depthwise kernels, each of which reads one channel only; or embeddings, output layers, tables of positions and
    tokens, and the numbers of state spaces, which are recognised by the module that holds them or by their name
    (`NOT_HIDDEN`, `heads.HEAD`).

    Args:
        param: The parameter.
        names: Its names in the model, if known.
        modules: The modules that hold it, if known.

    Returns:
        `vector`, `embedding`, `norm`, `depthwise kernel`, `table`, `state space` or `output layer`.

    Example:
        >>> why_not_hidden(nn.Embedding(4, 4).weight, ["words.weight"], [nn.Embedding(4, 4)])
        'embedding'
    """
    rows, rest = (param.shape[0], param.shape[1:].numel()) if param.dim() else (1, 1)
    if param.dim() < 2 or min(rows, rest) < 2 or (is_stack(param, modules) and min(param.shape[-2:]) < 2):
        return "vector"
    if any(map(_is_embedding, modules)):
        return "embedding"
    if any(map(_is_norm, modules)):
        return "norm"
    if any(map(_is_depthwise, modules)) if modules else param.dim() > 2 and param.shape[1] == 1:
        return "depthwise kernel"
    for kind, pattern in _NOT_HIDDEN.items():
        if any(map(pattern.search, names)):
            return kind
    return "output layer" if any(map(is_head_name, names)) else None


def is_stack(param: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Return whether ``param`` holds several matrices, such as one per expert, and not the kernel of a convolution.

    Args:
        param: The parameter.
        modules: The modules that hold it; if none is known, the result is False.
    """
    return param.dim() > 2 and bool(modules) and not any(map(_is_convolution, modules))


def _parts_of(names: Sequence[str], modules: Sequence[nn.Module]) -> Iterator[str]:
    bias = any(_BIAS.search(name) for name in names)
    norm = any(_is_norm(module) for module in modules)
    embedding = any(_is_embedding(module) for module in modules)
    kinds = {"bias": bias, "norm": norm, "embedding": embedding, "undecayed": bias or norm or embedding}
    yield from (kind for kind, holds in kinds.items() if holds)


def _is_convolution(module: nn.Module) -> bool:
    # The name counts as well, because libraries have their own convolutions that do not subclass torch's.
    named = any(re.search(r"Conv(Transpose)?\d?d", base.__name__) for base in type(module).__mro__)
    return named or isinstance(module, nn.modules.conv._ConvNd)


def _is_depthwise(module: nn.Module) -> bool:
    return _is_convolution(module) and 1 < getattr(module, "groups", 1) == getattr(module, "in_channels", None)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    # The name counts, because every model family has its own norms (LlamaRMSNorm, LayerNorm2d, FrozenBatchNorm2d).
    return any(re.search(r"Norm(\dd)?$", base.__name__) for base in type(module).__mro__)


def _form_of(parameter: nn.Parameter, name: str, module: nn.Module) -> Tensor:
    """The parameter, or for one of a lazy layer a tensor of as many dimensions, whose sizes mean nothing."""
    if not isinstance(parameter, UninitializedParameter):
        return parameter
    becomes = getattr(module, "cls_to_become", None)
    kernel = re.fullmatch(r"Conv(?:Transpose)?(\d)d", getattr(becomes, "__name__", ""))
    if name.rpartition(".")[2] == "bias" or _is_norm(module):
        ndim = 1
    elif becomes is nn.Linear:
        ndim = 2
    elif kernel is not None:
        ndim = 2 + int(kernel[1])
    else:
        raise ValueError(
            f"The parameter {name!r} of a {type(module).__name__} has no shape yet, and groups need the number of "
            "dimensions. Run one batch through the model before its optimizer is made, for instance "
            "`self(torch.zeros(1, ...))` in the `configure_model` of a LightningModule."
        )
    return torch.empty((2,) * ndim, device="meta")


def _named_undecayed(model: nn.Module) -> set[str]:
    return {
        _join(prefix, name)
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
