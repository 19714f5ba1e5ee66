"""The updates of Broyden's family, against the direct update of B and its inverse, and what makes them safe."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from direction_cases import (
    CPU,
    DTYPES,
    NUMEL,
    RTOL,
    Array,
    assert_near,
    double,
    one_thread,  # noqa: F401
    pairs,
    random,
)

from descend.second_order.mathematics import directions
from descend.second_order.mathematics.broyden_family import (
    Choice,
    Member,
    Ratios,
    bfgs,
    self_scaled_bfgs,
    self_scaled_broyden,
)
from descend.second_order.mathematics.directions import CompactInverse, DenseInverse, add_symmetric_

CHOICES = (bfgs, self_scaled_bfgs, self_scaled_broyden)
each_choice = pytest.mark.parametrize("choose", CHOICES, ids=lambda choose: choose.__name__)


def steps(inverse: DenseInverse, seed: int, count: int) -> Iterator[tuple[Array, Array]]:
    """Let an inverse learn ``count`` pairs along its own directions; yield each before it is learned."""
    numel, dtype = len(inverse.inverse), inverse.inverse.dtype
    normal = random(seed)
    for _ in range(count):
        root = normal(numel, numel)
        curvature = root @ root.T / numel + torch.eye(numel, dtype=torch.float64)
        # Steps too short and too long, and a curvature that rises and falls: b is on both sides of 1.
        s = inverse.direction(normal(numel).to(dtype)) * float(normal(1).exp())
        y = (curvature @ s.double()).to(dtype) * float(normal(1).exp())
        yield double(s), double(y)
        inverse.update(s, y)


def direct_update(b_matrix: Array, s: Array, y: Array, theta: float, tau: float) -> Array:
    """The scaled update of the Hessian: Al-Baali 1998, equations 5 and 6."""
    sy, bs = s @ y, b_matrix @ s
    w = np.sqrt(s @ bs) * (y / sy - bs / (s @ bs))
    return tau * (b_matrix - np.outer(bs, bs) / (s @ bs) + theta * np.outer(w, w)) + np.outer(y, y) / sy


def papers_theta(b: float, h: float) -> float:
    """Urbán et al. 2025, equations 15 to 20, as printed; where a is not small."""
    a = b * h - 1
    c = math.sqrt(a / (1 + a))
    rho = min(1, h * (1 - c))
    return max((rho - 1) / a, min(1 / rho, (1 - b) / b))


def papers_tau(b: float, h: float, theta: float, numel: int) -> float:
    """Urbán et al. 2025, equations 21 to 23."""
    sigma, rho = 1 + theta * (b * h - 1), min(1, 1 / b)
    root = sigma ** (1 / (1 - numel))
    return min(rho * root, sigma) if theta <= 0 else rho * min(root, 1 / theta)


@each_choice
@pytest.mark.parametrize("numel", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_inverse_is_that_of_the_direct_update(choose: Choice, numel: int, seed: int) -> None:
    inverse = DenseInverse(numel, torch.float64, CPU, choose, history_size=1)
    expected = np.eye(numel)  # the Hessian
    for number, (s, y) in enumerate(steps(inverse, seed, 12)):
        if number == 1:
            expected = np.linalg.inv(double(inverse.inverse))
        elif number:
            assert_near(inverse.inverse @ torch.from_numpy(expected), np.eye(numel), 1e-6)
        b = (s @ expected @ s) / (s @ y)
        h = (y @ np.linalg.solve(expected, y)) / (s @ y)
        theta, _, tau = choose(Ratios(b, h, numel))
        expected = direct_update(expected, s, y, theta, tau)


@DTYPES
@each_choice
def test_update_fits_the_pair_and_stays_positive_definite_and_symmetric(choose: Choice, dtype: torch.dtype) -> None:
    inverse = DenseInverse(NUMEL, dtype, CPU, choose, history_size=2)
    last = None
    for s, y in steps(inverse, 7, 300):
        if inverse.is_dense:
            assert last is not None
            matrix = double(inverse.inverse)
            assert_near(matrix @ last[1], last[0], 10 * RTOL[dtype])
            assert np.array_equal(matrix, matrix.T)
            assert np.linalg.eigvalsh(matrix).min() > 0
        last = s, y


@pytest.mark.parametrize("numel", [2, 3, 50])
@pytest.mark.parametrize("b", [1e-3, 0.3, 0.9, 1.0, 1.1, 4.0, 1e3])
@pytest.mark.parametrize("a", [1e-2, 1.0, 30.0])
def test_self_scaled_broyden_is_the_papers(numel: int, b: float, a: float) -> None:
    h = (1 + a) / b
    theta, sigma, tau = self_scaled_broyden(Ratios(b, h, numel))
    assert theta == pytest.approx(papers_theta(b, h), rel=1e-10)
    assert sigma == pytest.approx(1 + a * theta, rel=1e-10)
    assert tau == pytest.approx(papers_tau(b, h, theta, numel), rel=1e-10)


@pytest.mark.parametrize(("b", "tau"), [(0.5, 1.0), (1.0, 1.0), (4.0, 0.25)])
def test_self_scaled_bfgs_lowers_the_curvature_only(b: float, tau: float) -> None:
    assert self_scaled_bfgs(Ratios(b, 10.0, 3)) == Member(0.0, 1.0, tau)
    assert bfgs(Ratios(b, 10.0, 3)) == Member(0.0, 1.0, 1.0)


@each_choice
def test_member_is_safe_for_all_ratios(choose: Choice) -> None:
    sizes = [10.0**power for power in (-290, -30, -8, -1, 0, 1, 8, 30, 290)]
    for numel in (1, 2, 1000):
        for b in sizes:
            for excess in (-1e-12, 0.0, 1e-15, 1e-6, 1.0, 1e6):  # rounding makes a negative
                ratios = Ratios(b, (1 + excess) / b, numel)
                theta, sigma, tau = choose(ratios)
                assert all(map(math.isfinite, (theta, sigma, tau)))
                assert sigma > 0
                assert 0 < tau <= 1
                assert 1 + theta * max(excess, 0.0) > -1e-12  # the true sigma, whose a differs by rounding


@each_choice
def test_update_that_follows_no_direction_is_that_of_bfgs(choose: Choice) -> None:
    ours, expected = (DenseInverse(NUMEL, torch.float64, CPU, member, history_size=1) for member in (choose, bfgs))
    normal = random(1)
    for _ in range(4):
        s = normal(NUMEL)
        for inverse in (ours, expected):
            inverse.update(s, 2 * s)
    assert torch.equal(ours.inverse, expected.inverse)


@pytest.mark.parametrize("pair", [(0.0, 0.0), (1.0, -1.0), (1.0, 0.0), (1e200, 1e200), (math.nan, 1.0)])
def test_dense_pair_without_positive_products_is_not_learned(pair: tuple[float, float]) -> None:
    inverse, ones = DenseInverse(2, torch.float64, CPU, self_scaled_broyden, 1), torch.ones(2, dtype=torch.float64)
    inverse.update(ones, 3 * ones)
    before = inverse.direction(ones)
    inverse.update(pair[0] * ones, pair[1] * ones)
    assert torch.equal(inverse.direction(ones), before)


@DTYPES
@pytest.mark.parametrize("history_size", [1, 2, 5])
def test_dense_matrix_begins_as_the_compact_one(history_size: int, dtype: torch.dtype) -> None:
    dense = DenseInverse(NUMEL, dtype, CPU, self_scaled_broyden, history_size)
    compact, grad = CompactInverse(NUMEL, history_size, dtype, CPU), random(1)(NUMEL).to(dtype)
    assert torch.equal(dense.direction(grad), -grad)
    for _, pair in zip(range(history_size), pairs(dtype), strict=False):
        assert not dense.is_dense
        for inverse in (dense, compact):
            inverse.update(*pair)
        assert_near(dense.direction(grad), double(compact.direction(grad)), RTOL[dtype])
    assert dense.is_dense


@pytest.mark.parametrize("large", [1, 20, 10**6])
@pytest.mark.parametrize("numel", [0, 1, 7])
def test_products_are_added_block_by_block(large: int, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "LARGE", large)
    normal = random(0)
    matrix, s, h = normal(numel, numel), normal(numel), normal(numel)
    matrix = matrix + matrix.T
    left, right = torch.stack([s, h]), torch.stack([2 * s + 3 * h, 3 * s - h])  # left times a symmetric matrix
    expected = 0.5 * matrix + left.T @ right
    place = matrix.data_ptr()
    add_symmetric_(matrix, 0.5, left, right)
    torch.testing.assert_close(matrix, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(matrix, matrix.T)
    assert matrix.data_ptr() == place
