"""What Triton makes of the kernels, for GPUs that need not be there: wide memory accesses, no doubles, no atomics."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: functions are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lightning_optim import optim  # noqa: E402
from lightning_optim.clipping import AdaGC, AutoClip, BlockRMS, GlobalNorm, GroupNorm, ZClip  # noqa: E402
from lightning_optim.divergence import SpikeWindow, StepGuard  # noqa: E402
from lightning_optim.divergence.early_warning import EarlyWarning  # noqa: E402
from lightning_optim.kernels.decision import Program  # noqa: E402
from lightning_optim.kernels.kernel_spec import KernelSpec  # noqa: E402
from lightning_optim.kernels.rules import UpdateRule  # noqa: E402
from lightning_optim.kernels.triton import symmetric  # noqa: E402
from lightning_optim.kernels.triton.codegen import OPTIONS, THREADS, build, build_measure  # noqa: E402
from lightning_optim.kernels.triton.decision import decision_kernel  # noqa: E402
from lightning_optim.kernels.triton.functions import add_blocks, add_squares  # noqa: E402
from lightning_optim.kernels.triton.scalars import DeviceColumns, device_scalars, scalar_kernel  # noqa: E402
from lightning_optim.optim.adam import AdamRule  # noqa: E402
from lightning_optim.optim.batches import Batches  # noqa: E402
from lightning_optim.optim.lion import LionRule  # noqa: E402
from tests.optim.cases import CASES  # noqa: E402
from tests.optim.test_rules import TrustRatioRule  # noqa: E402

FLOAT, HALF = "float32", "bfloat16"
AMPERE, HOPPER = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
WIDE_LOAD, WIDE_STORE = "ld.global.v4", "st.global.v4"

each_target = pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=["sm_80", "sm_90"])


def compiled(function: Any, target: Any = HOPPER, wide: str = "fp32") -> Any:
    """The kernel for ``target``, with the options it is launched with there."""
    pointers = {"blocks": "*i64", "addresses": "*i64", "scalars": f"*{wide}", "skip": "*fp32", "sums": f"*{wide}"}
    options = OPTIONS | {"num_warps": THREADS // target.warp_size}
    return triton.compile(ASTSource(function, signature=pointers), target=target, options=options)


def rule_kernel(
    rule: type[UpdateRule],
    purpose: str = "step",
    dtypes: tuple[str, ...] | None = None,
    aligned: bool = True,
    decay_form: str = "shrink",
) -> Any:
    spec = KernelSpec(rule, dtypes or (FLOAT,) * (2 + len(rule.state)), purpose, decay_form=decay_form)
    return build(spec, aligned).function


def every_rule() -> list[type[UpdateRule]]:
    rules = set()
    for case in CASES:
        for setting in case.settings:
            rule = case.optimizer.rule(case.optimizer.hyperparameters() | setting.arguments)
            if isinstance(rule, UpdateRule):
                rules.add(type(rule))
    return sorted(rules, key=lambda rule: rule.__name__)


def assert_streams(kernel: Any, loads: int, stores: int) -> None:
    """Whole blocks move 16 bytes at a time; nothing changes places between threads on the way."""
    ptx = kernel.asm["ptx"]
    assert ptx.count(WIDE_LOAD) >= loads
    assert ptx.count(WIDE_STORE) >= stores
    assert "convert_layout" not in kernel.asm["ttgir"]


def assert_plain(kernel: Any) -> None:
    """No doubles, no atomics, and no multiply-add that the same expression in another kernel may not be."""
    ptx = kernel.asm["ptx"]
    assert ".f64" not in ptx
    assert not re.search(r"\bfma\.", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)


def registers(kernel: Any, tmp_path: Path) -> int:
    """Per thread; and none spilt to memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this build of Triton brings no cuobjdump")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    shown = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", shown))
    assert usage["STACK"] == usage["LOCAL"] == "0"
    return int(usage["REG"])


