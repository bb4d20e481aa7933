"""Which recipes a model calls for, by what it is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_optim.core.typed import checked
from lightning_optim.core.wrappers import unwrap_module
from lightning_optim.tuning.recipes.anatomy import Anatomy, dissect


@dataclass(frozen=True)
class Recommendation:
    """A recipe that a model calls for.

    Args:
        recipe: Its name, for `lightning_optim.recipe`.
        reason: Why, and what to adapt, in a sentence or two.
        seen: What was found in the model, one fact each.
    """

    recipe: str
    reason: str
    seen: tuple[str, ...]


@checked
def recommend(model: nn.Module) -> list[Recommendation]:
    """Name one or two recipes for a model, by its layers, their names and shapes; the best first.

    Attention that is called as a function in ``forward`` is known by the names of its projections only. No forward pass
    is run, and nothing changes: neither parameters and buffers, nor random numbers, nor hooks. Of the model's methods,
    those that name its head and what is not decayed are asked (``get_classifier``, ``no_weight_decay``).

    Args:
        model: The module, a LightningModule or any other; its parameters may be on any device, or lazy.

    Returns:
        One or two recommendations; none for a model without layers that are known.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
        >>> for each in recommend(net):
        ...     print(each.recipe, "-", each.reason)
        resnet - Convolutions with BatchNorm.
    """
    found = dissect(unwrap_module(model))
    seen = tuple(_facts(found))
    for rule in _RULES:
        if answer := rule(found):
            return [Recommendation(name, reason + _reservation(found), seen) for name, reason in answer[:2]]
    return []


Answer = list[tuple[str, str]]


def _adapters(found: Anatomy) -> Answer:
    if not found.adapters or found.trained_share > 0.5:
        return []
    return [("lora", f"Adapters such as {found.adapters[0]!r} in a frozen model: {_trained(found)}.")]


def _frozen(found: Anatomy) -> Answer:
    if found.trainable == 0 or found.trained_share >= 0.5 or found.roles.keys() >= {"generator", "discriminator"}:
        return []
    if found.trained <= {"linear", "layer norm", "batch norm", "smooth activation", "rectifier", "other"}:
        return [("linear-probe", f"A head on a frozen model: {_trained(found)}.")]
    name = "bert-finetune" if found.layers["attention"] else "vision-finetune"
    return [(name, f"A pretrained model, part of it frozen: {_trained(found)}.")]


def _adversaries(found: Anatomy) -> Answer:
    discriminators = found.roles.get("discriminator", [])
    generators = found.roles.get("generator", [])
    if not generators and found.manual and "actor" not in found.roles:
        generators = [part for part in found.parts if part not in discriminators]
    if not generators or not discriminators:
        return []
    return [
        (
            "gan",
            f"Two networks against each other: write part: {_paths(generators)} for the generator, part: "
            f"{_paths(discriminators)} for the discriminator.",
        )
    ]


def _actor_and_critic(found: Anatomy) -> Answer:
    if not found.roles.keys() >= {"actor", "critic"}:
        return []
    actor, critic = (_paths(found.roles[role]) for role in ("actor", "critic"))
    return [("rl-policy-gradient", f"An actor in {actor}, a critic in {critic}.")]


def _sparse(found: Anatomy) -> Answer:
    if not found.sparse:
        return []
    return [("sparse-embeddings", f"The embedding {found.sparse[0]!r} gives sparse gradients.")]


def _tables(found: Anatomy) -> Answer:
    deep = found.layers["attention"] + found.layers["recurrent"] + found.layers["convolution"]
    if deep or found.layers["embedding"] == 0:
        return []
    if found.share("embedding") >= 0.8:
        return [("sparse-embeddings", f"Embedding tables have {found.share('embedding'):.0%} of the parameters.")]
    return []


def _time_steps(found: Anatomy) -> Answer:
    images = found.layers["convolution"] + found.layers["transposed"] > 1
    attends = found.layers["attention"] > 0 and found.layers["embedding"] == 0
    if not found.time_steps or not (images or attends or "adaLN" in found.time_steps) or found.layers["recurrent"]:
        return []
    return [("diffusion", f"A network that sees a time step, embedded in {found.time_steps!r}.")]


def _recurrence(found: Anatomy) -> Answer:
    if not found.layers["recurrent"] or found.share("attention") > found.share("recurrent"):
        return []
    return [("lstm", f"{_count(found, 'recurrent')} with {found.share('recurrent'):.0%} of the parameters.")]


def _attention(found: Anatomy) -> Answer:
    depthwise, convolutions = found.layers["depthwise"], found.layers["convolution"]
    layers = _count(found, "attention")
    if not found.layers["attention"] or _is_convolutional(found):
        return []
    if found.vocabulary == 0:
        if depthwise and convolutions and not found.layers["image"]:
            return [("speech", f"{layers} and convolutions in each block, as in a Conformer.")]
        what = "image patches" if found.layers["image"] else "inputs that are no tokens"
        return [("vit", f"{layers} over {what}.")]
    if found.crossing:
        several = f"An encoder and a decoder: {layers} over a vocabulary of {found.vocabulary:,}."
        hears = [("speech", f"{several} Convolutions read its input.")] if convolutions else []
        return [*hears, ("t5", several)]
    if found.layers["image"]:
        return [("vit", f"{layers} over image patches and a vocabulary of {found.vocabulary:,}.")]
    finetuned = any(re.search(r"For(Sequence|Token|MultipleChoice|Question)", name) for name in found.classes)
    if finetuned or (0 < found.outputs < found.vocabulary / 2 and found.outputs <= 1000):
        return [
            (
                "bert-finetune",
                f"{layers} over a vocabulary of {found.vocabulary:,}, and a head of {found.outputs:,} outputs, as in "
                "fine-tuning. From scratch: the recipe gpt.",
            )
        ]
    return _language_model(f"{layers} over a vocabulary of {found.vocabulary:,}", found)


def _mixers(found: Anatomy) -> Answer:
    """Language models without attention, as state spaces are."""
    if found.vocabulary == 0 or found.outputs != found.vocabulary or not _norms(found):
        return []
    return _language_model(f"Layers from a vocabulary of {found.vocabulary:,} to itself", found)


def _language_model(what: str, found: Anatomy) -> Answer:
    muon = "The same; Muon for the hidden matrices, at the rate of AdamW."
    return [("gpt", f"{what}; {_rate(found)}"), ("gpt-muon", muon)]


def _norms(found: Anatomy) -> int:
    return sum(count for kind, count in found.layers.items() if kind.endswith("norm"))


def _convolutions(found: Anatomy) -> Answer:
    convolutions = found.layers["convolution"] + found.layers["depthwise"]
    if not convolutions and not found.layers["transposed"]:
        return []
    rises = found.layers["transposed"] + found.layers["upsampling"]
    if rises and not found.linear_head and found.share("linear") < 0.5:
        return [("segmentation", f"Convolutions down and up again ({rises} that widen), as in a U-Net.")]
    if found.layers["patch"] == convolutions and found.share("linear") > 0.5:
        return [("vit", "Image patches that linear layers mix.")]
    batch, others = found.layers["batch norm"], found.layers["layer norm"] + found.layers["rms norm"]
    if found.layers["depthwise"] and others > batch:
        return [("convnext", "Depthwise convolutions with LayerNorm.")]
    if batch:
        return [("resnet", "Convolutions with BatchNorm.")]
    if found.layers["depthwise"] or others:
        return [("convnext", "Convolutions without BatchNorm.")]
    reason = "Convolutions without BatchNorm: add `clip: {method: agc}`, or halve the rate if the loss rises."
    return [("resnet", reason)]


def _perceptrons(found: Anatomy) -> Answer:
    if not found.layers["linear"]:
        return [("mlp", "Embeddings without further layers.")] if found.layers["embedding"] else []
    smooth = found.layers["smooth activation"] and not found.layers["rectifier"]
    mlp = ("mlp", f"{_count(found, 'linear')} of a perceptron.")
    if smooth and not _norms(found) and 0 < found.inputs <= 4 and found.layers["linear"] > 2 and found.outputs <= 8:
        return [
            ("pinn", f"A smooth perceptron of {found.inputs} coordinates. If no derivatives are in the loss: mlp."),
            mlp,
        ]
    return [mlp]


_RULES: tuple[Callable[[Anatomy], Answer], ...] = (
    _adapters,
    _adversaries,
    _frozen,
    _actor_and_critic,
    _sparse,
    _time_steps,
    _recurrence,
    _attention,
    _mixers,
    _tables,
    _convolutions,
    _perceptrons,
)
"""What is asked, in this order; the first with an answer decides."""


def _is_convolutional(found: Anatomy) -> bool:
    """Whether convolutions do most of the work, and attention is one layer among them."""
    kernels = found.share("convolution", "depthwise", "transposed")
    return found.layers["convolution"] > 2 and kernels > 2 * found.share("attention") and kernels > 0.5


def in_brief(found: list[Recommendation]) -> str:
    """Return recommendations in one line: the command that prints the first, the others by name, and why.

    Args:
        found: One recommendation at least.

    Example:
        >>> in_brief(recommend(nn.LSTM(4, 4)))
        'lightning-optim recipe lstm (1 recurrent layer with 100% of the parameters)'
    """
    others = "".join(f" or {each.recipe}" for each in found[1:])
    return f"lightning-optim recipe {found[0].recipe}{others} ({re.split(r'[.;:](?: |$)', found[0].reason)[0]})"


def _paths(paths: list[str]) -> str:
    """Paths as YAML has them."""
    return paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]"


def _trained(found: Anatomy) -> str:
    return f"{found.trainable:,} of {found.numel:,} parameters are trained"


def _rate(found: Anatomy) -> str:
    """What the size means for the rate of the recipe gpt."""
    if found.numel == 0 or found.lazy:
        return "the rate depends on the size, see the recipe."
    hidden = max(found.numel - found.shares["embedding"], 1)
    if hidden >= 100_000_000:
        return f"{found.numel:,} parameters: the rate by size is in the recipe."
    rate = 0.003239 - 0.0001395 * math.log(hidden)
    return f"for {hidden:,} parameters without embeddings lr {rate:.1e}, see the recipe."


def _count(found: Anatomy, kind: str) -> str:
    count = found.layers[kind]
    return f"{count:,} {kind} layer{'s' if count > 1 else ''}"


_UNSHOWN = ("smooth activation", "rectifier", "image", "patch")


def _facts(found: Anatomy) -> list[str]:
    facts = [_trained(found) if found.trainable < found.numel else f"{found.numel:,} parameters"]
    facts += [_count(found, kind) for kind, count in found.layers.most_common() if count and kind not in _UNSHOWN]
    if found.vocabulary:
        facts.append(f"embeddings of up to {found.vocabulary:,} rows")
    facts += [f"sparse gradients of {name!r}" for name in found.sparse]
    facts += [f"{role} in {_paths(paths)}" for role, paths in found.roles.items()]
    if found.manual:
        facts.append("manual optimization")
    if found.lazy:
        facts.append(f"{found.lazy:,} parameters without a shape yet")
    if found.dtypes - {"float32"}:
        facts.append(f"parameters in {', '.join(sorted(found.dtypes))}")
    return facts


def _reservation(found: Anatomy) -> str:
    """What limits every recommendation, as further sentences."""
    text = ""
    if found.dtypes and found.dtypes <= {"bfloat16", "float16"}:
        text += f" Parameters in {', '.join(sorted(found.dtypes))} lose small updates: set kahan_sum, or keep 32 bits."
    if found.lazy:
        text += " Some layers have no shape yet, so the sizes are not known."
    return text
