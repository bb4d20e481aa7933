"""Muon and NorMuon: which parameters they take, and how they batch."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.factory.plan import Plan, plan_groups
from lightning_optim.factory.plan_text import format_plan
from lightning_optim.param_groups import ParamGroupRule, is_hidden_matrix, named_parameters, why_not_hidden
from tests.optim.cases import assert_same, copies, give, gradients

both = pytest.mark.parametrize("optimizer_class", [optim.Muon, optim.NorMuon])


class Tiny(nn.Module):
    """A bit of everything: tied embedding and output, convolution, norm, hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 4, 3)
        self.norm = nn.LayerNorm(6)
        self.body = nn.Linear(6, 6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.words.weight
        self.head = nn.Linear(6, 3)


def names_by_rule(groups: Any) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for group in groups:
        names = group.get("param_names") or [name for name, _ in group["params"]]
        result.setdefault(group.get("rule") or "own", []).extend(names)
    return result


def test_groups_from_a_model_know_embeddings_by_their_module() -> None:
    rules = names_by_rule(optim.muon_param_groups(Tiny()))
    assert rules["own"] == ["conv.weight", "body.weight"]
    assert {"words.weight", "cls_token", "norm.weight", "head.weight", "body.bias"} < set(rules["adamw"])
    assert "decoder.weight" not in rules["adamw"]  # tied


def test_rules_of_groups_are_kept_and_split_groups_are_named() -> None:
    groups = optim.muon_param_groups(
        Tiny(), ["no_decay", ParamGroupRule(name="slow", pattern="^(body|head)", lr_multiplier=0.1)]
    )
    assert [(g["name"], g.get("rule"), g["lr_multiplier"]) for g in groups] == [
        ("no_decay", "adamw", 1.0),
        ("slow", None, 0.1),
        ("slow_adamw", "adamw", 0.1),
        ("default", None, 1.0),
        ("default_adamw", "adamw", 1.0),
    ]
    optimizer = optim.Muon(groups, weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1, 0.1, 0.1, 0.1]
    assert [g["name"] for g in optimizer.param_groups] == [g["name"] for g in groups]


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("blocks.0.attn.qkv.weight", (12, 4), True),
        ("blocks.0.mlp.fc1.weight", (8, 4), True),
        ("layers.3.self_attn.o_proj.weight", (4, 4), True),
        ("layer4.0.conv1.weight", (8, 4, 3, 3), True),
        ("model.header_net.weight", (4, 4), True),
        ("blocks.0.attn.qkv.bias", (12,), False),
        ("temperature", (), False),
        ("pos_embed", (1, 7, 4), False),
        ("layer_scale", (1, 4), False),
        ("model.embed_tokens.weight", (9, 4), False),
        ("bert.embeddings.word_embeddings.weight", (9, 4), False),
        ("transformer.wte.weight", (9, 4), False),
        ("tok_embeddings.weight", (9, 4), False),
        ("lm_head.weight", (9, 4), False),
        ("model.heads.head.weight", (9, 4), False),
        ("classifier.1.weight", (9, 4), False),
        ("model.fc.weight", (9, 4), False),
        ("cls.predictions.decoder.weight", (9, 4), False),
        ("decoder.layers.0.self_attn.q_proj.weight", (4, 4), True),
        ("score.weight", (3, 4), False),
        ("qa_outputs.weight", (2, 4), False),
        ("net.to_logits.weight", (9, 4), False),
        ("decoder.output_projection.weight", (9, 4), False),
        ("layers.0.attention.output_projection.weight", (4, 4), True),
        ("proj_out.weight", (9, 4), False),
        ("blocks.0.proj_out.weight", (4, 4), True),
        ("h.0.mlp.fc_out.weight", (4, 8), True),
        ("encoder.layer.0.output.dense.weight", (4, 8), True),
        ("value_head.weight", (3, 4), False),
        ("blocks.0.multi_head.q.weight", (4, 4), True),
        ("layers.0.relative_position_bias_table", (169, 3), False),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), False),
        ("positional_embedding", (77, 8), False),
        ("pos_emb", (77, 8), False),
        ("attn.rel_pos_h", (27, 8), False),
        ("scale_shift_table", (6, 8), False),
        ("latents", (16, 8), False),
        ("layers.0.mixer.A_log", (16, 4), False),
        ("layers.0.mixer.conv1d.weight", (16, 1, 4), False),
        ("layers.0.mixer.in_proj.weight", (32, 8), True),
        ("attn.W_query", (8, 8), True),
    ],
)
def test_without_a_model_names_and_shapes_decide(name: str, shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden_matrix(torch.zeros(shape), [name]) == hidden


@both
def test_constructor_takes_parameters_names_and_groups(optimizer_class: Any) -> None:
    model = Tiny()
    plain = optimizer_class(model.parameters())
    assert [len(g["params"]) for g in plain.param_groups] == [4, 6]  # nameless: the embedding and the head look hidden
    named = optimizer_class(model.named_parameters())
    assert names_by_rule(named.param_groups)["own"] == ["words.weight", "conv.weight", "body.weight"]
    given = optimizer_class([{"params": [model.head.weight], "rule": "adamw"}, {"params": model.body.parameters()}])
    assert [g.get("rule") for g in given.param_groups] == ["adamw", None, "adamw"]
    only = optimizer_class([model.body.bias])
    assert [g["rule"] for g in only.param_groups] == ["adamw"]
    alone = optimizer_class(optim.muon_param_groups(model))
    assert sum(len(g["params"]) for g in alone.param_groups) == 10


@both
def test_adamw_groups_are_adamw(optimizer_class: Any) -> None:
    first, second = Tiny(), Tiny()
    second.load_state_dict(first.state_dict())
    optimizer = optimizer_class(
        first.named_parameters(), lr=0.02, adamw_lr=3e-3, adamw_betas=(0.8, 0.9), adamw_weight_decay=0.3
    )
    others = [n for g in optimizer.param_groups if g.get("rule") for n in g["param_names"]]
    names = dict(second.named_parameters())
    twin = torch.optim.AdamW([names[n] for n in others], lr=3e-3, betas=(0.8, 0.9), weight_decay=0.3)
    for grads in gradients(list(first.parameters()), 3):
        give(list(first.parameters()), grads)
        give(list(second.parameters()), grads)
        optimizer.step()
        twin.step()
    mine = dict(first.named_parameters())
    for name in others:
        torch.testing.assert_close(mine[name], names[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(mine["body.weight"], names["body.weight"])


def test_a_group_that_names_the_optimizers_own_rule_has_the_optimizers_settings() -> None:
    settings = {"ns_steps": 7, "nesterov": False, "flatten": False, "adjust_lr_fn": "spectral"}
    params: list[Any] = [torch.ones(2, 3, 4, requires_grad=True)]
    (group,) = optim.Muon([{"params": params, "rule": "muon", "momentum": 0.8}], eps=1e-5, **settings).param_groups
    assert {name: group[name] for name in (*settings, "momentum", "eps")} == {**settings, "momentum": 0.8, "eps": 1e-5}
    (group,) = optim.AdamW([{"params": params, "rule": "adamw"}], betas=(0.5, 0.6)).param_groups
    assert group["betas"] == (0.5, 0.6)


def test_what_a_group_says_itself_wins_over_the_settings_for_adamw() -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.Muon([{"params": model.parameters(), "weight_decay": 0.0}], adamw_weight_decay=0.5, adamw_lr=0.1)
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.0, 2e-2), (0.0, 0.1)]


@both
def test_convolution_kernels_are_flattened(optimizer_class: Any) -> None:
    kernel = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    first, second = kernel.clone().requires_grad_(), kernel.flatten(1).clone().requires_grad_()
    one, other = optimizer_class([first], lr=0.1), optimizer_class([second], lr=0.1)
    for _ in range(3):
        first.grad = torch.randn_like(kernel)
        second.grad = first.grad.flatten(1).clone()
        one.step()
        other.step()
    torch.testing.assert_close(first.flatten(1), second, rtol=0, atol=0)
    assert one.state[first]["momentum_buffer"].shape == kernel.shape


@both
def test_a_vector_cannot_be_given_to_the_rule(optimizer_class: Any) -> None:
    group = {"params": [("scale", torch.ones(3, requires_grad=True))], "rule": optimizer_class.__name__.lower()}
    with pytest.raises(ValueError, match=r"parameter 'scale': it has 1 dimensions, and only matrices .* rule='adamw'"):
        optim.AdamW([group])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"adjust_lr_fn": "rms"},
            r"Muon: Invalid adjust_lr_fn='rms': must be None or the name .* Available: 'keller', 'match_rms",
        ),
        ({"ns_steps": 0}, r"ns_steps=0: must be a whole number from 1 to 99"),
        (
            {"ns_coefficients": (1.0, 2.0)},
            r"ns_coefficients=\(1.0, 2.0\): must be 'keller', .* three finite numbers",
        ),
        ({"adamw_betas": (0.9, 1.0)}, r"Muon: Invalid adamw_betas\[1\]=1.0"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Muon(nn.Linear(3, 3).parameters(), **arguments)


def test_a_refused_half_leaves_no_group_behind() -> None:
    optimizer = optim.Muon([torch.ones(2, 2, requires_grad=True)])
    with pytest.raises(ValueError, match="complex64, but must have a real"):
        optimizer.add_param_group({"params": [torch.ones(2, 2), torch.ones(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1


@both
def test_state_dicts_of_both_kinds_of_group_go_together(optimizer_class: Any) -> None:
    model, other = Tiny(), Tiny()
    other.load_state_dict(model.state_dict())
    first = optimizer_class(model.named_parameters(), lr=0.02, adamw_lr=1e-3)
    second = optimizer_class(other.named_parameters())
    params, twins = list(model.parameters()), list(other.parameters())
    for step, grads in enumerate(gradients(params, 4)):
        give(params, grads)
        give(twins, grads)
        first.step()
        if step == 1:
            second.load_state_dict(first.state_dict())
            other.load_state_dict(model.state_dict())
        elif step > 1:
            second.step()
    assert_same([p.detach() for p in params], [p.detach() for p in twins])


def test_a_factory_makes_it_from_its_name() -> None:
    factory = lo.OptimizerFactory(optimizer="muon", lr=1e-3, optimizer_kwargs={"adjust_lr_fn": "match_rms_adamw"})
    optimizer, _ = factory.build(Tiny())
    assert names_by_rule(optimizer.param_groups)["own"] == ["conv.weight", "body.weight"]
    assert {g["name"]: g.get("rule") for g in optimizer.param_groups} == {
        "no_decay": "adamw",
        "default": None,
        "default_adamw": "adamw",
    }


class Mixer(nn.Module):
    """Depthwise and other convolutions, a stack of experts, numbers of a state space, a norm over two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(6, 12, 3, groups=6)
        self.narrow = nn.Conv1d(1, 6, 3)
        self.grouped = nn.Conv1d(6, 6, 3, groups=2)
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.norm = nn.LayerNorm((6, 5))
        self.A_log = nn.Parameter(torch.zeros(6, 4))


def reasons_of(model: nn.Module) -> dict[str, str | None]:
    return {one.name: one.not_hidden for one in named_parameters(model) if one.parameter.dim() > 1}


def test_modules_tell_kernels_from_stacks_and_which_kernels_are_depthwise() -> None:
    assert reasons_of(Mixer()) == {
        "experts": None,
        "A_log": "state space",
        "depthwise.weight": "depthwise kernel",
        "narrow.weight": None,
        "grouped.weight": None,
        "norm.weight": "norm",
        "norm.bias": "norm",
    }
    groups = optim.muon_param_groups(Mixer())
    found = [(g["name"], g.get("rule"), g.get("flatten"), len(g["params"])) for g in groups]
    assert found[:2] == [("default", None, True, 2), ("default_stacks", None, False, 1)]
    assert found[2:] == [("default_adamw", "adamw", None, 7)]
    optim.Muon(groups)


def test_a_state_space_calls_it_d_in_capitals() -> None:
    weight = torch.ones(4, 4)
    assert [why_not_hidden(weight, [f"mixer.{name}"]) for name in ("D", "Ds", "d")] == ["state space"] * 2 + [None]


class Output(nn.Module):
    """A body, and an output layer whose name tells nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.body = nn.Linear(8, 8)
        self.up = nn.Linear(8, 50 if kind == "vocabulary" else 8)
        if kind == "one memory":
            self.up = nn.Linear(8, 50)
            self.up.weight = nn.Parameter(self.words.weight.detach())
        self.after = nn.Linear(8, 50) if kind == "two of that size" else nn.LayerNorm(8)
        if kind == "two of that size":
            self.up = nn.Linear(8, 50)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("vocabulary", ["up.weight"]),
        ("one memory", ["up.weight"]),
        ("nothing", []),
        ("two of that size", ["after.weight"]),
    ],
)
def test_the_output_layer_is_known_by_what_it_shares_with_the_embedding(kind: str, output: list[str]) -> None:
    assert [name for name, reason in reasons_of(Output(kind)).items() if reason == "output layer"] == output


def perceptron(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), *last)


@pytest.mark.parametrize(
    ("model", "output"),
    [
        (perceptron(), ["4.weight"]),
        (perceptron(nn.Softmax(1)), ["4.weight"]),
        (nn.ModuleDict({"net": perceptron(), "loss": nn.MSELoss()}), ["net.4.weight"]),
        (
            nn.ModuleDict({"net": perceptron(), "teacher": Tiny().requires_grad_(False)}),
            ["net.4.weight", "teacher.head.weight"],
        ),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), []),
        (nn.Sequential(nn.Linear(4, 3)), []),
        (nn.Linear(4, 3), []),
    ],
)
def test_without_names_the_last_linear_layer_at_the_top_is_the_output(model: nn.Module, output: list[str]) -> None:
    assert [name for name, reason in reasons_of(model).items() if reason == "output layer"] == output


