"""The description of a compiled kernel: what it does, and the names its text is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels import step_sums
from lightning_optim.kernels.rounding import KEY_COLUMNS
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL

_WORDS = """
kernel first last blocks addresses scalars skip sums block tensor start end chunk tile i row lanes mask zero one tiny
raw_grad delta moved pending after decay_term left right update sums_update apply_decay take_decay term
add add_product sqrt maximum absolute noise slot_key kahan_pending kahan_rest
tl np range min int float
"""


@dataclass(frozen=True)
class KernelSpec:
    """Everything a kernel is generated from; equal specs share one compiled kernel.

    Args:
        rule: Whose arithmetic to run.
        dtypes: Name of the torch dtype of each of `slots`.
        purpose: `step` updates; `step+sums` also collects the step sums. The others write nothing: `sums` takes the
            rule's own sums, `agreement` counts the elements whose update agrees with the gradient, `moved_sq` takes the
            square sum of parameters after the update.
        cautious: For the `step`s and `moved_sq`: apply the mask and the column `mask_scale`.
        decay_form: Which of `weight_decay.APPLY_DECAY` to subtract.
        kahan: Whether the parameter has a compensation.
        stochastic: Names of the slots that are rounded stochastically; the scalars then have `rounding.KEY_COLUMNS`.
        quantized: Names of the states that are kept as codes.
    """

    rule: type[UpdateRule]
    dtypes: tuple[str, ...]
    purpose: str = "step"
    cautious: bool = False
    decay_form: str = "shrink"
    kahan: bool = False
    stochastic: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()

    @property
    def writes(self) -> bool:
        """Whether the kernel takes the step."""
        return self.purpose.startswith("step")

    @property
    def wide(self) -> str:
        """Name of the dtype of the arithmetic."""
        return "float64" if self.dtypes[0] == "float64" else "float32"

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays: parameter, gradient, and states in the order of `Batch.state_arrays`."""
        compensation = ("kahan_comp",) if self.kahan else ()
        initial = (INITIAL,) if self.decay_form == "toward_initial" else ()
        scales = tuple(f"{name}_scale" for name in self.quantized)
        return ("param", "grad", *self.rule.state, *compensation, *initial, *scales)

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """Names of the columns that the kernel reads, each once."""
        columns = ["inverse_divisor", "l2", *self.own_scalars]
        columns += ["decay"] if self.writes else []
        columns += ["eps", "bias_correction2_sqrt"] if self.purpose == "step+sums" else []
        columns += ["mask_scale"] if self.cautious else []
        columns += KEY_COLUMNS if self.rounded else ()
        return tuple(dict.fromkeys(columns))

    @cached_property
    def own_scalars(self) -> tuple[str, ...]:
        """Names of the scalars that the rule's function takes, in its order."""
        return self.rule.sums_scalars() if self.purpose == "sums" else self.rule.update_scalars()

    @cached_property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums that the kernel takes."""
        if self.purpose == "step+sums":
            return step_sums.collected_by_kernel(self.rule, self.decay_form)
        return {"sums": self.rule.sums, "step": ()}.get(self.purpose, (self.purpose,))

    @property
    def rounded(self) -> tuple[str, ...]:
        """Names of the slots that this kernel rounds stochastically."""
        return self.stochastic if self.writes else ()

    @property
    def function(self) -> Callable[..., Any]:
        """The rule's function that the kernel calls."""
        return self.rule.sums_update if self.purpose == "sums" else self.rule.update

    @cached_property
    def variable(self) -> dict[str, str]:
        """The variable of each scalar in the text: its name, unless the text uses that for something else."""
        taken = {*_WORDS.split(), *self.slots}
        taken |= {f"{a}_{slot}" for slot in self.slots for a in ("load", "store")}
        taken |= {f"{slot}_{b}" for slot in self.slots for b in ("old", "new", "address", "buffer", "max", "key")}
        taken |= {f"{a}_{name}" for name in self.sums for a in ("sum", "total", "term")}
        taken |= {f"{name}_factors" for name in self.sums}
        return {name: f"{name}_scalar" if name in taken else name for name in self.scalars}

    @property
    def arguments(self) -> str:
        """What the rule's function is called with."""
        old = [f"{name}_old" for name in self.rule.state]
        return ", ".join(["param", "grad", *old, *(self.variable[name] for name in self.own_scalars)])

    @property
    def decay_arguments(self) -> str:
        """What a function of `APPLY_DECAY` or `DECAY_TERM` is called with, without the initial weight."""
        return f"param, delta, {self.variable['decay']}"

    def factors_call(self, name: str, constants: Mapping[str, str]) -> str:
        """The call that gives the two factors of a step sum.

        Args:
            name: Which one, of `sums`.
            constants: How the text writes `zero`, `one` and `tiny`.
        """
        known = {"grad": "raw_grad", **constants, **self.variable}
        known |= {"first_moment": f"{self.rule.first_moment}_old", "second_moment": f"{self.rule.second_moment}_new"}
        return f"{name}_factors({', '.join(known.get(a, a) for a in step_sums.arguments(name))})"


@dataclass(frozen=True)
class Kernel:
    """A compiled function, and the columns it reads and fills.

    Args:
        function: What a backend launches.
        scalars: Names of the columns of its scalars.
        sums: Names of the columns of its sums.
    """

    function: Any
    scalars: tuple[str, ...]
    sums: tuple[str, ...]

    def table(self, columns: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The kernel's scalars side by side, [tensors, scalars], from ``columns``, [tensors] each."""
        return torch.stack([columns[name] for name in self.scalars], dim=1).to(dtype)
