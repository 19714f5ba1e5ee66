"""L-BFGS with compiled passes is L-BFGS with torch's operations, to the rounding of float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import descend
from descend.second_order.mathematics import directions
from descend.second_order.mathematics.directions import CompactInverse
from descend.second_order.mathematics.history import LongHistory, ShortHistory
from descend.second_order.mathematics.space import Space
from descend.second_order.problem import objective
from descend.second_order.problem.parameter_objective import ClosureObjective
from descend.second_order.solvers import compiled_history
from descend.second_order.solvers.compiled_history import CompiledHistory, compact_inverse

CPU = torch.device("cpu")
NUMEL = 9001
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "LARGE", 0)
    monkeypatch.setattr(compiled_history, "COMPILED_FROM", 0)
    monkeypatch.setattr(objective, "LONG", 1)


class Place(NamedTuple):
    x: Tensor
    grad: Tensor


def places(dtype: torch.dtype, numel: int = NUMEL) -> Iterator[Place]:
    """Points on a quadratic whose curvatures are spread over a factor of 1,000."""
    generator = torch.Generator().manual_seed(0)
    curvatures = torch.logspace(0, 3, numel, dtype=dtype)
    while True:
        x = torch.randn(numel, generator=generator, dtype=dtype)
        yield Place(x, curvatures * x)


def update(inverse: CompactInverse, old: Place, new: Place, factor: float = 1.0) -> None:
    curvature = factor * float((new.x - old.x).double().dot((new.grad - old.grad).double()))
    inverse.update_between(old, new, factor, curvature)


@DTYPES
@pytest.mark.parametrize("history_size", [1, 3, 7])
def test_directions_are_those_of_torch(dtype: torch.dtype, history_size: int) -> None:
    compiled = compact_inverse(NUMEL, history_size, dtype, CPU)
    reference = CompactInverse(NUMEL, history_size, dtype, CPU)
    assert type(compiled.history) is CompiledHistory
    assert type(reference.history) is LongHistory
    points = places(dtype)
    old = next(points)
    for number, new in zip(range(2 * history_size + 4), points, strict=False):
        for inverse in (compiled, reference):
            if number % 4 == 3:
                inverse.update(new.x - old.x, new.grad - old.grad)
            else:
                update(inverse, old, new, factor=1.5)
        old = new
        if number % 3 == 1:  # not every pair is followed by a direction
            continue
        for grad in (new.grad, 1e-3 * new.x, new.grad):
            found, expected = compiled.direction(grad), reference.direction(grad)
            assert found.dtype == dtype
            assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@DTYPES
@pytest.mark.parametrize("stop", [0, 1, 2, 5])
@pytest.mark.parametrize("is_taken_in", [True, False])
def test_goes_on_from_its_state(dtype: torch.dtype, stop: int, is_taken_in: bool) -> None:
    first, second = (compact_inverse(NUMEL, 3, dtype, CPU) for _ in range(2))
    points = places(dtype)
    old = next(points)
    for number, new in zip(range(10), points, strict=False):
        if number == stop:
            if is_taken_in:
                first.direction(old.grad)
            state = first.state()
            assert second.accepts(state)
            second.load({name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()})
        update(first, old, new)
        if number >= stop:
            update(second, old, new)
            assert torch.equal(first.direction(new.grad), second.direction(new.grad))
        old = new


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_pair_beyond_the_numbers_does_no_lasting_harm(size: float) -> None:
    used, new = (compact_inverse(NUMEL, 3, torch.float64, CPU) for _ in range(2))
    old, here, *_ = (place for place, _ in zip(places(torch.float64), range(3), strict=False))
    used.update(size * here.x, size * here.grad)
    used.direction(here.grad)
    used.reset()
    for inverse in (used, new):
        update(inverse, old, here)
    assert torch.equal(used.direction(here.grad), new.direction(here.grad))


def chained(x: Tensor) -> Tensor:
    """Rosenbrock 1960, chained."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_minimize_takes_as_many_evaluations() -> None:
    start = torch.zeros(200, dtype=torch.float64)
    compiled = descend.minimize(chained, start, max_eval=2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_history, "COMPILED_FROM", 10**9)
        patch.setattr(objective, "LONG", 10**9)
        expected = descend.minimize(chained, start, max_eval=2000)
    assert compiled.success
    assert expected.success
    assert compiled.n_eval <= 1.1 * expected.n_eval


