"""`least_squares`: solutions, statuses, limits, losses and covariances, against SciPy and NIST."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from least_squares_cases import (
    METHODS,
    Recorder,
    assert_fit_is_true,
    brown_dennis,
    cost,
    decay,
    each_method,
    each_setting,
    freudenstein_roth,
    jacobian,
    linear,
    one_thread,  # noqa: F401
    powell_singular,
    rosenbrock,
    vector,
)
from torch import Tensor

from descend import Progress, Status, least_squares, minimize


def scipys(fun: Any, x0: Tensor, **options: Any) -> Any:
    """SciPy's result, with tight tolerances."""
    tight = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=2000, x_scale="jac")
    return scipy.optimize.least_squares(
        lambda x: fun(torch.tensor(x)).numpy(),
        x0.numpy(),
        lambda x: jacobian(fun, torch.tensor(x)).numpy(),
        **{**tight, **options},
    )


# Solutions.


@each_method
@each_setting
def test_solution_is_scipys(setting: Any, method: str) -> None:
    recorder = Recorder(setting.fun)
    result = least_squares(recorder, setting.x0, method=method)
    assert result.success
    assert_fit_is_true(result, recorder)
    expected = scipys(setting.fun, setting.x0)
    assert result.fun == pytest.approx(expected.cost, rel=1e-9, abs=1e-12)
    if setting.fun is not powell_singular:
        np.testing.assert_allclose(result.x, expected.x, rtol=1e-4, atol=1e-6)


@each_setting
def test_solution_is_that_of_minimize(setting: Any) -> None:
    expected = minimize(lambda x: 0.5 * setting.fun(x).square().sum(), setting.x0, "newton", tol=1e-9)
    assert least_squares(setting.fun, setting.x0).fun == pytest.approx(expected.fun, rel=1e-9, abs=1e-12)


@each_method
def test_linear_residuals_take_one_step(method: str) -> None:
    result = least_squares(linear, vector(0.0, 0.0, 0.0), method=method, tol=1e-6)
    matrix = jacobian(linear, vector(0.0, 0.0, 0.0))
    expected = torch.linalg.lstsq(matrix, -linear(vector(0.0, 0.0, 0.0))).solution
    torch.testing.assert_close(result.x, expected, rtol=1e-5, atol=1e-6)
    assert result.n_eval <= (3 if method == "trust-region" else 8)


def test_large_residuals_converge_fast() -> None:
    # Gauss-Newton diverges from the solution of the first, and takes hundreds of steps for the second.
    assert least_squares(freudenstein_roth, vector(0.5, -2.0)).n_eval < 20
    assert least_squares(brown_dennis, vector(25.0, 5.0, -5.0, -1.0)).n_eval < 40


def test_valley_is_followed_by_bent_steps() -> None:
    assert least_squares(rosenbrock, vector(-1.2, 1.0)).n_eval < 15


@each_method
def test_results_are_deterministic(method: str) -> None:
    first, second = (least_squares(decay, vector(1.0, 1.0), method=method) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.history == second.history


@each_method
@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_do_not_matter(unit: float, method: str) -> None:
    units = torch.tensor([unit, 1 / unit], dtype=torch.float64)
    plain = least_squares(rosenbrock, vector(-1.2, 1.0), method=method)
    other = least_squares(lambda x: 1e5 * rosenbrock(x / units), vector(-1.2, 1.0) * units, method=method)
    assert other.success
    assert abs(other.n_eval - plain.n_eval) <= 3
    torch.testing.assert_close(other.x / units, plain.x, rtol=1e-6, atol=0.0)


@each_method
@pytest.mark.parametrize("fun", [rosenbrock, decay])
def test_single_precision_is_used_up(fun: Any, method: str) -> None:
    result = least_squares(fun, vector(-1.2, 1.0).float(), method=method)
    assert result.success
    assert result.x.dtype == result.residuals.dtype == torch.float32
    exact = least_squares(fun, vector(-1.2, 1.0))
    torch.testing.assert_close(result.x.double(), exact.x, rtol=2e-3, atol=1e-4)


# Sizes.


@each_method
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (1, 3), (2, 5), (3, 1), (3, 3), (0, 2), (2, 0), (0, 0)])
def test_any_sizes(n_rows: int, n_columns: int, method: str) -> None:
    matrix = torch.tensor(np.random.default_rng(2).normal(size=(n_rows, n_columns)))
    x0 = torch.zeros(n_columns, dtype=torch.float64)
    result = least_squares(lambda x: matrix @ x - 1, x0, method=method)
    assert result.success
    expected = torch.linalg.pinv(matrix) @ torch.ones(n_rows, dtype=torch.float64)  # the shortest, for this scale
    assert result.fun == pytest.approx(cost(matrix @ expected - 1), rel=1e-12, abs=1e-13)
    assert result.residuals.shape == (n_rows,)
    assert result.rank == min(n_rows, n_columns)
    assert result.covariance.shape == (n_columns, n_columns)


