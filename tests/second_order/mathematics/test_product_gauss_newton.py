"""Gauss-Newton steps from products, against dense ones, definitions and SciPy's linear least squares with bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from descend.second_order.mathematics.gauss_newton import DenseGaussNewton
from descend.second_order.mathematics.product_gauss_newton import ProductGaussNewton

SHAPES = pytest.mark.parametrize("shape", [(1, 1), (9, 1), (30, 7), (7, 30), (12, 12)], ids=str)


def randn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n_rows: int, n_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A Jacobian whose columns have different units, residuals, and a scale."""
    jacobian = randn(1, n_rows, n_columns) * torch.logspace(-2, 2, n_columns, dtype=torch.float64)
    return jacobian, randn(2, n_rows), jacobian.norm(dim=0) * (1 + randn(3, n_columns).abs())


def made(
    jacobian: Tensor,
    residuals: Tensor,
    scale: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    reduction: float = 1e-9,
    max_lsmr: int = 500,
) -> ProductGaussNewton:
    return ProductGaussNewton(
        jacobian.mv,
        jacobian.T.mv,
        residuals,
        jacobian.T.mv(residuals),
        scale,
        low,
        high,
        reduction=reduction,
        max_lsmr=max_lsmr,
    )


def fall(jacobian: Tensor, residuals: Tensor, step: Tensor) -> float:
    return float(0.5 * residuals.square().sum() - 0.5 * (residuals + jacobian @ step).square().sum())


@SHAPES
def test_newton_step_is_the_dense_one(shape: tuple[int, int]) -> None:
    jacobian, residuals, scale = problem(*shape)
    trial, dense = made(jacobian, residuals, scale).newton(), DenseGaussNewton(jacobian, residuals, scale).newton()
    torch.testing.assert_close(trial.step * scale, dense.step * scale, rtol=1e-5, atol=1e-7)
    assert trial.norm == pytest.approx(dense.norm, rel=1e-6)
    assert trial.decrease == pytest.approx(dense.decrease, rel=1e-9)
    assert trial.decrease == pytest.approx(fall(jacobian, residuals, trial.step))


@SHAPES
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.99])
def test_step_ends_at_the_radius_and_falls_nearly_as_far_as_the_best(shape: tuple[int, int], share: float) -> None:
    jacobian, residuals, scale = problem(*shape)
    model, dense = made(jacobian, residuals, scale), DenseGaussNewton(jacobian, residuals, scale)
    radius = share * model.newton().norm
    trial = model.step(radius)
    assert trial.on_boundary
    assert trial.norm == pytest.approx(radius)
    assert model.length(trial.step) == pytest.approx(radius)
    assert trial.decrease == pytest.approx(fall(jacobian, residuals, trial.step), abs=1e-12)
    assert 0.5 * dense.step(radius).decrease < trial.decrease <= dense.step(radius).decrease * (1 + 1e-9)


def test_longer_radius_falls_further_and_costs_no_products() -> None:
    jacobian, residuals, scale = problem(40, 25)
    model, calls = made(jacobian, residuals, scale), []
    model._multiply = lambda v: calls.append(1) or jacobian.mv(v)
    falls = [model.step(share * model.newton().norm).decrease for share in torch.linspace(0.01, 1.5, 50).tolist()]
    assert falls == sorted(falls)
    assert not calls
    assert not model.step(2 * model.newton().norm).on_boundary


@SHAPES
@pytest.mark.parametrize("damping", [1e-3, 0.3, 100.0])
def test_damped_step_is_nearly_the_best(shape: tuple[int, int], damping: float) -> None:
    jacobian, residuals, scale = problem(*shape)
    model, dense = made(jacobian, residuals, scale), DenseGaussNewton(jacobian, residuals, scale)

    def gain(step: Tensor) -> float:
        return fall(jacobian, residuals, step) - 0.5 * damping * float((scale * step).square().sum())

    own, best = model.damped_step(damping), dense.damped_step(damping)
    assert 0.5 * gain(best.step) < gain(own.step) <= gain(best.step) * (1 + 1e-9)
    assert model.damped_step(0.0).decrease == pytest.approx(model.newton().decrease)


