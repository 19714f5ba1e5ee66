"""`scipy_minimize` takes SciPy's constraints, and ends at SciPy's minimum with SciPy's multipliers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from minimize_cases import one_thread  # noqa: F401
from scipy.optimize import (
    BFGS,
    Bounds,
    LinearConstraint,
    NonlinearConstraint,
    OptimizeResult,
    minimize,
    rosen,
    rosen_der,
    rosen_hess,
)

from descend import scipy_minimize

CENTER = np.array([1.0, 2.5])
HALF_PLANES = [
    {"type": "ineq", "fun": lambda x: x[0] - 2 * x[1] + 2},
    {"type": "ineq", "fun": lambda x: -x[0] - 2 * x[1] + 6},
    {"type": "ineq", "fun": lambda x: -x[0] + 2 * x[1] + 2},
]
MATRIX = np.array([[1.0, -2.0], [-1.0, -2.0], [-1.0, 2.0]])
SPHERE = {"type": "eq", "fun": lambda x, r: x @ x - r, "jac": lambda x, r: 2 * x, "args": (1.5,)}
PARABOLAS = NonlinearConstraint(lambda x: [x[0] ** 2 + x[1], x[0] ** 2 - x[1]], -np.inf, 1)
LINES = LinearConstraint([[1, 2], [2, 1]], [-np.inf, 1], [1, 1])


def square(x: np.ndarray) -> float:
    return float((x - CENTER) @ (x - CENTER))


@pytest.mark.filterwarnings("ignore:Equality and inequality constraints are specified in the same")
@pytest.mark.parametrize("method", ["slsqp", "trust-constr", None])
@pytest.mark.parametrize(
    ("fun", "jac", "x0", "bounds", "constraints"),
    [
        (square, None, [2, 0], [(0, None)] * 2, HALF_PLANES),
        (square, lambda x: 2 * (x - CENTER), [2, 0], None, HALF_PLANES[0]),
        (square, "3-point", [2, 0], None, LinearConstraint(MATRIX, [-2, -6, -2])),
        (square, None, [2, 0], None, LinearConstraint(scipy.sparse.csr_array(MATRIX), [-2, -6, -2])),
        (rosen, rosen_der, [0.5, 0, 0.2], None, SPHERE),
        (rosen, rosen_der, [0.5, 0], Bounds([0, -0.5], [1, 2]), [LINES, PARABOLAS]),
    ],
    ids=["half-planes", "one", "matrix", "sparse", "sphere", "mixed"],
)
def test_minimum_is_scipys(method: str | None, fun: Any, jac: Any, x0: Any, bounds: Any, constraints: Any) -> None:
    result = scipy_minimize(fun, x0, method=method, jac=jac, bounds=bounds, constraints=constraints)
    options = dict(ftol=1e-12)
    reference = minimize(fun, x0, method="SLSQP", jac=jac, bounds=bounds, constraints=constraints, options=options)
    assert (result.success, result.status) == (True, 0)
    assert type(result) is OptimizeResult
    assert result.x == pytest.approx(reference.x, abs=1e-5)
    assert result.fun == pytest.approx(reference.fun, abs=1e-6)
    assert result.jac == pytest.approx(reference.jac, abs=1e-4)
    assert 0 <= result.maxcv < 1e-6
    if not isinstance(constraints, LinearConstraint):
        assert result.multipliers == pytest.approx(reference.multipliers, abs=1e-3)


def test_functions_are_called_once_a_point_and_within_bounds() -> None:
    calls: dict[str, list[np.ndarray]] = {"fun": [], "values": [], "jac": []}

    def recorded(name: str, function: Any) -> Any:
        def call(x: np.ndarray) -> Any:
            calls[name].append(x.copy())
            return function(x)

        return call

    both = NonlinearConstraint(
        recorded("values", lambda x: [x.sum(), x[0] * x[1]]),
        [1, 0.1],
        [1, 0.2],
        jac=recorded("jac", lambda x: [[1, 1], [x[1], x[0]]]),
    )
    fun = recorded("fun", lambda x: (rosen(x), rosen_der(x)))
    result = scipy_minimize(fun, [0.5, 0.3], jac=True, bounds=[(0, 0.9)] * 2, constraints=both)
    assert result.success
    assert result.nfev == result.njev == len(calls["fun"])
    assert len(calls["values"]) == len(calls["fun"])  # both evaluate the result once more
    assert len(calls["jac"]) <= len(calls["values"])
    assert all(np.all((point >= 0) & (point <= 0.9)) for points in calls.values() for point in points)


def test_differences_of_constraints_stay_within_bounds() -> None:
    points: list[np.ndarray] = []

    def values(x: np.ndarray) -> float:
        points.append(x.copy())
        return math.sqrt(x[0]) + x[1] - 1

    result = scipy_minimize(square, [0.5, 0.5], bounds=[(0, 0.4), (0, 1)], constraints={"type": "eq", "fun": values})
    assert result.success
    assert all(0 <= point[0] <= 0.4 and 0 <= point[1] <= 1 for point in points)


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_without_constraints_they_are_minimized_all_the_same(method: str) -> None:
    result = scipy_minimize(rosen, [-1.2, 1.0], method=method, jac=rosen_der, bounds=[(None, 0.5)] * 2)
    assert result.success
    assert result.x == pytest.approx([0.5, 0.25], abs=1e-5)


def test_limits_and_callbacks() -> None:
    options: dict[str, Any] = dict(jac=rosen_der, constraints=SPHERE)
    result = scipy_minimize(rosen, [0.5, 0, 0.2], options=dict(maxiter=3, return_all=True), **options)
    assert (result.nit, result.status, result.success) == (3, 1, False)
    assert len(result.allvecs) == 3
    seen: list[Any] = []

    def stop(x: np.ndarray, state: Any) -> bool:
        seen.append((x, state.fun, state.nit))
        return len(seen) == 2

    result = scipy_minimize(rosen, [0.5, 0, 0.2], method="trust-constr", callback=stop, **options)
    assert (result.status, len(seen)) == (99, 2)
    assert [(fun, nit) for _, fun, nit in seen] == [(rosen(seen[0][0]), 1), (rosen(seen[1][0]), 2)]

    def halt(x: np.ndarray) -> None:
        raise StopIteration

    assert scipy_minimize(rosen, [0.5, 0, 0.2], callback=halt, **options).status == 99


def test_what_cannot_be_satisfied_is_said() -> None:
    result = scipy_minimize(lambda x: x @ x, [1.0, 1.0], constraints={"type": "eq", "fun": lambda x: x @ x + 1})
    assert (result.success, result.status) == (False, 4)
    assert result.maxcv == pytest.approx(1, abs=1e-3)
    assert "feasible" in result.message


def test_walls_are_not_crossed() -> None:
    def fun(x: np.ndarray) -> float:
        return x[0] - math.log(x[0]) + x[1] ** 2

    constraint = {"type": "ineq", "fun": lambda x: math.log(x[1]) + 2}
    result = scipy_minimize(fun, [3.0, 3.0], constraints=constraint, domain_errors=ValueError)
    assert result.success
    assert result.x == pytest.approx([1, math.exp(-2)], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(constraints=[3]), TypeError, r"constraints\[0\] must be a dict"),
        (dict(constraints={"type": "equal", "fun": rosen}), ValueError, r"constraints\[0\] must have 'type' 'eq' or"),
        (dict(constraints=[SPHERE, {"type": "eq"}]), ValueError, r"constraints\[1\] must have 'type'"),
        (dict(constraints={"type": "eq", "fun": rosen, "jac": 3}), TypeError, "'jac' must be a function"),
        (dict(constraints=SPHERE, method="BFGS"), ValueError, "constraints are for method='SLSQP', got method='BFGS'"),
        (dict(constraints=SPHERE, hess=rosen_hess), ValueError, "hess is for Newton's methods"),
        (dict(constraints=SPHERE, hess=BFGS()), TypeError, "hess must be a function"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_called(change: dict[str, Any], error: Any, text: str) -> None:
    def never(x: Any) -> Any:
        raise AssertionError("called")

    with pytest.raises(error, match=f"^scipy_minimize: .*{text}"):
        scipy_minimize(never, [0.5, 0, 0.2], **change)


def test_jacobian_is_checked() -> None:
    wrong = {"type": "eq", "fun": lambda x: x.sum(), "jac": lambda x: np.ones(5)}
    with pytest.raises(ValueError, match=r"constraints\[0\]: the Jacobian must have shape \(1, 3\), got \(5,\)"):
        scipy_minimize(rosen, [0.5, 0, 0.2], constraints=wrong)


@pytest.mark.parametrize(
    ("constraint", "error", "text"),
    [
        (
            {"type": "eq", "fun": lambda x: None},
            TypeError,
            "what fun returns must be an array of real numbers, got None",
        ),
        (
            {"type": "eq", "fun": lambda x: x[: 1 + (x[0] != 0.5)]},
            ValueError,
            "as many values at each call, got 2 after 1",
        ),
        (
            NonlinearConstraint(lambda x: x[:2], [0, 0, 0], 1),
            ValueError,
            "the lower limit must be one number, or one for",
        ),
    ],
)
def test_what_constraints_return_is_checked(constraint: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=rf"^scipy_minimize: constraints\[0\]: .*{text}"):
        scipy_minimize(rosen, [0.5, 0, 0.2], constraints=constraint)


def test_one_further_argument_need_not_be_a_tuple() -> None:
    def plane(x: np.ndarray, level: float) -> float:
        return float(x.sum()) - level

    results = [
        scipy_minimize(rosen, [0.5, 0, 0.2], constraints={"type": "eq", "fun": plane, "args": args})
        for args in (2, (2,))
    ]
    assert results[0].success
    assert results[0].x.tolist() == results[1].x.tolist()
