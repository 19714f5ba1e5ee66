"""`minimize` ends at the best point it has seen, and says truly why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from minimize_cases import (
    QUICK,
    SETTINGS,
    SOLVERS,
    Recorder,
    Setting,
    assert_evaluated_within_bounds,
    assert_result_is_true,
    bowl,
    distance,
    each_setting,
    each_solver,
    for_scipy,
    logarithms,
    one_thread,  # noqa: F401
    projected_grad_norm,
    rosenbrock,
    trap,
    vector,
    waves,
)
from problems import Problem, unconstrained
from torch import Tensor, nn

import descend
from descend import Status, minimize
from descend.second_order.mathematics import directions

# Results.


@each_solver
@each_setting
def test_result_is_honest(setting: Setting, options: dict[str, Any]) -> None:
    for tol in (1e-2, 1e-6, 1e-12):
        recorder = Recorder(setting.fun)
        result = minimize(recorder, setting.x0, tol=tol, max_iter=100, **options)
        assert_result_is_true(result, recorder, setting.x0, tol, options.get("bounds"))
        if options.get("method") != "gd" and tol > 1e-12:
            assert result.status is Status.converged


@each_solver
@pytest.mark.parametrize("fun", [waves, trap], ids=lambda fun: fun.__name__)
def test_result_is_the_lowest_of_many_minima(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    for start in torch.linspace(-6, 6, 25, dtype=torch.float64):
        recorder = Recorder(fun)
        x0 = start.reshape(1)
        assert_result_is_true(minimize(recorder, x0, **options), recorder, x0, 1e-6, options.get("bounds"))


@each_solver
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[-1]], ids=str)
def test_limit_of_evaluations_is_hard(setting: Setting, options: dict[str, Any]) -> None:
    for max_eval in (*range(1, 13), 17, 23, 30):
        recorder = Recorder(setting.fun)
        result = minimize(recorder, setting.x0, max_eval=max_eval, **options)
        assert len(recorder.values) <= max_eval
        assert result.status in (Status.max_eval, Status.converged)
        assert_result_is_true(result, recorder, setting.x0, 1e-6, options.get("bounds"))


@each_solver
@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_limit_of_iterations_is_hard(max_iter: int, options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(rosenbrock), vector(-1.2, 1.0)
    result = minimize(recorder, x0, max_iter=max_iter, **options)
    assert (result.status, result.n_iter) == (Status.max_iter, max_iter)
    assert_result_is_true(result, recorder, x0, 1e-6)
    if max_iter == 0:
        assert torch.equal(result.x, x0)
        assert result.n_eval == 1


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


@each_solver
def test_limit_of_iterations_is_hard_at_a_saddle(options: dict[str, Any]) -> None:
    assert minimize(saddle, vector(0.0, 0.0), max_iter=0, **options).n_iter == 0


def test_newton_leaves_a_saddle_and_says_how() -> None:
    result = minimize(saddle, vector(0.0, 0.0), "newton")
    assert result.success
    assert result.fun == pytest.approx(-0.25, rel=1e-12)
    assert result.n_negative_curvature > 0


@each_solver
def test_history_tells_of_every_iteration(options: dict[str, Any]) -> None:
    result = minimize(rosenbrock, vector(-1.2, 1.0), max_iter=20, **options)
    first, *_, last = result.history
    assert first.fun == rosenbrock(vector(-1.2, 1.0)).item()
    assert (first.step, first.n_eval, first.n_hvp) == (0.0, 1, 0)
    assert (last.n_eval, last.n_hvp) == (result.n_eval, result.n_hvp)
    for before, after in zip(result.history, result.history[1:], strict=False):
        assert after.n_eval > before.n_eval
        assert after.step > 0
        assert after.fun <= before.fun + 1e-14 * abs(before.fun)
    assert result.time > 0


def test_repr_shows_point_value_and_reason() -> None:
    text = repr(minimize(bowl, vector(1.0, 1.0)))
    assert text.startswith("Result(status=converged, message='The largest entry of ")
    assert "x=tensor([1., 1.], dtype=torch.float64), fun=0, grad_norm=0, n_iter=" in text
    assert "\n" not in text


def test_repr_of_big_tensors_is_short() -> None:
    x0 = {"matrix": torch.zeros(30, 40), "list": [nn.Parameter(torch.zeros(1))] * 20, "scalar": torch.tensor(1.0)}
    result = minimize(bowl, vector(3.0))
    text = repr(dataclasses.replace(result, x=x0))
    assert "'matrix': tensor(shape=(30, 40), dtype=torch.float32)" in text
    assert "'list': [tensor([0.]), tensor([0.]), " in text
    assert "'scalar': tensor(1.)" in text
    assert len(text) < 800


@each_solver
@each_setting
def test_same_call_gives_the_same_bits(setting: Setting, options: dict[str, Any]) -> None:
    once, again = (minimize(setting.fun, setting.x0, max_iter=30, **options) for _ in range(2))
    assert torch.equal(once.x, again.x)
    assert once.history == again.history
    assert once.status == again.status


# Every reason to stop.


def opposite(x: Tensor) -> Tensor:
    return -2 * (x - 1)


@each_solver
@pytest.mark.parametrize(
    ("status", "fun", "x0", "arguments", "words"),
    [
        (Status.converged, rosenbrock, vector(-1.2, 1.0), dict(max_iter=20_000), "gradient"),
        (Status.max_iter, rosenbrock, vector(-1.2, 1.0), dict(max_iter=3), "raise max_iter"),
        (Status.max_eval, rosenbrock, vector(-1.2, 1.0), dict(max_eval=3), "raise max_eval"),
        (
            Status.stopped_by_callback,
            rosenbrock,
            vector(-1.2, 1.0),
            dict(callback=lambda p: p.n_iter == 2),
            "callback",
        ),
        (Status.non_finite, logarithms, vector(-1.0, 1.0), {}, "NaN or infinite"),
        (Status.non_finite, bowl, vector(math.nan, 1.0), {}, "NaN or infinite"),
        (Status.precision_limit, lambda x: bowl(x) + 1e6 * x.cos().sum(), vector(3.0).float(), dict(tol=0), "wider"),
    ],
    ids=["converged", "max_iter", "max_eval", "callback", "nan_fun", "nan_x0", "precision"],
)
def test_status_says_why(
    status: Status,
    fun: Callable[[Tensor], Tensor],
    x0: Tensor,
    arguments: dict[str, Any],
    words: str,
    options: dict[str, Any],
) -> None:
    if status is Status.converged and options.get("method") == "gd":
        fun = bowl  # gradient descent takes 10,000 iterations on rosenbrock
    result = minimize(fun, x0, **arguments, **options)
    assert result.status is status
    assert result.success == (status is Status.converged)
    assert words in result.message


@pytest.mark.parametrize("name", ["gd", "bfgs", "l-bfgs", "l-bfgs-b"])
def test_wrong_gradient_is_a_failed_search(name: str) -> None:
    result = minimize(bowl, vector(3.0, 4.0), jac=opposite, **SOLVERS[name])
    assert result.status is Status.line_search_failed
    assert "gradcheck" in result.message
    assert torch.equal(result.x, vector(3.0, 4.0))


def test_each_status_is_the_word_itself() -> None:
    words = {"converged", "max_iter", "max_eval", "line_search_failed", "non_finite", "stopped_by_callback"}
    assert {status.value for status in Status} == words | {"precision_limit", "infeasible", "unbounded"}
    assert all(status == status.value == str(status) == f"{status}" == status.name for status in Status)


# The tolerance.


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_tolerance_is_relative_to_the_start_or_to_one(name: str, factor: float) -> None:
    x0 = vector(-1.2, 1.0)
    recorder = Recorder(lambda x: factor * rosenbrock(x))
    result = minimize(recorder, x0, tol=1e-3, **SOLVERS[name])
    assert result.success
    scale = max(1.0, factor * projected_grad_norm(rosenbrock, x0))
    assert result.grad_norm <= 1e-3 * scale
    # It stops at the first point that is good enough.
    assert sum(projected_grad_norm(recorder.fun, x) <= 1e-3 * scale for x in recorder.points) == 1


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [
        (torch.float64, 1e-6),
        (torch.complex128, 1e-6),
        (torch.float32, 1e-4),
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-2),
    ],
    ids=str,
)
def test_default_tolerance_is_that_of_the_dtype(dtype: torch.dtype, tol: float) -> None:
    x0 = torch.tensor([2.0], dtype=dtype)
    for share, success in ((0.99, True), (1.01, False)):
        result = minimize(lambda x, share=share: share * tol * x.abs().float().sum(), x0, max_iter=0)
        assert result.success == success


def test_converged_at_once_costs_one_evaluation() -> None:
    for method in ("gd", "bfgs", "l-bfgs", "newton-cg"):
        result = minimize(bowl, vector(1.0, 1.0), method)
        assert (result.status, result.n_eval, result.n_iter) == (Status.converged, 1, 0)


# Agreement with others.


CHOSEN = (
    "rosenbrock-10",
    "beale-2",
    "wood-4",
    "helical_valley-3",
    "himmelblau-2",
    "broyden_tridiagonal-10",
    "kowalik_osborne-4",
)
BY_NAME: dict[str, Problem] = {problem.name: problem for problem in unconstrained()}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("problem", [BY_NAME[name] for name in CHOSEN], ids=lambda problem: problem.name)
def test_minimum_is_scipys_or_a_known_one(problem: Problem, name: str) -> None:
    result = minimize(problem.fun, problem.x0, tol=1e-8, max_eval=3000, **SOLVERS[name])
    assert result.success

    theirs = scipy.optimize.minimize(
        for_scipy(problem.fun), problem.x0.numpy(), jac=True, method="BFGS", options=dict(gtol=1e-8)
    )
    minima = [*(problem.minima or ()), theirs.fun]
    assert min(abs(result.fun - value) / (1 + abs(value)) for value in minima) < 1e-7


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(method="BFGS"), "method must be one of .*'l-bfgs'.* got 'BFGS'"),
        (dict(method=None), "method must be one of .* got None"),
        (dict(tol=-1.0), "tol must be .*>= 0, got -1.0"),
        (dict(tol=math.nan), "tol must be .* got nan"),
        (dict(tol=math.inf), "tol must be .* got inf"),
        (dict(tol="1e-3"), "tol must be .* got '1e-3'"),
        (dict(max_iter=-1), "max_iter must be an integer >= 0, got -1"),
        (dict(max_iter=1.5), "max_iter must be an integer >= 0, got 1.5"),
        (dict(max_eval=0), "max_eval must be an integer >= 1, got 0"),
        (dict(history_size=0), "history_size must be an integer >= 1, got 0"),
        (dict(method="gd", history_size=3), "history_size is for method='l-bfgs', got method='gd'"),
        (dict(method="newton", bounds=(0, 1)), "bounds is for method='l-bfgs', got method='newton'"),
        (dict(bounds=0), r"bounds must be \(lower, upper\), each .* or None, got 0"),
        (dict(bounds=(0, 1, 2)), r"bounds must be \(lower, upper\), each .*got \(0, 1, 2\)"),
        (dict(bounds=(1, 0)), "lower <= upper, .*got 1 and 0 at position 0"),
        (dict(bounds=(vector(0, 3), vector(1, 2))), "lower <= upper, .*got 3 and 2 at position 1"),
        (dict(bounds=(0, math.nan)), "without NaN, got 0 and nan"),
        (dict(bounds=(vector(0, math.inf), math.inf)), "got inf and inf at position 1"),
        (dict(bounds=(-math.inf, vector(0, -math.inf))), "got -inf and -inf at position 1"),
        (dict(bounds=("0", None)), "the lower bound must be real numbers or tensors .*got '0'"),
        (dict(bounds=(None, vector(0, 0, 0))), r"the upper bound must .*broadcast .*\(2,\).*got"),
        (dict(bounds=[(0, 1), (0, 1)]), r"the lower bound must be one number or tensor .* x0, \(2,\); got \(0, 1\)"),
        (dict(bounds=(torch.zeros(2) + 1j, None)), "the lower bound must be real .*got"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], words: str) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises((ValueError, TypeError), match=rf"(?s)minimize: .*{words}"):
        minimize(never, vector(0.0, 0.0), **arguments)


def test_fun_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="fun must be a function, got None"):
        minimize(None, vector(0.0, 0.0))  # type: ignore[call-overload]


def test_numpy_numbers_are_numbers() -> None:
    limits: dict[str, Any] = dict(tol=np.float32(1e-3), max_iter=np.int64(2), max_eval=np.int32(9))
    result = minimize(rosenbrock, torch.zeros(6).double(), **limits)
    assert (result.n_iter, result.status) == (2, "max_iter")
    assert result.x.equal(minimize(rosenbrock, torch.zeros(6).double(), max_iter=2).x)


def test_callback_that_returns_several_truth_values_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"callback must return True to stop.*got tensor\("):
        minimize(distance, vector(0.0, 0.0), callback=lambda progress: torch.ones(2))


def test_complex_gradient_of_real_variables_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the gradient from jac must be real where x0 is, got torch.complex64"):
        minimize(distance, vector(0.0, 0.0), jac=lambda x: torch.zeros(2, dtype=torch.complex64))


def test_complex_numbers_have_no_bounds() -> None:
    with pytest.raises(ValueError, match="complex"):
        minimize(distance, torch.zeros(2, dtype=torch.complex64), bounds=(0, 1))


@pytest.mark.parametrize("history_size", [1, 2, 50])
@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0)])
def test_history_may_have_any_size(history_size: int, bounds: Any) -> None:
    assert minimize(rosenbrock, torch.zeros(6).double(), history_size=history_size, bounds=bounds).success


@pytest.mark.parametrize("limits", [dict(SHORT=0), dict(SHORT=0, LARGE=0)], ids=["tensors", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_vectors_take_nearly_the_same_way(
    dtype: torch.dtype, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x0 = torch.linspace(-1.2, 1.2, 30, dtype=torch.float64).to(dtype)
    expected = minimize(rosenbrock, x0)
    for name, value in limits.items():
        monkeypatch.setattr(directions, name, value)
    result = minimize(rosenbrock, x0)
    assert result.success
    assert result.n_eval < 1.3 * expected.n_eval  # histories in single precision, sums in another order


def test_public_names() -> None:
    assert {"minimize", "Result", "Status", "Progress"} <= set(descend.__all__)


# The many ways to be wrong, at random.


def random_problems(seed: int) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, tuple[Tensor, Tensor]]]:
    """Functions with many minima, kinks and ends of the domain, starts, and bounds, some of them equal or infinite."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    while True:
        n = int(torch.randint(1, 6, (), generator=generator))
        matrix, center, units = normal(n, n), normal(n), (2 * normal(n)).exp()
        kinds: list[Callable[[Tensor], Tensor]] = [
            lambda z: torch.sin(3 * z).sum() + 0.05 * z.square().sum(),
            lambda z: ((matrix @ z - center) ** 4).sum() + torch.cos(5 * z).sum(),  # noqa: B023
            lambda z: torch.log1p((matrix @ z - center) ** 2).sum(),  # noqa: B023
            lambda z: z.abs().sum() + 0.1 * (z - 1).square().sum(),
            lambda z: (matrix @ z).sin().sum() - torch.log(1 - z * z / 9).sum(),  # noqa: B023
            lambda z: torch.exp(matrix @ z - center).sum() + torch.exp(-z).sum(),  # noqa: B023
        ]
        lower = 2 * normal(n) - 1
        upper = lower + 3 * normal(n).abs() * (normal(n) > -1)
        lower, upper = lower / units, upper / units
        lower[normal(n) > 0.5], upper[normal(n) > 0.5] = -math.inf, math.inf
        for kind in kinds:
            yield (lambda x, kind=kind, units=units: kind(x * units)), normal(n) / units, (lower, upper)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seed", range(2))
def test_results_of_random_problems_are_honest(name: str, seed: int) -> None:
    for _, (fun, x0, bounds) in zip(range(12), random_problems(seed), strict=False):
        recorder, options = Recorder(fun), SOLVERS[name]
        box = bounds if "bounds" in options else None
        start = x0 if box is None else x0.clamp(*box)
        result = minimize(recorder, x0, max_eval=100, **{**options, "bounds": box})
        assert len(recorder.values) <= 100
        if recorder.is_finite[0]:
            assert_result_is_true(result, recorder, start, 1e-6, box)
        else:
            assert result.status is Status.non_finite
        if box is not None:
            assert_evaluated_within_bounds(recorder, *box)
