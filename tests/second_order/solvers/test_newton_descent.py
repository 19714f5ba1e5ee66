"""The loop of Newton's methods: units, saddles, short steps, non-finite Hessians, memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from descend import Newton, Result, Status, minimize
from descend.second_order.mathematics.quartic import first_minimum
from descend.second_order.problem.objective import FunctionObjective
from descend.second_order.problem.structure import Structure
from descend.second_order.solvers import newton_descent
from descend.second_order.solvers.newton_descent import PAIRS, DenseNewton
from descend.second_order.solvers.run import Run

METHODS = pytest.mark.parametrize("method", ["newton", "newton-cg"])


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def saddle(x: Tensor) -> Tensor:
    """Stationary at 0, with minima of -1/4 at x[1] = +-sqrt(1/2)."""
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


# The quartic.


@settings(deadline=None, derandomize=True)
@given(st.floats(0.1, 20), st.floats(0.1, 5), st.floats(0.05, 5), st.floats(-200, 200))
def test_quartic_is_found_again(minimum: float, width: float, depth: float, power: float) -> None:
    # Its derivative has a single real root.
    slopes = 10.0 ** (power / 10) * np.polymul([1.0, -minimum], [depth, -2 * depth * width, depth * (width**2 + 1)])
    values = np.polyint(slopes)
    fall = float(np.polyval(values, 0) - np.polyval(values, 1))
    found = first_minimum(fall, slopes[-1], slopes[-2], float(np.polyval(slopes, 1)))
    assert found is not None
    # Beyond the step the quartic is extrapolated, and rounding with it.
    assert found[0] == pytest.approx(minimum, rel=1e-6)
    assert found[1] == pytest.approx(float(-np.polyval(values, minimum)), rel=1e-6)


@pytest.mark.parametrize(
    "numbers",
    [
        (1.0, -1.0, 0.0, -1.0),
        (math.nan, -1.0, 1.0, 1.0),
        (-math.inf, -1.0, 1.0, math.inf),
        (1.0, 0.0, 1.0, 1.0),
        (1e300, -1e-300, 1.0, 1.0),
    ],
)
def test_line_without_minimum_has_none(numbers: tuple[float, float, float, float]) -> None:
    assert first_minimum(*numbers) is None


# Steps.


@METHODS
@pytest.mark.parametrize("power", [4, 6])
def test_step_is_extended_to_a_minimum_without_curvature(method: str, power: int) -> None:
    # Plain Newton takes 28 and 42 steps here, each a third or a fifth of the way.
    result = minimize(lambda x: ((x - 1) ** power).sum(), vector(30.0, -5.0, 3.0), method, tol=1e-12)
    assert result.success
    assert result.n_iter <= 20


def test_units_of_the_variables_do_not_matter() -> None:
    ways = []
    for exponents in ((0, 0, 0), (-20, 13, 27)):
        units = torch.ldexp(torch.ones(3, dtype=torch.float64), torch.tensor(exponents))
        x0 = vector(-1.2, 1.0, 0.3) * units
        result = minimize(lambda x, units=units: rosenbrock(x / units), x0, "newton", tol=0, max_iter=12)
        ways.append([entry.fun for entry in result.history])
    assert ways[1] == pytest.approx(ways[0], rel=1e-3)
    assert ways[0][-1] < 0.1


@METHODS
def test_variables_that_grow_apart_are_followed(method: str) -> None:
    """The far end of Andrei's "cosine" takes steps of lengths that differ by orders of magnitude."""
    result = minimize(lambda x: torch.cos(x[:-1] ** 2 - x[1:] / 2).sum(), torch.ones(10).double(), method, max_eval=500)
    assert result.success


# Saddles.


@METHODS
@pytest.mark.parametrize(("scale", "tol"), [(1e-4, 1e-4), (1.0, 1e-6), (1e3, 1e-12)])
def test_saddle_itself_is_left(method: str, scale: float, tol: float) -> None:
    result = minimize(lambda x: saddle(x / scale), vector(0.0, 0.0), method, tol=tol)
    assert result.success
    assert result.fun == pytest.approx(-0.25)
    assert result.n_negative_curvature > 0


@METHODS
def test_high_dimensional_saddle_is_left(method: str) -> None:
    signs = torch.ones(60, dtype=torch.float64)
    signs[41] = -1.0
    result = minimize(lambda x: (signs * x**2).sum() + (x**4).sum(), torch.zeros(60).double(), method)
    assert result.success
    assert result.fun == pytest.approx(-0.25)


@METHODS
def test_maximum_is_left_and_limits_hold(method: str) -> None:
    for max_eval in (1, 2, 3, 5):
        result = minimize(lambda x: torch.cos(x).sum(), torch.zeros(3).double(), method, max_eval=max_eval)
        assert result.n_eval <= max_eval
        assert result.grad_norm <= 1e-6 if result.success else result.status is Status.max_eval
    assert minimize(lambda x: torch.cos(x).sum(), torch.zeros(3).double(), method).fun == pytest.approx(-3)


@METHODS
@pytest.mark.parametrize(("curvature", "is_kept"), [(1e-9, True), (1e-3, False)])
def test_saddle_is_kept_if_leaving_it_gains_too_little(method: str, curvature: float, is_kept: bool) -> None:
    result = minimize(
        lambda x: x[0] ** 2 - curvature * (x[1] ** 2 - x[1] ** 4), vector(0.0, 0.0), method, tol=1e-6, max_iter=50
    )
    assert result.success
    assert (result.n_iter == 0) == is_kept
    assert result.fun == pytest.approx(0.0 if is_kept else -curvature / 4, rel=0.01)


