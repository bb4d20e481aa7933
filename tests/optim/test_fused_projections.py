"""Fused projections: each piece moves as it would alone, and pieces are found from modules and names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.factory.plan import Plan, plan_groups
from lightning_optim.factory.plan_text import format_plan
from lightning_optim.optim.matrix_form import matrix_form
from lightning_optim.optim.muon import MuonRule
from lightning_optim.optim.ns_coefficients import COEFFICIENTS
from lightning_optim.param_groups import ParamGroupRule

both = pytest.mark.parametrize("optimizer_class", [optim.Muon, optim.NorMuon])


def orthogonal(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz iterations, as published, of one matrix."""
    a, b, c = COEFFICIENTS
    x = matrix
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def muon_step(weight: Tensor, grad: Tensor, state: dict[str, Tensor], adjust: str | None) -> Tensor:
    """Published Muon of one matrix of float64, without weight decay."""
    rows, columns = weight.shape
    state["m"] = 0.95 * state.get("m", torch.zeros_like(grad)) + 0.05 * grad
    direction = orthogonal(0.05 * grad + 0.95 * state["m"])
    size = 0.2 * math.sqrt(max(rows, columns)) if adjust else math.sqrt(max(1, rows / columns))
    return weight - 0.1 * size * direction


def normuon_step(weight: Tensor, grad: Tensor, state: dict[str, Tensor], adjust: str | None) -> Tensor:
    """Published NorMuon of one matrix of float64, without weight decay."""
    rows, columns = weight.shape
    state["m"] = 0.95 * state.get("m", torch.zeros_like(grad)) + 0.05 * grad
    direction = orthogonal(0.05 * grad + 0.95 * state["m"])
    state["v"] = 0.95 * state.get("v", torch.zeros(rows, 1)) + 0.05 * direction.square().mean(1, keepdim=True)
    scaled = direction / (state["v"].sqrt() + 1e-10)
    size = 0.2 * math.sqrt(rows * columns) if adjust else math.sqrt(max(1, rows / columns)) * direction.norm()
    return weight - 0.1 * size / (scaled.norm() + 1e-10) * scaled


def thirds(x: Tensor) -> list[Tensor]:
    return [x[:6], x[6:12], x[12:]]


def columns(x: Tensor) -> list[Tensor]:
    return [x[:, :4], x[:, 4:]]


def grouped(x: Tensor) -> list[Tensor]:
    return [x[:12], x[12:15], x[15:]]


def per_head(x: Tensor) -> list[Tensor]:
    """[2 heads, (q, k, v), 3 rows]: the rows of q, of k and of v."""
    heads = x.reshape(2, 3, 3, -1)
    return [heads[:, i].reshape(6, -1) for i in range(3)]


def groups_of_queries(x: Tensor) -> list[Tensor]:
    """[2 groups, (4 rows of q, 2 of k, 3 of v)]."""
    parts = x.reshape(2, 9, -1)
    return [parts[:, a:b].reshape(-1, x.shape[1]) for a, b in ((0, 4), (4, 6), (6, 9))]


def single_heads(x: Tensor) -> list[Tensor]:
    return list(x.split(3))


def alternating(x: Tensor) -> list[Tensor]:
    return [x[:, ::2], x[:, 1::2]]


CUTS: dict[str, tuple[tuple[int, ...], dict[str, Any], Callable[[Tensor], list[Tensor]]]] = {
    "thirds of a square": ((18, 6), {"split": 3}, thirds),
    "thirds, wide": ((18, 10), {"split": 3}, thirds),
    "thirds, tall": ((18, 4), {"split": [6, 6, 6]}, thirds),
    "columns": ((6, 8), {"split": 2, "split_dim": -1}, columns),
    "columns, tall": ((20, 8), {"split": 2, "split_dim": 1}, columns),
    "grouped queries": ((18, 6), {"split": (12, 3, 3)}, grouped),
    "single heads": ((18, 6), {"split": 6}, single_heads),
    "heads of q, k, v": ((18, 6), {"split": 3, "split_repeats": 2}, per_head),
    "groups of queries": ((18, 6), {"split": (4, 2, 3), "split_repeats": 2}, groups_of_queries),
    "gate and up alternate": ((6, 8), {"split": 2, "split_dim": -1, "split_repeats": 4}, alternating),
}


