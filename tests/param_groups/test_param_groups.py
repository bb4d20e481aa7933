from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim.param_groups import ParamGroupRule, build_param_groups, list_parts, list_presets


class Model(nn.Module):
    """Every kind of parameter the preset knows: embedding, norms, biases, matrices, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 3))
        self.batch_norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 5)

    def no_weight_decay(self) -> set[str]:
        return {"scale"}


def _names(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    result = {}
    for group in groups:
        assert [name for name, _ in group["params"]] == [names[id(p)] for _, p in group["params"]]
        result[group["name"]] = [name for name, _ in group["params"]]
    return result


def test_without_rules_there_is_one_group_of_everything():
    model = Model()
    assert _names(model, build_param_groups(model)) == {"default": [name for name, _ in model.named_parameters()]}


def test_every_trainable_parameter_is_in_exactly_one_group_under_any_rules():
    model = Model()
    model.head.weight.requires_grad_(False)
    rules = [
        ParamGroupRule(name="a", pattern="layers"),
        ParamGroupRule(name="b", min_ndim=2),
        ParamGroupRule(name="c", pattern="a"),
    ]
    taken = [name for names in _names(model, build_param_groups(model, rules)).values() for name in names]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(taken) == sorted(trainable)
    assert "head.weight" not in taken


def test_no_decay_takes_biases_norms_embeddings_and_what_the_model_names():
    model = Model()
    groups = build_param_groups(model, ["no_decay"])
    assert _names(model, groups) == {
        "no_decay": [
            "scale",
            "embed.weight",
            "layers.0.bias",
            "layers.1.weight",
            "layers.1.bias",
            "layers.2.bias",
            "batch_norm.weight",
            "batch_norm.bias",
            "head.bias",
        ],
        "default": ["layers.0.weight", "layers.2.weight", "head.weight"],
    }
    assert groups[0]["weight_decay"] == 0
    assert "weight_decay" not in groups[1]


class RMSNormLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class LlamaRMSNorm(RMSNormLike):
    pass


class Normalizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("module", "undecayed"),
    [
        (LlamaRMSNorm(), ["m.gain"]),
        (nn.GroupNorm(2, 4), ["m.weight", "m.bias"]),
        (nn.InstanceNorm2d(4, affine=True), ["m.weight", "m.bias"]),
        (nn.RMSNorm(4), ["m.weight"]),
        (nn.EmbeddingBag(3, 2), ["m.weight"]),
        (nn.LSTM(2, 2), ["m.bias_ih_l0", "m.bias_hh_l0"]),
        (nn.MultiheadAttention(4, 2), ["m.in_proj_bias", "m.out_proj.bias"]),
        (Normalizer(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_decay_knows_modules_by_their_kind(module, undecayed):
    model = nn.ModuleDict({"m": module, "rest": nn.Linear(2, 2, bias=False)})
    names = _names(model, build_param_groups(model, ["no_decay"])).get("no_decay", [])
    assert sorted(names) == sorted(undecayed)


def test_no_weight_decay_of_a_part_is_relative_to_it():
    model = nn.ModuleDict({"part": Model(), "scale": nn.Linear(2, 2, bias=False)})
    names = _names(model, build_param_groups(model, ["no_decay"]))
    assert "part.scale" in names["no_decay"]
    assert "scale.weight" in names["default"]


def test_first_match_wins():
    model = Model()
    rules = [ParamGroupRule(name="head", pattern="^head"), ParamGroupRule(name="vectors", max_ndim=1), "no_decay"]
    groups = _names(model, build_param_groups(model, rules))
    assert groups["head"] == ["head.weight", "head.bias"]
    assert "head.bias" not in groups["vectors"]
    assert groups["no_decay"] == ["embed.weight"]


def test_a_rule_needs_every_criterion():
    model = Model()
    rule = ParamGroupRule(
        name="x", pattern="layers", module_types=["Linear", "torch.nn.Conv1d"], min_ndim=2, predicate=lambda p: True
    )
    assert _names(model, build_param_groups(model, [rule]))["x"] == ["layers.0.weight", "layers.2.weight"]


@pytest.mark.parametrize("spelling", ["LayerNorm", "torch.nn.LayerNorm", "torch.nn.modules.normalization.LayerNorm"])
def test_module_types_match_bare_and_full_names(spelling):
    model = Model()
    rule = ParamGroupRule(name="x", module_types=[spelling])
    assert _names(model, build_param_groups(model, [rule]))["x"] == ["layers.1.weight", "layers.1.bias"]


def test_module_types_match_subclasses():
    model = nn.ModuleDict({"m": LlamaRMSNorm(), "rest": nn.Linear(2, 2)})
    rule = ParamGroupRule(name="x", module_types=["RMSNormLike"])
    assert _names(model, build_param_groups(model, [rule]))["x"] == ["m.gain"]


def test_tied_weights_are_there_once_and_match_under_any_name():
    model = Model()
    model.head.weight = model.embed.weight
    groups = build_param_groups(model, [ParamGroupRule(name="head", pattern=r"^head\.weight$", lr_multiplier=3)])
    assert _names(model, groups)["head"] == ["embed.weight"]
    everything = [id(p) for group in groups for _, p in group["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_tied_modules_are_there_once():
    shared = nn.Linear(2, 2)
    groups = build_param_groups(nn.ModuleDict({"a": shared, "b": shared}), ["no_decay"])
    assert sum(len(group["params"]) for group in groups) == 2


def test_options_reach_torch_with_names():
    model = Model()
    rules = [ParamGroupRule(name="head", pattern="^head", lr_multiplier=10, weight_decay=0.5), "no_decay"]
    optimizer = torch.optim.AdamW(build_param_groups(model, rules), lr=0.1, weight_decay=0.2)
    head, no_decay, default = optimizer.param_groups
    assert (head["name"], head["lr_multiplier"], head["weight_decay"]) == ("head", 10, 0.5)
    assert head["param_names"] == ["head.weight", "head.bias"]
    assert (no_decay["name"], no_decay["lr_multiplier"], no_decay["weight_decay"]) == ("no_decay", 1, 0)
    assert (default["name"], default["weight_decay"]) == ("default", 0.2)


def test_a_preset_that_matches_nothing_is_left_out():
    model = nn.Linear(2, 2, bias=False)
    assert [group["name"] for group in build_param_groups(model, list_presets())] == ["default"]


def test_a_group_that_takes_everything_leaves_no_default():
    model = nn.Linear(2, 2)
    rules = [ParamGroupRule(name="all", pattern=".")]
    assert [group["name"] for group in build_param_groups(model, rules)] == ["all"]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"pattern": r"^haed\."}, "'head."),
        ({"pattern": "layers.7"}, "'layers."),
        ({"module_types": ["LayerNrm"]}, "LayerNorm"),
        ({"min_ndim": 5}, "min_ndim=5"),
        ({"glob": "haed.*"}, "'head."),
        ({"part": "hidden_matrix", "max_ndim": 1}, "embedding, head"),
        ({"predicate": lambda p: False}, "predicate"),
    ],
)
def test_a_rule_that_matches_nothing_names_what_is_near(rule, told):
    with pytest.raises(ValueError, match=r"'mine'.*matches no trainable parameter") as caught:
        build_param_groups(Model(), [ParamGroupRule(name="mine", **rule)])
    assert told in str(caught.value)


def test_a_rule_left_nothing_by_an_earlier_one_names_that():
    rules = [ParamGroupRule(name="first", pattern="head"), ParamGroupRule(name="second", pattern=r"^head\.bias")]
    with pytest.raises(ValueError, match=r"'second'.*'head\.bias' went to 'first'"):
        build_param_groups(Model(), rules)


def test_a_rule_that_matches_only_frozen_parameters_is_refused_with_that_reason():
    model = Model()
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        build_param_groups(model, [ParamGroupRule(name="head", pattern="^head")])


def test_duplicate_names_are_refused():
    rules = [ParamGroupRule(name="x", pattern="head"), ParamGroupRule(name="x", pattern="embed")]
    with pytest.raises(ValueError, match="Duplicate parameter group name 'x'"):
        build_param_groups(Model(), rules)
    with pytest.raises(ValueError, match="Duplicate parameter group name 'no_decay'"):
        build_param_groups(Model(), ["no_decay", ParamGroupRule(name="no_decay", max_ndim=1)])


@pytest.mark.parametrize(
    ("model", "told"), [(nn.Linear(2, 2).requires_grad_(False), "frozen"), (nn.Identity(), "nothing to optimize")]
)
def test_a_model_with_nothing_to_train_is_refused(model, told):
    with pytest.raises(ValueError, match=f"no trainable parameter.*{told}"):
        build_param_groups(model)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, "no criterion"),
        ({"pattern": "("}, "a regular expression"),
        ({"module_types": "LayerNorm"}, r"\[LayerNorm\]"),
        ({"max_ndim": -1}, "at least 0"),
        ({"min_ndim": -1}, "at least 0"),
        ({"pattern": "x", "lr_multiplier": -1}, "lr_multiplier=-1"),
        ({"part": "heads"}, "'head'"),
        ({"part": "x"}, "'undecayed'"),
        ({"pattern": "x", "lr": -1}, "lr=-1"),
        ({"pattern": "x", "lr": math.inf}, "finite"),
        ({"pattern": "x", "lr": 0.1, "lr_multiplier": 2}, "one of them"),
        ({"pattern": "x", "betas": [0.9, 1.0]}, r"\[0, 1\)"),
        ({"pattern": "x", "options": {"lr": 1}}, "outside of the options, as `lr`"),
        ({"pattern": "x", "options": {"name": "y"}}, "'name'"),
        ({"pattern": "x", "frozen_until": "one epoch"}, "'2 epochs'"),
        ({"pattern": "x", "frozen_until": 0.1}, "'10%'"),
        ({"pattern": "x", "lr_multiplier": math.nan}, "finite"),
        ({"pattern": "x", "weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"pattern": "x", "weight_decay": math.inf}, "finite"),
    ],
)
def test_unusable_criteria_and_values_are_refused(options, needed):
    with pytest.raises(ValueError, match=needed) as caught:
        ParamGroupRule(name="mine", **options)
    assert "'mine'" in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b", "total", "default"])
def test_names_that_would_break_the_tags_are_refused(name):
    with pytest.raises(ValueError, match="Invalid ParamGroupRule name"):
        ParamGroupRule(name=name, pattern="x")


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"'no_decya'.*'no_decay'"):
        build_param_groups(Model(), ["no_decya"])


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("bias", ["layers.0.bias", "layers.1.bias", "layers.2.bias", "batch_norm.bias", "head.bias"]),
        ("norm", ["layers.1.weight", "layers.1.bias", "batch_norm.weight", "batch_norm.bias"]),
        ("embedding", ["embed.weight"]),
        ("head", ["head.weight", "head.bias"]),
        ("hidden_matrix", ["layers.0.weight", "layers.2.weight"]),
    ],
)
def test_a_rule_can_name_a_part_of_the_model(part, names):
    groups = build_param_groups(Model(), [ParamGroupRule(name="x", part=part)])
    assert sorted(name for name, _ in groups[0]["params"]) == sorted(names)
    assert part in list_parts()


class SaysItself(nn.Module):
    """A model of timm's kind inside somebody's module: its head has a name that tells nothing."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.up = nn.Linear(4, 2)
        setattr(self, answer, lambda: self.up)