@pytest.mark.parametrize("target", [pytest.param(AMPERE, marks=pytest.mark.slow), HOPPER], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("purpose", ["step", "step+sums"])
@pytest.mark.parametrize("rule", every_rule(), ids=lambda rule: rule.__name__)
def test_every_rule_compiles_to_wide_accesses(rule: type[UpdateRule], purpose: str, target: Any) -> None:
    kernel = compiled(rule_kernel(rule, purpose), target)
    assert_streams(kernel, loads=2 + len(rule.state), stores=1 + len(rule.state))
    assert_plain(kernel)


@each_target
@pytest.mark.parametrize("purpose", ["sums", "step"])
def test_a_rule_with_sums(purpose: str, target: Any) -> None:
    kernel = compiled(rule_kernel(TrustRatioRule, purpose), target)
    assert_streams(kernel, loads=3, stores=2 if purpose == "step" else 0)
    assert_plain(kernel)


@pytest.mark.parametrize(
    ("dtypes", "loads"),
    [
        ((HALF, HALF, FLOAT, FLOAT), 2),  # a thread's four elements are 8 bytes of a 16-bit slot
        ((FLOAT, HALF, FLOAT, FLOAT), 3),
        ((HALF, HALF, HALF, HALF), 4),
        (("float16", "float16", FLOAT, FLOAT), 2),
    ],
)
@pytest.mark.parametrize("purpose", ["step", "step+sums"])
def test_dtypes_may_differ(dtypes: tuple[str, ...], loads: int, purpose: str) -> None:
    kernel = compiled(rule_kernel(AdamRule, purpose, dtypes))
    assert_streams(kernel, loads=loads, stores=loads - 1)
    assert_plain(kernel)


@pytest.mark.parametrize("purpose", ["step", "step+sums"])
def test_averages_of_the_weights_are_moved_in_the_same_pass(purpose: str) -> None:
    kernel = compiled(build(KernelSpec(AdamRule, (FLOAT,) * 6, purpose, averages=2), True).function)
    assert_streams(kernel, loads=6, stores=5)
    assert_plain(kernel)


def test_addresses_that_are_not_aligned_are_read_narrowly() -> None:
    """The control: without the promise of alignment a wide access would be a fault."""
    ptx = compiled(rule_kernel(AdamRule, aligned=False)).asm["ptx"]
    assert WIDE_LOAD not in ptx
    assert WIDE_STORE not in ptx


def test_float64_parameters_are_computed_in_float64() -> None:
    kernel = compiled(rule_kernel(AdamRule, "step+sums", ("float64",) * 4), wide="fp64")
    assert "sqrt.rn.f64" in kernel.asm["ptx"]
    assert not re.search(r"\b(mul|fma|div|sqrt)\.(\w+\.)*f32", kernel.asm["ptx"])  # counts are added in float32


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_norms(dtype: str, tmp_path: Path) -> None:
    kernel = compiled(build_measure(dtype, True).function)
    assert_streams(kernel, loads=4, stores=0)
    assert_plain(kernel)
    assert registers(kernel, tmp_path) <= 64


@each_target
def test_block_sums_are_added_without_atomics(target: Any) -> None:
    pointers = {"sums": "*fp32", "offsets": "*i64", "totals": "*fp64"}
    for function, signature in ((add_blocks, pointers | {"columns": "i32"}), (add_squares, pointers)):
        ptx = triton.compile(ASTSource(function, signature=signature), target=target).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)


@each_target
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("adds", [False, True])
def test_symmetric_products_run_on_tensor_cores(target: Any, dtype: str, adds: bool) -> None:
    """As launched on aligned matrices: the next tiles are fetched meanwhile, and all GPUs have the memory for it."""
    names = ["x", "y", "add", "result"]
    signature = dict.fromkeys(names, f"*{dtype}") | {"beta": "fp32", "alpha": "fp32"}
    strides = ["x_matrix", "x_row", "x_inner", "y_matrix", "y_inner", "y_column"]
    signature |= dict.fromkeys(["rows", *strides], "i32")
    constants = {
        "x_inner": 1,
        "y_inner": 1,
        "inner": 4096,
        "adds": adds,
        "tile": symmetric.TILE,
        "step": symmetric.STEP,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in symmetric.halved.arg_names}
    multiples = [*names, *(name for name in ["rows", *strides] if name not in constants)]
    divisible = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(symmetric.halved, signature=signature, constexprs=constants, attrs=divisible)
    made = triton.compile(source, target=target, options=symmetric.OPTIONS)
    ptx = made.asm["ptx"]
    assert ("wgmma" if target is HOPPER else "mma.sync") in ptx
    assert "cp.async" in ptx
    assert ".f64" not in ptx
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert WIDE_STORE in ptx
    assert made.metadata.shared <= 99 * 1024


@each_target
@pytest.mark.parametrize(
    ("rule", "purpose", "most"),
    [(AdamRule, "step", 48), (AdamRule, "step+sums", 72), (LionRule, "step", 40), (LionRule, "step+sums", 56)],
)
def test_registers_leave_room_for_many_threads(
    rule: type[UpdateRule], purpose: str, most: int, target: Any, tmp_path: Path
) -> None:
    """At 64, a multiprocessor holds 1024 threads: enough loads on their way to keep its memory busy.

    At 72, which Adam needs on logging steps, it holds 896.
    """
    assert registers(compiled(rule_kernel(rule, purpose), target), tmp_path) <= most


def test_amd() -> None:
    amd = GPUTarget("hip", "gfx942", 64)
    assembly = compiled(rule_kernel(AdamRule, "step+sums"), amd).asm["amdgcn"]
    assert assembly.count("_load_dwordx4") >= 4
    assert assembly.count("_store_dwordx4") >= 3
    assert not re.search("(global|buffer|flat)_atomic", assembly)


