"""Steps of Gauss-Newton, Levenberg and Marquardt against naive solutions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from descend.second_order.mathematics.boxed_least_squares import boxed_least_squares
from descend.second_order.mathematics.covariance import covariance
from descend.second_order.mathematics.gauss_newton import DenseGaussNewton
from descend.second_order.mathematics.robust_losses import LOSSES, cost, scaled_rows
from descend.second_order.mathematics.secant_curvature import secant_update
from descend.second_order.mathematics.spectrum import LIFT, column_norms, damped, damping_for, first_scale


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def model_value(jacobian: Tensor, residuals: Tensor, step: Tensor) -> float:
    return 0.5 * float((residuals + jacobian @ step).square().sum())


SHAPES = [(5, 3), (3, 3), (2, 4), (1, 1), (40, 7)]


@pytest.mark.parametrize(("n_rows", "n_columns"), SHAPES)
def test_newton_is_the_shortest_solution(n_rows: int, n_columns: int) -> None:
    jacobian, residuals = normal(n_rows, n_columns), normal(n_rows, seed=1)
    scale = column_norms(jacobian)
    newton = DenseGaussNewton(jacobian, residuals, scale).newton()
    expected = torch.linalg.pinv(jacobian / scale) @ -residuals / scale
    torch.testing.assert_close(newton.step, expected)
    assert newton.norm == pytest.approx(float((scale * expected).norm()))
    fall = model_value(jacobian, residuals, 0 * expected) - model_value(jacobian, residuals, expected)
    assert newton.decrease == pytest.approx(fall)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize(("n_rows", "n_columns"), SHAPES)
def test_step_has_the_length_of_the_radius_and_is_damped(n_rows: int, n_columns: int, share: float) -> None:
    jacobian, residuals = normal(n_rows, n_columns), 1e150 * normal(n_rows, seed=1)
    scale = 3 * column_norms(jacobian)
    model = DenseGaussNewton(jacobian, residuals, scale)
    radius = share * model.newton().norm
    step = model.step(radius)
    assert step.norm == pytest.approx(radius, rel=1e-10)
    assert step.on_boundary
    scaled = jacobian / scale
    normal_matrix = scaled.T @ scaled + model.damping * torch.eye(n_columns, dtype=torch.float64)
    torch.testing.assert_close(
        step.step * scale, -torch.linalg.solve(normal_matrix, scaled.T @ residuals), rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(model.damped_step(model.damping).step, step.step)
    assert model.step(2 * model.newton().norm).step is model.newton().step


def test_damping_of_a_batch_is_that_of_each() -> None:
    values, parts = normal(6, 4).abs().sort(descending=True).values, normal(6, 4, seed=1)
    values[2, 3] = 0.0
    radius = torch.tensor([1e-3, 0.1, 0.5, 1.0, 1e3, 1e-8], dtype=torch.float64)
    together = damping_for(values, parts, radius)
    alone = [float(damping_for(*row)) for row in zip(values, parts, radius, strict=True)]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)
    lengths = damped(values, parts, together.unsqueeze(-1)).norm(dim=-1)
    free = damped(values, parts, 0.0).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.minimum(radius, free), rtol=1e-9, atol=0.0)
    assert bool(((together == 0) == (free <= radius)).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_curvature_is_added_with_absolute_eigenvalues(sign: float) -> None:
    jacobian, residuals = normal(6, 3), normal(6, seed=1)
    half = normal(3, 3, seed=2)
    curvature = sign * 0.02 * half @ half.T
    model = DenseGaussNewton(jacobian, residuals, column_norms(jacobian), curvature=curvature)
    hessian = jacobian.T @ jacobian + curvature
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0  # positive definite in both cases
    expected = -torch.linalg.solve(hessian, jacobian.T @ residuals)
    torch.testing.assert_close(model.newton().step, expected)
    assert model.newton().decrease == pytest.approx(-0.5 * float(expected @ jacobian.T @ residuals))
    indefinite = DenseGaussNewton(jacobian, residuals, column_norms(jacobian), curvature=-10 * half @ half.T).newton()
    assert float(indefinite.step @ (jacobian.T @ residuals)) < 0


def test_indefinite_curvature_of_a_singular_model_leaves_its_promise() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    residuals, scale = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    coupled = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    newton = DenseGaussNewton(jacobian, residuals, scale, curvature=coupled).newton()
    assert newton.decrease == pytest.approx(4.5)
    assert newton.step.tolist() == pytest.approx([-3.0, 0.0])


def test_definite_curvature_of_a_nearly_singular_model_is_accurate() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 1e-12]], dtype=torch.float64)
    residuals, scale = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    curvature = torch.tensor([[0.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    newton = DenseGaussNewton(jacobian, residuals, scale, curvature=curvature).newton()
    assert newton.step.tolist() == pytest.approx([-4.0, 1.0])  # -[[1, 1], [1, 4]]^-1 [3, 0]


def test_correction_solves_with_the_damping_of_the_last_step() -> None:
    jacobian, residuals, bend = normal(6, 3), normal(6, seed=1), normal(6, seed=2)
    scale = column_norms(jacobian)
    model = DenseGaussNewton(jacobian, residuals, scale)
    model.step(0.3)
    matrix = jacobian.T @ jacobian + model.damping * torch.diag(scale**2)
    torch.testing.assert_close(model.correction(bend), -torch.linalg.solve(matrix, jacobian.T @ bend))


@pytest.mark.parametrize("seed", range(40))
def test_box_is_solved_as_by_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n_rows, n_columns = generator.integers(1, 9, 2)
    matrix, right = (
        torch.tensor(generator.normal(size=(n_rows, n_columns))),
        torch.tensor(generator.normal(size=n_rows)),
    )
    matrix *= torch.tensor(10.0 ** generator.integers(-3, 3, n_columns))
    if seed % 3 == 0 and n_columns > 1:
        matrix[:, 1] = matrix[:, 0]
    low, high = -torch.tensor(generator.uniform(size=n_columns)), torch.tensor(generator.uniform(size=n_columns))
    if seed % 4 == 0:
        low *= 1e-15  # almost no room
    t = boxed_least_squares(matrix, right, low, high, torch.zeros(n_columns).double(), 1e-14)
    assert bool(((t >= low) & (t <= high)).all())
    bounds = low.numpy(), high.numpy()
    expected = min(
        scipy.optimize.lsq_linear(matrix.numpy(), -right.numpy(), bounds, method=method, tol=1e-14).cost
        for method in ("bvls", "trf")
    )
    assert 0.5 * float((matrix @ t + right).square().sum()) <= expected * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("radius", [0.05, 0.4, 2.0])
def test_step_in_a_box_is_inside_and_nearly_best(radius: float) -> None:
    jacobian, residuals = normal(8, 4), normal(8, seed=1)
    low, high = torch.full((4,), -0.1).double(), torch.tensor([0.05, 0.0, 1.0, math.inf]).double()
    scale = torch.ones(4).double()
    model = DenseGaussNewton(jacobian, residuals, scale, low=low, high=high)
    trial = model.step(radius)
    assert bool(((trial.step >= low) & (trial.step <= high)).all())
    assert trial.norm <= radius * (1 + 1e-12)
    grid = 0.5 * torch.tensor(np.random.default_rng(2).normal(size=(20_000, 4)))
    grid = torch.minimum(torch.maximum(grid * radius, low), high)
    grid = grid[grid.norm(dim=1) <= radius]
    least = (0.5 * (residuals + grid @ jacobian.T).square().sum(1)).min()
    assert model_value(jacobian, residuals, trial.step) <= float(least) + 0.01 * trial.decrease


def test_secant_condition_holds_and_symmetry_is_kept() -> None:
    half, step = normal(5, 5), normal(5, seed=1)
    hessian = half @ half.T + torch.eye(5, dtype=torch.float64)
    old = normal(5, 5, seed=2)
    updated = secant_update(old + old.T, step, hessian @ step, 0.3 * hessian @ step)
    torch.testing.assert_close(updated, updated.T)
    torch.testing.assert_close(updated @ step, 0.3 * hessian @ step)
    unchanged = secant_update(old + old.T, step, -hessian @ step, step)
    assert torch.equal(unchanged, old + old.T)


@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "linear"])
def test_losses_have_their_derivatives(name: str, scale: float) -> None:
    rho = LOSSES[name]
    assert rho is not None
    z = torch.tensor([0.0, 1e-8, 0.3, 0.99, 1.01, 7.0, 1e4], dtype=torch.float64, requires_grad=True)
    value, first, second = rho(z)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z, create_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), z)[0], second)
    residuals = normal(7).mul(3).requires_grad_()
    (slope,) = torch.autograd.grad(cost(residuals, rho, scale), residuals)
    rows, factors = scaled_rows(residuals.detach(), rho, scale)
    torch.testing.assert_close(factors * rows, slope)
    assert bool((factors > 0).all())


def test_column_norms_do_not_overflow() -> None:
    matrix = torch.tensor([[3e200, 3e-200, 0.0], [4e200, 4e-200, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        column_norms(matrix), torch.tensor([5e200, 5e-200, 0.0], dtype=torch.float64), rtol=1e-14, atol=0.0
    )
    assert column_norms(matrix[:0]).tolist() == [0.0, 0.0, 0.0]


def test_covariance_of_full_rank_is_the_inverse() -> None:
    jacobian = normal(9, 4)
    scale = column_norms(jacobian)
    _, values, rows = torch.linalg.svd(jacobian / scale, full_matrices=False)
    torch.testing.assert_close(covariance(values, rows, scale, 0.5), 0.5 * torch.linalg.inv(jacobian.T @ jacobian))


def test_first_scale_relates_steps_to_the_start() -> None:
    norms, x, units = torch.tensor(
        [[2.0, 1e-3, 3.0, 0.0], [-10.0, 50.0, 0.0, 4.0], [1e3, 1e-5, 7.0, 1e8]], dtype=torch.float64
    )
    scale = first_scale(norms, x)
    wanted = [2.0, 1e-3 * (20 / 50 / 1e-3) ** LIFT, 3.0, 20 / 4]  # the third starts at zero
    assert scale.tolist() == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(first_scale(norms / units, x * units), scale / units, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(first_scale(torch.stack([norms, norms]), torch.stack([x, 0 * x]))[1], norms)


def test_rounding_is_that_of_the_present_jacobian() -> None:
    jacobian = torch.tensor([[1.0, -2.0], [0.5, 1e3], [4.0, 0.0]]).double()
    x, residuals = torch.tensor([3.0, -0.1]).double(), torch.tensor([1.0, -2.0, 0.3]).double()
    model = DenseGaussNewton(jacobian, residuals, 1e6 * column_norms(jacobian))
    assert model.rounding(x) == pytest.approx(float((jacobian * x).norm()), rel=1e-12)
