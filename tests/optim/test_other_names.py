"""Names of other libraries: each is one of ours with options, a class of torch, or refused with what is nearest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn

from lightning_optim import OptimizerFactory
from lightning_optim.optim import get_optimizer_class, list_optimizers
from lightning_optim.optim.other_names import NAMES, REFUSED, spelt

DOCS = Path(__file__).parents[2] / "docs" / "migration.md"

# All of `transformers.training_args.OptimizerNames` and `timm.optim.list_optimizers()`, as of transformers 5.23 and
# timm 1.0.31; and what torch.optim exports.
HUGGING_FACE = """adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor adamw_anyprecision
adamw_torch_4bit adamw_torch_8bit ademamix sgd adagrad adamw_bnb_8bit adamw_8bit ademamix_8bit lion_8bit lion_32bit
paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop
rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise
galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo grokadamw schedule_free_radam schedule_free_adamw
schedule_free_sgd apollo_adamw apollo_adamw_layerwise stable_adamw adamw_hf"""
TIMM = """sgd momentum sgdp sgdw adam adamw adamwlegacy adamp nadam nadamlegacy nadamw radam radamlegacy radamw adamax
adafactor adafactorbv adopt adoptw lamb lambc lambw lambcw lars larc nlars nlarc adamc nadamc sgdc adoptc lambcd kronc
lionc lapropc rmsproptfc novogradc adafactorbvc cadamc cadoptc cnadamc csgdc clionc cadafactorbvc cadafactor
cadafactorbv cadamw cadopt cadan cadanw cadoptw clamb clambw claprop clion cmars cnadamw crmsproptf csgdw cadamp csgdp
adabelief radabelief adadelta adagrad adan adanw adahessian kron kronw laprop lion madgrad madgradw mars muon nmuon
adamuon nadamuon novograd novogradw rmsprop rmsproptf rmsproptfw fusedsgd fusedadam fusedadamw fusedlamb fusednovograd
bnbsgd
bnbsgd8bit bnbadam bnbadam8bit bnbadamw bnbadamw8bit bnblion bnblion8bit bnbademamix bnbademamix8bit"""
TORCH = [name for name in torch.optim.__all__ if name != "Optimizer" and isinstance(getattr(torch.optim, name), type)]


@pytest.mark.parametrize("name", [*HUGGING_FACE.split(), *TIMM.split(), *TORCH])
def test_a_name_of_another_library_is_known(name):
    known = name.lower() in NAMES or name.lower() in list_optimizers()
    assert known != (name.lower() in REFUSED)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_name_takes_a_step_as_what_it_stands_for(name):
    ours, options = NAMES[name]
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer, _ = OptimizerFactory(name, lr=1e-3).build(model)
    cls = getattr(torch.optim, ours.rpartition(".")[2]) if "." in ours else get_optimizer_class(ours)
    assert type(optimizer) is cls
    assert all(group[key] == value for group in optimizer.param_groups for key, value in options.items())
    if cls is torch.optim.SparseAdam:
        return
    before = [p.clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)  # ADOPT only measures in the first
    assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_an_argument_takes_precedence_over_what_the_name_stands_for():
    optimizer, _ = OptimizerFactory("AdamW-8bit", optimizer_kwargs={"state_bits": 16}).build(nn.Linear(2, 2))
    assert optimizer.param_groups[0]["state_bits"] == 16


def test_where_only_a_class_is_wanted_a_name_with_options_says_what_it_is():
    assert get_optimizer_class("paged_lion_32bit") is get_optimizer_class("lion")
    with pytest.raises(ValueError, match=r"'adamw_8bit'.* 'adamw' with state_bits=8"):
        get_optimizer_class("adamw_8bit")


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_of_what_we_do_not_have_is_refused_with_what_is_nearest(name):
    with pytest.raises(ValueError, match=rf"Unknown optimizer '{name}'\. Nearest") as caught:
        OptimizerFactory(name)
    ours, *rest = re.findall(r"'([\w.]+)'", str(caught.value))[1:]
    assert ours in list_optimizers()
    for path in rest:  # The class that the message offers exists.
        module, _, cls = path.rpartition(".")
        packages = {"pytorch_optimizer": pytorch_optimizer, "schedulefree": schedulefree}
        assert path in list_optimizers() or not module or hasattr(packages[module], cls)


def test_no_name_of_ours_is_covered():
    assert not set(list_optimizers()) & (NAMES.keys() | REFUSED.keys())
    assert not NAMES.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", ["kron7", "frobnicate", "lamp_shade", "scion2", "xyz"])
def test_a_name_that_is_far_from_all_suggests_none(name):
    with pytest.raises(ValueError, match=r"Available: 'adafactor'") as caught:
        OptimizerFactory(name)
    assert "Did you mean" not in str(caught.value)
    assert "adamw_hf" not in str(caught.value)


def test_the_table_in_the_docs_has_every_name():
    page = DOCS.read_text()
    names_of: dict[str, list[str]] = {}
    for name, (ours, options) in NAMES.items():
        with_options = f"`{ours}`{f' with `{spelt(options)}`' if options else ''}"
        names_of.setdefault(with_options, []).append(f"`{name}`")
    for ours, names in names_of.items():
        assert f"| {', '.join(names)} | {ours} |" in page
    for name in REFUSED:
        assert f"`{name}`" in page


def test_lbfgs_takes_one_group_by_itself_and_no_rules():
    optimizer, _ = OptimizerFactory("lbfgs").build(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    with pytest.raises(ValueError, match=r"Invalid param_groups=\['no_decay'\]: LBFGS must have one group"):
        OptimizerFactory("lbfgs", param_groups=["no_decay"])
