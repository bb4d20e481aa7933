"""What is special to Prodigy, SOAP, Adafactor, LAMB and LARS; and to elementwise ones of them on shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import prodigyopt
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_optim import optim
from lightning_optim.kernels import rounding
from lightning_optim.optim import soap
from lightning_optim.optim.adafactor import AdafactorRule
from tests.distributed.ranks import run_ranks
from tests.optim.cases import BACKENDS, assert_same, copies, give, gradients, run

# Prodigy: one number for all parameters.


def towards(params: list[torch.Tensor], target: float) -> None:
    for param in params:
        param.grad = (param.detach() - target).sign()


@pytest.mark.parametrize("backend", BACKENDS)
def test_d_grows_as_that_of_the_authors_across_dtypes_and_groups(backend: str) -> None:
    shapes = ((5, 4), (7,), (300,))
    params = [torch.zeros(shape, dtype=torch.float64).add_(0.1).requires_grad_() for shape in shapes]
    theirs = copies(params)
    mixed = [copies(params[:1])[0], *(p.detach().float().requires_grad_() for p in params[1:])]
    optimizer = optim.Prodigy([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    in_two = optim.Prodigy([{"params": mixed[:2]}, {"params": mixed[2:]}], backend=backend)
    reference = prodigyopt.Prodigy(theirs)
    found = []
    for _ in range(40):
        for some in (params, theirs, mixed):
            towards(some, 3.0)
        optimizer.step()
        in_two.step()
        reference.step()
        found.append(float(optimizer.param_groups[0]["d"]))
        assert found[-1] == pytest.approx(reference.param_groups[0]["d"], rel=1e-12)
        assert float(in_two.param_groups[1]["d"]) == pytest.approx(found[-1], rel=0.02)
    assert found[-1] > 1e3 * found[0]
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_d_is_kept_in_every_group_left_alone_by_a_skip_and_restored() -> None:
    params = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = optim.Prodigy([{"params": [p]} for p in params])
    for _ in range(10):
        towards(params, 1.0)
        optimizer.step()
    values = [dict(g, params=None) for g in optimizer.param_groups]
    assert all(torch.equal(values[0][name], values[1][name]) for name in ("d", "d_max", "d_numerator", "k"))
    assert values[0]["k"] == 10
    optimizer.found_inf = torch.ones(())
    towards(params, float("nan"))
    optimizer.step()
    assert_same(values, [dict(g, params=None) for g in optimizer.param_groups])
    fresh = optim.Prodigy([{"params": [p]} for p in copies(params)])
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[1]["d"] == values[1]["d"]
    assert fresh.param_groups[1]["d"] is not optimizer.param_groups[1]["d"]


def test_a_group_added_late_takes_over_d() -> None:
    first, second = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = optim.Prodigy([first])
    for _ in range(10):
        towards([first], 1.0)
        optimizer.step()
    optimizer.add_param_group({"params": [second]})
    towards([first, second], 1.0)
    optimizer.step()
    assert optimizer.param_groups[1]["d"] == optimizer.param_groups[0]["d"] > 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_at_all_is_no_estimate(backend: str) -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = optim.Prodigy([param], backend=backend)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 1e-6
    assert torch.equal(param.detach(), torch.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.Prodigy(p, d0=0.0), "Prodigy: Invalid d0=0.0"),
        (lambda p: optim.Prodigy(p, growth_rate=0.5), "growth_rate=0.5: must be at least 1"),
        (lambda p: optim.Adafactor(p, d=0.5), "Adafactor: Invalid d=0.5: must be at least 1"),
        (lambda p: optim.Adafactor(p, beta2_decay=0.5), "beta2_decay=0.5"),
        (lambda p: optim.Adafactor(p, eps=(-1.0, 1e-3)), r"Adafactor: Invalid eps\[0\]=-1.0: must be"),
        (lambda p: optim.SOAP(p, precondition_frequency=0), "SOAP: Invalid precondition_frequency=0"),
        (lambda p: optim.SOAP(p, shampoo_beta=1.0), "SOAP: Invalid shampoo_beta=1.0"),
        (lambda p: optim.LARS(p, nesterov=True), "LARS: nesterov=True needs momentum above 0"),
        (lambda p: optim.LAMB(p, trust_clip=1), "LAMB: Invalid trust_clip=1: must be True or False"),
        (lambda p: optim.NorMuon(p, beta2=1.5), "NorMuon: Invalid beta2=1.5: must be"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([torch.ones(2, 2, requires_grad=True)])


# Trust ratios


@pytest.mark.parametrize("optimizer_class", [optim.LAMB, optim.LARS])
def test_a_zero_learning_rate_moves_nothing(optimizer_class: Any) -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = optimizer_class([param], lr=0.0, weight_decay=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


@pytest.mark.parametrize("kind", ["decoupled", "independent", "corrected", "l2"])
@pytest.mark.parametrize("optimizer_class", [optim.LAMB, optim.LARS, optim.StableAdamW, optim.Prodigy, optim.SOAP])
def test_every_kind_of_decay_shrinks_weights(optimizer_class: Any, kind: str) -> None:
    results = []
    for weight_decay in (0.0, 0.1):
        param = torch.linspace(1, 2, 16).view(4, 4).requires_grad_()
        options = {"always_adapt": True} if optimizer_class in (optim.LAMB, optim.LARS) else {}
        options |= {"d0": 0.1} if optimizer_class is optim.Prodigy else {}
        optimizer = optimizer_class([param], lr=0.1, weight_decay=weight_decay, weight_decay_kind=kind, **options)
        run(optimizer, [param], 5)
        results.append(param.detach())
    assert not torch.equal(*results)
    assert all(result.isfinite().all() for result in results)


# Adafactor's compiled passes


def test_a_subclass_of_a_rule_with_kernels_is_run_as_it_is_written() -> None:
    class Halved(AdafactorRule):
        def update(self, *args: Any) -> Any:
            deltas, states = super().update(*args)
            return [delta / 2 for delta in deltas], states

    class Other(optim.Adafactor):
        def rule_of(self, group: Any) -> Any:
            return Halved()

    params = [torch.ones(6, 8, requires_grad=True) for _ in range(4)]
    kinds = (optim.Adafactor, "cpu"), (Other, "cpu"), (Other, "reference")
    for param, (kind, backend) in zip(params, kinds, strict=False):
        give([param], [torch.randn(6, 8, generator=torch.Generator().manual_seed(0))])
        kind([param], lr=0.1, backend=backend).step()
    usual, ours, reference, start = (param.detach() for param in params)
    torch.testing.assert_close(ours - start, (usual - start) / 2)
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 5), (70_001, 2), (2, 70_001), (40, 3000), (5, 6, 3, 3), (2, 0), (0, 3), (33, 5000)]
)
def test_adafactor_on_the_cpu_does_what_the_reference_does(shape: tuple[int, ...]) -> None:
    params = [torch.randn(shape, requires_grad=True), torch.randn(7, requires_grad=True)]
    twins = copies(params)
    one, other = (optim.Adafactor(p, weight_decay=0.1, backend=b) for p, b in ((params, "cpu"), (twins, "reference")))
    for grads in gradients(params, 4):
        give(params, grads)
        give(twins, grads)
        if params[0].dim() == 2:
            params[0].grad = grads[0].t().contiguous().t()  # not contiguous
        one.step()
        other.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_only() -> None:
    param = torch.randn(40, 30, dtype=torch.bfloat16).requires_grad_()
    optimizer = optim.Adafactor([param])
    run(optimizer, [param], 1)
    assert {name: tuple(v.shape) for name, v in optimizer.state[param].items()} == {
        "row_var": (40, 1),
        "col_var": (1, 30),
        "step": (),
    }
    assert all(v.dtype == torch.float32 for v in optimizer.state[param].values())


# SOAP's refreshes


def bases(optimizer: optim.SOAP, param: torch.Tensor) -> list[torch.Tensor]:
    return [optimizer.state[param][f"Q_{dim}"].clone() for dim in (0, 1)]


def test_bases_stay_orthogonal_and_turn_when_due() -> None:
    param = torch.randn(6, 4, requires_grad=True)
    optimizer = optim.SOAP([param], precondition_frequency=3)
    turned = []
    last = [torch.eye(6), torch.eye(4)]
    for step in range(1, 12):
        run(optimizer, [param], 1, seed=step)
        now = bases(optimizer, param)
        for q in now:
            torch.testing.assert_close(q.mT @ q, torch.eye(len(q)), rtol=0, atol=1e-5)
        if not torch.equal(now[0], last[0]):
            turned.append(step)
        last = now
    assert turned == [1, 4, 7, 10]


def test_where_the_step_cannot_be_read_calls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the count is the host's, is saved, and one skipped call postpones a refresh, no more."""
    monkeypatch.setattr(soap, "_count", lambda numbers, group: group["calls"])
    params = [torch.randn(5, 5, dtype=torch.float64, requires_grad=True)]
    twins = copies(params)
    optimizer, twin = optim.SOAP(params, precondition_frequency=3), optim.SOAP(twins, precondition_frequency=3)
    for call, grads in enumerate(gradients(params, 10), start=1):
        give(params, grads)
        give(twins, grads)
        optimizer.param_groups[0]["calls"] = twin.param_groups[0]["calls"] = call
        optimizer.step()
        with monkeypatch.context() as host:
            host.undo()
            twin.step()
    assert_same(params, twins)