def test_equal_columns_share_the_step() -> None:
    result = least_squares(lambda x: torch.stack([x[0] + x[1] - 2, 2 * (x[0] + x[1]) - 4]), vector(0.0, 0.0))
    assert result.success
    assert result.rank == 1
    torch.testing.assert_close(result.x, vector(1.0, 1.0))


def test_variable_without_effect_stays() -> None:
    result = least_squares(lambda x: x[:1] ** 2 - 2 + 0 * x[1], vector(1.0, 7.0))
    assert result.success
    torch.testing.assert_close(result.x, vector(2**0.5, 7.0))
    assert result.rank == 1
    assert math.isinf(result.covariance[1, 1]) or math.isnan(result.covariance[1, 1])


# Statuses and limits.


def test_solved_start_takes_one_evaluation() -> None:
    result = least_squares(rosenbrock, vector(1.0, 1.0))
    assert (result.status, result.n_eval, result.n_jac, result.fun) == (Status.converged, 1, 1, 0.0)


@each_method
@pytest.mark.parametrize("max_eval", [1, 2, 3, 5, 8])
def test_limit_of_evaluations_is_exact(max_eval: int, method: str) -> None:
    recorder = Recorder(brown_dennis)
    result = least_squares(recorder, vector(25.0, 5.0, -5.0, -1.0), method=method, max_eval=max_eval)
    assert (result.status, len(recorder.points)) == (Status.max_eval, max_eval)
    assert_fit_is_true(result, recorder)


@each_method
@pytest.mark.parametrize("max_iter", [0, 1, 4])
def test_limit_of_iterations_is_exact(max_iter: int, method: str) -> None:
    recorder = Recorder(brown_dennis)
    result = least_squares(recorder, vector(25.0, 5.0, -5.0, -1.0), method=method, max_iter=max_iter)
    assert (result.status, result.n_iter) == (Status.max_iter, max_iter)
    assert_fit_is_true(result, recorder)


@pytest.mark.parametrize("stop", ["return", "raise"])
def test_callback_sees_every_iteration_and_stops(stop: str) -> None:
    seen: list[Progress] = []

    def callback(progress: Progress) -> bool:
        seen.append(progress)
        progress.x.zero_()
        if len(seen) == 3 and stop == "raise":
            raise StopIteration
        return len(seen) == 3

    result = least_squares(brown_dennis, vector(25.0, 5.0, -5.0, -1.0), callback=callback)
    assert (result.status, result.n_iter) == (Status.stopped_by_callback, 3)
    assert [progress.fun for progress in seen] == [entry.fun for entry in result.history[1:]]
    assert [progress.n_iter for progress in seen] == [1, 2, 3]
    assert float(result.x.norm()) > 0


@each_method
@each_setting
def test_tolerance_of_zero_ends_at_rounding(setting: Any, method: str) -> None:
    result = least_squares(setting.fun, setting.x0, method=method, tol=0.0, max_eval=3000)
    assert result.status in (Status.converged, Status.precision_limit)
    loose = least_squares(setting.fun, setting.x0, method=method)
    assert result.fun <= loose.fun * (1 + 1e-12) + 1e-30


@each_setting
def test_converged_means_that_no_step_helps(setting: Any) -> None:
    for tol in (1e-2, 1e-5):
        result = least_squares(setting.fun, setting.x0, tol=tol)
        assert result.success
        end = least_squares(setting.fun, setting.x0, tol=0.0)
        is_low = result.fun - end.fun <= 10 * tol**2 * result.fun + 1e-4 * tol**2
        assert is_low or torch.allclose(result.x, end.x, rtol=2 * tol, atol=0.0)
        assert result.fun <= least_squares(setting.fun, setting.x0, max_iter=0).fun