def in_box(jacobian: Tensor, residuals: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The minimizer in a box, by SciPy's active sets."""
    solution = lsq_linear(jacobian, -residuals, (low, high), method="bvls", tol=1e-15, max_iter=1000)
    return torch.from_numpy(solution.x)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(30, 7), (12, 12), (40, 20)], ids=str)
def test_newton_step_in_a_box_is_scipys(shape: tuple[int, int], seed: int) -> None:
    jacobian, residuals = randn(seed, *shape), randn(seed + 100, shape[0])
    low, high = -0.1 * randn(seed + 200, shape[1]).abs(), 0.1 * randn(seed + 300, shape[1]).abs()
    model = made(jacobian, residuals, jacobian.norm(dim=0), low, high)
    trial = model.newton()
    assert bool(((trial.step >= low - 1e-15) & (trial.step <= high + 1e-15)).all())
    best = fall(jacobian, residuals, in_box(jacobian, residuals, low.clamp(max=-1e-300), high.clamp(min=1e-300)))
    assert model.is_solved
    assert trial.decrease == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_steps_in_a_box_are_inside_the_box_and_the_region(seed: int, share: float) -> None:
    jacobian, residuals = randn(seed, 30, 10), randn(seed + 100, 30)
    low, high = -0.1 * randn(seed + 200, 10).abs(), 0.1 * randn(seed + 300, 10).abs()
    low[0], high[1], low[2], high[2] = 0.0, 0.0, -math.inf, math.inf
    model = made(jacobian, residuals, jacobian.norm(dim=0), low, high)
    radius = share * model.newton().norm
    for trial in (model.step(radius), model.damped_step(share)):
        assert bool(((trial.step >= low - 1e-15) & (trial.step <= high + 1e-15)).all())
        assert trial.decrease == pytest.approx(fall(jacobian, residuals, trial.step))
        assert trial.decrease > 0
    assert model.step(radius).norm <= radius * (1 + 1e-9)


def test_corner_that_holds_all_variables_is_solved() -> None:
    jacobian, residuals = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    model = made(jacobian, residuals, torch.ones(3, dtype=torch.float64), zeros, zeros + math.inf)
    assert model.is_solved
    assert model.newton().decrease == 0
    assert model.newton().step.tolist() == [0, 0, 0]


def test_variable_just_off_its_bound_does_not_stop_the_others() -> None:
    """The solution pushes both out; projected, the first cannot move, and the second must."""
    jacobian = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    residuals = torch.tensor([1.0, -1.0], dtype=torch.float64)
    low, high = torch.tensor([-1e-13, -50.0], dtype=torch.float64), torch.full((2,), 50.0, dtype=torch.float64)
    trial = made(jacobian, residuals, torch.ones(2, dtype=torch.float64), low, high).newton()
    best = fall(jacobian, residuals, in_box(jacobian, residuals, low, high))
    assert trial.decrease == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_step_that_was_cut_short_is_not_called_solved() -> None:
    jacobian, residuals, scale = problem(60, 40)
    assert not made(jacobian, residuals, scale, max_lsmr=3).is_solved
    assert made(jacobian, residuals, scale).is_solved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite_makes_it_unusable(bad: float) -> None:
    jacobian, residuals, scale = problem(9, 4)
    model = ProductGaussNewton(
        lambda v: jacobian.mv(v) * bad,
        jacobian.T.mv,
        residuals,
        jacobian.T.mv(residuals),
        scale,
        reduction=0.1,
        max_lsmr=10,
    )
    assert not model.is_usable


def test_share_is_the_projection_in_the_norm_of_the_region() -> None:
    jacobian, residuals, scale = problem(9, 4)
    model, dense = made(jacobian, residuals, scale), DenseGaussNewton(jacobian, residuals, scale)
    for step, other in itertools.combinations([randn(seed, 4) for seed in range(3)], 2):
        assert model.share(step, other) == pytest.approx(dense.share(step, other))
    assert model.share(randn(0, 4), torch.zeros(4, dtype=torch.float64)) == 0
