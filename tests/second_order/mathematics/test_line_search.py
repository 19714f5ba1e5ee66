"""The line search: what it calls found is true, and no limit is ever crossed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from descend.second_order.mathematics import line_search
from descend.second_order.mathematics.line_search import Outcome, Search, Trial, hager_zhang

Phi = line_search.Phi
STARTS = (1e-3, 1e-1, 1e1, 1e3)


def more_thuente_1(t: float) -> tuple[float, float]:
    return -t / (t**2 + 2), (t**2 - 2) / (t**2 + 2) ** 2


def more_thuente_2(t: float) -> tuple[float, float]:
    s = t + 0.004
    return s**5 - 2 * s**4, 5 * s**4 - 8 * s**3


def more_thuente_3(t: float, beta: float = 0.01, waves: int = 39) -> tuple[float, float]:
    if abs(t - 1) >= beta:
        base, slope = abs(t - 1), math.copysign(1.0, t - 1)
    else:
        base, slope = (t - 1) ** 2 / (2 * beta) + beta / 2, (t - 1) / beta
    angle, height = waves * math.pi / 2 * t, 1 - beta
    return base + 2 * height / (waves * math.pi) * math.sin(angle), slope + height * math.cos(angle)


def yanai(beta1: float, beta2: float) -> Phi:
    def phi(t: float) -> tuple[float, float]:
        weight1, weight2 = math.hypot(1, beta1) - beta1, math.hypot(1, beta2) - beta2
        left, right = math.hypot(1 - t, beta2), math.hypot(t, beta1)
        return weight1 * left + weight2 * right, weight1 * (t - 1) / left + weight2 * t / right

    return phi


MORE_THUENTE = (
    more_thuente_1,
    more_thuente_2,
    more_thuente_3,
    yanai(0.001, 0.001),
    yanai(0.01, 0.001),
    yanai(0.001, 0.01),
)


def parabola(minimum: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> Phi:
    return lambda t: (scale * (0.5 * t**2 / minimum - t) + shift, scale * (t / minimum - 1))


def until(edge: float, phi: Phi, beyond: tuple[float, float]) -> Phi:
    return lambda t: phi(t) if t < edge else beyond


def in_float32(phi: Phi) -> Phi:
    return lambda t: (float(np.float32(phi(t)[0])), phi(t)[1])


def barrier(t: float) -> tuple[float, float]:
    """A logarithm that ends at 1, with its minimum just before."""
    return (-t - 0.01 * math.log1p(-t), -1 + 0.01 / (1 - t)) if t < 1 else (math.nan, math.nan)


def quartic(t: float) -> tuple[float, float]:
    return (t - 1) ** 4, 4 * (t - 1) ** 3


def steep_exponential(t: float) -> tuple[float, float]:
    return (math.exp(500 * t) - 1000 * t, 500 * math.exp(500 * t) - 1000) if t < 1.4 else (math.inf, math.inf)


def hole(t: float) -> tuple[float, float]:
    """Not finite around the minimum."""
    return (math.inf, math.nan) if 0.2 < t < 0.9 else parabola()(t)


def zigzag(t: float) -> tuple[float, float]:
    """The slope says nothing about the values."""
    return math.sin(1e3 * t) - t / 10, -1.0 if t < 1 else math.cos(7e3 * t)


class Case(NamedTuple):
    """A function on a line, the first trial, and how the search ends."""

    name: str
    phi: Phi
    step: float = 1.0
    options: Mapping[str, Any] = MappingProxyType({})
    ends: str = "found"
    most: int = 20  # evaluations

    def __str__(self) -> str:
        return self.name


INF, NAN = math.inf, math.nan
CASES = [
    *(Case(f"more-thuente-{i}-{t:g}", phi, t) for i, phi in enumerate(MORE_THUENTE, 1) for t in STARTS),
    Case("cliff to inf", until(0.4, parabola(), (INF, INF))),
    Case("cliff before the decrease", until(1e-9, parabola(), (INF, 1.0)), ends="non_finite"),
    Case("nan beyond the minimum", until(1.5, parabola(), (NAN, NAN)), step=1e3, most=5),
    Case("nan before the minimum", until(0.3, parabola(), (NAN, NAN)), ends="non_finite", most=10),
    Case("nan everywhere", until(1e-300, parabola(), (NAN, NAN)), ends="non_finite", most=30),
    Case("infinite slope", until(1.5, parabola(), (0.0, INF)), step=4.0, most=3),
    Case("minus infinity", until(1.5, parabola(), (-INF, -1.0)), step=4.0, most=3),
    Case("barrier", barrier, step=100.0, ends="non_finite", most=7),
    Case("hole", hole),
    Case("float32 values", in_float32(parabola(1e-4, 1.0, 100.0)), options=dict(noise=1e-4), most=6),
    Case("float32 values, flat", in_float32(parabola(1e-6, 1.0, 1e4)), options=dict(noise=1e-2), most=10,
         ends="found"),
    Case("slopes of 1e30", parabola(scale=1e30), step=7.0, most=3),
    Case("slopes of 1e-30", parabola(scale=1e-30), step=7.0, most=3),
    Case("slopes of 1e300", parabola(scale=1e300), step=7.0, most=3),
    Case("values of 1e300", parabola(scale=1e300, shift=1e300), step=7.0, most=3),
    Case("values up to 1e308", until(1e3, parabola(scale=1e303), (1e308, 1e300)), step=1e4, most=6),
    Case("minimum at 1e-12", parabola(1e-12)),
    Case("minimum at 1e-12, far", parabola(1e-12), step=1e3),
    Case("minimum at 1e12", parabola(1e12)),
    Case("minimum at 1e12, 10", parabola(1e12), step=10.0),
    Case("subnormal step", parabola(1e-310), step=1e-320),
    Case("quartic", quartic, step=30.0, most=5),
    Case("steep exponential", steep_exponential, most=12),
    Case("linear", lambda t: (-t, -1.0), ends="no_bracket", most=30),
    Case("exponential fall", lambda t: (-math.exp(min(t, 700)), -math.exp(min(t, 700))),
         ends="no_bracket", most=30),
    Case("kink", lambda t: (abs(t - 1), math.copysign(1.0, t - 1)), step=0.3, ends="found", most=30),
    Case("a lie", lambda t: (t, 1.0 if t else -1.0), ends="max_eval", most=30),
    Case("a lie in every slope", lambda t: (t, -1.0), ends="precision", most=30),
    Case("constant", lambda t: (3.0, -1.0), ends="precision", most=4),
    Case("constant, true slopes", lambda t: (3.0, 0.0 if t else -1.0), ends="found", most=4),
    Case("constant, slope of 1e-20", lambda t: (3.0, -1e-20), options=dict(noise=1e-15), most=15,
         ends="precision"),
    Case("zigzag", zigzag, ends="max_eval", most=30),
    Case("max_step in the fall", parabola(10.0), options=dict(max_step=1.5), ends="max_step", most=2),
    Case("max_step first", parabola(10.0), 9.0, options=dict(max_step=1.5), ends="max_step", most=1),
    Case("max_step beyond the minimum", parabola(), 9.0, options=dict(max_step=3.0), most=2),
]  # fmt: skip


class Recorder:
    """Wraps phi and checks its calls: none beyond a non-finite one or max_step, none too many, none twice."""

    def __init__(self, phi: Phi, max_step: float, max_eval: int) -> None:
        self.phi, self.max_step, self.max_eval = phi, max_step, max_eval
        self.seen: dict[float, tuple[float, float]] = {}
        self.nonfinite = INF

    def __call__(self, step: float) -> tuple[float, float]:
        assert 0 < step <= self.max_step
        assert step < self.nonfinite
        assert step not in self.seen or step < 1e-300  # there are few numbers below
        assert len(self.seen) < self.max_eval
        self.seen[step] = self.phi(step)
        if not all(map(math.isfinite, self.seen[step])):
            self.nonfinite = step
        return self.seen[step]


def check(phi: Phi, step: float, **options: Any) -> Search:
    """Search, and assert that everything the result says is true."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(hager_zhang).parameters.items()}
    c1, c2, noise, max_step, max_eval = (
        (defaults | options)[name] for name in ("c1", "c2", "noise", "max_step", "max_eval")
    )
    value, slope = phi(0.0)
    recorder = Recorder(phi, max_step, max_eval)
    result = hager_zhang(recorder, value, slope, step, **options)

    seen = {0.0: (value, slope)} | recorder.seen
    assert seen[result.step] == (result.value, result.slope)
    assert result.n_eval == len(recorder.seen)
    sufficient = result.value <= value + c1 * result.step * slope
    within = result.value <= value + noise
    if result.outcome is Outcome.found:
        assert result.slope >= c2 * slope
        assert sufficient or (within and result.slope <= (2 * c1 - 1) * slope)
    elif result.outcome is Outcome.max_step:
        assert result.step == max_step
        assert result.slope < 0
        assert sufficient or within
    else:
        assert result.value == min(at for at, slope in seen.values() if math.isfinite(at) and math.isfinite(slope))
        assert result.step == 0 or result.value < value
        assert (result.outcome is not Outcome.non_finite) or recorder.nonfinite < INF
        assert (result.outcome is not Outcome.max_eval) or result.n_eval == max_eval
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_search_ends_as_it_says(case: Case) -> None:
    result = check(case.phi, case.step, **case.options)
    assert result.outcome == case.ends
    assert result.n_eval <= case.most