@pytest.mark.parametrize("answer", ["get_classifier", "get_output_embeddings"])
def test_the_head_is_the_module_that_the_model_declares(answer):
    groups = build_param_groups(nn.ModuleDict({"net": SaysItself(answer)}), [ParamGroupRule(name="x", part="head")])
    assert [name for name, _ in groups[0]["params"]] == ["net.up.weight", "net.up.bias"]


def test_globs_match_whole_names():
    model = Model()
    groups = build_param_groups(model, [ParamGroupRule(name="x", glob="layers.*.weight")])
    assert _names(model, groups)["x"] == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    with pytest.raises(ValueError, match="matches no"):
        build_param_groups(model, [ParamGroupRule(name="x", glob="layers.?")])


def test_an_overlay_cuts_the_groups_of_others_and_multipliers_multiply():
    model = Model()
    rules = [
        ParamGroupRule(name="head", part="head", lr_multiplier=10, overlay=True),
        ParamGroupRule(name="vectors", pattern="bias", lr_multiplier=0.5, weight_decay=0),
        ParamGroupRule(name="late", pattern="^(head|layers.2)", weight_decay=0.3, options={"eps": 1e-5}, overlay=True),
    ]
    groups = build_param_groups(model, rules)
    names = _names(model, groups)
    assert names["head_late_vectors"] == ["head.bias"]
    assert names["head_late"] == ["head.weight"]
    assert names["late"] == ["layers.2.weight"]
    assert names["late_vectors"] == ["layers.2.bias"]
    by_name = {group["name"]: group for group in groups}
    assert {name: group["lr_multiplier"] for name, group in by_name.items()} == {
        "vectors": 0.5,
        "head_late_vectors": 5,
        "late_vectors": 0.5,
        "default": 1,
        "head_late": 10,
        "late": 1,
    }
    # The first in the list decides a setting.
    assert by_name["late_vectors"]["weight_decay"] == 0
    assert by_name["late"]["weight_decay"] == 0.3
    assert by_name["late"]["eps"] == by_name["late_vectors"]["eps"] == 1e-5
    assert "eps" not in by_name["default"]


