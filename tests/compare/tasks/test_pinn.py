"""The Burgers equation: its reference by another method, its derivatives, and that it is learned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from task_runs import losses, problem_of, train

from descend.compare.problem import Problem
from descend.compare.tasks import pinn

TIMES = (0.1, 0.3, 0.5, 1.0)


def test_reference_agrees_with_finite_differences() -> None:
    """By the method of lines: central differences of fourth order on half the interval, as u is odd."""
    cells = 1600  # ten in the shock
    x = np.linspace(0, 1, cells + 1)
    step = x[1]

    def slope(_: float, inner: np.ndarray) -> np.ndarray:
        u = np.concatenate([[0.0], inner, [0.0]])
        padded = np.concatenate([-u[2:0:-1], u, -u[-2:-4:-1]])  # odd at both ends
        u_x = (padded[:-4] - 8 * padded[1:-3] + 8 * padded[3:-1] - padded[4:]) / (12 * step)
        u_xx = (-padded[:-4] + 16 * padded[1:-3] - 30 * u + 16 * padded[3:-1] - padded[4:]) / (12 * step**2)
        return (pinn.VISCOSITY * u_xx - u * u_x)[1:-1]

    start = -np.sin(math.pi * x[1:-1])
    lines = solve_ivp(slope, (0, 1), start, method="LSODA", t_eval=TIMES, rtol=1e-8, atol=1e-10, lband=2, uband=2)
    assert lines.success
    for time, u in zip(TIMES, lines.y.T, strict=True):
        exact = pinn.reference(x[1:-1], np.full(cells - 1, time))
        assert np.abs(u - exact).max() < 5e-5, time


def test_reference_has_the_given_values() -> None:
    x = np.linspace(-1, 1, 41)
    assert np.allclose(pinn.reference(x, np.zeros(41)), -np.sin(math.pi * x), atol=1e-12)
    assert np.allclose(pinn.reference(np.array([-1.0, 1.0]), np.array([0.4, 0.9])), 0, atol=1e-9)
    assert np.allclose(pinn.reference(x, np.full(41, 0.7)), -pinn.reference(-x, np.full(41, 0.7)), atol=1e-9)


def test_residual_is_that_of_differences() -> None:
    torch.manual_seed(0)
    model, h = pinn.model(), 1e-4
    points = torch.rand(20, 2, dtype=torch.float64) * 0.8 + 0.1
    dx, dt = torch.tensor([[h, 0.0]]), torch.tensor([[0.0, h]])
    with torch.no_grad():
        u, right, left = model(points), model(points + dx), model(points - dx)
        later, earlier = model(points + dt), model(points - dt)
    expected = (later - earlier) / (2 * h) + u * (right - left) / (2 * h)
    expected -= pinn.VISCOSITY * (right - 2 * u + left) / h**2
    assert torch.allclose(pinn.residual(model, points), expected, atol=1e-5)


def test_network_has_the_values_at_start_and_walls() -> None:
    torch.manual_seed(0)
    line = torch.linspace(0, 1, 9, dtype=torch.float64)
    model, zeros, ones = pinn.model(), torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    start = model(torch.stack([line, zeros], dim=1))
    assert torch.allclose(start, -torch.sin(math.pi * line))
    for wall in (-ones, ones):
        assert model(torch.stack([wall, line], dim=1)).abs().max() < 1e-12


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(pinn.TASK)


def test_adam_then_curvature_beats_adam(problem: Problem) -> None:
    alone, _, other = train(problem, "adam", 150)
    for text, share in (("lbfgs", 0.85), ("minimize.ss-broyden", 0.4)):
        chained, _, model = train(problem, f"adam:steps=30+{text}", 150)
        assert losses(chained)[:31] == losses(alone)[:31]
        assert chained[-1].loss < share * alone[-1].loss
        assert pinn.score(model, problem.data.test).metric < share * pinn.score(other, problem.data.test).metric


def test_points_crowd_at_the_shock() -> None:
    points, targets = pinn.load(0).sample(0, torch.Generator())
    assert points.shape == (pinn.POINTS, 2)
    assert not targets.any()
    assert 0 <= points[:, 1].min() < points[:, 1].max() <= 1
    assert points[:, 0].abs().max() <= 1
    assert ((points[:, 0].abs() < 1 / 8).double().mean() - 0.5).abs() < 0.02


@pytest.mark.parametrize(
    "text", ["minimize.l-bfgs", "minimize.newton-cg", "scipy.l-bfgs-b", "scipy.trust-krylov", "newton"]
)
def test_solvers_have_the_derivatives_they_need(text: str, problem: Problem) -> None:
    steps, _, _ = train(problem, text, 4)
    assert steps[-1].loss < steps[0].loss
