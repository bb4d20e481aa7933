"""What a look may find, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something about a model that stands against its training.

    Args:
        kind: What it is, in one word: ``"large-weights"``; the page "Look at the model before training" lists all.
        where: Module, parameter or function.
        seen: What was seen, with its numbers.
        why: Why it matters.
        advice: What to do.
        level: ``"problem"``, or ``"note"`` for what costs little.
        further: Further places of the same finding.
    """

    kind: str
    where: str
    seen: str
    why: str
    advice: str
    level: Literal["problem", "note"] = "problem"
    further: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.seen} {self.why} {self.advice}"


_TEXTS: dict[str, tuple[str, str]] = {
    "non-finite-input": (
        "One such number makes the loss and all gradients NaN.",
        "Drop or fill the samples that have it, before the loader.",
    ),
    "non-finite-activation": (
        "All that is computed from it is not finite either, and neither are loss and gradients.",
        "Look for a division by zero, the log or root of a number that may be 0, an exponential of a large one, or "
        "16-bit overflow there.",
    ),
    "input-scale": (
        "The first layer's outputs, and the gradients of its weights, grow with its inputs (LeCun et al. 1998).",
        "Normalise the inputs to mean 0 and standard deviation 1, or begin with a normalisation.",
    ),
    "constant-input": (
        "Nothing in it tells one sample from another, so that nothing but their average can be learnt.",
        "Look at a batch of the loader: a mask, a scale or a conversion of dtype has taken the content.",
    ),
    "unregistered-weights": (
        "The optimizer gets parameters(), and checkpoints state_dict(): these weights are neither trained nor saved.",
        "Put layers into nn.ModuleList or nn.ModuleDict in place of a list or dict; make a tensor an nn.Parameter.",
    ),
    "zero-weights": (
        "Its inputs are the same for all units, so all units stay equal or get no gradient at all (Glorot and Bengio "
        "2010). Zero is good for the last layer of a residual branch, where inputs differ.",
        "Initialise it at random, as nn.init.kaiming_normal_ does.",
    ),
    "identical-units": (
        "Equal units compute the same and, behind them, are told apart by the next layer's weights alone.",
        "Initialise each unit at random.",
    ),
    "large-weights": (
        "Outputs grow by this factor in each such layer, and the gradients with them (He et al. 2015; Glorot and "
        "Bengio 2010).",
        "Initialise with the gain of the activation (nn.init.kaiming_normal_, xavier_normal_), or normalise after it.",
    ),
    "small-weights": (
        "The signal and the gradients shrink by this factor in each such layer (He et al. 2015).",
        "Initialise with the gain of the activation (nn.init.kaiming_normal_, xavier_normal_), or normalise after it.",
    ),
    "vanishing-activations": (
        "What differs between samples is lost on the way, and with it the gradients of the first layers.",
        "Put a normalisation or residual connections between the layers (Ioffe and Szegedy 2015; He et al. 2016), or "
        "initialise for the activation (He et al. 2015).",
    ),
    "exploding-activations": (
        "Outputs and gradients grow with depth, so that no learning rate suits all layers.",
        "Put a normalisation between the layers (Ioffe and Szegedy 2015), or initialise for the activation (He et al. "
        "2015).",
    ),
    "vanishing-gradients": (
        "The first layers hardly learn while the last ones do (Glorot and Bengio 2010).",
        "Use ReLU, GELU or SiLU in place of sigmoid or tanh in hidden layers, with a normalisation or residual "
        "connections.",
    ),
    "exploding-gradients": (
        "The first layers' gradients swamp all others (Pascanu et al. 2013).",
        "Initialise for the activation, normalise between the layers, and clip gradients.",
    ),
    "saturated-units": (
        "Near its ends a sigmoid or tanh is flat, so hardly any gradient comes through (Glorot and Bengio 2010).",
        "Make what goes in smaller: normalise before it, or initialise with gain 1 (xavier_normal_).",
    ),
    "dead-units": (
        "A unit that is flat for every sample gets no gradient and stays as it is (Maas et al. 2013).",
        "Initialise biases with 0, look at the scale of the inputs, or use LeakyReLU or GELU.",
    ),
    "frozen-in-the-middle": (
        "It does not require a gradient, and the layers around it do.",
        "If that is a mistake: requires_grad_(True).",
    ),
    "unused-parameters": (
        "They never got a gradient: no step uses them. The optimizer only keeps them, decay aside, and "
        "DistributedDataParallel stops on them.",
        "Call the module in forward, remove it, or freeze it.",
    ),
    "no-gradient": (
        "They are trainable and used, and no gradient arrives.",
        "Look for detach(), .data, .item(), torch.no_grad() or argmax between them and the loss; freeze them if they "
        "are not to learn.",
    ),
    "nothing-trainable": (
        "Nothing that is computed asks for a gradient.",
        "Unfreeze what is to learn; look for detach() or no_grad() around the model.",
    ),
    "output-scale": (
        "The model is sure of its guesses before it has learned, so the first steps only unlearn that.",
        "Initialise the last layer smaller, or divide its outputs.",
    ),
    "tied-head": (
        "nn.Embedding starts with a standard deviation of 1, which is √width times too large for a head.",
        "Initialise it with a standard deviation of 0.02 (GPT-2) or 1/√width.",
    ),
    "loss-start": (
        "A model that knows nothing gives about the loss of chance.",
        "Look at targets and the order of classes, and at what is added to the loss.",
    ),
    "loss-reduction": (
        "Loss and gradients then depend on the batch size, and so do learning rate and clipping.",
        "Use the mean over all samples, once.",
    ),
    "target-range": (
        "Such a target is no class, or no probability.",
        "Number classes from 0, set ignore_index for what is to be left out, and give as many outputs as classes.",
    ),
    "target-dtype": (
        "cross_entropy takes class indices of an integer dtype, or probabilities of the shape of the predictions.",
        "Convert the targets with .long().",
    ),
    "one-hot-targets": (
        "cross_entropy takes class indices, or probabilities of a floating dtype.",
        "Give the indices, targets.argmax(1), or targets.float().",
    ),
    "targets-not-probabilities": (
        "For targets of the shape of the predictions, cross_entropy takes probabilities, which sum to 1 per sample.",
        "For several labels per sample use binary_cross_entropy_with_logits; else divide each by its sum.",
    ),
    "target-scale": (
        "The model starts near 0 and has to travel far, while the loss is that of the distance alone.",
        "Train on (target - mean) / std, and invert it on the outputs.",
    ),
    "shape-mismatch": (
        "Shapes that broadcast compare each prediction with each target, and the model learns the mean.",
        "Make both shapes equal, for instance outputs.squeeze(-1) for [batch, 1] and [batch].",
    ),
    "softmax-before-cross-entropy": (
        "cross_entropy applies log_softmax itself; twice, the loss cannot fall below about ln(classes) - 1 and "
        "gradients are small.",
        "Give it the logits.",
    ),
    "sigmoid-before-logits-loss": (
        "binary_cross_entropy_with_logits applies the sigmoid itself; twice, probabilities stay between 0.5 and 0.73.",
        "Give it the logits.",
    ),
    "logits-to-nll": (
        "nll_loss takes log-probabilities; of anything else it has no lower bound.",
        "Use cross_entropy, or log_softmax before it.",
    ),
    "logits-to-bce": (
        "binary_cross_entropy takes probabilities.",
        "Use binary_cross_entropy_with_logits, or a sigmoid before it.",
    ),
    "index-out-of-range": (
        "There is no such row.",
        "Give the embedding a row for each index: the size of the vocabulary, special tokens included.",
    ),
    "constant-targets": (
        "There is nothing to tell apart, so the model learns a constant.",
        "Look at the targets and whether the loader shuffles.",
    ),
    "unused-classes": (
        "The outputs of classes that never occur only learn to be small.",
        "Give the head as many outputs as there are classes.",
    ),
    "attention-logits": (
        "The softmax of such scores picks one position, and its gradient is about 0.",
        "Divide scores by √(head width), and initialise query and key smaller, or normalise them (Henry et al. 2020).",
    ),
    "bias-before-norm": (
        "The normalisation subtracts the mean of each channel, and so the bias (Ioffe and Szegedy 2015, 3.2).",
        "bias=False saves it; it does no harm.",
    ),
}
"""Why each kind matters, and what to do."""


def finding(
    kind: str, where: str | Sequence[str], seen: str, level: Literal["problem", "note"] = "problem", advice: str = ""
) -> Finding:
    """Make a finding with the reason and advice of its kind.

    Args:
        kind: Its kind.
        where: Where it was seen, first place first.
        seen: What was seen.
        level: How much it matters.
        advice: What to do, in place of what is usual.
    """
    places = [where] if isinstance(where, str) else list(where)
    why, usual = _TEXTS[kind]
    return Finding(kind, places[0], seen, why, advice or usual, level, tuple(places[1:]))
