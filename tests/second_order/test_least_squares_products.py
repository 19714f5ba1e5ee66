"""``least_squares`` with products of the Jacobian only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from descend import Status, least_squares
from descend.second_order.problem import residuals as residuals_module
from descend.second_order.solvers import sized_linearization

REGIONS = pytest.mark.parametrize("method", ["trust-region", "lm"])


def linspace(start: float, stop: float, n: int) -> Tensor:
    return torch.linspace(start, stop, n, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.cat((10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]))


def tridiagonal(x: Tensor) -> Tensor:
    around = torch.nn.functional.pad(x, (1, 1))
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


@REGIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solution_is_the_dense_one(method: str, dtype: torch.dtype) -> None:
    x0 = torch.full((20,), -1.0, dtype=dtype)
    own = least_squares(tridiagonal, x0, method=method, jac="products")
    dense = least_squares(tridiagonal, x0, method=method, jac="dense")
    assert own.success
    assert (own.n_jac, dense.n_hvp) == (0, 0)
    assert own.n_hvp > 0
    assert own.jac is own.covariance is None
    torch.testing.assert_close(own.x, dense.x, rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=1e-4)


@REGIONS
@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy"])
def test_robust_losses_are_the_dense_ones(method: str, loss: str) -> None:
    t = linspace(0, 3, 40)
    y = 2 * torch.exp(-0.8 * t) + 0.3
    y[[5, 17, 30]] += 2.0
    fits = [
        least_squares(
            lambda p: p[0] * torch.exp(-p[1] * t) + p[2] - y,
            torch.tensor([1.5, 1.0, 0.0], dtype=torch.float64),
            loss=loss,
            loss_scale=0.1,
            method=method,
            jac=jac,
        )
        for jac in ("products", "dense")
    ]
    assert all(fit.success for fit in fits)
    torch.testing.assert_close(fits[0].x, fits[1].x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fits[0].grad, fits[1].grad, rtol=0, atol=1e-5)


@REGIONS
def test_bounds_hold_at_every_evaluation(method: str) -> None:
    lower, upper = torch.full((30,), -0.3, dtype=torch.float64), linspace(0.2, 1.5, 30)

    def residuals(x: Tensor) -> Tensor:
        assert bool(((x >= lower) & (x <= upper)).all())
        return rosenbrock(x)

    own, dense = (
        least_squares(residuals, torch.zeros(30, dtype=torch.float64), (lower, upper), method=method, jac=jac)
        for jac in ("products", "dense")
    )
    assert own.success
    assert own.fun == pytest.approx(dense.fun, rel=1e-8)
    assert bool((own.x == upper).any())


def test_units_of_the_variables_hardly_matter() -> None:
    units = torch.logspace(-6, 6, 20, dtype=torch.float64)
    plain = least_squares(tridiagonal, -torch.ones(20, dtype=torch.float64), jac="products")
    other = least_squares(lambda x: tridiagonal(x / units), -units, jac="products")
    assert other.success
    torch.testing.assert_close(other.x / units, plain.x, rtol=1e-6, atol=1e-7)
    assert other.n_eval <= 2 * plain.n_eval


def test_runs_are_alike() -> None:
    first, second = (least_squares(rosenbrock, linspace(-1, 1, 9), jac="products") for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.history == second.history


@REGIONS
@pytest.mark.parametrize("max_eval", [1, 2, 5])
def test_max_eval_is_never_exceeded(method: str, max_eval: int) -> None:
    calls: list[int] = []
    fit = least_squares(
        lambda x: calls.append(1) or rosenbrock(x), linspace(-1, 1, 9), method=method, max_eval=max_eval, jac="products"
    )
    assert len(calls) == fit.n_eval == max_eval
    assert fit.status is Status.max_eval


def test_nan_is_a_wall() -> None:
    fit = least_squares(
        lambda x: torch.stack((x[0].log() + 1, (x[1] - 0.5).sqrt() - 0.1)),
        torch.tensor([3.0, 2.0], dtype=torch.float64),
        jac="products",
    )
    assert fit.success
    assert fit.x.tolist() == pytest.approx([math.exp(-1), 0.51])


def test_truncated_step_does_not_count_as_converged() -> None:
    """A difference equation with condition 1e7: LSMR comes nowhere near the step, which the first iterates hide."""
    n = 2000
    h = 1 / (n + 1)
    t = h * torch.arange(1, n + 1, dtype=torch.float64)

    def residuals(x: Tensor) -> Tensor:
        around = torch.nn.functional.pad(x, (1, 1))
        return 2 * x - around[:-2] - around[2:] + h**2 / 2 * (x + t + 1) ** 3

    fit = least_squares(residuals, t * (t - 1), jac="products", max_iter=2)
    assert fit.status is Status.max_iter


def test_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = -torch.ones(30, dtype=torch.float64)
    assert least_squares(tridiagonal, x0).n_hvp == 0
    monkeypatch.setattr(sized_linearization, "MAX_DENSE", 30**3 - 1)
    assert least_squares(tridiagonal, x0, jac="auto").n_jac == 0
    monkeypatch.undo()
    monkeypatch.setattr(sized_linearization, "free_memory", lambda device: 0)
    assert least_squares(tridiagonal, x0).n_jac == 0


@pytest.mark.parametrize(("jac", "error"), [("sparse", TypeError), (3, TypeError), ([], TypeError)])
def test_other_ways_are_errors(jac: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"jac must be a function, one of \('auto', 'dense', 'products'\) or None"):
        least_squares(tridiagonal, torch.ones(3, dtype=torch.float64), jac=jac)


def test_hundred_thousand_variables_take_a_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    products = residuals_module.ResidualObjective.products

    def watched(self: Any, point: Any) -> Any:
        multiply, multiply_transposed = products(self, point)

        def noted(vector: Tensor) -> Tensor:
            largest.append(vector.numel())
            return multiply(vector)

        return noted, multiply_transposed

    monkeypatch.setattr(residuals_module.ResidualObjective, "products", watched)
    fit = least_squares(tridiagonal, -torch.ones(100_000, dtype=torch.float64))
    assert fit.success
    assert fit.fun < 1e-12
    assert set(largest) == {100_000}
    assert fit.n_iter < 12
