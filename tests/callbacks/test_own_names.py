"""Clip rules, detectors and diagnostics of a user's, registered by name and named in YAML, in a real fit."""

from __future__ import annotations

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_optim as lo
from lightning_optim.clipping import ClipRule
from lightning_optim.diagnostics import Diagnostic
from lightning_optim.divergence import Detector
from tests.helpers import Data, Net

pytestmark = pytest.mark.usefixtures("own_names")

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_steps": 3,
}


class Tenth(ClipRule):
    """Always a tenth of the gradient."""

    def __init__(self, divisor: float = 10.0) -> None:
        self.divisor = divisor

    def __call__(self, stats, state=None, limit=1.0):
        return torch.full_like(stats.total_norm(), self.divisor)


class SecondStep(Detector):
    """Asks for the second step to be skipped."""

    reason = "it is the second step"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, stats):
        self.calls += 1
        return torch.tensor(self.calls == 2)


class Largest(Diagnostic):
    """The largest gradient norm of a tensor in each group."""

    name = "grad/largest_tensor"

    def compute(self, record):
        parts = torch.split(record.grad.norm_sq, list(record.grad.group_sizes))
        return torch.stack([part.max().sqrt() for part in parts])


def _fit_from_yaml(callbacks, folder):
    """A fit by stock LightningCLI: scalars and texts of its event file, and its callbacks by their class."""
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    config = {"trainer": {**TRAINER, "logger": logger, "callbacks": yaml.safe_load(callbacks)}, "data": {"count": 20}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(Net, Data, args=["fit", "--config", str(path)], save_config_callback=None)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")]
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags}
    return scalars, texts, {type(callback): callback for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]


def test_a_clip_rule_of_ones_own(tmp_path):
    lo.register(Tenth)
    yaml_text = """
- {class_path: lightning_optim.GradientClipping, init_args: {method: tenth, method_kwargs: {divisor: 4.0}}}
- lightning_optim.OptimizerMonitor
"""
    scalars, _, found = _fit_from_yaml(yaml_text, tmp_path)
    assert isinstance(found[lo.GradientClipping].clip_rule(), Tenth)
    before, after = scalars["optim_grad_norm/total"], scalars["optim_grad_norm_clipped/total"]
    assert len(before) == 3
    assert after == pytest.approx([norm / 4 for norm in before], rel=1e-5)
    assert scalars["optim_health/clip_rate"] == [1.0] * 3
    with pytest.raises(ValueError, match=r"'tenth' takes no 'divsor'\. Did you mean 'divisor'"):
        lo.GradientClipping(method="tenth", method_kwargs={"divsor": 2.0})


def test_a_detector_of_ones_own(tmp_path):
    lo.register(SecondStep)
    yaml_text = f"""
- {{class_path: lightning_optim.DivergenceGuard, init_args: {{detectors: [second_step], report_dir: {tmp_path}}}}}
- lightning_optim.OptimizerMonitor
"""
    with pytest.warns(UserWarning, match="Step 1 skipped: second_step: it is the second step"):
        scalars, texts, found = _fit_from_yaml(yaml_text, tmp_path)
    assert scalars["optim_health/skipped_steps"] == [0.0, 1.0, 1.0]
    assert found[lo.DivergenceGuard].skipped_steps == 1
    assert "second_step: it is the second step" in texts["optim_health/divergence/text_summary"]
    assert "it is the second step" in (tmp_path / "divergence_report.md").read_text()


def test_a_diagnostic_of_ones_own(tmp_path):
    lo.register(Largest)
    yaml_text = """
- {class_path: lightning_optim.OptimizerMonitor, init_args: {diagnostics: [largest, grad_norm]}}
"""
    scalars, _, _ = _fit_from_yaml(yaml_text, tmp_path)
    (tag,) = (tag for tag in scalars if tag.startswith("optim_grad/largest_tensor/"))
    group = tag.rsplit("/", 1)[1]
    assert len(scalars[tag]) == 3
    for largest, norm in zip(scalars[tag], scalars[f"optim_grad_norm/{group}"], strict=True):
        assert 0 < largest <= norm


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: lo.GradientClipping(method="tenht"), "Unknown clipping method 'tenht'. Did you mean 'tenth'"),
        (lambda: lo.DivergenceGuard(detectors=["secondstep"]), "Unknown detector 'secondstep'. Did you mean 'second_s"),
        (lambda: lo.OptimizerMonitor(diagnostics=["larges"]), "Unknown diagnostic 'larges'. Did you mean 'largest'"),
    ],
)
def test_a_name_that_is_nearly_ones_own_is_refused_with_the_nearest(callback, message):
    for cls in (Tenth, SecondStep, Largest):
        lo.register(cls)
    with pytest.raises(ValueError, match=message):
        callback()
