"""Whatever is no plain memory of the right size is resolved, run by torch's operations, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_optim import optim
from lightning_optim.kernels import measure, plain
from lightning_optim.kernels.compiled import ElementwiseSteps
from lightning_optim.kernels.cpu import factored
from lightning_optim.kernels.weight_decay import INITIAL
from lightning_optim.optim import tensor_form
from lightning_optim.optim.admission import RefusedError
from lightning_optim.optim.tensor_form import Form
from tests.optim.cases import BACKENDS

SHAPE = (4, 6)
Make = Callable[[Tensor], Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every kernel that is started, by its purpose."""
    seen: list[str] = []
    original = ElementwiseSteps.run

    def run(self: Any, *args: Any) -> Any:
        seen.append(args[2])
        return original(self, *args)

    monkeypatch.setattr(ElementwiseSteps, "run", run)
    original_run = factored._run

    def run_factored(name: str, *args: Any) -> Any:
        seen.append(name)
        return original_run(name, *args)

    monkeypatch.setattr(factored, "_run", run_factored)
    return seen


def started(name: str, backend: str, **arguments: Any) -> tuple[nn.Parameter, nn.Parameter, optim.FusedOptimizer]:
    """Two parameters, the second called "weight", after a step; their next gradients are there."""
    torch.manual_seed(0)
    first, weight = (nn.Parameter(torch.randn(SHAPE)) for _ in range(2))
    if name in ("sgd", "lars"):
        arguments["momentum"] = 0.9
    dtype = arguments.pop("dtype", torch.float32)
    first.data, weight.data = first.data.to(dtype), weight.data.to(dtype)
    kind: Any = optim.get_optimizer_class(name)
    optimizer = kind([("first", first), ("weight", weight)], backend=backend, **arguments)
    for _ in range(2):
        for param in (first, weight):
            param.grad = torch.randn_like(param)
        optimizer.step()
    for param in (first, weight):
        param.grad = torch.randn_like(param)
    return first, weight, optimizer


def refused(optimizer: optim.FusedOptimizer, launches: list[str], *says: str) -> None:
    """A step is refused by the parameter's name, changes nothing and starts no kernel."""
    launches.clear()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = params[0].detach().clone()
    with pytest.raises(RefusedError, match="weight") as caught:
        optimizer.step()
    assert all(words in str(caught.value) for words in says), caught.value
    assert launches == []
    assert torch.equal(params[0], before)


def shrink_storage(tensor: Tensor, nbytes: int) -> None:
    tensor.untyped_storage().resize_(nbytes)


# What becomes of a tensor that stays the same object.
IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "more rows": lambda t: setattr(t, "data", torch.zeros(9, 6, dtype=t.dtype)),
    "fewer rows": lambda t: setattr(t, "data", t.data[:2]) if t.requires_grad else t.resize_(2, 6),
    "another view of as many": lambda t: setattr(t, "data", t.data.view(6, 4)),
    "broadcast": lambda t: setattr(t, "data", t.data[:1]),
    "transposed": lambda t: setattr(t, "data", t.data.t()),
    "no memory": lambda t: shrink_storage(t, 0),
    "too little memory": lambda t: shrink_storage(t, 16),
    "no memory, of a view": lambda t: (
        setattr(t, "data", torch.zeros(5, 6, dtype=t.dtype)[1:]),
        shrink_storage(t, 0),
    ),
}
WRITTEN_IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "expanded": lambda t: setattr(t, "data", torch.zeros(1, 6, dtype=t.dtype).expand(4, 6)),
    "overlapping": lambda t: setattr(t, "data", torch.zeros(30, dtype=t.dtype).as_strided((4, 6), (2, 1))),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("how", [*IN_PLACE, *WRITTEN_IN_PLACE])
def test_a_tensor_that_changes_between_steps_is_refused(how: str, role: str, backend: str, launches: list[str]) -> None:
    if role == "grad" and how in WRITTEN_IN_PLACE:
        pytest.skip("it is only read, and so may be expanded")
    _, weight, optimizer = started("adamw", backend)
    assert weight.grad is not None
    tensor = {"param": weight, "grad": weight.grad}.get(role, optimizer.state[weight].get(role))
    (IN_PLACE | WRITTEN_IN_PLACE)[how](tensor)
    refused(optimizer, launches)