@both
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_each_piece_moves_as_it_would_alone(
    optimizer_class: Any, cut: str, stacked: bool, adjust: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MuonRule, "sent_dtype", torch.float64)
    shape, settings, pieces_of = CUTS[cut]
    if stacked and settings.get("split_dim", -2) >= 0:
        settings = settings | {"split_dim": settings["split_dim"] + 1}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3 if stacked else 1)]
    param = nn.Parameter(torch.stack(weights) if stacked else weights[0].clone())
    optimizer = optimizer_class([param], lr=0.1, weight_decay=0.0, flatten=not stacked, adjust_lr_fn=adjust, **settings)
    step = muon_step if optimizer_class is optim.Muon else normuon_step
    alone = [[part.clone() for part in pieces_of(weight)] for weight in weights]
    states: list[list[dict[str, Tensor]]] = [[{} for _ in parts] for parts in alone]
    for _ in range(3):
        grads = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in weights]
        param.grad = torch.stack(grads) if stacked else grads[0]
        optimizer.step()
        for parts, grad, state in zip(alone, grads, states, strict=True):
            for i, piece in enumerate(pieces_of(grad)):
                parts[i] = step(parts[i], piece, state[i], adjust)
    for parts, weight in zip(alone, param.detach() if stacked else [param.detach()], strict=True):
        for expected, found in zip(parts, pieces_of(weight), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@both
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_flattened_kernel_is_split_by_its_outputs(optimizer_class: Any, backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    kernel = torch.randn(12, 4, 2, 2)
    param = nn.Parameter(kernel.clone())
    alone = [nn.Parameter(part.clone()) for part in kernel.split(4)]
    one = optimizer_class([param], lr=0.1, split=3, split_dim=0, backend=backend)
    other = optimizer_class(alone, lr=0.1, backend=backend)
    for _ in range(2):
        param.grad = torch.randn_like(kernel)
        for part, grad in zip(alone, param.grad.split(4), strict=True):
            part.grad = grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(param.detach(), torch.cat([part.detach() for part in alone]), rtol=0, atol=1e-6)


@both
def test_pieces_are_batched_with_matrices_of_their_shape_and_each_is_its_own(optimizer_class: Any) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(18, 6), (6, 6), (18, 6), (18, 6), (3, 6)]]
    keys: list[dict[str, Any]] = [{"split": 3}, {}, {"split": (12, 3, 3)}, {"split": 3, "split_repeats": 2}, {}]
    together = [nn.Parameter(x.clone()) for x in start]
    alone = [nn.Parameter(x.clone()) for x in start]
    one = optimizer_class([{"params": [p], **its} for p, its in zip(together, keys, strict=True)], lr=0.1)
    others = [optimizer_class([p], lr=0.1, **its) for p, its in zip(alone, keys, strict=True)]
    for a, b in zip(together, alone, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    one.step()
    for optimizer in others:
        optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_a_piece_without_gradient_stays_where_it_is_and_the_others_are_not_touched_by_it() -> None:
    for cls in (optim.Muon, optim.NorMuon):
        param = nn.Parameter(torch.randn(9, 3))
        optimizer = cls([param], split=3, weight_decay=0.0)
        param.grad = torch.cat([torch.randn(3, 3), torch.zeros(3, 3), torch.randn(3, 3)])
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param[3:6], before[3:6])
        moved = torch.cat([param[:3] - before[:3], param[6:] - before[6:]])
        assert moved.isfinite().all()
        assert moved.norm() > 0


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((10, 4), {"split": 3}, r"10 rows cannot be cut by split=3: .* no multiple of 3. Nearest .*: 2 and 5"),
        ((18, 6), {"split": (12, 3, 4)}, r"they need 18, and these add up to 19, 1 too many"),
        ((18, 6), {"split": (8, 3, 3)}, r"add up to 14, 4 too few"),
        ((18, 6), {"split": (3, 3)}, r"add up to 6, 12 too few. The other dimension would fit: split_dim=-1"),
        ((18, 6), {"split": 3, "split_repeats": 4}, r"split=3 times split_repeats=4: they are no multiple of 12"),
        ((18, 6), {"split": 3, "split_dim": 2}, r"split_dim=2 does not exist. Needed is 0 or -2 for the rows"),
        ((4, 8, 6), {"split": 2, "split_dim": 0, "flatten": False}, r"split_dim=0 counts the matrices of its stack"),
        ((18, 6), {"split": 0}, r"Muon: Invalid split=0: must be 'auto', None, a number of equal blocks of at least 1"),
        ((18, 6), {"split": ()}, r"Invalid split=\(\)"),
        ((18, 6), {"split": (12, 6.0)}, r"Invalid split=\(12, 6.0\)"),
        ((18, 6), {"split": True}, r"Invalid split=True"),
        ((18, 6), {"split": "qkv"}, r"Invalid split='qkv': must be 'auto', None, a number"),
        ((18, 6), {"split": "atuo"}, r"Invalid split='atuo': must be .* Did you mean 'auto'\?$"),
        (
            (1, 6),
            {"rule": "muon", "split": 3},
            r"1 rows cannot be cut by split=3: they are no multiple of 3. The other",
        ),
        ((18, 6), {"split_repeats": 2, "split": None}, r"split_repeats=2: must be 1 without a split, which is None"),
        ((18, 6), {"split": 3, "split_repeats": 0}, r"split_repeats=0: must be a whole number of at least 1"),
        ((18, 6), {"split": 3, "split_dim": 0.5}, r"split_dim=0.5: must be a whole number"),
    ],
)
def test_what_cannot_be_split_is_refused(shape: tuple[int, ...], settings: dict[str, Any], message: str) -> None:
    settings = {"rule": None, **settings}
    group = {"params": [("w", nn.Parameter(torch.randn(shape)))], "rule": settings.pop("rule")}
    with pytest.raises(ValueError, match=message):
        optim.Muon([group], **settings)


