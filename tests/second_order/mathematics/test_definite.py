"""Solving with symmetric positive definite matrices, and finding out that they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from descend.second_order.mathematics.definite import NotDefiniteError, cholesky, solve_by_factor, solve_by_products

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def matrix(eigenvalues: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(0)
    numel = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(numel, numel, generator=generator, dtype=torch.float64))[0]
    return ((basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T).to(dtype)


def solve(hessian: Tensor, vector: Tensor, way: str, max_products: int = 1000) -> Tensor:
    if way == "factor":
        factor, is_definite = cholesky(hessian, torch.finfo(hessian.dtype).eps)
        if not is_definite:
            assert torch.equal(factor, torch.eye(len(hessian)).to(hessian))
            raise NotDefiniteError("singular")
        return solve_by_factor(factor, vector)
    return solve_by_products(lambda u: hessian @ u, vector, TOLERANCE[hessian.dtype], max_products)


each_way = pytest.mark.parametrize("way", ["factor", "products"])


@each_way
@each_dtype
@pytest.mark.parametrize("numel", [0, 1, 2, 17])
def test_solution_matches_numpy(numel: int, dtype: torch.dtype, way: str) -> None:
    hessian = matrix([1.0 + i for i in range(numel)], dtype)
    vector = torch.linspace(-1, 2, numel, dtype=dtype)
    expected = np.linalg.solve(hessian.double().numpy(), vector.double().numpy())
    found = solve(hessian, vector, way)
    assert found.dtype == dtype
    assert np.allclose(found.numpy(), expected, rtol=0, atol=100 * TOLERANCE[dtype])


@each_way
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_magnitudes_do_not_matter(way: str, scale: float) -> None:
    hessian, vector = matrix([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.float64)
    expected = torch.linalg.solve(hessian, vector)
    assert torch.allclose(solve(hessian * scale, vector, way) * scale, expected, rtol=1e-8)
    assert torch.allclose(solve(hessian, vector * scale, way) / scale, expected, rtol=1e-8)


def test_units_of_the_variables_do_not_matter() -> None:
    units = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    hessian = matrix([1.0, 2.0, 3.0]) * units * units[:, None]
    factor, is_definite = cholesky(hessian, 1e-16)
    assert is_definite
    assert torch.allclose((factor @ factor.T) / units / units[:, None], matrix([1.0, 2.0, 3.0]))


@each_way
@pytest.mark.parametrize(
    "eigenvalues", [[1.0, 0.0, 2.0], [1.0, -1.0, 2.0], [0.0], [-1.0], [1.0, 1e-17, 1.0], [0.0, 0.0]], ids=str
)
def test_indefinite_and_singular_matrices_are_refused(eigenvalues: list[float], way: str) -> None:
    with pytest.raises(NotDefiniteError, match=r"singular|not positive definite"):
        solve(matrix(eigenvalues), torch.ones(len(eigenvalues), dtype=torch.float64), way)


@each_dtype
@pytest.mark.parametrize("numel", [3, 30])
def test_singular_matrices_of_products_are_refused(numel: int, dtype: torch.dtype) -> None:
    """Where one column is a combination of others, whatever its place."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randn(3 * numel, numel, generator=generator, dtype=dtype)
        place = seed % numel
        columns[:, place] = 0
        columns[:, place] = columns @ torch.randn(numel, generator=generator, dtype=dtype)
        assert not cholesky(columns.T @ columns, torch.finfo(dtype).eps)[1]
        columns[:, place] += torch.randn(3 * numel, generator=generator, dtype=dtype)
        assert cholesky(columns.T @ columns, torch.finfo(dtype).eps)[1]


@each_way
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_matrices_that_are_not_finite_are_refused(way: str, number: float) -> None:
    hessian = torch.eye(3, dtype=torch.float64)
    hessian[1, 2] = hessian[2, 1] = number
    with pytest.raises(NotDefiniteError):
        solve(hessian, torch.ones(3, dtype=torch.float64), way)


def test_matrices_of_a_batch_are_alone() -> None:
    some = [[1.0, 2.0, 3.0], [1.0, -2.0, 3.0], [0.0, 0.0, 0.0], [1e9, 1.0, 1.0], [math.nan, 1.0, 1.0]]
    hessians = torch.stack([matrix(eigenvalues) for eigenvalues in some])
    vectors = matrix([1.0, 2.0, 3.0])[0].expand(5, 3)
    factors, is_definite = cholesky(hessians, 1e-16)
    assert is_definite.tolist() == [True, False, False, True, False]
    solutions = solve_by_factor(factors, vectors)
    expected = torch.linalg.solve(hessians[is_definite], vectors[is_definite])
    assert torch.allclose(solutions[is_definite], expected, rtol=1e-6)
    assert torch.equal(solutions[~is_definite], vectors[~is_definite])
    assert cholesky(hessians[:0], 1e-16)[1].shape == (0,)


def test_too_few_products_are_an_error() -> None:
    hessian = matrix([1.0, 10.0, 100.0, 1000.0, 10000.0])
    with pytest.raises(NotDefiniteError, match=r"ill-conditioned .* after 3 products"):
        solve(hessian, torch.ones(5, dtype=torch.float64), "products", max_products=3)


def test_products_of_an_asymmetric_matrix_are_an_error() -> None:
    hessian = torch.eye(4, dtype=torch.float64) + torch.ones(4, 4, dtype=torch.float64).triu(1)
    with pytest.raises(NotDefiniteError):
        solve(hessian, torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64), "products", max_products=4)


def test_zero_needs_no_product() -> None:
    def product(u: Tensor) -> Tensor:
        raise AssertionError

    assert not solve_by_products(product, torch.zeros(3), 1e-5, 1).any()
