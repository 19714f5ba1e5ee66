"""The rules of whole matrices: against singular values, against their papers written again, and what must not break."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from descend.core.signature import signature
from descend.matrix_rules import lr_ratio, muon, normuon, rows_of_pieces
from descend.newton_schulz import COEFFICIENTS, iterations, orthogonalize

SETS = {"jordan": 5, "polar_express": 5, "cans": 7}  # with the iterations that each is used with
# What the docstring of ``orthogonalize`` promises.
BOUNDS = {torch.bfloat16: 0.2, torch.float32: 2e-3, torch.float64: 1e-10}


def by_singular_values(matrix: Tensor, triples: Any) -> Tensor:
    """What exact arithmetic would give: the polynomials of the singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u @ (s[:, None] * v)


def with_values(m: int, n: int, values: Tensor) -> Tensor:
    """A matrix with these singular values, in float64."""
    random = torch.Generator().manual_seed(m + n)
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=random, dtype=torch.float64), full_matrices=False)
    return u @ (values[:, None] * v)


def matrices(m: int, n: int) -> Iterator[Tensor]:
    """Well conditioned; few directions above noise, as gradients are; values over four decades; few large elements."""
    random = torch.Generator().manual_seed(m * n)
    noise = torch.randn(m, n, generator=random, dtype=torch.float64)
    yield noise
    yield torch.randn(m, 8, generator=random).double() @ torch.randn(8, n, generator=random).double() + 0.05 * noise
    yield with_values(m, n, torch.logspace(0, -4, min(m, n), dtype=torch.float64))
    yield noise * (1 + 100 * (torch.rand(m, n, generator=random) > 0.999))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", [(64, 64), (60, 200), (150, 70)])
def test_orthogonalize_is_the_polynomial_of_the_singular_values(
    shape: tuple[int, int], name: str, dtype: torch.dtype, form: Any
) -> None:
    triples = iterations(name, SETS[name])
    for matrix in matrices(*shape):
        found = orthogonalize(matrix, name, SETS[name], form=form, dtype=dtype)
        assert found.dtype == torch.float64
        assert distance(found, by_singular_values(matrix, triples)) < BOUNDS[dtype]


