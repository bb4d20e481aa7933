"""Learning rates by depth and by width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.param_groups import (
    LayerDecay,
    ParamGroupRule,
    WidthScaling,
    named_parameters,
    parameter_depths,
    shapes_of,
)
from lightning_optim.param_groups import build_param_groups as build


def tree(**children):
    return nn.ModuleDict(children)


def layer():
    return tree(attn=nn.Linear(2, 2, bias=False), norm=nn.LayerNorm(2))


def layers(count):
    return nn.ModuleList(layer() for _ in range(count))


def linear():
    return nn.Linear(2, 2)


def embedding():
    return nn.Embedding(3, 2)


class ViT(nn.Module):
    """Names, registration and matcher of timm's vision transformer."""

    def __init__(self, matcher=None):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.patch_embed = tree(proj=nn.Conv2d(1, 2, 1))
        self.blocks = nn.Sequential(*layers(3))
        self.norm = nn.LayerNorm(2)
        self.head = linear()
        if matcher is not None:
            self.group_matcher = lambda: matcher


VIT_MATCHER = {
    "stem": r"^cls_token|pos_embed|patch_embed",
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
}
VIT = {"cls_token": 0, "patch_embed.": 0, "blocks.0.": 1, "blocks.1.": 2, "blocks.2.": 3, "norm.": 4, "head.": 4}

