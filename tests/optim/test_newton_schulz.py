"""The Newton-Schulz iteration: published coefficients, Gram form, shapes and accuracy."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim as lo
from lightning_optim import optim
from lightning_optim.kernels import symmetric
from lightning_optim.optim import newton_schulz
from lightning_optim.optim.gram_form import gram_iterate, is_faster
from lightning_optim.optim.newton_schulz import orthogonalize
from lightning_optim.optim.ns_coefficients import iterations


def test_singular_values_are_brought_close_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((20, 20), (30, 10), (10, 30)):
        (result,) = orthogonalize([torch.randn(shape)], dtype=torch.float32)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_enough_steps_with_converging_coefficients_give_the_polar_factor() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 8, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = orthogonalize([matrix], (15 / 8, -10 / 8, 3 / 8), steps=40, dtype=torch.float64)
    torch.testing.assert_close(result, left @ right, rtol=0, atol=1e-10)


def test_transposing_commutes_and_scale_does_not_matter() -> None:
    matrix = torch.randn(6, 4, dtype=torch.float64)
    results = [orthogonalize([m], dtype=torch.float64)[0] for m in (matrix, matrix.mT, matrix * 1e-3)]
    torch.testing.assert_close(results[0], results[1].mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batched_is_one_by_one(dtype: torch.dtype) -> None:
    shapes = [(6, 4), (4, 6), (5, 5), (6, 4), (4, 6), (6, 4), (5, 5), (3, 0), (1, 7)]
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    together = orthogonalize(matrices, dtype=dtype)
    alone = [orthogonalize([matrix], dtype=dtype)[0] for matrix in matrices]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    for a, b, matrix in zip(together, alone, matrices, strict=True):
        assert a.shape == matrix.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_a_zero_matrix_stays_zero() -> None:
    (result,) = orthogonalize([torch.zeros(3, 4)])
    assert torch.equal(result, torch.zeros(3, 4, dtype=torch.bfloat16))


def plain(matrix: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """The iteration as dion and torch write it, in float64."""
    x = matrix.double()
    x = x.mT if matrix.shape[-2] > matrix.shape[-1] else x
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in schedule:
        product = x @ x.mT
        x = a * x + (b * product + c * product @ product) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def published(name: str) -> list[tuple[float, float, float]]:
    """Coefficients of five iterations, as the authors' code makes them."""
    if name == "keller":
        return [(3.4445, -4.7750, 2.0315)] * 5
    if name == "you":  # modded-nanogpt
        return [
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ]
    unsafe = [  # The Polar Express, Algorithm 1
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    return [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in unsafe]


SHAPES = [(24, 24), (40, 16), (16, 40), (12, 96), (3, 8, 24), (2, 24, 8)]


@pytest.mark.parametrize("name", ["keller", "polar_express", "you"])
@pytest.mark.parametrize("gram", [False, True, None])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_presets_are_the_published_iterations(
    name: str, gram: bool | None, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "AT_ONCE", 1 if one_by_one else 10**9)
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES * 2]
    found = orthogonalize(matrices, name, dtype=torch.float64, gram=gram)
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, plain(matrix, published(name)), rtol=0, atol=1e-11)


def test_a_custom_list_is_taken_triple_by_triple_and_its_last_one_repeated() -> None:
    matrix = torch.randn(6, 20, dtype=torch.float64)
    given = [(3.0, -3.2, 1.2), (1.875, -1.25, 0.375)]
    (result,) = orthogonalize([matrix], given, steps=4, dtype=torch.float64)
    torch.testing.assert_close(result, plain(matrix, [given[0], *[given[1]] * 3]), rtol=0, atol=1e-12)


def test_polar_express_converges_and_the_others_do_not() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 30, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    errors = {}
    for name in optim.NS_COEFFICIENTS:
        (result,) = orthogonalize([matrix], name, steps=12, dtype=torch.float64)
        errors[name] = float((result - left @ right).abs().max())
    assert errors["polar_express"] < 1e-12
    assert errors["you"] > 1e-3
    assert errors["keller"] > 1e-2


@pytest.mark.parametrize("name", ["keller", "polar_express", "you"])
@pytest.mark.parametrize("condition", [1.0, 10.0, 300.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.008), (torch.float32, 1e-4)])
@pytest.mark.parametrize("steps", [5, 8])
def test_the_gram_form_is_accurate_in_each_dtype(
    name: str, condition: float, dtype: torch.dtype, bound: float, steps: int
) -> None:
    torch.manual_seed(0)
    rows = torch.logspace(0, -torch.tensor(condition).log10().item(), 128, dtype=torch.float64)
    matrix = torch.randn(128, 512, dtype=torch.float64) * rows[:, None]
    exact = plain(matrix, list(iterations(name, steps)))
    (result,) = orthogonalize([matrix], name, steps=steps, dtype=dtype, gram=True)
    assert float((result.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 1.5, 2.0, 4.0, None])