def test_a_skipped_first_call_leaves_unit_vectors_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "_count", lambda numbers, group: group["calls"])
    param = torch.randn(5, 5, requires_grad=True)
    optimizer = optim.SOAP([param], precondition_frequency=3)
    for call, grads in enumerate(gradients([param], 8), start=1):
        give([param], grads)
        optimizer.param_groups[0]["calls"] = call
        optimizer.found_inf = torch.tensor(float(call == 1))
        optimizer.step()
        if call == 2:
            torch.testing.assert_close(bases(optimizer, param)[0], torch.eye(5))
    assert not torch.equal(bases(optimizer, param)[0], torch.eye(5))
    assert param.isfinite().all()


def test_large_dimensions_and_vectors_keep_their_coordinates() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(50, 4), "body": nn.Linear(4, 3)})
    optimizer = optim.SOAP(model.parameters(), max_precondition_dim=10)
    run(optimizer, list(model.parameters()), 2)
    assert [sorted(k for k in optimizer.state[p] if k[0] in "GQ") for p in model.parameters()] == [
        ["GG_1", "Q_1"],
        ["GG_0", "GG_1", "Q_0", "Q_1"],
        [],
    ]


def compare_shards() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in [(6, 5), (7,), (1, 3)]]
    makes: tuple[Callable[..., optim.FusedOptimizer], ...] = (
        optim.LAMB,
        optim.StableAdamW,
        partial(optim.LARS, momentum=0.9, weight_decay=0.1),
        partial(optim.Prodigy, d0=1e-2),
    )
    for make in makes:
        for backend in ("reference", "cpu"):
            whole = [value.clone().requires_grad_() for value in values]
            sharded = [distribute_tensor(value, mesh, [Shard(0)]).requires_grad_() for value in values]
            one, other = make(whole, backend=backend), make(sharded, backend=backend)
            for _ in range(3):
                for a, b in zip(whole, sharded, strict=True):
                    a.grad = torch.randn(a.shape)
                    b.grad = distribute_tensor(a.grad, mesh, [Shard(0)])
                one.step()
                other.step()
            for a, b in zip(whole, sharded, strict=True):
                assert isinstance(b, DTensor)
                torch.testing.assert_close(a.detach(), b.full_tensor().detach())
    for kind in (optim.Muon, optim.NorMuon, optim.SOAP, optim.Adafactor):
        continue_on_copies(kind, mesh, values[0])


