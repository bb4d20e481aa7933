"""Single tensors and histograms, read back from the event files of real runs."""

from __future__ import annotations

import io
import math
from functools import partial

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_optim as lo
from lightning_optim.diagnostics import DEFAULT_DIAGNOSTICS, Histograms, PerTensor, StepReport
from lightning_optim.diagnostics.magnitudes import EDGES, TAGS
from lightning_optim.step import histograms
from lightning_optim.step.histograms import ABOVE, BELOW, COLUMNS, FIRST, KINDS, NOT_FINITE, ZERO, magnitudes
from tests.helpers import ADAMWS, RULES, Net, TwoOptimizers, batches, make_trainer, precision


def _fit(logger, count=8, model=None, parts=(), optimizer=ADAMWS["ours"], per_tensor=None, histograms=None, **options):
    monitor = lo.OptimizerMonitor(per_tensor=per_tensor, histograms=histograms)
    configure = lo.ConfigureOptimizers(**optimizer, lr=0.01, weight_decay=0.2, param_groups=RULES)
    make_trainer([configure, monitor, *parts], logger=logger, **options).fit(model or Net(), batches(count))
    return _events(logger)


def _events(logger):
    everything = EventAccumulator(logger.log_dir, size_guidance=dict.fromkeys(("tensors", "images", "histograms"), 0))
    everything.Reload()
    return everything


def _tables(events, tag="optim/tensors"):
    """By step: lines of the table, as dictionaries."""
    found = {}
    for event in events.Tensors(f"{tag}/text_summary"):
        header, _, *lines = event.tensor_proto.string_val[0].decode().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
        found[event.step] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    return found


@pytest.mark.pictures
def test_nothing_of_it_without_being_asked(logger):
    events = _fit(logger)
    assert events.Tags()["histograms"] == []
    assert events.Tags()["images"] == ["optim/schedule"]
    assert not any("optim/tensors" in tag for tag in events.Tags()["tensors"])


# Single tensors.


