"""The class ``LeastSquares``."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import least_squares as scipy_least_squares
from torch import Tensor, nn

from descend import LeastSquares, Status
from descend.second_order.problem import objective
from descend.second_order.solvers import sized_linearization

ways = pytest.mark.parametrize(
    "way", [dict(method=method, jac=jac) for method in ("trust-region", "lm") for jac in ("dense", "products")], ids=str
)
TIME = torch.linspace(0, 4, 30, dtype=torch.float64)
NOISE = 0.02 * torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TRUTH = torch.tensor([2.0, 0.7, 0.5], dtype=torch.float64)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * TIME.to(x)) + x[2]


def residuals(x: Tensor) -> Tensor:
    return decay(x) - (decay(TRUTH) + NOISE).to(x)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.cat((10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]))


def make(x: Tensor, **options: Any) -> tuple[nn.Parameter, LeastSquares]:
    param = nn.Parameter(x.clone())
    return param, LeastSquares([param], **options)


def solve(optimizer: LeastSquares, closure: Callable[[], Any], steps: int = 30) -> None:
    for _ in range(steps):
        optimizer.step(closure)
        assert optimizer.result is not None
        if optimizer.result.success:
            return


@ways
@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy", "arctan"])
def test_solution_is_scipys(way: dict[str, Any], loss: str) -> None:
    outlier = torch.zeros_like(TIME)
    outlier[7] = 1.0
    param, optimizer = make(vector(1.6, 0.9, 0.3), loss=loss, loss_scale=0.1, **way)
    solve(optimizer, lambda: residuals(param) - outlier)
    tight = dict(xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac")
    expected = scipy_least_squares(
        lambda x: (residuals(torch.tensor(x)) - outlier).numpy(), [1.6, 0.9, 0.3], loss=loss, f_scale=0.1, **tight
    )
    assert optimizer.result is not None
    assert optimizer.result.success
    assert optimizer.result.fun == pytest.approx(expected.cost, rel=1e-9)
    torch.testing.assert_close(param.detach(), torch.from_numpy(expected.x), rtol=1e-5, atol=1e-6)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curved_valley_is_followed(way: dict[str, Any], dtype: torch.dtype) -> None:
    param, optimizer = make(torch.tensor([-1.2, 1.0, 0.5], dtype=dtype), **way)
    solve(optimizer, lambda: rosenbrock(param))
    assert optimizer.result is not None
    assert optimizer.result.success
    assert float((param.detach() - 1).abs().max()) < 1e-3


@ways
def test_bounds_hold_at_every_evaluation(way: dict[str, Any]) -> None:
    lower, upper = vector(0.0, 0.0, 0.0), vector(1.5, 5.0, 0.3)
    param, optimizer = make(vector(9.0, 1.0, 0.1), bounds=(lower, upper), **way)

    def closure() -> Tensor:
        assert bool(((param >= lower) & (param <= upper)).all())
        return residuals(param)

    solve(optimizer, closure)
    tight = dict(xtol=1e-15, ftol=1e-15, gtol=1e-15, x_scale="jac", bounds=(lower.numpy(), upper.numpy()))
    expected = scipy_least_squares(lambda x: residuals(torch.tensor(x)).numpy(), [1.0, 1.0, 0.1], **tight)
    assert optimizer.result is not None
    assert optimizer.result.success
    assert optimizer.result.fun == pytest.approx(expected.cost, rel=1e-8)
    assert param[0] == 1.5


def test_bounds_of_a_group_and_by_name() -> None:
    scale, rate, level = (nn.Parameter(vector(number)) for number in (1.0, 1.0, 0.1))
    groups = [
        {"params": [("scale", scale), ("rate", rate)]},
        {"params": [("level", level)], "bounds": (None, 0.3)},
    ]
    optimizer = LeastSquares(groups, bounds={"scale": (0, 1.5)})
    solve(optimizer, lambda: residuals(torch.cat((scale, rate, level))))
    assert scale.item() == 1.5
    assert level.item() == pytest.approx(0.3) or level.item() < 0.3
    with pytest.raises(ValueError, match="lower bound of scale is above"):
        LeastSquares(groups, bounds={"scale": (2, 1)})


def test_step_returns_the_cost_where_it_began() -> None:
    param, optimizer = make(vector(1.0, 1.0, 0.0), loss="huber", loss_scale=0.2)
    cost = optimizer.step(lambda: residuals(param))
    r = residuals(vector(1.0, 1.0, 0.0)) / 0.2
    expected = 0.5 * 0.04 * torch.where(r.abs() <= 1, r**2, 2 * r.abs() - 1).sum()
    assert float(cost) == pytest.approx(float(expected))
    assert optimizer.result is not None
    assert optimizer.result.fun < float(cost)


@ways
def test_module_and_structures_of_residuals(way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = torch.rand(40, 2, dtype=torch.float64)
    target = inputs.prod(1, keepdim=True)
    optimizer = LeastSquares(net, max_iter=30, **way)
    first = optimizer.step(lambda: {"fit": net(inputs) - target, "decay": [1e-3 * p for p in net.parameters()]})
    assert optimizer.result is not None
    assert optimizer.result.fun < 1e-2 * float(first)


@ways
def test_groups_dtypes_and_idle_parameters_are_one_problem(way: dict[str, Any]) -> None:
    used, other = nn.Parameter(vector(1.0, 1.0, 0.0)), nn.Parameter(torch.full((2, 2), 4.0))
    idle, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = LeastSquares([{"params": [used, idle]}, {"params": [other, frozen]}], **way)
    solve(optimizer, lambda: [residuals(used), other - 2])
    assert optimizer.result is not None
    assert optimizer.result.success
    torch.testing.assert_close(other.detach(), torch.full((2, 2), 2.0), rtol=1e-4, atol=1e-4)
    assert idle.tolist() == [1, 1, 1]
    assert frozen.tolist() == [1, 1]


@ways
@pytest.mark.parametrize("max_eval", [1, 2, 3, 5])
def test_max_eval_is_never_exceeded(way: dict[str, Any], max_eval: int) -> None:
    param, optimizer = make(vector(-1.2, 1.0), max_iter=100, max_eval=max_eval, **way)
    calls: list[int] = []
    optimizer.step(lambda: calls.append(1) or rosenbrock(param))
    assert len(calls) == max_eval
    assert optimizer.result is not None
    assert (optimizer.result.n_eval, optimizer.result.status) == (max_eval, Status.max_eval)


def test_no_iterations_evaluate_once() -> None:
    param, optimizer = make(vector(-1.2, 1.0), max_iter=0)
    assert float(optimizer.step(lambda: rosenbrock(param))) == pytest.approx(12.1)
    assert optimizer.result is not None
    assert (optimizer.result.status, optimizer.result.n_eval) == (Status.max_iter, 1)
    assert param.tolist() == [-1.2, 1.0]


def reload(optimizer: LeastSquares) -> LeastSquares:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = optimizer.param_groups[0]
    fresh = LeastSquares([nn.Parameter(group["params"][0].detach().clone())], method=group["method"])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@ways
@pytest.mark.parametrize(
    "duplicate",
    [reload, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copy_goes_on_identically(
    way: dict[str, Any], duplicate: Callable[[LeastSquares], LeastSquares], dtype: torch.dtype
) -> None:
    _, optimizer = make(torch.full((4,), -1.0, dtype=dtype), max_iter=2, **way)

    def go_on(some: LeastSquares) -> Tensor:
        (param,) = some.param_groups[0]["params"]
        some.step(lambda: rosenbrock(param))
        return param

    go_on(optimizer)
    other = duplicate(optimizer)
    for _ in range(3):
        assert torch.equal(go_on(optimizer), go_on(other))
    counts = [some.state_dict()["state"][0]["func_evals"] for some in (optimizer, other)]
    assert counts[0] == counts[1] >= 8


@pytest.mark.parametrize(("method", "carried"), [("trust-region", "radius"), ("lm", "damping")])
def test_region_is_carried_until_it_has_converged(method: str, carried: str) -> None:
    param, optimizer = make(vector(-1.2, 1.0), method=method, max_iter=2)
    optimizer.step(lambda: rosenbrock(param))
    state = optimizer.state_dict()["state"][0]
    assert state[carried] > 0
    assert state["norms"].shape == (2,)
    solve(optimizer, lambda: rosenbrock(param))
    assert carried not in optimizer.state_dict()["state"][0]
    before = optimizer.state_dict()["state"][0]["func_evals"]
    solve(optimizer, lambda: rosenbrock(param - 10))  # other data: as many evaluations as from anywhere
    assert optimizer.state_dict()["state"][0]["func_evals"] < before + 60


def test_radius_that_was_carried_is_used() -> None:
    param, optimizer = make(vector(-1.2, 1.0), max_iter=1)
    optimizer.step(lambda: rosenbrock(param))
    saved = optimizer.state_dict()
    saved["state"][0]["radius"] = 1e-6
    optimizer.load_state_dict(saved)
    before = param.detach().clone()
    optimizer.step(lambda: rosenbrock(param))
    assert 0 < float((param.detach() - before).norm()) < 1e-6


def test_step_without_closure_makes_the_state_only() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    assert optimizer.step() is None
    assert param.tolist() == [3, 4]
    assert optimizer.state_dict()["state"] == {0: {"func_evals": 0, "n_iter": 0, "n_jac": 0, "n_hvp": 0}}


@ways
@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_error_leaves_the_best_point(way: dict[str, Any], number: int) -> None:
    param, optimizer = make(vector(-1.2, 1.0), **way)
    values: list[float] = [math.inf] if number == 0 else []

    def closure() -> Tensor:
        if len(values) == max(number, 1):
            raise KeyError("mine")
        r = rosenbrock(param)
        values.append(r.square().sum().item())
        return r

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    value = rosenbrock(param.detach()).square().sum().item()
    assert value == (min(values) if number else pytest.approx(24.2))
    optimizer.step(lambda: rosenbrock(param))
    assert rosenbrock(param.detach()).square().sum().item() < value


@ways
def test_nan_is_a_wall(way: dict[str, Any]) -> None:
    param, optimizer = make(vector(3.0, 2.0), **way)
    solve(optimizer, lambda: torch.stack((param[0].log() + 1, (param[1] - 0.5).sqrt() - 0.1, param.prod() / 9)))
    assert bool(param.isfinite().all())
    assert optimizer.result is not None
    assert optimizer.result.success


@ways
def test_nan_at_the_start_is_said(way: dict[str, Any]) -> None:
    param, optimizer = make(vector(-1.0, 2.0), **way)
    optimizer.step(lambda: param.log())
    assert optimizer.result is not None
    assert optimizer.result.status is Status.non_finite
    assert param.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (lambda: None, TypeError, "must return real or complex floating point tensors"),
        (lambda: torch.ones(2, dtype=torch.int64), TypeError, "got torch.int64"),
        (lambda: torch.tensor([1.0]), RuntimeError, "values that do not depend on"),
    ],
)
def test_wrong_closures_are_errors(closure: Any, error: type[Exception], words: str) -> None:
    param, optimizer = make(vector(3.0, 4.0))
    with pytest.raises(error, match=f"LeastSquares: the closure.*{words}"):
        optimizer.step(closure)
    assert param.tolist() == [3, 4]


def test_other_shapes_than_before_are_an_error_in_one_step_only() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    sizes = iter([4, 3])
    with pytest.raises(ValueError, match="same structure and shapes at each call"):
        optimizer.step(lambda: param.repeat(4)[: next(sizes)] - 1)
    optimizer.step(lambda: param - 1)  # another batch in the next step
    assert param.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(method="dogleg"), "method must be one of"),
        (dict(loss="square"), "loss must be one of"),
        (dict(jac="2-point"), "jac must be one of"),
        (dict(max_iter=-1), "max_iter must be an integer >= 0"),
        (dict(max_iter=1.5), "max_iter must be an integer >= 0"),
        (dict(max_iter=None), "max_iter must be an integer >= 0, got None"),
        (dict(max_iter=True), "max_iter must be an integer >= 0, got True"),
        (dict(max_eval=0), "max_eval must be an integer >= 1"),
        (dict(tol=math.inf), "tol must be a finite number >= 0"),
        (dict(tol=10**400), "tol must be a finite number >= 0"),
        (dict(tol=float("nan")), "tol must be a finite number >= 0"),
        (dict(loss_scale=0.0), "loss_scale must be a finite number > 0"),
        (dict(loss_scale="big"), "loss_scale must be a number"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(vector(1.0), **options)
    with pytest.raises(ValueError, match=r"one problem|must be"):
        LeastSquares([{"params": [nn.Parameter(vector(1.0))]}, {"params": [nn.Parameter(vector(2.0))], **options}])


def test_closure_that_is_no_function_is_an_error() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    with pytest.raises(TypeError, match="LeastSquares: closure must be a function, got Tensor"):
        optimizer.step(param - 1)


@pytest.mark.parametrize("jac", ["dense", "products"])
@pytest.mark.parametrize("count", [1, 3])
def test_residuals_of_another_model_are_an_error(jac: str, count: int) -> None:
    _, optimizer = make(vector(3.0, 4.0), jac=jac)
    other = nn.Parameter(vector(1.0, 2.0))
    with pytest.raises(RuntimeError, match=r"do not depend on the parameters.*those of the model"):
        optimizer.step(lambda: other.repeat(count) - 1)


@pytest.mark.parametrize("jac", ["dense", "products"])
def test_closure_that_calls_backward_is_an_error(jac: str) -> None:
    param, optimizer = make(vector(3.0, 4.0), jac=jac)

    def closure() -> Tensor:
        residuals = param**3 - 1
        residuals.square().sum().backward()
        return residuals

    with pytest.raises(RuntimeError, match=r"graph is used up. Return them without calling backward"):
        optimizer.step(closure)


def test_dense_jacobian_that_does_not_fit_is_refused() -> None:
    param, optimizer = make(torch.zeros(3_000_000), jac="dense")
    with pytest.raises(MemoryError, match="dense Jacobian of 3,000,000 residuals"):
        optimizer.step(lambda: param - 1)


def test_large_problems_take_products_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "free_memory", lambda device: 0)
    monkeypatch.setattr(sized_linearization, "free_memory", lambda device: 0)
    param, optimizer = make(torch.zeros(100_000, dtype=torch.float64))
    target = torch.linspace(-1, 1, 100_000, dtype=torch.float64)
    solve(optimizer, lambda: torch.cat((param - target, 0.5 * (param - target) ** 2)))
    assert optimizer.result is not None
    assert optimizer.result.success
    assert float((param.detach() - target).abs().max()) < 1e-6
    assert optimizer.state_dict()["state"][0]["n_jac"] == 0


def test_gradients_are_left_alone() -> None:
    param, optimizer = make(vector(3.0, 4.0))
    param.grad = vector(7.0, 8.0)
    optimizer.step(lambda: rosenbrock(param))
    assert param.grad.tolist() == [7, 8]


def test_complex_parameters_and_residuals() -> None:
    param = nn.Parameter(torch.tensor([1.0 + 1.0j], dtype=torch.complex128))
    optimizer = LeastSquares([param])
    solve(optimizer, lambda: param**2 - (3 + 4j))
    assert param.item() == pytest.approx(2 + 1j)
