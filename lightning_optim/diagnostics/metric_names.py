"""Names of logged metrics: of training or of validation, which of them belong together, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Iterable

_VALIDATION = {"val", "valid", "validation", "eval", "evaluation", "dev"}
_TRAINING = {"train", "training", "trn"}
_TEST = {"test", "predict"}
_LOWER = {
    "loss", "losses", "err", "error", "errors", "mse", "mae", "rmse", "mape", "nll", "ce", "bce", "kl", "ppl",
    "perplexity", "wer", "cer", "fid", "bpb", "bpc", "elbo", "eer", "brier", "ece", "crossentropy", "entropy",
}  # fmt: skip
_HIGHER = {
    "acc", "accuracy", "f1", "fbeta", "auc", "auroc", "auprc", "ap", "map", "precision", "recall", "iou", "miou",
    "jaccard", "dice", "bleu", "rouge", "meteor", "psnr", "ssim", "r2", "score", "reward", "return", "kappa", "mcc",
    "ndcg", "mrr", "top1", "top5", "specificity", "sensitivity", "likelihood", "em",
}  # fmt: skip


def tokens(name: str) -> list[str]:
    """Split a name into its words, in lower case.

    Example:
        >>> tokens("val/topAcc_epoch"), tokens("valLoss")
        (['val', 'top', 'acc', 'epoch'], ['val', 'loss'])
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]


def split_of(name: str) -> str:
    """Return whose values a metric has: ``"validation"``, ``"training"``, ``"test"``, or ``""`` if the name is silent.

    Example:
        >>> [split_of(name) for name in ("val_loss", "loss/train", "loss", "evaluation")]
        ['validation', 'training', '', 'validation']
    """
    words = set(tokens(name))
    for split, known in (("validation", _VALIDATION), ("training", _TRAINING), ("test", _TEST)):
        if words & known:
            return split
    return ""


def quantity_of(name: str) -> str:
    """Return what a metric measures: its words without those for whose values it has, and without Lightning's suffixes.

    Example:
        >>> [quantity_of(name) for name in ("val_loss", "train/loss_epoch", "valid-top5_acc/dataloader_idx_0")]
        ['loss', 'loss', 'top5_acc']
    """
    name = re.sub(r"/dataloader_idx_\d+$", "", name)
    words = [word for word in tokens(name) if word not in _VALIDATION | _TRAINING | _TEST]
    if len(words) > 1 and words[-1] in ("epoch", "step"):
        words = words[:-1]
    return "_".join(words)


def is_better_higher(name: str) -> bool | None:
    """Return whether larger values of a metric are better; None if its name does not tell.

    Example:
        >>> [is_better_higher(name) for name in ("val_acc", "val_loss", "error_rate", "temperature")]
        [True, False, False, None]
    """
    words = set(tokens(name))
    if words & _LOWER:
        return False
    return True if words & _HIGHER else None


def training_name(validation: str, names: Iterable[str]) -> str | None:
    """Return which of the names is the training metric that belongs to a validation metric; None if there is none.

    Example:
        >>> training_name("val_loss", ["lr", "loss", "train_loss_step", "train_loss_epoch"])
        'train_loss_epoch'
    """
    quantity = quantity_of(validation)
    found = [name for name in names if split_of(name) in ("training", "") and quantity_of(name) == quantity]
    found.sort(key=lambda name: (split_of(name) == "", name.endswith("_step"), not name.endswith("_epoch"), name))
    return found[0] if found else None