def test_a_far_start_does_not_lose_a_variable() -> None:
    """Residuals hardly depend on the second variable at these starts: with steps of any length it never returns."""
    t = torch.arange(1, 11, dtype=torch.float64) / 10

    def box(x: Tensor) -> Tensor:
        return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))

    for units in (vector(1.0, 1.0, 1.0), vector(1e6, 1e-4, 10.0)):
        result = least_squares(lambda x, units=units: box(x * units), vector(1.0, 100.0, 100.0) / units)
        assert result.success
        assert result.fun < 1e-12


# Bounds.


@each_method
@pytest.mark.parametrize(
    ("fun", "x0", "lower", "upper"),
    [
        (rosenbrock, vector(-1.2, 1.0), vector(-50.0, 0.0), vector(0.5, 100.0)),
        (rosenbrock, vector(-1.2, 1.0), vector(-50.0, 1.5), vector(0.5, 100.0)),
        (powell_singular, vector(3.0, -1.0, 0.0, 1.0), vector(0.1, -20.0, -1.0, -1.0), vector(100.0, 20.0, 1.0, 50.0)),
        (decay, vector(1.0, 1.0), vector(0.0, 0.9), vector(2.0, math.inf)),
        (linear, vector(0.0, 0.0, 0.0), vector(0.0, 0.0, 0.0), vector(0.3, 0.3, 0.3)),
    ],
)
def test_bounded_solution_is_scipys(fun: Any, x0: Tensor, lower: Tensor, upper: Tensor, method: str) -> None:
    recorder = Recorder(fun)
    result = least_squares(recorder, x0, (lower, upper), method=method)
    assert result.success
    assert_fit_is_true(result, recorder)
    assert all(bool(((x >= lower) & (x <= upper)).all()) for x in recorder.points)
    inside = x0.clamp(lower, upper)
    shifted = inside + 1e-3 * torch.where(inside <= lower, 1.0, torch.where(inside >= upper, -1.0, 0.0))
    expected = scipys(fun, shifted, bounds=(lower.numpy(), upper.numpy()))
    assert result.fun <= expected.cost * (1 + 1e-8)
    assert result.fun == pytest.approx(expected.cost, rel=1e-5)


@each_method
def test_fixed_variables_stay(method: str) -> None:
    result = least_squares(
        rosenbrock, vector(-1.2, 1.0), (vector(-math.inf, 4.0), vector(math.inf, 4.0)), method=method
    )
    assert result.success
    assert result.x[1] == 4.0
    assert abs(float(result.x[0])) == pytest.approx(2.0, rel=1e-2)
    everything = least_squares(rosenbrock, vector(-1.2, 1.0), (-1.0, -1.0), method=method)
    assert (everything.status, everything.x.tolist(), everything.n_eval) == (Status.converged, [-1.0, -1.0], 1)


# Robust losses.

LOSSES = ("huber", "soft_l1", "cauchy", "arctan")


@each_method
@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_robust_fit_is_scipys(loss: str, scale: float, method: str) -> None:
    x0 = vector(2.5, 0.6)
    result = least_squares(decay, x0, loss=loss, loss_scale=scale, method=method)
    assert result.success
    expected = scipys(decay, x0, loss=loss, f_scale=scale)
    assert result.fun == pytest.approx(expected.cost, rel=1e-9)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-4)
    assert float((result.grad).abs().max()) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_robust_fit_ignores_outliers(loss: str) -> None:
    fit = least_squares(decay, vector(2.5, 0.6), loss=loss, loss_scale=0.03)
    assert float((fit.x - vector(3.0, 0.7)).abs().max()) < 0.05
    assert float((least_squares(decay, vector(2.5, 0.6)).x - vector(3.0, 0.7)).abs().max()) > 0.1


def cauchys_three(z: Tensor) -> Tensor:
    return torch.stack([torch.log1p(z), 1 / (1 + z), -1 / (1 + z) ** 2])


@pytest.mark.parametrize("loss", [torch.log1p, cauchys_three, lambda z: tuple(cauchys_three(z))])
def test_own_loss_is_used(loss: Any) -> None:
    result = least_squares(decay, vector(2.5, 0.6), loss=loss, loss_scale=0.05)
    expected = least_squares(decay, vector(2.5, 0.6), loss="cauchy", loss_scale=0.05)
    torch.testing.assert_close(result.x, expected.x)
    assert result.fun == pytest.approx(expected.fun, rel=1e-12)


def test_identity_as_own_loss_is_least_squares() -> None:
    result = least_squares(decay, vector(2.5, 0.6), loss=lambda z: z)
    torch.testing.assert_close(result.x, least_squares(decay, vector(2.5, 0.6)).x, rtol=1e-6, atol=0.0)