CASES = {
    "vit-by-names": (ViT(), None, VIT),
    # timm puts the last norm beside the last block.
    "timm": (ViT(VIT_MATCHER), None, VIT | {"norm.": 3}),
    "timm-inside-a-module": (
        tree(net=ViT(VIT_MATCHER), own=linear()),
        None,
        {f"net.{name}": depth for name, depth in (VIT | {"norm.": 3}).items()} | {"own.": 4},
    ),
    "timm-function": (
        ViT(lambda name: int(name.split(".")[1]) + 1 if name.startswith("blocks") else (0 if "c" in name else 9)),
        None,
        VIT,
    ),
    "bert": (
        tree(
            bert=tree(embeddings=tree(word=embedding(), LayerNorm=nn.LayerNorm(2)), encoder=tree(layer=layers(2))),
            classifier=linear(),
        ),
        None,
        {"bert.embeddings.": 0, "bert.encoder.layer.0.": 1, "bert.encoder.layer.1.": 2, "classifier.": 3},
    ),
    "gpt2": (
        tree(transformer=tree(wte=embedding(), wpe=embedding(), h=layers(2), ln_f=nn.LayerNorm(2)), lm_head=linear()),
        None,
        {"transformer.w": 0, "transformer.h.0.": 1, "transformer.h.1.": 2, "transformer.ln_f.": 3, "lm_head.": 3},
    ),
    "llama": (
        tree(model=tree(embed_tokens=embedding(), layers=layers(11), norm=nn.LayerNorm(2)), lm_head=linear()),
        None,
        {f"model.layers.{i}.": i + 1 for i in range(11)} | {"model.embed": 0, "model.norm": 12, "lm_head.": 12},
    ),
    "t5": (
        tree(
            shared=embedding(),
            encoder=tree(block=nn.ModuleList(tree(layer=layers(2)) for _ in range(3))),
            decoder=tree(block=nn.ModuleList(tree(layer=layers(2)) for _ in range(2))),
            lm_head=linear(),
        ),
        None,
        {f"encoder.block.{i}.": i + 1 for i in range(3)}
        | {f"decoder.block.{i}.": i + 2 for i in range(2)}
        | {"shared.": 0, "lm_head.": 4},
    ),
    "swin": (
        tree(patch=linear(), layers=nn.ModuleList(tree(blocks=layers(2)) for _ in range(2)), head=linear()),
        None,
        {f"layers.{s}.blocks.{b}.": 1 + 2 * s + b for s in range(2) for b in range(2)} | {"patch.": 0, "head.": 5},
    ),
    "resnet": (
        tree(conv1=linear(), layer1=layers(2), layer2=layers(1), fc=linear()),
        None,
        {"conv1.": 0, "layer1.0.": 1, "layer1.1.": 2, "layer2.0.": 3, "fc.": 4},
    ),
    "head-first": (
        tree(head=linear(), layers=layers(2)),
        None,
        {"layers.0.": 0, "layers.1.": 1, "head.": 2},
    ),
    "sequential": (nn.Sequential(linear(), nn.ReLU(), linear(), linear()), None, {"0.": 0, "2.": 1, "3.": 2}),
    "sequential-inside": (
        tree(stem=linear(), body=nn.Sequential(*(linear() for _ in range(3))), tiny=nn.Sequential(linear(), linear())),
        None,
        {"stem.": 0, "body.0.": 1, "body.1.": 2, "body.2.": 3, "tiny.": 4},
    ),
    "pattern": (
        tree(a=linear(), step_7=linear(), step_10=linear(), z=linear()),
        r"step_(\d+)",
        {"a.": 0, "step_7.": 1, "step_10.": 2, "z.": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_depths(case):
    model, pattern, expected = CASES[case]
    depths = parameter_depths(model, list(named_parameters(model)), pattern)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    wanted = {name: next(depth for start, depth in expected.items() if name.startswith(start)) for name in depths}
    assert depths == wanted


def test_rates_fall_from_the_head_and_no_decay_is_kept():
    model = CASES["bert"][0]
    factory = lo.OptimizerFactory(
        "adamw", lr=0.1, weight_decay=0.3, schedule="linear", param_groups=["no_decay", LayerDecay(0.5)]
    )
    optimizer, scheduler = factory.build(model, lo.Horizon(total_steps=10))
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {
        "layer_0_no_decay": (pytest.approx(0.1 / 8), 0),
        "layer_1_no_decay": (pytest.approx(0.1 / 4), 0),
        "layer_2_no_decay": (pytest.approx(0.1 / 2), 0),
        "layer_3_no_decay": (pytest.approx(0.1), 0),
        "layer_1": (pytest.approx(0.1 / 4), 0.3),
        "layer_2": (pytest.approx(0.1 / 2), 0.3),
        "layer_3": (pytest.approx(0.1), 0.3),
    }
    before = [group["lr"] for group in optimizer.param_groups]
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 2 for lr in before])


def test_the_rates_are_timms():
    depth = 12
    model = tree(model=tree(embed_tokens=embedding(), layers=layers(depth)), lm_head=linear())
    groups = build(model, [LayerDecay(0.75)])
    # timm, BEiT, ELECTRA: layer_decay ** (number of layers + 1 - layer), embeddings being layer 0.
    assert [group["lr_multiplier"] for group in groups] == pytest.approx([0.75 ** (13 - i) for i in range(14)])
    assert groups[3]["name"] == "layer_03"


def test_layer_decay_multiplies_own_rates_and_a_floor_holds():
    model = CASES["bert"][0]
    rules = [LayerDecay(0.1, min_multiplier=0.05), ParamGroupRule(name="norms", module_types=["LayerNorm"], lr=2.0)]
    optimizer, _ = lo.OptimizerFactory("torch.optim.SGD", lr=1.0, param_groups=rules).build(model)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["layer_2_norms"] == pytest.approx(0.2)
    assert rates["layer_0_norms"] == pytest.approx(0.1)
    assert rates["layer_0"] == pytest.approx(0.05)


def test_frozen_layers_keep_their_depth():
    model = tree(layers=layers(3), head=linear())
    model["layers"][1].requires_grad_(False)
    assert [group["name"] for group in build(model, [LayerDecay(0.5)])] == ["layer_0", "layer_2", "layer_3"]


def test_muon_is_routed_within_each_depth():
    model = tree(embed=embedding(), layers=layers(2), head=linear())
    optimizer, _ = lo.OptimizerFactory("muon", lr=0.1, param_groups=[LayerDecay(0.5)]).build(model)
    found = {group["name"]: (group.get("rule"), group["lr"]) for group in optimizer.param_groups}
    assert found["layer_1"] == (None, pytest.approx(0.025))
    assert found["layer_1_adamw"] == ("adamw", pytest.approx(0.25e-3))  # of a rate of its own
    assert found["layer_3"][0] == "adamw"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layer_decay": 0}, r"layer_decay=0: must be.*\(0, 1\]"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"layer_decay": 0.5, "min_multiplier": 2}, "min_multiplier=2"),
        ({"layer_decay": 0.5, "pattern": "("}, r"pattern='\('"),
        ({"layer_decay": 0.5, "pattern": r"layer\.\d+"}, "in parentheses"),
    ],
)
def test_bad_layer_decay_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        LayerDecay(**options)


