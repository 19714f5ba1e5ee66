"""Constraints that cannot be met, are redundant, undefined or wrong; limits and callbacks."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from minimize_cases import bowl, logarithms, one_thread, rosenbrock, vector  # noqa: F401
from torch import Tensor, nn

from descend import Progress, Status, eq, ineq, minimize

EQUALITY = eq(lambda x: x.sum() - 1)
INFEASIBLE: dict[str, dict[str, Any]] = {
    "equality": dict(constraints=[eq(lambda x: x[0] ** 2 + 1)]),
    "inequalities": dict(constraints=[ineq(lambda x: x[0] - 1), ineq(lambda x: -x[0] - 1)]),
    "bounds": dict(constraints=[eq(lambda x: x.sum() - 3)], bounds=(0, 1)),
    "contradiction": dict(constraints=[eq(lambda x: x.sum() - 3), eq(lambda x: x.sum() - 4)]),
    "curved": dict(constraints=[ineq(lambda x: 1 - x.square().sum()), ineq(lambda x: x[0] + x[1] - 2)]),
}


@pytest.mark.parametrize("options", INFEASIBLE.values(), ids=INFEASIBLE)
def test_infeasible_problem_says_how_infeasible(options: dict[str, Any]) -> None:
    result = minimize(bowl, vector(0.3, 2.0), **options)
    assert result.status is Status.infeasible
    assert not result.success
    assert result.infeasibility > 0.1
    assert re.search(r"No evaluated point is feasible: constraints\[\d\] is violated by \d", result.message)
    assert result.n_eval < 1000


@pytest.mark.parametrize(
    ("fun", "x0", "constraints", "bounds", "best"),
    [
        (bowl, (3.0, -1.0), [EQUALITY, eq(lambda x: 2 * x.sum() - 2)], None, 0.5),
        (bowl, (3.0, -1.0), [ineq(lambda x: 1 - x.sum().expand(5))], None, 0.5),
        (bowl, (3.0, 0.5), [eq(lambda x: x[0] * x[1])], (0, None), 1.0),  # complementarity: no constraint qualification
        (bowl, (0.5, 0.4), [ineq(lambda x: -x[0] * x[1])], (0, None), 1.0),
        (bowl, (0.5, 0.4), [eq(lambda x: x[0] - 0.25)], (0.25, 0.25), 1.125),  # fixed variables
        (lambda x: x.sum(), (0.0, 0.0), [ineq(lambda x: 2 - x.square().sum())], None, -2.0),  # zero gradient at x0
        (lambda x: (x * 0).sum() + 7, (3.0, -1.0), [EQUALITY], None, 7.0),  # only feasibility
        (lambda x: -(x**2).sum(), (0.3, 0.2), [ineq(lambda x: 1 - x.square().sum())], None, -1.0),
        (lambda x: -(x**2).sum(), (0.3, 0.2), [ineq(lambda x: 1e6 * (1 - x.square().sum()))], None, -1.0),
        (lambda x: 1e8 * bowl(x), (3.0, 4.0), [EQUALITY], None, 0.5e8),
    ],
    ids=["twice", "five times", "mpcc", "mpcc-", "fixed", "flat", "constant", "concave", "scaled", "scaled f"],
)
def test_hard_problem_is_solved(fun: Any, x0: Any, constraints: Any, bounds: Any, best: float) -> None:
    result = minimize(fun, vector(*x0), bounds=bounds, constraints=constraints)
    assert result.success
    assert result.fun == pytest.approx(best, rel=1e-5)
    assert result.infeasibility <= 1e-6


def test_degenerate_equality_is_honest() -> None:
    # x^2 = 0: no multiplier exists unless fun's gradient is zero at 0.
    result = minimize(lambda x: x.sum(), vector(1.0), constraints=[eq(lambda x: x.square())])
    assert abs(result.x.item()) < 1e-2
    assert not result.success or result.infeasibility <= 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=str)
@pytest.mark.parametrize("where", ["fun", "constraint"])
def test_points_outside_the_domain_are_not_accepted(where: str, bad: float | None) -> None:
    def wall(x: Tensor) -> Tensor:
        if bool((x > 0).all()):
            return x.log().sum()
        if bad is None:
            raise torch.linalg.LinAlgError("outside")
        return torch.tensor(bad, dtype=x.dtype)

    options: dict[str, Any] = {
        "fun": dict(fun=lambda x: 4 * x.sum() - wall(x), constraints=[EQUALITY]),
        "constraint": dict(fun=lambda x: x.square().sum(), constraints=[ineq(lambda x: wall(x) + 2), EQUALITY]),
    }[where]
    result = minimize(x0=vector(2.0, 3.0), **options)
    assert result.success
    assert bool((result.x > 0).all())
    assert result.x.tolist() == pytest.approx([0.5, 0.5], abs=1e-4)


def test_nan_at_the_start_is_told() -> None:
    for fun, constraint in ((lambda x: x.log().sum(), EQUALITY), (bowl, eq(lambda x: x.log()))):
        result = minimize(fun, vector(-1.0, 1.0), constraints=[constraint])
        assert (result.status, result.n_eval) == (Status.non_finite, 1)
        assert torch.equal(result.x, vector(-1.0, 1.0))


def test_unbounded_is_no_success() -> None:
    result = minimize(lambda x: -x.sum(), vector(1.0, 2.0), constraints=[ineq(lambda x: x[0])], max_eval=3000)
    assert result.status is Status.unbounded
    assert math.isfinite(result.fun)
    assert result.infeasibility == 0


def test_small_penalty_that_is_unbounded_is_raised() -> None:
    # The first augmented Lagrangians fall without end along x = y.
    fun = lambda x: -(x**2).sum() * 1e3  # noqa: E731
    result = minimize(fun, vector(0.1, 0.2), constraints=[eq(lambda x: x - vector(1.0, 2.0))])
    assert result.success
    assert result.x.tolist() == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize("place", ["module", "tensor"])
def test_limits_are_exact(place: str) -> None:
    for limit in (*range(1, 8), 11, 20):
        calls = [0, 0]

        def fun(x: Any, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return rosenbrock(x)

        def constraint(x: Any, calls: list[int] = calls) -> Tensor:
            calls[1] += 1
            return 2 - x.square().sum()

        x0 = nn.Parameter(vector(-1.2, 1.0)) if place == "module" else vector(-1.2, 1.0)
        constraints = [ineq(constraint), eq(lambda x: x.sum() - 1)]
        result = minimize(fun, x0, constraints=constraints, max_eval=limit)
        assert calls == [result.n_eval, result.n_eval]
        assert result.n_eval <= limit
        assert result.success or result.status is Status.max_eval
        assert result.fun == rosenbrock(result.x).item()


def test_iterations_are_limited_and_shown() -> None:
    for limit in (0, 1, 3, 6, 9, 30):
        shown: list[Progress] = []
        result = minimize(
            rosenbrock,
            vector(-1.2, 1.0),
            constraints=[EQUALITY],
            max_iter=limit,
            callback=lambda p, s=shown: s.append(p),
        )
        assert result.n_iter <= limit
        assert [progress.n_iter for progress in shown] == list(range(1, result.n_iter + 1))
        assert len(result.history) == result.n_iter + 1
        assert all(progress.fun == rosenbrock(progress.x).item() for progress in shown)
        assert result.success or result.status is Status.max_iter


@pytest.mark.parametrize("last", [1, 2, 5, 8, 9, 10])
def test_callback_stops(last: int) -> None:
    result = minimize(rosenbrock, vector(-1.2, 1.0), constraints=[EQUALITY], callback=lambda p: p.n_iter == last)
    assert result.n_iter == last
    assert result.status in (Status.stopped_by_callback, Status.converged)


def test_best_point_is_feasible_and_lowest() -> None:
    points: list[Tensor] = []

    def fun(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        return rosenbrock(x)

    for limit in (3, 6, 10, 15):
        points.clear()
        result = minimize(fun, vector(-1.2, 1.0), constraints=[ineq(lambda x: 1.5 - x.square().sum())], max_eval=limit)
        feasible = [x for x in points if float(1.5 - x.square().sum()) >= -1e-6]
        if feasible:
            lowest = min(rosenbrock(x).item() for x in feasible)
            assert result.fun <= lowest + 1e-6 or result.success
            assert float(1.5 - result.x.square().sum()) >= -1e-5
        else:
            least = min(-float(1.5 - x.square().sum()) for x in points)
            assert float(result.x.square().sum() - 1.5) == pytest.approx(least)


def test_bounds_are_never_violated() -> None:
    def fun(x: Tensor) -> Tensor:
        assert bool(((x >= 0.1) & (x <= 0.7)).all())
        return logarithms(x) + rosenbrock(x)

    constraints = [eq(lambda x: x.sum() - 1), ineq(lambda x: x[0] - x[1])]
    result = minimize(fun, vector(5.0, -3.0, 0.2), bounds=(0.1, 0.7), constraints=constraints)
    assert result.success


@pytest.mark.parametrize("is_parameter", [False, True])
def test_errors_of_a_constraint_come_through(is_parameter: bool) -> None:
    calls = []

    def constraint(x: Tensor) -> Tensor:
        calls.append(x.detach().clone())
        if len(calls) == 4:
            raise KeyError("mine")
        return x.sum() - 1

    x0 = nn.Parameter(vector(-1.2, 1.0)) if is_parameter else vector(-1.2, 1.0)
    with pytest.raises(KeyError, match="mine"):
        minimize(rosenbrock, x0, constraints=[eq(constraint)])
    if is_parameter:
        violations = [abs(float(x.sum() - 1)) for x in calls[:3]]
        assert abs(float(x0.detach().sum() - 1)) == min(violations)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(constraints=[lambda x: x]), TypeError, "must be a list of eq"),
        (dict(constraints=7), TypeError, "must be a list of eq"),
        (dict(constraints=[dict(type="eq", fun=bowl)]), TypeError, "must be a list of eq"),
        (dict(constraints=[EQUALITY], jac=lambda x: 2 * x), ValueError, "jac is for problems without constraints"),
        (
            dict(constraints=[EQUALITY], method="newton", hvp=lambda x, v: 2 * v),
            ValueError,
            "hvp is for",
        ),
        (dict(constraints=[EQUALITY], batched="best"), ValueError, "batched is for"),
        (dict(constraints=[EQUALITY], method="bfgs", bounds=(0, 1)), ValueError, "bounds is for"),
        (dict(constraints=[EQUALITY, eq(lambda x: 1.0)]), TypeError, r"constraints\[1\] must return a tensor"),
        (dict(constraints=[eq(lambda x: x > 0)]), ValueError, r"constraints\[0\] must return a real floating"),
        (dict(constraints=[eq(lambda x: x * 1j)]), ValueError, r"constraints\[0\] must return a real floating"),
        (dict(constraints=[eq(lambda x: x.detach())]), RuntimeError, r"constraints\[0\].*does not depend.*detach"),
        (dict(constraints=[eq(lambda x: torch.ones(2))]), RuntimeError, r"constraints\[0\].*does not depend"),
    ],
)
def test_wrong_constraints_are_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        minimize(bowl, vector(3.0, -1.0), **options)


def test_constraint_is_a_function() -> None:
    for make in (eq, ineq):
        with pytest.raises(TypeError, match=rf"{make.__name__}: the constraint must be a function"):
            make(3.0)  # type: ignore[arg-type]


def test_shapes_that_change_are_an_error() -> None:
    calls = []

    def constraint(x: Tensor) -> Tensor:
        calls.append(x)
        return x[: 1 + len(calls) % 2]

    with pytest.raises(ValueError, match="constraints must keep their shapes"):
        minimize(bowl, vector(3.0, -1.0), constraints=[eq(constraint)])


def test_callback_that_writes_to_parameters_changes_nothing() -> None:
    def spoil(progress: Progress) -> None:
        if isinstance(progress.x, nn.Parameter):
            progress.x.data.add_(10.0)

    plain = minimize(rosenbrock, nn.Parameter(vector(-1.2, 1.0)), constraints=[EQUALITY])
    spoilt = minimize(rosenbrock, nn.Parameter(vector(-1.2, 1.0)), constraints=[EQUALITY], callback=spoil)
    assert torch.equal(plain.x, spoilt.x)


def test_operation_without_second_derivative_is_no_obstacle() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    result = minimize(lambda x: Square.apply(x - 1).sum(), vector(3.0, -1.0), constraints=[EQUALITY])
    assert result.success
    assert result.x.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
