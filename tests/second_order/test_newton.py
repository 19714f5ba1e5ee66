"""Newton's method, as ``minimize``'s methods and as a class."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descend import Newton, Status, minimize
from descend.second_order.problem import objective

SOLVERS = pytest.mark.parametrize("solver", ["cholesky", "cg"])
METHODS = pytest.mark.parametrize("method", ["newton", "newton-cg"])


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(n: int, far: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Strictly convex, with condition 1e6 and its minimum 0 away from the origin."""
    generator = torch.Generator().manual_seed(n)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    curvature = torch.logspace(0, 6, n, dtype=torch.float64)
    centre = far * torch.randn(n, generator=generator, dtype=torch.float64)
    return lambda x: 0.5 * (curvature * (basis @ (x - centre)) ** 2).sum()


def saddle(x: Tensor) -> Tensor:
    """Stationary at 0, with minima of -1/4 at x[1] = +-sqrt(1/2)."""
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def singular(x: Tensor) -> Tensor:
    """The Hessian has rank one everywhere: minima fill a plane."""
    return (x.sum() - 1) ** 2


def fourth_power(x: Tensor) -> Tensor:
    """The Hessian vanishes at the minimum."""
    return (x - 1).pow(4).sum()


def make(x: Tensor, **options: Any) -> tuple[nn.Parameter, Newton]:
    param = nn.Parameter(x.clone())
    return param, Newton([param], **options)


def solve(optimizer: Newton, closure: Callable[[], Tensor], steps: int = 30) -> None:
    for _ in range(steps):
        optimizer.step(closure)
        assert optimizer.result is not None
        if optimizer.result.success:
            return


# The methods.


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("far", [1.0, 1e6])
def test_strictly_convex_quadratic_takes_one_iteration(n: int, far: float) -> None:
    result = minimize(quadratic(n, far), torch.zeros(n, dtype=torch.float64), "newton")
    assert (result.status, result.n_iter, result.n_eval, result.n_hvp) == (Status.converged, 1, 2, n)


# Conjugate gradients know the Hessian along the gradient only: that has to have a part across the ridge.
@pytest.mark.parametrize(
    ("method", "x0"),
    [
        ("newton", vector(-2.0, 1e-9)),
        *((method, x0) for method in ("newton", "newton-cg") for x0 in (vector(1.0, 1e-3), vector(0.5, -0.1))),
    ],
    ids=str,
)
def test_saddle_is_left_along_negative_curvature(method: str, x0: Tensor) -> None:
    result = minimize(saddle, x0, method)
    assert result.success
    assert result.fun == pytest.approx(-0.25)
    assert result.n_negative_curvature > 0


def test_start_at_a_saddle_is_seen_by_the_dense_hessian() -> None:
    result = minimize(saddle, vector(0.0, 0.0), "newton")
    assert result.success
    assert result.fun == pytest.approx(-0.25)


@METHODS
@pytest.mark.parametrize("fun", [singular, fourth_power, rosenbrock])
def test_singular_hessian_is_no_obstacle(method: str, fun: Callable[[Tensor], Tensor]) -> None:
    result = minimize(fun, vector(3.0, -1.0, 2.0), method, tol=1e-10)
    assert result.success
    assert result.fun < 1e-8


def test_hessian_is_made_once_a_point() -> None:
    result = minimize(rosenbrock, vector(-1.2, 1.0), "newton")
    assert result.n_hvp == 2 * result.n_iter


def test_rejected_steps_cost_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Tensor]] = []
    product = objective.FunctionObjective.product
    monkeypatch.setattr(
        objective.FunctionObjective,
        "product",
        lambda self, point, v: seen.append((self.n_eval, point.x)) or product(self, point, v),
    )
    result = minimize(rosenbrock, vector(-1.2, 1.0), "newton-cg")
    assert result.n_eval > result.n_iter + 1  # some were rejected
    # All products at a point follow its evaluation at once.
    first = {id(x): n_eval for n_eval, x in reversed(seen)}
    assert all(first[id(x)] == n_eval for n_eval, x in seen)
    assert len(first) <= result.n_iter + 1


