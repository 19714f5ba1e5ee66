"""Steps in a trust region: conditions of optimality, and a textbook's conjugate gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from descend.second_order.mathematics.trust_region import CGPath, DenseModel, End, TrialStep, steihaug

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
BOTH_REGIONS = pytest.mark.parametrize("preconditioned", [False, True])
SEEDS = st.integers(0, 10**6)


def decrease(hessian: Tensor, grad: Tensor, step: Tensor) -> float:
    hessian, grad, step = hessian.double(), grad.double(), step.double()
    return -float(grad @ step + step @ hessian @ step / 2)


def assert_optimal(model: DenseModel, hessian: Tensor, grad: Tensor, radius: float) -> TrialStep:
    """(H + mu I) s = -g, H + mu I positive semi-definite, mu >= 0, mu (radius - |s|) = 0: nothing is lower."""
    trial = model.step(radius)
    eps = 100 * math.sqrt(len(grad)) * torch.finfo(grad.dtype).eps
    hessian, grad, step = hessian.double(), grad.double(), trial.step.double()
    assert float(step.norm()) == pytest.approx(trial.norm, rel=eps, abs=1e-300)
    assert trial.norm == radius if trial.on_boundary else trial.norm <= radius
    scale, lowest = float(torch.linalg.matrix_norm(hessian, 2)), float(torch.linalg.eigvalsh(hessian)[0])
    terms = trial.norm * float(grad.norm()) + trial.norm**2 * scale  # what the terms of the model may be
    assert trial.decrease == pytest.approx(decrease(hessian, grad, step), rel=eps, abs=eps * terms)
    assert (trial.decrease > 0) == bool(step.any())
    residual = hessian @ step + grad
    mu = -float(step @ residual / (step @ step)) if trial.on_boundary else 0.0
    noise = eps * (scale + float(grad.norm()) / radius)
    assert mu >= -noise
    assert lowest + mu >= -noise
    assert float((residual + mu * step).norm()) <= eps * (float(grad.norm()) + (scale + mu) * trial.norm)
    if abs(lowest) > eps * scale:
        assert trial.negative_curvature == (lowest < 0)
    return trial


def symmetric(eigenvalues: Any, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A matrix with these eigenvalues, and its eigenvectors."""
    n = len(eigenvalues)
    vectors = torch.from_numpy(np.linalg.qr(generator.standard_normal((n, n)))[0])
    hessian = vectors * torch.as_tensor(eigenvalues, dtype=torch.float64) @ vectors.T
    return (hessian + hessian.T) / 2, vectors


def count_calls(patch: pytest.MonkeyPatch, owner: Any, *names: str) -> list[str]:
    """The list to which every later call adds its name."""
    calls: list[str] = []
    for name in names:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, n=name, f=original, **kw: (calls.append(n), f(*args, **kw))[1])
    return calls


def assert_same(trial: TrialStep, expected: TrialStep) -> None:
    assert torch.equal(trial.step, expected.step)
    assert trial[1:] == expected[1:]


def no_step(n: int, dtype: torch.dtype = torch.float64) -> TrialStep:
    return TrialStep(torch.zeros(n, dtype=dtype), 0.0, 0.0, False, False)


@DTYPES
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_dense_step_is_optimal(dtype: torch.dtype, data: st.DataObject) -> None:
    few = st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 1e-8, -1e-8, 1e4, -1e4])
    eigenvalues = data.draw(st.lists(few, min_size=1, max_size=8)) * data.draw(st.sampled_from([1, 1, 6]))
    parts = data.draw(st.lists(st.sampled_from([0.0, 1.0, -2.0, 1e-6, 1e6]), min_size=48, max_size=48))
    radius = data.draw(st.sampled_from([1e-6, 0.1, 1.0, 3.0, 1e3, 1e8]))
    hessian, vectors = symmetric(eigenvalues, np.random.default_rng(data.draw(SEEDS)))
    if data.draw(st.booleans()):  # exact zeros stay exact
        hessian, vectors = torch.diag(torch.tensor(eigenvalues).double()), torch.eye(len(eigenvalues)).double()
    hessian, grad = hessian.to(dtype), (vectors @ torch.tensor(parts[: len(eigenvalues)]).double()).to(dtype)
    model = DenseModel(hessian, grad)
    for factor in (1.0, 0.25, 1e-3):
        assert_optimal(model, hessian, grad, factor * radius)


