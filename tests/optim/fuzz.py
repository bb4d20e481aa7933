"""The fuzzer: whatever happens to an optimizer's tensors, a step is right, or refused by name, and writes nowhere else.

    python -m tests.optim.fuzz journal examples seed [everything]   # TRITON_INTERPRET=1
    python -m tests.optim.fuzz journal replay "Example(...)"

in a process of its own, whose death is a failure; the journal then holds the last example.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from lightning_optim.optim import FusedOptimizer, get_optimizer_class
from tests.canaries import Canaries, bits, has_memory, move_into
from tests.kernels.bfloat16 import round_as_hardware_does
from tests.optim.fuzz_examples import Example, Part, examples
from tests.optim.fuzz_tampering import GRADIENTS, LEGAL, PARAMETERS, Scene, tamper_state
from tests.optim.memory_cells import Cell, laid_out, numbers
from tests.optim.sanitizer import FAULT, plant_fault
from tests.own_process import Journal, begin


@dataclass
class Outcome:
    """What came of an example on one backend.

    Args:
        refusal: What was raised; None after steps that went through.
        while_: Was it `made`, `loaded` or `stepped`.
        tensors: Parameters and their states afterwards, by name.
    """

    refusal: Exception | None = None
    while_: str = "stepped"
    tensors: dict[str, Tensor] = field(default_factory=dict)


def check(example: Example) -> str:
    """Run ``example`` on its backend and on `reference`; says what came of it.

    Raises:
        AssertionError: Something was written outside, or in part, or is wrong, or was refused without a name.
    """
    torch.set_num_threads(example.threads)
    expected, got = run(example, "reference"), run(example, example.cell.backend)
    if got.refusal is not None:
        assert got.while_ == "made" or not is_legal(example), f"refused, and is legal: {got.refusal}"
        return f"refused while {got.while_}"
    assert expected.refusal is None, f"reference refuses what {example.cell.backend} does: {expected.refusal}"
    compare(got.tensors, expected.tensors, example)
    return "stepped"


def is_legal(example: Example) -> bool:
    """Whether nothing happens to the example's tensors that a step could not live with."""
    return all(
        part.gradient in LEGAL["gradient"]
        and part.parameter in LEGAL["parameter"]
        and all(how in LEGAL["state"] for _, how in part.states)
        for part in example.parts
    )


def run(example: Example, backend: str) -> Outcome:
    """The example on ``backend``."""
    memory = Canaries()
    try:
        optimizer, named = make(example, backend)
    except Exception as error:
        check_refusal(error, [f"layers.{i}.weight" for i in range(len(example.parts))], example)
        return Outcome(error, "made")
    params = list(named.values())
    generator = torch.Generator().manual_seed(1)
    for _ in range(example.before):
        for param in params:
            param.grad = numbers(tuple(param.shape), param.dtype, generator)
        optimizer.step()
    if not example.before and any(part.states for part in example.parts):
        optimizer.make_state(params)
    for param in params:
        param.grad = None
    move_into(memory, optimizer)
    scene = Scene(memory)
    saved = optimizer.state_dict()
    states = [optimizer.state[param] for param in params]
    if example.loads:
        # The dict is in the order of groups.
        order = [id(param) for group in optimizer.param_groups for param in group["params"]]
        saved["state"] = {number: dict(state) for number, state in saved["state"].items()}
        states = [saved["state"].get(order.index(id(param)), {}) for param in params]
    for part, param, state in zip(example.parts, params, states, strict=True):
        tamper(scene, part, param, state)
        scene.previous = param
    if example.loads:
        before = snapshot(optimizer, named)
        try:
            optimizer.load_state_dict(saved)
        except Exception as error:
            check_untouched(before, error)
            check_refusal(error, list(named), example, stepping=True)
            return Outcome(error, "loaded")
        move_into(memory, optimizer)
    optimizer.collect_step_stats = example.cell.collect
    having = [param for param in params if param.grad is not None]
    if example.cell.divisor is not None:
        each = torch.linspace(1, 3, len(having))
        optimizer.divisor = scene.put(torch.tensor(2.0) if example.cell.divisor == "one" else each, read_only=True)
    if example.skip is not None:
        optimizer.found_inf = scene.put(torch.tensor(example.skip), read_only=True)
    grads = {f"gradient of {n}": p.grad for n, p in named.items() if p.grad is not None and p.grad is not p}
    gradients_before = {n: g.detach().clone() for n, g in grads.items() if has_memory(g)}
    aliased = any("itself" in part.gradient or "gradient" in {how for _, how in part.states} for part in example.parts)
    for _ in range(example.after):
        before = snapshot(optimizer, named)
        try:
            optimizer.step()
        except Exception as error:
            memory.check()
            check_untouched(before, error)
            check_refusal(error, list(named), example, stepping=True)
            return Outcome(error)
        memory.check()
        if not aliased:
            for name, was in gradients_before.items():
                assert torch.equal(grads[name].resolve_neg().nan_to_num(), was.resolve_neg().nan_to_num()), name
    return Outcome(tensors=watched(optimizer, named))


