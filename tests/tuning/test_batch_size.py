"""The batch size: which fits, which is worth it, and the rate that goes with it."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from lightning.pytorch.tuner.tuning import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim as lo
from lightning_optim.cli import main
from lightning_optim.tuning.batch_size.critical import CriticalBatch, advice, critical_batch
from lightning_optim.tuning.batch_size.largest import Fit, _judge, largest_batch
from lightning_optim.tuning.batch_size.probe import BatchProbe
from lightning_optim.tuning.batch_size.rules import scale_lr
from tests.helpers import Net, make_trainer, precision, samples

# The rate for another size.


@pytest.mark.parametrize(
    ("optimizer", "factor", "published"),
    [
        ("sgd", 4, True),
        (torch.optim.SGD, 4, True),
        ("lars", 4, True),
        ("adamw", 2, True),
        (torch.optim.Adam, 2, True),
        ("rmsprop", 2, True),
        ("lamb", 2, True),
        ("lion", 2, False),
        ("muon", 2, False),
        ("prodigy", 1, False),
        ("adagrad", 1, False),
        ("schedule_free_sgd", 4, True),
        ("my.own.Optimizer", 2, False),
    ],
)
def test_the_rate_follows_the_rule_of_its_optimizer(optimizer, factor, published):
    scaled = scale_lr(0.01, 64, 256, optimizer)
    assert scaled.lr == pytest.approx(0.01 * factor)
    assert (scaled.source is not None) is published
    assert published or scaled.notes
    assert scale_lr(scaled.lr, 256, 64, optimizer).lr == pytest.approx(0.01)


def test_averages_eps_and_decoupled_decay_keep_their_length_in_samples():
    scaled = scale_lr(1e-3, 10, 40, "adamw", {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1})
    assert scaled.others == {"betas": (0.6, 0.96), "eps": 5e-9, "weight_decay": 0.2}
    assert scale_lr(1e-3, 10, 40, "adam", {"weight_decay": 0.1}).others == {}
    assert scale_lr(1e-3, 10, 40, "adam", {"weight_decay": 0.1, "weight_decay_kind": "decoupled"}).others
    assert scale_lr(0.1, 10, 40, "sgd", {"weight_decay": 1e-4, "momentum": 0.9}).others == {}
    independent = {"weight_decay": 1e-4, "weight_decay_kind": "independent"}
    assert scale_lr(0.1, 10, 40, "sgd", independent).others == {"weight_decay": 4e-4}
    short = scale_lr(1e-3, 10, 400, "adamw", {"betas": (0.9, 0.999)})
    assert "betas" not in short.others
    assert "shorter than one step" in short.notes[0]


@pytest.mark.parametrize("given", [(0.0, 8, 16), (math.nan, 8, 16), (0.1, 0, 16), (0.1, 8, -1)])
def test_what_is_no_batch_or_no_rate_is_refused(given: tuple[float, int, int]):
    with pytest.raises(ValueError, match=r"Invalid (lr|batch|new_batch)="):
        scale_lr(given[0], given[1], given[2], "sgd")


def _after_equal_samples(cls, lr, batch, count=20_000, size=4000, **options):
    """Mean of w after so many samples of a noisy slope: every optimizer goes down, by how much is its speed."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.zeros(size))
    optimizer = cls([weights], lr=lr, **options)
    for _ in range(count // batch):
        weights.grad = 0.02 + torch.randn(size, generator=generator) / math.sqrt(batch)
        optimizer.step()
    return weights.mean().item(), weights.std().item()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.Adam, {"betas": (0.9, 0.99), "eps": 1e-12}),
        (torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-12}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_under_noise_the_scaled_rate_goes_as_far_per_sample_with_as_much_noise(cls, options):
    scaled = scale_lr(1e-3, 20, 80, cls, options)
    small = _after_equal_samples(cls, 1e-3, 20, **options)
    large = _after_equal_samples(cls, scaled.lr, 80, **{**options, **scaled.others})
    assert large == pytest.approx(small, rel=0.12)
    if scaled.rule != "unchanged":
        assert _after_equal_samples(cls, 1e-3, 80, **options)[0] != pytest.approx(small[0], rel=0.3)


# How large is worth it.


def test_the_critical_batch_is_that_of_the_noise_put_in():
    generator = torch.Generator().manual_seed(0)
    slope = torch.full((100,), 0.1)  # |G|² = 1, tr(Σ) = 50² / 25 = 100
    pairs = []
    for _ in range(200):
        noise = torch.randn(4, 8, 100, generator=generator)
        grads = slope + noise.mean(1)
        pairs.append((grads[0].square().sum().item(), grads.mean(0).square().sum().item()))
    found = critical_batch(pairs, 8, 32)
    assert found.low < 100 < found.high
    assert found.size == pytest.approx(100, rel=0.15)


