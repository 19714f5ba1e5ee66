"""`minimize` ends at the best point it has seen, with a true reason, whatever the function does."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import scipy.optimize
import torch
from problems import Problem, bounded, unconstrained
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import descend
from descend import Progress, Result, Status, minimize

METHODS = ("gd", "bfgs", "l-bfgs", "newton-cg", "newton")
# With bounds another solver is at work; these bounds are far away.
SOLVERS = {**{method: dict(method=method) for method in METHODS}, "l-bfgs-b": dict(bounds=(-1e4, 1e4))}
QUICK = [name for name in SOLVERS if name != "gd"]  # those that solve everything below in few evaluations
each_solver = pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The problems are small: threads only wait for each other. They are restored by ``conftest.py``."""
    torch.set_num_threads(1)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Functions.


def bowl(x: Tensor) -> Tensor:
    return ((x - 1) ** 2).sum()


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quartic(x: Tensor) -> Tensor:
    return ((x - 1) ** 4).sum() + (x[0] * x[-1] - 1) ** 2


def waves(x: Tensor) -> Tensor:
    """Many minima; from a hilltop no way is the right one."""
    return torch.sin(3 * x).sum() + 0.02 * (x - 1).square().sum()


def trap(x: Tensor) -> Tensor:
    """A line search looks into the deep hole on its way to the shallow minimum behind it."""
    return ((2 * x - 1) ** 4).sum() / 100 + torch.cos(5 * x).sum()


def logarithms(x: Tensor) -> Tensor:
    """NaN for any x <= 0, and steep towards it."""
    return (x - 0.01 * x.log()).sum() + x.square().sum()


def wall(x: Tensor) -> Tensor:
    """Infinite beyond 2, where it still falls."""
    return torch.where(x < 2, -x, torch.inf).sum() + 0.1 * (x**2).sum()


class Setting(NamedTuple):
    fun: Callable[[Tensor], Tensor]
    x0: Tensor

    def __str__(self) -> str:
        return f"{self.fun.__name__}-{len(self.x0)}"


