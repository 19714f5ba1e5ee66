"""Quasi-Newton directions are those of their textbook forms, written here naively in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from direction_cases import (
    CPU,
    DTYPES,
    NUMEL,
    RTOL,
    Array,
    Pair,
    assert_near,
    double,
    one_thread,  # noqa: F401
    pairs,
    random,
)
from torch import Tensor

from descend.second_order.mathematics import directions
from descend.second_order.mathematics.broyden_family import self_scaled_broyden
from descend.second_order.mathematics.dense_inverse import DenseInverse
from descend.second_order.mathematics.diagonal import LEAST_COSINE, SPREAD, learn_diagonal_
from descend.second_order.mathematics.directions import CompactInverse, Steepest, modified_secant_factor
from descend.second_order.solvers.box import CompactHessian

# What is done with NumPy where it is small, with tensors where it is larger, and row by row where it is large.
PATHS = {"numpy": {}, "tensor": dict(SHORT=0), "large": dict(SHORT=0, LARGE=0)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(directions, name, value)
    return request.param


def tolerance(path: str, dtype: torch.dtype) -> float:
    """A large history is kept in single precision."""
    return RTOL[torch.float32 if path == "large" else dtype]


def two_loops(history: list[Pair], diagonal: Array, grad: Tensor) -> Array:
    """Nocedal & Wright 2006, Algorithm 7.4."""
    arrays = [(double(s), double(y)) for s, y in history]
    q, alphas = double(grad), []
    for s, y in reversed(arrays):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    r = diagonal * q
    for s, y in arrays:
        r = r + s * (alphas.pop() - (y @ r) / (s @ y))
    return -r


def dense_inverse(history: list[Pair], start: Array) -> Array:
    """Nocedal & Wright 2006, equation 6.17."""
    inverse, identity = start, np.eye(len(start))
    for s, y in history:
        s, y = double(s), double(y)
        left = identity - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


# The compact form of the inverse.


@DTYPES
@pytest.mark.parametrize("history_size", range(1, 13))
def test_compact_inverse_is_the_two_loop_recursion(path: str, history_size: int, dtype: torch.dtype) -> None:
    inverse = CompactInverse(NUMEL, history_size, dtype, CPU)
    taken, normal = [], random(1)
    for number, pair in zip(range(2 * history_size + 3), pairs(dtype), strict=False):
        taken = [*taken, pair][-history_size:]
        inverse.update(*pair)
        if number % 3 == 1:  # a solver may restart or be refused a step: not every pair is followed by a direction
            continue
        for _ in range(2):  # the first one takes the pair in, the second finds it there
            grad = normal(NUMEL).to(dtype)
            direction = inverse.direction(grad)
            diagonal = double(inverse.history.diagonal)
            assert direction.dtype == dtype
            assert_near(direction, two_loops(taken, diagonal, grad), tolerance(path, dtype))
            assert_near(direction, -dense_inverse(taken, np.diag(diagonal)) @ double(grad), tolerance(path, dtype))


@DTYPES
def test_compact_inverse_descends_and_fits_the_newest_pair(path: str, dtype: torch.dtype) -> None:
    inverse = CompactInverse(NUMEL, 4, dtype, CPU)
    for (s, y), _ in zip(pairs(dtype), range(11), strict=False):
        inverse.update(s, y)
        assert_near(inverse.direction(y), -double(s), tolerance(path, dtype))
        assert float(inverse.direction(s).dot(s)) < 0


@DTYPES
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("is_taken_in", [False, True])
def test_compact_inverse_goes_on_from_its_state(path: str, dtype: torch.dtype, stop: int, is_taken_in: bool) -> None:
    first, second = (CompactInverse(NUMEL, 4, dtype, CPU) for _ in range(2))
    grad = random(1)(NUMEL).to(dtype)
    for number, pair in zip(range(2 * 9), pairs(dtype), strict=False):
        if number == stop:
            if is_taken_in:
                first.direction(grad)
            state = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in first.state().items()
            }
            assert second.accepts(state)
            second.load(state)
            assert second.is_steepest == (stop == 0)
        first.update(*pair)
        if number >= stop:
            second.update(*pair)
            assert torch.equal(first.direction(grad), second.direction(grad))


@pytest.mark.parametrize(("one", "other"), [("numpy", "tensor"), ("tensor", "numpy")])
def test_state_goes_from_arrays_to_tensors_and_back(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, grad = [], random(1)(NUMEL)
    for name in (one, other):
        monkeypatch.setattr(directions, "SHORT", PATHS[name].get("SHORT", 2**13))
        made.append(CompactInverse(NUMEL, 3, torch.float64, CPU))
    for _, pair in zip(range(4), pairs(torch.float64), strict=False):
        made[0].update(*pair)
    made[1].load(made[0].state())
    torch.testing.assert_close(made[0].direction(grad), made[1].direction(grad), rtol=1e-12, atol=0)


def test_state_of_other_sizes_is_not_accepted() -> None:
    inverse = CompactInverse(NUMEL, 4, torch.float64, CPU)
    hessian = CompactHessian(NUMEL, 4, torch.float64, CPU)
    assert inverse.accepts(inverse.state())
    assert hessian.accepts(hessian.state())
    assert not inverse.accepts(None)
    assert not hessian.accepts(None)
    assert not inverse.accepts(hessian.state())
    assert not hessian.accepts(inverse.state())
    assert not inverse.accepts(CompactInverse(NUMEL, 5, torch.float64, CPU).state())
    assert not inverse.accepts(CompactInverse(NUMEL + 1, 4, torch.float64, CPU).state())
    assert not hessian.accepts(CompactHessian(NUMEL + 1, 4, torch.float64, CPU).state())


def test_update_copies_its_arguments(path: str) -> None:
    inverse, grad = CompactInverse(NUMEL, 4, torch.float64, CPU), random(1)(NUMEL)
    s, y = next(pairs(torch.float64))
    kept = s.clone(), y.clone(), grad.clone()
    inverse.update(s, y)
    before = inverse.direction(grad).clone()  # its memory may be used again
    assert torch.equal(torch.stack([s, y, grad]), torch.stack(kept))
    s.zero_()
    y.zero_()
    assert torch.equal(inverse.direction(grad), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steepest(),
        lambda: DenseInverse(NUMEL, torch.float64, CPU, history_size=1),
        lambda: DenseInverse(NUMEL, torch.float64, CPU, self_scaled_broyden, 2),
        lambda: CompactInverse(NUMEL, 3, torch.float64, CPU),
    ],
    ids=["steepest", "dense", "self_scaled", "compact"],
)
def test_reset_forgets_everything(path: str, make: Callable[[], Any]) -> None:
    used, new, grad = make(), make(), random(1)(NUMEL)
    for _, pair in zip(range(5), pairs(torch.float64, seed=1), strict=False):
        used.update(*pair)
    assert not used.is_steepest
    used.reset()
    assert used.is_steepest
    assert torch.equal(used.direction(grad), -grad)
    for _, pair in zip(range(5), pairs(torch.float64, seed=2), strict=False):
        used.update(*pair)
        new.update(*pair)
        assert torch.equal(used.direction(grad), new.direction(grad))


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-200, 1e200, 1e300])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseInverse(NUMEL, torch.float64, CPU, history_size=1),
        lambda: DenseInverse(NUMEL, torch.float64, CPU, self_scaled_broyden, 2),
        lambda: CompactInverse(NUMEL, 3, torch.float64, CPU),
        lambda: CompactHessian(NUMEL, 3, torch.float64, CPU),
    ],
    ids=["dense", "self_scaled", "compact", "hessian"],
)
def test_pair_beyond_the_numbers_does_no_lasting_harm(path: str, make: Callable[[], Any], size: float) -> None:
    used, new, grad = make(), make(), random(1)(NUMEL)
    pair = next(pairs(torch.float64))
    used.update(pair[0] * size, pair[1] * size)  # may give NaN, but no error and no warning
    if not isinstance(used, CompactHessian):
        used.direction(grad)
    used.reset()
    for directions_ in (used, new):
        directions_.update(*pair)
    apply = (lambda d: d.multiply(grad)) if isinstance(new, CompactHessian) else (lambda d: d.direction(grad))
    assert torch.equal(apply(used), apply(new))


@pytest.mark.parametrize("method", ["keep", "learn", "take_in", "direction"])
def test_interrupt_forgets_all_pairs_and_not_a_part(path: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used, new = (CompactInverse(NUMEL, 3, torch.float64, CPU) for _ in range(2))
    grad, taken = random(1)(NUMEL), pairs(torch.float64)
    for _, pair in zip(range(4), taken, strict=False):
        used.update(*pair)
        used.direction(grad)
    whole = getattr(used.history, method)

    def interrupted(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    def learn_and_turn() -> None:
        used.update(*next(taken))
        used.direction(grad)

    monkeypatch.setattr(used.history, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn_and_turn()
    monkeypatch.undo()
    assert used.is_steepest
    assert used.state()["count"] == 0
    used.reset()
    for _, pair in zip(range(5), taken, strict=False):
        for inverse in (used, new):
            inverse.update(*pair)
        assert torch.equal(used.direction(grad), new.direction(grad))


def test_history_beyond_the_first_pairs_allocates_nothing_that_grows(path: str) -> None:
    inverse = CompactInverse(NUMEL, 3, torch.float64, CPU)
    places = {name: value.data_ptr() for name, value in inverse.state().items() if isinstance(value, Tensor)}
    for _, pair in zip(range(10), pairs(torch.float64), strict=False):
        inverse.update(*pair)
        inverse.direction(pair[0])
    assert places == {name: value.data_ptr() for name, value in inverse.state().items() if isinstance(value, Tensor)}


# The other directions.


@DTYPES
def test_dense_inverse_is_bfgs(dtype: torch.dtype) -> None:
    inverse, taken, grad = DenseInverse(NUMEL, dtype, CPU, history_size=2), [], random(1)(NUMEL).to(dtype)
    assert torch.equal(inverse.direction(grad), -grad)
    for _, pair in zip(range(8), pairs(dtype), strict=False):
        taken.append(pair)
        inverse.update(*pair)
        expected = dense_inverse(taken, np.diag(double(inverse.beginning.history.diagonal)))
        if not inverse.is_dense:
            continue
        assert_near(inverse.direction(grad), -expected @ double(grad), RTOL[dtype])
        assert torch.equal(inverse.inverse, inverse.inverse.T)


def test_steepest_has_the_length_of_barzilai_and_borwein() -> None:
    steepest, grad = Steepest(), torch.tensor([1.0, -2.0])
    assert torch.equal(steepest.direction(grad), -grad)
    steepest.update(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0]))
    assert torch.equal(steepest.direction(grad), -grad / 4)


# What a diagonal learns.


def learned(diagonal: Array, s: Array, y: Array) -> tuple[Array, float]:
    """The diagonal of the direct BFGS update of the inverse of the scaled diagonal."""
    sy = max(s @ y, LEAST_COSINE * np.sqrt((y @ (diagonal * y)) * (s @ (s / diagonal))))
    scaled = diagonal * sy / (y @ (diagonal * y))
    new = 1 / (1 / scaled - (s / scaled) ** 2 / (s @ (s / scaled)) + y**2 / sy)
    middle = np.sort(new)[(len(new) - 1) // 2]
    return np.clip(new, middle / SPREAD, middle * SPREAD), float(sy)


@pytest.mark.parametrize("as_array", [True, False], ids=["numpy", "tensor"])
@pytest.mark.parametrize("numel", [1, 2, 5, 900])
@pytest.mark.parametrize("spread", [0, 2, 6])
def test_diagonal_learns_by_the_formula(numel: int, spread: float, as_array: bool) -> None:
    normal = random(numel)
    units = 10 ** (spread * (torch.rand(numel, dtype=torch.float64) - 0.5))
    diagonal = torch.ones(numel, dtype=torch.float64)
    for _ in range(4):
        s, curvature = normal(numel) * units, normal(numel).exp() / units**2
        y = curvature * s
        expected, sy = learned(*map(double, (diagonal, s, y)))
        arguments = (diagonal.numpy(), s.numpy(), y.numpy()) if as_array else (diagonal, s, y)
        assert float(learn_diagonal_(*arguments)) == pytest.approx(sy, rel=1e-13)
        np.testing.assert_allclose(double(diagonal), expected, rtol=1e-9)  # what the subtraction leaves


def test_diagonal_learns_the_curvature_of_each_variable() -> None:
    curvature = torch.tensor([1.0, 10.0, 100.0, 0.1], dtype=torch.float64)
    diagonal = torch.ones(4, dtype=torch.float64)
    for _ in range(60):
        s = torch.randn(4, dtype=torch.float64) / curvature.sqrt()
        learn_diagonal_(diagonal, s, curvature * s)
    ratio = diagonal * curvature
    assert float(ratio.max() / ratio.min()) < 10  # from 1,000; it learns from one random step after the other


@pytest.mark.parametrize("as_array", [True, False], ids=["numpy", "tensor"])
@pytest.mark.parametrize("numel", [1, 2, 7, 999, 3000])
@pytest.mark.parametrize("kind", ["wild", "one", "orthogonal", "opposite"])
def test_diagonal_stays_positive_and_within_its_spread(numel: int, kind: str, as_array: bool) -> None:
    normal, diagonal = random(0), torch.ones(numel, dtype=torch.float64)
    for _ in range(10):
        s, y = normal(numel) * (4 * normal(numel)).exp(), normal(numel) * (4 * normal(numel)).exp()
        if kind == "one":  # along one variable only
            s, y = (torch.zeros(numel, dtype=torch.float64).index_fill(0, torch.tensor(0), 1e-5) for _ in range(2))
        elif kind == "orthogonal":  # s'y is zero but for rounding
            y -= s.dot(y) / s.dot(s) * s
        y = y * (-1 if s.dot(y) < 0 else 1) * (-1 if kind == "opposite" else 1)
        if not bool(y.any()):  # nothing is orthogonal to the only direction
            continue
        arguments = (diagonal.numpy(), s.numpy(), y.numpy()) if as_array else (diagonal, s, y)
        assert float(learn_diagonal_(*arguments)) > 0
        assert bool((diagonal > 0).all() & diagonal.isfinite().all())
        assert float(diagonal.max() / diagonal.min()) <= SPREAD**2 * (1 + 1e-12)


# A pair that fits the function's values.


@pytest.mark.parametrize("seed", range(20))
def test_modified_secant_factored_change_has_the_curvature_of_the_cubic_at_the_end(seed: int) -> None:
    # phi(t) = slope t + b t^2 / 2 + c t^3 / 6 over a step of 1: s'y = phi'(1) - phi'(0), and it becomes phi''(1).
    slope, b, c = random(seed)(3).tolist()
    b = abs(b) + 1.5 * abs(c)  # then theta = c / 2 is within its limits
    value = slope + b / 2 + c / 6
    end = slope + b + c / 2
    sy = end - slope
    assert modified_secant_factor(sy, 0.0, value, slope + end) * sy == pytest.approx(b + c, rel=1e-12)


def test_change_of_a_quadratic_is_not_modified_secant_factored() -> None:
    assert modified_secant_factor(2.0, 5.0, 5.0 - 3.0 + 1.0, -3.0 + -1.0) == 1.0


@pytest.mark.parametrize(
    ("theta", "expected"), [(3.0, 4.0), (3.1, 1.0), (-0.5, 0.5), (-1.0, 1.0), (-0.999999999, 1.0), (-2.0, 1.0)]
)
def test_change_is_modified_secant_factored_only_where_that_is_safe(theta: float, expected: float) -> None:
    assert modified_secant_factor(1.0, theta / 6, 0.0, 0.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("theta", [np.nan, np.inf, -np.inf])
def test_change_is_not_modified_secant_factored_by_what_is_no_number(theta: float) -> None:
    assert modified_secant_factor(1.0, theta, 0.0, 0.0) == 1.0
