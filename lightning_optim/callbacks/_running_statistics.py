"""Averages of the running statistics of batch norm, moved at the same steps and by the same decay as the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_optim.kernels import averages


def layers_with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that keep a running mean and variance, by name."""
    both = ("running_mean", "running_var")
    return {
        name: layer
        for name, layer in model.named_modules()
        if all(isinstance(vars(layer)["_buffers"].get(buffer), Tensor) for buffer in both)
    }


def describe_layers(model: nn.Module) -> str:
    """Return the names of such layers for a message; empty if there are none."""
    names = list(layers_with_statistics(model))
    return "" if not names else names[0] + (f" and {len(names) - 1} more layers" if len(names) > 1 else "")


class RunningStatistics(nn.Module):
    """The running statistics of a model, averaged, and those of training while the model has the average.

    It is a module so that snapshots treat it like the model. All statistics are one vector, which costs a few launches
    at each step, however many layers there are.

    Args:
        model: The model; its layers are written by `swap_in` and `swap_out`.
        entry: The decay, an entry of the option `ema`.
    """

    average: Tensor
    training_point: Tensor
    steps: Tensor

    def __init__(self, model: nn.Module, entry: float | str) -> None:
        super().__init__()
        self._layers = tuple(layers_with_statistics(model).values())  # In a tuple they are no submodules.
        self._entry = entry
        self.swapped = False
        now = self._present()
        self.register_buffer("average", now.clone())
        self.register_buffer("training_point", now)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64, device="cpu").to(now.device))

    def _buffers_of_model(self) -> list[Tensor]:
        """Return the present buffers, which a module may have replaced."""
        names = ("running_mean", "running_var")
        return [buffer for x in self._layers for name in names if (buffer := x._buffers[name]) is not None]

    def _present(self) -> Tensor:
        """Return the statistics of the model as one vector, float32 or float64."""
        joined = torch.cat([buffer.detach().flatten() for buffer in self._buffers_of_model()])
        return joined if joined.dtype == torch.float64 else joined.float()

    @torch.no_grad()
    def update(self, count: Tensor) -> None:
        """Move the average towards the present statistics, if ``count`` has changed; the host does not wait.

        Statistics that are not finite, which a skipped step may leave in the model, are left out.

        Args:
            count: Number of steps in the average of the weights, [].
        """
        count = count.to(self.steps.device, self.steps.dtype)
        weight = averages.scalars((self._entry,), count.clamp(min=1))[averages.weight_names(1)[0]]
        now = self._present()
        new = averages.moved(self.average, now, weight.to(now.dtype))
        self.average.copy_(torch.where((count != self.steps) & now.isfinite(), new, self.average))
        self.steps.copy_(count)

    def swap_in(self) -> None:
        """Put the average into the model, once there has been a step; nothing happens where it is in place."""
        if not self.swapped:
            self.training_point.copy_(self._present())
            self._write(torch.where(self.steps > 0, self.average, self.training_point))
            self.swapped = True

    def swap_out(self) -> None:
        """Put the statistics of training back into the model, bit for bit."""
        if self.swapped:
            self._write(self.training_point)
            self.swapped = False

    @torch.no_grad()
    def _write(self, vector: Tensor) -> None:
        buffers = self._buffers_of_model()
        for buffer, values in zip(buffers, torch.split(vector, list(map(Tensor.numel, buffers))), strict=True):
            buffer.copy_(values.view_as(buffer))
