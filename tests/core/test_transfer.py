from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim.core.transfer import HostMirror, PendingValues, upload


def test_mirror_on_the_cpu_reads_the_last_tensor_without_a_copy():
    tensor = torch.tensor([1, 2])
    mirror = HostMirror(tensor)
    mirror.push(tensor + 5)
    assert mirror.read() == [6, 7]
    assert all(type(value) is int for value in mirror.read())


def test_mirror_reads_without_an_operation_that_computes_anything():
    tensor = torch.tensor([1, 2])
    mirror = HostMirror(tensor)
    with _Operations() as seen:
        mirror.push(tensor)
        mirror.read()
    assert {call.overloadpacket for call in seen.calls} <= {torch.ops.aten.detach}  # the view of numpy


class _Operations(TorchDispatchMode):
    """Lists every operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_pending_values_arrive_as_python_floats():
    pending = PendingValues(torch.tensor([1.5, float("inf")], dtype=torch.float64))
    assert pending.ready()
    assert pending.read().tolist() == [1.5, float("inf")]
    assert pending.read().tolist() == [1.5, float("inf")]


def test_numbers_are_uploaded_as_a_tensor_of_their_own():
    values = np.arange(3)
    tensor = upload(values, torch.device("cpu"))
    values[0] = 7
    assert tensor.tolist() == [0, 1, 2]
    assert upload([[1, 2]], torch.device("cpu"), torch.float64).dtype == torch.float64