def test_two_groups_of_one_name_are_refused():
    rules = [
        ParamGroupRule(name="a", pattern="weight", overlay=True),
        ParamGroupRule(name="b", pattern="head"),
        ParamGroupRule(name="a_b", pattern="scale"),
    ]
    with pytest.raises(ValueError, match=r"called 'a_b'.*Rename"):
        build_param_groups(Model(), rules)


def test_every_rule_that_matches_nothing_is_named():
    rules = [ParamGroupRule(name=name, pattern=f"^{name}") for name in ("haed", "head", "embde")]
    with pytest.raises(ValueError, match=r"(?s)'haed'.*\n.*'embde'") as caught:
        build_param_groups(Model(), rules)
    assert len(str(caught.value).splitlines()) == 2


def test_own_rate_betas_options_and_rule_reach_the_step():
    model = Model()
    rules = [
        ParamGroupRule(name="lion", part="head", rule="lion", lr=0.25, betas=[0.5, 0.6]),
        ParamGroupRule(name="eps", pattern="layers.0.weight", betas=[0.7, 0.8], options={"eps": 0.5}),
    ]
    factory = lo.OptimizerFactory("adamw", lr=0.1, weight_decay=0.0, schedule="linear", param_groups=rules)
    optimizer, scheduler = factory.build(model, lo.Horizon(total_steps=10))
    lion, eps, _ = optimizer.param_groups
    assert (lion["rule"], lion["lr"], lion["betas"]) == ("lion", 0.25, (0.5, 0.6))
    assert (eps["lr"], eps["betas"], eps["eps"]) == (0.1, (0.7, 0.8), 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer.step()
    scheduler.step()
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(moved["head.weight"], torch.full((5, 4), 0.25))  # Lion: the rate times a sign
    torch.testing.assert_close(moved["layers.0.weight"], torch.full((4, 4), 0.1 * 0.25 / (0.25 + 0.5)))
    torch.testing.assert_close(moved["layers.2.weight"], torch.full((4, 4, 3), 0.1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.225, 0.09, 0.09])


def test_an_own_rate_is_multiplied_by_overlays():
    rules = [
        ParamGroupRule(name="head", part="head", lr=0.5),
        ParamGroupRule(name="slow", pattern="bias", lr_multiplier=0.1, overlay=True),
    ]
    optimizer, _ = lo.OptimizerFactory("torch.optim.SGD", lr=0.1, param_groups=rules).build(Model())
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"head": 0.5, "slow_head": 0.05, "default": 0.1, "slow": 0.01})


def test_muon_leaves_a_group_with_a_rule_of_its_own_alone():
    rules = [ParamGroupRule(name="lion", pattern="layers.0", rule="lion"), "no_decay"]
    optimizer, _ = lo.OptimizerFactory("muon", lr=0.1, param_groups=rules).build(Model())
    rules_used = {group["name"]: group.get("rule") for group in optimizer.param_groups}
    assert rules_used == {"lion": "lion", "no_decay": "adamw", "default": None, "default_adamw": "adamw"}