def test_kernels_of_rules_that_look_alike_are_kept_apart() -> None:
    """Triton finds compiled kernels on disk by their source: the rule's own must count, not only the text around it."""

    class Other(LionRule):
        @staticmethod
        def update(
            param: Any,
            grad: Any,
            exp_avg: Any,
            lr: Any,
            beta1: Any,
            one_minus_beta1: Any,
            beta2: Any,
            one_minus_beta2: Any,
        ) -> Any:
            return lr * (beta1 * exp_avg + one_minus_beta1 * grad), beta2 * exp_avg + one_minus_beta2 * grad

    functions = [rule_kernel(rule) for rule in (LionRule, Other)]
    assert functions[0].src == functions[1].src
    assert functions[0].cache_key != functions[1].cache_key
    build.cache_clear()
    assert rule_kernel(LionRule).cache_key == functions[0].cache_key  # as in another process


def test_no_argument_can_cause_a_recompilation() -> None:
    for function in (rule_kernel(AdamRule), rule_kernel(AdamRule, "step+sums"), build_measure(FLOAT, True).function):
        assert all(parameter.do_not_specialize for parameter in function.params)
        assert not any(parameter.is_constexpr for parameter in function.params)


def test_the_cpu_is_refused_with_the_reason() -> None:
    from lightning_optim import kernels, optim

    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu: it runs on CUDA"):
        optim.AdamW([torch.ones(1, requires_grad=True)], backend="triton")
    assert kernels.choose("auto", torch.device("cpu")).name == "cpu"


def test_without_a_gpu_cuda_is_refused_with_the_reason() -> None:
    from lightning_optim import kernels

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no CUDA device" in str(kernels.why_not("triton", torch.device("cuda")))


def decisions() -> list[Any]:
    """The program of each clip rule with a fragment, with a guard of everything, and with parameters left out."""
    rules = (GlobalNorm(), GroupNorm(groups={"1": None}), BlockRMS(), AdaGC(), AutoClip(), ZClip(max_norm=1.0), None)
    guard = StepGuard(SpikeWindow(2), early_warning=EarlyWarning()).fragment(has_loss=True)
    return [
        Program(
            clip=None if rule is None else rule.fragment(("0", "1")),
            per_tensor=rule is not None and rule.per_tensor,
            guard=guard,
            has_ratios=True,
            has_loss=True,
            has_incoming=True,
            can_skip=True,
            sparse=rule is None or rule.per_tensor,
        )
        for rule in rules
    ]


@pytest.mark.parametrize("program", decisions(), ids=lambda program: program.numbers[0])
def test_a_decision_compiles_and_keeps_double_precision(program: Program) -> None:
    kinds = {
        "place": "*i64",
        "loss": "*bf16",
        "incoming": "*fp32",
        "counts": "*i64",
        "new_counts": "*i64",
        "skip": "*fp32",
    }
    short = ("gamma", "norms", "logs", "flagged")
    kinds |= {f"{new}{name}": "*fp32" for name in short for new in ("", "new_")}
    kinds |= {f"{new}{name}": "*i64" for name in ("flags", "steps", "known") for new in ("", "new_")}
    signature = {f"{name}_at": kinds.get(name, "*fp64") for name in program.arrays}
    signature |= {"parameters": "i32", "tensors": "i32", "SIZE": "constexpr"}
    source = ASTSource(decision_kernel(program), signature=signature, constexprs={"SIZE": 256})
    made = triton.compile(source, target=HOPPER, options=OPTIONS | {"num_warps": 4})
    assert "f64" in made.asm["ptx"]
    assert "atom." not in made.asm["ptx"]


RECORDED = [case for case in CASES if case.elementwise and case.optimizer is not optim.Prodigy]


@pytest.mark.parametrize("divisor", [None, 0, 1])
@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case.optimizer.__name__)
def test_the_scalars_of_every_rule_compile(case: Any, divisor: int | None) -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer = case.optimizer(parameters, **case.settings[0].arguments, backend="reference")
    (batch,) = Batches(optimizer).batches
    columns = device_scalars(batch, None if divisor is None else torch.ones((2,) * divisor), None, False)
    assert isinstance(columns, DeviceColumns)
    assert isinstance(batch.rule, UpdateRule)
    names = tuple(inspect.signature(batch.rule.update).parameters.keys() & columns.known)
    form = columns.form(("inverse_divisor", *names))
    kinds = {"constants": "*fp64", "table": "*fp32", "skip": "*fp32", "divisor": "*fp64", "tensors": "i32"}
    signature = {name: kinds.get(name, "*i64") for name in form.arguments}
    made = triton.compile(ASTSource(scalar_kernel(form), signature=signature), target=HOPPER, options=OPTIONS)
    assert "atom." not in made.asm["ptx"]
