"""What a step needs beside weights, gradients and state: a part of the model at a time, whatever the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import optim
from lightning_optim.kernels import parts, rounding
from tests.live_bytes import peak_bytes
from tests.optim.cases import assert_same, copies, give, gradients

BACKENDS = ("cpu", "reference")
WIDTH = 16

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"divisor": torch.tensor(2.0)},
    "cautious": {"divisor": torch.tensor(2.0), "cautious": True},
    "norm_decay": {"divisor": torch.tensor(2.0), "weight_decay_kind": "norm", "weight_decay": 0.1},
    "measured": {"divisor": torch.tensor(2.0), "collect_step_stats": True},
    "bfloat16": {"divisor": torch.tensor(2.0), "dtype": torch.bfloat16},
    "kahan": {"divisor": torch.tensor(2.0), "dtype": torch.bfloat16, "kahan_sum": True},
    "stochastic": {"divisor": torch.tensor(2.0), "dtype": torch.bfloat16, "stochastic_rounding": True},
}


def layers(dtype: torch.dtype, width: int = WIDTH, count: int = 36) -> list[tuple[str, torch.nn.Parameter]]:
    """The matrices of a transformer, and an embedding no larger than they are."""
    shapes = [("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)]
    named = [("embed.weight", torch.randn(4 * width, width))]
    named += [
        (f"layers.{i}.{name}.weight", torch.randn(rows * width, columns * width))
        for i in range(count)
        for name, rows, columns in shapes
    ]
    return [(name, torch.nn.Parameter(value.to(dtype))) for name, value in named]


def beyond(name: str, backend: str, kind: str, width: int = WIDTH) -> float:
    """Bytes of a second step that are neither weights, gradients nor state, over those of the weights."""
    settings = dict(KINDS[kind])
    params = layers(settings.pop("dtype", torch.float32), width)
    later = {key: settings.pop(key) for key in ("divisor", "collect_step_stats") if key in settings}
    cls: Any = optim.get_optimizer_class(name)
    optimizer = cls(params, lr=1e-3, backend=backend, **settings)
    for attribute, value in later.items():
        setattr(optimizer, attribute, value)
    for _ in range(2):
        for _, param in params:
            param.grad = torch.randn_like(param)
        peak = peak_bytes(optimizer.step)
    return peak / sum(param.numel() * param.element_size() for _, param in params)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of a test are smaller than what is worked on at once in any case."""
    monkeypatch.setitem(parts.AT_LEAST, "cpu", 1)
    monkeypatch.setitem(rounding.PIECE, "cpu", WIDTH**2)


EVERY_CASE = [
    (name, backend, kind) for name in ("muon", "normuon", "adafactor") for backend in BACKENDS for kind in KINDS
]
FAST = [("muon", "cpu", "clipped"), ("adafactor", "cpu", "kahan"), ("normuon", "reference", "cautious")]


@pytest.mark.parametrize(
    ("name", "backend", "kind"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_CASE],
)
def test_a_rule_of_matrices_needs_less_than_a_third_of_the_weights(name: str, backend: str, kind: str) -> None:
    assert beyond(name, backend, kind) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_soap_needs_its_largest_tensor_with_its_bases_a_few_times(backend: str) -> None:
    # Of 4·WIDTH × WIDTH: bases of 16 + 1 times WIDTH², and as many in Gram matrices, beside the 4 of the tensor.
    one = (4 + 2 * 17) / (12 * 36)
    for kind in KINDS:
        assert beyond("soap", backend, kind) < 0.3 + 2 * one * (2 if "dtype" in KINDS[kind] else 1), kind


QUICK = ("adamw",)
OTHERS = sorted(set(optim.list_optimizers()) - {"muon", "normuon", "adafactor", "soap", *QUICK})


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_an_elementwise_rule_needs_next_to_nothing_on_the_cpu_and_little_in_plain_torch(name: str) -> None:
    cautious = "cautious" not in optim.get_optimizer_class(name).refused_options  # type: ignore[attr-defined]
    for kind in ("clipped", *(["cautious"] if cautious else [])):
        # Wide enough for a tensor to be much larger than its row of some twenty numbers.
        assert beyond(name, "cpu", kind, width=2 * WIDTH) < 0.05
        assert beyond(name, "reference", kind) < 0.3


@pytest.mark.parametrize("name", ["muon", "normuon", "soap", "adafactor", "adamw", "lamb"])
@pytest.mark.parametrize("kind", [{}, {"cautious": True}, {"weight_decay_kind": "norm", "weight_decay": 0.1}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cutting_a_model_into_parts_changes_nothing(
    name: str, kind: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(6, 4), (5,), (4, 6), (3, 3), (6, 4), (1,), (4, 6)]
    if name in ("muon", "normuon"):  # a product of a stack differs from that of one matrix in the last bit
        shapes = [(6, 4), (5,), (3, 3), (5, 2), (2, 3)]
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in shapes]
    twins = copies(params)
    cls: Any = optim.get_optimizer_class(name)
    one, other = (cls(some, lr=0.1, backend=backend, **kind) for some in (params, twins))
    one.collect_step_stats = other.collect_step_stats = True
    for grads in gradients(params, 3):
        give(params, grads)
        give(twins, grads)
        monkeypatch.setitem(parts.AT_LEAST, "cpu", 20)
        one.step()
        monkeypatch.setitem(parts.AT_LEAST, "cpu", 10**6)
        other.step()
        assert one.step_stats is not None
        assert other.step_stats is not None
        torch.testing.assert_close(one.step_stats.sums, other.step_stats.sums, rtol=0, atol=0, equal_nan=True)
    assert_same([p.detach() for p in params], [p.detach() for p in twins])


def test_stochastic_rounding_in_pieces_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values, key = torch.randn(7, 13), torch.tensor(12345)
    monkeypatch.setitem(rounding.PIECE, "cpu", 16)
    pieces = rounding.round_stochastically(values, key, 0)
    monkeypatch.setitem(rounding.PIECE, "cpu", 10**6)
    assert torch.equal(pieces, rounding.round_stochastically(values, key, 0))