# Covariance.

NIST = {
    "BoxBOD": (
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        [[1, 1], [100, 0.75]],
        [213.80940889, 0.54723748542],
        [12.354515176, 0.10455993237],
        [1, 2, 3, 5, 7, 10],
        [109, 149, 149, 191, 213, 224],
    ),
    "Rat42": (
        lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
        [[100, 1, 0.1], [75, 2.5, 0.07]],
        [72.462237576, 2.6180768402, 0.067359200066],
        [1.7340283401, 0.088295217536, 0.0034465663377],
        [9, 14, 21, 28, 42, 57, 63, 70, 79],
        [8.93, 10.8, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08],
    ),
    "Misra1a": (
        lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
        [[500, 0.0001], [250, 0.0005]],
        [238.94212918, 0.00055015643181],
        [2.7070075241, 7.2668688436e-06],
        [77.6, 114.9, 141.1, 190.8, 239.9, 289, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760],
        [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.4, 75.47, 81.78],
    ),
}


@each_method
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", NIST)
def test_solution_and_standard_errors_are_certified(name: str, start: int, method: str) -> None:
    # The certified values: https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml
    model, starts, values, deviations, x, y = NIST[name]
    if method == "lm" and name == "BoxBOD" and start == 0:
        pytest.skip("damped steps reach the plateau where the model is a constant")
    x, y = vector(*x), vector(*y)
    result = least_squares(lambda b: model(b, x) - y, vector(*starts[start]), method=method)
    assert result.success
    np.testing.assert_allclose(result.x, values, rtol=1e-7)
    np.testing.assert_allclose(result.standard_errors, deviations, rtol=1e-6)
    torch.testing.assert_close(result.covariance, result.covariance.T)


def test_covariance_is_the_textbooks() -> None:
    result = least_squares(decay, vector(1.0, 1.0))
    variance = 2 * result.fun / (30 - 2)
    torch.testing.assert_close(result.covariance, variance * torch.linalg.inv(result.jac.T @ result.jac))


def test_covariance_says_what_is_not_determined() -> None:
    # x[1] and x[2] count only by their sum, x[0] has residuals of its own.
    def fun(x: Tensor) -> Tensor:
        return torch.stack([x[0] - 1, x[0] - 3, x[1] + x[2] - 5, x[1] + x[2] - 6])

    result = least_squares(fun, vector(0.0, 0.0, 0.0))
    assert result.rank == 2
    variance = (1 + 1 + 0.25 + 0.25) / (4 - 2)
    assert result.covariance[0, 0] == pytest.approx(variance / 2)
    assert result.standard_errors.tolist()[1:] == [math.inf, math.inf]
    assert bool(result.covariance[0, 1:].isnan().all())
    exact = least_squares(lambda x: fun(x)[1:3], vector(0.0, 0.0, 0.0))
    assert bool(exact.covariance[0, 0].isnan())  # no residuals are left to estimate a variance


def test_lm_and_trust_region_agree_about_everything_at_the_end() -> None:
    region, damped = (least_squares(decay, vector(1.0, 1.0), method=method) for method in METHODS)
    torch.testing.assert_close(region.covariance, damped.covariance, rtol=1e-5, atol=0.0)


def test_result_shows_itself() -> None:
    shown = repr(least_squares(decay, vector(1.0, 1.0)))
    for word in ("LeastSquaresResult", "converged", "rank=2", "n_jac="):
        assert word in shown


@pytest.mark.parametrize("options", [{}, dict(batched=True), dict(batched="best")], ids=str)
def test_result_can_be_saved_without_the_function(options: Any) -> None:
    x0 = {"a": torch.tensor([[0.5, 0.5]]).double(), "b": torch.ones(1, 1).double()}
    result = least_squares(lambda p: torch.cat([p["a"] ** 2 - 1, p["b"] * p["a"] - 2], 1), x0, **options)
    loaded = pickle.loads(pickle.dumps(result))
    if options.get("batched") is True:
        result, loaded = result[0], loaded[0]
    assert loaded.standard_errors.keys() == x0.keys()
    torch.testing.assert_close(loaded.standard_errors, result.standard_errors, rtol=0.0, atol=0.0, equal_nan=True)
    assert loaded != result  # compared by identity: tensors have no single truth value
    assert len({result, loaded}) == 2