def make(example: Example, backend: str) -> tuple[FusedOptimizer, dict[str, Tensor]]:
    """The optimizer, and its parameters by name."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, example.cell.dtype)
    named = {
        f"layers.{i}.weight": laid_out(numbers(part.shape, dtype, generator), part.layout).requires_grad_()
        for i, part in enumerate(example.parts)
    }
    count = len(example.options)
    groups = [
        {**options, "params": [entry for i, entry in enumerate(named.items()) if i % count == number]}
        for number, options in enumerate(example.options)
    ]
    groups = [group for group in groups if group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind: Any = get_optimizer_class(example.cell.optimizer)
        return kind(groups, backend=backend, **example.cell.arguments), named


def tamper(scene: Scene, part: Part, param: Tensor, state: dict[str, Any]) -> None:
    """Do to ``param`` what ``part`` says, as far as torch lets it be done."""
    steps = [lambda: give(scene, part, param), lambda: change(scene, part, param)]
    for step in steps if part.stale else reversed(steps):
        attempt(step)
    for number, how in part.states:
        attempt(lambda: tamper_state(scene, param, state, number, how))  # noqa: B023 - called here


def attempt(action: Any) -> None:
    """Call ``action``, which torch may refuse."""
    with suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        action()


def give(scene: Scene, part: Part, param: Tensor) -> None:
    """The part's gradient."""
    grad = GRADIENTS[part.gradient](scene, param.detach())
    if grad is not None and grad.dtype != param.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad


def change(scene: Scene, part: Part, param: Tensor) -> None:
    """The part's other weights."""
    if part.parameter is not None:
        param.data = PARAMETERS[part.parameter](scene, param.detach())


def watched(optimizer: FusedOptimizer, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter and state whose memory can be read."""
    found: dict[str, Any] = dict(named)
    for name, param in named.items():
        for key, value in optimizer.state.get(param, {}).items():
            found[f"state {key!r} of {name}"] = value
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            found[f"{key!r} of group {number}"] = value
    return {name: value.detach() for name, value in found.items() if has_memory(value)}


def snapshot(optimizer: FusedOptimizer, named: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The same, each with what is stored there now."""
    return {name: (tensor, bits(tensor).clone()) for name, tensor in watched(optimizer, named).items()}


def check_untouched(before: dict[str, tuple[Tensor, Tensor]], error: Exception) -> None:
    """Raise AssertionError if something was written since ``before``."""
    for name, (tensor, was) in before.items():
        assert torch.equal(bits(tensor), was), f"{name} was written by what then raised {error!r}"


def check_refusal(error: Exception, names: list[str], example: Example, stepping: bool = False) -> None:
    """Raise AssertionError unless ``error`` says which parameter, or which option, it is about."""
    text = str(error)
    options = {*example.cell.arguments, *(key for group in example.options for key in group), "backend"}
    said = [name for name in names if name in text]
    if not stepping:
        said += [name for name in options if re.search(rf"\b{name}\b", text)]
    if not said:
        raise AssertionError(f"{type(error).__name__} names neither parameter nor option: {text}") from error


ULPS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""What may come of another order of operations, as part of the largest element."""


def compare(got: dict[str, Tensor], expected: dict[str, Tensor], example: Example) -> None:
    """Raise AssertionError unless all tensors are the same, to the rounding of their dtypes."""
    assert got.keys() == expected.keys()
    # Sums and bias corrections are kept in float64, but are made of what was computed in the parameters' precision.
    finest = 1e-9 if example.cell.dtype == "float64" else 1e-5
    flags = {*example.cell.arguments, *(key for group in example.options for key in group)}
    if flags & {"state_bits", "stochastic_rounding"}:  # one of two neighbours, which a hair's breadth decides
        finest = 2e-2
    narrow = getattr(torch, example.cell.dtype)
    if narrow in (torch.bfloat16, torch.float16) and example.after > 1:
        # Which of two neighbours a parameter is rounded to, a hair's breadth decides; it is a term of the next gradient
        # under L2 decay, and so of the state.
        finest = max(finest, ULPS[narrow])
    for name, reference in expected.items():
        a, b = got[name].resolve_neg(), reference.resolve_neg()
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        param = name.rpartition(" of ")[2]
        if "kahan_comp" in name and expected[param].shape == b.shape:  # what the parameter lacks, of the same weight
            a, b, rtol = a.double() + got[param].double(), b.double() + expected[param].double(), 1e-4
        elif b.dtype == torch.uint8:
            assert ((a.int() - b.int()).abs() <= 1).all(), name
            continue
        elif b.dtype.is_floating_point:
            rtol = max(ULPS[b.dtype], finest)
        else:
            assert torch.equal(a, b), name
            continue
        finite = b[b.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0  # what cancels keeps the rounding of its terms
        torch.testing.assert_close(
            a,
            b,
            rtol=rtol,
            atol=rtol * max(largest, 0.1),
            equal_nan=True,
            msg=lambda message, name=name: f"{name} differs from reference: {message}",  # type: ignore[misc]
        )


def main(journal: Journal, count: int, number: int, everything: bool) -> dict[str, int]:
    """Tries ``count`` examples; how many came out how."""
    came_out: dict[str, int] = {}

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(examples(everything, triton=True))
    def one(example: Example) -> None:
        journal.write(repr(example))
        how = check(example)
        came_out[how] = came_out.get(how, 0) + 1

    one()
    return came_out


if __name__ == "__main__":
    begun = begin(sys.argv[1])
    if FAULT:
        plant_fault()
    if os.environ.get("TRITON_INTERPRET") == "1":
        round_as_hardware_does()
    if sys.argv[2] == "replay":
        print(check(eval(sys.argv[3], {"Example": Example, "Part": Part, "Cell": Cell})))
    else:
        print(main(begun, int(sys.argv[2]), int(sys.argv[3]), "everything" in sys.argv))