@pytest.mark.parametrize("shape", [(515, 780), (520, 520), (1030, 515)])
def test_large_products_are_computed_by_half(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = by_singular_values(matrix, iterations("jordan"))
    for form in ("direct", "gram"):
        assert distance(orthogonalize(matrix, form=form), expected) < 1e-12
    assert distance(orthogonalize(matrix, dtype=torch.bfloat16), expected) < 0.02


def test_products_are_as_exact_as_torchs_in_bfloat16() -> None:
    (jordan,) = COEFFICIENTS["jordan"]
    for matrix in matrices(100, 333):
        expected = by_singular_values(matrix, [jordan] * 5)
        theirs = distance(_zeropower_via_newtonschulz(matrix.float(), jordan, 5, 1e-7), expected)
        for form in ("direct", "gram"):
            ours = distance(orthogonalize(matrix.float(), form=form, dtype=torch.bfloat16), expected)
            assert ours < 1.5 * theirs + 0.02


def composed(values: Tensor, triples: Any) -> Tensor:
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values


def test_sets_of_coefficients_do_what_is_said_of_them() -> None:
    values = torch.logspace(math.log10(0.002), 0, 2000, dtype=torch.float64)
    jordan = composed(values, iterations("jordan"))
    assert 0.68 < float(jordan.min()) < float(jordan.max()) < 1.21
    polar = composed(values[values > 0.005], iterations("polar_express", 8))
    assert float((polar - 1).abs().max()) < 1e-3
    cans = composed(torch.linspace(0.0009, 1, 20000, dtype=torch.float64), iterations("cans"))
    assert float((cans - 1).abs().max()) < 0.31


def test_cans_is_the_best_cubic_for_each_interval() -> None:
    # Proposition 2 of the paper, on the interval [low, high]; the next one is [1 - error, 1 + error].
    b_over_a = [-b / a for a, b, _ in COEFFICIENTS["cans"]]
    low, high = (1 / b_over_a[0] - 0.75) ** 0.5 - 0.5, 1.0  # the ratio is 1 / (low^2 + low high + high^2)
    for a, b, c in COEFFICIENTS["cans"]:
        total = low * low + low * high + high * high
        peak, edges = 2 * (total / 3) ** 1.5, low * high * (low + high)
        assert (a, b, c) == pytest.approx((2 * total / (peak + edges), -2 / (peak + edges), 0.0), rel=1e-8)
        error = (peak - edges) / (peak + edges)
        low, high = 1 - error, 1 + error
    assert error == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("form", ["auto", "direct", "gram"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (0, 3), (3, 0), (2, 0, 4), (0, 2, 3)])
def test_odd_shapes(shape: tuple[int, ...], form: Any) -> None:
    matrix = torch.randn(shape)
    before = matrix.clone()
    found = orthogonalize(matrix, "polar_express", 8, form=form)
    assert found.shape == shape
    assert torch.equal(matrix, before)
    if 0 not in shape:
        torch.testing.assert_close(found, matrix / matrix.norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_stay_zeros_and_nan_is_nan(dtype: torch.dtype, form: Any) -> None:
    matrix = torch.zeros(70, 200, dtype=dtype)
    assert not orthogonalize(matrix, form=form).any()
    assert not orthogonalize(matrix, form=form, eps=0.0).any()
    matrix[3, 5] = math.nan
    assert orthogonalize(matrix, form=form).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_is_divided_out_to_the_ends_of_the_range(dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = orthogonalize(matrix)
    assert expected.dtype == dtype
    largest = float(matrix.abs().max())
    for scale in (torch.finfo(dtype).max / largest / 2, torch.finfo(dtype).tiny * 1e3):
        scaled = (matrix.double() * scale).to(dtype)
        found = orthogonalize(scaled, eps=0.0)
        assert distance(found, expected.double()) < 4 * torch.finfo(dtype).eps ** 0.5
    tiny = orthogonalize(matrix * 0 + 1e-30 if dtype != torch.float16 else matrix * 0, eps=1e-7)
    assert float(tiny.double().abs().max()) < 1e-15  # eps is larger than the norm


def test_rank_deficient_matrices_have_a_bound_too() -> None:
    # Rounding to bfloat16 gives them small singular values, which grow by up to 485; those that were there are right.
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(100, 3, generator=random).double() @ torch.randn(3, 300, generator=random).double()
    expected = by_singular_values(matrix, iterations("jordan"))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    for dtype, bound in ((torch.bfloat16, 0.1), (torch.float32, 2e-3), (torch.float64, 1e-10)):
        error = orthogonalize(matrix, dtype=dtype) - expected
        assert float((u[:, :3].T @ error @ v[:3].T).norm()) < bound
        assert float(torch.linalg.matrix_norm(error, 2)) < (0.5 if dtype == torch.bfloat16 else bound)


def test_strides_and_batches_do_not_matter() -> None:
    matrix = torch.randn(4, 70, 200, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([orthogonalize(each) for each in matrix])
    torch.testing.assert_close(orthogonalize(matrix), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(orthogonalize(matrix.mT), expected.mT, atol=1e-4, rtol=1e-4)
    wide = torch.zeros(4, 70, 400)[..., ::2]
    wide.copy_(matrix)
    torch.testing.assert_close(orthogonalize(wide.view(2, 2, 70, 200)).flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            random = torch.Generator().manual_seed(0)
            shapes = ((80, 300), (7, 5), (9, 64, 64), *[(540, 1100)] * (dtype == torch.bfloat16))
            found.append([orthogonalize(torch.randn(shape, generator=random), dtype=dtype) for shape in shapes])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_what_is_no_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must be a matrix, or a batch of matrices, got shape \(3,\)"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="form must be"):
        orthogonalize(torch.ones(3, 3), form="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficients must be one of"):
        orthogonalize(torch.ones(3, 3), "keller")
    for wrong in ((), (1.0, 2.0), ((1.0, 2.0, 3.0), (1.0, 2.0))):
        with pytest.raises(ValueError, match="exactly 3 values"):
            orthogonalize(torch.ones(3, 3), wrong)
    with pytest.raises(ValueError, match="7 rows cannot be cut into 2 equal pieces"):
        rows_of_pieces(7, 2)
    with pytest.raises(ValueError, match="7 rows cannot be cut into pieces of"):
        rows_of_pieces(7, (3, 3))


@pytest.mark.parametrize("kind", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (5, 5)])
def test_lr_is_adjusted_as_in_torch(shape: tuple[int, int], kind: Any) -> None:
    assert lr_ratio(*shape, kind) == _adjust_lr(1.0, kind, torch.Size(shape))
    assert lr_ratio(*shape, "spectral_unclamped") == math.sqrt(shape[0] / shape[1])


def test_equal_options_give_the_same_rule() -> None:
    assert muon() is muon()
    assert muon(True, "original", (1.0, 2.0, 3.0)) is muon(True, "original", (1.0, 2.0, 3.0))
    assert muon(True) is not muon(False)
    assert muon() is not normuon()
    takes = signature(normuon(split=4))
    assert takes.kind == "matrix"
    assert takes.state == ("momentum_buffer", "second_momentum_buffer")
    assert takes.scalars == ("lr", "weight_decay", "momentum", "gain", "gain2", "eps", "norm_eps")


def test_rules_modify_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    for rule, count in ((muon(), 3), (normuon(), 4)):
        tensors = [torch.rand(70, 200, generator=random) for _ in range(count)]
        tensors = [tensor[:, :1] if index == 3 else tensor for index, tensor in enumerate(tensors)]
        before = [tensor.clone() for tensor in tensors]
        rule(*tensors, *[0.1] * len(signature(rule).scalars))
        assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (dict(split=3), (6, 5)),
        (dict(split=(1, 4, 2)), (7, 3, 2)),
        (dict(stacked=True), (4, 6, 5)),
        (dict(stacked=True, split=2), (3, 6, 2, 2)),
        (dict(adjust_lr_fn="spectral_unclamped", split=2), (4, 9)),
    ],
)
@pytest.mark.parametrize("kind", [textbook.Muon, textbook.NorMuon])
def test_pieces_and_stacks_are_matrices_by_themselves(
    kind: Any, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    make = muon if kind is textbook.Muon else normuon
    rule = make(
        adjust_lr_fn=options.get("adjust_lr_fn", "original"),
        split=options.get("split", 1),
        leading=int(options.get("stacked", False)),
    )
    random = torch.Generator().manual_seed(0)
    theirs = torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
    reference = kind([theirs], lr=0.1, weight_decay=0.1, **options)
    ours, state = theirs.detach().clone(), None
    for _ in range(3):
        theirs.grad = torch.randn(shape, generator=random, dtype=torch.float64)
        reference.step()
        if state is None:
            state = [torch.zeros_like(tensor) for tensor in reference.state[theirs].values()]
        numbers = (0.1, 0.1, 0.95, 0.05) + ((0.05,) if make is normuon else ()) + (1e-7,)
        ours, *state = rule(ours, theirs.grad, *state, *numbers, *((1e-10,) if make is normuon else ()))
        torch.testing.assert_close(ours, theirs.detach())
        torch.testing.assert_close(state, list(reference.state[theirs].values()))