SETTINGS = [
    Setting(bowl, vector(3.0, -2.0)),
    Setting(rosenbrock, vector(-1.2, 1.0)),
    Setting(rosenbrock, vector(-1.0, 2.0, 1.0, 0.5)),
    Setting(quartic, vector(3.0, -1.0, 0.5)),
    Setting(waves, vector(0.3, -2.0, 4.0)),
    Setting(logarithms, vector(2.0, 0.3)),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


class Recorder:
    """A function whose calls are watched from outside."""

    def __init__(self, fun: Callable[[Tensor], Tensor]) -> None:
        self.fun = fun
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.is_finite: list[bool] = []  # value and gradient

    def __call__(self, x: Tensor) -> Tensor:
        value = self.fun(x)
        (grad,) = torch.autograd.grad(value, x, retain_graph=True)
        self.points.append(x.detach().clone())
        self.values.append(value.item())
        self.is_finite.append(math.isfinite(value.item()) and bool(grad.isfinite().all()))
        return value

    @property
    def least(self) -> float:
        return min(value for value, is_finite in zip(self.values, self.is_finite, strict=True) if is_finite)


def slope(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fun(leaf), leaf)[0]


def measured(fun: Callable[[Tensor], Tensor], x: Tensor, bounds: Any = None) -> float:
    """The largest entry of the (projected) gradient."""
    grad = slope(fun, x)
    residual = grad if bounds is None else x - torch.clamp(x - grad, *bounds)
    return residual.abs().max().item()


def assert_honest(result: Result, recorder: Recorder, x0: Tensor, tol: float, bounds: Any = None) -> None:
    """What a result says is true: measured again, and compared with every evaluation."""
    fun = recorder.fun
    assert result.n_eval == len(recorder.values)
    assert len(result.history) == result.n_iter + 1
    assert all(map(torch.isfinite, result.x.flatten()))
    assert result.fun == fun(result.x).item()
    assert result.fun <= recorder.least + 1e-14 * abs(result.fun)
    assert torch.equal(result.grad, slope(fun, result.x))
    start = x0 if bounds is None else x0.clamp(*bounds)
    assert result.grad_norm == measured(fun, result.x, bounds)
    is_small = result.grad_norm <= tol * max(1.0, measured(fun, start, bounds))
    assert result.success == (result.status is Status.converged)
    assert not result.success or is_small
    assert result.status == str(result.status)
    assert math.isfinite(result.fun)
    assert any(word in result.message for word in ("limit", "gradient", "function", "callback"))


# Results.


@each_solver
@each_setting
def test_result_is_honest(setting: Setting, options: dict[str, Any]) -> None:
    for tol in (1e-2, 1e-6, 1e-12):
        recorder = Recorder(setting.fun)
        result = minimize(recorder, setting.x0, tol=tol, max_iter=300, **options)
        assert_honest(result, recorder, setting.x0, tol, options.get("bounds"))
        if options.get("method") != "gd" and tol > 1e-12:
            assert result.status is Status.converged


@each_solver
@pytest.mark.parametrize("fun", [waves, trap], ids=lambda fun: fun.__name__)
def test_result_is_the_lowest_of_many_minima(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    for start in torch.linspace(-6, 6, 40, dtype=torch.float64):
        recorder = Recorder(fun)
        x0 = start.reshape(1)
        assert_honest(minimize(recorder, x0, **options), recorder, x0, 1e-6, options.get("bounds"))


@each_solver
@each_setting
def test_limit_of_evaluations_is_hard(setting: Setting, options: dict[str, Any]) -> None:
    for max_eval in range(1, 31):
        recorder = Recorder(setting.fun)
        result = minimize(recorder, setting.x0, max_eval=max_eval, **options)
        assert len(recorder.values) <= max_eval
        assert result.status in (Status.max_eval, Status.converged)
        assert_honest(result, recorder, setting.x0, 1e-6, options.get("bounds"))


@each_solver
@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_limit_of_iterations_is_hard(max_iter: int, options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(rosenbrock), vector(-1.2, 1.0)
    result = minimize(recorder, x0, max_iter=max_iter, **options)
    assert (result.status, result.n_iter) == (Status.max_iter, max_iter)
    assert_honest(result, recorder, x0, 1e-6)
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
    assert "status=" in repr(result)


@each_solver
@each_setting
def test_same_call_gives_the_same_bits(setting: Setting, options: dict[str, Any]) -> None:
    once, again = (minimize(setting.fun, setting.x0, max_iter=100, **options) for _ in range(2))
    assert torch.equal(once.x, again.x)
    assert once.history == again.history
    assert once.status == again.status


# Every reason to stop.


def stop(progress: Progress) -> bool:
    return progress.n_iter == 2


def opposite(x: Tensor) -> Tensor:
    return -2 * (x - 1)


@each_solver
@pytest.mark.parametrize(
    ("status", "fun", "x0", "arguments", "words"),
    [
        (Status.converged, rosenbrock, vector(-1.2, 1.0), dict(max_iter=20_000), "gradient"),
        (Status.max_iter, rosenbrock, vector(-1.2, 1.0), dict(max_iter=3), "raise max_iter"),
        (Status.max_eval, rosenbrock, vector(-1.2, 1.0), dict(max_eval=3), "raise max_eval"),
        (Status.stopped_by_callback, rosenbrock, vector(-1.2, 1.0), dict(callback=stop), "callback"),
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
        fun = bowl  # gradient descent takes 10,000 iterations in the valley
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
    assert {status.value for status in Status} == words | {"precision_limit"}
    assert all(status == status.value == str(status) == f"{status}" == status.name for status in Status)


# The tolerance.


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_tolerance_is_relative_to_the_start_or_to_one(name: str, factor: float) -> None:
    x0 = vector(-1.2, 1.0)
    recorder = Recorder(lambda x: factor * rosenbrock(x))
    result = minimize(recorder, x0, tol=1e-3, **SOLVERS[name])
    assert result.success
    scale = max(1.0, factor * measured(rosenbrock, x0))
    assert result.grad_norm <= 1e-3 * scale
    # It stops at the first point that is good enough.
    assert sum(measured(recorder.fun, x) <= 1e-3 * scale for x in recorder.points) == 1


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
    "analytic_center-10",
)
BY_NAME: dict[str, Problem] = {problem.name: problem for problem in unconstrained()}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("problem", [BY_NAME[name] for name in CHOSEN], ids=lambda problem: problem.name)
def test_minimum_is_scipys_or_a_known_one(problem: Problem, name: str) -> None:
    result = minimize(problem.fun, problem.x0, tol=1e-8, max_eval=3000, **SOLVERS[name])
    assert result.success

    def numpy_fun(x: Any) -> tuple[float, Any]:
        point = torch.as_tensor(x)
        return problem.fun(point).item(), slope(problem.fun, point).numpy()

    theirs = scipy.optimize.minimize(numpy_fun, problem.x0.numpy(), jac=True, method="BFGS", options=dict(gtol=1e-8))
    minima = [value for value in (*(problem.minima or ()), theirs.fun) if not math.isnan(value)]
    assert min(abs(result.fun - value) / (1 + abs(value)) for value in minima) < 1e-7


SMALL_BOXES = sorted((problem for problem in bounded() if len(problem.x0) <= 10), key=lambda problem: problem.name)


@pytest.mark.parametrize("problem", SMALL_BOXES[::6], ids=lambda problem: problem.name)
def test_bounded_minimum_is_as_low_as_scipys(problem: Problem) -> None:
    bounds = problem.lower, problem.upper
    recorder = Recorder(problem.fun)
    result = minimize(recorder, problem.x0, bounds=bounds, tol=1e-7, max_eval=3000)
    assert_inside(recorder, *bounds)
    assert_honest(result, recorder, problem.x0, 1e-7, bounds)

    def numpy_fun(x: Any) -> tuple[float, Any]:
        point = torch.as_tensor(x)
        return problem.fun(point).item(), slope(problem.fun, point).numpy()

    theirs = scipy.optimize.minimize(
        numpy_fun,
        problem.x0.clamp(*bounds).numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(problem.lower.tolist(), problem.upper.tolist(), strict=True)),
        options=dict(ftol=1e-15, gtol=1e-9, maxiter=3000),
    )
    assert result.success
    assert result.fun <= theirs.fun + 1e-5 * (1 + abs(theirs.fun))


# Bounds.


def assert_inside(recorder: Recorder, lower: Any, upper: Any) -> None:
    for x in recorder.points:
        assert bool(((x >= lower) & (x <= upper)).all())


INF = math.inf
BOUNDS: list[tuple[Any, Any]] = [
    (-2.0, 0.5),
    (0.5, 5.0),
    (None, 0.3),
    (0.7, None),
    (-INF, INF),
    (vector(-INF, 0.9, -1.0), vector(0.5, INF, 0.0)),
    (vector(0.1, 0.2, 0.3), vector(0.1, 0.2, 5.0)),  # fixed variables
    (vector(0.1, 0.2, 0.3), vector(0.1, 0.2, 0.3)),
    (1.0, 1.0),
    (1 / 3, 2 / 3),
    (-1e300, 1e-300),
    (vector(-1e-12, 0.1, 1e6), vector(1e-12, 0.1 + 1e-16, 1e6 + 1)),
]


def as_tensors(bounds: tuple[Any, Any], x0: Tensor) -> tuple[Tensor, Tensor]:
    lower = torch.as_tensor(-INF if bounds[0] is None else bounds[0], dtype=x0.dtype)
    upper = torch.as_tensor(INF if bounds[1] is None else bounds[1], dtype=x0.dtype)
    return lower.expand(x0.shape), upper.expand(x0.shape)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("fun", [bowl, rosenbrock, quartic, waves], ids=lambda fun: fun.__name__)
def test_bounds_are_never_violated(fun: Callable[[Tensor], Tensor], bounds: tuple[Any, Any]) -> None:
    for x0 in (vector(-1.2, 1.0, 2.0), vector(10.0, -10.0, 0.3), vector(0.1, 0.2, 0.3)):
        recorder, kept = Recorder(fun), x0.clone()
        result = minimize(recorder, x0, bounds=bounds)
        tensors = as_tensors(bounds, x0)
        assert_inside(recorder, *tensors)
        assert torch.equal(recorder.points[0], x0.clamp(*tensors))
        assert_honest(result, recorder, x0, 1e-6, tensors)
        assert result.success
        assert torch.equal(x0, kept)


def test_bounds_keep_a_function_where_it_is_defined() -> None:
    def fun(x: Tensor) -> Tensor:
        assert bool((x >= 0).all())
        return (x.sqrt() * x).sum() - (0.1 * x).sum() + x[0]

    result = minimize(fun, vector(1.0, 2.0), bounds=(0, None))
    assert result.success
    assert float(result.x[0]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [(0.1, 0.999), (1 / 3, 0.7001)], ids=str)
def test_bounds_hold_in_the_dtype_of_each_tensor(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    # 0.999 rounds to 1 in bfloat16: a logarithm of 1 - x would be infinite there.
    points: list[Tensor] = []

    def fun(x: dict[str, Tensor]) -> Tensor:
        points.append(x["narrow"].detach().double())
        return (x["narrow"].double() + 3).square().sum() - x["wide"].sum() - 9 * x["narrow"].double()[0]

    x0 = {"narrow": torch.tensor([0.5, 0.5], dtype=dtype), "wide": vector(0.5)}
    minimize(fun, x0, bounds=bounds, max_iter=20)
    assert len(points) > 1
    assert all(bounds[0] <= float(value) <= bounds[1] for point in points for value in point)


@pytest.mark.parametrize(
    "bounds",
    [
        (dict(a=0.5, b=None), dict(a=None, b=vector(0.25, 9.0))),
        (dict(b=None, a=0.5), dict(b=vector(0.25, 9.0), a=None)),
        [dict(a=0.5, b=-INF), dict(a=INF, b=torch.tensor([0.25, INF]))],
    ],
    ids=["same order", "other order", "list"],
)
def test_bounds_have_the_structure_of_x0(bounds: Any) -> None:
    result = minimize(
        lambda x: x["a"].square().sum() + bowl(x["b"]),
        dict(a=vector(2.0, 3.0), b=vector(0.0, 0.0)),
        bounds=bounds,
    )
    assert result.x["a"].tolist() == [0.5, 0.5]
    assert result.x["b"][0] == 0.25
    assert float(result.x["b"][1]) == pytest.approx(1, abs=1e-6)


# Structures, dtypes and places.


class Two(NamedTuple):
    first: Tensor
    second: Tensor


def distance(tree: Any) -> Tensor:
    """The square of the distance from 1, or 1 + 2i."""
    total: Any = 0.0
    for leaf in pytree.tree_leaves(tree):
        center = 1 + 2j if leaf.is_complex() else 1
        total = total + (leaf - center).abs().double().square().sum()
    return total


STRUCTURES: dict[str, Callable[[], Any]] = {
    "float64": lambda: vector(3.0, -1.0),
    "float32": lambda: vector(3.0, -1.0).float(),
    "bfloat16": lambda: vector(3.0, -1.0).bfloat16(),
    "float16": lambda: vector(3.0, -1.0).half(),
    "complex64": lambda: torch.tensor([3 + 1j, 0j], dtype=torch.complex64),
    "complex128": lambda: torch.tensor([[3 + 1j, 0j]], dtype=torch.complex128),
    "0-dim": lambda: torch.tensor(3.0),
    "matrix": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "dict": lambda: {"b": vector(3.0), "a": vector(2.0, 2.0).float()},
    "ordered": lambda: OrderedDict(b=vector(3.0), a=vector(2.0, 2.0)),
    "list": lambda: [vector(3.0), vector(), vector(1.0, 2.0)],
    "tuple": lambda: (vector(3.0), torch.tensor(2.0)),
    "namedtuple": lambda: Two(vector(3.0), vector(2.0)),
    "nested": lambda: {"a": [vector(3.0), (torch.zeros(2, 2), {"c": vector(4.0)})], "b": vector(0.0).bfloat16()},
    "mixed": lambda: [vector(3.0), torch.tensor([1j]), vector(0.0, 2.0).bfloat16(), torch.zeros(2).double() * 1j],
}


@each_solver
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_comes_back(name: str, options: dict[str, Any]) -> None:
    x0 = STRUCTURES[name]()
    leaves = pytree.tree_leaves(x0)
    if "bounds" in options and any(leaf.is_complex() for leaf in leaves):
        return
    kept = [leaf.clone() for leaf in leaves]

    def fun(tree: Any) -> Tensor:
        assert_alike(tree, x0)
        return distance(tree)

    result = minimize(fun, x0, **options)
    assert result.success
    assert_alike(result.x, x0)
    assert_alike(result.grad, x0)
    assert all(map(torch.equal, leaves, kept))
    assert float(distance(result.x)) < 1e-4  # half precision
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(result.x))


def assert_alike(ours: Any, theirs: Any) -> None:
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@each_solver
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_to_minimize_is_solved(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    result = minimize(lambda x: x.sum() + 3, torch.zeros(shape), **options)
    assert (result.status, result.fun, result.grad_norm) == (Status.converged, 3.0, 0.0)
    assert result.x.shape == shape


@each_solver
def test_single_precision_is_used_up(options: dict[str, Any]) -> None:
    if options.get("method") == "gd":
        options = {**options, "max_iter": 20_000}
    result = minimize(rosenbrock, vector(-1.2, 1.0).float(), **options)
    assert result.success
    assert result.x.dtype == torch.float32
    assert float((result.x - 1).abs().max()) < 0.1  # 1e-4 of the gradient at the start


@each_solver
def test_start_may_require_grad_and_is_left_alone(options: dict[str, Any]) -> None:
    x0 = vector(3.0, -1.0).requires_grad_()
    result = minimize(bowl, x0 * 2, **options)
    assert result.success
    assert minimize(bowl, x0, **options).success
    assert (x0.grad, x0.tolist()) == (None, [3.0, -1.0])


@each_solver
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("is_made_inside", [False, True])
def test_gradient_modes_of_the_caller_do_not_matter(mode: Any, is_made_inside: bool, options: dict[str, Any]) -> None:
    expected = minimize(quartic, vector(3.0, 0.5), max_iter=50, **options)
    x0 = vector(3.0, 0.5)
    with mode():
        start = vector(3.0, 0.5) if is_made_inside else x0
        result = minimize(quartic, start, max_iter=50, **options)
        assert not torch.is_grad_enabled()
    assert torch.equal(result.x, expected.x)
    assert torch.is_grad_enabled()


@each_solver
def test_default_dtype_does_not_matter(options: dict[str, Any]) -> None:
    expected = minimize(rosenbrock, vector(-1.2, 1.0).float(), max_iter=30, **options)
    torch.set_default_dtype(torch.float64)
    result = minimize(rosenbrock, vector(-1.2, 1.0).float(), max_iter=30, **options)
    assert torch.equal(result.x, expected.x)


def test_fun_gets_a_point_it_may_keep() -> None:
    kept: list[Tensor] = []

    def fun(x: Tensor) -> Tensor:
        kept.append(x)
        return rosenbrock(x)

    recorder = Recorder(rosenbrock)
    minimize(fun, vector(-1.2, 1.0))
    minimize(recorder, vector(-1.2, 1.0))
    assert all(map(torch.equal, (x.detach() for x in kept), recorder.points))


# Modules and parameters.


class Line(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0], [-1.0]], dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def forward(self) -> Tensor:
        return ((self.weight - 1) ** 2).sum() * 3 + (self.bias - self.weight.sum()) ** 2 + self.frozen.sum()


@each_solver
def test_module_is_minimized_in_place(options: dict[str, Any]) -> None:
    module = Line()
    before = list(module.parameters())
    result = minimize(lambda m: m(), module, **options)
    assert result.x is module
    assert list(map(id, module.parameters())) == list(map(id, before))
    assert result.success
    assert module().item() == result.fun == pytest.approx(2, abs=1e-9)
    assert list(result.grad) == ["weight", "bias"]
    assert all(param.grad is None and param.requires_grad != (param is module.frozen) for param in before)
    assert module.frozen.tolist() == [1.0, 1.0]


@each_solver
@pytest.mark.parametrize("kind", ["parameter", "list", "dict", "generator"])
def test_parameters_are_minimized_in_place(kind: str, options: dict[str, Any]) -> None:
    module = Line()
    trees: dict[str, Any] = {
        "parameter": module.weight,
        "list": list(module.parameters()),
        "dict": dict(module.named_parameters()),
        "generator": module.parameters(),
    }

    def fun(tree: Any) -> Tensor:
        assert any(leaf is module.weight for leaf in pytree.tree_leaves(tree))
        return module()

    result = minimize(fun, trees[kind], **options)
    assert result.success
    assert module().item() == result.fun
    assert any(leaf is module.weight for leaf in pytree.tree_leaves(result.x))
    assert module.weight.tolist() != [[3.0], [-1.0]]


@each_solver
def test_values_and_parameters_take_the_same_way(options: dict[str, Any]) -> None:
    values = minimize(rosenbrock, vector(-1.2, 1.0), max_iter=20, **options)
    parameters = minimize(rosenbrock, nn.Parameter(vector(-1.2, 1.0)), max_iter=20, **options)
    assert values.history == parameters.history


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_module_keeps_its_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    module = Line(dtype)
    result = minimize(lambda m: m(), module, **options)
    assert {param.dtype for param in module.parameters()} == {dtype}
    assert module().item() == result.fun
    assert result.fun < 2.5


def test_bounds_of_a_module_have_its_names() -> None:
    module = Line()
    result = minimize(lambda m: m(), module, bounds=(dict(weight=1.5, bias=None), dict(weight=None, bias=2.0)))
    assert result.success
    assert module.weight.tolist() == [[1.5], [1.5]]
    assert module.bias.item() == 2.0


@each_solver
@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_parameters_are_at_the_best_point_after_an_error(
    number: int, error: type[BaseException], options: dict[str, Any]
) -> None:
    param, values = nn.Parameter(vector(-1.2, 1.0)), []

    def fun(x: Tensor) -> Tensor:
        if len(values) == number - 1:
            raise error("stop")
        values.append(rosenbrock(x).item())
        return rosenbrock(x)

    with pytest.raises(error, match="stop"):
        minimize(fun, param, **options)
    assert rosenbrock(param).item() == min(values, default=rosenbrock(vector(-1.2, 1.0)).item())


def test_parameters_are_at_the_best_point_after_an_error_in_the_callback() -> None:
    param = nn.Parameter(vector(-1.2, 1.0))

    def callback(progress: Progress) -> None:
        assert progress.x is param
        assert rosenbrock(param).item() == progress.fun
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError, match="stop"):
        minimize(rosenbrock, param, callback=callback)
    assert rosenbrock(param).item() < rosenbrock(vector(-1.2, 1.0)).item()


def test_parameter_given_twice_is_one_or_an_error() -> None:
    param = nn.Parameter(vector(3.0, -1.0))
    try:
        result = minimize(lambda params: quartic(params[0]), [param, param])
    except ValueError as error:
        assert "twice" in str(error) or "duplicate" in str(error)
    else:
        assert result.history == minimize(quartic, vector(3.0, -1.0)).history


def test_functions_of_values_do_not_go_with_parameters() -> None:
    with pytest.raises(ValueError, match=r"jac and hvp .* nn.Parameter.*[Dd]etach x0"):
        minimize(bowl, nn.Parameter(vector(1.0)), jac=opposite)


def test_sparse_gradients_are_gradients() -> None:
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    result = minimize(lambda m: bowl(m(torch.tensor([0, 2, 2]))), table)
    assert result.success
    assert float((table.weight[[0, 2]] - 1).abs().max()) < 1e-6


# Functions for gradient and curvature.


def rosenbrock_slope(x: Tensor) -> Tensor:
    """As somebody would write it who knows autograd: it needs gradients to be enabled."""
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(rosenbrock(leaf), leaf)[0]


def rosenbrock_product(x: Tensor, v: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(rosenbrock(leaf), leaf, create_graph=True)
    return torch.autograd.grad(grad, leaf, v)[0]


def into(buffer: Tensor, fun: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that always returns the same memory."""

    def filled(*arguments: Tensor) -> Tensor:
        return buffer.copy_(fun(*arguments))

    return filled


def assert_alike_in_value(ours: Result, theirs: Result) -> None:
    """The same way up to rounding, which a valley makes larger."""
    assert ours.n_hvp > 0
    assert abs(ours.n_iter - theirs.n_iter) <= 2
    for a, b in zip(ours.history[:8], theirs.history[:8], strict=True):
        assert a.fun == pytest.approx(b.fun, rel=1e-6)


@each_solver
@pytest.mark.parametrize("kind", ["callable", "True", "buffer"])
def test_own_gradient_takes_the_same_way_as_autograd(kind: str, options: dict[str, Any]) -> None:
    x0 = vector(-1.2, 1.0, 0.5)
    expected = minimize(rosenbrock, x0, max_iter=30, **options)
    hvp: Any = rosenbrock_product if "newton" in options.get("method", "") else None
    if kind == "True":
        result = minimize(lambda x: (rosenbrock(x), rosenbrock_slope(x)), x0, max_iter=30, jac=True, hvp=hvp, **options)
    else:
        jac = rosenbrock_slope if kind == "callable" else into(torch.zeros_like(x0), rosenbrock_slope)
        result = minimize(rosenbrock, x0, max_iter=30, jac=jac, hvp=hvp, **options)
    if hvp is None:
        assert result.history == expected.history
    else:  # products are summed in another order
        assert_alike_in_value(result, expected)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
@pytest.mark.parametrize("is_buffer", [False, True])
def test_own_products_take_the_same_way_as_autograd(method: str, is_buffer: bool) -> None:
    x0 = vector(-1.2, 1.0, 0.5)
    expected = minimize(rosenbrock, x0, method, max_iter=30)
    hvp = into(torch.zeros_like(x0), rosenbrock_product) if is_buffer else rosenbrock_product
    result = minimize(rosenbrock, x0, method, max_iter=30, hvp=hvp)
    assert_alike_in_value(result, expected)


@each_method
def test_own_gradient_may_be_a_function_of_torch_operations(method: str) -> None:
    # Then Newton's methods differentiate it once more.
    result = minimize(quartic_of_values, vector(3.0, 2.0), method, jac=lambda x: 4 * (x - 1) ** 3)
    assert result.success
    assert result.n_iter < 40


def quartic_of_values(x: Tensor) -> Tensor:
    return ((x - 1) ** 4).sum()


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_own_gradient_that_autograd_cannot_follow_needs_products(method: str) -> None:
    # Taken for constant, its curvature would be zero, and Newton's method silently gradient descent.
    with pytest.raises(RuntimeError, match="hvp"):
        minimize(rosenbrock, vector(-1.2, 1.0), method, jac=rosenbrock_slope)


def test_own_gradient_of_a_structure_is_found_by_name() -> None:
    result = minimize(
        lambda x: (x["a"] - 1) ** 2 + (x["b"] - 2) ** 2,
        dict(a=torch.tensor(0.0), b=torch.tensor(0.0)),
        jac=lambda x: dict(b=2 * (x["b"] - 2), a=2 * (x["a"] - 1)),
    )
    assert result.success
    assert (float(result.x["a"]), float(result.x["b"])) == pytest.approx((1, 2), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_own_gradient_may_have_another_dtype(dtype: torch.dtype) -> None:
    def jac(x: Tensor) -> Tensor:
        return (2 * (x - 1)).to(torch.float64 if dtype == torch.float32 else torch.float32)

    result = minimize(bowl, vector(3.0, 2.0).to(dtype), jac=jac)
    assert result.success
    assert result.x.dtype == result.grad.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(jac=lambda x: x.sum()), ValueError, "gradient from jac must have .* shapes of x0"),
        (dict(jac=lambda x: None), ValueError, "gradient from jac must have .* shapes of x0"),
        (dict(jac=lambda x: x.numpy()), (TypeError, ValueError), "gradient from jac must .*tensor"),
        (dict(jac="2-point"), TypeError, "jac must be .*got '2-point'"),
        (dict(jac=True), (TypeError, ValueError), "jac=True.*value.*gradient"),
        (dict(hvp=lambda x, v: v.sum(), method="newton"), ValueError, "product from hvp must have .* shapes of x0"),
        (dict(hvp=3, method="newton-cg"), TypeError, "hvp must be .*got 3"),
        (dict(callback=3), TypeError, "callback must be .*got 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_own_functions_that_do_not_fit_are_errors(arguments: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=rf"minimize: .*{words}"):
        minimize(bowl, vector(3.0, 2.0), **arguments)


# The callback.


@each_solver
def test_callback_sees_every_iteration(options: dict[str, Any]) -> None:
    seen: list[Progress] = []
    result = minimize(rosenbrock, vector(-1.2, 1.0), callback=seen.append, max_iter=15, **options)
    assert [progress.n_iter for progress in seen] == list(range(1, result.n_iter + 1))
    for progress, iteration in zip(seen, result.history[1:], strict=True):
        assert (progress.fun, progress.grad_norm) == (iteration.fun, iteration.grad_norm)
        assert (progress.n_eval, progress.n_hvp) == (iteration.n_eval, iteration.n_hvp)
        assert rosenbrock(progress.x).item() == progress.fun
        assert torch.equal(progress.grad, slope(rosenbrock, progress.x))


@pytest.mark.parametrize("name", QUICK)
def test_callback_sees_the_last_iteration_too(name: str) -> None:
    seen: list[Progress] = []
    result = minimize(rosenbrock, vector(-1.2, 1.0), callback=seen.append, **SOLVERS[name])
    assert result.success
    assert len(seen) == result.n_iter
    assert torch.equal(seen[-1].x, result.x)


def test_callback_sees_the_structure_of_x0() -> None:
    x0 = {"a": [vector(3.0), torch.zeros(2)]}
    seen: list[Progress] = []
    minimize(distance, x0, callback=seen.append, tol=1e-12)
    assert seen
    assert_alike(seen[0].x, x0)
    assert_alike(seen[0].grad, x0)


def raises_stop(progress: Progress) -> None:
    if progress.n_iter == 2:
        raise StopIteration


@each_solver
@pytest.mark.parametrize("callback", [stop, raises_stop, lambda p: torch.tensor(p.n_iter == 2)], ids=["a", "b", "c"])
def test_callback_stops(callback: Callable[[Progress], Any], options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(rosenbrock), vector(-1.2, 1.0)
    result = minimize(recorder, x0, callback=callback, **options)
    assert (result.status, result.n_iter) == (Status.stopped_by_callback, 2)
    assert_honest(result, recorder, x0, 1e-6)


def test_callback_may_use_autograd() -> None:
    def callback(progress: Progress) -> None:
        x = progress.x.clone().requires_grad_()
        rosenbrock(x).backward()
        assert torch.equal(x.grad, progress.grad)

    assert minimize(rosenbrock, vector(-1.2, 1.0), callback=callback).success


# Hostile functions.


def no_graph_outside(x: Tensor) -> Tensor:
    """What people write for "infinite elsewhere": a constant, of which autograd knows nothing."""
    return logarithms(x) if bool((x > 0).all()) else torch.tensor(math.inf)


def raises_outside(x: Tensor) -> Tensor:
    """Positive definite only where all x are positive."""
    return x.sum() - 0.01 * torch.linalg.cholesky(torch.diag(x)).diagonal().log().sum() + x.square().sum()


@each_solver
@pytest.mark.parametrize(
    "fun",
    [
        logarithms,
        no_graph_outside,
        raises_outside,
        lambda x: torch.where(x > 0, x, -math.inf).sum() + 1e-3 / x.abs().sum(),  # an abyss, not a minimum
    ],
    ids=["nan", "inf", "error", "-inf"],
)
def test_walls_are_not_crossed(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    x0 = vector(2.0, 3.0)
    result = minimize(fun, x0, max_iter=200, **options)
    assert bool((result.x > 0).all())
    assert math.isfinite(result.fun)
    assert result.fun < fun(x0).item()
    assert result.fun == fun(result.x).item()
    if fun in (logarithms, no_graph_outside, raises_outside):
        assert result.success


@each_solver
def test_falling_into_a_wall_is_no_success(options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(wall), vector(0.0, 1.0)
    result = minimize(recorder, x0, **options)
    assert result.status in (Status.non_finite, Status.line_search_failed, Status.precision_limit)
    assert_honest(result, recorder, x0, 1e-6)
    assert result.fun < -2.5
    assert result.n_eval < 1000


@each_method
def test_error_at_the_start_is_the_callers(method: str) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        minimize(raises_outside, vector(-1.0, 1.0), method)


@each_solver
def test_constant_is_solved_at_once(options: dict[str, Any]) -> None:
    result = minimize(lambda x: (x * 0).sum() + 7, vector(1.0, 2.0), **options)
    assert (result.status, result.n_eval, result.fun) == (Status.converged, 1, 7.0)


@each_solver
@pytest.mark.parametrize(
    "fun",
    [lambda x: x.sum(), lambda x: -x.exp().sum(), lambda x: -(x**2).sum(), lambda x: -(x.abs() + 1).log().sum()],
    ids=["linear", "exponential", "parabola", "logarithm"],
)
def test_unbounded_is_no_success(fun: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    result = minimize(fun, vector(1.0, 2.0), max_eval=20_000, **{**options, "bounds": None})
    assert result.n_eval < 3000  # it gives up by itself
    assert bool(result.x.isfinite().all())
    assert math.isfinite(result.fun)
    if fun(vector(1.0, 2.0)) != -vector(2.0, 3.0).log().sum():  # the slope of a logarithm goes to zero
        assert result.status in (Status.line_search_failed, Status.non_finite, Status.precision_limit)


@each_solver
@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_kink_is_an_honest_failure(tilt: float, options: dict[str, Any]) -> None:
    recorder, x0 = Recorder(lambda x: (x.abs() + tilt * x).sum()), vector(1.3, -0.7)
    result = minimize(recorder, x0, max_eval=3000, **options)
    assert_honest(result, recorder, x0, 1e-6, options.get("bounds"))
    assert result.fun < 1e-3


@each_solver
@pytest.mark.parametrize("factor", [1e8, 1e25, 1e150, 1e200, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_values_are_minimized(dtype: torch.dtype, factor: float, options: dict[str, Any]) -> None:
    if factor > 1e30 and dtype == torch.float32:
        return
    result = minimize(lambda x: factor * bowl(x), vector(3.0, -1.0).to(dtype), **options)
    assert result.success
    assert float((result.x - 1).abs().max()) < 1e-3


@each_solver
@pytest.mark.parametrize("factor", [1e-8, 1e-25, 1e-150, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_values_are_minimized_if_asked_for(dtype: torch.dtype, factor: float, options: dict[str, Any]) -> None:
    if factor < 1e-30 and dtype == torch.float32:
        return
    x0 = vector(3.0, -1.0).to(dtype)
    assert minimize(lambda x: factor * bowl(x), x0, **options).n_eval == 1
    result = minimize(lambda x: factor * bowl(x), x0, tol=1e-3 * factor, **options)
    assert result.success
    assert float((result.x - 1).abs().max()) < 1e-2


@each_solver
@pytest.mark.parametrize("unit", [1e-200, 1e-100, 1e-12, 1e12, 1e100, 1e200])
def test_variables_may_have_any_unit(unit: float, options: dict[str, Any]) -> None:
    x0 = vector(3.0, -1.0) * unit
    target = 1e-3 * min(1.0, 1 / unit)
    result = minimize(lambda x: bowl(x / unit), x0, tol=target, **{**options, **far(options, 1e4 * unit)})
    assert result.success
    assert float((result.x / unit - 1).abs().max()) < 1e-2


def far(options: dict[str, Any], limit: float) -> dict[str, Any]:
    return dict(bounds=(-limit, limit)) if "bounds" in options else {}


@each_solver
@pytest.mark.parametrize("level", [1e-8, 1e-3])
def test_noise_ends_at_its_level(level: float, options: dict[str, Any]) -> None:
    recorder = Recorder(lambda x: bowl(x) + level * torch.rand((), dtype=torch.float64))
    result = minimize(recorder, vector(3.0, -1.0), tol=1e-12, max_eval=2000, **options)
    assert result.fun == recorder.least
    assert bowl(result.x).item() <= 2 * level


@each_solver
@pytest.mark.parametrize(
    ("fun", "error", "words"),
    [
        (lambda x: x, ValueError, r" must return a real scalar tensor, got shape \(2,\).*sum"),
        (lambda x: x[:0], ValueError, r"scalar tensor, got shape \(0,\)"),
        (lambda x: x.sum() * 1j, ValueError, "real scalar tensor, got .*complex128"),
        (lambda x: (x > 0).sum(), ValueError, "real scalar tensor, got .*int64"),
        (lambda x: x.sum().item(), TypeError, "scalar tensor, got float"),
        (lambda x: None, TypeError, "scalar tensor, got NoneType"),
        (lambda x: (x.sum(), x), TypeError, "scalar tensor, got tuple"),
        (lambda x: x.detach().sum(), RuntimeError, "does not depend on .*autograd.*detach"),
        (lambda x: torch.ones((), requires_grad=True) * 2, RuntimeError, "does not depend on .*autograd"),
        (lambda x: torch.tensor(1.0), RuntimeError, "does not depend on .*autograd"),
    ],
    ids=["vector", "nothing", "complex", "integer", "float", "None", "tuple", "detached", "other", "constant"],
)
@pytest.mark.parametrize("is_parameter", [False, True])
def test_wrong_returns_are_errors(
    fun: Any, error: type[Exception], words: str, is_parameter: bool, options: dict[str, Any]
) -> None:
    x0 = nn.Parameter(vector(3.0, -1.0)) if is_parameter else vector(3.0, -1.0)
    with pytest.raises(error, match=rf"(?s)minimize: fun.*{words}"):
        minimize(fun, x0, **options)


@each_solver
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_value_may_be_a_tensor_with_one_element(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    assert minimize(lambda x: bowl(x).reshape(shape), vector(3.0, -1.0), **options).success


def changes_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(min=1.5)
    return bowl(x)


@each_solver
@pytest.mark.parametrize("jac", [None, lambda x: 2 * (x - 1)], ids=["autograd", "jac"])
def test_function_that_changes_its_argument_is_an_error_or_harmless(jac: Any, options: dict[str, Any]) -> None:
    x0, points = vector(3.0, -1.0), []

    def fun(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        return changes_argument(x)

    hvp = (lambda x, v: 2 * v) if "newton" in options.get("method", "") and jac else None
    try:
        result = minimize(fun, x0, jac=jac, hvp=hvp, max_iter=50, **options)
    except (RuntimeError, ValueError) as error:
        assert "in place" in str(error) or "in-place" in str(error)
    else:
        assert any(torch.equal(result.x, point) for point in points)
    assert torch.equal(x0, vector(3.0, -1.0))


@each_solver
def test_errors_of_the_function_come_through(options: dict[str, Any]) -> None:
    calls = []

    def fun(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 4:
            raise KeyError("mine")
        return rosenbrock(x)

    with pytest.raises(KeyError, match="mine"):
        minimize(fun, vector(-1.2, 1.0), **options)
    assert minimize(rosenbrock, vector(-1.2, 1.0), max_iter=3, **options).n_iter == 3


def test_sizes_that_do_not_fit_into_memory_are_told_before() -> None:
    n = 10_000_000
    for method, instead in (("bfgs", "l-bfgs"), ("newton", "newton-cg")):
        with pytest.raises(MemoryError, match=rf"10,000,000 variables needs .* GiB .*{instead}"):
            minimize(lambda x: (x * x).sum(), torch.ones(n), method)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(method="BFGS"), "method must be one of .*'l-bfgs'.* got 'BFGS'"),
        (dict(method=None), "method must be one of .* got None"),
        (dict(tol=-1.0), "tol must be .*>= 0, got -1.0"),
        (dict(tol=math.nan), "tol must be .* got nan"),
        (dict(tol=INF), "tol must be .* got inf"),
        (dict(tol="1e-3"), "tol must be .* got '1e-3'"),
        (dict(max_iter=-1), "max_iter must be an integer >= 0, got -1"),
        (dict(max_iter=1.5), "max_iter must be an integer >= 0, got 1.5"),
        (dict(max_eval=0), "max_eval must be an integer >= 1, got 0"),
        (dict(history_size=0), "history_size must be an integer >= 1, got 0"),
        (dict(method="gd", history_size=3), "history_size is for method='l-bfgs', got method='gd'"),
        (dict(method="newton", bounds=(0, 1)), "bounds is for method='l-bfgs', got method='newton'"),
        (dict(bounds=0), r"bounds must be \(lower, upper\), got 0"),
        (dict(bounds=(0, 1, 2)), r"bounds must be \(lower, upper\), got"),
        (dict(bounds=(1, 0)), "lower <= upper, .*got 1 and 0 at position 0"),
        (dict(bounds=(vector(0, 3), vector(1, 2))), "lower <= upper, .*got 3 and 2 at position 1"),
        (dict(bounds=(0, math.nan)), "without NaN, got 0 and nan"),
        (dict(bounds=(vector(0, INF), INF)), "got inf and inf at position 1"),
        (dict(bounds=(-INF, vector(0, -INF))), "got -inf and -inf at position 1"),
        (dict(bounds=("0", None)), "the lower bound must be numbers or tensors .*got '0'"),
        (dict(bounds=(None, vector(0, 0, 0))), r"the upper bound must .*broadcast .*\(2,\).*got"),
        (dict(bounds=[(0, 1), (0, 1)]), "the lower bound must be one number or tensor .*got"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], words: str) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises((ValueError, TypeError), match=rf"(?s)minimize: .*{words}"):
        minimize(never, vector(0.0, 0.0), **arguments)


def test_complex_numbers_have_no_bounds() -> None:
    with pytest.raises(ValueError, match="complex"):
        minimize(distance, torch.zeros(2, dtype=torch.complex64), bounds=(0, 1))


@pytest.mark.parametrize("history_size", [1, 2, 50])
@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0)])
def test_history_may_have_any_size(history_size: int, bounds: Any) -> None:
    assert minimize(rosenbrock, torch.zeros(6).double(), history_size=history_size, bounds=bounds).success


def test_public_names() -> None:
    assert {"minimize", "Result", "Status", "Progress"} <= set(descend.__all__)


# The many ways to be wrong, at random.


def random_problems(seed: int) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, tuple[Tensor, Tensor]]]:
    """Functions with many minima, kinks, walls and valleys, starts, and bounds, some of them equal or infinite."""
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
        lower[normal(n) > 0.5], upper[normal(n) > 0.5] = -INF, INF
        for kind in kinds:
            yield (lambda x, kind=kind, units=units: kind(x * units)), normal(n) / units, (lower, upper)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seed", range(4))
def test_results_of_random_problems_are_honest(name: str, seed: int) -> None:
    for _, (fun, x0, bounds) in zip(range(18), random_problems(seed), strict=False):
        recorder, options = Recorder(fun), SOLVERS[name]
        box = bounds if "bounds" in options else None
        start = x0 if box is None else x0.clamp(*box)
        result = minimize(recorder, x0, max_eval=100, **{**options, "bounds": box})
        assert len(recorder.values) <= 100
        if recorder.is_finite[0]:
            assert_honest(result, recorder, start, 1e-6, box)
        else:
            assert result.status is Status.non_finite
        if box is not None:
            assert_inside(recorder, *box)
