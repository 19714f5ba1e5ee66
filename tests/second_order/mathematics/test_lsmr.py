"""Linear least squares from products, against SciPy's LSMR, dense solutions and the definition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse.linalg import lsmr as scipy_lsmr
from torch import Tensor

from descend.second_order.mathematics.lsmr import End, Lsmr, lsmr


def matrix_of(n_rows: int, n_columns: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    """Singular values from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(n_rows, n_columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        for size in (n_rows, n_columns)
    )
    return left * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ right.T


def vector_of(length: int, seed: int = 1) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(matrix: Tensor, b: Tensor, **options: float | None) -> Lsmr:
    return lsmr(matrix.mv, matrix.T.mv, b, **options)


SHAPES = pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 7), (30, 17), (17, 30), (20, 20)], ids=str)


@SHAPES
@pytest.mark.parametrize("damping", [0.0, 0.03, 2.0])
def test_result_is_scipys(shape: tuple[int, int], damping: float) -> None:
    matrix, b = matrix_of(*shape), vector_of(shape[0])
    own = solve(matrix, b, damping=damping, atol=1e-9, btol=1e-9)
    x, _, n_iter, residual_norm, slope_norm, norm, condition, x_norm = scipy_lsmr(
        matrix.numpy(), b.numpy(), damp=damping, atol=1e-9, btol=1e-9, maxiter=100
    )
    torch.testing.assert_close(own.x, torch.from_numpy(x), rtol=1e-6, atol=1e-7)
    assert abs(own.n_iter - n_iter) <= 1  # rounding grows from iteration to iteration
    assert own.residual_norm == pytest.approx(residual_norm, rel=1e-6, abs=1e-7)
    assert max(own.slope_norm, slope_norm) < 1e-7
    assert own.norm == pytest.approx(norm, rel=0.2)
    assert own.x_norm == pytest.approx(x_norm)
    if min(shape) > 1:
        assert own.condition == pytest.approx(condition, rel=0.2)