def test_misspelt_keys_of_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'split_repeat'. Did you mean 'split_repeats'"):
        optim.Muon([{"params": [nn.Parameter(torch.randn(18, 6))], "split": 3, "split_repeat": 2}])


@both
def test_a_checkpoint_keeps_splits_and_continues(optimizer_class: Any) -> None:
    torch.manual_seed(0)
    first, second = (nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="Fused projections"):
        one, other = (optimizer_class(optim.muon_param_groups(m), lr=lr) for m, lr in ((first, 0.1), (second, 0.2)))
    for step in range(3):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        if step == 0:
            second.load_state_dict(first.state_dict())
            other.load_state_dict(one.state_dict())
        else:
            other.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [group["split"] for group in other.param_groups][:2] == [None, 3]


def test_groups_that_a_checkpoint_has_apart_keep_their_own_split() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.warns(UserWarning, match="Fused projections"):
        saved = optim.Muon(optim.muon_param_groups(layer)).state_dict()
    whole = optim.Muon(layer.named_parameters(), split=None)
    whole.load_state_dict(saved)
    assert [group["split"] for group in whole.param_groups if group.get("rule") is None] == [None]


def test_other_layouts_of_memory_change_nothing() -> None:
    torch.manual_seed(0)
    kernel, grad = torch.randn(12, 4, 2, 2), torch.randn(12, 4, 2, 2)
    matrix, of_matrix = torch.randn(12, 6), torch.randn(12, 6)
    results = []
    for odd in (False, True):
        first = nn.Parameter(kernel.clone(memory_format=torch.channels_last if odd else torch.contiguous_format))
        second = nn.Parameter(matrix.T.contiguous().T if odd else matrix.clone())
        for cls in (optim.Muon, optim.NorMuon):
            first.grad, second.grad = grad.clone(), of_matrix.clone()
            cls([first, second], lr=0.1, split=(6, 3, 3)).step()
        results.append((first.detach().contiguous(), second.detach().contiguous()))
    for plain, odd_one in zip(*results, strict=True):
        torch.testing.assert_close(plain, odd_one, rtol=0, atol=1e-6)


