"""The generated text of kernels: some in full, and names that rules may choose freely."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lightning_optim.kernels.cpu.source import source as cpu_source
from lightning_optim.kernels.kernel_spec import KernelSpec
from lightning_optim.kernels.rules import UpdateRule
from lightning_optim.kernels.triton.source import source as triton_source
from lightning_optim.optim.adam import AdamRule
from lightning_optim.optim.sgd import MomentumRule
from tests.optim.test_rules import Custom

GOLDEN = Path(__file__).parent / "golden"
FLOAT, HALF, CODES = "float32", "bfloat16", "uint8"
QUANTIZED = ("exp_avg", "exp_avg_sq")
MEASURED_ADAMW = KernelSpec(AdamRule, (FLOAT,) * 4, "step+sums", cautious=True)

TEXTS = {
    "cpu_sgd_momentum": lambda: cpu_source(KernelSpec(MomentumRule, (FLOAT,) * 3)),
    "cpu_sgd_momentum_average": lambda: cpu_source(KernelSpec(MomentumRule, (FLOAT,) * 4, averages=1)),
    "cpu_adamw_measured_cautious": lambda: cpu_source(MEASURED_ADAMW),
    "cpu_adamw_8bit_kahan": lambda: cpu_source(
        KernelSpec(
            AdamRule,
            (HALF, HALF, CODES, CODES, HALF, FLOAT, FLOAT),
            kahan=True,
            stochastic=QUANTIZED,
            quantized=QUANTIZED,
        )
    ),
    "triton_adamw_measured_cautious": lambda: triton_source(MEASURED_ADAMW, aligned=True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_kernel(name: str) -> None:
    """To renew the files after an intended change: ``python -m tests.kernels.test_kernel_text``."""
    assert TEXTS[name]() == (GOLDEN / f"{name}.txt").read_text()


class AwkwardRule(UpdateRule):
    """Its scalars have the names of variables that a kernel needs for itself."""

    state: ClassVar[tuple[str, ...]] = ("x",)

    def scalars(self, group: Any, step: Any, **scalar_state: Any) -> dict[str, Any]:
        return {"i": group["lr"], "end": 0.5, "x_old": 0.25, "zero": 2.0, "load_param": 1.0, "delta": 3.0}

    @staticmethod
    def update(
        param: Any, grad: Any, x: Any, i: Any, end: Any, x_old: Any, zero: Any, load_param: Any, delta: Any
    ) -> Any:
        new = x * end + grad * x_old * zero * load_param
        return new * i * delta, new


@pytest.mark.parametrize("backend", ["cpu"])
def test_scalars_may_have_the_names_of_a_kernels_variables(backend: str) -> None:
    results = []
    for name in ("reference", backend):
        param = torch.linspace(-1, 1, 50).requires_grad_()
        optimizer = Custom([param], 0.1, AwkwardRule(), weight_decay=0.1, backend=name)
        for _ in range(2):
            param.grad = torch.linspace(1, 2, 50)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
    text = triton_source(KernelSpec(AwkwardRule, (FLOAT,) * 3), aligned=False)
    assert "zero_scalar = tl.load" in text
    assert "update(param, grad, x_old, i_scalar, end_scalar, x_old_scalar, zero_scalar" in text


if __name__ == "__main__":
    for name, text in TEXTS.items():
        (GOLDEN / f"{name}.txt").write_text(text())
