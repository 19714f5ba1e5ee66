"""`minimize(..., constraints=..., differentiable=True)`: derivatives of constrained solutions, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from minimize_cases import one_thread, rosenbrock, vector  # noqa: F401
from torch import Tensor, nn
from torch.autograd import forward_ad

from descend import eq, ineq, minimize
from descend.second_order.solvers import constrained_implicit_function

# torch imports what is deprecated when forward-mode differentiation begins.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TIGHT = 1e-12  # differences amplify an error of the solution


def parameter(*numbers: float) -> Tensor:
    return vector(*numbers).requires_grad_()


def scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(fun: Callable[..., Tensor], x0: Any, constraints: Any, **options: Any) -> Any:
    result = minimize(fun, x0, constraints=constraints, differentiable=True, **{"tol": TIGHT, **options})
    assert result.success
    return result.x


@pytest.fixture(params=["dense", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Hessian factorized, or multiplied by."""
    if request.param == "products":
        monkeypatch.setattr(constrained_implicit_function, "MAX_DENSE", -1)
    return str(request.param)


def assert_derivatives_match_differences(solve: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    """Backward and forward derivatives along one random direction, against a central difference."""
    directions = [torch.randn(arg.shape, generator=torch.Generator().manual_seed(7), dtype=arg.dtype) for arg in args]
    step = 1e-5
    with torch.no_grad():
        ends = [solve(*(a + sign * step * d for a, d in zip(args, directions, strict=True))) for sign in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * step)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(arg.detach(), d) for arg, d in zip(args, directions, strict=True)]
        tangent = forward_ad.unpack_dual(solve(*duals)).tangent
    assert torch.allclose(tangent, difference, atol=1e-7)
    x = solve(*args)
    for unit in torch.eye(len(x), dtype=x.dtype):
        gradients = torch.autograd.grad(x, args, unit, retain_graph=True, materialize_grads=True)
        along = sum((g.conj() * d).real.sum() for g, d in zip(gradients, directions, strict=True))
        assert torch.allclose(along, unit @ difference, atol=1e-7)


# Right derivatives.


def projected_on_plane(point: Tensor, normal: Tensor, level: Tensor) -> Tensor:
    return solved(lambda x: (x - point).square().sum(), torch.zeros_like(point), eq(lambda x: normal @ x - level))


def projected_on_ball(point: Tensor, radius: Tensor) -> Tensor:
    ball = ineq(lambda x: radius.square() - x.square().sum())
    return solved(lambda x: (x - point).square().sum(), torch.zeros_like(point), ball)


def projected_on_simplex(point: Tensor, total: Tensor) -> Tensor:
    def fun(x: Tensor) -> Tensor:
        return (x - point).square().sum()

    return solved(fun, torch.zeros_like(point), eq(lambda x: x.sum() - total), bounds=(0, None))


def soft_assignment(costs: Tensor, temperature: Tensor) -> Tensor:
    def fun(x: Tensor, costs: Tensor) -> Tensor:
        return costs @ x + temperature * torch.special.entr(x).neg().sum()

    x0 = torch.full_like(costs, 1 / len(costs))
    return solved(fun, x0, eq(lambda x: x.sum() - 1), args=(costs,), bounds=(1e-9, None))


def plane_formula(point: Tensor, normal: Tensor, level: Tensor) -> Tensor:
    return point - (normal @ point - level) / normal.square().sum() * normal


def simplex_formula(point: Tensor, total: Tensor) -> Tensor:
    descending = point.sort(descending=True).values
    shifts = (descending.cumsum(0) - total) / torch.arange(1, len(point) + 1)
    return (point - shifts[int((descending > shifts).sum()) - 1]).clamp(min=0)