# NaN and infinity.


@METHODS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hessian_that_is_not_finite_is_done_without(method: str, bad: float) -> None:
    def hvp(x: Tensor, v: Tensor) -> Tensor:
        product = 2 * v.clone()
        product[0] = bad
        return product

    result = minimize(lambda x: (x - vector(1.0, 2.0)).square().sum(), vector(4.0, 4.0), method, hvp=hvp)
    assert result.status in (Status.converged, Status.precision_limit)
    assert result.fun < 1e-6


@METHODS
def test_start_without_finite_neighbours_is_non_finite(method: str) -> None:
    def fun(x: Tensor) -> Tensor:
        value = x.sum()
        return value if bool((x == 1).all()) else value * math.nan

    result = minimize(fun, torch.ones(2).double(), method)
    assert result.status is Status.non_finite
    assert result.x.tolist() == [1, 1]


@METHODS
def test_unbounded_function_ends(method: str) -> None:
    result = minimize(lambda x: x.sum() - x.square().sum(), vector(1.0, 2.0), method)
    assert result.status is Status.unbounded
    assert result.n_eval < 300


# Parameters.


def step(param: nn.Parameter, closure: Any, **options: Any) -> Result:
    optimizer = Newton([param], **options)
    optimizer.step(closure)
    assert optimizer.result is not None
    return optimizer.result


@pytest.mark.parametrize(("solver", "method", "x0"), [("cholesky", "newton", (3, 2)), ("cg", "newton-cg", (-4, -3))])
@pytest.mark.parametrize("max_eval", [*range(1, 18), 200])
def test_parameters_take_the_same_way_as_values(solver: str, method: str, x0: Any, max_eval: int) -> None:
    """Once, a longer step is tried here and no better: its graph has to be made again, which is an evaluation too."""

    def fun(x: Tensor) -> Tensor:
        return torch.cosh(x).sum() + 0.1 * torch.sin(5 * x).sum()

    param, calls = nn.Parameter(vector(*x0)), []
    result = step(param, lambda: calls.append(1) or fun(param), solver=solver, max_iter=40, max_eval=max_eval)
    assert len(calls) == result.n_eval <= max_eval
    values = minimize(fun, vector(*x0), method, tol=1e-7)
    funs, way = ([entry.fun for entry in some.history] for some in (values, result))
    assert way[:-1] == funs[: len(way) - 1]  # the last step may not have had an evaluation left for a longer one
    if max_eval == 200:
        assert result.success
        assert (result.n_iter, result.n_eval) == (values.n_iter, values.n_eval + 1)


def test_steps_in_chunks_take_the_same_way() -> None:
    """What was learned, and the radius, stay with the optimizer."""
    ways = []
    for max_iter in (2, 10):
        param = nn.Parameter(vector(-1.2, 1.0, 0.3, -0.5))
        optimizer, funs = Newton([param], solver="cg", max_iter=max_iter), []
        for _ in range(10 // max_iter):
            optimizer.step(lambda param=param: rosenbrock(param))
            assert optimizer.result is not None
            funs += [entry.fun for entry in optimizer.result.history[1:]]
        ways.append(funs)
    assert ways[0] == ways[1]
    assert len(ways[0]) == 10


def test_compiled_program_calls_the_step() -> None:
    def run(is_compiled: bool) -> Tensor:
        param = nn.Parameter(vector(-1.2, 1.0))
        optimizer = Newton([param], max_iter=4)

        def program() -> None:
            optimizer.step(lambda: rosenbrock(param))

        (torch.compile(program, backend="eager") if is_compiled else program)()
        return param.detach()

    assert torch.equal(run(True), run(False))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_conjugate_gradients_make_nothing_larger_than_their_pairs() -> None:
    torch.set_num_threads(1)
    size = 200_000
    param, target = nn.Parameter(torch.zeros(size)), torch.linspace(-1, 1, size)
    with Largest() as largest:
        result = step(param, lambda: ((param - target) ** 2 + (param - target) ** 4).sum())
    assert result.success
    assert size <= largest.numel <= PAIRS * size


def test_conjugate_gradients_give_way_to_the_hessian_where_rounding_makes_them_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    matrix = torch.logspace(0, -4, 60, dtype=torch.float64)[:, None] * basis

    def solved() -> Result[Tensor]:
        return minimize(lambda x: (matrix @ (x - 1)).square().sum(), torch.zeros(60).double(), "newton-cg", tol=1e-11)

    with_hessian = solved()
    monkeypatch.setattr(newton_descent, "MAX_DENSE", 59)
    without = solved()
    assert with_hessian.success
    assert float((with_hessian.x - 1).abs().max()) < 1e-2
    assert with_hessian.n_hvp < 0.9 * without.n_hvp


def test_radius_that_underflows_ends_the_run() -> None:
    x, who = torch.zeros(2, dtype=torch.float64), "minimize"

    def only_at_zero(x: Tensor) -> Tensor:
        return torch.where(x.eq(0).all(), x.sum(), torch.nan)

    objective = FunctionObjective(who, only_at_zero, Structure(x, who), needs_curvature=True)
    run = Run(objective, tol=0.0, max_iter=10, max_eval=100)
    status, _ = newton_descent.trust_region_descent(run, run.start(x), DenseNewton(objective), radius=1e-300)
    assert status is Status.non_finite
    assert run.best.x.tolist() == [0.0, 0.0]