def test_a_plan_says_what_is_left_to_adamw() -> None:
    optimizer, _ = lo.OptimizerFactory("muon", lr=1e-3).build(Tiny())
    text = format_plan(Plan(groups=plan_groups(optimizer)), parameters=True)
    assert "embedding (words.weight) go to AdamW" in text
    assert "default_adamw: no hidden matrices, so 1 vector, 1 output layer (head.weight) go to AdamW." in text
    assert "head.weight  [3, 6]  (output layer)" in text


@both
def test_three_dimensions_are_refused_until_somebody_says_what_they_are(optimizer_class: Any) -> None:
    experts = nn.Parameter(torch.randn(3, 6, 4))
    with pytest.raises(
        ValueError, match=r"'w1': its shape \(3, 6, 4\) may be a stack .* flatten=False or flatten=True"
    ):
        optimizer_class([("w1", experts)])
    with pytest.raises(ValueError, match="flatten=1: must be None, True or False"):
        optimizer_class([experts], flatten=1)


@both
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_each_matrix_of_a_stack_moves_as_it_would_alone(optimizer_class: Any, adjust: str | None) -> None:
    torch.manual_seed(0)
    stack = torch.randn(2, 3, 6, 4, dtype=torch.float64).requires_grad_()
    alone = [matrix.clone().requires_grad_() for matrix in stack.detach().flatten(0, 1)]
    settings: dict[str, Any] = {"lr": 0.1, "adjust_lr_fn": adjust}
    one, other = optimizer_class([stack], flatten=False, **settings), optimizer_class(alone, **settings)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for param, grad in zip(alone, stack.grad.flatten(0, 1), strict=True):
            param.grad = grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(stack.detach().flatten(0, 1), torch.stack(alone).detach(), rtol=0, atol=1e-9)