CLOSED_FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "plane": (projected_on_plane, plane_formula, (vector(1, 2, 3), vector(0.5, 0.2, 0.7), vector(0.3)[0])),
    "ball": (projected_on_ball, lambda p, r: p * r / p.norm(), (vector(1, 2, 3), vector(0.5)[0])),
    "inside the ball": (projected_on_ball, lambda p, r: p + 0 * r, (vector(0.1, 0.2), vector(0.5)[0])),
    "simplex": (projected_on_simplex, simplex_formula, (vector(1, 0.2, -3, 0.7, 0.6), vector(1.0)[0])),
    "softmax": (soft_assignment, lambda c, t: torch.softmax(-c / t, 0), (vector(1, 0.2, -0.3, 0.7), vector(0.5)[0])),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_derivatives_match_closed_forms(name: str, way: str) -> None:
    solve, formula, args = CLOSED_FORMS[name]
    args = tuple(arg.clone().requires_grad_() for arg in args)
    assert torch.allclose(solve(*args), formula(*args), atol=1e-8)
    weights = matrix(1, len(args[0]), seed=3)[0]
    found, expected = (torch.autograd.grad(function(*args) @ weights, args) for function in (solve, formula))
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(found, expected, strict=True))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(arg.detach(), torch.ones_like(arg)) for arg in args]
        tangents = [forward_ad.unpack_dual(function(*duals)).tangent for function in (solve, formula)]
    assert torch.allclose(*tangents, atol=1e-7)


def quadratic_program(factor: Tensor, linear: Tensor, rows: Tensor, levels: Tensor, limits: Tensor) -> Tensor:
    def fun(x: Tensor) -> Tensor:
        return (factor @ x).square().sum() / 2 + linear @ x

    constraints = [eq(lambda x: rows[:2] @ x - levels), ineq(lambda x: limits - rows[2:] @ x)]
    return solved(fun, torch.zeros(6, dtype=torch.float64), constraints)


def test_quadratic_program_has_the_derivatives_of_its_conditions() -> None:
    args = matrix(8, 6), matrix(1, 6, 1)[0], matrix(6, 6, 2), vector(0.3, -0.2), vector(-0.5, -0.3, 5, 6)
    args = tuple(arg.requires_grad_() for arg in args)
    x = quadratic_program(*args)
    factor, linear, rows, levels, limits = args
    active = torch.cat((torch.ones(2, dtype=torch.bool), limits - rows[2:] @ x < 1e-9))
    assert 2 < int(active.sum()) < 6
    held, right = rows[active], torch.cat((levels, limits))[active]
    n_held = len(held)
    system = torch.cat(
        (torch.cat((factor.T @ factor, held.T), 1), torch.cat((held, held.new_zeros(n_held, n_held)), 1))
    )
    expected = torch.linalg.solve(system, torch.cat((-linear, right)))[:6]
    assert torch.allclose(x, expected, atol=1e-9)
    weights = matrix(1, 6, 5)[0]
    pairs = zip(torch.autograd.grad(x @ weights, args), torch.autograd.grad(expected @ weights, args), strict=True)
    assert all(torch.allclose(found, right, atol=1e-7) for found, right in pairs)


def curved(way_of: str) -> Callable[..., Tensor]:
    """A problem with nonlinear equalities and inequalities, bounds, and parameters everywhere."""

    def solve(center: Tensor, radius: Tensor, power: Tensor, lower: Tensor) -> Tensor:
        def fun(x: Tensor, center: Tensor) -> Tensor:
            return (x - center).pow(4).sum() + (x[0] * x[1] - power).square() + x.square().sum() / 2

        constraints = [
            eq(lambda x: x[:2].square().sum() - radius.square()),
            ineq(lambda x: torch.stack((power - x[2:].exp().sum(), x[0] + 7))),
        ]
        x0 = vector(1.0, 0.5, 0.0, 0.0, 0.3)
        bounds = (lower, 3.0) if way_of == "bounds" else None
        return solved(fun, x0, constraints, args=(center,), bounds=bounds)

    return solve


@pytest.mark.parametrize("way_of", ["free", "bounds"])
def test_derivatives_match_differences(way_of: str, way: str) -> None:
    args = parameter(1.0, 2.0, 0.5, 0.3, -0.8), scalar(1.1), scalar(3.2), parameter(-5.0, -5.0, -5.0, -5.0, 0.1)
    if way_of == "bounds":
        x = curved(way_of)(*args)
        assert (x == args[3]).tolist() == [False] * 4 + [True]
    assert_derivatives_match_differences(curved(way_of), args)


