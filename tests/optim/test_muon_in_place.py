"""Muon's step in two compiled passes: bit for bit what torch's operations give, and only where it is the whole step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import optim
from lightning_optim.kernels.cpu import momentum
from lightning_optim.optim import muon_in_place
from lightning_optim.optim.matrix_form import matrix_form
from lightning_optim.optim.muon import MuonRule

Group = dict[str, Any]

KINDS: dict[str, list[tuple[tuple[int, ...], Group]]] = {
    "square": [((24, 24), {})] * 3,
    "wide and tall": [((16, 70), {}), ((70, 16), {}), ((16, 70), {})],
    "one column": [((5, 1), {}), ((1, 5), {})],
    "more than a block": [((300, 130), {})] * 2,
    "experts": [((3, 6, 10), {"flatten": False}), ((2, 2, 6, 10), {"flatten": False})],
    "kernels": [((8, 3, 3, 3), {}), ((8, 4, 5), {"flatten": True})],
    "blocks of rows": [((18, 8), {"split": 3}), ((14, 8), {"split": (6, 4, 4)})],
    "blocks of columns": [((8, 18), {"split": 3, "split_dim": -1}), ((8, 14), {"split": (6, 4, 4), "split_dim": -1})],
    "stacked projections": [((2, 18, 8), {"flatten": False, "split": 3})],
    "another rate": [((6, 8), {}), ((6, 8), {"lr": torch.tensor(0.3), "momentum": 0.5, "weight_decay": 0.0})],
}
COPIED: dict[str, list[tuple[tuple[int, ...], Group]]] = {
    "interleaved": [((24, 8), {"split": 3, "split_repeats": 2})],
    "stacked projections of two sizes": [((2, 14, 8), {"flatten": False, "split": (6, 4, 4)})],
    "one of two": [((6, 8), {"nesterov": True}), ((6, 8), {"nesterov": False})],
}
SETTINGS: dict[str, Group] = {
    "usual": {},
    "plain momentum": {"nesterov": False, "momentum": 0.3},
    "maximize": {"maximize": True, "adjust_lr_fn": "match_rms_adamw"},
    "another decay": {"weight_decay_kind": "independent", "adjust_lr_fn": "spectral"},
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors in each second pass."""
    counts: list[int] = []
    update = momentum.update

    def counted(params: Any, *args: Any) -> None:
        counts.append(len(params))
        update(params, *args)

    monkeypatch.setattr(momentum, "update", counted)
    return counts


def trained(
    kind: list[tuple[tuple[int, ...], Group]],
    dtype: torch.dtype = torch.float32,
    divisor: Any = None,
    **settings: Any,
) -> list[torch.Tensor]:
    """Weights and state after three steps, and what lies around the weights in memory."""
    torch.manual_seed(0)
    kept, params = [], []
    for shape, _ in kind:
        around = torch.randn(40 + torch.Size(shape).numel()).to(dtype)
        kept.append(around)
        params.append(around[20:-20].view(shape).requires_grad_())
    groups = [{"params": [param], "rule": "muon"} | group for param, (_, group) in zip(params, kind, strict=True)]
    optimizer = optim.Muon(groups, lr=0.1, backend="cpu", **settings)
    optimizer.divisor = divisor
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
    return [*kept, *(value for state in optimizer.state.values() for value in state.values())]