def test_vectors_that_are_used_again_have_no_other_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        x = torch.full((50,), -1.2, dtype=torch.float64, requires_grad=True)
        optimizer = descend.LBFGS([x], max_iter=15, max_eval=60, history_size=4, line_search_fn="hager_zhang")
        found = []
        for _ in range(8):
            optimizer.step(lambda: chained(x))
            found.append(x.detach().clone())
        return found

    recycle, n_recycled, expected = ClosureObjective.recycle, 0, run()

    def poison(self: ClosureObjective, point: objective.Point) -> None:
        nonlocal n_recycled
        n_recycled += 1
        point.x.fill_(torch.nan)
        point.grad.fill_(torch.nan)
        recycle(self, point)

    monkeypatch.setattr(ClosureObjective, "recycle", poison)
    assert all(map(torch.equal, run(), expected))
    assert n_recycled > 100


@pytest.mark.parametrize("numel", [2, 50])
def test_results_do_not_depend_on_vectors_being_used_again(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int) -> tuple[list[float], int]:
        x = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        optimizer = descend.LBFGS([x], max_iter=200, max_eval=500, history_size=4, line_search_fn="hager_zhang")
        optimizer.step(lambda: chained(x))
        assert optimizer.result is not None
        assert optimizer.result.fun == float(chained(x.detach()))
        return x.tolist(), optimizer.result.n_eval

    used_again = [run(seed) for seed in range(3)]
    monkeypatch.setattr(ClosureObjective, "recycle", lambda self, point: None)
    assert used_again == [run(seed) for seed in range(3)]


def test_optimizer_keeps_its_learner_but_for_another_state() -> None:
    def make() -> tuple[Tensor, descend.LBFGS]:
        x = torch.full((30,), -1.2, dtype=torch.float64, requires_grad=True)
        return x, descend.LBFGS([x], max_iter=5, history_size=4, line_search_fn="hager_zhang")

    (x, optimizer), (y, other) = make(), make()
    for _ in range(3):
        optimizer.step(lambda: chained(x))
    kept = optimizer._kept
    assert kept is not None
    learner = kept._learner
    optimizer.step(lambda: chained(x))
    assert optimizer._kept._learner is learner
    other.step(lambda: chained(y))
    with torch.no_grad():
        y.copy_(x)
    other.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(lambda: chained(x))
        other.step(lambda: chained(y))
        assert torch.equal(x, y)
    assert other._kept is not None
    assert other._kept._learner is not learner


@DTYPES
@pytest.mark.parametrize("history_size", [1, 6])
def test_history_that_fits_the_caches_renews_its_diagonal_with_every_pair(
    dtype: torch.dtype, history_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "LARGE", 2**40)
    compiled = compact_inverse(NUMEL, history_size, dtype, CPU)
    reference = CompactInverse(NUMEL, history_size, dtype, CPU)
    assert type(compiled.history) is CompiledHistory
    assert type(reference.history) is ShortHistory
    points = places(dtype)
    old = next(points)
    for _, new in zip(range(2 * history_size + 3), points, strict=False):
        for inverse in (compiled, reference):
            update(inverse, old, new)
        found, expected = compiled.direction(new.grad), reference.direction(new.grad)
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
        old = new


class SharedSpace(Space):
    is_shared = True


@pytest.mark.parametrize(("numel", "kind"), [(100, ShortHistory), (10_000, CompiledHistory)])
def test_ranks_choose_the_same_kind_of_history(numel: int, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "LARGE", 5000)
    for held in (numel, numel // 10):
        history = compact_inverse(held, 3, torch.float64, CPU, SharedSpace(numel)).history
        assert type(history) is kind
        assert not getattr(history, "renews_always", False)


def in_units(x: Tensor, unit: float) -> Tensor:
    """A loss whose curvatures are near 1 / unit**2, least where x is 1 unit."""
    return (torch.linspace(1, 50, NUMEL, dtype=x.dtype) * (x / unit - 1) ** 2).sum()


@pytest.mark.parametrize("unit", [1e-22, 1e-19, 1e-18])
def test_curvatures_outside_of_float32(unit: float) -> None:
    start = torch.zeros(NUMEL, dtype=torch.float64)
    result = descend.minimize(in_units, start, args=(unit,), method="l-bfgs", tol=0, max_eval=80)
    assert (result.x / unit - 1).abs().max() < 1e-6


def test_pairs_outside_of_float32_are_saved() -> None:
    def losses(*, reloads: bool) -> list[Tensor]:
        param, found = torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.float64)), []
        optimizer = descend.LBFGS([param], max_iter=3, line_search_fn="hager_zhang")
        for _ in range(5):
            found.append(optimizer.step(lambda: in_units(param, 1e-22)).detach())
            if reloads:
                state = optimizer.state_dict()
                optimizer = descend.LBFGS([param], max_iter=3, line_search_fn="hager_zhang")
                optimizer.load_state_dict(state)
        return found

    assert losses(reloads=True) == losses(reloads=False)
