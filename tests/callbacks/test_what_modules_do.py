"""Modules and callbacks of others, as they are: without a loss, without an optimizer, mocked, set by hand, pickled."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial, update_wrapper
from types import MethodType
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

import lightning_optim as lo
from lightning_optim.callbacks._hub import state_of_last_fit
from lightning_optim.callbacks.planning import make_plan
from lightning_optim.diagnostics import Histograms, PerTensor
from tests.helpers import ADAMWS, PRECISIONS, BareNet, Net, Ramp, batches, bit_equal, make_trainer, precision

PARTS: dict[str, Any] = {
    "clipping": lambda: lo.GradientClipping(1e9),
    "guard": lambda: lo.DivergenceGuard(rollback=None),
    "monitor": lambda: lo.OptimizerMonitor(),
    "summary": lambda: lo.RunSummary(),
}


# Batches without a loss.


class Absent(Net):
    """Returns no loss in some batches.

    Args:
        absent: The numbers of these.
        looks: Whether it has the hook in which gradients are looked at.
    """

    def __init__(self, absent: tuple[int, ...], looks: bool = False) -> None:
        super().__init__()
        self.absent, self.norms = absent, []
        if looks:
            self.on_before_optimizer_step = self._look

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.absent else super().training_step(batch, batch_idx)

    def _look(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()) if grads else None)


class Looks(Absent):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._look(optimizer)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("absent", [(2,), (0, 3), (2, 3)], ids=str)
def test_a_batch_without_a_loss_is_no_step_whoever_looks(kind, absent, name, accumulate):
    def fit(parts: list[Any]) -> Looks:
        model = Looks(absent)
        options = {**precision(name), "accumulate_grad_batches": accumulate}
        make_trainer([lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01), *parts], **options).fit(model, batches(6))
        return model

    model, plain = fit([PARTS["clipping"](), PARTS["guard"]()]), fit([])
    stock = Looks(absent)
    stock.configure_optimizers = lambda: torch.optim.AdamW(
        [
            {"params": [p for p in stock.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in stock.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    make_trainer([], **precision(name), accumulate_grad_batches=accumulate).fit(stock, batches(6))
    for one in (model, plain):
        torch.testing.assert_close(list(one.parameters()), list(stock.parameters()), rtol=2e-4, atol=1e-5)
        assert [norm is None for norm in one.norms] == [norm is None for norm in stock.norms]


# No optimizer.


class Nothing(Net):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])  # with a GradScaler Lightning itself runs none
def test_a_module_without_an_optimizer_runs_as_it_does_alone(part, name, logger):
    model = Nothing()
    before = [p.detach().clone() for p in model.parameters()]
    make_trainer([PARTS[part]()], logger=logger, **precision(name)).fit(model, batches(3))
    assert bit_equal([p.detach() for p in model.parameters()], before)
    planned = Nothing()
    planned.train_dataloader = lambda: batches(2)
    assert make_plan(make_trainer([PARTS[part]()]), planned).conflicts == []


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")
def test_one_that_optimizes_by_hand_without_one_as_well():
    class ByHand(Nothing):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

    make_trainer([make() for make in PARTS.values()]).fit(ByHand(), batches(3))


# Callbacks of others.


def _mock() -> Any:
    spy = Mock(spec=L.Callback)
    spy.state_dict.return_value = {}
    return spy


class Duck:
    """Has the hooks of a callback, and is none; those that it lacks do nothing."""

    state_key = "duck"

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __getattr__(self, name: str) -> Any:
        if name == "on_before_optimizer_step" or not name.startswith(("on_", "setup", "teardown", "state", "load")):
            raise AttributeError(name)
        return lambda *args, **kwargs: {} if name == "state_dict" else None


@pytest.mark.parametrize("make", [_mock, Duck])
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("first", [False, True])
def test_mocks_and_duck_typed_callbacks_beside_ours(make, name, first):
    other = make()
    if make is Duck:
        type(other).on_before_optimizer_step = lambda self, trainer, module, optimizer: None
    parts = [lo.ConfigureOptimizers("adamw", lr=0.01), *(make() for make in PARTS.values())]
    parts = [other, *parts] if first else [*parts, other]
    make_trainer(parts, **precision(name)).fit(Net(), batches(3))
    if make is _mock:
        assert other.on_train_batch_end.call_count == 3
        assert other.on_before_optimizer_step.call_count == 3


# Methods that are set by hand.


def test_a_method_that_was_set_by_hand_is_called_what_it_is():
    def mine() -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = Net()
    model.configure_optimizers = mine
    with pytest.raises(MisconfigurationException, match=r"model\.configure_optimizers = ") as caught:
        make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01)]).fit(model, batches(2))
    assert "LightningCLI" not in str(caught.value)
    assert "mine" in str(caught.value)
    make_trainer([lo.GradientClipping(1.0)]).fit(model, batches(2))  # nobody else supplies one


def test_what_lightningcli_sets_is_called_what_it_is():
    model = Net()
    made = partial(LightningCLI.configure_optimizers, optimizer=None, lr_scheduler=None)
    update_wrapper(made, LightningCLI.configure_optimizers)
    model.configure_optimizers = MethodType(made, model)
    with pytest.raises(MisconfigurationException, match="LightningCLI"):
        make_trainer([lo.ConfigureOptimizers("adamw", lr=0.01)]).fit(model, batches(2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("fitted", [False, True])
def test_what_is_attached_goes_where_the_module_goes(copied, fitted):
    model, configure = BareNet(), lo.ConfigureOptimizers("adamw", lr=0.01)
    lo.attach(model, configure)
    if fitted:
        make_trainer([configure]).fit(model, batches(2))
    other, its_own = copied((model, configure))
    before = copy.deepcopy(model.state_dict())
    start = copy.deepcopy(other.state_dict())
    make_trainer([its_own if copied is not copy.deepcopy else configure]).fit(other, batches(2))
    assert not bit_equal(dict(other.state_dict()), dict(start))
    assert bit_equal(dict(model.state_dict()), dict(before))  # its optimizer is of its own parameters
    make_trainer([configure]).fit(model, batches(2))


def test_a_factory_that_is_attached_is_pickled_with_the_module():
    model = BareNet()
    lo.attach(model, lo.OptimizerFactory("adamw", lr=0.01))
    other = pickle.loads(pickle.dumps(model))
    found = other.configure_optimizers()["optimizer"]
    assert {p for group in found.param_groups for p in group["params"]} == set(other.parameters())


@pytest.mark.slow
def test_what_is_attached_is_found_by_processes_that_are_spawned():
    model, configure = _Spawned(), lo.ConfigureOptimizers("sgd", lr=0.1)
    lo.attach(model, configure)
    start = model.weight.item()
    make_trainer([configure], strategy="ddp_spawn", devices=2, max_steps=2).fit(model, batches(8))
    assert model.weight.item() == pytest.approx(start - 0.2)


class _Spawned(Ramp):
    configure_optimizers: Any = L.LightningModule.configure_optimizers


# Kinds of parameters.


class Sparse(Net):
    """Its embedding gives sparse gradients, from a layer or from the function alone."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.table = nn.Embedding(10, 4, sparse=not functional)

    def forward(self, x: Tensor) -> Tensor:
        index = x.abs().mul(3).long().clamp(max=9)
        found = nn.functional.embedding(index, self.table.weight, sparse=True) if self.functional else self.table(index)
        return super().forward(found.mean(1))