@pytest.mark.parametrize("n_iter", [1, 2, 3, 5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_iterates_and_estimates_are_scipys(n_iter: int, damping: float) -> None:
    matrix, b = matrix_of(30, 12, 100.0), vector_of(30)
    own = solve(matrix, b, damping=damping, atol=0.0, btol=0.0, max_iter=n_iter)
    x, _, done, *estimates, x_norm = scipy_lsmr(
        matrix.numpy(), b.numpy(), damp=damping, atol=0, btol=0, conlim=0, maxiter=n_iter
    )
    assert own.n_iter == done == n_iter
    torch.testing.assert_close(own.x, torch.from_numpy(x), rtol=1e-10, atol=1e-12)
    assert (own.residual_norm, own.slope_norm, own.norm, own.condition) == pytest.approx(tuple(estimates), rel=1e-8)
    assert own.x_norm == pytest.approx(x_norm)


@SHAPES
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_solution_is_the_shortest_dense_one(shape: tuple[int, int], damping: float) -> None:
    matrix, b = matrix_of(*shape), vector_of(shape[0])
    wide = torch.cat((matrix, damping * torch.eye(shape[1], dtype=torch.float64)))
    right = torch.cat((b, torch.zeros(shape[1], dtype=torch.float64)))
    expected = torch.linalg.pinv(wide, rtol=1e-12) @ right
    torch.testing.assert_close(solve(matrix, b, damping=damping, atol=1e-14, btol=1e-14).x, expected)


def test_rank_deficiency_gives_the_shortest_solution() -> None:
    matrix = matrix_of(20, 10)
    matrix[:, 4] = matrix[:, 3]
    matrix[:, 7] = 0
    b = vector_of(20)
    torch.testing.assert_close(solve(matrix, b, atol=1e-14, btol=1e-14).x, torch.linalg.pinv(matrix, rtol=1e-12) @ b)


def test_residual_and_slope_fall_while_the_solution_grows() -> None:
    matrix, b = matrix_of(60, 40, 1e3), vector_of(60)
    lengths, residuals, slopes = [0.0], [float(b.norm())], [float((matrix.T @ b).norm())]

    def visit(x: Tensor, length: float) -> bool:
        residual = b - matrix @ x
        lengths.append(length)
        residuals.append(float(residual.norm()))
        slopes.append(float((matrix.T @ residual).norm()))
        assert length == pytest.approx(float(x.norm()))
        return False

    lsmr(matrix.mv, matrix.T.mv, b, atol=1e-8, visit=visit)
    assert len(lengths) > 20
    assert lengths == sorted(lengths)
    assert residuals == sorted(residuals, reverse=True)
    assert slopes == sorted(slopes, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    matrix, b = matrix_of(30, 12).to(dtype), vector_of(30).to(dtype)
    own = solve(matrix, b, atol=0.0, btol=0.0)
    assert own.x.dtype == dtype
    expected = torch.linalg.lstsq(matrix.double(), b.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(own.x.double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


@pytest.mark.parametrize(
    ("b", "matrix"),
    [
        (torch.zeros(4, dtype=torch.float64), matrix_of(4, 3)),
        (vector_of(4), torch.zeros(4, 3, dtype=torch.float64)),
        (torch.zeros(0, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)),
        (vector_of(4), torch.zeros(4, 0, dtype=torch.float64)),
    ],
    ids=["zero", "zero matrix", "no rows", "no columns"],
)
def test_nothing_to_do_is_solved_by_zero(b: Tensor, matrix: Tensor) -> None:
    own = solve(matrix, b)
    assert (own.end, own.n_iter, own.slope_norm) == (End.solved, 0, 0.0)
    assert own.x.tolist() == [0.0] * matrix.shape[1]


def test_ends_are_named() -> None:
    square, b = matrix_of(12, 12, 1e3), vector_of(12)
    tall, longer = matrix_of(40, 12, 1e3), vector_of(40)
    assert solve(square, square @ vector_of(12), atol=1e-6).end is End.solved
    assert solve(tall, longer, atol=1e-6).end is End.least_squares
    assert solve(tall, longer, atol=0.0, btol=0.0, condition_limit=50.0).end is End.condition
    assert solve(tall, longer, max_iter=3).end is End.max_iter
    reduced = solve(tall, longer, reduction=0.1)
    assert reduced.end is End.least_squares
    assert reduced.slope_norm <= 0.1 * float((tall.T @ longer).norm())
    assert reduced.n_iter < solve(tall, longer).n_iter
    assert lsmr(square.mv, square.T.mv, b, visit=lambda x, length: True).end is End.visited


@pytest.mark.parametrize("call", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_ends_at_the_iterate_before(call: int, bad: float) -> None:
    matrix, b = matrix_of(30, 12), vector_of(30)
    calls: list[int] = []

    def spoilt(product: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call + 1:
            product[0] = bad
        return product

    own = lsmr(lambda v: spoilt(matrix.mv(v)), lambda u: spoilt(matrix.T.mv(u)), b)
    assert own.end is End.non_finite
    assert own.n_iter == max(0, (call - 1) // 2)
    assert bool(own.x.isfinite().all())


def test_products_may_return_their_argument() -> None:
    b = vector_of(6)
    before = b.clone()
    own = lsmr(lambda v: v, lambda u: u, b)
    torch.testing.assert_close(own.x, before)
    assert torch.equal(b, before)


def test_memory_is_a_few_vectors() -> None:
    """A matrix of 1e5 rows and columns would need 80 GB; the diagonal's products need none of it."""
    diagonal, b = torch.linspace(1, 2, 100_000, dtype=torch.float64), vector_of(100_000)
    own = lsmr(lambda v: diagonal * v, lambda u: diagonal * u, b, atol=1e-10, btol=1e-10)
    assert own.end is End.solved
    torch.testing.assert_close(own.x, b / diagonal, rtol=0, atol=1e-7)
