"""Names of optimizers in Hugging Face, timm, bitsandbytes, apex and torch, and what each of them is here.

`NAMES` has those that are one of ours with some options, or a class of torch that we do not have. `REFUSED` has those
that are something else, with what is nearest. A name of ours is in neither, even if the other library's is different
by default (timm's `sgd` has Nesterov momentum); docs/migration.md says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_8BIT: dict[str, Any] = {"state_bits": 8}
_CAUTIOUS: dict[str, Any] = {"cautious": True}
_CORRECTED: dict[str, Any] = {"weight_decay_kind": "corrected"}
_MOMENTUM: dict[str, Any] = {"momentum": 0.9}
_NESTEROV: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
_SGDW: dict[str, Any] = {**_NESTEROV, "weight_decay_kind": "decoupled"}

_HUGGING_FACE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "adamw_hf": ("adamw", {}),
    "adamw_torch": ("adamw", {}),
    "adamw_torch_fused": ("adamw", {}),
    "adamw_torch_xla": ("adamw", {}),
    "adamw_torch_npu_fused": ("adamw", {}),
    "adamw_apex_fused": ("adamw", {}),
    "adamw_torch_8bit": ("adamw", _8BIT),
    "adamw_8bit": ("adamw", _8BIT),
    "adamw_bnb_8bit": ("adamw", _8BIT),
    "ademamix_8bit": ("ademamix", _8BIT),
    "lion_8bit": ("lion", _8BIT),
    "lion_32bit": ("lion", {}),
    "paged_adamw": ("adamw", {}),
    "paged_adamw_32bit": ("adamw", {}),
    "paged_adamw_8bit": ("adamw", _8BIT),
    "paged_ademamix_32bit": ("ademamix", {}),
    "paged_ademamix_8bit": ("ademamix", _8BIT),
    "paged_lion_32bit": ("lion", {}),
    "paged_lion_8bit": ("lion", _8BIT),
    "rmsprop_bnb": ("rmsprop", {}),
    "rmsprop_bnb_8bit": ("rmsprop", _8BIT),
    "rmsprop_bnb_32bit": ("rmsprop", {}),
    "schedule_free_adamw": ("schedulefreeadamw", {}),
    "stable_adamw": ("stableadamw", {}),
}

_TIMM: dict[str, tuple[str, Mapping[str, Any]]] = {
    "momentum": ("sgd", _MOMENTUM),
    "nesterov": ("sgd", _NESTEROV),
    "sgdw": ("sgd", _SGDW),
    "sgdc": ("sgd", _SGDW | _CORRECTED),
    "csgdw": ("sgd", _SGDW | _CAUTIOUS),
    "csgdc": ("sgd", _SGDW | _CAUTIOUS | _CORRECTED),
    "adamwlegacy": ("adamw", {}),
    "adamc": ("adamw", _CORRECTED),
    "adamwc": ("adamw", _CORRECTED),
    "cadamw": ("adamw", _CAUTIOUS),
    "cadamc": ("adamw", _CAUTIOUS | _CORRECTED),
    "nadamlegacy": ("nadam", {}),
    "nadamc": ("nadamw", _CORRECTED),
    "cnadamw": ("nadamw", _CAUTIOUS),
    "cnadamc": ("nadamw", _CAUTIOUS | _CORRECTED),
    "radamlegacy": ("radam", {}),
    "radamw": ("radam", {"decoupled_weight_decay": True}),
    "adoptw": ("adopt", {}),
    "adoptc": ("adopt", _CORRECTED),
    "cadopt": ("adopt", {**_CAUTIOUS, "weight_decay_kind": "l2"}),
    "cadoptw": ("adopt", _CAUTIOUS),
    "cadoptc": ("adopt", _CAUTIOUS | _CORRECTED),
    "adanw": ("adan", {"no_prox": True}),
    "cadan": ("adan", _CAUTIOUS),
    "cadanw": ("adan", {"no_prox": True, **_CAUTIOUS}),
    "lambc": ("lamb", {"trust_clip": True}),
    "lambw": ("lamb", {"decoupled_decay": True}),
    "lambcw": ("lamb", {"trust_clip": True, "decoupled_decay": True}),
    "lambcd": ("lamb", {"decoupled_decay": True, **_CORRECTED}),
    "clamb": ("lamb", _CAUTIOUS),
    "clambw": ("lamb", {"decoupled_decay": True, **_CAUTIOUS}),
    "larc": ("lars", {**_MOMENTUM, "trust_clip": True}),
    "nlars": ("lars", _NESTEROV),
    "nlarc": ("lars", {**_NESTEROV, "trust_clip": True}),
    "lionc": ("lion", _CORRECTED),
    "clion": ("lion", _CAUTIOUS),
    "clionc": ("lion", _CAUTIOUS | _CORRECTED),
    "nmuon": ("muon", {}),
    "fusedsgd": ("sgd", _NESTEROV),
    "fusedadam": ("adam", {}),
    "fusedadamw": ("adamw", {}),
    "fusedlamb": ("lamb", {}),
    "bnbsgd": ("sgd", _NESTEROV),
    "bnbsgd8bit": ("sgd", {**_NESTEROV, **_8BIT}),
    "bnbadam": ("adam", {}),
    "bnbadam8bit": ("adam", _8BIT),
    "bnbadamw": ("adamw", {}),
    "bnbadamw8bit": ("adamw", _8BIT),
    "bnblion": ("lion", {}),
    "bnblion8bit": ("lion", _8BIT),
    "bnbademamix": ("ademamix", {}),
    "bnbademamix8bit": ("ademamix", _8BIT),
}

_TORCH: dict[str, tuple[str, Mapping[str, Any]]] = {
    "adadelta": ("torch.optim.Adadelta", {}),
    "adamax": ("torch.optim.Adamax", {}),
    "asgd": ("torch.optim.ASGD", {}),
    # torch's own default, no line search, diverges on all but the smoothest losses.
    "lbfgs": ("torch.optim.LBFGS", {"line_search_fn": "strong_wolfe"}),
    "rprop": ("torch.optim.Rprop", {}),
    "sparseadam": ("torch.optim.SparseAdam", {}),
    "sparse_adam": ("torch.optim.SparseAdam", {}),
}

NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {**_HUGGING_FACE, **_TIMM, **_TORCH}
"""By name: the name of ours, or the import path of a class of torch; and the options that make it the same."""

_IN_SCHEDULEFREE = (
    "Nearest is 'schedulefreeadamw'; that of the package schedulefree goes in by its path, '{}', with the callback "
    "ScheduleFree."
)
_IN_PYTORCH_OPTIMIZER = (
    "Nearest is {}; that of the package pytorch_optimizer goes in by its path, 'pytorch_optimizer.{}'."
)
_LESS_MEMORY = "Nearest, if memory is short, are 'adafactor', or 'adamw' with state_bits=8."


def _elsewhere(nearest: str, *classes: str) -> dict[str, str]:
    """Return, for classes of pytorch_optimizer by their lower-case names, what to say about each."""
    return {name.lower(): _IN_PYTORCH_OPTIMIZER.format(nearest, name) for name in classes}


REFUSED: dict[str, str] = {
    **_elsewhere(
        "'adamw'", "AdaBelief", "AdaHessian", "AdamP", "LaProp", "MARS", "NovoGrad", "SophiaH", "GrokFastAdamW"
    ),
    **_elsewhere("'stableadamw'", "CAME"),
    **_elsewhere("'radam'", "Ranger", "Ranger21"),
    **_elsewhere("'sgd'", "SGDP", "MADGRAD"),
    **_elsewhere("'lion'", "SignSGD", "Tiger"),
    **_elsewhere("'soap'", "Kron", "Shampoo", "ScalableShampoo"),
    **_elsewhere("'muon'", "SCION"),
    **_elsewhere("'normuon'", "AdaMuon"),
    **dict.fromkeys(("dion", "dion2", "dion3", "muonclip"), "Nearest are 'muon' and 'normuon'."),
    "nadamuon": "Nearest is 'normuon'.",
    "radabelief": "Nearest is 'radam'.",
    "grokadamw": "Nearest is 'ademamix', which also keeps a slow average of the gradients.",
    "adamw_anyprecision": "Nearest is 'adamw' with kahan_sum=True, for parameters in bf16.",
    "cadafactor": "Nearest is 'adafactor' with cautious=True.",
    "adamw_torch_4bit": "Nearest is 'adamw' with state_bits=8.",
    **dict.fromkeys(("adafactorbv", "adafactorbvc", "cadafactorbv", "cadafactorbvc"), "Nearest is 'adafactor'."),
    **dict.fromkeys(("rmsproptf", "rmsproptfw", "rmsproptfc", "crmsproptf"), "Nearest is 'rmsprop' with alpha=0.9."),
    **dict.fromkeys(("kronw", "kronc"), "Nearest is 'soap'."),
    **dict.fromkeys(("cadamp", "claprop", "lapropc", "cmars"), "Nearest is 'adamw' with cautious=True."),
    **dict.fromkeys(("madgradw", "csgdp"), "Nearest is 'sgd' with momentum=0.9 and weight_decay_kind='decoupled'."),
    **dict.fromkeys(("novogradw", "novogradc", "fusednovograd"), "Nearest is 'adamw'."),
    **dict.fromkeys(
        (
            "galore_adamw",
            "galore_adamw_8bit",
            "galore_adafactor",
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw",
            "apollo_adamw_layerwise",
            "lomo",
            "adalomo",
        ),
        _LESS_MEMORY,
    ),
    "schedule_free_sgd": _IN_SCHEDULEFREE.format("schedulefree.SGDScheduleFree"),
    "schedule_free_radam": _IN_SCHEDULEFREE.format("schedulefree.RAdamScheduleFree"),
}
"""By name: what is nearest, as a sentence."""


def meaning(name: str) -> tuple[str, Mapping[str, Any]]:
    """Return what ``name`` is here: a name of ours or an import path, and options. Any other name is returned as it is.

    Example:
        >>> meaning("paged_adamw_8bit"), meaning("ASGD"), meaning("mine")
        (('adamw', {'state_bits': 8}), ('torch.optim.ASGD', {}), ('mine', {}))
    """
    return NAMES.get(name.lower().replace("-", "_"), (name, {}))


def spelt(options: Mapping[str, Any]) -> str:
    """Return options as they are written in Python, for messages and tables.

    Example:
        >>> spelt({"state_bits": 8, "cautious": True})
        'state_bits=8, cautious=True'
    """
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