@DTYPES
def test_dense_step_is_optimal_on_random_matrices(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    for number, n in enumerate([1, 2, 3, 4, 7, 10, 20, 50] * 6):
        hessian, _ = symmetric(generator.standard_normal(n) * 10 ** generator.uniform(-3, 3, n), generator)
        hessian = (hessian @ hessian if number % 3 == 0 else hessian).to(dtype)
        grad = torch.from_numpy(generator.standard_normal(n)).to(dtype)
        assert_optimal(DenseModel(hessian, grad), hessian, grad, 10 ** generator.uniform(-4, 4))


@pytest.mark.parametrize("part", [0.0, 1e-300, 1e-20, 1e-12, 1e-6])
@pytest.mark.parametrize("copies", [1, 3])
def test_hard_case_and_its_neighbours(part: float, copies: int) -> None:
    # Without a part along the lowest eigenvalue -2, the others take (1 / 3, 1 / 4): shorter than the radius.
    hessian = torch.diag(torch.tensor([1.0, 2.0] + [-2.0] * copies).double())
    grad = torch.tensor([1.0, 1.0] + [part] * copies).double()
    trial = assert_optimal(DenseModel(hessian, grad), hessian, grad, 5.0)
    torch.testing.assert_close(trial.step[:2], torch.tensor([-1 / 3, -1 / 4]).double(), rtol=1e-5, atol=0)
    assert float(trial.step[2:].norm()) == pytest.approx(math.sqrt(25 - 1 / 9 - 1 / 16), rel=1e-6)
    assert (trial.on_boundary, trial.negative_curvature) == (True, True)


@DTYPES
def test_singular_hessian_gives_the_shortest_minimizer(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    for n in (2, 5, 30, 50):
        jacobian = torch.from_numpy(generator.standard_normal((n // 2, n))).to(dtype)
        trial = DenseModel(jacobian.T @ jacobian, jacobian.sum(0)).step(1e6)
        expected, tolerance = -torch.linalg.pinv(jacobian.double()).sum(1), 1e4 * torch.finfo(dtype).eps
        torch.testing.assert_close(trial.step.double(), expected, rtol=0, atol=tolerance)
        assert trial[2:] == (pytest.approx(n // 2 / 2, rel=tolerance), False, False)


@DTYPES
def test_zero_gradient(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, dtype=dtype)
    vectors = symmetric([1.0, 2.0, 3.0], np.random.default_rng(0))[1].to(dtype)
    for values in ([1, 2, 3], [0, 0, 1], [0, 0, 0]):
        assert_same(DenseModel(vectors * torch.tensor(values) @ vectors.T, zero).step(2.0), no_step(3, dtype))
    trial = DenseModel(vectors * torch.tensor([-4, 1, 0]) @ vectors.T, zero).step(2.0)
    torch.testing.assert_close(trial.step.abs(), 2 * vectors[:, 0].abs())
    assert trial[1:] == (2.0, pytest.approx(8.0), True, True)


def test_no_and_one_variable() -> None:
    assert_same(DenseModel(torch.zeros(0, 0), torch.zeros(0)).step(1.0), no_step(0, torch.float32))
    for value, grad, radius, step in [(2, 4, 3, -2), (2, 4, 1, -1), (-1, 1, 3, -3), (0, -1, 7, 7), (0, 0, 1, 0)]:
        trial = DenseModel(torch.tensor([[float(value)]]), torch.tensor([float(grad)])).step(radius)
        assert trial.step.item() == pytest.approx(step)
        assert trial.decrease == pytest.approx(-(grad * step + value * step**2 / 2))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 980), (torch.float32, 95)], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dense_step_is_the_same_at_every_magnitude(dtype: torch.dtype, limit: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(SEEDS))
    hessian = symmetric(generator.choice([-1.0, 0.5, 3.0, 40.0], 4), generator)[0].to(dtype)
    hessian = hessian @ hessian if data.draw(st.booleans()) else hessian
    grad = torch.from_numpy(generator.standard_normal(4)).to(dtype)
    first = data.draw(st.integers(-limit, limit))
    second = data.draw(st.integers(max(-limit, first - limit), min(limit, first + limit)))
    radius = data.draw(st.sampled_from([0.01, 0.5, 100.0]))
    trial = DenseModel(hessian, grad).step(radius)
    scaled = DenseModel(hessian * 2.0**first, grad * 2.0**second).step(math.ldexp(radius, second - first))
    assert torch.equal(scaled.step, trial.step * 2.0 ** (second - first))
    assert (scaled.norm, *scaled[3:]) == (math.ldexp(trial.norm, second - first), *trial[3:])
    assert 0 < scaled.decrease < math.inf
    if abs(2 * second - first) < 1000:
        assert scaled.decrease == math.ldexp(trial.decrease, 2 * second - first)


@pytest.mark.parametrize("exponent", [-300, 0, 300])
@pytest.mark.parametrize("radius", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 0.0), (1.0, 2.0)], ids=str)
def test_unequal_magnitudes_are_finite(exponent: int, radius: float, values: tuple[float, float]) -> None:
    hessian = torch.diag(torch.tensor(values).double()) * 10.0**exponent
    trial = DenseModel(hessian, torch.ones(2).double() * 10.0**-exponent).step(radius)
    assert trial.step.isfinite().all()
    assert float(trial.step.abs().max()) <= radius
    assert (trial.norm > 0) == (0 < trial.decrease < math.inf)


def test_one_cholesky_inside_and_one_eigendecomposition_for_all_radii(monkeypatch: pytest.MonkeyPatch) -> None:
    mild, _ = symmetric([1.0, 2.0, 3.0], np.random.default_rng(0))
    saddle, grad = symmetric([1.0, -2.0, 3.0], np.random.default_rng(0))[0], torch.ones(3).double()
    scales = torch.tensor([1e-8, 1.0, 1e8]).double()  # badly scaled, not singular
    calls = count_calls(monkeypatch, torch.linalg, "eigh", "cholesky_ex")
    trial = DenseModel(scales[:, None] * mild * scales, scales).step(1e12)
    assert calls == ["cholesky_ex"]
    torch.testing.assert_close(trial.step, torch.linalg.solve(mild, -grad) / scales, rtol=1e-12, atol=0)
    model = DenseModel(saddle, grad)
    for radius in (4.0, 2.0, 1.0, 8.0):
        assert_optimal(model, saddle, grad, radius)
    assert calls == ["cholesky_ex", "cholesky_ex", "eigh"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_dense_model_reports_what_is_not_finite(bad: float) -> None:
    entries = torch.tensor([1.0, bad])
    for model in (DenseModel(torch.eye(2) * entries, torch.ones(2)), DenseModel(torch.eye(2), entries)):
        assert not model.finite
        assert_same(model.step(1.0), no_step(2, torch.float32))


def test_dense_model_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"must be \(N, N\) and the gradient \(N,\), got \(2, 3\) and \(2,\)"):
        DenseModel(torch.zeros(2, 3), torch.zeros(2))
    for radius in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"DenseModel\.step: radius must be > 0 and finite, got {radius}"):
            DenseModel(torch.eye(2), torch.zeros(2)).step(radius)


def textbook(hessian: Any, grad: Any, region: Any, radius: float, tolerance: float, limit: int) -> tuple[Any, str, int]:
    """Conn, Gould & Toint 2000, Algorithm 7.5.1, with every product formed anew; ``region`` is M."""
    step, residual = np.zeros_like(grad), grad
    direction = -np.linalg.solve(region, residual)
    for number in range(1, limit + 1):
        curvature = direction @ hessian @ direction
        following = step - residual @ direction / curvature * direction
        if curvature <= 0 or following @ region @ following >= radius**2:
            along, length = direction @ region @ direction, step @ region @ step - radius**2
            step = step + np.roots([along, 2 * step @ region @ direction, length]).real.max() * direction
            return step, "negative_curvature" if curvature <= 0 else "boundary", number
        before = residual @ np.linalg.solve(region, residual)
        step, residual = following, grad + hessian @ following
        if np.linalg.norm(residual) <= tolerance:
            return step, "converged", number
        inverse = np.linalg.solve(region, residual)
        direction = -inverse + residual @ inverse / before * direction
    return step, "max_products", limit


def problem(seed: int, n: int, lowest: float, preconditioned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """H with eigenvalues from ``lowest`` to 10, g, and a positive definite M."""
    generator = np.random.default_rng(seed)
    hessian, _ = symmetric(np.linspace(lowest, 10, n), generator)
    region, _ = symmetric(generator.uniform(0.5, 4, n), generator)
    grad = torch.from_numpy(generator.standard_normal(n))
    return hessian, grad / grad.norm(), region if preconditioned else torch.eye(n).double()


def path_of(hessian: Tensor, grad: Tensor, region: Tensor | None, radius: float, **options: Any) -> CGPath:
    options = dict(tolerance=1e-9, max_products=100) | options
    if region is not None and not torch.equal(region, torch.eye(len(grad)).double()):
        options["preconditioner"] = torch.linalg.inv(region).matmul
    return steihaug(hessian.matmul, grad, radius, **options)


@BOTH_REGIONS
@pytest.mark.parametrize("lowest", [1.0, 0.01, -0.1, -5.0])
@settings(max_examples=50, deadline=None)
@given(data=st.data(), seed=SEEDS, n=st.integers(1, 10))
def test_path_is_the_textbooks(preconditioned: bool, lowest: float, data: st.DataObject, seed: int, n: int) -> None:
    hessian, grad, region = problem(seed, n, lowest, preconditioned)
    radius = data.draw(st.sampled_from([0.01, 0.3, 1.0, 5.0, 1e3]))
    max_products, tolerance = data.draw(st.sampled_from([1, 3, 12])), data.draw(st.sampled_from([1e-2, 1e-7]))
    step, end, n_products = textbook(hessian.numpy(), grad.numpy(), region.numpy(), radius, tolerance, max_products)
    path = path_of(hessian, grad, region, radius, max_products=max_products, tolerance=tolerance)
    assert (path.end.value, path.n_products) == (end, n_products)
    trial = path.step(radius)
    np.testing.assert_allclose(trial.step.numpy(), step, rtol=1e-6, atol=1e-6 * radius)
    assert trial.on_boundary == (end in ("boundary", "negative_curvature"))
    assert trial.negative_curvature == (end == "negative_curvature")
    assert trial.decrease == pytest.approx(decrease(hessian, grad, trial.step), rel=1e-9)
    assert trial.norm == pytest.approx(math.sqrt(trial.step @ region @ trial.step), rel=1e-9)


@BOTH_REGIONS
@pytest.mark.parametrize("lowest", [1.0, 0.01, -0.1])
def test_shorter_step_is_that_of_a_path_made_for_it(lowest: float, preconditioned: bool) -> None:
    ends = set()
    for seed in range(10):
        hessian, grad, region = problem(seed, 12, lowest, preconditioned)
        path = path_of(hessian, grad, region, 20.0)
        for radius in (*np.geomspace(1e-3, 20, 25).tolist(), path.norm, path.norm * (1 - 1e-9)):
            fresh = path_of(hessian, grad, region, radius)
            assert_same(path.step(radius), fresh.step(radius))
            ends.add(fresh.end)
    assert ends == {End.boundary, End.converged if lowest > 0 else End.negative_curvature}


@BOTH_REGIONS
@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("lowest", [0.01, -0.1])
def test_dropped_directions_are_replaced_by_the_chord(lowest: float, keep: int, preconditioned: bool) -> None:
    for seed in range(10):
        hessian, grad, region = problem(seed, 12, lowest, preconditioned)
        whole, path = path_of(hessian, grad, region, 20.0), path_of(hessian, grad, region, 20.0, keep=keep)
        start, last = torch.zeros(12).double(), path.step(20.0).step
        assert torch.equal(whole.step(20.0).step, last)
        if keep:
            start = path_of(hessian, grad, region, 20.0, max_products=keep).step(20.0).step
            first = math.sqrt(start @ region @ start)
            assert torch.equal(path.step(0.99 * first).step, whole.step(0.99 * first).step)
        for weight in (1e-3, 0.1, 0.5, 0.9, 0.999999):
            radius = (1 - weight) * math.sqrt(start @ region @ start) + weight * path.norm
            trial = path.step(radius)
            assert math.sqrt(trial.step @ region @ trial.step) == pytest.approx(radius, rel=1e-7)
            share = float((trial.step - start).norm() / (last - start).norm())
            torch.testing.assert_close(trial.step, torch.lerp(start, last, share), rtol=0, atol=1e-8 * radius)
            assert trial.decrease == pytest.approx(decrease(hessian, grad, trial.step), rel=1e-7)
            assert trial.decrease >= decrease(hessian, grad, start) * (1 - 1e-12)
            assert trial[3:] == (True, path.end is End.negative_curvature)


def test_iterates_minimize_over_krylov_spaces() -> None:
    hessian, grad, _ = problem(0, 20, 0.5)
    basis = grad[:, None]
    for number in range(1, 11):
        space, _ = torch.linalg.qr(basis)
        best = -space @ torch.linalg.solve(space.T @ hessian @ space, space.T @ grad)
        path = path_of(hessian, grad, None, 1e6, max_products=number)
        torch.testing.assert_close(path.step(1e6).step, best, rtol=0, atol=1e-7)
        assert (path.end, path.n_products) == (End.max_products, number)
        basis = torch.cat([basis, (hessian @ basis[:, -1:]) / 10], 1)


@DTYPES
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_long_paths_predict_the_decrease(condition: float, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    hessian = symmetric(np.geomspace(1, condition, 200), generator)[0].to(dtype)
    grad = torch.from_numpy(generator.standard_normal(200)).to(dtype)
    path = path_of(hessian, grad, None, 1e9, max_products=500, tolerance=1e-12, keep=40)
    limit = 1e-3 if dtype == torch.float32 or condition == 1e6 else 1e-12
    trials = [path.step(radius) for radius in (np.linspace(0.02, 1, 50) * path.norm).tolist()]
    for trial in trials:
        assert float(trial.step.double().norm()) == pytest.approx(trial.norm, rel=limit)
        assert trial.decrease == pytest.approx(decrease(hessian, grad, trial.step), rel=limit)
    assert [trial.decrease for trial in trials] == sorted(trial.decrease for trial in trials)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 300), (torch.float32, 30)], ids=str)
def test_path_is_the_same_at_every_magnitude(dtype: torch.dtype, limit: int) -> None:
    hessian, grad, _ = (tensor.to(dtype) for tensor in problem(1, 8, 0.1))
    expected = steihaug(hessian.matmul, grad, 1e3, 1e-3, 20).step(1e3)
    for first, second in [(limit, limit), (-limit, -limit), (limit, 0), (-limit, 0), (0, limit), (0, -limit)]:
        unit, scaled = 10.0 ** (second - first), hessian * 10.0**first
        radius = min(1e3 * unit, 1e307)
        path = steihaug(scaled.matmul, grad * 10.0**second, radius, 1e-3 * 10.0**second, 20)
        trial = path.step(radius)
        torch.testing.assert_close(trial.step.double() / unit, expected.step.double(), rtol=1e-5, atol=1e-5)
        assert trial.norm / unit == pytest.approx(expected.norm, rel=1e-5)
        assert (path.end is End.converged, 0 < trial.decrease < math.inf) == (True, True)
        shorter = path.step(trial.norm / 3).step.double()
        assert float((shorter / trial.norm).norm()) == pytest.approx(1 / 3, rel=1e-5)


@pytest.mark.parametrize("keep", [0, 50])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("good", [0, 1, 4])
def test_non_finite_product_ends_the_path_before_it(good: int, bad: float, keep: int) -> None:
    hessian, grad, _ = problem(0, 12, 1.0)
    factors = iter([1.0] * good + [bad])
    path = steihaug(lambda v: hessian @ v * next(factors), grad, 1e3, 0.0, 50, keep=keep)
    assert (path.end, path.n_products) == (End.non_finite, good + 1)
    for radius in (1e3, 0.1):
        expected = path_of(hessian, grad, None, 1e3, max_products=good, keep=keep).step(radius) if good else no_step(12)
        assert_same(path.step(radius), expected)


def test_gradient_that_is_zero_small_or_not_finite_needs_no_product() -> None:
    small, bad = [(0.0, 0.0), (1e-9, 1e-9), ()], [(1.0, math.nan), (1.0, -math.inf)]
    for numbers in small + bad:
        path = steihaug(pytest.fail, torch.tensor(numbers), 2.0, 1e-6, 10)
        end = End.converged if numbers in small else End.non_finite
        assert (path.end, path.n_products) == (end, 0)
        assert_same(path.step(1.0), no_step(len(numbers), torch.float32))


def test_no_curvature_is_not_negative_curvature() -> None:
    path = steihaug(torch.zeros_like, torch.tensor([3.0, 4.0]), 10.0, 0.0, 5)
    assert path.end is End.boundary
    torch.testing.assert_close(path.step(5.0).step, torch.tensor([-3.0, -4.0]))
    assert path.step(5.0)[1:] == (5.0, pytest.approx(25.0), True, False)


@BOTH_REGIONS
def test_one_transfer_per_product(preconditioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, grad, region = problem(0, 12, 0.1, preconditioned)
    options = dict(preconditioner=torch.linalg.inv(region).matmul) if preconditioned else {}
    calls = count_calls(monkeypatch, Tensor, "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__")
    path = steihaug(hessian.matmul, grad, 1e3, 1e-3, 100, **options)
    path.step(0.1)
    assert len(calls) == path.n_products + 1


def test_long_dot_products_keep_their_digits() -> None:
    grad = torch.rand(3_000_000)
    trial = steihaug(torch.clone, grad, 1e6, 0.0, 1).step(1e6)
    assert trial.decrease == pytest.approx(float(grad.double() @ grad.double()) / 2, rel=3e-6)


def test_steihaug_says_what_is_wrong() -> None:
    for options, message in [
        (dict(radius=0.0), "steihaug: radius must be > 0 and finite, got 0.0"),
        (dict(tolerance=-1.0), "steihaug: tolerance must be >= 0 and finite, got -1.0"),
        (dict(max_products=0), "steihaug: max_products must be > 0 and finite, got 0"),
        (dict(keep=-1), "steihaug: keep must be >= 0 and finite, got -1"),
        (dict(preconditioner=torch.neg), "preconditioner must be positive definite"),
    ]:
        with pytest.raises(ValueError, match=message):
            steihaug(torch.clone, torch.ones(2), **(dict(radius=1.0, tolerance=0.1, max_products=3) | options))
    path = steihaug(torch.clone, torch.ones(2), 1.0, 0.1, 3)
    for radius, message in [(2.0, "at most the path's, 1.0, got 2.0"), (math.nan, "> 0 and finite, got nan")]:
        with pytest.raises(ValueError, match=rf"CGPath\.step: radius must be {message}"):
            path.step(radius)
