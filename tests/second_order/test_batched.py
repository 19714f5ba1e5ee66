"""Many problems at once are solved as they are one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batched_cases import FAMILIES, Family, bowls, logarithms, quartics, random, valleys, waves
from minimize_cases import one_thread  # noqa: F401
from torch import Tensor

from descend import Status, minimize
from descend.second_order import batched
from descend.second_order.mathematics import arrays, batched_box, batched_trust_region
from descend.second_order.problem import batched_objective

METHODS: dict[str, dict[str, Any]] = {
    "l-bfgs": {},
    "bfgs": dict(method="bfgs"),
    "newton": dict(method="newton"),
    "l-bfgs-b": dict(bounds=(-1e300, math.inf)),  # too far away to matter
}
each_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def solve(family: Family, **options: Any) -> Any:
    return minimize(family.fun, family.x0, args=(family.data,), batched=True, **options)


class Recorder:
    """A function that records which problems were evaluated, and where."""

    def __init__(self, fun: Any) -> None:
        self.fun, self.calls, self.points = fun, [], []

    def __call__(self, x: Tensor, rows: Tensor, *args: Any) -> Tensor:
        if x.requires_grad:  # else it is the check that problems are independent
            self.calls.append(rows.tolist())
            self.points.append(x.detach().clone())
        return self.fun(x, *args)

    def count_of(self, row: int) -> int:
        return sum(call.count(row) for call in self.calls)


def recorded(family: Family, **options: Any) -> tuple[Recorder, Any]:
    recorder = Recorder(family.fun)
    rows = torch.arange(len(family.x0))
    return recorder, minimize(recorder, family.x0, args=(rows, family.data), batched=True, **options)


# Equal to single runs. Rounding grows along a long run, in a batch as from a start that is one ulp away.


@pytest.mark.parametrize(
    ("family", "options"),
    [*itertools.product(FAMILIES, METHODS.values()), (FAMILIES[2], dict(history_size=3))],
    ids=lambda value: str(value),
)
def test_results_are_those_of_single_runs(family: Family, options: dict[str, Any]) -> None:
    many, distances, n_equal = solve(family, **options), [], 0
    for i in range(len(family.x0)):
        alone, one = family.single(i, **options), many[i]
        assert one.status == alone.status
        n_equal += (one.n_iter, one.n_eval, one.n_hvp) == (alone.n_iter, alone.n_eval, alone.n_hvp)
        assert one.n_negative_curvature == alone.n_negative_curvature
        distances.append(float((one.x - alone.x).abs().max()))
        for entry, other in zip(one.history[:10], alone.history[:10], strict=True):
            assert family.fun is quartics or tuple(entry) == pytest.approx(tuple(other), rel=1e-6, abs=1e-8)
    assert n_equal >= 0.6 * len(many)
    assert sorted(distances)[len(distances) // 2] <= (1e-2 if family.fun is quartics else 1e-9)


@each_method
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1], FAMILIES[3], FAMILIES[6]], ids=str)
def test_minima_in_float32_are_those_of_single_runs(family: Family, options: dict[str, Any]) -> None:
    family = family.to(torch.float32)
    many = solve(family, **options)
    assert (many.x.dtype, many.fun.dtype) == (torch.float32, torch.float64)
    singles = [family.single(i, **options) for i in range(len(many))]
    assert sum(one.success for one in singles) <= many.success.sum() + 1
    lowest = torch.tensor([one.fun for one in singles])
    assert (
        (many.fun - lowest).abs() <= 0.05 * (1 + lowest.abs())
    ).all()  # in a flat valley the tolerance is met anywhere


@pytest.mark.parametrize("family", [FAMILIES[1], FAMILIES[4], FAMILIES[6]], ids=str)
def test_problems_that_cannot_converge_say_so(family: Family) -> None:
    many = solve(family, tol=1e-17)
    singles = [family.single(i, tol=1e-17) for i in range(len(many))]
    assert not bool((many.success & (many.grad_norm > 1e-14)).any())
    assert abs(sum(one.success for one in singles) - int(many.success.sum())) <= 2
    assert torch.allclose(many.fun, torch.tensor([one.fun for one in singles], dtype=torch.float64), atol=1e-12)
    assert set(many.status) <= {Status.converged, Status.precision_limit, Status.line_search_failed}


def test_history_of_a_problem_is_that_of_a_single_run() -> None:
    family = FAMILIES[1]
    many = solve(family)
    for i in (0, 7, 10):
        alone = family.single(i)
        assert len(many[i].history) == many[i].n_iter + 1
        for entry, other in zip(many[i].history, alone.history, strict=True):
            assert entry == pytest.approx(other, rel=1e-6)


@each_method
def test_results_do_not_depend_on_the_other_problems(options: dict[str, Any]) -> None:
    family = FAMILIES[2]
    together = solve(family, **options)
    for rows in ([0], [3, 2], [4, 3, 1]):
        some = solve(family.of(rows), **options)
        assert torch.equal(some.n_eval, together.n_eval[rows])
        assert torch.allclose(some.x, together.x[rows], rtol=1e-9, atol=1e-9)


def test_same_call_gives_the_same_bits() -> None:
    once, again = (solve(FAMILIES[3]) for _ in range(2))
    assert torch.equal(once.x, again.x)
    assert torch.equal(once.n_eval, again.n_eval)
    assert once[4].history == again[4].history


@each_method
def test_tensors_of_a_device_take_the_same_steps(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    family = FAMILIES[1]
    on_cpu = solve(family, **options)
    for module in (arrays, batched, batched_box, batched_objective, batched_trust_region):
        monkeypatch.setattr(module, "array_of", lambda tensor: tensor.detach())
    as_on_device = solve(family, **options)
    assert as_on_device.status == on_cpu.status
    assert (as_on_device.n_eval == on_cpu.n_eval).double().mean() > 0.9
    assert torch.allclose(as_on_device.x, on_cpu.x, atol=1e-6)


# Bounds.

BOUNDS: list[tuple[Any, Any]] = [(-0.5, 0.8), (0.2, None), (None, 0.9), (0.1, 0.1), (1 / 3, 2 / 3)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@each_family
def test_bounded_results_are_those_of_single_runs(family: Family, bounds: tuple[Any, Any]) -> None:
    recorder, many = recorded(family, bounds=bounds)
    low, high = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
    assert all(bool(((points >= low) & (points <= high)).all()) for points in recorder.points)
    for i in range(0, len(many), 2):
        alone = family.single(i, bounds=bounds)
        assert many.status[i] == alone.status
        assert abs(many[i].n_eval - alone.n_eval) <= 2
        assert torch.allclose(many.x[i], alone.x, atol=1e-6)


def test_every_problem_has_its_own_bounds() -> None:
    family = FAMILIES[2]
    lower, upper = random(5, 10, seed=2, low=-1.0, high=0.5), random(5, 1, seed=4, low=0.5, high=0.9)
    lower[1], upper[3] = -math.inf, math.inf
    recorder, many = recorded(family, bounds=(lower, upper))
    for points, call in zip(recorder.points, recorder.calls, strict=True):
        assert bool(((points >= lower[call]) & (points <= upper[call])).all())
    for i in range(5):
        alone = family.single(i, bounds=(lower[i], upper[i]))
        assert (many.status[i], many[i].n_eval) == (alone.status, alone.n_eval)
        assert torch.allclose(many.x[i], alone.x, atol=1e-8)
        assert many[i].grad_norm == pytest.approx(alone.grad_norm, rel=1e-3, abs=1e-9)


def test_bounds_in_float32_are_kept_by_rounded_steps() -> None:
    family = FAMILIES[2].to(torch.float32)
    recorder, many = recorded(family, bounds=(1 / 3, 2 / 3))
    inside = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    assert all(bool(((p.double() >= inside[0]) & (p.double() <= inside[1])).all()) for p in recorder.points)
    assert many.success.all()


# Results are true.


@each_method
@each_family
def test_results_are_true(family: Family, options: dict[str, Any]) -> None:
    recorder, result = recorded(family, **options)
    leaf = result.x.clone().requires_grad_()
    value = family.fun(leaf, family.data)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.allclose(value, result.fun, rtol=1e-12, atol=1e-300)
    assert torch.allclose(grad, result.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.grad.abs().amax(1), result.grad_norm)
    assert result.n_eval.tolist() == [recorder.count_of(row) for row in range(len(result))]
    start = family.x0.clone().requires_grad_()
    (first,) = torch.autograd.grad(family.fun(start, family.data).sum(), start)
    target = 1e-6 * first.abs().amax(1).clamp(min=1.0)
    assert torch.equal(result.success, result.grad_norm <= target)
    assert [status is Status.converged for status in result.status] == result.success.tolist()


def test_finished_problems_leave_the_batch() -> None:
    recorder, result = recorded(FAMILIES[1])
    sizes = [len(call) for call in recorder.calls]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 5 < sizes[0] == 11
    assert sum(sizes) == int(result.n_eval.sum())
    assert result.n_calls == len(sizes) + 1


@each_method
def test_points_that_were_evaluated_stay_as_they_are(options: dict[str, Any]) -> None:
    seen = []

    def fun(x: Tensor, phases: Tensor) -> Tensor:
        value = waves(x, phases)
        seen.append((x.detach(), x.detach().clone(), value.detach(), value.detach().clone()))
        return value

    x0, phases = FAMILIES[3].x0.clone(), FAMILIES[3].data
    minimize(fun, x0, args=(phases,), batched=True, **options)
    assert torch.equal(x0, FAMILIES[3].x0)
    for x, x_then, value, value_then in seen:
        assert torch.equal(x, x_then)
        assert torch.equal(value, value_then)


@each_method
def test_limits_hold_for_each_problem(options: dict[str, Any]) -> None:
    family = FAMILIES[1]
    free = solve(family, **options)
    for limit in (1, 2, 7, 20):
        recorder, result = recorded(family, max_eval=limit, **options)
        assert max(recorder.count_of(row) for row in range(11)) <= limit
        for status, reached, n_eval in zip(result.status, free.n_eval.tolist(), result.n_eval.tolist(), strict=True):
            assert status is (Status.converged if reached <= limit else Status.max_eval)
            assert n_eval == min(limit, reached)
    for limit in (0, 5):
        result = solve(family, max_iter=limit, **options)
        assert torch.equal(result.n_iter, free.n_iter.clamp(max=limit))
        for status, reached in zip(result.status, free.n_iter.tolist(), strict=True):
            assert status is (Status.converged if reached <= limit else Status.max_iter)
    assert torch.equal(solve(family, max_iter=0).x, family.x0)


# Hostile problems beside good ones.


def hostile(x: Tensor, kind: Tensor) -> Tensor:
    """By kind: a bowl, NaN everywhere, infinity beyond 2, falling without end, a kink, NaN left of 0, a jump."""
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x - 1).square().sum(1),
        lambda x: math.nan * x.sum(1),
        lambda x: torch.where(x < 2, -x, torch.inf).sum(1) + 0.1 * x.square().sum(1),
        lambda x: -x.sum(1),
        lambda x: (x - 1).abs().sum(1),
        lambda x: (x - 0.01 * x.log()).sum(1),
        lambda x: x.square().sum(1) - 4 * x.sum(1) + torch.where(x.sum(1) > 2.1, 1.0, 0.0),
    ]
    value = torch.zeros(len(x), dtype=x.dtype)
    for number, function in enumerate(functions):
        (rows,) = torch.nonzero(kind == number, as_tuple=True)
        value = value.index_add(0, rows, function(x[rows]))
    return value


@each_method
def test_hostile_problems_leave_the_others_alone(options: dict[str, Any]) -> None:
    kinds = torch.tensor([0, 1, 0, 2, 3, 0, 4, 5, 6, 0, 1])
    x0 = random(11, 2, low=0.3, high=1.4)
    result = minimize(hostile, x0, args=(kinds,), batched=True, **options)
    for i, kind in enumerate(kinds.tolist()):
        alone = minimize(lambda x, k: hostile(x[None], k[None])[0], x0[i], args=(kinds[i],), **options)
        assert result.status[i] == alone.status, kind
        assert kind in (2, 4) or result[i].n_eval == alone.n_eval  # at a wall or a kink, rounding decides
        assert torch.allclose(result.x[i], alone.x, rtol=1e-6, atol=1e-6)
        assert not result.x[i].isnan().any()
        if kind == 0:
            assert result.status[i] is Status.converged
            assert torch.allclose(result.x[i], torch.ones(2, dtype=torch.float64))


def test_failed_factorizations_concern_only_their_problem() -> None:
    def fun(x: Tensor) -> Tensor:
        """Log-barriers of matrices that must be positive definite."""
        matrices = torch.diag_embed(x)
        factors = torch.linalg.cholesky(matrices)
        return x.sum(1) - 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)

    x0 = torch.tensor([[3.0, 0.1], [-1.0, 1.0], [40.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
    result = minimize(fun, x0, batched=True)
    assert result.status == ["converged", "non_finite", "converged", "converged"]
    assert torch.allclose(result.x[[0, 2, 3]], torch.ones(3, 2, dtype=torch.float64), atol=1e-5)
    assert torch.equal(result.x[1], x0[1])
    for i in (0, 2, 3):
        assert result[i].n_eval == minimize(lambda x: fun(x[None])[0], x0[i]).n_eval


def test_domain_errors_concern_only_their_problem() -> None:
    def fun(x: Tensor) -> Tensor:
        if bool((x <= 0).any()):
            raise ArithmeticError
        return (x - x.log()).sum(1)

    x0 = torch.tensor([[3.0], [-1.0], [20.0]], dtype=torch.float64)
    result = minimize(fun, x0, batched=True, domain_errors=ArithmeticError)
    assert result.status == ["converged", "non_finite", "converged"]
    with pytest.raises(ArithmeticError):
        minimize(fun, x0, batched=True)


# Shapes and structures.


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (1, 1), (4, 0), (3, 1), (2,), (5, 2, 3), (0,)])
def test_any_shape_will_do(shape: tuple[int, ...]) -> None:
    x0 = torch.full(shape, 3.0, dtype=torch.float64)
    result = minimize(lambda x: (x - 1).square().flatten(1).sum(1) if x.dim() > 1 else (x - 1) ** 2, x0, batched=True)
    assert result.x.shape == result.grad.shape == shape
    assert torch.allclose(result.x, torch.ones_like(x0))
    assert len(result) == len(list(result)) == shape[0]
    assert result.success.all()
    assert {tuple(number.shape) for number in (result.fun, result.n_iter, result.n_eval, result.n_hvp)} == {shape[:1]}


def test_structures_keep_their_shapes_and_dtypes() -> None:
    x0 = {
        "matrix": random(4, 2, 3),
        "pair": (random(4).float(), random(4, 2).to(torch.complex64)),
        "half": [random(4, 1).half()],
    }

    def fun(tree: Any) -> Tensor:
        first, second = tree["pair"]
        return (
            (tree["matrix"] - 1).square().sum((1, 2))
            + (first - 2).double() ** 2
            + (second - 1j).abs().double().square().sum(1)
            + (tree["half"][0].double() - 0.5).square().sum(1)
        )

    before = x0["matrix"].clone()
    result = minimize(fun, x0, batched=True, tol=1e-3)
    assert result.success.all()
    assert torch.equal(x0["matrix"], before)
    assert result.x["pair"][1].dtype == torch.complex64
    assert torch.allclose(result.x["pair"][1], torch.full((4, 2), 1j, dtype=torch.complex64), atol=1e-2)
    assert result[2].x["matrix"].shape == (2, 3)
    assert result[-1].x["half"][0].dtype == torch.float16


def test_args_of_each_problem_are_cut_and_others_are_not() -> None:
    seen = []

    def fun(x: Tensor, data: dict[str, Any], shared: Tensor, number: float) -> Tensor:
        seen.append((len(x), len(data["center"]), len(shared)))
        return (x - data["center"]).square().sum(1) * number + data["steepness"] * shared.sum() * x[:, 0] ** 4

    data = dict(center=random(5, 2), steepness=10 ** random(5))
    result = minimize(fun, random(5, 2, seed=3), args=(data, torch.ones(3), 2.0), batched=True)
    assert result.success.all()
    assert all(count == cut and whole == 3 for count, cut, whole in seen)
    assert min(count for count, *_ in seen) < 5


def test_given_gradients_are_used() -> None:
    centers = random(6, 3)

    def both(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        return bowls(x.detach(), centers), 2 * (x - centers)

    x0 = random(6, 3, seed=9)
    separate = minimize(
        lambda x, centers: bowls(x.detach(), centers),
        x0,
        args=(centers,),
        jac=lambda x, centers: 2 * (x - centers),
        batched=True,
    )
    for result in (minimize(both, x0, args=(centers,), jac=True, batched=True), separate):
        assert torch.equal(result.n_eval, solve(Family(bowls, x0, centers)).n_eval)
        assert torch.allclose(result.x, centers)


def test_newton_differentiates_given_gradients() -> None:
    centers, x0 = random(4, 2), random(4, 2, seed=5)
    result = minimize(
        lambda x, centers: quartics(x.detach(), centers),
        x0,
        "newton",
        args=(centers,),
        jac=lambda x, centers: 4 * (x - centers) ** 3,
        batched=True,
    )
    assert torch.equal(result.n_eval, minimize(quartics, x0, "newton", args=(centers,), batched=True).n_eval)
    with pytest.raises(RuntimeError, match="autograd cannot see how the gradient from jac depends on x"):
        minimize(bowls, x0, "newton", args=(centers,), jac=lambda x, c: 2 * (x.detach() - c), batched=True)


def test_newton_leaves_saddles_where_single_runs_do() -> None:
    def saddles(x: Tensor) -> Tensor:
        return x[:, 0] ** 2 - x[:, 1] ** 2 + x[:, 1] ** 4

    x0 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    result = minimize(saddles, x0, "newton", batched=True)
    assert torch.allclose(result.fun, torch.full((3,), -0.25, dtype=torch.float64), rtol=1e-9)
    for i in range(3):
        alone = minimize(lambda x: saddles(x[None])[0], x0[i], "newton")
        assert (result[i].n_eval, result[i].n_hvp) == (alone.n_eval, alone.n_hvp)
        assert result[i].n_negative_curvature == alone.n_negative_curvature
    assert minimize(saddles, x0, "newton", batched=True, max_iter=0).n_hvp.sum() == 0


def test_dense_matrices_must_fit() -> None:
    with pytest.raises(MemoryError, match="for 1,000,000 problems of 2,000 variables need"):
        minimize(bowls, torch.zeros(1).expand(10**6, 2000), "newton", batched=True)


# Callbacks.


def test_callback_sees_all_problems_after_each_round() -> None:
    family, seen = FAMILIES[1], []
    result = solve(family, callback=seen.append)
    for progress in seen:
        assert progress.x.shape == progress.grad.shape == (11, 2)
        assert torch.allclose(progress.fun, valleys(progress.x, family.data))
        assert torch.allclose(progress.grad_norm, progress.grad.abs().amax(1))
    assert torch.equal(seen[-1].x, result.x)
    assert torch.equal(seen[-1].n_iter, result.n_iter)
    assert torch.equal(seen[-1].n_eval, result.n_eval)


def test_callback_stops_all_problems_or_some() -> None:
    def stop(progress: Any) -> None:
        raise StopIteration

    for callback in (lambda progress: True, stop):
        result = solve(FAMILIES[2], callback=callback)
        assert set(result.status) == {Status.stopped_by_callback}
        assert result.n_iter.max() == 1
    result = solve(FAMILIES[2], callback=lambda progress: (progress.n_iter >= 4) & (torch.arange(5) % 2 == 0))
    for i, status in enumerate(result.status):
        assert status is (Status.converged if i % 2 else Status.stopped_by_callback)
        assert i % 2 or result[i].n_iter == 4
    with pytest.raises(ValueError, match=r"a tensor of 5 of them, one for each problem; got shape \(2,\)"):
        solve(FAMILIES[2], callback=lambda progress: torch.zeros(2))


# The best of many starts.


def test_best_of_many_starts_is_the_lowest() -> None:
    family = FAMILIES[3]
    best = minimize(lambda x: waves(x, torch.zeros(1)), family.x0, batched="best")
    assert best.fun == best.starts.fun.min().item()
    assert torch.equal(best.x, best.starts.x[best.starts.fun.argmin()])
    assert best.success
    assert len(best.starts) == 9
    assert len(best.history) == best.n_iter + 1


def test_best_start_is_not_one_that_failed() -> None:
    kinds = torch.tensor([3, 0, 1])
    best = minimize(hostile, random(3, 2, low=0.3, high=1.4), args=(kinds,), batched="best")
    assert best.starts.fun.nan_to_num(0).argmin() == 0  # falls without end
    assert (best.status, best.fun) == (Status.converged, pytest.approx(0.0, abs=1e-10))
    best = minimize(hostile, random(2, 2, low=0.3, high=1.4), args=(torch.tensor([1, 3]),), batched="best")
    assert math.isfinite(best.fun)
    with pytest.raises(ValueError, match="needs at least one start"):
        minimize(bowls, torch.zeros(0, 2), args=(torch.zeros(0, 2),), batched="best")


def test_repr_counts_statuses() -> None:
    result = minimize(hostile, random(3, 2, low=0.3, high=1.4), args=(torch.tensor([0, 1, 0]),), batched=True)
    assert repr(result).startswith("BatchedResult(3 problems: 2 converged, 1 non_finite; n_calls=")
    assert result.message[1].startswith("The function or its gradient is NaN")
    with pytest.raises(IndexError, match="there are 3 problems, got index 3"):
        result[3]
    with pytest.raises(TypeError, match="index must be an integer, got slice"):
        result[:2]  # type: ignore[index]


# Errors.


def mixed(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum(1)


def of_fixed_size(x: Tensor) -> Tensor:
    return (x - random(5, 2)).square().sum(1)


def dropped(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x).square().sum(1)


@pytest.mark.parametrize(
    ("fun", "error", "message"),
    [
        (mixed, ValueError, "fun must not mix the problems of a batch"),
        (dropped, ValueError, "must return the same values again"),
        (of_fixed_size, ValueError, "fun took 5 problems, but not 3 of them"),
        (lambda x: x.square().sum(), ValueError, r"of shape \(5,\), a value for each problem, got shape \(\)"),
        (lambda x: x.square().sum(1, keepdim=True), ValueError, r"got shape \(5, 1\)"),
        (lambda x: x.sum(1) > 0, ValueError, "got shape .* and torch.bool"),
        (lambda x: 1.0, TypeError, "a value for each problem, got float"),
        (lambda x: torch.ones(len(x)), RuntimeError, "do not depend on its argument"),
        (lambda x: x.add_(1).sum(1), RuntimeError, "in.place"),
    ],
)
def test_functions_of_other_kinds_are_errors(fun: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minimize(fun, random(5, 2), batched=True)


@pytest.mark.parametrize(
    ("x0", "options", "error", "message"),
    [
        (torch.nn.Linear(2, 2), {}, ValueError, "plain tensors .* got parameters"),
        ([torch.nn.Parameter(torch.zeros(2, 2))], {}, ValueError, "plain tensors .* got parameters"),
        (torch.zeros(()), {}, ValueError, "the first dimension of every tensor"),
        ([torch.zeros(2, 1), torch.zeros(3, 1)], {}, ValueError, r"got shapes \(2, 1\), \(3, 1\)"),
        (torch.zeros(2, 2), dict(method="gd"), ValueError, "batched needs a method of .* got 'gd'"),
        (torch.zeros(2, 2), dict(method="newton-cg"), ValueError, "batched needs a method of"),
        (torch.zeros(2, 2), dict(method="newton", hvp=print), ValueError, "hvp is for single problems"),
        (torch.zeros(2, 2), dict(method="bfgs", bounds=(0, 1)), ValueError, "bounds is for method='l-bfgs'"),
        (torch.zeros(2, 2), dict(bounds=(torch.zeros(3), None)), ValueError, "broadcast to the shapes of x0"),
        (torch.zeros(2, 2), dict(args=[1]), TypeError, "args must be a tuple"),
        (torch.zeros(2, 2), dict(batched="all"), ValueError, "batched must be False, True or 'best', got 'all'"),
        (torch.zeros(2, 2), dict(batched=1), ValueError, "batched must be False, True or 'best', got 1"),
    ],
)
def test_other_arguments_are_errors(x0: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minimize(logarithms, x0, **{"batched": True, **options})


def test_errors_of_the_function_come_through() -> None:
    def fun(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        minimize(fun, torch.zeros(2, 2), batched=True)