@pytest.mark.parametrize("part", [None, *PARTS])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("functional", [False, True])
def test_sparse_gradients_are_taken_by_the_form_that_takes_them(functional, make, part):
    model, stock = Sparse(functional), Sparse(functional)
    stock.configure_optimizers = lambda: make(stock.parameters(), lr=0.1)
    make_trainer([]).fit(stock, batches(4))
    parts = [lo.ConfigureOptimizers(make, lr=0.1, param_groups=[]), *([PARTS[part]()] if part else [])]
    make_trainer(parts).fit(model, batches(4))
    torch.testing.assert_close(list(model.parameters()), list(stock.parameters()))


@pytest.mark.parametrize("functional", [False, True])
def test_sparse_gradients_are_clipped_in_that_form(functional):
    model, stock = Sparse(functional), Sparse(functional)

    def clipped() -> Any:
        optimizer = torch.optim.SGD(stock.parameters(), lr=0.5)
        lo.StepPipeline(optimizer, clip=lo.clipping.GlobalNorm(0.05))
        return optimizer

    stock.configure_optimizers = clipped
    make_trainer([]).fit(stock, batches(4))
    clipping = lo.GradientClipping(0.05)
    trainer = make_trainer([lo.ConfigureOptimizers(torch.optim.SGD, lr=0.5, param_groups=[]), clipping])
    trainer.fit(model, batches(4))
    torch.testing.assert_close(list(model.parameters()), list(stock.parameters()))
    assert state_of_last_fit(trainer)["lightning_optim"]["counts"] == [[4, 4, 0]]


def test_dense_gradients_keep_the_fused_form():
    model = Net()
    make_trainer([lo.ConfigureOptimizers(torch.optim.SGD, lr=0.1)]).fit(model, batches(3))
    assert all(group["fused"] for group in model.trainer.optimizers[0].param_groups)


