"""What a module is made of, read from its submodules, its parameters and their names; nothing runs, nothing changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_optim.param_groups import named_parameters

_ATTENTION_CLASS = re.compile(r"Attention|Attn|(?<![a-z])MHA(?![a-z])")
_FUSED = re.compile(r"^(in_proj_weight|qkv(_proj)?|c_attn|to_qkv|query_key_value|Wqkv|att_proj)$")
_QUERY = re.compile(r"^(q|query|q_proj|to_q|wq|W_q|q_lin|query_proj|q_a_proj|q_b_proj)$")
_KEY = re.compile(r"^(k|key|k_proj|to_k|wk|W_k|k_lin|key_proj|kv_proj|to_kv|kv|kv_a_proj\w*)$")
_CROSS = re.compile(
    r"^(encoder_attn|cross_?attn|cross_?attention|EncDecAttention|encdec_attn|multihead_attn)$", re.IGNORECASE
)
_RECURRENT_CLASS = re.compile(r"(LSTM|GRU|RNN)(Cell)?$")
_LORA = re.compile(r"(^|[._])(lora|loha|lokr|adapter)s?([._]|$)|(^|[._])lora_|LoRA", re.IGNORECASE)
_LORA_CLASS = re.compile(r"lora(?![a-z])|LoRA|Adapter")
_TIME_STEP = re.compile(
    r"(^|[._])(timesteps?|t|time|sigma|noise)_?(emb(ed(d(er|ing))?)?s?|mlp|proj)([._]|$)|t_embedder|adaLN",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"(^|[._])(teacher|ema|target|momentum|avg|average[ds]?|lpips|perceptual|loss(es)?|criterion|metrics?)([._]|$)",
    re.IGNORECASE,
)
"""Parts whose parameters are frozen because nothing is to train them: averages of the weights, and what measures."""
_NO_TOKENS = re.compile(
    r"pos(ition(al|s)?)?([._]|$)|wpe|time|hour|day|week|month|year|season|segment|type|class|label|level|depth|scale|rel(ative)?_",
    re.IGNORECASE,
)
"""Names of embeddings of something else than tokens."""
_ROLES = {
    "generator": re.compile(r"^(?i:gen(erator)?s?|net_?g|g_?net|g_model)(_.*)?$|^G(_.*)?$"),
    "discriminator": re.compile(r"^(?i:disc(riminator)?s?|net_?d|d_?net|d_model|critics?)(_.*)?$|^D(_.*)?$"),
    "actor": re.compile(r"^(actor|policy|pi)(_?(net|head|mean|logits|mlp|fc))?$", re.IGNORECASE),
    "critic": re.compile(r"^(critic|values?|vf|v)(_?(net|head|fn|function|mlp|fc))?$", re.IGNORECASE),
}
_SMOOTH = (nn.Tanh, nn.SiLU, nn.Softplus, nn.GELU)
_RECTIFIED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


@dataclass
class Anatomy:
    """What was found in a module.

    Args:
        numel: Numbers in its parameters, as far as their shapes are known.
        trainable: Those of them that are trained.
        layers: How many layers there are of each kind: ``convolution``, ``depthwise``, ``transposed``, ``attention``,
            ``recurrent``, ``linear``, ``embedding``, ``batch norm``, ``layer norm``, ...; and ``image``, those of the
            convolutions that have two or three dimensions, and ``patch``, whose kernels do not overlap.
        shares: Numbers in the parameters of each kind.
        trained: Which kinds have parameters that are trained.
        dtypes: Names of the floating-point types of the parameters.
        lazy: Parameters that have no shape yet.
        vocabulary: Rows of the largest embedding of tokens; 0 if there is none.
        sparse: Names of embeddings that give sparse gradients.
        roles: Paths of the submodules in each role of two networks: ``generator``, ``discriminator``, ``actor``,
            ``critic``.
        parts: Paths of all submodules at the top that are trained.
        adapters: Names of parameters of low-rank adapters.
        crossing: Whether some attention sees another sequence, as that of a decoder does.
        time_steps: Name of a submodule that embeds a time step; empty if there is none.
        inputs: Inputs of the first linear layer; 0 if there is none.
        outputs: Outputs of the head; 0 if none is recognised.
        linear_head: Whether the head is a matrix.
        classes: Names of the classes of all submodules.
        manual: Whether the module optimizes manually.
    """

    numel: int = 0
    trainable: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    shares: Counter[str] = field(default_factory=Counter)
    trained: set[str] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)
    lazy: int = 0
    vocabulary: int = 0
    sparse: list[str] = field(default_factory=list)
    roles: dict[str, list[str]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    crossing: bool = False
    time_steps: str = ""
    inputs: int = 0
    outputs: int = 0
    linear_head: bool = False
    classes: set[str] = field(default_factory=set)
    manual: bool = False

    def share(self, *kinds: str) -> float:
        """The share of all parameters that layers of these kinds have, 0 to 1."""
        return sum(self.shares[kind] for kind in kinds) / max(self.numel, 1)

    @property
    def trained_share(self) -> float:
        """The share of the parameters that is trained, 0 to 1."""
        return self.trainable / max(self.numel, 1)


def dissect(model: nn.Module) -> Anatomy:
    """Read what ``model`` is made of, from names, classes and shapes.

    Args:
        model: The module. It is neither called nor changed.

    Example:
        >>> found = dissect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> found.layers["convolution"], found.layers["batch norm"], found.numel
        (1, 1, 240)
    """
    found = Anatomy(manual=not getattr(model, "automatic_optimization", True))
    aside = {id(part) for module in _aside(model) for part in module.modules()}
    attention = {name for name in _attention(model) if id(model.get_submodule(name)) not in aside}
    for name, module in model.named_modules():
        if id(module) in aside:
            continue
        found.classes.add(type(module).__name__)
        own = list(module.parameters(recurse=False))
        inside = any(name == prefix or name.startswith(f"{prefix}.") for prefix in attention)
        kind = "attention" if inside and own else _kind(module)
        if kind is None:
            kind = "other"
        elif kind != "attention":
            found.layers[kind] += 1
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            found.layers["image"] += 1
            found.layers["patch"] += 1 < max(module.kernel_size) == max(module.stride)
        found.shares[kind] += sum(_numel(param) for param in own)
        if any(param.requires_grad for param in own):
            found.trained.add(kind)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if not _NO_TOKENS.search(name):
                found.vocabulary = max(found.vocabulary, module.num_embeddings)
            if module.sparse and module.weight.requires_grad:
                found.sparse.append(name or type(module).__name__)
        if isinstance(module, nn.Linear) and not found.inputs and not isinstance(module, nn.LazyLinear):
            found.inputs = module.in_features
        found.crossing |= bool(attention) and _CROSS.search(name.rpartition(".")[2]) is not None
        if not found.time_steps and name and _TIME_STEP.search(name):
            found.time_steps = name
    found.layers["attention"] = len(attention)
    _count_parameters(found, model, aside)
    found.roles, found.parts = _roles_of(model)
    return found


def _aside(model: nn.Module) -> Iterator[nn.Module]:
    """Frozen parts that are there to compare with, and not to be trained."""
    for name, module in model.named_modules():
        if _ASIDE.search(name) and not any(param.requires_grad for param in module.parameters()):
            yield module


def _count_parameters(found: Anatomy, model: nn.Module, aside: set[int]) -> None:
    """Count the parameters, and find those of adapters and of the head."""
    own = [p for module in model.modules() if id(module) not in aside for p in module.parameters(recurse=False)]
    for param in dict.fromkeys(own):
        found.numel += _numel(param)
        found.trainable += _numel(param) if param.requires_grad else 0
        found.lazy += isinstance(param, UninitializedParameter)
        if param.is_floating_point():
            found.dtypes.add(str(param.dtype).removeprefix("torch."))
    adapted = {name for name, module in model.named_modules() if _LORA_CLASS.search(type(module).__name__)}
    for name, param in model.named_parameters():
        holder = name.rpartition(".")[0]
        if param.requires_grad and (_LORA.search(name) or holder in adapted):
            found.adapters.append(name)
    if not found.lazy:
        for one in named_parameters(model):
            if "head" in one.parts and one.dim >= 2:
                found.outputs, found.linear_head = int(one.parameter.shape[0]), one.dim == 2


def _kind(module: nn.Module) -> str | None:
    """The kind of a layer with parameters, or of an activation; None for a container."""
    name = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed"
    if isinstance(module, nn.modules.conv._ConvNd):
        if 1 < module.groups == module.in_channels:
            return "depthwise"
        return "convolution"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) or _RECURRENT_CLASS.search(name):
        return "recurrent"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.Linear | nn.Bilinear) or re.search(r"Linear(\dbit)?(Lt)?$|^Conv1D$", name):
        return "linear"
    if norm := re.search(r"(Batch|Layer|Group|Instance|RMS|)Norm(Act)?(\dd)?$", name):
        return f"{norm[1].lower() or 'other'} norm"
    if isinstance(module, _SMOOTH) or re.search(r"^(Sin|Sine|Siren|SinActivation)$", name):
        return "smooth activation"
    if isinstance(module, _RECTIFIED):
        return "rectifier"
    if isinstance(module, nn.Upsample | nn.PixelShuffle):
        return "upsampling"
    return None


def _attention(model: nn.Module) -> Iterator[str]:
    """Names of modules that attend: by class, or by projections to queries and keys among their children."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in outer):
            continue
        children = {key for key, child in module.named_children()} | {
            key for key, _ in module.named_parameters(recurse=False)
        }
        by_name = any(map(_FUSED.search, children)) or (
            any(map(_QUERY.search, children)) and any(map(_KEY.search, children))
        )
        by_class = _ATTENTION_CLASS.search(type(module).__name__) and _small(module)
        if name and (isinstance(module, nn.MultiheadAttention) or by_name or by_class):
            outer.append(name)
            yield name


def _small(module: nn.Module) -> bool:
    """Whether a class of such a name is a layer, with few parts, and no model as `AttentionUNet` is."""
    modules = sum(1 for _ in module.modules())
    return modules <= 12 and any(True for _ in module.parameters())


def _roles_of(model: nn.Module) -> tuple[dict[str, list[str]], list[str]]:
    """Paths of the parts that play the roles of two networks, and of all parts that are trained.

    Parts are the children of the model; of a module with a single child, that one's.
    """
    holder, prefix = model, ""
    while len(children := list(holder.named_children())) == 1:
        holder, prefix = children[0][1], f"{prefix}{children[0][0]}."
    trained = [name for name, child in children if any(param.requires_grad for param in child.parameters())]
    roles = {role: [prefix + name for name in trained if pattern.search(name)] for role, pattern in _ROLES.items()}
    return {role: paths for role, paths in roles.items() if paths}, [prefix + name for name in trained]


def _numel(param: Tensor) -> int:
    return 0 if isinstance(param, UninitializedParameter) else int(torch.Size(param.shape).numel())
