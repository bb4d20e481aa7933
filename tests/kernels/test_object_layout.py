"""What is relied on of the memory of CPython's and torch's objects, and that nothing is used that is not certain."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("numba")
from lightning_optim.kernels.cpu import object_layout
from lightning_optim.kernels.cpu.object_layout import kind_of, layout
from lightning_optim.kernels.cpu.objects import Watch

KNOWN = layout()
needs_layout = pytest.mark.skipif(KNOWN is None, reason="objects lie elsewhere in this version")


def test_this_version_of_torch_and_python_is_known() -> None:
    """Otherwise everything works, but slower: then find out what has moved."""
    assert KNOWN is not None or sys.version_info >= (3, 14)


@needs_layout
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 4),
        lambda: torch.ones(3, 4).t(),
        lambda: torch.ones(3, 4)[1:, ::2],
        lambda: torch.ones(()),
        lambda: torch.ones(0, 5),
        lambda: torch.ones(2, 3, 4, 5, 6),
        lambda: torch.ones(3, dtype=torch.bfloat16),
        lambda: nn.Parameter(torch.ones(3)),
        lambda: torch._neg_view(torch.ones(3)),
        lambda: torch.ones(1, 1).expand(3, 4),
    ],
)
def test_what_a_tensor_is_can_be_read_from_its_memory(make: Any) -> None:
    assert KNOWN is not None
    tensor = make()
    assert kind_of(tensor, KNOWN) == object_layout._expected(tensor, KNOWN)


@needs_layout
def test_more_dimensions_than_fit_are_refused() -> None:
    tensor = torch.ones(1, 1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="5 dimensions"):
        Watch([], [], [tensor], [], [])


@needs_layout
@pytest.mark.parametrize("wrong", [torch.ones(3).to_sparse(), nn.Parameter(torch.ones(3))])
def test_only_plain_gradients_are_watched(wrong: torch.Tensor) -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises((ValueError, RuntimeError)):
        Watch([], [], [], [parameter], [wrong])


@needs_layout
def test_a_gradient_that_python_has_not_seen_yet_is_found() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    (parameter * 2).sum().backward()
    watch = Watch([], [], [], [parameter], [parameter.grad])
    parameter.grad = None
    assert watch.gradients() is None
    (parameter * 2).sum().backward()
    found = watch.gradients()
    grad: Any = parameter.grad
    assert found is not None
    assert found.tolist() == [grad.data_ptr()]


@needs_layout
@pytest.mark.parametrize("what", ["item", "dict", "list", "class", "impl", "memory", "storage", "shape"])
def test_each_kind_of_change_is_noticed(what: str) -> None:
    class Other(torch.Tensor):
        pass

    tensor, held, items = torch.ones(4, 2), {"a": 1}, [object(), object()]
    watch = Watch([items], [held], [tensor], [], [])
    assert watch.gradients() is not None
    changes: dict[str, Any] = {
        "item": lambda: items.__setitem__(1, object()),
        "dict": lambda: held.update(a=2),
        "list": lambda: items.append(object()),
        "class": lambda: setattr(tensor, "__class__", Other),
        "impl": lambda: torch.utils.swap_tensors(tensor, torch.ones(4, 2)),
        "memory": lambda: setattr(tensor, "data", torch.ones(4, 2)),
        "storage": lambda: tensor.untyped_storage().resize_(64),
        "shape": tensor.t_,
    }
    changes[what]()
    assert watch.gradients() is None


def test_where_anything_is_unexpected_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_layout, "words", lambda address, count: [0] * count)
    assert layout.__wrapped__() is None
    monkeypatch.setattr("lightning_optim.kernels.cpu.objects.layout", lambda: None)
    with pytest.raises(ValueError, match="not known"):
        Watch([], [], [], [], [])


def test_everything_is_checked_without_assertions_too() -> None:
    code = (
        "from lightning_optim.kernels.cpu import object_layout as o\n"
        "o.words = lambda address, count: [7] * count\n"
        "print(o.layout())"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["None"]
