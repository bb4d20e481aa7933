"""Complex parameters, which torch takes for pairs of real numbers, are clipped and measured as such pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.clipping import make_clip_rule
from lightning_optim.core.stats import StepRecord
from lightning_optim.divergence.base import NonFiniteGradient
from lightning_optim.step import StepPipeline, histograms

RULES = {
    "global_norm": {"max_norm": 0.5},
    "value": {"max_value": 0.1},
    "agc": {"clip_factor": 0.05},
    "block_rms": {"max_rms": 0.2},
    "update_rms": {"max_rms": 0.5},
    "momentum_ratio": {"ratio": 2.0, "warmup": 1},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_complex_parameter_is_a_pair_of_real_ones(name: str, amsgrad: bool) -> None:
    torch.manual_seed(0)
    pair = nn.Parameter(torch.randn(5, 3, 2))
    whole = nn.Parameter(torch.view_as_complex(pair.detach().clone()))
    grads = [torch.randn(5, 3, 2) * size for size in (0.1, 0.1, 30.0, 0.1)]
    records: list[list[StepRecord]] = []
    for param in (whole, pair):
        optimizer = torch.optim.AdamW([param], amsgrad=amsgrad)
        seen: list[StepRecord] = []
        pipeline = StepPipeline(
            optimizer,
            clip=make_clip_rule(name, RULES[name]),
            detectors=[NonFiniteGradient()],
            on_report=seen.append,
            histograms=lambda: histograms.KINDS,
        )
        for grad in grads:
            param.grad = torch.view_as_complex(grad.clone()) if param.is_complex() else grad.clone()
            optimizer.step()
        records.append([*seen])
        assert pipeline.counts().clipped > 0
        pipeline.close()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), pair.detach())
    for one, other in zip(*records, strict=True):
        torch.testing.assert_close(one.per_tensor(), other.per_tensor(), equal_nan=True)
        assert one.update.numel == other.update.numel
        torch.testing.assert_close(one.histograms, other.histograms)


def test_a_lazily_conjugated_gradient_is_clipped_by_value() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    param.grad = torch.tensor([3.0 + 0.05j, -0.05 - 3.0j]).conj()
    optimizer = torch.optim.SGD([param], lr=1.0)
    pipeline = StepPipeline(optimizer, clip=make_clip_rule("value", {"max_value": 0.1}))
    optimizer.step()
    pipeline.close()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.1 + 0.05j, 0.05 - 0.1j]))
