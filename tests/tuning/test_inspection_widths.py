"""The coordinate check tells a parametrisation by which a learning rate transfers from one by which it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_optim as lo
from lightning_optim.param_groups import shapes_of

WIDTHS = [32, 64, 128, 256]


def perceptron(width):
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4, bias=False)
    )


def mup(width):
    """Variances of 1/fan_in inside, and of 1/fan_in² in the head."""
    model = perceptron(width)
    nn.init.normal_(model[2].weight, std=width**-0.5)
    nn.init.normal_(model[4].weight, std=1 / width)
    return model


def scaled(model, width):
    rule = lo.WidthScaling(base_shapes=shapes_of(mup(WIDTHS[0])), scale_head=True)
    return lo.OptimizerFactory("adamw", lr=1e-2, param_groups=[rule]).build(model)


def plain(model, width):
    return lo.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)


def test_with_width_scaling_nothing_depends_on_width(batch):
    check = lo.coordinate_check(mup, WIDTHS, scaled, batch, loss=F.cross_entropy)
    assert check.flat, str(check)
    assert [row.name for row in check.rows] == ["0", "2", "4", "output"]
    assert all(abs(row.change_slope) < 0.2 for row in check.rows)
    assert "Flat" in check.table()


def test_with_one_rate_hidden_layers_and_outputs_grow(batch, tmp_path):
    check = lo.coordinate_check(perceptron, WIDTHS, plain, batch, loss=F.cross_entropy)
    assert not check.flat
    assert check.grows == ["2", "4", "output"]
    assert check.shrinks == []
    assert all(row.change_slope > 0.5 for row in check.rows[1:])
    text = str(check)
    assert "2 and 4 and output grow" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())
    check.picture(tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes()[:4] == b"\x89PNG"


def test_with_too_small_rates_training_changes_less_in_wide_models(batch):
    def smaller(model, width):
        return torch.optim.Adam(model.parameters(), lr=1e-2 / (width / WIDTHS[0]) ** 2)

    check = lo.coordinate_check(mup, WIDTHS, smaller, batch, loss=F.cross_entropy)
    assert set(check.shrinks) == {"0", "2", "4", "output"}


def test_random_numbers_stay_and_step_serves_other_batches(batch):
    before = torch.get_rng_state()

    def step(model, given):
        return F.cross_entropy(model(given["x"]), given["y"])

    check = lo.coordinate_check(perceptron, [8, 16], plain, {"x": batch[0], "y": batch[1]}, step=step, steps=1, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(check.rows[0].rms) == 2
    assert check.rows[0].change[0] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [8]}, "widths"),
        ({"widths": [16, 8]}, "increasing"),
        ({"steps": 0}, "steps=0"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_wrong_numbers_are_refused(options, message, batch):
    given = {"widths": [8, 16], **options}
    with pytest.raises(ValueError, match=message):
        lo.coordinate_check(perceptron, make_optimizer=plain, batch=batch, loss=F.cross_entropy, **given)