def test_parameter_may_be_in_one_constraint_only(way: str) -> None:
    level = scalar(0.7)
    x = solved(lambda x: x.square().sum(), vector(1.0, 2.0), [ineq(lambda x: x.sum() - level), ineq(lambda x: x + 9)])
    x[0].backward()
    assert level.grad == pytest.approx(0.5)


def test_linear_functions_and_vertices_have_derivatives(way: str) -> None:
    # A linear program: the Hessian is zero, and constraints hold every direction.
    costs, limits = parameter(-1.0, -2.0), parameter(4.0, 3.0)
    rows = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    x = solved(lambda x: costs @ x, vector(0.0, 0.0), ineq(lambda x: limits - rows @ x), bounds=(0, None), tol=1e-9)
    assert torch.allclose(x, torch.linalg.solve(rows, limits))
    gradients = torch.autograd.grad(x[0], (costs, limits))
    assert torch.allclose(gradients[0], torch.zeros_like(costs))
    assert torch.allclose(gradients[1], torch.linalg.inv(rows)[0])


def test_structures_of_several_dtypes_get_derivatives() -> None:
    data = {"center": parameter(1.0, 2.0), "turn": torch.tensor([0.5 + 1j], dtype=torch.complex128, requires_grad=True)}

    def solve(center: Tensor, turn: Tensor) -> Tensor:
        def fun(x: Any, data: dict[str, Tensor]) -> Tensor:
            near = (x["a"] - data["center"]).pow(4).sum() + x["a"].square().sum()
            return near + (x["b"] - turn).abs().square().sum()

        constraints = [
            eq(lambda x: x["a"].sum() + x["b"].real.sum() - 1),
            ineq(lambda x: turn.imag / 2 - x["b"].imag),
        ]
        x0 = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.complex128)}
        x = solved(fun, x0, constraints, args=({"center": center},))
        return torch.cat((x["a"], torch.view_as_real(x["b"]).flatten()))

    assert_derivatives_match_differences(solve, (data["center"], data["turn"]))


def test_float32_agrees_with_float64() -> None:
    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        point, normal = (matrix(2, 5).to(dtype)[i].clone().requires_grad_() for i in (0, 1))
        wide = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)  # a double among the arguments
        x = solved(
            lambda x, wide: (x - point).square().sum() + (wide * x).pow(4).sum(),
            torch.zeros(5, dtype=dtype),
            [eq(lambda x: normal @ x - 1), ineq(lambda x: 0.5 - x)],
            args=(wide,),
            tol=1e-4 if dtype == torch.float32 else TIGHT,
        )
        assert x.dtype == dtype
        return torch.autograd.grad(x.square().sum(), (point, normal, wide))

    for narrow, wide in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert torch.allclose(narrow.double(), wide, rtol=1e-2, atol=2e-3)


