"""Gradients by finite differences are as accurate as their order, and never leave the bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import rosen, rosen_der

from descend.second_order.mathematics.differences import EVALUATIONS, SCHEMES, difference_gradient, lengths

ERROR = {"2-point": 3e-5, "3-point": 1e-7}  # from second derivatives of 1e3, and third ones of 3e3
POINT = np.array([-1.2, 1.0, 0.5, 0.0])


class Within:
    """Rosenbrock's function, which records where it was called."""

    def __init__(self) -> None:
        self.points: list[Any] = []

    def __call__(self, x: Any) -> float:
        self.points.append(x.copy())
        return float(rosen(x))


def gradient(scheme: Any, x: Any, lower: Any, upper: Any, **options: Any) -> tuple[Any, list[Any]]:
    fun = Within()
    before = x.copy()
    found = difference_gradient(fun, x, rosen(x), lengths(x, scheme, **options), scheme, lower + 0 * x, upper + 0 * x)
    assert np.array_equal(x, before)
    return found, fun.points


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [0, 1, 4])
def test_gradient_is_accurate(scheme: Any, size: int) -> None:
    x = POINT[:size]
    found, points = gradient(scheme, x, -math.inf, math.inf)
    exact = rosen_der(x) if size > 1 else np.zeros(size)
    assert found == pytest.approx(exact, abs=ERROR[scheme])
    assert len(points) == EVALUATIONS[scheme] * size
    assert all(np.count_nonzero(point != x) == 1 for point in points)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("lower", "upper"), [(POINT, math.inf), (-math.inf, POINT), (POINT - 1e-7, POINT + 1e-12), (POINT, POINT + 1e-3)]
)
def test_gradient_is_accurate_at_the_bounds(scheme: Any, lower: Any, upper: Any) -> None:
    found, points = gradient(scheme, POINT, lower, upper)
    is_wide = np.all(upper - lower > 1e-5)
    assert found == pytest.approx(rosen_der(POINT), abs=1e3 * ERROR[scheme] if not is_wide else 100 * ERROR[scheme])
    assert all(np.all((lower <= point) & (point <= upper)) for point in points)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fixed_variables_are_not_moved(scheme: Any) -> None:
    lower = np.where([True, False, True, False], POINT, -math.inf)
    upper = np.where([True, False, True, False], POINT, math.inf)
    found, points = gradient(scheme, POINT, lower, upper)
    assert found[[0, 2]].tolist() == [0, 0]
    assert found[[1, 3]] == pytest.approx(rosen_der(POINT)[[1, 3]], abs=ERROR[scheme])
    assert len(points) == 2 * EVALUATIONS[scheme]


def test_lengths_are_absolute_relative_or_of_the_precision() -> None:
    x = np.array([0.0, 1e6, -3.0])
    root = math.sqrt(np.finfo(float).eps)
    assert lengths(x, "2-point").tolist() == [root, 1e6 * root, 3 * root]
    assert lengths(x, "2-point", absolute=1e-3).tolist() == [1e-3] * 3
    assert lengths(x, "2-point", absolute=1e-12).tolist() == [1e-12, 1e6 * root, 1e-12]  # 1e6 + 1e-12 is 1e6
    assert lengths(x, "2-point", relative=-0.1).tolist() == pytest.approx([root, 1e5, 0.3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_at_the_end_of_the_domain_is_not_finite(scheme: Any, value: float) -> None:
    def fun(x: Any) -> float:
        return value if x[0] > 0 else 1.0

    found = difference_gradient(
        fun, np.zeros(1), 1.0, np.full(1, 1e-8), scheme, np.full(1, -math.inf), np.full(1, math.inf)
    )
    assert not np.isfinite(found).any()