@both
def test_groups_with_different_settings_are_each_treated_by_theirs(optimizer_class: Any) -> None:
    params = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    settings: list[dict[str, Any]] = [{}, {"ns_steps": 2, "nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}]
    alone = copies(params)
    together = optimizer_class([{"params": [p], **s} for p, s in zip(params, settings, strict=True)], lr=0.1)
    single = [optimizer_class([p], lr=0.1, **s) for p, s in zip(alone, settings, strict=True)]
    for grads in gradients(params, 2):
        give(params, grads)
        give(alone, grads)
        together.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)  # bfloat16, batched and not


@pytest.mark.parametrize("rule", ["muon", "normuon"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (0, 0)])
def test_a_matrix_without_elements_is_no_obstacle(shape: tuple[int, int], rule: str) -> None:
    params = [torch.zeros(shape, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    optimizer = optim.AdamW([{"params": params, "rule": rule}], lr=0.1)
    give(params, [torch.zeros(shape), torch.eye(2)])
    optimizer.step()
    assert params[1].isfinite().all()
    assert not torch.equal(params[1], torch.ones(2, 2))


def _calls_of_a_step(optimizer: Any) -> int:
    """Calls of functions, in Python and in C, of one warm step."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(2):
        optimizer.step()
    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_many_groups_left_to_adamw_cost_about_what_they_cost_with_adamw(backend: str) -> None:
    """Counted, not timed: a loaded machine changes nothing."""

    def groups(**rule: str) -> list[dict[str, Any]]:
        made = [torch.ones(4, requires_grad=True) for _ in range(400)]
        for param in made:
            param.grad = torch.ones(4)
        return [{"params": [param], "lr": 1e-3 * (1 + index % 7), **rule} for index, param in enumerate(made)]

    matrix = torch.ones(4, 4, requires_grad=True)
    matrix.grad = torch.eye(4)
    adamw = _calls_of_a_step(lo.optim.AdamW(groups(), backend=backend))
    muon = _calls_of_a_step(lo.optim.Muon([{"params": [matrix]}, *groups(rule="adamw")], backend=backend))
    assert muon <= 1.3 * adamw


@pytest.mark.parametrize("shape", [(8, 2), (2, 8)])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_unclamped_steps_are_shorter_in_wide_matrices(name: str, shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape), torch.randn(shape)

    def moved(adjust: str) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        weight.grad = grad.clone()
        cls: Any = lo.optim.get_optimizer_class(name)
        cls([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust).step()
        return weight.detach() - start

    factor = min(1.0, (shape[0] / shape[1]) ** 0.5)
    torch.testing.assert_close(moved("spectral_unclamped"), factor * moved("original"))