def test_large_problem_takes_vectors_only() -> None:
    n = 3000
    target = torch.linspace(-1, 1, n, dtype=torch.float64, requires_grad=True)
    level = scalar(0.3)
    x = solved(
        lambda x: (x - target).square().sum(),
        torch.zeros(n, dtype=torch.float64),
        [eq(lambda x: x.mean() - level), ineq(lambda x: x[: n // 3].mean() - 0.2)],
        tol=1e-8,
    )
    slope, by_level = torch.autograd.grad(x[0], (target, level))
    expected = -torch.eye(n, dtype=torch.float64)[0].neg() - torch.where(torch.arange(n) < n // 3, 3 / n, 0.0)
    assert torch.allclose(slope, expected, atol=1e-6)
    assert by_level.item() == pytest.approx(0, abs=1e-6)


def test_solution_is_the_one_without_derivatives() -> None:
    calls = []
    center = parameter(2.0, 1.0)

    def fun(x: Tensor) -> Tensor:
        calls.append(x)
        return (x - center).pow(4).sum()

    constraints = [eq(lambda x: x.square().sum() - 1)]
    plain = minimize(fun, vector(0.5, 0.5), constraints=constraints)
    n_plain = len(calls)
    result = minimize(fun, vector(0.5, 0.5), constraints=constraints, differentiable=True)
    assert torch.equal(plain.x, result.x)
    assert result.n_eval == len(calls) - n_plain <= plain.n_eval + 1
    assert result.x.requires_grad
    assert not any(tensor.requires_grad for tensor in (plain.x, plain.grad, result.grad, *result.multipliers))
    constant = minimize(rosenbrock, vector(0.5, 0.5), constraints=constraints, differentiable=True)
    assert not constant.x.requires_grad
    with torch.no_grad():
        assert not minimize(fun, vector(0.5, 0.5), constraints=constraints, differentiable=True).x.requires_grad


def test_default_tolerance_gives_about_six_digits() -> None:
    args = parameter(1.0, 2.0, 0.5, 0.3, -0.8), scalar(1.1), scalar(3.2), parameter(-5.0, -5.0, -5.0, -5.0, 0.1)
    (exact,) = torch.autograd.grad(curved("free")(*args).sum(), args[:1])
    x = minimize(
        lambda x: (x - args[0]).pow(4).sum() + (x[0] * x[1] - 3.2).square() + x.square().sum() / 2,
        vector(1.0, 0.5, 0.0, 0.0, 0.3),
        constraints=[eq(lambda x: x[:2].square().sum() - 1.21), ineq(lambda x: 3.2 - x[2:].exp().sum())],
        differentiable=True,
    ).x
    (found,) = torch.autograd.grad(x.sum(), args[:1])
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-5)


# Errors instead of wrong derivatives.


def refuses(x: Tensor, message: str) -> None:
    assert x.requires_grad
    with pytest.raises(RuntimeError, match=f"minimize: the solution cannot be differentiated: .*{message}"):
        x.sum().backward()


def square_of(center: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x - center).square().sum()


@pytest.mark.parametrize("limit", [{"max_iter": 1}, {"max_eval": 3}, {"callback": lambda progress: True}])
def test_unfinished_solutions_are_refused(limit: dict[str, Any]) -> None:
    center, calls = parameter(2.0, 1.0), []

    def fun(x: Tensor) -> Tensor:
        calls.append(x)
        return (x - center).pow(4).sum()

    constraints = [eq(lambda x: x.square().sum() - 1)]
    result = minimize(fun, vector(0.5, 0.5), constraints=constraints, differentiable=True, **limit)
    assert not result.success
    assert result.n_eval == len(calls) <= limit.get("max_eval", 100)
    refuses(result.x, f"status '{result.status}'.*result.success")


def test_infeasible_problems_are_refused() -> None:
    center = parameter(2.0, 1.0)
    result = minimize(
        square_of(center), vector(0.0, 0.0), constraints=eq(lambda x: x.sum() - 5), bounds=(0, 1), differentiable=True
    )
    refuses(result.x, "status 'infeasible'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_solutions_that_are_not_finite_are_refused(value: float) -> None:
    center = parameter(1.0)
    result = minimize(
        lambda x: square_of(center)(x) + value, vector(0.0), constraints=eq(lambda x: x - 1), differentiable=True
    )
    refuses(result.x, "status 'non_finite'")


@pytest.mark.parametrize("shift", [0.0, 1e-15, -1e-15])
@pytest.mark.parametrize("tol", [1e-6, TIGHT])
def test_constraints_that_begin_to_hold_are_refused(shift: float, tol: float, way: str) -> None:
    center = parameter(0.5 + shift, 0.5)  # on the boundary
    constraints = [ineq(lambda x: x + 9), ineq(lambda x: torch.stack((x.sum() + 9, 1 - x.sum())))]
    x = solved(lambda x: square_of(center)(x) + (x - center).pow(4).sum(), vector(3.0, 1.0), constraints, tol=tol)
    refuses(x, r"entry 1 of constraints\[1\] begins to hold x here: .*kink")


def test_bounds_that_begin_to_hold_are_refused() -> None:
    center = parameter(0.0, 1.0)
    x = solved(square_of(center), vector(3.0, 1.0), eq(lambda x: x.sum() - 1), bounds=(0, None))
    refuses(x, "position 0 .* kink")


REDUNDANT: dict[str, tuple[Any, str]] = {
    "twice": ([eq(lambda x: x.sum() - 1), eq(lambda x: 3 * x.sum() - 3)], r"constraints\[0\] and constraints\[1\]"),
    "equality as two inequalities": (
        [ineq(lambda x: x.sum() - 1), ineq(lambda x: 1 - x.sum())],
        "begins to hold x|linearly dependent",
    ),
    "more than variables": ([eq(lambda x: torch.cat((x, x.sum(0, True))) - vector(0.5, 0.5, 1.0))], "dependent: entry"),
    "zero gradient": ([eq(lambda x: x[0] ** 2 * 0), eq(lambda x: x.sum() - 1)], r"dependent: constraints\[0\] in"),
}


@pytest.mark.parametrize("name", REDUNDANT)
def test_dependent_constraints_are_refused(name: str, way: str) -> None:
    constraints, words = REDUNDANT[name]
    center = parameter(2.0, 1.0)
    x = solved(square_of(center), vector(0.3, 0.1), constraints, tol=1e-6)
    refuses(x, words)


def test_constraints_that_touch_are_refused() -> None:
    # At 0 the parabola and the line below it have the same gradient: multipliers are not unique.
    shift = scalar(0.0)
    for start in (vector(0.3, 0.4), vector(-1.0, 0.0), vector(0.0, 0.0)):
        x = solved(
            lambda x: x[1] + (x[0] - shift).square(),
            start,
            [ineq(lambda x: x[1]), ineq(lambda x: x[1] - x[0].square())],
            tol=1e-6,
        )
        refuses(x, "dependent|begins to hold")


def test_bounds_and_constraints_that_hold_the_same_are_refused() -> None:
    center = parameter(-1.0, 0.5)
    x = solved(square_of(center), vector(0.3, 0.1), eq(lambda x: x[0]), bounds=(0, None))
    refuses(x, r"dependent: constraints\[0\] in the variables that no bound holds|position 0 .* kink")


FLAT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Any]] = {
    "circle": (lambda x, p: p * x.square().sum(), eq(lambda x: x.square().sum() - 2)),
    "valley": (lambda x, p: p * (x[0] - x[1]).square(), eq(lambda x: x[2])),
    "cancelling": (lambda x, p: p * (x[0] - x[1]).square() + x[2] ** 2, eq(lambda x: x[2] - 1)),
    "saddle": (lambda x, p: p * x[0] ** 2 - x[1] ** 2, eq(lambda x: x[2])),
    "quartic": (lambda x, p: (x[0] - p) ** 4 + x[1] ** 2 + 0.1 * x[0] * x[2], eq(lambda x: x[2])),
}


@pytest.mark.parametrize("tol", [1e-6, TIGHT])
@pytest.mark.parametrize("name", FLAT)
def test_minima_that_are_not_isolated_are_refused(name: str, tol: float) -> None:
    fun, constraint = FLAT[name]
    start = vector(0.0, 0.0, 0.3) if name == "saddle" else vector(0.7, 0.9, 0.3)
    p = scalar(1.3)
    result = minimize(fun, start, args=(p,), constraints=constraint, tol=tol, differentiable=True)
    if result.success:
        refuses(result.x, "Hessian of the Lagrangian, along what holds x, is singular or not positive definite")
    else:
        refuses(result.x, "status")


def test_second_derivatives_are_refused() -> None:
    center = parameter(2.0, 1.0)
    x = solved(square_of(center), vector(0.5, 0.5), eq(lambda x: x.square().sum() - 1))
    (gradient,) = torch.autograd.grad(x.square()[0], center, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_functions_without_second_derivatives_are_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("no second derivative")

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return Once.apply(2 * ctx.saved_tensors[0] * grad)

    center = parameter(1.0)
    x = solved(lambda x: Square.apply(x - center).sum(), vector(0.0, 1.0), eq(lambda x: x.sum() - 1), tol=1e-6)
    refuses(x, "fun or a constraint cannot be differentiated twice")


def test_parameters_in_place_are_refused() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="differentiable=True needs plain tensors"):
        minimize(lambda m: m.weight.sum(), module, constraints=eq(lambda m: m.bias), differentiable=True)