def test_without_a_gradient_beside_the_noise_nothing_is_claimed():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20, 2, 50, generator=generator).square().sum(-1) / torch.tensor([8, 32])
    found = critical_batch(draws.tolist(), 8, 32)
    assert found.high == math.inf
    text = advice(found, 64)
    assert "more than can be told" in text or "cannot be told" in text
    for pairs in ([], [(1.0, 0.5)] * 7, [(math.nan, 1.0)] * 20):
        assert "Measure more steps" in advice(critical_batch(pairs, 8, 32), 64)
    with pytest.raises(ValueError, match="large"):
        critical_batch([], 8, 8)
    with pytest.raises(ValueError, match="batch=0"):
        advice(CriticalBatch(10.0), 0)


# Which fits.


def _memory(limit, data=10**9, memory=None):
    def try_size(size):
        if size > data:
            return Fit(size, "data", f"only {data} samples")
        if size > limit:
            return Fit(size, "memory", "out of memory")
        return Fit(size, "ok", memory=memory and memory(size), found={"device": "cpu"})

    return try_size


@pytest.mark.parametrize(
    ("limit", "start", "size", "reason"),
    [
        (100, 8, 64, "128 does not fit: out of memory"),
        (100, 512, 64, "128 does not fit"),
        (0, 4, None, "1 does not fit"),
        (10**6, 16, 128, "the search ends at 200"),
    ],
)
def test_the_largest_that_fits_is_found_from_both_sides(limit, start, size, reason):
    found = largest_batch(_memory(limit), start, 512 if start == 512 else 200)
    assert (found.size, reason in found.reason) == (size, True), found


def test_the_data_or_the_memory_that_is_left_ends_the_search():
    assert largest_batch(_memory(10**6, data=50), 8).size == 32
    assert largest_batch(_memory(10**6, data=3), 8).size == 2
    found = largest_batch(_memory(10**6, memory=lambda size: size * 10**12), 8)
    assert (found.size, found.reason.startswith("32 would take about 32 TB of the")) == (16, True)
    with pytest.raises(ValueError, match="start=9"):
        largest_batch(_memory(1), 9, 8)
    with pytest.raises(RuntimeError, match=r"batch size 8 failed:\nValueError: no"):
        largest_batch(lambda size: Fit(size, "error", "ValueError: no"), 8)


def test_a_fit_is_judged_by_how_its_process_ended():
    ok = {"status": "ok", "steps": 3, "size": 8, "memory": 1}
    assert _judge(8, 0, "", ok).status == "ok"
    assert _judge(16, 0, "", ok).message == "the training data have only 8 samples for a batch of 16"
    assert _judge(16, 0, "No training batches.", {}).status == "data"
    assert _judge(8, -signal.SIGKILL, "", {}).status == "memory"
    assert _judge(8, 1, "", {"status": "memory", "message": "OutOfMemoryError: much"}).status == "memory"
    assert _judge(8, 1, "a\nerror: Invalid lr", {}).message == "a\nerror: Invalid lr"


class Scaled(Net):
    """Data of a batch size, and a memory that is full above a limit."""

    def __init__(self, batch_size=4, limit=10**9, error=torch.OutOfMemoryError):
        super().__init__()
        self.batch_size, self.limit, self.error = batch_size, limit, error

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > self.limit:
            raise self.error("CUDA out of memory.")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        x, y = samples(64).tensors
        return DataLoader(TensorDataset(x, y), self.batch_size)

    val_dataloader = train_dataloader


def _callbacks():
    rules = ["no_decay", {"name": "head", "pattern": "^head", "lr_multiplier": 3}]
    configure = lo.ConfigureOptimizers("adamw", lr=1e-2, schedule="cosine", warmup=2, param_groups=rules)
    return [configure, lo.GradientClipping(0.5), lo.DivergenceGuard(), lo.OptimizerMonitor()]


@pytest.mark.parametrize("name", ["32-true", "16-mixed"])
def test_the_probe_measures_a_part_of_the_batch_and_all_of_it(tmp_path, name):
    torch.manual_seed(0)
    model, path = Scaled(), tmp_path / "found.json"
    options = {"accumulate_grad_batches": 4, "max_steps": 12, "max_epochs": -1, **precision(name, 2.0**8)}
    probe, saves = BatchProbe(str(path), noise=True), ModelCheckpoint(tmp_path / "checkpoints")
    trainer = make_trainer([*_callbacks(), probe, saves], enable_checkpointing=True, **options)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    grads = []
    for index, (x, y) in enumerate(model.train_dataloader()):
        model.zero_grad()
        Net.training_step(model, [x, y], index).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if index == 3:
            break
    trainer.fit(model)
    found = json.loads(path.read_text())
    numbers = [found[key] for key in ("status", "steps", "small", "large", "accumulated")]
    assert numbers == ["ok", 12, 4, 16, 4]
    expected = [grads[0].square().sum().item(), torch.stack(grads).mean(0).square().sum().item()]
    assert found["pairs"][0] == pytest.approx(expected, rel=2e-2 if name == "16-mixed" else 1e-5)
    assert len(found["pairs"]) == 12
    assert found["samples_per_second"] > 0
    assert found["memory"] > 0
    assert not (tmp_path / "checkpoints").exists()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError, ZeroDivisionError])