class Lazy(Net):
    """Its first layer gets its shape from the first batch.

    Args:
        early: Whether it is given one before the optimizer is made.
    """

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.body, self.early = nn.LazyLinear(8), early

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.body.weight, nn.parameter.UninitializedParameter):
            torch.manual_seed(1)  # so that its first weights are the same whenever they are drawn
        return super().forward(x)

    def configure_model(self) -> None:
        if self.early:
            with torch.no_grad():
                self(torch.zeros(1, 4))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("part", [*PARTS, "rollback"])
def test_lazy_layers_are_watched_once_they_are_there(part, logger):
    guard = lo.DivergenceGuard()
    finals = []
    for parts in ([], [guard if part == "rollback" else PARTS[part]()]):
        torch.manual_seed(0)
        model = Lazy()
        make_trainer(parts, logger=logger if parts else False).fit(model, batches(4))
        finals.append(list(model.parameters()))
    torch.testing.assert_close(*finals)


def test_lazy_layers_are_in_the_plan_without_a_shape():
    model = Lazy()
    model.train_dataloader = lambda: batches(2)
    plan = make_plan(make_trainer([lo.GradientClipping(1.0)]), model)
    assert plan.conflicts == []
    assert plan.groups[0].numel == sum(p.numel() for p in [*model.norm.parameters(), *model.head.parameters()])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_rollback_goes_back_to_the_first_weights_that_lazy_layers_had(tmp_path):
    class Breaks(Lazy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx > 1 else 1)

        def on_train_batch_end(self, *args: Any) -> None:
            weights.append(self.body.weight.detach().clone())

    weights: list[Tensor] = []
    guard = lo.DivergenceGuard(report_dir=str(tmp_path), patience=2, lr_cut=None, cooldown=1)
    make_trainer([guard]).fit(Breaks(), batches(6))
    assert guard.rollback_count > 0
    assert bit_equal(weights[-1], weights[0])


@pytest.mark.parametrize("kind", ADAMWS)
def test_lazy_layers_are_trained_as_those_with_a_shape(kind):
    finals = []
    for early in (False, True):
        torch.manual_seed(0)
        model = Lazy(early)
        configure = lo.ConfigureOptimizers(**ADAMWS[kind], lr=0.01, weight_decay=0.5, schedule="cosine")
        make_trainer([configure, lo.GradientClipping(0.1)]).fit(model, batches(4))
        finals.append([p.detach() for p in model.parameters()])
        groups = {group["name"]: group["param_names"] for group in model.trainer.optimizers[0].param_groups}
        assert groups["default"] == ["body.weight", "head.weight"]
    assert bit_equal(*finals)


class LazyTable(nn.modules.lazy.LazyModuleMixin, nn.Module):
    """A lazy layer of the user's, of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.parameter.UninitializedParameter()


def test_lazy_layers_that_cannot_be_trained_yet_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"lazy layer and has no shape yet, which Muon.* needs"):
        make_trainer([lo.ConfigureOptimizers("muon", lr=0.01)]).fit(Lazy(), batches(2))
    model = Lazy(early=True)
    make_trainer([lo.ConfigureOptimizers("muon", lr=0.01)]).fit(model, batches(2))
    assert model.trainer.global_step == 2
    with pytest.raises(ValueError, match=r"'0\.table' of a LazyTable has no shape yet.*configure_model"):
        lo.build_param_groups(nn.Sequential(LazyTable()))


@pytest.mark.parametrize(
    ("layer", "decayed"),
    [
        (nn.LazyLinear(3), ["0.weight"]),
        (nn.LazyConv1d(3, 2), ["0.weight"]),
        (nn.LazyConvTranspose3d(3, 2), ["0.weight"]),
        (nn.LazyBatchNorm2d(), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_lazy_layers_have_their_groups_before_their_shapes(layer, decayed):
    groups = {group["name"]: group for group in lo.build_param_groups(nn.Sequential(layer), ["no_decay"])}
    assert [name for name, _ in groups.get("default", {"params": []})["params"]] == decayed
    assert groups["no_decay"]["weight_decay"] == 0


class Spectral(Net):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.mix = nn.Parameter(0.3 * torch.randn(4, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x.to(torch.cfloat) @ self.mix).abs())


@pytest.mark.parametrize("part", [*PARTS, "details"])
def test_complex_parameters_are_watched_and_left_as_they_are(part, logger):
    details = lambda: lo.OptimizerMonitor(per_tensor=PerTensor(), histograms=Histograms())  # noqa: E731
    model, plain = Spectral(), Spectral()
    for net, parts in ((model, [details() if part == "details" else PARTS[part]()]), (plain, [])):
        supplier = lo.ConfigureOptimizers(torch.optim.AdamW, lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer([supplier, *parts], logger=logger if parts else False).fit(net, batches(4))
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