@METHODS
def test_values_that_tell_nothing_leave_it_to_the_slopes(method: str) -> None:
    result = minimize(lambda x: rosenbrock(x) + 1e10, vector(-1.2, 1.0).float(), method, tol=0.0, max_eval=500)
    assert result.n_eval < 500
    assert result.status is (Status.converged if result.grad_norm == 0 else Status.precision_limit)
    assert result.grad_norm < 1e-3


class Rounded(torch.autograd.Function):
    """The value with seven digits, and an exact gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.float().to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@METHODS
@pytest.mark.parametrize("level", [0.0, 1.0, 1e6])
def test_rounded_values_do_not_stop_it(method: str, level: float) -> None:
    result = minimize(lambda x: Rounded.apply(rosenbrock(x) + level), vector(-1.2, 1.0, 0.5), method)
    assert result.success
    assert float((result.x - 1).abs().max()) < 1e-4


@METHODS
def test_noise_in_the_gradient_ends_soon(method: str) -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] + 1e-6 * torch.sin(1e9 * grads[0].detach() + 1)

    result = minimize(lambda x: rosenbrock(Noisy.apply(x)), vector(-1.2, 1.0), method, tol=0.0)
    assert result.status is Status.precision_limit
    assert result.n_eval < 150


# The class.


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_minimizes(solver: str, dtype: torch.dtype) -> None:
    param, optimizer = make(torch.full((6,), -1.0, dtype=dtype), solver=solver, tolerance_grad=1e-6)
    solve(optimizer, lambda: rosenbrock(param))
    assert optimizer.result is not None
    assert optimizer.result.success
    assert float((param.detach() - 1).abs().max()) < 1e-2


@SOLVERS
def test_step_returns_the_loss_where_it_began(solver: str) -> None:
    param, optimizer = make(vector(3.0, 4.0), solver=solver)
    loss = optimizer.step(lambda: rosenbrock(param))
    assert float(loss.detach()) == float(rosenbrock(vector(3.0, 4.0)))


@SOLVERS
def test_groups_dtypes_and_idle_parameters_are_one_problem(solver: str) -> None:
    used, other = nn.Parameter(vector(3.0, -1.0)), nn.Parameter(torch.full((2, 2), 4.0))
    idle, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Newton([{"params": [used, idle]}, {"params": [other, frozen]}], solver=solver)
    solve(optimizer, lambda: rosenbrock(used) + (other.double() - 2).square().sum())
    assert optimizer.result is not None
    assert optimizer.result.success
    assert float((other.detach() - 2).abs().max()) < 1e-3
    assert idle.tolist() == [1, 1, 1]
    assert frozen.tolist() == [1, 1]


@SOLVERS
def test_maximize_is_the_negative_problem(solver: str) -> None:
    up, ascent = make(vector(3.0, -1.0), solver=solver, maximize=True)
    down, descent = make(vector(3.0, -1.0), solver=solver)
    ascent.step(lambda: -rosenbrock(up))
    descent.step(lambda: rosenbrock(down))
    assert torch.equal(up, down)
    assert ascent.result is not None
    assert descent.result is not None
    assert ascent.result.fun == -descent.result.fun


@SOLVERS
@pytest.mark.parametrize("max_eval", [1, 2, 3, 7])
def test_max_eval_is_never_exceeded(solver: str, max_eval: int) -> None:
    param, optimizer = make(vector(-1.2, 1.0), solver=solver, max_iter=100, max_eval=max_eval)
    calls = []
    optimizer.step(lambda: calls.append(1) or rosenbrock(param))
    assert len(calls) == max_eval


def reload(optimizer: Newton) -> Newton:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    param = nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())
    fresh = Newton([param], max_iter=3, solver=optimizer.param_groups[0]["solver"])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@SOLVERS
@pytest.mark.parametrize(
    "duplicate",
    [reload, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copy_goes_on_identically(solver: str, duplicate: Callable[[Newton], Newton], dtype: torch.dtype) -> None:
    _, optimizer = make(torch.full((5,), -1.0, dtype=dtype), solver=solver, max_iter=3)

    def go_on(some: Newton) -> Tensor:
        (param,) = some.param_groups[0]["params"]
        some.step(lambda: rosenbrock(param))
        return param

    go_on(optimizer)
    other = duplicate(optimizer)
    for _ in range(3):
        assert torch.equal(go_on(optimizer), go_on(other))
    counts = [some.state_dict()["state"][0]["func_evals"] for some in (optimizer, other)]
    assert counts[0] == counts[1] > 8


def test_step_without_closure_makes_the_state_only() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    assert optimizer.step() is None
    assert param.tolist() == [3, 4]
    assert optimizer.state_dict()["state"] == {0: {"func_evals": 0, "n_iter": 0, "n_hvp": 0}}


@SOLVERS
@pytest.mark.parametrize("number", [1, 2, 4])
def test_error_leaves_the_best_point(solver: str, number: int) -> None:
    param, optimizer = make(vector(-1.2, 1.0), solver=solver)
    values: list[float] = []

    def closure() -> Tensor:
        if len(values) == number:
            raise KeyError("mine")
        loss = rosenbrock(param)
        values.append(loss.item())
        return loss

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert rosenbrock(param.detach()).item() == min(values)
    optimizer.step(lambda: rosenbrock(param))
    assert rosenbrock(param.detach()).item() < min(values)


@SOLVERS
def test_parameters_stay_in_the_domain(solver: str) -> None:
    param, optimizer = make(vector(0.9, 0.8), solver=solver)
    solve(optimizer, lambda: (param**2 - param.log()).sum() + torch.sqrt(2 - param.sum()))
    assert bool(param.isfinite().all())


@SOLVERS
def test_closure_that_uses_the_graph_up_is_an_error(solver: str) -> None:
    param, optimizer = make(vector(3.0, 4.0), solver=solver)

    def closure() -> Tensor:
        loss = rosenbrock(param)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="without calling backward"):
        optimizer.step(closure)
    assert param.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (lambda: None, TypeError, "scalar tensor, got NoneType"),
        (lambda: torch.ones(2, requires_grad=True) * 2, ValueError, "real scalar tensor, got shape"),
        (lambda: torch.tensor(1.0), RuntimeError, "does not depend on the parameters"),
    ],
)
def test_wrong_closures_are_errors(closure: Any, error: type[Exception], words: str) -> None:
    param, optimizer = make(vector(3.0, 4.0))
    with pytest.raises(error, match=words):
        optimizer.step(closure)
    assert param.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(solver="lu"), "solver must be one of"),
        (dict(max_iter=-1), "max_iter must be a number >= 0"),
        (dict(max_iter=None), "max_iter must be a number >= 0"),
        (dict(max_iter="many"), "max_iter must be a number >= 0"),
        (dict(tolerance_grad=float("nan")), "tolerance_grad must be a number >= 0"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(vector(1.0), **options)
    with pytest.raises(ValueError, match=r"one problem|must be"):
        Newton([{"params": [nn.Parameter(vector(1.0))]}, {"params": [nn.Parameter(vector(2.0))], **options}])


def test_dense_hessian_that_does_not_fit_is_refused_before_anything_happens() -> None:
    _, optimizer = make(torch.zeros(3_000_000), solver="cholesky")
    with pytest.raises(MemoryError, match=r"3,000,000 variables needs .* GiB .*solver='cg'"):
        optimizer.step(lambda: pytest.fail("evaluated"))
    assert optimizer.result is None


def test_conjugate_gradients_never_make_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "free_memory", lambda device: 0)
    param, optimizer = make(torch.zeros(200_000))
    target = torch.linspace(-1, 1, 200_000)
    solve(optimizer, lambda: ((param - target) ** 2 + (param - target) ** 4).sum())
    assert optimizer.result is not None
    assert optimizer.result.success
    assert float((param.detach() - target).abs().max()) < 1e-3


def test_hessian_of_parameters_in_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs = torch.randn(9, 2, dtype=torch.float64)

    def run() -> list[float]:
        model = copy.deepcopy(net)
        optimizer = Newton(model.parameters(), solver="cholesky", max_iter=4)
        optimizer.step(lambda: (model(inputs) - inputs.prod(1, keepdim=True)).square().mean())
        assert optimizer.result is not None
        return [entry.fun for entry in optimizer.result.history]

    whole = run()
    monkeypatch.setattr(objective, "BATCH", 30)
    assert run() == pytest.approx(whole, rel=1e-9)


def test_gradients_are_left_alone() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    param.grad = vector(7.0, 8.0)
    optimizer.step(lambda: rosenbrock(param))
    assert param.grad.tolist() == [7, 8]
