"""What a torch function does, for a look at a model: whether it has weights, normalises, activates or only reshapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LINEAR = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm"}
NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
RECTIFIERS = {"relu", "relu6", "threshold", "clamp_min"}
"""Activations that are exactly zero below zero."""
SIGMOIDAL = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0), "hardtanh": (-1.0, 1.0)}
"""Activations with two flat ends, and where these are."""
SMOOTH = {"gelu": -4.0, "silu": -12.0, "mish": -12.0, "hardswish": -3.0, "selu": -8.0, "elu": -8.0, "celu": -8.0}
"""Activations that are flat below a value, at which their slope is about 0."""
OTHER_ACTIVATIONS = {"leaky_relu", "prelu", "rrelu", "softplus", "softsign", "tanhshrink", "logsigmoid", "glu"}
ACTIVATIONS = RECTIFIERS | SIGMOIDAL.keys() | SMOOTH.keys() | OTHER_ACTIVATIONS
SOFTMAX = {"softmax", "log_softmax", "softmin", "gumbel_softmax"}
VIEWS = {
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "t",
        "T",
    ),
    *("mT", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda", "clone", "chunk", "split"),
    *(
        "__getitem__",
        "unbind",
        "narrow",
        "select",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "movedim",
        "swapaxes",
    ),
    *("swapdims", "alias", "tensor_split", "detach", "data", "requires_grad", "requires_grad_", "dropout", "identity"),
    *("alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d", "take_along_dim", "index_select"),
}
"""Functions whose result holds the same numbers, or some of them; dropout counts as one."""
RESHAPES = VIEWS - {"dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"}
DETACHING = {"detach", "data"}
RECURRENT = {"gru", "lstm", "rnn_tanh", "rnn_relu", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"}
ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
LOSSES = {
    *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
}
DIFFERENCES = {"sub", "subtract", "__sub__", "__rsub__", "rsub"}


def name_of(func: Any) -> str:
    """Return the name of a torch function, without what marks it as in place; that of a property is the property's.

    Args:
        func: The function that torch hands to a `TorchFunctionMode`.
    """
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    if name.startswith("__"):
        return name
    plain = name.strip("_")
    return plain


def kind_of(name: str) -> str:
    """Return the kind of a function by its name: ``"other"`` for what nothing is known of."""
    for kind, names in _KINDS.items():
        if name in names:
            return kind
    return "other"


_KINDS: Mapping[str, Any] = {
    "view": VIEWS,
    "activation": ACTIVATIONS,
    "linear": LINEAR,
    "product": PRODUCTS,
    "norm": NORMS,
    "softmax": SOFTMAX,
    "embedding": {"embedding", "embedding_bag"},
    "recurrent": RECURRENT,
    "attention": ATTENTION,
    "loss": LOSSES,
    "add": {"add", "__add__", "__iadd__", "__radd__", "cat", "concat", "concatenate", "stack", *DIFFERENCES},
    "backward": {"backward"},
}


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any = None) -> Any:
    """Return an argument, however it was passed.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        index: Its place.
        name: Its name.
        default: What is returned where it was not passed.
    """
    if name in kwargs:
        return kwargs[name]
    return args[index] if index < len(args) else default


@dataclass(frozen=True)
class Fans:
    """Numbers of inputs and outputs of a weight, as He and Glorot count them.

    Args:
        inputs: Inputs of one output.
        outputs: Outputs that one input reaches.
        rows: The dimension of the weight that counts its units.
    """

    inputs: float
    outputs: float
    rows: int = 0


def fans(name: str, weight: Tensor, groups: int, stride: Any) -> Fans | None:
    """Return the fans of a weight, or None for one without.

    Args:
        name: The function.
        weight: Its weight: [outputs, inputs, ...] of a linear or convolution, [inputs, outputs] of a product.
        groups: Groups of a convolution.
        stride: Stride of a convolution.
    """
    shape = weight.shape
    if weight.ndim < 2 or weight.numel() == 0:
        return None
    if name in PRODUCTS:
        return Fans(shape[-2], shape[-1], weight.ndim - 1)
    kernel = math.prod(shape[2:])
    if name.startswith("conv_transpose"):
        steps = math.prod(stride) if isinstance(stride, tuple | list) else int(stride) ** (weight.ndim - 2)
        return Fans(max(shape[0] / groups * kernel / steps, 1.0), shape[1] * kernel, 1)
    return Fans(shape[1] * kernel, shape[0] / groups * kernel)


QUIET = frozenset(
    [
        "shape", "dtype", "device", "is_leaf", "grad_fn", "ndim", "layout", "is_cuda", "is_sparse", "size", "dim",
        "numel", "stride", "is_floating_point", "is_complex", "__len__", "__set__", "register_hook",
        "is_contiguous", "is_nested", "__repr__", "item", "tolist", "__bool__", "__float__", "__int__", "numpy",
        "is_meta", "has_names", "is_mkldnn", "is_quantized", "is_mps", "is_xla", "names", "__format__", "__hash__",
        "_version",
    ]
)  # fmt: skip
"""Functions that ask a tensor what it is, and compute nothing."""