def test_the_probe_tells_a_full_memory_from_other_errors(tmp_path, error):
    path = tmp_path / "found.json"
    with pytest.raises(error):
        make_trainer([BatchProbe(str(path))], max_steps=2).fit(Scaled(limit=1, error=error))
    found = json.loads(path.read_text())
    assert found["status"] == ("error" if error is ZeroDivisionError else "memory")


# Lightning's own finder.

FINDERS = [
    pytest.param(*each, id="-".join(map(str, each)), marks=[] if each == FIRST else [pytest.mark.slow])
    for FIRST in [("16-mixed", 3, "binsearch", "callback")]
    for each in [
        FIRST,
        ("32-true", 1, "power", "tuner"),
        ("bf16-mixed", 1, "binsearch", "callback"),
        ("16-mixed", 1, "power", "callback"),
        ("16-mixed", 3, "binsearch", "tuner"),
        ("bf16-mixed", 3, "power", "tuner"),
        ("bf16-true", 3, "power", "callback"),
    ]
]


@pytest.mark.parametrize(("name", "accumulate", "mode", "how"), FINDERS)
def test_after_lightnings_finder_the_fit_is_that_with_the_size_found(tmp_path, name, accumulate, mode, how):
    def fit(batch_size, search):
        torch.manual_seed(1)
        model, callbacks = Scaled(batch_size, limit=6), _callbacks()
        arguments = {"mode": mode, "steps_per_trial": 2, "max_trials": 8, "init_val": 2}
        finder = [BatchSizeFinder(**arguments)] if search and how == "callback" else []
        trainer = make_trainer(
            [*finder, *callbacks],
            max_epochs=2,
            **(precision(name) if name.endswith("mixed") else {"precision": name}),
            accumulate_grad_batches=accumulate,
            default_root_dir=tmp_path,
        )
        if search and how == "tuner":
            Tuner(trainer).scale_batch_size(model, **arguments)
        trainer.fit(model)
        return model, trainer

    model, trainer = fit(2, True)
    assert model.batch_size == (4 if mode == "power" else 5)
    alone, without = fit(model.batch_size, False)
    assert trainer.global_step == without.global_step > 0
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# The command.

_PROJECT = """
import os, signal, lightning.pytorch as L, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(L.LightningModule):
    def __init__(self, limit: int = 32, how: str = "memory"):
        super().__init__()
        self.limit, self.how, self.net = limit, how, nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > self.limit:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"memory": torch.OutOfMemoryError, "raises": ZeroDivisionError}[self.how]("CUDA out of memory.")
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

class Data(L.LightningDataModule):
    def __init__(self, samples: int = 16):
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(512, 1, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + noise), self.samples)
"""
_RUN = """
model: own_project.Model
data: own_project.Data
trainer: {accelerator: cpu, max_epochs: 1}
optim: {optimizer: sgd, lr: 0.01}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "own_project.py").write_text(_PROJECT)
    (tmp_path / "run.yaml").write_text(_RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["memory", "killed"])
def test_the_command_finds_the_size_and_changes_nothing(project, capfd, how):
    main(["batch-size", "--config", "run.yaml", "--key", "data.samples", f"--model.how={how}"])
    out = capfd.readouterr().out
    assert "Largest batch that fits  32: 64 does not fit" in out
    assert "Critical batch size about" in out
    assert "--data.samples 32 --optim.lr 0.02" in out
    assert "linear rule (Goyal et al., 2017" in out
    left = {path.name for path in project.iterdir()} - {"__pycache__"}
    assert left == {"own_project.py", "run.yaml"}


@pytest.mark.slow
def test_an_error_of_the_module_is_shown_and_is_no_limit(project, capsys):
    with pytest.raises(SystemExit):
        main(["batch-size", "--config", "run.yaml", "--key", "data.samples", "--model.how=raises", "--model.limit=1"])
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_interruption_is_a_line(project, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_optim.tuning.batch_size.largest.run_fit", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["batch-size", "--config", "run.yaml", "--key", "data.samples"])
    assert exit_.value.code == 130
    assert "Interrupted. The same command begins again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strat", "4"], "Unknown option --strat. Did you mean '--start'"),
        ([], "No batch_size among the arguments of data and model. Name the flag that sets it: --key"),
        (["--key", "data.sample"], "Invalid --key data.sample: its value must be a number of samples, and is None."),
        (["--optim.lrr", "1"], "Unknown option --optim.lrr. Did you mean --optim.lr?"),
        (["--key", "data.samples", "--start", "9000"], "Invalid start=9000: must be from 1 to the last size"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_fit(project, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["batch-size", "--config", "run.yaml", *flags])
    assert message in capsys.readouterr().err
