"""The snapshot of objects: every kind of thing that can change is put back, in place, and more than once."""

from __future__ import annotations

import array
import collections
import ctypes
import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_optim.tuning.trials import objects
from lightning_optim.tuning.trials.objects import ObjectSnapshot


class Plain:
    a: Any
    new: Any
    inner: Any
    other: Any

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Slotted:
    __slots__ = ("__hidden", "count", "late")

    def __init__(self) -> None:
        self.count, self.__hidden = 0, [1]

    def change(self) -> None:
        self.count, self.late = 5, 1
        self.__hidden.append(2)

    def state(self) -> Any:
        return self.count, self.__hidden, hasattr(self, "late")


def enclosed():
    count, seen = 0, []

    def call():
        nonlocal count
        count += 1
        seen.append(count)
        return count, list(seen)

    return call


def attributes():
    thing = Plain(a=1, inner=Plain(b=[1, {"c": 2}]))
    inner = thing.inner

    def change():
        thing.a, thing.new = 2, 3
        inner.b[1]["c"] = 4
        inner.b.append(5)
        thing.inner = Plain()

    return thing, change, lambda: (sorted(vars(thing)), thing.a, thing.inner is inner, repr(inner.b))


def order():
    thing = collections.OrderedDict(a=1, b=2)

    def change():
        thing.move_to_end("a")
        thing["c"] = 3

    return thing, change, lambda: list(thing.items())


def bounded():
    thing = collections.deque([1, 2], maxlen=2)
    return thing, lambda: thing.append(3), lambda: (list(thing), thing.maxlen)


def bytes_like():
    parts: list[Any] = [bytearray(b"ab"), array.array("i", [1, 2]), (ctypes.c_int * 2)(1, 2), np.array([1.0, 2.0])]

    def change():
        for part in parts:
            part[0] = 7

    return parts, change, lambda: [list(part) for part in parts]


def slots():
    thing = Slotted()
    return thing, thing.change, lambda: repr(thing.state())


def closure():
    call = enclosed()
    return Plain(callback=call), call, lambda: repr([cell.cell_contents for cell in call.__closure__])


def bound():
    thing = Plain(values=[1])
    call = functools.partial(Plain.__init__, thing)
    return [call], lambda: thing.values.append(2), lambda: list(thing.values)


def generators():
    parts: list[Any] = [
        random.Random(0),
        np.random.RandomState(0),
        np.random.default_rng(0),
        torch.Generator().manual_seed(0),
    ]

    def state():
        return repr([parts[0].getstate(), parts[1].get_state()[1].tolist(), parts[2].bit_generator.state]) + repr(
            parts[3].get_state().tolist()
        )

    def change():
        parts[0].random(), parts[1].rand(), parts[2].random(), torch.rand(1, generator=parts[3])

    return parts, change, state


def everyone_s():
    def change():
        random.random(), np.random.rand(), torch.rand(1)

    return (
        None,
        change,
        lambda: repr([random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]),
    )


def place():
    thing = Plain(batches=iter([1, 2, 3]))
    next(thing.batches)
    return thing, lambda: next(thing.batches), lambda: thing.batches.__reduce__()[2]


def weights():
    layer: Any = nn.Linear(2, 2)
    grad = torch.ones(2, 2)
    layer.weight.grad = grad
    layer.seen = nn.Buffer(torch.zeros(1))
    view = layer.weight.detach()[0]

    def change():
        with torch.no_grad():
            layer.weight.add_(1)
            layer.bias.data = torch.full((2,), 9.0)
            grad.zero_()
        layer.weight.grad = None
        layer.seen = nn.Buffer(torch.ones(1))
        layer.bias.requires_grad_(False)
        layer.eval()

    def state():
        tensors = [layer.weight, layer.bias, layer.seen, view, *([] if layer.weight.grad is None else [grad])]
        same = layer.weight.grad is grad
        return [*(tensor.tolist() for tensor in tensors), same, layer.bias.requires_grad, layer.training]

    return layer, change, state


def stepped(**options):
    def make():
        layer = nn.Embedding(4, 2, sparse=options.get("sparse", False))
        cls = torch.optim.SparseAdam if options.get("sparse") else torch.optim.AdamW
        optimizer = cls(layer.parameters(), lr=0.1)

        def change():
            layer(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 5.0

        if options.get("warm"):
            change()
            optimizer.zero_grad()

        def state():
            return repr([layer.weight.tolist(), layer.weight.grad, optimizer.state_dict()])

        return optimizer, change, state

    return make


CASES = [attributes, order, bounded, bytes_like, slots, closure, bound, generators, everyone_s, place, weights]
OPTIMIZERS = {"adamw": stepped(), "adamw with state": stepped(warm=True), "sparse": stepped(sparse=True, warm=True)}


@pytest.mark.parametrize("case", [*CASES, *OPTIMIZERS.values()], ids=[*(c.__name__ for c in CASES), *OPTIMIZERS])
def test_everything_is_put_back_in_place_and_again(case):
    roots, change, state = case()
    before = state()
    snapshot = ObjectSnapshot(roots)
    for _ in range(2):
        change()
        assert state() != before
        snapshot.put_back()
        assert state() == before


def test_set_and_shared_objects():
    shared = [1]
    thing = Plain(one=shared, other=shared, members={1, 2})
    with ObjectSnapshot(thing):
        thing.one.append(2)
        thing.other = []
        thing.members.clear()
    assert thing.one is thing.other is shared
    assert (shared, thing.members) == ([1], {1, 2})


def test_what_is_left_alone_stays_changed():
    kept, left = [1], [1]
    with ObjectSnapshot([kept, left], leave=[left]):
        kept.append(2)
        left.append(2)
    assert (kept, left) == ([1], [1, 2])


class Large(Dataset):
    def __init__(self) -> None:
        self.samples, self.read = torch.zeros(100), 0


def test_large_data_are_not_copied_and_a_write_to_them_is_reported(monkeypatch):
    monkeypatch.setattr(objects, "LARGE", 100)
    data = Large()
    snapshot = ObjectSnapshot(data)
    data.read = 3
    snapshot.put_back()
    assert data.read == 0
    data.samples[0] = 1.0
    with pytest.warns(UserWarning, match=r"cannot be put back: a tensor of a dataset, of shape \[100\]"):
        snapshot.put_back()
    model = nn.Module()
    model.samples = data.samples  # of the model, too: then it is copied
    with ObjectSnapshot(data, model):
        data.samples[0] = 2.0
    assert data.samples[0] == 1.0


def test_a_generator_that_has_gone_on_is_reported():
    def count():
        yield from range(5)

    thing = Plain(numbers=count())
    next(thing.numbers)
    snapshot = ObjectSnapshot(thing)
    snapshot.put_back()  # and nothing is reported
    next(thing.numbers)
    with pytest.warns(UserWarning, match="the generator .*count"):
        snapshot.put_back()
