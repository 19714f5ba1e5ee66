"""Many fits at once have the minima of single fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from minimize_cases import one_thread  # noqa: F401
from torch import Tensor

from descend import LeastSquaresResult, Status, least_squares
from descend.second_order import batched, batched_least_squares
from descend.second_order.mathematics import arrays
from descend.second_order.problem import batched_objective, batched_residuals
from descend.second_order.solvers import batched_least_squares as rounds

TIMES = torch.linspace(0, 4, 21, dtype=torch.float64)


def decays(p: Tensor, data: Tensor) -> Tensor:
    return p[:, :1] * torch.exp(-p[:, 1:] * TIMES.to(p)) - data


def peaks(p: Tensor, data: Tensor) -> Tensor:
    height, center, width = (part.unsqueeze(2) for part in p.split(2, 1))
    return (height * torch.exp(-(((TIMES.to(p) - center) / width) ** 2))).sum(1) - data


def valleys(p: Tensor, steepness: Tensor) -> Tensor:  # fewer residuals than variables and as many
    return torch.stack([steepness[:, 0] * (p[:, 1] - p[:, 0] ** 2), 1 - p[:, 0]], 1)


def underdetermined(p: Tensor, data: Tensor) -> Tensor:
    return p[:, :1] * torch.exp(p[:, 1:2]) + p[:, 2:] - data


class Family(NamedTuple):
    fun: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    data: Tensor

    def single(self, i: int, **options: Any) -> LeastSquaresResult[Tensor]:
        return least_squares(lambda p: self.fun(p[None], self.data[i : i + 1])[0], self.x0[i], **options)

    def solve(self, **options: Any) -> Any:
        return least_squares(self.fun, self.x0, args=(self.data,), batched=True, **options)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def families() -> dict[str, Family]:
    true = torch.tensor([2.0, 0.8]) + 0.1 * random(0, 9, 2)
    tops = torch.tensor([1.0, 1.5, 1.0, 3.0, 0.5, 0.6]) * (1 + 0.05 * random(1, 9, 6))
    noise = 0.02 * random(2, 9, 21)
    return {
        "decays": Family(decays, torch.ones(9, 2).double(), decays(true, noise)),
        "peaks": Family(peaks, tops * (1 + 0.05 * random(3, 9, 6)), peaks(tops, noise)),
        "valleys": Family(
            valleys, torch.tensor([[-1.2, 1.0]]).double() + 0.1 * random(4, 9, 2), 1 + random(5, 9, 1) ** 2
        ),
        "underdetermined": Family(underdetermined, random(6, 9, 3), random(7, 9, 1)),
    }


FAMILIES = families()
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_family
@pytest.mark.parametrize("loss", ["linear", "soft_l1", lambda z: torch.log1p(z)], ids=["linear", "soft_l1", "own"])
def test_results_and_evaluations_are_those_of_single_runs(family: Family, loss: Any) -> None:
    many = family.solve(loss=loss, loss_scale=0.1)
    assert many.success.all(), many
    assert len(many) == 9
    for i, one in enumerate(many):
        alone = family.single(i, loss=loss, loss_scale=0.1)
        assert isinstance(one, LeastSquaresResult)
        assert (one.n_iter, one.n_eval, one.status) == (alone.n_iter, alone.n_eval, alone.status)
        assert one.fun == pytest.approx(alone.fun, rel=1e-9, abs=1e-14)
        assert one.rank == alone.rank == many.rank[i]
        if family.fun is not underdetermined:
            assert torch.allclose(one.x, alone.x, rtol=1e-4, atol=1e-5)
            for found, expected in ((one.covariance, alone.covariance), (many.covariance[i], alone.covariance)):
                assert torch.allclose(found, expected, rtol=1e-2, atol=1e-7, equal_nan=True)
        assert torch.equal(one.residuals, family.fun(one.x[None], family.data[i : i + 1])[0])
        assert len(one.history) == one.n_iter + 1


def test_jacobians_are_those_of_functional_autograd() -> None:
    for family in FAMILIES.values():
        many = family.solve(max_iter=2)
        jacobian, fun = torch.autograd.functional.jacobian, family.fun
        expected = torch.stack(
            [
                jacobian(lambda p, y=y, fun=fun: fun(p[None], y[None])[0], x)
                for x, y in zip(many.x, family.data, strict=True)
            ]
        )
        assert torch.allclose(many.jac, expected, atol=1e-12)
        assert torch.allclose(many.grad, (many.residuals[:, None] @ many.jac)[:, 0])


class Once(torch.autograd.Function):
    """The exponential, with a backward pass whose derivative autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return (grad.detach() * value).detach()