@pytest.mark.parametrize("name", ["keller", "polar_express", "you"])
@pytest.mark.parametrize("steps", [5, 8])
def test_the_gram_form_is_as_accurate_on_every_spectrum(decay: float | None, name: str, steps: int) -> None:
    """Gradients are far from full rank, and rounding makes eigenvalues of a Gram matrix negative."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 64, dtype=torch.float64, generator=generator) for size in (64, 256))
    index = torch.arange(1, 65, dtype=torch.float64)
    values = (index <= 2).double() if decay is None else index**-decay
    matrix = (torch.linalg.qr(left)[0] * values) @ torch.linalg.qr(right)[0].mT
    exact = plain(matrix, list(iterations(name, steps)))
    usual, gram = (orthogonalize([matrix], name, steps=steps, gram=gram)[0].double() for gram in (False, True))
    error, reached = ((result - exact).norm() / exact.norm() for result in (usual, gram))
    assert reached < 2.5 * max(error, 0.01)
    assert torch.linalg.matrix_norm(gram, 2) < 1.1 * torch.linalg.matrix_norm(usual, 2)


@pytest.mark.parametrize("name", ["keller", "polar_express", "you"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 64), (8, 64), (32, 128), (64, 256), (2, 4096)])
@pytest.mark.parametrize("steps", [3, 5, 6, 7, 9, 12])
def test_the_gram_form_of_few_rows_and_of_rank_one_stays_bounded(name: str, shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    for matrix in (torch.randn(shape), torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))):
        (usual,) = orthogonalize([matrix], name, steps, gram=False)
        (result,) = orthogonalize([matrix], name, steps, gram=True)
        norms = [float(torch.linalg.matrix_norm(x.float(), 2)) for x in (result, usual)]
        assert norms[0] < 1.25 * max(1.0, norms[1])


def test_an_empty_stack_joins_other_matrices() -> None:
    empty, full = torch.zeros(0, 4, 4), torch.eye(4)
    found = orthogonalize([empty, full, empty.mT], dtype=torch.float64)
    assert [tuple(x.shape) for x in found] == [(0, 4, 4), (4, 4), (0, 4, 4)]
    torch.testing.assert_close(found[1], orthogonalize([full], dtype=torch.float64)[0])


@pytest.mark.parametrize("cls", [optim.Muon, optim.NorMuon])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_matrices_and_rows_without_gradient_stay_without_eps(cls: Any, adjust: str) -> None:
    weights = [torch.ones(4, 8, requires_grad=True) for _ in range(2)]
    optimizer = cls(weights, lr=0.01, weight_decay=0, eps=0.0, adjust_lr_fn=adjust)
    for weight in weights:
        weight.grad = torch.zeros(4, 8)
    torch.manual_seed(0)
    weights[1].grad[1:] = torch.randn(3, 8)
    optimizer.step()
    assert (weights[0] == 1).all()
    assert (weights[1][0] == 1).all()
    assert weights[1].isfinite().all()
    assert (weights[1][1:] != 1).all()


def test_coefficients_that_change_to_wrong_ones_are_named() -> None:
    weight = torch.ones(4, 8, requires_grad=True)
    optimizer = optim.Muon([weight], ns_coefficients=(1.0, 1.0, 1.0))
    for wrong in ("polar_exprss", (True, 2.0, 1.0), {"a": 1}, [({}, 1, 1)]):
        optimizer.param_groups[0]["ns_coefficients"] = wrong
        weight.grad = torch.ones(4, 8)
        with pytest.raises(ValueError, match=r"Invalid ns_coefficients=.*: must be 'keller'"):
            optimizer.step()


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_a_norm_beyond_float16_is_no_infinity(gram: bool, scale: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 64, dtype=torch.float64)
    (exact,) = orthogonalize([matrix], gram=gram, dtype=torch.float64)
    (result,) = orthogonalize([matrix * scale], gram=gram, dtype=torch.float16)
    assert float((result.double() - exact).norm() / exact.norm()) < 0.005


def test_the_gram_form_is_taken_for_wide_and_tall_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = gram_iterate

    def counted(x: Tensor, schedule: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return real(x, schedule)

    monkeypatch.setattr(newton_schulz, "gram_iterate", counted)
    shapes = (128, 128), (128, 256), (128, 512), (512, 128), (2, 128, 512), (64, 192)
    orthogonalize([torch.randn(shape) for shape in shapes], steps=1)
    assert calls == [(3, 128, 512), (512, 128)]
    assert is_faster(32, 512, "cpu")
    assert not is_faster(4, 4096, "cpu")
    assert is_faster(512, 1024, "cuda")
    assert is_faster(1024, 512, "cuda")
    assert not is_faster(256, 1024, "cuda")


def test_stacks_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few matrices at once, and a single one without the dimension that would slow its products down."""
    calls: list[tuple[int, ...]] = []
    real = newton_schulz.iterate

    def counted(x: Tensor, schedule: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return real(x, schedule)

    monkeypatch.setattr(newton_schulz, "iterate", counted)
    monkeypatch.setattr(newton_schulz, "AT_ONCE", 3 * 8 * 6)
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((8, 6), (4, 8, 6), (8, 6), (8, 6))]
    found = orthogonalize(given, dtype=torch.float64)
    assert calls == [(3, 8, 6), (3, 8, 6), (8, 6)]
    for matrix, result in zip(given, found, strict=True):
        assert result.shape == matrix.shape
        torch.testing.assert_close(result, plain(matrix, published("keller")), rtol=0, atol=1e-11)


