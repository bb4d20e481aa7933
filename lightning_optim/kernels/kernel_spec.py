"""The specification of a generated kernel, and the names that its source text uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_optim.kernels import step_sums
from lightning_optim.kernels.averages import state_names, weight_names
from lightning_optim.kernels.rounding import KEY_COLUMNS
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.kernels.weight_decay import INITIAL

_WORDS = """
kernel launch count run first blocks addresses scalars skip sums block tensor start end chunk tile i row lanes mask
row_size column stop place correction cut code
zero one tiny raw_grad delta moved pending after decay_term left right update sums_update apply_decay take_decay term
add add_product average_moved sqrt maximum absolute noise slot_key kahan_pending kahan_rest
tl np range min int float carray word add_to_word set_word pointer_blocks pointer_addresses pointer_scalars pointer_sums
"""


@dataclass(frozen=True)
class KernelSpec:
    """Everything that determines a generated kernel; equal specifications share one compiled kernel.

    Args:
        rule: Rule whose arithmetic the kernel runs.
        dtypes: Name of the torch dtype of each of `slots`.
        purpose: `step` updates; `step+sums` also collects the step sums. The others write nothing: `sums` computes the
            rule's own sums, `agreement` counts the elements whose update agrees with the gradient, `moved_sq` computes
            the square sum of parameters after the update.
        cautious: Whether to apply the mask and the column `mask_scale`, in `step`, `step+sums` and `moved_sq`.
        decay_form: Name of the function of `weight_decay.APPLY_DECAY` to subtract.
        kahan: Whether the parameter has a Kahan compensation.
        stochastic: Names of the slots that are rounded stochastically; the scalars then include `rounding.KEY_COLUMNS`.
        quantized: Names of the states stored as 8-bit codes.
        averages: Number of averages of the parameter, which `step` and `step+sums` move.
    """

    rule: type[UpdateRule]
    dtypes: tuple[str, ...]
    purpose: str = "step"
    cautious: bool = False
    decay_form: str = "shrink"
    kahan: bool = False
    stochastic: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    averages: int = 0

    @property
    def writes(self) -> bool:
        """Whether the kernel writes the result of the step."""
        return self.purpose.startswith("step")

    @property
    def corrected(self) -> bool:
        """Whether the compensation consists of 8-bit corrections."""
        return self.kahan and "kahan_comp" in self.stochastic

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
        return ("param", "grad", *self.rule.state, *compensation, *initial, *scales, *state_names(self.averages))

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """Names of the scalar columns that the kernel reads, without duplicates."""
        columns = ["inverse_divisor", "l2", *self.own_scalars]
        columns += ["decay"] if self.writes else []
        columns += ["eps", "bias_correction2_sqrt"] if self.purpose == "step+sums" else []
        columns += ["mask_scale"] if self.cautious else []
        columns += KEY_COLUMNS if self.rounded else ()
        columns += weight_names(self.averages) if self.writes else ()
        return tuple(dict.fromkeys(columns))

    @cached_property
    def own_scalars(self) -> tuple[str, ...]:
        """Names of the scalars that the rule's function takes, in order."""
        return self.rule.sums_scalars() if self.purpose == "sums" else self.rule.update_scalars()

    @cached_property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums that the kernel computes."""
        if self.purpose == "step+sums":
            return step_sums.collected_by_kernel(self.rule, self.decay_form)
        return {"sums": self.rule.sums, "step": ()}.get(self.purpose, (self.purpose,))

    @property
    def rounded(self) -> tuple[str, ...]:
        """Names of the slots that this kernel rounds stochastically."""
        return self.stochastic if self.writes else ()

    @property
    def function(self) -> Callable[..., Any]:
        """Function of the rule that the kernel calls."""
        return self.rule.sums_update if self.purpose == "sums" else self.rule.update

    @cached_property
    def variable(self) -> dict[str, str]:
        """Variable of each scalar in the text: its name, with a suffix where the text uses that name otherwise."""
        taken = {*_WORDS.split(), *self.slots}
        taken |= {f"{a}_{slot}" for slot in self.slots for a in ("load", "store")}
        taken |= {f"{slot}_{b}" for slot in self.slots for b in ("old", "new", "address", "buffer", "max", "key")}
        taken |= {f"{a}_{name}" for name in self.sums for a in ("sum", "total", "term")}
        taken |= {f"{name}_factors" for name in self.sums}
        return {name: f"{name}_scalar" if name in taken else name for name in self.scalars}

    @property
    def arguments(self) -> str:
        """Arguments of the call of the rule's function, as text."""
        old = [f"{name}_old" for name in self.rule.state]
        return ", ".join(["param", "grad", *old, *(self.variable[name] for name in self.own_scalars)])

    @property
    def decay_arguments(self) -> str:
        """Arguments of a call from `APPLY_DECAY` or `DECAY_TERM`, as text, without the initial weight."""
        return f"param, delta, {self.variable['decay']}"

    def factors_call(self, name: str, constants: Mapping[str, str]) -> str:
        """Return the text of the call that computes the two factors of a step sum.

        Args:
            name: Name of the sum, one of `sums`.
            constants: Text for `zero`, `one` and `tiny`.
        """
        known = {"grad": "raw_grad", **constants, **self.variable}
        known |= {"first_moment": f"{self.rule.first_moment}_old", "second_moment": f"{self.rule.second_moment}_new"}
        return f"{name}_factors({', '.join(known.get(a, a) for a in step_sums.arguments(name))})"


@dataclass(frozen=True)
class Kernel:
    """A compiled function with the names of the columns that it reads and fills.

    Args:
        function: Compiled function that the backend launches.
        scalars: Names of the columns of its scalars.
        sums: Names of the columns of its sums.
    """

    function: Any
    scalars: tuple[str, ...]
    sums: tuple[str, ...]

    def table(self, columns: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Stack the kernel's scalars, [tensors] each, into one table, [tensors, scalars], of dtype ``dtype``."""
        return torch.stack([columns[name] for name in self.scalars], dim=1).to(dtype)