class Around(L.Callback):
    """Copies, around each update, gradients before clipping and parameters."""

    def __init__(self) -> None:
        self.grads, self.before, self.after = [], [], []

    def on_after_backward(self, trainer, pl_module):  # not before the step, where gradients would be unscaled for it
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.grads.append({n: p.grad.double().numpy() / scale for n, p in pl_module.named_parameters()})
        self.before.append({n: p.detach().double().numpy().copy() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append({n: p.detach().double().numpy().copy() for n, p in pl_module.named_parameters()})


def _rms(values):
    return math.sqrt(np.square(values).mean())


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_table_of_the_tensors_that_stand_out(logger, kind):
    around = Around()
    events = _fit(
        logger,
        parts=[around, lo.GradientClipping(0.5)],
        optimizer=ADAMWS[kind],
        per_tensor=PerTensor(worst=4, heat_maps=(), every=3),
    )
    tables = _tables(events)
    assert list(tables) == [2, 5, 7]
    for step, lines in tables.items():
        before, after, grads = around.before[step], around.after[step], around.grads[step]
        ratios = {n: _rms(after[n] - before[n]) / _rms(before[n]) for n in before if before[n].any()}
        median = np.median(np.log10(list(ratios.values())))
        ranked = sorted(ratios, key=lambda n: -abs(np.log10(ratios[n]) - median))
        assert [line["tensor"] for line in lines] == ranked[:4]
        total = sum(np.square(g).sum() for g in grads.values())
        for line in lines:
            name = line["tensor"]
            assert line["group"] == ("head" if "head" in name else "default" if name == "body.weight" else "no_decay")
            expected = {
                "grad_norm": np.linalg.norm(grads[name]),
                "param_rms": _rms(before[name]),
                "update_rms": _rms(after[name] - before[name]),
                "update_ratio": ratios[name],
            }
            assert {key: float(line[key]) for key in expected} == pytest.approx(expected, rel=6e-3)  # three digits
            share = float(line["share of grad_norm²"].rstrip("%")) / 100
            assert share == pytest.approx(np.square(grads[name]).sum() / total, abs=6e-4)


@pytest.mark.pictures
def test_tensors_whose_gradient_is_not_finite_come_first(logger):
    class Broken(Net):
        def on_before_optimizer_step(self, optimizer):
            self.norm.weight.grad[1] = float("nan")

    events = _fit(logger, 1, Broken(), per_tensor=PerTensor(worst=1, heat_maps=()))
    ((line,),) = _tables(events).values()
    assert (line["tensor"], line["grad_norm"]) == ("norm.weight", "inf")
    assert events.Tags()["images"] == ["optim/schedule"]


def test_images_of_all_tensors_over_time(logger):
    events = _fit(
        logger, model=Net(nan_batches=[4]), parts=[lo.GradientClipping(1.0)], per_tensor=PerTensor(worst=0, every=4)
    )
    assert not any("optim/tensors" in tag for tag in events.Tags()["tensors"])
    for name in ("grad_norm", "update_ratio"):
        images = events.Images(f"optim/tensors/{name}")
        assert [image.step for image in images] == [3, 7]
    red = {}
    for name in ("grad_norm", "update_ratio"):
        pixels = imread(io.BytesIO(events.Images(f"optim/tensors/{name}")[-1].encoded_image_string))[..., :3]
        red[name] = ((pixels == [1, 0, 0]).all(-1)).any(0).sum() / pixels.shape[1]
    assert red["grad_norm"] == pytest.approx(0.85 / 8, abs=0.02)  # one column of eight
    assert red["update_ratio"] == 0  # that step was left out


def test_several_optimizers_have_tables_and_histograms_of_their_own(logger):
    model = TwoOptimizers(partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.2))
    monitor = lo.OptimizerMonitor(per_tensor=PerTensor(heat_maps=["zero"]), histograms=Histograms(["grad"], every=2))
    make_trainer([monitor], logger=logger).fit(model, batches(4))
    events = _events(logger)
    assert set(events.Tags()["histograms"]) == {"optim_grad/0.histogram/0", "optim_grad/1.histogram/0"}
    for index, layer in enumerate(("body", "head")):
        ((_, lines),) = _tables(events, f"optim/{index}.tensors").items()
        assert {line["tensor"] for line in lines} == {f"{layer}.weight", f"{layer}.bias"}
        assert [event.step for event in events.Histograms(f"optim_grad/{index}.histogram/0")] == [0, 2]


# Histograms.


def _counted(values: np.ndarray) -> np.ndarray:
    """The same in numpy."""
    counts = np.zeros(COLUMNS)
    for value in np.abs(values.astype(np.float64)).ravel():
        if not np.isfinite(value):
            column = NOT_FINITE
        elif value == 0:
            column = ZERO
        else:
            column = min(max(int(np.frexp(value)[1]) - 1 - FIRST + BELOW + 1, BELOW), ABOVE)
        counts[column] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_are_numpys(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-140, 120, (3999,), generator=generator).double()
    odd = [0.0, -0.0, 1e-45, 5e-324, 6e-8, -6.1e-5, math.nan, math.inf, -math.inf, 65535.0, 65536.0, -65504.0]
    odd += [2.0**FIRST, math.nextafter(2.0**FIRST, 0), 2.0 ** (FIRST - 1), 1.0, math.nextafter(1.0, 0), 2.0, -1.5]
    values = torch.randn(3999, generator=generator, dtype=torch.float64) * 2**exponents
    values = torch.cat([values, torch.tensor(odd, dtype=torch.float64)]).to(dtype).view(-1, 7)
    counts = magnitudes(values)
    assert counts.tolist() == _counted(values.double().numpy()).tolist()
    assert counts.sum() == values.numel()
    assert counts[NOT_FINITE] >= 3
    assert magnitudes(values.t()).equal(counts)  # not contiguous
    assert magnitudes(values[:0]).tolist() == [0] * COLUMNS


def test_counts_of_more_than_one_chunk(monkeypatch):
    monkeypatch.setattr("lightning_optim.step.histograms._CHUNK", 3)
    assert magnitudes(torch.full((10,), 1.0))[1 - FIRST + BELOW] == 10


def _shown(event) -> np.ndarray:
    """Counts by column, from where the event says that they lie."""
    histogram, counts = event.histogram_value, np.zeros(COLUMNS)
    for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True):
        counts[int(np.argmin(np.abs(np.array(EDGES) - limit))) - 1] = count
    first = int(np.flatnonzero(counts)[0])
    assert histogram.min == pytest.approx(EDGES[first])
    assert histogram.max == pytest.approx(histogram.bucket_limit[-1])
    return counts


@pytest.mark.parametrize("kind", ADAMWS)
@pytest.mark.parametrize("name", ["32-true", "64-true", "16-mixed"])
def test_histograms_are_of_what_was_there(logger, kind, name):
    class Rectified(Net):
        def forward(self, x):
            return self.head(torch.relu(self.norm(self.body(x)) - 1))

    around = Around()
    parts = [around, lo.GradientClipping(0.5)]
    events = _fit(logger, 9, Rectified(), parts, ADAMWS[kind], histograms=Histograms(every=3), **precision(name))
    assert set(events.Tags()["histograms"]) == {
        f"{tag}/{group}" for tag in TAGS.values() for group in ("head", "no_decay", "default")
    }
    zeros = 0
    for group, names in {"head": ("head.weight", "head.bias"), "default": ("body.weight",)}.items():
        for what in KINDS:
            shown = events.Histograms(f"{TAGS[what]}/{group}")
            assert [event.step for event in shown] == [0, 3, 6]
            for event in shown:
                before, after = around.before[event.step], around.after[event.step]
                values = {
                    "grad": around.grads[event.step],
                    "param": after,
                    "update": {n: (before[n] - after[n]) for n in names},
                }[what]
                expected = sum(_counted(values[n]) for n in names)
                assert _shown(event).tolist() == expected.tolist(), (group, what, event.step)
                zeros += _shown(event)[ZERO]
                assert event.histogram_value.num == expected.sum()
    assert zeros > 0