@pytest.mark.parametrize(
    ("model", "rules", "told"),
    [
        (tree(a=linear(), b=linear()), [LayerDecay(0.5)], r"No depth.*group_matcher.*layers\.N.*'a\.weight'.*pattern"),
        (tree(a=linear()), [LayerDecay(0.5, r"step_(\d+)")], r"matches no parameter.*'a\.weight'"),
        (tree(a=linear()), [LayerDecay(0.5, r"(\w)\.weight")], r"captures \('a',\) in 'a\.weight'.*number"),
        (tree(a=linear()), [LayerDecay(0.5), LayerDecay(0.6)], "Two LayerDecay"),
    ],
)
def test_models_without_a_recognised_depth_are_refused(model, rules, told):
    with pytest.raises(ValueError, match=told):
        build(model, rules)


# Width.


def mlp(width, factor=2):
    return tree(
        embed=nn.Embedding(5, width),
        up=nn.Linear(width, factor * width),
        down=nn.Linear(factor * width, width),
        reads=nn.Linear(3, width, bias=False),
        head=nn.Linear(width, 2),
    )


def test_hidden_matrices_are_scaled_by_width_and_nothing_else():
    groups = build(mlp(16), [WidthScaling(base_width=4, width=16)])
    assert [(group["name"], group["lr_multiplier"]) for group in groups] == [("default", 1), ("width_x4", 0.25)]
    assert [name for name, _ in groups[1]["params"]] == ["up.weight", "down.weight", "reads.weight"]


@pytest.mark.parametrize("scale_head", [False, True])
def test_base_shapes_determine_which_matrices_are_scaled_and_by_what_factor(scale_head):
    base = shapes_of(mlp(4, factor=4))
    groups = build(mlp(16, factor=2), [WidthScaling(base_shapes=base, scale_head=scale_head)])
    found = {name: group["lr_multiplier"] for group in groups for name, _ in group["params"]}
    # Inputs: 16 against 4, and 32 against 16. What reads the data has not grown inside.
    head = {"head.weight": 1 / 4} if scale_head else {}
    assert {name: value for name, value in found.items() if value != 1} == {
        "up.weight": 1 / 4,
        "down.weight": 1 / 2,
        **head,
    }


def test_one_rate_serves_all_widths_in_the_first_step():
    # muP's point for Adam: the change of a hidden layer's output in the first step does not grow with the width.
    def change(width, rules):
        torch.manual_seed(0)
        model = mlp(width)
        optimizer, _ = lo.OptimizerFactory("adamw", lr=1e-3, weight_decay=0.0, param_groups=rules).build(model)
        x = torch.ones(1, width)
        before = model["up"](x)
        before.sum().backward()
        optimizer.step()
        return (model["up"](x) - before).abs().mean().item()

    plain = change(256, []) / change(16, [])
    scaled = change(256, [WidthScaling(base_width=16, width=256)]) / change(16, [])
    assert plain > 10
    assert 0.5 < scaled < 1.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "Give base_width and width"),
        ({"base_width": 4}, "base_width=4, width=None"),
        ({"base_width": 4, "width": 8, "base_shapes": {"a": [1]}}, "base_shapes alone"),
        ({"base_width": 0, "width": 8}, "base_width=0"),
    ],
)
def test_bad_widths_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        WidthScaling(**options)


def test_base_shapes_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"lacks 'up\.bias'.*'down\.bias'"):
        build(mlp(4), [WidthScaling(base_shapes={k: v for k, v in shapes_of(mlp(4)).items() if k != "up.bias"})])
    with pytest.raises(ValueError, match=r"'up\.weight' has shape \(8, 4\) and base shape \(8,\)"):
        build(mlp(4), [WidthScaling(base_shapes=shapes_of(mlp(4)) | {"up.weight": [8]})])