def test_functions_that_are_differentiable_once_will_do() -> None:
    x, y = FAMILIES["decays"].x0, FAMILIES["decays"].data
    many = least_squares(lambda p, y: p[:, :1] * Once.apply(-p[:, 1:] * TIMES) - y, x, args=(y,), batched=True)
    assert many.success.all()
    assert torch.allclose(many.x, FAMILIES["decays"].solve().x, atol=1e-7)


class Twice(torch.autograd.Function):
    """The exponential, which autograd differentiates as often as it likes, but vmap not at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * Twice.apply(x)


def test_functions_that_vmap_does_not_know_will_do() -> None:
    x, y = FAMILIES["decays"].x0, FAMILIES["decays"].data
    many = least_squares(lambda p, y: p[:, :1] * Twice.apply(-p[:, 1:] * TIMES) - y, x, args=(y,), batched=True)
    assert many.success.all()
    assert torch.equal(many.n_eval, FAMILIES["decays"].solve().n_eval)
    assert torch.allclose(many.x, FAMILIES["decays"].solve().x, atol=1e-9)


def test_all_columns_at_once_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = FAMILIES["peaks"].solve(max_iter=3)
    monkeypatch.setattr(batched_residuals, "SMALL", 0)
    assert torch.allclose(FAMILIES["peaks"].solve(max_iter=3).jac, at_once.jac, rtol=1e-12, atol=1e-14)


def test_no_jacobian_where_no_trial_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = batched_residuals.BatchedResiduals._set_jacobians
    monkeypatch.setattr(
        batched_residuals.BatchedResiduals,
        "_set_jacobians",
        lambda self, *given: (made.append(1), original(self, *given))[1],
    )
    x0 = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    one = least_squares(lambda p: valleys(p, p.new_full((1, 1), 10.0)), x0, batched=True)
    assert one.success.all()
    assert len(made) == one.n_iter + 1 < one.n_eval


def test_long_valleys_take_no_more_evaluations_than_alone() -> None:
    times = torch.linspace(0, 5, 50, dtype=torch.float64)

    def three(p: Tensor) -> Tensor:
        height, center, width = p[:, 0:3, None], p[:, 3:6, None], p[:, 6:9, None].exp()
        return (height * torch.exp(-0.5 * ((times - center) / width) ** 2)).sum(1)

    tops = torch.tensor([[1.0, 0.8, 1.2, 1.0, 2.5, 4.0, -1.0, -0.7, -1.0]], dtype=torch.float64)
    data = three(tops) + 0.05 * random(20, 6, 50)
    x0 = tops + 0.3 * random(21, 6, 9)
    many = least_squares(lambda p, y: three(p) - y, x0, args=(data,), batched=True, max_eval=60)
    alone = [least_squares(lambda p, i=i: (three(p[None]) - data[i])[0], x0[i], max_eval=60) for i in range(6)]
    assert many.n_eval.max() >= 20
    assert many.n_eval.sum() <= 1.2 * sum(one.n_eval for one in alone)  # rounding may lead elsewhere


@each_family
def test_float32_reaches_the_same_minima(family: Family) -> None:
    small = Family(family.fun, family.x0.float(), family.data.float())
    many, exact = small.solve(), family.solve()
    assert (many.x.dtype, many.residuals.dtype, many.fun.dtype) == (torch.float32, torch.float32, torch.float64)
    assert set(many.status) <= {Status.converged, Status.precision_limit}
    assert torch.allclose(many.fun, exact.fun, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.9), (0.9, math.inf), (0.0, torch.linspace(0.5, 3, 18).view(9, 2))])
def test_bounded_minima_are_scipys_and_no_point_is_outside(bounds: Any) -> None:
    family, (lower, upper) = FAMILIES["decays"], (torch.as_tensor(end).double().expand(9, 2) for end in bounds)
    seen: list[bool] = []

    def recorded(p: Tensor, data: Tensor, low: Tensor, high: Tensor) -> Tensor:
        seen.append(bool(((p >= low) & (p <= high)).all()))
        return decays(p, data)

    many = least_squares(recorded, family.x0, (lower, upper), args=(family.data, lower, upper), batched=True)
    assert all(seen)
    assert many.success.all(), many
    for i in range(9):
        start = family.x0[i].clamp(lower[i], upper[i]).numpy()
        scipys = scipy.optimize.least_squares(
            lambda p, i=i: decays(torch.tensor(p)[None], family.data[i : i + 1])[0].numpy(),
            start,
            bounds=(lower[i].numpy() - 1e-9, upper[i].numpy() + 1e-9),
            xtol=1e-12, ftol=1e-14, gtol=1e-12,
        )  # fmt: skip
        assert float(many.fun[i]) == pytest.approx(scipys.cost, rel=1e-5)
        np.testing.assert_allclose(many.x[i], scipys.x, atol=1e-4)


@pytest.mark.parametrize("name", ["peaks", "valleys"])
def test_bounded_minima_are_those_of_single_runs(name: str) -> None:
    family = FAMILIES[name]
    free, side = family.solve().x, torch.where(random(10, *family.x0.shape) > 0, 1.0, -1.0)
    lower = free + 0.3 * side * random(11, *family.x0.shape).abs()  # beyond half of the minima, or before
    bounds = lower, lower + 0.4
    many = family.solve(bounds=bounds)
    assert many.success.all(), many
    assert ((many.x == bounds[0]) | (many.x == bounds[1])).double().mean() > 0.3
    for i in range(9):
        alone = family.single(i, bounds=(bounds[0][i], bounds[1][i]))
        assert float(many.fun[i]) == pytest.approx(alone.fun, rel=1e-6, abs=1e-15)


def test_tensors_of_a_device_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    family, options = FAMILIES["peaks"], dict(bounds=(0.1, 2.9), callback=lambda progress: False)
    on_cpu = family.solve(**options)
    for module in (arrays, batched, batched_least_squares, batched_objective, batched_residuals, rounds):
        monkeypatch.setattr(module, "array_of", lambda tensor: tensor.detach())
    as_on_device = family.solve(**options)
    assert as_on_device.status == on_cpu.status
    assert torch.equal(as_on_device.n_eval, on_cpu.n_eval)
    assert torch.allclose(as_on_device.x, on_cpu.x, atol=1e-9)


def test_jacobians_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_residuals, "free_memory", lambda device: 2**28)
    assert len(least_squares(lambda p: p.repeat(1, 30), torch.ones(10, 40), batched=True, max_eval=1)) == 10
    with pytest.raises(MemoryError, match="1,200 residuals and 40 variables"):
        least_squares(lambda p: p.repeat(1, 30), torch.ones(1000, 40), batched=True, max_eval=1)


def test_results_do_not_depend_on_the_others_and_repeat() -> None:
    family = FAMILIES["peaks"]
    together, again = family.solve(), family.solve()
    assert torch.equal(together.x, again.x)
    assert torch.equal(together.n_eval, again.n_eval)
    for rows in ([0], [8, 2, 5]):
        some = Family(family.fun, family.x0[rows], family.data[rows]).solve()
        assert torch.allclose(some.x, together.x[rows], atol=1e-9)
        assert some.status == [together.status[row] for row in rows]


def test_hostile_problems_leave_the_others_alone() -> None:
    family = FAMILIES["decays"]
    kind = torch.tensor([0, 1, 2, 3, 0, 4, 0, 0, 0])

    def hostile(p: Tensor, data: Tensor, kind: Tensor) -> Tensor:
        if (kind == 4).any():
            raise torch.linalg.LinAlgError("singular")
        kind, plain = kind[:, None], decays(p, data)
        plain = torch.where(kind == 1, plain * math.nan, plain)  # from the start on
        plain = torch.where((kind == 2) & (p != 1).any(1, keepdim=True), math.inf, plain)  # everywhere but at the start
        return torch.where((kind == 3) & (p[:, :1] > 1.5), math.nan, plain)  # a wall before the minimum

    many = least_squares(hostile, family.x0, args=(family.data, kind), batched=True, max_eval=300)
    good = kind == 0
    assert torch.allclose(many.x[good], family.solve().x[good], atol=1e-7)
    assert many.success[good].all()
    assert [many.status[i] for i in (1, 2, 5)] == [Status.non_finite] * 3
    assert torch.equal(many.x[[1, 2, 5]], family.x0[[1, 2, 5]])
    assert many[1].jac is many[1].covariance is many[5].rank is None
    assert many.covariance[5].isnan().all()
    assert not many.success[3]
    assert 1.3 < many.x[3, 0] <= 1.5
    assert math.isfinite(many.fun[3])


def test_infinite_jacobians_at_bounds_are_not_finite_and_leave_the_others_alone() -> None:
    def roots(x: Tensor) -> Tensor:
        return x[..., :1].sqrt() - 1

    starts = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    found = least_squares(roots, starts, (0.0, 5.0), batched=True)
    single = least_squares(roots, starts[1], (0.0, 5.0))
    assert found.status[1] == single.status == Status.non_finite
    assert found[1].x.tolist() == [0.0]
    assert found[0].x.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_limits_are_exact(limit: int) -> None:
    family, counts = FAMILIES["peaks"], torch.zeros(9, dtype=torch.int64)

    def counted(p: Tensor, data: Tensor, row: Tensor) -> Tensor:
        if p.requires_grad:  # else it is the check that problems are independent
            counts[row] += 1
        return peaks(p, data)

    many = least_squares(
        counted, family.x0, args=(family.data, torch.arange(9)), batched=True, max_eval=limit, tol=1e-12
    )
    assert torch.equal(many.n_eval, counts)
    assert set(many.status) == {Status.max_eval}
    assert set(many.n_eval.tolist()) == {limit}
    many = family.solve(max_iter=limit, tol=1e-12)
    assert set(many.n_iter.tolist()) == {limit}
    assert set(many.status) == {Status.max_iter}


@pytest.mark.parametrize(("count", "numel"), [(0, 2), (1, 2), (3, 0)])
def test_any_size_will_do(count: int, numel: int) -> None:
    many = least_squares(
        lambda p: torch.cat([p - 1, p**2, p.new_ones(len(p), 1)], 1), torch.ones(count, numel), batched=True
    )
    assert len(many) == count
    assert many.success.all()
    assert many.covariance.shape == (count, numel, numel)
    assert many.rank.tolist() == [numel] * count


def test_structures_and_complex_residuals_keep_their_shapes() -> None:
    x0 = {"a": torch.ones(4, 2, 2), "b": torch.ones(4, dtype=torch.complex128)}

    def fun(p: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return p["a"] - 3, {"z": p["b"] * (2 + 1j) - 5j}

    many = least_squares(fun, x0, batched=True)
    assert many.success.all()
    assert many.x["b"].dtype == torch.complex128
    assert torch.allclose(many.x["b"], torch.full((4,), 1 + 2j, dtype=torch.complex128), atol=1e-5)
    assert many.residuals[0].shape == (4, 2, 2)
    assert many[2].residuals[1]["z"].shape == ()
    assert many[2].grad["a"].shape == (2, 2)
    assert many[2].standard_errors["a"].shape == (2, 2)


def test_best_of_many_starts_is_the_lowest() -> None:
    starts = torch.linspace(-4, 4, 12, dtype=torch.float64)[:, None]
    best = least_squares(lambda x: torch.cat([torch.sin(3 * x) + 1, 0.3 * x], 1), starts, batched="best")
    assert isinstance(best, LeastSquaresResult)
    assert best.fun == best.starts.fun.min()
    assert (best.starts.fun > best.fun + 0.01).any()
    assert best.covariance is not None


def test_callback_stops_some() -> None:
    family = FAMILIES["peaks"]
    many = family.solve(callback=lambda progress: progress.n_iter * (torch.arange(9) == 4) >= 2)
    assert many.status[4] is Status.stopped_by_callback
    assert many.n_iter[4] == 2
    assert [status for i, status in enumerate(many.status) if i != 4] == [Status.converged] * 8


@pytest.mark.parametrize(
    ("fun", "options", "error", "message"),
    [
        (decays, dict(method="lm"), ValueError, "batched needs method='trust-region'"),
        (decays, dict(jac=decays), ValueError, "batched needs"),
        (decays, dict(jac="products"), ValueError, "batched needs"),
        (decays, dict(differentiable=True), ValueError, "batched needs"),
        (decays, dict(batched="all"), ValueError, "must be False, True or 'best'"),
        (lambda p, y: decays(p, y).sum(), {}, ValueError, "first dimension counts the problems"),
        (lambda p, y: 3.0, {}, TypeError, "complex tensors"),
        (lambda p, y: decays(p, y) - p.mean(), {}, ValueError, "residuals must not mix"),
        (lambda p, y: decays(p.detach(), y), {}, RuntimeError, "do not depend on x0"),
    ],
)
def test_what_is_not_allowed_is_an_error(fun: Any, options: Any, error: type[Exception], message: str) -> None:
    family = FAMILIES["decays"]
    x0 = family.x0 + 0.1 * random(8, 9, 2)
    with pytest.raises(error, match=message):
        least_squares(fun, x0, **(dict(args=(family.data,), batched=True) | options))