def test_half_of_the_tiles_are_computed_of_large_16_bit_matrices_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(symmetric, "_compiles", lambda device: True)

    def chosen(device: str, rows: int, dtype: torch.dtype) -> str:
        made = symmetric.symmetric_products.__wrapped__(torch.device(device), dtype, rows, False)
        return made.product.__module__ or "torch"

    triton = "lightning_optim.kernels.triton.symmetric"
    assert chosen("cuda", 4096, torch.bfloat16) == chosen("cuda", 5000, torch.float16) == triton
    others = ("cuda", 4095, torch.bfloat16), ("cuda", 4096, torch.float32), ("cpu", 4096, torch.bfloat16)
    assert [chosen(*other) for other in others] == ["torch"] * 3
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert chosen("cuda", 4096, torch.bfloat16) == "torch"


def test_the_gram_form_multiplies_the_wide_matrix_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    wide = torch.randn(64, 512)
    flops = {}
    for gram in (False, True):
        with FlopCounterMode(display=False) as counter:
            orthogonalize([wide], gram=gram)
        flops[gram] = counter.get_total_flops()
    small, large = 2 * 64**3, 2 * 64 * 64 * 512
    assert flops == {False: 10 * large + 5 * small, True: 6 * large + 11 * small}


@pytest.mark.parametrize("cls", [optim.Muon, optim.NorMuon])
@pytest.mark.parametrize("given", ["polar_express", [(3.0, -3.2, 1.2), [1.875, -1.25, 0.375]]])
def test_an_optimizer_takes_presets_and_lists_also_in_groups_and_checkpoints(cls: Any, given: Any) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    optimizer = cls([{"params": weights[:1], "ns_coefficients": given}, {"params": weights[1:]}], lr=0.1, momentum=0.0)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.ones(6, 4).tril()
    optimizer.step()
    moved = [(old - new.detach()).norm().item() for old, new in zip(before, weights, strict=True)]
    assert moved[0] != moved[1] or cls is optim.NorMuon
    loaded = cls([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["ns_coefficients"] == given


@pytest.mark.parametrize("given", ["polar_express", [[3.0, -3.2, 1.2], [1.875, -1.25, 0.375]], [3.0, -3.2, 1.2]])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_the_factory_takes_them_by_every_way_of_naming_the_optimizer(name: str, given: Any) -> None:
    options = {"ns_coefficients": given, "ema": [0.9, "power 0.1"]}
    cls = optim.get_optimizer_class(name)
    path = f"lightning_optim.optim.{cls.__name__}"
    for factory in (
        lo.OptimizerFactory(name, optimizer_kwargs=options),
        lo.OptimizerFactory({"class_path": path, "init_args": options}),
        lo.OptimizerFactory(partial(cls, **options)),
    ):
        optimizer, _ = factory.build(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)))
        assert optimizer.param_groups[0]["ns_coefficients"] == given
    with pytest.raises(ValueError, match=r"ns_coefficients='polar_exprss': .*Did you mean 'polar_express'"):
        lo.OptimizerFactory(name, optimizer_kwargs={"ns_coefficients": "polar_exprss"})


def test_torch_takes_the_state_of_the_default() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    weight.grad = torch.randn(4, 4)
    ours, theirs = optim.Muon([weight]), torch.optim.Muon([weight])
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("polar_exprss", r"ns_coefficients='polar_exprss': must be .*Did you mean 'polar_express'\?"),
        (
            [(1.0, 2.0, 3.0)] * 6,
            r"ns_coefficients=\[.*\]: must be at most ns_steps=5 triples, .*, not 6",
        ),
        ([(1.0, 2.0, 3.0), (1.0, 2.0)], r"ns_coefficients=.*: must be 'keller', "),
        ([(1.0, 2.0, 3.0), 1.0, 2.0], r"ns_coefficients=.*: must be 'keller', "),
        ([], r"ns_coefficients=\[\]: must be 'keller', "),
        (3.0, r"ns_coefficients=3.0: must be 'keller', "),
        (None, r"ns_coefficients=None: must be 'keller', "),
    ],
)
def test_other_coefficients_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^Muon: Invalid {message}"):
        optim.Muon([torch.randn(4, 4, requires_grad=True)], ns_coefficients=given)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        (None, 1.0),
        ("original", 1.0),
        ("keller", 1.0),
        ("spectral", 0.5),
        ("spectral_unclamped", 0.5),
        ("match_rms_adamw", 0.2 * 4),
    ],
)
def test_scales_by_name(name: str | None, factor: float) -> None:
    weight = torch.zeros(4, 16, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=name).step()
    (direction,) = orthogonalize([weight.grad])
    torch.testing.assert_close(-weight.detach(), direction.double() * factor, rtol=0, atol=2e-2 * factor)