def test_underflow_is_seen(logger):
    """Gradients in fp16 that are too small become zeros, and a step in bf16 that is too small changes nothing."""

    class Half(Net):
        def __init__(self):
            super().__init__()
            self.to(torch.bfloat16)

        def training_step(self, batch, batch_idx):
            return super().training_step([part.to(torch.bfloat16) for part in batch], batch_idx)

    monitor = lo.OptimizerMonitor(histograms=Histograms(["update"]))
    configure = lo.ConfigureOptimizers("adamw", lr=1e-5)
    make_trainer([configure, monitor], logger=logger).fit(Half(), batches(1))
    events = _events(logger)
    counts = _shown(events.Histograms("optim_update_norm/histogram/default")[0])
    assert counts[ZERO] > 0.8 * counts.sum()


@pytest.mark.parametrize("kind", ADAMWS)
def test_a_step_that_was_left_out_has_no_histogram_of_its_update(logger, kind):
    events = _fit(
        logger, 3, Net(nan_batches=[1]), [lo.GradientClipping(1.0)], ADAMWS[kind], histograms=Histograms(every=1)
    )
    steps = {what: [event.step for event in events.Histograms(f"{TAGS[what]}/head")] for what in KINDS}
    assert steps == {"grad": [0, 1, 2], "param": [0, 1, 2], "update": [0, 2]}
    assert _shown(events.Histograms("optim_grad/histogram/head")[1])[NOT_FINITE] == 18


# How it is asked for.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerTensor(by="update_ration"), "'update_ratio'"),
        (lambda: PerTensor(heat_maps=["grad_nrm"]), "'grad_norm'"),
        (lambda: PerTensor(worst=-1), "worst=-1"),
        (lambda: PerTensor(every=0), "every=0"),
        (lambda: Histograms(["grads"]), "'grad'"),
        (lambda: Histograms("grad"), "a list"),
        (lambda: Histograms(every=0), "every=0"),
    ],
)
def test_wrong_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(lo.OptimizerMonitor, "monitor")
    text = "{per_tensor: {worst: 3, heat_maps: [zero]}, histograms: {of: [grad], every: 5}}"
    monitor = parser.instantiate(parser.parse_args([f"--monitor={text}"])).monitor
    assert monitor.per_tensor == PerTensor(worst=3, heat_maps=["zero"])
    assert monitor.histograms == Histograms(["grad"], every=5)
    assert parser.instantiate(parser.parse_args([])).monitor.per_tensor is None


def test_without_tensorboard_nothing_is_counted(logger, tmp_path, monkeypatch):
    counted = []
    original = histograms.magnitudes
    monkeypatch.setattr(histograms, "magnitudes", lambda tensor: (counted.append(1), original(tensor))[1])
    for destination in (L.loggers.CSVLogger(tmp_path), logger):
        parts = [lo.ConfigureOptimizers("adamw"), lo.OptimizerMonitor(per_tensor=PerTensor(), histograms=Histograms())]
        make_trainer(parts, logger=destination).fit(Net(), batches(2))
        assert bool(counted) is (destination is logger)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_on_the_device_equal_the_hosts_without_a_synchronisation(dtype):
    values = (torch.randn(70_000, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    values[:5] = torch.tensor([0.0, math.nan, math.inf, 1e-30, 6e4])
    on_device = values.cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        counts = magnitudes(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts.cpu().equal(magnitudes(values))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_reported_step_with_all_details_does_not_wait_for_the_device():
    weights = [torch.nn.Parameter(torch.randn(300, 70, device="cuda")) for _ in range(3)]
    optimizer = lo.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)
    reports = []

    def send(record):
        report = StepReport(record, DEFAULT_DIAGNOSTICS)
        report.add_table("tensors", record.per_tensor())
        for kind, counts in record.histograms.items():
            report.add_table(kind, counts)
        reports.append(report.send())

    pipeline = lo.StepPipeline(optimizer, on_report=send, histograms=lambda: KINDS)
    for step in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if step == 3:  # kernels are compiled by then
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    pipeline.close()
    values = reports[-1].read()
    assert values["optim_update_norm/0"] > 0
    assert reports[-1].tables["update"].sum() == 3 * 300 * 70
    assert reports[-1].tables["tensors"].shape[0] == 3