def fake(tensor: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(tensor.shape)


# What a state may be replaced with, and what the refusal says.
REPLACED: dict[str, tuple[Make, str]] = {
    "larger": (lambda t: torch.zeros(8, 6), "(8, 6)"),
    "transposed": (lambda t: t.t().contiguous(), "(6, 4)"),
    "a row for all": (lambda t: t[:1].clone(), "(1, 6)"),
    "one number for all": (lambda t: torch.zeros(()), "()"),
    "one more dimension": (lambda t: t[None].clone(), "(1, 4, 6)"),
    "a number": (lambda t: 0.5, "0.5"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "fake": (fake, "FakeTensor"),
    "functional": (torch._to_functional_tensor, "functional"),
    "integers": (lambda t: t.int(), "int32"),
    "codes without scales": (lambda t: t.to(torch.uint8), "scale"),
    "expanded": (lambda t: torch.zeros(1, 6).expand(4, 6), "expand"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_is_replaced_is_refused(how: str, name: str, backend: str, launches: list[str]) -> None:
    _, weight, optimizer = started("adamw", backend)
    make, says = REPLACED[how]
    optimizer.state[weight][name] = make(optimizer.state[weight][name])
    refused(optimizer, launches, says, f"'{name}'")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(optim._classes()))
def test_every_state_of_every_optimizer_is_compared(name: str, backend: str, launches: list[str]) -> None:
    _, weight, optimizer = started(name, backend)
    assert optimizer.state[weight]
    for key, value in list(optimizer.state[weight].items()):
        for other in (torch.zeros(9, 7, dtype=value.dtype), torch.zeros(1, dtype=value.dtype)):
            optimizer.state[weight][key] = other
            refused(optimizer, launches, f"'{key}'", str(tuple(other.shape)), str(tuple(value.shape)))
        optimizer.state[weight][key] = value
    optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("kahan_comp", {"kahan_sum": True, "dtype": torch.bfloat16}),
        ("rounding_key", {"stochastic_rounding": True, "dtype": torch.bfloat16}),
        ("exp_avg", {"state_bits": 8}),
        ("exp_avg_scale", {"state_bits": 8}),
        ("exp_avg_sq_scale", {"state_bits": 8}),
        ("exp_avg_sq", {"state_bits": 16}),
        (INITIAL, {"weight_decay_kind": "l2_sp", "weight_decay": 0.1}),
    ],
)
def test_companions_are_compared(
    key: str, flags: dict[str, Any], backend: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_optim.optim.low_precision.SMALL", 1)
    _, weight, optimizer = started("adamw", backend, **flags)
    value = optimizer.state[weight][key]
    saved = copy.deepcopy(optimizer.state_dict())
    for other in (torch.zeros(9, 7).to(value.dtype), torch.zeros(3).to(value.dtype), value.to("meta")):
        optimizer.state[weight][key] = other
        refused(optimizer, launches, f"'{key}'")
        if other.device.type != "meta":
            saved["state"][1][key] = other
            with pytest.raises(RefusedError, match="weight"):
                optimizer.load_state_dict(saved)
    optimizer.state[weight][key] = value
    optimizer.step()


def test_a_companion_of_another_dtype_is_read_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("reference", "cpu"):
        first, weight, optimizer = started("adamw", backend, kahan_sum=True, dtype=torch.bfloat16)
        optimizer.state[weight]["kahan_comp"] = optimizer.state[weight]["kahan_comp"].float()
        optimizer.step()
        results.append(torch.stack([first.detach(), weight.detach()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", list(optim._classes()))
def test_state_of_another_shape_is_not_loaded(name: str) -> None:
    *_, optimizer = started(name, "auto")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 123.0
    small = nn.Parameter(torch.zeros(3, 6))
    arguments = {"momentum": 0.9} if name in ("sgd", "lars") else {}
    kind: Any = optim.get_optimizer_class(name)
    other = kind([("first", nn.Parameter(torch.zeros(SHAPE))), ("weight", small)], **arguments)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RefusedError, match=r"'weight'.*\(4, .*\(3, |'weight'.*shape \(6, 1\).*\(3, ") as caught:
        other.load_state_dict(saved)
    assert "Nothing has been loaded" in str(caught.value)
    assert other.state_dict() == before
    assert not other.state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon", "lamb"])
@pytest.mark.parametrize(
    "lay",
    [
        lambda g: torch._neg_view(-g),
        lambda g: g[:, :1].expand(4, 6),
        lambda g: torch.ones(()).expand(4, 6),
        lambda g: torch._efficientzerotensor((4, 6)),
        lambda g: torch.arange(24.0).as_strided((4, 6), (3, 2)),
    ],
    ids=["negated", "expanded", "expanded number", "lazy zeros", "overlapping"],
)
def test_gradients_are_resolved(lay: Callable[[Tensor], Tensor], name: str, backend: str) -> None:
    results = []
    for prepare in (lay, lambda g: lay(g).clone()):
        first, weight, optimizer = started(name, backend)
        for step in range(3):
            for param in (first, weight):
                param.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
            weight.grad = prepare(weight.grad) if step != 1 else weight.grad
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_memory_is_refused(backend: str) -> None:
    base = torch.randn(8, 6)
    halves = [nn.Parameter(base[:5]), nn.Parameter(base[4:])]
    again = [nn.Parameter(base), nn.Parameter(base.t())]
    columns = [nn.Parameter(base[:, :3]), nn.Parameter(base[:, 2:])]
    optimizer: optim.FusedOptimizer
    for params in (halves, again, columns):
        optimizer = optim.AdamW([("one", params[0]), ("other", params[1])], backend=backend)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(RefusedError, match=r"'one'.*'other'.*share memory"):
            optimizer.step()
    _, weight, optimizer = started("adamw", backend)
    state = optimizer.state[weight]
    own = state["exp_avg"]
    for alias in (state["exp_avg_sq"], weight.detach(), optimizer.state[next(iter(optimizer.state))]["exp_avg"]):
        state["exp_avg"] = alias
        with pytest.raises(RefusedError, match=r"'exp_avg' of parameter .*share memory"):
            optimizer.step()
    state["exp_avg"] = own
    optimizer._batches = None
    weight.grad = weight.detach()
    with pytest.raises(RefusedError, match="the gradient of parameter 'weight' share memory"):
        optimizer.step()


def test_memory_that_lies_intertwined_is_not_shared() -> None:
    base, grads = torch.randn(8, 6), torch.randn(8, 6)
    params = [nn.Parameter(base[:, :3]), nn.Parameter(base[:, 3:])]
    optimizer = optim.SGD(params, lr=1.0)
    params[0].grad, params[1].grad = grads[:, :3], grads[:, 3:]
    expected = base - grads
    optimizer.step()
    torch.testing.assert_close(base, expected)
    tensors = [torch.zeros(40)[i : i + 1] for i in range(20)] * 2
    assert plain.shared(tensors) is not None
    assert plain.shared([], tensors) is None
    many = list(torch.zeros(10_000, 8).unbind())
    assert plain.shared(many) is None
    assert plain.shared(many, [many[7]]) == (7, 10_000)


class Wrapper(Tensor):
    """Holds another tensor, quantized or in low precision, and does its arithmetic in float32."""

    inner: Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, scale: float) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.size(), dtype=torch.float32)

    def __init__(self, inner: Tensor, scale: float) -> None:
        self.inner, self.scale = inner, scale

    def dequantize(self) -> Tensor:
        return self.inner.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].scale)
        plain_args = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, args)
        if func is torch.ops.aten.copy_.default:
            values = plain_args[1] / args[0].scale
            args[0].inner.copy_(values.round() if args[0].inner.dtype == torch.int8 else values)
            return args[0]
        return func(*plain_args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("name", list(optim._classes()))
def test_parameters_that_hold_other_tensors_are_run_by_torch_operations(
    name: str, dtype: torch.dtype, launches: list[str]
) -> None:
    torch.manual_seed(0)
    inner = torch.randint(-50, 50, SHAPE).to(dtype)
    weight, beside = nn.Parameter(Wrapper(inner.clone(), 0.01)), nn.Parameter(torch.randn(SHAPE))
    bare = nn.Parameter(inner.float() * 0.01)
    arguments: dict[str, Any] = {"momentum": 0.9} if name in ("sgd", "lars") else {}
    kind: Any = optim.get_optimizer_class(name)
    optimizer = kind([("weight", weight), ("beside", beside)], lr=0.05, **arguments)
    reference = kind([bare], lr=0.05, backend="reference", **arguments)
    for param in (weight, beside, bare):
        param.grad = torch.ones(SHAPE)
    optimizer.step()
    reference.step()
    if name not in ("prodigy", "schedulefreeadamw"):
        torch.testing.assert_close(weight.detach().dequantize(), bare.detach(), rtol=1e-2, atol=0.011)
    assert not isinstance(optimizer.state[weight].get("exp_avg"), Wrapper)


class Stubborn(Wrapper):
    """Knows hardly anything."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].scale)
        raise NotImplementedError(f"Stubborn does not implement {func}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_such_a_class_cannot_do_is_said_by_name(backend: str, launches: list[str]) -> None:
    weight = nn.Parameter(Stubborn(torch.zeros(SHAPE), 1.0))
    weight.grad = torch.ones(SHAPE)
    for kind in (optim.AdamW, optim.SGD, optim.Prodigy):
        with pytest.raises(RefusedError, match=r"'weight'.*Stubborn.*NotImplementedError"):
            kind([("weight", weight)], backend=backend).step()
    assert launches == []


@pytest.mark.parametrize("make", [fake, torch._to_functional_tensor], ids=["fake", "functional"])
def test_what_has_no_numbers_is_refused(make: Make, launches: list[str]) -> None:
    weight = nn.Parameter(make(torch.zeros(SHAPE)))
    weight.grad = make(torch.zeros(SHAPE))
    with pytest.raises((RefusedError, ValueError), match="'weight'"):
        optim.AdamW([("weight", weight)]).step()
    assert launches == []


@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_mkldnn])
def test_parameters_and_gradients_of_other_layouts_are_refused(layout: Make, launches: list[str]) -> None:
    with pytest.raises(ValueError, match=r"'weight'.*layout torch\."):
        optim.AdamW([("weight", nn.Parameter(layout(torch.ones(SHAPE))))])
    _, weight, optimizer = started("adamw", "auto")
    if layout is Tensor.to_sparse:  # the other torch does not let be assigned
        weight.grad = layout(torch.ones(SHAPE))
        refused(optimizer, launches, "gradient", "sparse=False")


class Named(nn.Parameter):
    """Adds nothing to what operations mean, as classes of many libraries."""


def test_subclasses_that_add_nothing_go_to_kernels(launches: list[str]) -> None:
    weight = Named(torch.ones(SHAPE))
    weight.grad = torch.ones(SHAPE)
    optimizer = optim.AdamW([weight])
    optimizer.step()
    assert launches == ["step"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_measuring_refuses_or_reads_rightly(backend: str) -> None:
    freed = torch.ones(6)[2:]
    shrink_storage(freed, 0)
    with pytest.raises(RuntimeError, match="needs 24 bytes"):
        measure([torch.ones(3), freed])
    wrapped = Wrapper(torch.full(SHAPE, 3, dtype=torch.int8), 1.0)
    assert measure([torch.ones(3), wrapped]).tolist() == [3.0, 9.0 * 24]
    assert measure([torch._neg_view(torch.ones(3)), torch._efficientzerotensor((2,))]).tolist() == [3.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(optim._classes()))
def test_autograd_knows_what_a_step_has_changed(name: str, backend: str) -> None:
    _, weight, optimizer = started(name, backend)
    loss = (weight * weight).sum()
    moments = [t for key, t in optimizer.state[weight].items() if key not in ("step",) and t.dim()]
    assert moments
    versions = [t._version for t in moments]
    optimizer.found_inf = torch.ones(())
    optimizer.step()  # changes nothing
    loss.backward(retain_graph=True)
    del optimizer.found_inf
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(t._version > before for t, before in zip(moments, versions, strict=True))


@pytest.mark.parametrize("private", [True, False])
def test_forms_are_told_apart(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if private:
        assert tensor_form.TensorGuards is not None  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(tensor_form, "TensorGuards", None)
    with torch.no_grad():
        tensors = [nn.Parameter(torch.zeros(4, 6)), torch.zeros(3), torch.zeros(())]
        form = Form(tensors)
        assert form.fits(tensors)
        assert form.fits([nn.Parameter(torch.ones(4, 6)), torch.ones(3), torch.ones(())])
        one = torch.ones(3)
        others = [one.double(), one.to("meta"), one.to_sparse(), torch._neg_view(one), one[:2], one[None]]
        others += [torch.ones(1).expand(3), torch.ones(6)[::2], nn.Parameter(one), Wrapper(one, 1.0)]
        for other in others:
            assert not form.fits([tensors[0], other, tensors[2]])
        assert not form.fits(tensors[:2])
        assert not form.fits([nn.Parameter(torch.zeros(6, 4).t()), *tensors[1:]])
    assert Form([]).fits([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-1, 0, 3])
def test_a_later_gradient_in_the_memory_of_a_parameter_is_refused(backend: str, shift: int) -> None:
    flat = torch.randn(40)
    weight = nn.Parameter(flat[10:20])
    other = nn.Parameter(torch.randn(10))
    optimizer = optim.AdamW([("weight", weight), ("other", other)], lr=0.1, backend=backend)
    for _ in range(2):
        weight.grad, other.grad = torch.randn(10), torch.randn(10)
        optimizer.step()
    weight.grad = torch.zeros_like(flat)[10:20]  # apart from it, and the step is as ever
    optimizer.step()
    before = flat.clone()
    weight.grad = flat[10 + shift : 20 + shift]
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'weight'.* share memory"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_gradients_side_by_side_with_parameters_are_not_in_their_memory() -> None:
    flat = torch.randn(60)
    before = flat.clone()
    params = [nn.Parameter(flat[start : start + 10]) for start in (0, 20, 40)]
    optimizer = optim.SGD(params, lr=0.1)
    for _ in range(3):
        for i, param in enumerate(params):
            param.grad = flat[20 * i + 10 : 20 * i + 20]
        optimizer.step()
    torch.testing.assert_close(flat[::20], before[::20] - 0.3 * before[10::20])
    assert torch.equal(flat.view(3, 20)[:, 10:], before.view(3, 20)[:, 10:])
