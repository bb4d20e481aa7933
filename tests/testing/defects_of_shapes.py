"""Defects of shapes, layouts and dtypes."""

from __future__ import annotations

import torch

from tests.testing.correct import Correct
from tests.testing.defects import fails


@fails("vectors", "scalars")
class NeedsMatrices(Correct):
    def update(self, group, param, grad):
        assert grad.shape[1] is not None
        super().update(group, param, grad)


@fails("scalars")
class NeedsALength(Correct):
    def update(self, group, param, grad):
        assert len(grad) >= 0
        super().update(group, param, grad)


@fails("many_dimensions", "channels_last")
class NeedsTwoDimensions(Correct):
    def update(self, group, param, grad):
        assert grad.t() is not None
        super().update(group, param, grad)


@fails("empty")
class TakesTheMaximum(Correct):
    def update(self, group, param, grad):
        assert grad.max() is not None
        super().update(group, param, grad)


@fails("non_contiguous", "channels_last")
class ViewsAsAVector(Correct):
    def update(self, group, param, grad):
        assert param.view(-1) is not None
        super().update(group, param, grad)


@fails("channels_last")
class MixesLayouts(Correct):
    def update(self, group, param, grad):
        if grad.ndim == 4:
            flat = torch.as_strided(grad, (grad.numel(),), (1,))
            grad = flat.view(grad.shape)
        super().update(group, param, grad)


@fails("shared_storage")
class WritesTheWholeStorage(Correct):
    def write(self, param, value):
        super().write(param, value)
        storage = torch.empty(0, dtype=param.dtype).set_(param.untyped_storage())
        if param._is_view() is False and storage.numel() > 2 * param.numel():
            storage[-1] = 0


@fails("float16")
class ComputesInHalf(Correct):
    def dtype(self, param):
        return torch.float16 if param.dtype == torch.float16 else super().dtype(param)


@fails("bfloat16")
class FailsInBfloat16(Correct):
    def gradient(self, group, param):
        if param.dtype == torch.bfloat16:
            param.fill_(float("nan"))
        return super().gradient(group, param)


@fails("float64", "reference_formula")
class RoundsToFloat32(Correct):
    def gradient(self, group, param):
        grad = super().gradient(group, param)
        return grad.float().to(grad.dtype)


@fails("mixed_dtypes")
class NeedsOneDtype(Correct):
    def update_group(self, group, params):
        assert len({p.dtype for p in params}) <= 1
        super().update_group(group, params)


@fails("float16", "bfloat16")
class CountsInTheDtypeOfTheWeights(Correct):
    def state_of(self, param, grad):
        state = super().state_of(param, grad)
        if "count" not in state:
            state["count"] = torch.zeros((), dtype=param.dtype)
        state["count"] += 1
        return state