def test_state_of_other_rows_is_refused() -> None:
    whole, cut = (nn.Parameter(torch.randn(6, 8)) for _ in range(2))
    first = optim.NorMuon([("w", whole)])
    whole.grad = torch.ones_like(whole)
    first.step()
    second = optim.NorMuon([("w", cut)], split=2, split_dim=-1)
    saved = first.state_dict()
    saved["param_groups"][0] |= {"split": 2, "split_dim": -1}
    with pytest.raises(ValueError, match="second_momentum_buffer"):
        second.load_state_dict(saved)


# What is found by itself


class Layer(nn.Module):
    """A module that owns layers and numbers, as attention modules do."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2, [in, out]."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = out, nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))


def experts(*shapes: tuple[int, ...], **flags: bool) -> Layer:
    names = ("gate_up_proj", "down_proj")
    return Layer(**{name: nn.Parameter(torch.randn(s)) for name, s in zip(names, shapes, strict=False)}, **flags)


class Settings:
    num_attention_heads = 4
    num_key_value_heads = 2


FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[Any, int, int]]] = {
    "attention of torch": (lambda: nn.MultiheadAttention(16, 4), (3, -2, 1)),
    "timm": (lambda: Layer(num_heads=4, head_dim=4, qkv=nn.Linear(16, 48)), (3, -2, 1)),
    "timm, wider": (lambda: Layer(num_heads=4, head_dim=8, qkv=nn.Linear(16, 96)), (3, -2, 1)),
    "timm, kernels by heads": (lambda: Layer(num_heads=4, head_first=True, qkv=nn.Conv2d(16, 48, 1)), (3, -2, 4)),
    "no numbers of heads": (lambda: Layer(to_qkv=nn.Linear(16, 48)), (3, -2, 1)),
    "GPT-2": (lambda: Layer(num_heads=4, head_dim=4, c_attn=Conv1D(48, 16)), (3, -1, 1)),
    "GPT-2, cross attention": (lambda: Layer(c_attn=Conv1D(32, 16), q_attn=Conv1D(16, 16)), (2, -1, 1)),
    "nanoGPT": (lambda: Layer(n_head=4, c_attn=nn.Linear(16, 48)), (3, -2, 1)),
    "ModernBERT": (lambda: Layer(head_dim=4, config=Settings(), Wqkv=nn.Linear(16, 32)), ((16, 8, 8), -2, 1)),
    "Phi-3": (lambda: Layer(config=Settings(), head_dim=8, qkv_proj=nn.Linear(16, 64)), ((32, 16, 16), -2, 1)),
    "GPT-NeoX": (lambda: Layer(config=None, num_attention_heads=4, query_key_value=nn.Linear(16, 48)), (3, -2, 4)),
    "Falcon": (
        lambda: Layer(num_heads=4, num_kv_heads=2, head_dim=4, query_key_value=nn.Linear(16, 32)),
        ((8, 4, 4), -2, 2),
    ),
    "Falcon, one key": (
        lambda: Layer(num_heads=4, num_kv_heads=1, head_dim=4, query_key_value=nn.Linear(16, 24)),
        ((16, 4, 4), -2, 1),
    ),
    "TinyViT": (lambda: Layer(num_heads=4, key_dim=4, val_dim=8, qkv=nn.Linear(16, 64)), ((4, 4, 8), -2, 4)),
    "keys and values": (lambda: Layer(num_heads=4, kv=nn.Linear(16, 32)), (2, -2, 1)),
    "gate and up": (lambda: Layer(gate_up_proj=nn.Linear(16, 24), down_proj=nn.Linear(12, 16)), (2, -2, 1)),
    "w13": (lambda: Layer(w13=nn.Linear(16, 24)), (2, -2, 1)),
    "ModernBERT's Wi": (lambda: Layer(Wi=nn.Linear(16, 24), Wo=nn.Linear(12, 16)), (2, -2, 1)),
    "experts [E, out, in]": (lambda: experts((3, 24, 16), (3, 16, 12)), (2, -2, 1)),
    "experts [E, in, out]": (lambda: experts((3, 16, 24), (3, 12, 16)), (2, -1, 1)),
    "square experts [E, out, in]": (lambda: experts((3, 16, 16), (3, 16, 8)), (2, -2, 1)),
    "square experts [E, in, out]": (lambda: experts((3, 16, 16), (3, 8, 16)), (2, -1, 1)),
    "GPT-OSS": (lambda: experts((3, 16, 24), (3, 12, 16), is_concatenated=False), (2, -1, 12)),
}


@pytest.mark.parametrize("case", FOUND)
def test_fused_projections_are_found_by_their_modules(case: str) -> None:
    make, expected = FOUND[case]
    model = nn.ModuleDict({"block": Layer(attn=make()), "head": nn.Linear(4, 4)})
    (group,) = [group for group in optim.muon_param_groups(model) if "split" in group]
    assert (group["split"], group["split_dim"], group["split_repeats"]) == expected
    assert len(group["params"]) == 1
    with pytest.warns(UserWarning, match=r"Muon: Fused projections are updated as the matrices that they consist of"):
        optimizer = optim.Muon(optim.muon_param_groups(model))
    param = group["params"][0][1]
    param.grad = torch.randn_like(param)
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(param, before)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GPT-NeoX without heads": (lambda: Layer(query_key_value=nn.Linear(16, 48)), "number of heads is not known"),
    "global queries": (lambda: Layer(num_heads=4, head_dim=4, qkv=nn.Linear(16, 32)), "does not have the size"),
    "MobileViT": (lambda: Layer(qkv_proj=nn.Conv2d(16, 33, 1)), "does not have the size"),
    "grouped, of another size": (lambda: Layer(config=Settings(), head_dim=4, qkv=nn.Linear(16, 48)), "the size"),
    "experts alone": (lambda: experts((3, 16, 24)), "not twice as large as the inputs"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_known_is_left_whole_with_the_reason_and_the_way_out(case: str) -> None:
    make, reason = LEFT[case]
    groups = optim.muon_param_groups(nn.ModuleDict({"attn": make(), "head": nn.Linear(4, 4)}))
    assert all(group.get("split") is None for group in groups)
    with pytest.warns(UserWarning, match=rf"'attn\.\w+.*may be a fused projection .*{reason}.*a group with 'split'"):
        optim.Muon(groups)


def test_layers_of_other_names_are_not_split() -> None:
    parts = {
        "in_proj": nn.Linear(8, 24),
        "out": nn.Linear(8, 8),
        "in_proj_qkvz": nn.Linear(8, 24),
        "wi": nn.Linear(8, 16),
    }
    groups = optim.muon_param_groups(nn.ModuleDict({"mixer": Layer(**parts), "head": nn.Linear(4, 4)}))
    assert not any("split" in group or "fused_projections" in group for group in groups)


def quiet(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


def test_the_constructor_knows_them_by_name_where_that_is_safe() -> None:
    params = {
        "a.qkv.weight": (12, 4),
        "a.c_attn.weight": (4, 12),
        "a.proj.weight": (4, 4),
        "m.gate_up_proj.weight": (16, 4),
        "b.query_key_value.weight": (12, 4),
    }
    named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in params.items()]
    with pytest.warns(UserWarning, match=r"'b.query_key_value.weight' may be a .* muon_param_groups\(model\)"):
        optimizer = optim.NorMuon(named)
    assert [(g["param_names"], g["split"], g["split_dim"]) for g in optimizer.param_groups] == [
        (["a.proj.weight", "b.query_key_value.weight"], None, -2),
        (["a.qkv.weight"], 3, -2),
        (["a.c_attn.weight"], 3, -1),
        (["m.gate_up_proj.weight"], 2, -2),
    ]
    whole = quiet(lambda: optim.NorMuon(named, split=None))
    assert [group["split"] for group in whole.param_groups] == [None]
    nameless = quiet(lambda: optim.NorMuon([param for _, param in named]))
    assert [group["split"] for group in nameless.param_groups] == [None]


def test_what_is_given_takes_precedence_over_what_is_found() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    whole = [ParamGroupRule(name="whole", pattern="in_proj_weight", options={"split": None})]
    heads = [ParamGroupRule(name="heads", pattern="in_proj_weight", options={"split": 6})]
    for rules, split in ((whole, None), (heads, 6)):
        optimizer, _ = lo.OptimizerFactory("muon", param_groups=rules).build(model)
        assert [g["split"] for g in optimizer.param_groups if g["name"] in ("whole", "heads")] == [split]
    everywhere, _ = lo.OptimizerFactory("muon", optimizer_kwargs={"split": None}).build(model)
    assert {group["split"] for group in everywhere.param_groups} == {None}


def test_the_plan_shows_what_each_parameter_is_and_the_factory_says_it_once(capsys: Any) -> None:
    model = nn.ModuleDict(
        {
            "attn": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv2d(8, 8, 3),
            "experts": experts((3, 16, 8), (3, 8, 8)),
            "head": nn.Linear(8, 2),
        }
    )
    optimizer, _ = quiet(lambda: lo.OptimizerFactory("muon").build(model))
    said = capsys.readouterr().out
    assert said.count("Fused projections are updated as the matrices that they consist of") == 1
    assert "'attn.in_proj_weight' split into 3 x [8, 8]" in said
    text = format_plan(Plan(groups=plan_groups(optimizer)), parameters=True)
    assert "default: matrix [8, 8]; kernel as matrix [8, 72]" in text
    assert "default_qkv: split into 3 x [8, 8]" in text
    assert str(matrix_form(torch.zeros(24, 8), {"flatten": None, "split": 3, "split_repeats": 2})) == (
        "split into 3 x [8, 8], interleaved 2 times"
    )
    assert "default_stacks: stack of 3, each [8, 8]" in text
    assert "default_stacks_gate_up: stack of 3, each split into 2 x [8, 8]" in text
    assert "attn.in_proj_weight  [24, 8]  (split into 3 x [8, 8])" in text
    assert "(matrix [8, 8])" not in text


@pytest.mark.parametrize("name", ["muon", "normuon", "soap"])
@pytest.mark.parametrize(
    "options",
    [
        {"split": 4},
        {"split": [4, 2, 2], "split_dim": 1},
        {"split": 2, "split_repeats": 2},
        {"split": 2, "split_dim": 2, "flatten": False},
    ],
    ids=str,
)
def test_the_factory_takes_a_split_of_all_matrices_before_it_knows_the_model(
    name: str, options: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    if options.get("split_dim") == 2:
        model = nn.Sequential()
        model.experts = nn.Parameter(torch.ones(3, 4, 8))
    path = f"lightning_optim.optim.{optim.get_optimizer_class(name).__name__}"
    for given in (name, {"class_path": path}, partial(optim.get_optimizer_class(name), **options)):
        arguments = {} if isinstance(given, partial) else options
        factory = lo.OptimizerFactory(given, param_groups=[], optimizer_kwargs=arguments)
        optimizer, _ = factory.build(model)
        assert optimizer.param_groups[0]["split"] == options["split"]
    with pytest.raises(ValueError, match=r"its shape is \(5, 8\), and 5 rows cannot be cut by split=4"):
        lo.OptimizerFactory(name, optimizer_kwargs={"split": 4}).build(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 2)))