def in_torch(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.delattr(MuonRule, "step_on_cpu")
        return trained(*args, **kwargs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_and_momentum_are_those_of_torch_operations(
    kind: Any, settings: Group, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_torch(monkeypatch, kind, **settings)
    assert not passes
    found = trained(kind, **settings)
    assert sum(passes) >= 3 * len(kind)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(dtype: torch.dtype, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = in_torch(monkeypatch, KINDS["wide and tall"], dtype)
    for a, b in zip(trained(KINDS["wide and tall"], dtype), expected, strict=True):
        assert torch.equal(a, b)
    assert passes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("divisor", [torch.tensor(3.0), torch.tensor([0.7, 3.0])])
def test_gradients_are_divided(
    divisor: torch.Tensor, threads: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(threads)
    kind = KINDS["more than a block"]
    expected = in_torch(monkeypatch, kind, divisor=divisor)
    for a, b in zip(trained(kind, divisor=divisor), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert passes


@pytest.mark.parametrize("kind", COPIED.values(), ids=COPIED)
def test_what_does_not_lie_in_memory_as_matrices_is_left_to_torch(
    kind: Any, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_torch(monkeypatch, kind)
    for a, b in zip(trained(kind), expected, strict=True):
        assert torch.equal(a, b)
    assert not passes


def test_tensors_that_are_not_contiguous_are_left_to_torch(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for in_place in (True, False):
        if not in_place:
            monkeypatch.delattr(MuonRule, "step_on_cpu")
        torch.manual_seed(0)
        params = [torch.randn(8, 6).mT.requires_grad_(), torch.randn(6, 8).requires_grad_()]
        optimizer = optim.Muon([{"params": params, "rule": "muon"}], lr=0.1, backend="cpu")
        for param in params:
            param.grad = torch.randn(6, 8)
        optimizer.step()
        results.append([*params, *(state["momentum_buffer"] for state in optimizer.state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not passes


@pytest.mark.parametrize(
    "settings",
    [
        {"cautious": True},
        {"ema": 0.9},
        {"weight_decay_kind": "l2"},
        {"weight_decay_kind": "norm"},
        {"state_bits": 8},
        {"dtype": torch.bfloat16, "kahan_sum": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_a_step_of_which_it_would_not_be_all_is_left_to_torch(settings: Group, passes: list[int]) -> None:
    trained([((16, 512), {}), ((512, 16), {})], **settings)
    assert not passes


def test_a_step_that_is_measured_is_left_to_torch_and_one_that_is_skipped_changes_nothing(passes: list[int]) -> None:
    weight = torch.randn(6, 8).requires_grad_()
    optimizer = optim.Muon([{"params": [weight], "rule": "muon"}], backend="cpu")
    weight.grad = torch.randn(6, 8)
    optimizer.step()
    assert passes == [1]
    before = [weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()]
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], before[1])
    optimizer.found_inf = None
    optimizer.collect_step_stats = True
    optimizer.step()
    assert passes == [1]
    assert optimizer.step_stats is not None


def test_a_subclass_of_the_rule_is_run_as_it_is_written(passes: list[int]) -> None:
    class Aligned(MuonRule):
        def prepare(self, grad: torch.Tensor, *args: Any) -> torch.Tensor:
            return torch.eye(*grad.shape)

    class AlignedMuon(optim.Muon):
        def rule_of(self, group: Any) -> Any:
            return Aligned()

    weight = torch.zeros(8, 8, requires_grad=True)
    weight.grad = torch.randn(8, 8)
    AlignedMuon([{"params": [weight], "rule": "muon"}], lr=1.0, backend="cpu").step()
    assert not passes
    off_diagonal = weight.detach().masked_select(~torch.eye(8, dtype=torch.bool))
    assert (off_diagonal == 0).all()
    assert (weight.diagonal() < -0.5).all()


def test_autograd_notices_that_weights_were_written() -> None:
    weight = torch.randn(6, 8).requires_grad_()
    loss = (weight * weight).sum()
    optimizer = optim.Muon([{"params": [weight], "rule": "muon"}], backend="cpu")
    weight.grad = torch.randn(6, 8)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_where_matrices_lie_is_read_off_the_form() -> None:
    weight = torch.zeros(14, 8)
    rows = matrix_form(weight, {"flatten": None, "split": (6, 4, 4)})
    assert muon_in_place._places(rows, weight.shape) == ((0, 1, 48, 6, 8, 8), (48, 2, 32, 4, 8, 8))
    columns = matrix_form(weight.mT, {"flatten": None, "split": (6, 4, 4), "split_dim": -1})
    places = muon_in_place._places(columns, weight.mT.shape)
    assert places is not None
    assert [(place.first, place.matrices, place.rows, place.columns, place.stride) for place in places] == [
        (0, 1, 8, 6, 14),
        (6, 2, 8, 4, 14),
    ]
