"""`scipy_minimize` takes what SciPy takes, and returns what SciPy returns, from the same minimum."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from minimize_cases import for_scipy, one_thread  # noqa: F401
from problems import unconstrained
from scipy.optimize import Bounds, OptimizeResult, OptimizeWarning, rosen, rosen_der, rosen_hess, rosen_hess_prod

from descend import minimize, scipy_minimize

START = np.array([-1.2, 1.0, 0.5])
LINE_SEARCH = ("L-BFGS-B", "BFGS", "CG")
NEWTON = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-exact", "dogleg")
DOZEN = {
    *("rosenbrock-2", "beale-2", "helical_valley-3", "box-3", "gaussian-3", "brown_dennis-4", "kowalik_osborne-4"),
    *("biggs-6", "variably_dimensioned-10", "trigonometric-10", "broyden_tridiagonal-10", "broyden_banded-10"),
}


def rosen_pair(x: np.ndarray) -> tuple[float, np.ndarray]:
    return rosen(x), rosen_der(x)


class Calls:
    """A function that keeps the points at which it was called."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.fun, self.points = fun, []

    def __call__(self, x: np.ndarray, *args: Any) -> Any:
        self.points.append(x.copy())
        return self.fun(x, *args)


# Against SciPy.


@pytest.mark.parametrize(
    ("method", "jac"), [("L-BFGS-B", True), ("BFGS", True), ("BFGS", None), ("L-BFGS-B", "3-point")]
)
def test_minimum_is_scipys_for_fewer_evaluations(method: str, jac: Any) -> None:
    ours = theirs = 0
    chosen = [problem for problem in unconstrained() if problem.name in DOZEN]
    assert len(chosen) == len(DOZEN)
    for problem in chosen:
        pair, x0 = for_scipy(problem.fun), problem.x0.numpy()
        fun = pair if jac is True else lambda x, fun=problem.fun: fun(torch.from_numpy(x)).item()
        result = scipy_minimize(fun, x0, method=method, jac=jac)
        reference = scipy.optimize.minimize(fun, x0, method=method, jac=jac)
        assert result.success, problem.name
        assert result.fun <= reference.fun + 1e-6 * max(1.0, abs(reference.fun)), problem.name
        ours, theirs = ours + result.nfev, theirs + reference.nfev
    assert ours <= theirs


@pytest.mark.parametrize("method", NEWTON)
@pytest.mark.parametrize("how", ["hess", "hessp", "neither", "jac=True", "sparse", "operator", "list"])
def test_newton_takes_every_form_of_the_hessian(method: str, how: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "hess": dict(hess=rosen_hess),
        "hessp": dict(hessp=rosen_hess_prod),
        "neither": dict(),
        "jac=True": dict(hess="2-point"),
        "sparse": dict(hess=lambda x: scipy.sparse.csr_array(rosen_hess(x))),
        "operator": dict(hess=lambda x: scipy.sparse.linalg.aslinearoperator(rosen_hess(x))),
        "list": dict(hess=lambda x: rosen_hess(x).tolist()),
    }
    fun, jac = (rosen_pair, True) if how == "jac=True" else (rosen, rosen_der)
    fun = Calls(fun)
    result = scipy_minimize(fun, START, method=method, jac=jac, **forms[how])
    assert result.success
    assert np.abs(result.x - 1).max() < 1e-3
    assert result.nfev == len(fun.points)
    assert (result.nhev > 0) == (how not in ("neither", "jac=True"))


@pytest.mark.parametrize("method", [*LINE_SEARCH, *NEWTON])
def test_result_has_scipys_fields(method: str) -> None:
    options: dict[str, Any] = dict(jac=rosen_der, method=method)
    if method != "L-BFGS-B":
        options["options"] = dict(return_all=True)
    if method in NEWTON:
        options["hess"] = rosen_hess
    result, reference = scipy_minimize(rosen, START, **options), scipy.optimize.minimize(rosen, START, **options)
    assert type(result) is OptimizeResult
    assert set(reference) - {"hess"} <= set(result) | {"hess_inv", "allvecs"}
    for name in set(reference) & set(result) - {"hess_inv"}:
        assert np.shape(result[name]) == np.shape(reference[name]) or name == "allvecs"
        assert isinstance(result[name], type(reference[name])) or name == "fun"
    assert (result.status, result.success) == (0, True)
    assert result.fun == rosen(result.x)
    assert np.array_equal(result.jac, rosen_der(result.x))