def continue_on_copies(kind: type[optim.FusedOptimizer], mesh: DeviceMesh, value: torch.Tensor) -> None:
    """Whole copies on all ranks continue with the state of a plain parameter, and with their own."""
    plain = value.clone().requires_grad_()
    copies = [distribute_tensor(value.clone(), mesh, [Replicate()]).requires_grad_() for _ in range(2)]
    one, *others = (kind([param]) for param in (plain, *copies))  # type: ignore[call-arg]
    for step in range(3):
        plain.grad = torch.randn(value.shape)
        for param in copies:
            param.grad = distribute_tensor(plain.grad, mesh, [Replicate()])
        for optimizer in (one, *others) if step != 1 else (one, others[0]):
            optimizer.step()
        if step == 0:
            others[0].load_state_dict(one.state_dict())
        if step == 1:
            others[1].load_state_dict(others[0].state_dict())
            with torch.no_grad():
                copies[1].copy_(copies[0])
    for param in copies:
        assert isinstance(param, DTensor)
        torch.testing.assert_close(param.full_tensor().detach(), plain.detach())


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_sharded_parameters_have_sums_of_whole_tensors() -> None:
    run_ranks(compare_shards)


def test_soap_without_a_basis_leaves_the_gradient_as_it_is() -> None:
    param = torch.randn(5, 4, requires_grad=True)
    param.grad = torch.randn(5, 4)
    kept = param.grad.clone()
    optimizer = optim.SOAP([param], max_precondition_dim=1)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(param.grad, kept)


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
def test_adafactor_clipped_is_adafactor_of_the_clipped_gradient_and_writes_no_gradient(
    collect: bool, layout: str
) -> None:
    shape = (6, 5, 4, 3) if layout == "channels_last" else (30, 40)
    grad = torch.randn(shape)
    grad = grad.to(memory_format=torch.channels_last) if layout == "channels_last" else grad
    grad = torch.randn(40, 30).t() if layout == "transposed" else grad
    params = [torch.ones(shape, requires_grad=True) for _ in range(2)]
    one, other = (optim.Adafactor([param], backend="cpu") for param in params)
    one.collect_step_stats = other.collect_step_stats = collect
    one.divisor = torch.tensor(4.0)
    for _ in range(3):
        params[0].grad, params[1].grad = grad, grad / 4
        one.step()
        other.step()
        assert params[0].grad is grad
    assert_same([params[0].detach()], [params[1].detach()])
    if collect:
        assert one.step_stats is not None
        assert other.step_stats is not None
        torch.testing.assert_close(one.step_stats.sums, other.step_stats.sums, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"weight_decay_kind": "norm", "weight_decay": 0.1},
        {"weight_decay_kind": "l2_sp", "weight_decay": 0.1},
        {"dtype": torch.bfloat16, "kahan_sum": True},
        {"dtype": torch.bfloat16, "stochastic_rounding": True},
    ],
)
@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor", "soap"])
def test_storing_piece_by_piece_changes_no_weight(
    name: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(kind)
    dtype = settings.pop("dtype", torch.float32)
    shapes = [(6, 40), (3, 2, 5), (70,), ()] if name != "lamb" else [(6, 40)]
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    twins = copies(params)
    cls: Any = optim.get_optimizer_class(name)
    one, other = (cls(some, lr=0.1, backend="reference", **settings) for some in (params, twins))
    one.collect_step_stats = other.collect_step_stats = True
    one.divisor = other.divisor = torch.tensor(3.0)
    for grads in gradients(params, 3):
        give(params, grads)
        give(twins, grads)
        monkeypatch.setitem(rounding.PIECE, "cpu", 16)
        one.step()
        monkeypatch.setitem(rounding.PIECE, "cpu", 10**6)
        other.step()
        assert one.step_stats is not None
        assert other.step_stats is not None
        # Sums over pieces are in another order.
        torch.testing.assert_close(one.step_stats.sums, other.step_stats.sums, rtol=1e-6, atol=0, equal_nan=True)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}  # LAMB, Adafactor and this decay depend on such sums.
    exact = name in ("adamw", "soap") and kind.get("weight_decay_kind") != "norm"
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, **({"rtol": 0, "atol": 0} if exact else tolerance))
