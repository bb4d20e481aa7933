"""A look changes nothing: the model, the loaders, the random numbers, and a fit after it or around it are the same."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_optim as lo
from lightning_optim.tuning.inspection.loaders import independent
from tests.helpers import make_trainer, precision


class Noisy(Dataset[Any]):
    """Samples with augmentation, and a count of how many have been read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(48, 8, generator=generator)
        self.y = torch.randint(4, (48,), generator=generator)
        self.read = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        noise = torch.randn(8) + np.random.randn() + random.random()
        return self.x[index] + 0.1 * noise.float(), self.y[index]


class Counted(L.LightningModule):
    """Everything in a step that leaves a trace."""

    seen: Tensor

    def __init__(self, look: bool = False, hook: str = "on_train_start") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, 4)
        self.accuracy = MulticlassAccuracy(4)
        self.register_buffer("seen", torch.zeros(4))
        self.average, self.batches, self.looked = 0.0, [], 0
        self.look, self.hook = look, hook

    def _look(self, hook: str) -> None:
        if self.look and self.hook == hook:
            inspection = lo.inspect_model(self)
            assert inspection.batches in (0, 3)  # none if the look itself runs the hook
            assert inspection.findings == []
            self.looked += 1

    def on_fit_start(self) -> None:
        self._look("on_fit_start")

    def on_train_start(self) -> None:
        self._look("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2 and self.looked == 0:
            self._look("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.drop(self.body(batch[0])))
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        loss = F.cross_entropy(logits, batch[1])
        self.seen += F.one_hot(batch[1], 4).sum(0)
        self.average = 0.9 * self.average + 0.1 * float(loss.detach())
        self.batches.append(batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Alternating(Counted):
    """The same by hand, with two optimizers."""

    def __init__(self, look: bool = False, hook: str = "on_train_start") -> None:
        super().__init__(look, hook)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        body, head = (torch.optim.Adam(part.parameters(), 1e-2) for part in (self.body, self.head))
        return [body, head], [torch.optim.lr_scheduler.ExponentialLR(body, 0.9)]


def loader() -> DataLoader[Any]:
    return DataLoader(Noisy(), 8, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3))


def everything(module: L.LightningModule, trainer: L.Trainer, data: Any) -> list[Any]:
    """All that a fit has left behind."""
    tensors = list(module.state_dict().values())
    tensors += [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    tensors += [torch.get_rng_state(), data.generator.get_state()]
    numpy: Any = np.random.get_state()
    others = [module.average, module.batches, data.dataset.read, numpy[1].tolist(), random.getstate()]
    others += [trainer.callback_metrics, trainer.global_step, dict(vars(module.accuracy)["_reductions"])]
    return [*tensors, *others]


def fit(module: L.LightningModule, **options: Any) -> list[Any]:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    data, path = loader(), options.pop("ckpt_path", None)
    before = options.pop("before", None)
    if options.get("precision") == "16-mixed":
        options.update(precision("16-mixed"), precision=None)
    trainer = make_trainer(**{"max_epochs": 2, **options})
    if before is not None:
        before(module, data, trainer)
    trainer.fit(module, data, ckpt_path=path)
    return everything(module, trainer, data)


def assert_same(some: list[Any], others: list[Any]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


OPTIONS: list[dict[str, Any]] = [
    {},
    {"precision": "16-mixed"},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"precision": "64-true"},
    {"accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fit_after_a_look_is_the_fit_without(options):
    def before(module: Any, data: Any, trainer: Any) -> None:
        inspection = lo.inspect_model(module, data, trainer)
        assert inspection.findings == []
        assert inspection.batches == 3

    assert_same(fit(Counted(), **options), fit(Counted(), before=before, **options))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_a_fit_with_a_look_in_it_is_the_fit_without(hook, options):
    module = Counted(look=True, hook=hook)
    looked = fit(module, **options)
    assert module.looked == 1
    assert_same(fit(Counted(), **options), looked)


@pytest.mark.parametrize("look", ["before", "within"])
def test_two_optimizers_by_hand(look):
    before = (lambda module, data, trainer: lo.inspect_model(module, data, trainer)) if look == "before" else None
    assert_same(fit(Alternating()), fit(Alternating(look=look == "within"), before=before))


def test_a_fit_that_is_resumed(tmp_path):
    trainer, module = make_trainer(max_epochs=1), Counted()
    torch.manual_seed(1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    path = str(tmp_path / "it.ckpt")
    assert_same(fit(Counted(), ckpt_path=path), fit(Counted(look=True), ckpt_path=path))


def test_with_our_callbacks_a_fit_is_the_same():
    def callbacks() -> list[Any]:
        return [
            lo.ConfigureOptimizers("adamw", lr=1e-2, schedule="cosine"),
            lo.GradientClipping(1.0),
            lo.DivergenceGuard(),
        ]

    plain = fit(Counted(), callbacks=callbacks())
    assert_same(plain, fit(Counted(look=True), callbacks=callbacks()))
    before = lambda module, data, trainer: lo.inspect_model(module, data, trainer)  # noqa: E731
    assert_same(plain, fit(Counted(), callbacks=callbacks(), before=before))


def test_a_plain_module_is_as_it_was():
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        *(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 4))
    )
    model[0].weight.grad = torch.ones(16, 8)
    gradient = model[0].weight.grad
    stepped: list[Any] = []
    model[4].weight.register_post_accumulate_grad_hook(stepped.append)
    own = model[2].register_forward_hook(lambda *_: None)
    data: Any = loader()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng, order = torch.get_rng_state(), data.generator.get_state()
    lo.inspect_model(model, data, loss=F.cross_entropy)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(16, 8))
    assert all(p.grad is None for p in model[4].parameters())
    assert stepped == []
    assert all(p._backward_hooks is None for p in model.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model] == [0, 0, 1, 0, 0]
    assert own.id in model[2]._forward_hooks
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(data.generator.get_state(), order)
    assert data.dataset.read == 0
    F.cross_entropy(model(torch.randn(8, 8)), torch.zeros(8, dtype=torch.long)).backward()
    assert len(stepped) == 1


@pytest.mark.parametrize("bad", ["raises", "target"])
def test_all_is_put_back_after_an_error(bad):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(0)
        if bad == "raises" and len(calls) == 2:
            raise KeyError("mine")
        return F.cross_entropy(outputs, targets + (9 if len(calls) == 2 else 0))

    if bad == "raises":
        with pytest.raises(KeyError, match="mine"):
            lo.inspect_model(model, loader(), loss=loss)
    else:
        assert lo.inspect_model(model, loader(), loss=loss).kinds == ["target-range"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_trains_in_the_backward_pass_does_not():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    before = model.weight.detach().clone()
    inspection = lo.inspect_model(model, loader(), loss=F.cross_entropy)
    assert torch.equal(model.weight, before)
    assert inspection.rows[0].weight_gradient_rms > 0


def test_data_that_can_be_read_once_are_refused():
    class Once(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return torch.randn(8), 0

    for data in (iter([(torch.randn(2, 8), torch.zeros(2))]), DataLoader(Once(), 4)):
        with pytest.raises(TypeError, match="missing in training"):
            lo.inspect_model(nn.Linear(8, 4), data, loss=F.cross_entropy)


def test_what_cannot_be_looked_at_is_refused_with_the_way_out():
    data = [(torch.randn(16, 8), torch.randint(4, (16,)))]
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        lo.inspect_model(nn.Sequential(nn.LazyLinear(4)), data, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="at least one batch"):
        lo.inspect_model(nn.Linear(8, 4), [], loss=F.cross_entropy)
    with pytest.raises(ValueError, match="step="):
        lo.inspect_model(nn.Linear(8, 4), data)
    with pytest.raises(ValueError, match="must return one number"):
        lo.inspect_model(nn.Linear(8, 4), data, loss=lambda outputs, targets: outputs)
    with pytest.raises(ValueError, match="training_step computes the loss"):
        lo.inspect_model(Counted(), data, loss=F.cross_entropy)
    Draws = type("Draws", (Counted,), {"training_step": lambda self, dataloader_iter: None})
    with pytest.raises(ValueError, match="dataloader_iter"):
        lo.inspect_model(Draws(), loader())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        lo.inspect_model("model", data)


def test_several_loaders_batches_in_a_list_and_none_at_all():
    class Two(Counted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    class Own(Counted):
        def train_dataloader(self) -> Any:
            return loader()

    x, y = torch.randn(48, 8), torch.randint(4, (48,))
    inspection = lo.inspect_model(Two(), {"x": DataLoader(x, 16), "y": DataLoader(y, 16)}, make_trainer())
    assert (inspection.batches, inspection.samples, inspection.findings) == (3, 16, [])
    assert lo.inspect_model(Counted(), [(x, y)]).batches == 1
    assert lo.inspect_model(Own()).batches == 3


@pytest.mark.parametrize("module", [Counted, Alternating])
def test_no_step_is_taken_between_batches(module):
    model = module()
    model.drop = nn.Dropout(0.0)
    batch = torch.randn(48, 8), torch.randint(4, (48,))
    once, thrice = (lo.inspect_model(model, [batch] * count) for count in (1, 3))
    assert (once.batches, thrice.batches) == (1, 3)
    assert [row.rms for row in thrice.rows] == pytest.approx([row.rms for row in once.rows], rel=1e-6)


def test_gradients_of_a_scaled_loss_are_those_without_the_scale():
    batch = torch.randn(48, 8), torch.randint(4, (48,))
    model = Counted()
    model.drop = nn.Dropout(0.0)
    plain = lo.inspect_model(model, [batch], make_trainer())
    scaled = lo.inspect_model(model, [batch], make_trainer(**precision("16-mixed")))
    assert scaled.findings == []
    for key in ("gradient_rms", "weight_gradient_rms"):
        wanted = [getattr(row, key) for row in plain.rows if getattr(row, key) is not None]
        assert [getattr(row, key) for row in scaled.rows if getattr(row, key) is not None] == pytest.approx(
            wanted, rel=0.05
        )
    assert [loss.value for loss in scaled.losses] == pytest.approx([loss.value for loss in plain.losses], rel=1e-2)


def test_a_look_starts_no_processes_and_leaves_those_of_a_loader():
    data = DataLoader(TensorDataset(torch.zeros(8, 8)), 4, num_workers=2, persistent_workers=True, prefetch_factor=3)
    data._iterator = running = object()  # type: ignore[assignment]
    copied = independent(data)
    assert len(list(copied)) == 2
    assert copied.dataset is data.dataset
    assert data._iterator is running
    assert (data.num_workers, data.persistent_workers, data.prefetch_factor) == (2, True, 3)
    data._iterator = None


def test_compiled_models_are_seen_as_they_are_written():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(32, 8), torch.randint(4, (32,)))]
    plain = lo.inspect_model(model, data, loss=F.cross_entropy)
    compiled = lo.inspect_model(torch.compile(model, backend="eager"), data, loss=F.cross_entropy)
    assert [row.rms for row in compiled.rows] == [row.rms for row in plain.rows]


def test_activation_checkpointing_is_seen_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    data = [(torch.randn(32, 8), torch.randint(4, (32,)))]
    model = Net()
    rows = lo.inspect_model(model, data, loss=F.cross_entropy).rows
    assert [row.name for row in rows] == ["body.0", "body.1", "head"]
    plain = nn.Sequential(model.body, model.head)
    for row, other in zip(rows, lo.inspect_model(plain, data, loss=F.cross_entropy).rows, strict=True):
        assert (row.rms, row.gradient_rms) == (other.rms, other.gradient_rms)


def test_gradients_are_those_of_the_parameters():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    hidden = model[0](x)
    hidden.retain_grad()
    loss = F.cross_entropy(model[2](model[1](hidden)), y)
    loss.backward()
    inspection = lo.inspect_model(model, [(x, y)], loss=F.cross_entropy)
    row = inspection.rows[0]
    assert row.rms == pytest.approx(hidden.square().mean().sqrt().item())
    assert row.gradient_rms == pytest.approx(float(hidden.grad.square().mean().sqrt()))
    both = torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad])
    assert row.weight_gradient_rms == pytest.approx(float(both.square().mean().sqrt()))
    assert row.weight_gain == pytest.approx(model[0].weight.square().mean().sqrt().item() * 8**0.5)
    assert inspection.losses[0].value == pytest.approx(loss.item())