def test_inverse_hessian_is_scipys() -> None:
    inverse = np.linalg.inv(rosen_hess(np.ones(3)))
    dense = scipy_minimize(rosen, START, method="BFGS", jac=rosen_der).hess_inv
    assert np.allclose(dense, inverse, atol=0.02)
    operator = scipy_minimize(rosen, START, method="L-BFGS-B", jac=rosen_der, options=dict(maxcor=30)).hess_inv
    assert isinstance(operator, scipy.optimize.LbfgsInvHessProduct)
    bounded = scipy_minimize(rosen, START, jac=rosen_der, bounds=[(None, 3)] * 3, options=dict(maxcor=30)).hess_inv
    for found in (operator, bounded):
        matrix = found.todense()
        assert np.allclose(matrix, inverse, rtol=0.4, atol=0.1)
        assert np.all(np.linalg.eigvalsh(matrix) > 0)


@pytest.mark.parametrize("order", ["CompactInverse", "CompactHessian"])
def test_inverse_hessian_has_the_newest_pairs_last(order: str) -> None:
    bounds = None if order == "CompactInverse" else [(None, 9)] * 3
    points: list[Any] = []
    result = scipy_minimize(
        rosen, START, method="L-BFGS-B", jac=rosen_der, bounds=bounds, callback=points.append, options=dict(maxcor=4)
    )
    steps = result.hess_inv.sk
    assert steps.shape == (4, 3)
    last = points[-1] - points[-2]
    assert abs(last @ steps[-1]) == pytest.approx(np.linalg.norm(last) * np.linalg.norm(steps[-1]), rel=1e-6)


# The arguments.


@pytest.mark.parametrize("method", [None, *LINE_SEARCH, "l-bfgs-b", "bfgs", "cg"])
def test_names_of_methods_are_scipys(method: str | None) -> None:
    assert scipy_minimize(rosen_pair, START, method=method, jac=True).success


def test_method_is_scipys_choice() -> None:
    assert isinstance(scipy_minimize(rosen, START).hess_inv, np.ndarray)
    bounded = scipy_minimize(rosen, START, bounds=[(0, None)] * 3)
    assert isinstance(bounded.hess_inv, scipy.optimize.LbfgsInvHessProduct)


