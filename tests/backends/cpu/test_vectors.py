"""The compiled passes of L-BFGS are the formulas in their docstrings, for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from descend.backends.cpu.vectors import CHUNK, RowPasses, look_along

SIZES = pytest.mark.parametrize(("numel", "n_rows"), [(1, 1), (7, 5), (1023, 4), (5 * CHUNK + 1, 6)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EVERY = 3
RTOL = 1e-5  # rows and diagonals are float32, and are summed in float32 within a chunk


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


class Data:
    """Random matrices, a positive diagonal, and vectors in the other dtype."""

    def __init__(self, numel: int, n_rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(numel)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        self.steps, self.changes, self.diagonal = normal(n_rows, numel), normal(n_rows, numel), normal(numel).exp()
        self.vectors = [normal(numel, dtype=dtype) for _ in range(4)]
        self.passes = RowPasses(self.steps, self.changes, dtype, EVERY)


def double(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_near(found: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> None:
    """``magnitude``: of the terms, whose sum may be smaller."""
    assert np.all(np.abs(found - expected) <= RTOL * magnitude)


@DTYPES
@SIZES
@pytest.mark.parametrize("between", [True, False])
def test_keep_stores_the_pair_and_measures_what_is_stored(
    numel: int, n_rows: int, dtype: torch.dtype, between: bool
) -> None:
    data = Data(numel, n_rows, dtype)
    s, y, *before = data.vectors
    others = data.steps[: n_rows - 1].clone(), data.changes[: n_rows - 1].clone()
    sums, samples = data.passes.keep(n_rows - 1, (s, y), before if between else (), (0.5, -2.0), data.diagonal)
    if between:
        s, y = s.double() - before[0].double(), y.double() - before[1].double()
    assert torch.equal(data.steps[n_rows - 1], (0.5 * s.double()).float())
    assert torch.equal(data.changes[n_rows - 1], (-2.0 * y.double()).float())
    assert torch.equal(data.steps[: n_rows - 1], others[0])
    assert torch.equal(data.changes[: n_rows - 1], others[1])
    s_, y_, d = double(data.steps[-1]), double(data.changes[-1]), double(data.diagonal)
    lengths = y_ @ (d * y_), s_ @ (s_ / d)
    assert_near(sums, np.array([*lengths, s_ @ y_]), np.array([*lengths, abs(s_) @ abs(y_)]))
    assert np.array_equal(samples, np.stack([d, s_, y_])[:, ::EVERY])


@SIZES
def test_learn_updates_the_diagonal_within_limits(numel: int, n_rows: int) -> None:
    data = Data(numel, n_rows, torch.float64)
    s, y, d = double(data.steps[0]), double(data.changes[0]), double(data.diagonal)
    data.passes.learn(0, data.diagonal, (0.1, 1e-3, 1.5), (0.05, 4.0))
    expected = np.clip(1.5 * d / (1 + 0.1 * d * y**2 - 1e-3 * s**2 / d), 0.05, 4.0)
    np.testing.assert_allclose(double(data.diagonal), expected, rtol=RTOL)


@DTYPES
@SIZES
@pytest.mark.parametrize("with_y", [True, False])
def test_products_are_those_of_the_filled_rows(numel: int, n_rows: int, dtype: torch.dtype, with_y: bool) -> None:
    data = Data(numel, n_rows, dtype)
    for filled in {1, n_rows}:
        slot = filled - 1 if with_y else None
        found = data.passes.products(filled, data.diagonal, data.vectors[0], 0.25, slot)
        s, y, d = double(data.steps[:filled]), double(data.changes[:filled]), double(data.diagonal)
        vectors = [0.25 * double(data.vectors[0])] + ([y[filled - 1]] if with_y else [])
        expected = np.array([product for v in vectors for product in (s @ v, y @ (d * v))])
        size = np.array([product for v in vectors for product in (abs(s) @ abs(v), abs(y) @ (d * abs(v)))])
        assert_near(found, expected, size)


@SIZES
def test_gram_is_symmetric_and_that_of_the_filled_rows(numel: int, n_rows: int) -> None:
    data = Data(numel, n_rows, torch.float64)
    for filled in {1, n_rows}:
        y, d = double(data.changes[:filled]), double(data.diagonal)
        found = data.passes.gram(filled, data.diagonal)
        assert np.array_equal(found, found.T)
        assert_near(found, (y * d) @ y.T, (abs(y) * d) @ abs(y).T)


@DTYPES
@SIZES
@pytest.mark.parametrize("stretch", [1.0, 3.0])
def test_direction_is_the_sum_of_rows(numel: int, n_rows: int, dtype: torch.dtype, stretch: float) -> None:
    data = Data(numel, n_rows, dtype)
    grad, result = data.vectors[:2]
    before, diagonal, d = grad.clone(), data.diagonal.clone(), stretch * double(data.diagonal)
    u, p = np.random.default_rng(0).standard_normal((2, n_rows))
    data.passes.direction(n_rows, data.diagonal, stretch, grad, (0.5, -3.0), (u, p), result)
    s, y, g = double(data.steps), double(data.changes), double(grad)
    size = 3 * (d * (0.5 * abs(g) + abs(u) @ abs(y)) + abs(p) @ abs(s))
    assert_near(double(result), -3.0 * (d * (0.5 * g + u @ y) + p @ s), size)
    assert torch.equal(data.diagonal, diagonal)
    assert torch.equal(grad, before)


@DTYPES
@SIZES
def test_look_along_gives_slopes_and_the_largest_entry(numel: int, n_rows: int, dtype: torch.dtype) -> None:
    grad, direction, before, _ = Data(numel, n_rows, dtype).vectors
    slope, slope_before, largest = look_along(grad, direction, before)
    g, d, b = map(double, (grad, direction, before))
    assert slope == pytest.approx(g @ d, abs=1e-12 * (abs(g) @ abs(d)))
    assert slope_before == pytest.approx(b @ d, abs=1e-12 * (abs(b) @ abs(d)))
    assert largest == float(grad.abs().max())


@DTYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_look_along_sees_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    grad, direction, before, _ = Data(100, 1, dtype).vectors
    grad[57] = value
    assert str(look_along(grad, direction, before)[2]) == str(abs(value))


def test_bits_do_not_depend_on_threads() -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        data = Data(40 * CHUNK + 5, 3, torch.float64)
        sums, _ = data.passes.keep(1, data.vectors[:2], (), (1.0, 1.0), data.diagonal)
        products = data.passes.products(3, data.diagonal, data.vectors[2], 1.0, 1)
        gram = data.passes.gram(3, data.diagonal)
        data.passes.direction(3, data.diagonal, 1.0, data.vectors[2], (1.0, 1.0), (sums, sums), data.vectors[3])
        looked = np.array(look_along(*data.vectors[1:]))
        found.append((sums, products, gram, double(data.vectors[3]), looked))
    for other in found[1:]:
        assert all(map(np.array_equal, found[0], other))