@pytest.mark.parametrize("max_eval", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_limit_of_evaluations_is_exact(case: Case, max_eval: int) -> None:
    result = check(case.phi, case.step, **case.options, max_eval=max_eval)
    unlimited = check(case.phi, case.step, **case.options)
    assert result.n_eval == min(max_eval, unlimited.n_eval)
    assert unlimited.n_eval > max_eval or result == unlimited


def test_first_trial_costs_one_evaluation() -> None:
    assert check(parabola(1.1), 1.0)[2:] == (pytest.approx(-1 / 11), 1, Outcome.found)


def test_hager_zhang_trusts_slopes_where_values_are_noise() -> None:
    def phi(t: float) -> tuple[float, float]:
        return 1e6 + 1e-10 * math.sin(1e9 * t), 1e-9 * (t - 1.0)

    for step, most in ((0.01, 3), (0.2, 2), (3.0, 2), (50.0, 4)):
        result = check(phi, step, noise=1e-8, c2=0.01)
        assert result.outcome is Outcome.found
        assert result.n_eval <= most


@pytest.mark.parametrize(("power", "far"), [(2, 1e12), (4, 1e9), (6, 1e6), (12, 1e3)])
def test_hager_zhang_comes_back_from_far(power: int, far: float) -> None:
    """A cubic alone would need a trial for each factor of 2 or 3."""
    assert check(lambda t: (t**power - t, power * t ** (power - 1) - 1), far).n_eval <= 4


def test_hager_zhang_bisects_where_interpolation_creeps() -> None:
    def cleft(t: float) -> tuple[float, float]:
        return (-t, -1.0) if t < 1 else (1e6 * (t - 1) - 1, 1e6)

    result = check(cleft, 2.0, max_eval=100)
    assert result.outcome is Outcome.found
    assert result.n_eval <= 50


BAD_ARGUMENTS = [
    (dict(value=NAN), "value must be finite, got nan"),
    (dict(value=INF), "value must be finite, got inf"),
    (dict(slope=0.0), "slope must be finite and < 0, got 0.0; take a descent direction"),
    (dict(slope=1.0), "slope must be finite and < 0, got 1.0"),
    (dict(slope=NAN), "slope must be finite and < 0, got nan"),
    (dict(slope=-INF), "slope must be finite and < 0, got -inf"),
    (dict(step=0.0), "step must be finite and > 0, got 0.0"),
    (dict(step=-1.0), "step must be finite and > 0, got -1.0"),
    (dict(step=INF), "step must be finite and > 0, got inf"),
    (dict(step=NAN), "step must be finite and > 0, got nan"),
    (dict(max_eval=0), "max_eval must be at least 1, got 0"),
    (dict(c1=0.0), "got c1=0.0"),
    (dict(c1=NAN), "got c1=nan"),
    (dict(c1=0.4, c2=0.3), "0 < c1 <= c2 < 1 .* got c1=0.4 and c2=0.3"),
    (dict(c2=1.0), "got c1=0.0001 and c2=1.0"),
    (dict(c1=0.6), "c1 < 1/2"),
    (dict(max_step=0.0), "max_step must be > 0, got 0.0"),
    (dict(max_step=NAN), "max_step must be > 0, got nan"),
    (dict(growth=1.0), "growth must be > 1, got 1.0"),
    (dict(noise=-1.0), "noise must be finite and >= 0, got -1.0"),
    (dict(noise=NAN), "noise must be finite and >= 0, got nan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    def phi(step: float) -> tuple[float, float]:
        raise AssertionError("called before the arguments were checked")

    with pytest.raises(ValueError, match=f"hager_zhang: .*{message}"):
        hager_zhang(phi, **(dict(value=1.0, slope=-1.0, step=1.0) | arguments))


def test_an_error_in_phi_is_not_swallowed() -> None:
    def phi(step: float) -> tuple[float, float]:
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        hager_zhang(phi, 1.0, -1.0, 1.0)


EXTREMES = [0.0, -0.0, 5e-324, 1e-310, 1e-30, 1.0, 1e30, 1e300, 1.7e308]
NUMBERS = st.sampled_from(EXTREMES + [-number for number in EXTREMES]) | st.floats(
    allow_nan=False, allow_infinity=False
)
POSITIVE = st.sampled_from(EXTREMES[2:]) | st.floats(min_value=5e-324, max_value=1.7e308)
ANYTHING = NUMBERS | st.sampled_from([NAN, INF, -INF])
COMMON = dict(
    value=NUMBERS, slope=POSITIVE, step=POSITIVE, max_step=POSITIVE | st.just(INF), max_eval=st.integers(1, 40),
    noise=st.just(0.0) | st.floats(0, 1e3),
)  # fmt: skip


@given(**COMMON, answers=st.lists(st.tuples(ANYTHING, ANYTHING), min_size=1, max_size=8))
def test_no_answer_of_phi_can_break_the_search(
    value: float, slope: float, step: float, answers: list[tuple[float, float]], **options: Any
) -> None:
    """phi answers at random, without any function behind it."""
    known = {0.0: (value, -slope)}
    check(lambda t: known.setdefault(t, answers[len(known) % len(answers)]), step, **options)


@given(
    step=st.floats(1e-6, 1e6),
    minimum=st.floats(1e-6, 1e6),
    wave=st.floats(0, 0.9),
    waves=st.floats(0.1, 30),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    edge=st.floats(1.5, 1e6),
)
def test_wavy_functions_are_always_searched_well(
    step: float, minimum: float, wave: float, waves: float, scale: float, edge: float
) -> None:
    def phi(t: float) -> tuple[float, float]:
        s = t / minimum
        if s > edge:
            return NAN, NAN
        value = 0.5 * (s - 1) ** 2 + wave / waves * math.sin(waves * s) * s / (1 + s)
        slope = s - 1 + wave * (math.cos(waves * s) * s / (1 + s) + math.sin(waves * s) / waves / (1 + s) ** 2)
        return scale * value, scale * slope / minimum

    assert check(phi, step, max_eval=60).outcome is Outcome.found


@given(st.lists(POSITIVE, min_size=2, max_size=2, unique=True), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
@example([5e-324, 1e-323], 1.7e308, -1.7e308, 1e300, -1e300)
def test_interpolation_never_fails(
    steps: list[float], value: float, other_value: float, slope: float, other_slope: float
) -> None:
    low, high = Trial(min(steps), value, slope), Trial(max(steps), other_value, other_slope)
    falling = low._replace(slope=-abs(low.slope) or -1.0)
    guesses = [
        line_search._cubic(low, high),
        line_search._secant(low, high),
        line_search._minimizer(low, high, 0.0),
        line_search._within(falling, high, 0.0),
        line_search._beyond(falling, high, 0.0),
    ]
    for guess in guesses:
        search = [0.0] * line_search.WIDTH
        line_search.begin(search, 0.0, -1.0, 1.0, INF, 30, 0.0)
        search[line_search.FIRST] = high.step
        step = line_search._inside(search, low, high, high, guess)
        assert math.isnan(step) or low.step < step < high.step
        step = line_search._ahead(search, low, guess)
        assert math.isnan(step) or low.step < step < INF


@pytest.mark.parametrize("factor", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_interpolation_is_exact(factor: float) -> None:
    def cubic(t: float) -> Trial:
        return Trial(t, factor * (t**3 - 3 * t), factor * (3 * t**2 - 3))

    def square(t: float) -> Trial:
        return Trial(t, factor * (t - 3) ** 2, factor * 2 * (t - 3))

    assert line_search._cubic(cubic(-1.0), cubic(0.5)) == pytest.approx(1.0)
    for a, b in ((0.0, 1.5), (0.0, 0.5), (2.0, 5.0)):
        assert line_search._cubic(cubic(a), cubic(b)) == pytest.approx(1.0)
        assert line_search._cubic(square(a), square(b)) == pytest.approx(3.0)
        assert line_search._secant(square(a), square(b)) == pytest.approx(3.0)