def test_args_go_to_every_function() -> None:
    def fun(x: np.ndarray, a: float, b: float) -> float:
        return float(a * x @ x + b * x.sum())

    def jac(x: np.ndarray, a: float, b: float) -> np.ndarray:
        return 2 * a * x + b

    def hess(x: np.ndarray, a: float, b: float) -> np.ndarray:
        return 2 * a * np.eye(len(x))

    def hessp(x: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
        return 2 * a * v

    for further in (dict(), dict(hess=hess), dict(hessp=hessp)):
        method = "Newton-CG" if further else None
        result = scipy_minimize(fun, [3.0, 4.0], (2.0, 1.0), method, jac, **further)
        assert result.x == pytest.approx(-0.25, abs=1e-5)
    assert scipy_minimize(lambda x, a: float((x - a) @ (x - a)), [3.0], 2.0).x == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("x0", [3, 3.0, [3], np.float32(3), np.array(3)])
def test_start_may_be_a_number(x0: Any) -> None:
    fun = Calls(lambda x: (x[0] - 1) ** 2)
    result = scipy_minimize(fun, x0)
    assert result.x.shape == (1,)
    assert result.x.dtype == np.float64
    assert result.x[0] == pytest.approx(1, abs=1e-5)
    assert {point.shape for point in fun.points} == {(1,)}


def test_start_may_have_any_shape() -> None:
    start = np.arange(6.0).reshape(2, 3)
    fun = Calls(lambda x: ((x - 1) ** 2).sum())
    result = scipy_minimize(fun, start, method="L-BFGS-B", bounds=Bounds(np.zeros((2, 3)), 3))
    assert result.x.shape == result.jac.shape == (2, 3)
    assert result.x == pytest.approx(1, abs=1e-5)
    assert {point.shape for point in fun.points} == {(2, 3)}
    assert np.array_equal(start, np.arange(6.0).reshape(2, 3))


def test_no_variables_are_solved_at_once() -> None:
    for method in LINE_SEARCH:
        result = scipy_minimize(lambda x: 7.0, np.zeros(0), method=method)
        assert (result.success, result.fun, result.nfev) == (True, 7.0, 1)


def test_functions_may_write_to_their_arguments() -> None:
    buffer = np.zeros(3)

    def fun(x: np.ndarray) -> float:
        value = rosen(x)
        x[:] = math.nan
        return value

    def jac(x: np.ndarray) -> np.ndarray:
        buffer[:] = rosen_der(x)
        x[:] = math.nan
        return buffer

    result = scipy_minimize(fun, START, jac=jac)
    reference = scipy_minimize(rosen, START, jac=rosen_der)
    assert np.array_equal(result.x, reference.x)


def test_bits_of_the_function_arrive() -> None:
    """The same steps as `minimize` takes on tensors, from the same bits."""

    def fun(x: Any) -> Any:
        return for_scipy(lambda y: (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum())(x)

    points: list[Any] = []
    result = scipy_minimize(fun, START, method="L-BFGS-B", jac=True, callback=points.append)
    scale = max(1.0, np.abs(fun(START)[1]).max())
    same = minimize(
        lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), torch.tensor(START), tol=1e-5 / scale
    )
    assert np.array_equal(result.x, same.x.numpy())
    assert (result.nit, result.nfev) == (same.n_iter, same.n_eval)


def test_functions_may_use_autograd() -> None:
    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(x, requires_grad=True)
        value = (leaf - 1).square().sum()
        value.backward()
        return value.item(), leaf.grad.numpy()

    assert scipy_minimize(fun, START, jac=True).success


@pytest.mark.parametrize("value", [np.float64(2), np.array(2.0), np.array([2.0]), 2, np.float32(2), True])
def test_value_may_be_any_number(value: Any) -> None:
    assert scipy_minimize(lambda x: value, [1.0], jac=lambda x: [0.0]).fun == value


# Bounds.


@pytest.mark.parametrize("jac", [rosen_der, None, "3-point"])
@pytest.mark.parametrize(
    "bounds",
    [
        [(None, 0.5), (-1, None), (0, 0.25)],
        np.array([(-np.inf, 0.5), (-1, np.inf), (0, 0.25)]),
        Bounds([-np.inf, -1, 0], [0.5, np.inf, 0.25]),
        Bounds(-2, 0.5),
        [(-3.0, -3.0), (1, 2), (None, None)],
        [(1e-12, 1e-12 + 1e-20)] * 3,
    ],
    ids=["pairs", "array", "Bounds", "numbers", "fixed", "narrow"],
)
def test_no_evaluation_leaves_the_bounds(bounds: Any, jac: Any) -> None:
    fun = Calls(rosen)
    result = scipy_minimize(fun, START, jac=jac, bounds=bounds)
    reference = scipy.optimize.minimize(rosen, START, jac=rosen_der, bounds=bounds, method="L-BFGS-B")
    if isinstance(bounds, Bounds):
        lower, upper = bounds.lb, bounds.ub
    else:
        lower = [-np.inf if low is None else low for low, _ in bounds]
        upper = [np.inf if high is None else high for _, high in bounds]
    assert result.success
    assert all(np.all((lower <= point) & (point <= upper)) for point in fun.points)
    assert result.nfev == len(fun.points)
    assert result.fun == pytest.approx(reference.fun, rel=1e-4, abs=1e-8)


# Limits and tolerances.


@pytest.mark.parametrize("jac", [rosen_der, None, "3-point"])
@pytest.mark.parametrize("maxfun", [10, 11, 40])
def test_maxfun_counts_differences_and_is_hard(jac: Any, maxfun: int) -> None:
    fun = Calls(rosen)
    result = scipy_minimize(fun, START, method="L-BFGS-B", jac=jac, options=dict(maxfun=maxfun))
    assert result.nfev == len(fun.points) <= maxfun
    assert (result.status, result.success) == (1, False)
    assert result.fun == min(map(rosen, fun.points[:: 1 if jac is rosen_der else 4 if jac is None else 7]))


def test_limits_may_be_infinite() -> None:
    assert scipy_minimize(rosen, START, method="L-BFGS-B", options=dict(maxfun=math.inf, maxiter=math.inf)).success


@pytest.mark.parametrize("method", [*LINE_SEARCH, *NEWTON])
@pytest.mark.parametrize("maxiter", [0, 1, 3])
def test_maxiter_is_hard(method: str, maxiter: int) -> None:
    result = scipy_minimize(rosen, START, method=method, jac=rosen_der, options=dict(maxiter=maxiter))
    assert (result.nit, result.status, result.success) == (maxiter, 1, False)


@pytest.mark.parametrize("method", LINE_SEARCH)
@pytest.mark.parametrize(
    "given", [dict(tol=1e-2), dict(options=dict(gtol=1e-2)), dict(tol=1e-9, options=dict(gtol=1e-2))]
)
def test_gtol_is_absolute(method: str, given: dict[str, Any]) -> None:
    """However large the gradient is at the start."""
    result = scipy_minimize(rosen, 100 * START, method=method, jac=rosen_der, **given)
    assert result.success
    assert np.abs(result.jac).max() <= 1e-2


@pytest.mark.parametrize("method", [*NEWTON[1:], "BFGS"])
def test_gtol_is_of_scipys_norm(method: str) -> None:
    start = np.linspace(-1, 1, 12)
    options = dict(gtol=0.5, **(dict(norm=2) if method == "BFGS" else {}))
    result = scipy_minimize(rosen, start, method=method, jac=rosen_der, options=options)
    assert result.success
    assert np.linalg.norm(result.jac) <= 0.5


def test_ftol_stops_only_where_it_is_given() -> None:
    values: list[float] = []

    def callback(intermediate_result: Any) -> None:
        values.append(intermediate_result.fun)

    given = scipy_minimize(
        rosen, START, method="L-BFGS-B", jac=rosen_der, callback=callback, options=dict(ftol=1e-3, gtol=0)
    )
    assert (given.status, given.success) == (0, True)
    assert "ftol" in given.message
    decreases = [(a - b) / max(a, b, 1) for a, b in zip([rosen(START), *values], values, strict=False)]
    assert [decrease <= 1e-3 for decrease in decreases] == [False] * (len(values) - 1) + [True]
    assert scipy_minimize(rosen, START, method="L-BFGS-B", jac=rosen_der).nit > given.nit


def test_rounding_is_success_for_lbfgsb_as_for_scipy() -> None:
    """Values of 1e12 have no digits for the last decreases, and the gradient has an error of 0.1."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        return 1e12 * (1 + rosen(x)), 1e12 * rosen_der(x) + 0.1 * np.sin(1e12 * x)

    result = scipy_minimize(fun, START, method="L-BFGS-B", jac=True)
    assert np.abs(result.jac).max() > 1e-5
    assert (result.success, result.status) == (True, 0)
    assert "lowered the function by less than ftol" in result.message
    honest = scipy_minimize(fun, START, method="BFGS", jac=True)
    assert (honest.success, honest.status) == (False, 2)


def test_differences_end_where_they_have_no_more_digits() -> None:
    """Powell's singular function: near its minimum the differences are too coarse for any tolerance."""

    def fun(x: np.ndarray) -> float:
        return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4

    result = scipy_minimize(fun, [3.0, -1.0, 0.0, 1.0], method="L-BFGS-B")
    assert np.abs(result.jac).max() > 1e-5
    assert result.success
    assert result.fun < 1e-9
    assert result.nfev < 400


def test_wrong_gradient_is_no_success() -> None:
    for method in LINE_SEARCH:
        result = scipy_minimize(rosen, START, method=method, jac=lambda x: -rosen_der(x))
        assert (result.success, result.status) == (False, 2)
        assert np.array_equal(result.x, START)


# Callbacks.


def test_callback_gets_copies_of_the_points() -> None:
    points: list[np.ndarray] = []

    def callback(x: np.ndarray) -> bool:
        points.append(x.copy())
        x[:] = math.nan
        return True  # which SciPy ignores

    result = scipy_minimize(rosen, START, jac=rosen_der, callback=callback, options=dict(return_all=True))
    assert result.success
    assert len(points) == result.nit
    assert np.array_equal(result.allvecs, [START, *points])


@pytest.mark.parametrize("method", [*LINE_SEARCH, *NEWTON])
def test_callback_stops_by_stop_iteration(method: str) -> None:
    seen: list[OptimizeResult] = []

    def callback(intermediate_result: OptimizeResult) -> None:
        seen.append(intermediate_result)
        if len(seen) == 3:
            raise StopIteration

    result = scipy_minimize(rosen, START, method=method, jac=rosen_der, callback=callback)
    assert (result.nit, result.status, result.success) == (3, 99, False)
    assert "StopIteration" in result.message
    assert seen[-1].fun == rosen(seen[-1].x) == result.fun


# Hostile functions.


def walled(x: np.ndarray, error: Any) -> float:
    if x.min() <= 0:
        if error is None:
            return math.nan
        raise error("outside")
    return float((x - 0.01 * np.log(x)).sum() + x @ x)


@pytest.mark.parametrize("error", [None, ValueError, np.linalg.LinAlgError])
def test_walls_are_not_crossed(error: Any) -> None:
    listed = dict(domain_errors=ValueError) if error is ValueError else {}
    for method in LINE_SEARCH:
        result = scipy_minimize(walled, [2.0, 3.0], args=(error,), method=method, **listed)
        assert result.success
        assert result.fun == pytest.approx(walled(np.full(2, (math.sqrt(1.08) - 1) / 4), None), rel=1e-6)
        if error is not None:
            with pytest.raises(error):
                scipy_minimize(walled, [-2.0, 3.0], args=(error,), method=method, **listed)
    if error is ValueError:
        with pytest.raises(ValueError, match="outside"):
            scipy_minimize(walled, [2.0, 3.0], args=(error,))


def test_nan_at_the_start_is_status_3() -> None:
    result = scipy_minimize(lambda x: math.nan, [1.0, 2.0])
    assert (result.status, result.success, result.nfev) == (3, False, 1)
    assert result.x.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("constraints", [(), [], None])
def test_no_constraints_have_scipys_three_forms(constraints: Any) -> None:
    assert scipy_minimize(rosen, [0.5, 0.5], constraints=constraints).success


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(method="Nelder-Mead"), ValueError, "method must be one of .* jac=None, which takes differences"),
        (dict(method=print), TypeError, "method must be a name"),
        (dict(method="BFGS", bounds=[(0, 1)] * 3), ValueError, "bounds are for method='L-BFGS-B'"),
        (dict(bounds=[(0, 1)] * 2), ValueError, "bounds must be 3 pairs"),
        (dict(bounds=[(0, 1, 2)] * 3), ValueError, "bounds must be 3 pairs"),
        (dict(bounds=[(1, 0)] * 3), ValueError, "lower <= upper"),
        (dict(bounds=Bounds([0, 0], 1)), ValueError, "the lower bound must be"),
        (dict(jac="cs"), TypeError, "jac must be a function, True, one of"),
        (dict(jac=1.0), TypeError, "jac must be"),
        (dict(hess=rosen_hess), ValueError, "hess is for Newton's methods"),
        (dict(hessp=rosen_hess_prod), ValueError, "hessp is for Newton's methods"),
        (dict(method="Newton-CG"), ValueError, "needs the gradient"),
        (dict(method="trust-exact", jac="2-point"), ValueError, "needs the gradient"),
        (dict(method="Newton-CG", jac=rosen_der, hess=scipy.optimize.BFGS()), TypeError, "hess must be a function"),
        (dict(callback=3), TypeError, "callback must be a function or None"),
        (dict(fun=None), TypeError, "fun must be a function, got None"),
        (dict(x0=["a"]), TypeError, "x0 must be an array of real numbers"),
        (dict(x0=[1j]), TypeError, "x0 must be an array of real numbers"),
        (dict(bounds=(0, 1)), ValueError, r"bounds must be 3 pairs .* got \(0, 1\)"),
        (dict(bounds=3), ValueError, "bounds must be 3 pairs .* got 3"),
        (dict(bounds=[("a", 1)] * 3), ValueError, "bounds must be 3 pairs"),
        (dict(tol=-1), ValueError, "tol must be a finite number >= 0"),
        (dict(tol="a"), ValueError, "tol must be a finite number >= 0"),
        (dict(options=dict(gtol="a")), ValueError, "option gtol must be a finite number >= 0"),
        (dict(options="a"), TypeError, "options must be a dict or None, got 'a'"),
        (dict(options=dict(eps="a")), ValueError, "option eps must be a number, or one for each of 3 variables"),
        (dict(options=dict(finite_diff_rel_step=[1e-8] * 2)), ValueError, "finite_diff_rel_step must be a number"),
        (dict(options=dict(maxiter=-1)), ValueError, "maxiter must be an integer >= 0"),
        (dict(options=dict(maxiter="a")), ValueError, "maxiter must be an integer >= 0"),
        (dict(method="L-BFGS-B", options=dict(maxfun=0)), ValueError, "maxfun must be an integer >= 1"),
        (dict(method="L-BFGS-B", options=dict(maxcor=math.inf)), ValueError, "maxcor must be an integer >= 1"),
        (dict(options=dict(norm=0)), ValueError, "norm must be a number >= 1"),
        (dict(domain_errors=KeyboardInterrupt), TypeError, "domain_errors must be"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_called(change: dict[str, Any], error: Any, text: str) -> None:
    def never(x: Any) -> Any:
        raise AssertionError("called")

    with pytest.raises(error, match=f"^scipy_minimize: .*{text}"):
        scipy_minimize(**{**dict(fun=never, x0=START), **change})


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(fun=lambda x: x), TypeError, r"one real number, got an array of shape \(3,\)"),
        (dict(fun=lambda x: None), TypeError, "one real number, got None"),
        (dict(fun=lambda x: 1j), TypeError, "one real number, got 1j"),
        (dict(jac=True), TypeError, r"must return \(value, gradient\)"),
        (dict(jac=lambda x: None), TypeError, "the gradient from jac must be an array of real numbers, got None"),
        (dict(jac=lambda x: 1j * x), TypeError, "the gradient from jac must be an array of real numbers"),
        (dict(jac=lambda x: x[:2]), ValueError, "the gradient from jac must have 3 entries, as x0, got 2"),
        (
            dict(method="trust-exact", jac=rosen_der, hess=lambda x: np.eye(2)),
            ValueError,
            r"shape \(3, 3\), got \(2, 2\)",
        ),
        (dict(method="Newton-CG", jac=rosen_der, hessp=lambda x, v: v[:1]), ValueError, "must have 3 entries"),
    ],
)
def test_what_functions_return_is_checked(change: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        scipy_minimize(**{**dict(fun=rosen, x0=START), **change})


def test_options_that_a_method_lacks_are_warned_of() -> None:
    with pytest.warns(OptimizeWarning, match=r"method='BFGS' does not have are ignored: maxcor, typo\. It has maxiter"):
        result = scipy_minimize(rosen, START, jac=rosen_der, options=dict(maxcor=3, typo=1, gtol=1e-3, maxiter=None))
    assert result.success


def test_disp_prints_why(capsys: pytest.CaptureFixture[str]) -> None:
    scipy_minimize(rosen, START, jac=rosen_der)
    assert capsys.readouterr().out == ""
    result = scipy_minimize(rosen, START, jac=rosen_der, options=dict(disp=True))
    printed = capsys.readouterr().out
    assert printed.startswith("Optimization terminated successfully")
    assert f"Function evaluations: {result.nfev}\n" in printed


def test_scipy_is_asked_for_by_name_where_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'descend\[scipy\]'"):
        scipy_minimize(rosen, START)
