"""Every quantity of the monitor, at every step, for every family of optimizers, against float64 arithmetic."""

from __future__ import annotations

import pytest

from tests.helpers import precision
from tests.quantities import FAMILIES, MAX_NORM, compare, fit

# One of each kind in the default run.
pytestmark = pytest.mark.filterwarnings("ignore:ScheduleFreeAdamW")  # whose averages are looked at elsewhere
MORE = ["adamw-large-eps", "nesterov", "adagrad", "nadam", "ademamix", "stableadamw", "normuon", "torch-adafactor"]
MORE += ["adamw-independent", "adamw-corrected", "adamw-l2_sp", "torch-rmsprop", "torch-adagrad", "torch-nadam", "lars"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in MORE)) for n in FAMILIES])
def test_every_quantity_of_every_family_clipped(logger, name):
    rows, events = fit(logger, FAMILIES[name], True, precision="64-true")
    compare(rows, events)
    clipped = [row["optim_grad_norm/total"] > MAX_NORM for row in rows]
    assert [value for _, value in events["optim_health/clip_rate"]] == [float(each) for each in clipped]
    assert any(clipped)
    assert not all(clipped)
    assert any(value > 0 for _, value in events["optim_grad/zero/head"])


@pytest.mark.parametrize("name", ["adamw", "muon", "torch-adamw-fused", "torch-adamw", "torch-momentum"])
@pytest.mark.parametrize(
    ("clips", "options"),
    [(False, {"precision": "64-true"}), (True, {"precision": "64-true", "accumulate_grad_batches": 4})],
    ids=["unclipped", "accumulated"],
)
def test_every_quantity_unclipped_and_accumulated(logger, name, clips, options):
    compare(*fit(logger, FAMILIES[name], clips, count=20, **options))


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "adafactor", "torch-adamw-fused", "torch-adamw"])
def test_every_quantity_without_the_loss_scale_of_16_bits(logger, name):
    rows, events = fit(logger, FAMILIES[name], True, **precision("16-mixed"))
    compare(rows, events, rel=1e-3)
    assert [value for _, value in events["optim_health/loss_scale"]] == [1024.0] * 8
