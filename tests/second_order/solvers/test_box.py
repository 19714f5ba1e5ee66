"""The model within bounds is BFGS, and its minimizer in a box is the best of all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from direction_cases import CPU, DTYPES, NUMEL, RTOL, Array, Pair, assert_near, double, one_thread, pairs, random  # noqa: F401
from torch import Tensor

from descend.second_order.solvers.box import ACCURACY, CompactHessian, minimizer


def dense_hessian(history: list[Pair], start: Array) -> Array:
    """Nocedal & Wright 2006, equation 6.19."""
    hessian = start
    for s, y in history:
        s, y = double(s), double(y)
        hs = hessian @ s
        hessian = hessian - np.outer(hs, hs) / (s @ hs) + np.outer(y, y) / (s @ y)
    return hessian


def hessian_of(n_pairs: int, dtype: torch.dtype, numel: int = NUMEL, seed: int = 0) -> tuple[CompactHessian, Array]:
    """A model that has seen some pairs, and the same as a matrix."""
    model, taken = CompactHessian(numel, 5, dtype, CPU), []
    for _, pair in zip(range(n_pairs), pairs(dtype, seed, numel), strict=False):
        taken = [*taken, pair][-5:]
        model.update(*pair)
    return model, dense_hessian(taken, np.diag(1 / double(model.diagonal)))


@DTYPES
@pytest.mark.parametrize("n_pairs", [0, 1, 4, 5, 6, 12])
def test_compact_hessian_is_bfgs(n_pairs: int, dtype: torch.dtype) -> None:
    model, dense = hessian_of(n_pairs, dtype)
    vector = random(1)(NUMEL).to(dtype)
    assert_near(model.multiply(vector), dense @ double(vector), RTOL[dtype])


@DTYPES
@pytest.mark.parametrize("n_pairs", [0, 1, 5, 8])
@pytest.mark.parametrize("n_free", [0, 1, 4, NUMEL])
def test_compact_hessian_is_solved_for_the_free_variables(n_pairs: int, n_free: int, dtype: torch.dtype) -> None:
    model, dense = hessian_of(n_pairs, dtype)
    vector = random(1)(NUMEL).to(dtype)
    free = torch.zeros(NUMEL, dtype=torch.bool)
    free[torch.randperm(NUMEL)[:n_free]] = True
    expected = np.zeros(NUMEL)
    if n_free:
        expected[free] = np.linalg.solve(dense[free][:, free], double(vector[free]))
    solution = model.solve(torch.where(free, vector, 0), free)
    assert not bool(solution[~free].any())
    assert_near(solution, expected, 10 * RTOL[dtype])


def test_compact_hessian_goes_on_from_its_state_and_forgets_at_a_reset() -> None:
    (model, _), other = hessian_of(7, torch.float64), CompactHessian(NUMEL, 5, torch.float64, CPU)
    vector = random(1)(NUMEL)
    other.load({name: value.clone() for name, value in model.state().items()})
    for _, pair in zip(range(3), pairs(torch.float64, seed=3), strict=False):
        assert torch.equal(model.multiply(vector), other.multiply(vector))
        model.update(*pair)
        other.update(*pair)
    model.reset()
    assert model.is_steepest
    assert torch.equal(model.multiply(vector), vector)


def test_diagonal_learns_nothing_from_the_gradient_of_variables_that_stay() -> None:
    (model, _), (other, _) = hessian_of(2, torch.float64), hessian_of(2, torch.float64)
    s, y = next(pairs(torch.float64, seed=4))
    stays = torch.arange(NUMEL) % 3 == 0
    s = torch.where(stays, 0.0, s)
    y = torch.where(s * y < 0, -y, y)
    model.update(s, y)
    other.update(s, torch.where(stays, 1e3, y))
    torch.testing.assert_close(model.diagonal, other.diagonal, rtol=1e-12, atol=0.0)
    assert not torch.equal(model.multiply(s), other.multiply(s))  # the pairs know


def best_in_box(grad: Array, hessian: Array, low: Array, high: Array) -> Array:
    """Of the minimizers over all choices of variables at their bounds, the best feasible one."""
    found, least = np.zeros(len(grad)), 0.0
    for places in product((-1, 0, 1), repeat=len(grad)):
        place = np.array(places)
        free = place == 0
        d = np.where(place < 0, low, np.where(place > 0, high, 0.0))
        if not np.isfinite(d).all():
            continue
        if free.any():
            d[free] = np.linalg.solve(hessian[free][:, free], -(grad + hessian @ d)[free])
        value = grad @ d + d @ hessian @ d / 2
        if value < least and (d >= low - 1e-12).all() and (d <= high + 1e-12).all():
            found, least = d, value
    return found


@pytest.mark.parametrize("n_pairs", [0, 1, 3, 8])
@pytest.mark.parametrize("seed", range(15))
def test_minimizer_in_a_box_is_the_best_of_all_active_sets(n_pairs: int, seed: int) -> None:
    normal = random(seed)
    model, dense = hessian_of(n_pairs, torch.float64, numel=5, seed=seed)
    grad = normal(5)
    low, high = -normal(5).abs() / 10, normal(5).abs() / 10
    low[0], high[1], low[2], high[3] = 0.0, 0.0, -torch.inf, torch.inf
    d = minimizer(model, grad, low, high)
    assert bool(((low <= d) & (d <= high)).all())
    best = best_in_box(double(grad), dense, double(low), double(high))

    def value(at: Array) -> float:
        return float(double(grad) @ at + at @ dense @ at / 2)

    def residual(at: Tensor) -> Tensor:
        slope = grad + torch.as_tensor(dense) @ at
        return (at - torch.clamp(at - model.diagonal * slope, low, high)).abs().max()

    assert value(double(d)) <= 0.98 * value(best)  # ACCURACY of the gradient is more of the value
    assert float(residual(d)) <= ACCURACY * float(residual(torch.zeros(5, dtype=torch.float64))) * (1 + 1e-9)
    assert float(grad.dot(d)) < 0


def test_minimizer_in_a_box_stays_where_nothing_is_lower() -> None:
    model, _ = hessian_of(3, torch.float64)
    grad = random(1)(NUMEL)
    corner = torch.zeros(NUMEL, dtype=torch.float64)
    d = minimizer(model, grad, torch.where(grad > 0, corner, -1.0), torch.where(grad > 0, 1.0, corner))
    assert not bool(d.any())
