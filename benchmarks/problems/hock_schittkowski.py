"""Problems with constraints by Hock and Schittkowski: those with smooth functions and at most ten variables.

Each function maps the variables to (objective, equalities, inequalities), where equalities are zero and inequalities
are not negative at a feasible point. Starts are the published ones. ``best`` is the lowest value known of a feasible
point; where it differs from the published one, a comment says so.

Source: Hock & Schittkowski 1981, Test Examples for Nonlinear Programming Codes,
    https://doi.org/10.1007/978-3-642-48320-2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import asin, cos, exp, inf, log, pi, sin, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from problems.problem import data

Parts = tuple[Tensor, list[Tensor], list[Tensor]]


class ConstrainedProblem(NamedTuple):
    """A smooth problem with constraints and bounds.

    Attributes:
        name: "hs" and the number in the book.
        parts: maps a 1-d tensor to the objective, the equalities and the inequalities.
        x0: the start, in float64.
        best: lowest known value of the objective at a feasible point.
        lower, upper: bounds, infinite where there are none.
    """

    name: str
    parts: Callable[[Tensor], Parts]
    x0: Tensor
    best: float
    lower: Tensor
    upper: Tensor

    def fun(self, x: Tensor) -> Tensor:
        return self.parts(x)[0]

    def equalities(self, x: Tensor) -> Tensor:
        return _vector(self.parts(x)[1], x)

    def inequalities(self, x: Tensor) -> Tensor:
        return _vector(self.parts(x)[2], x)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of equalities and of inequalities."""
        _, equalities, inequalities = self.parts(self.x0)
        return len(equalities), len(inequalities)

    @property
    def has_bounds(self) -> bool:
        return bool((self.lower > -inf).any() or (self.upper < inf).any())


def _vector(parts: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(parts) if parts else x.new_zeros(0)


_PROBLEMS: dict[str, ConstrainedProblem] = {}
Bound = float | Sequence[float]


def _hs(
    number: int, x0: Sequence[float], best: float, lower: Bound = -inf, upper: Bound = inf
) -> Callable[[Callable[[Tensor], Parts]], Callable[[Tensor], Parts]]:
    """Register a problem; a bound is one number for all variables or one for each."""

    def register(parts: Callable[[Tensor], Parts]) -> Callable[[Tensor], Parts]:
        start = data(*x0)
        low, high = (torch.as_tensor(end, dtype=start.dtype).expand_as(start).clone() for end in (lower, upper))
        _PROBLEMS[f"hs{number}"] = ConstrainedProblem(f"hs{number}", parts, start, best, low, high)
        return parts

    return register


def problems() -> list[ConstrainedProblem]:
    """All of them, in the book's order."""
    return [_PROBLEMS[name] for name in sorted(_PROBLEMS, key=lambda name: int(name[2:]))]


def rosenbrock(a: Tensor, b: Tensor) -> Tensor:
    return 100 * (b - a**2) ** 2 + (1 - a) ** 2


def colville(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    crossed = 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)
    return rosenbrock(a, b) + 90 * (d - c**2) ** 2 + (1 - c) ** 2 + crossed


# Two variables.


@_hs(2, (-2, 1), 0.0504261879, lower=(-inf, 1.5))
@_hs(1, (-2, 1), 0.0, lower=(-inf, -1.5))
def hs1(x: Tensor) -> Parts:
    return rosenbrock(*x), [], []


@_hs(3, (10, 1), 0.0, lower=(-inf, 0))
def hs3(x: Tensor) -> Parts:
    a, b = x
    return b + 1e-5 * (b - a) ** 2, [], []


@_hs(4, (1.125, 0.125), 8 / 3, lower=(1, 0))
def hs4(x: Tensor) -> Parts:
    a, b = x
    return (a + 1) ** 3 / 3 + b, [], []


@_hs(5, (0, 0), -sqrt(3) / 2 - pi / 3, lower=(-1.5, -3), upper=(4, 3))
def hs5(x: Tensor) -> Parts:
    a, b = x
    return torch.sin(a + b) + (a - b) ** 2 - 1.5 * a + 2.5 * b + 1, [], []


@_hs(6, (-1.2, 1), 0.0)
def hs6(x: Tensor) -> Parts:
    a, b = x
    return (1 - a) ** 2, [10 * (b - a**2)], []


@_hs(7, (2, 2), -sqrt(3))
def hs7(x: Tensor) -> Parts:
    a, b = x
    return torch.log(1 + a**2) - b, [(1 + a**2) ** 2 + b**2 - 4], []


@_hs(8, (2, 1), -1.0)
def hs8(x: Tensor) -> Parts:
    a, b = x
    return 0 * a - 1, [a**2 + b**2 - 25, a * b - 9], []


@_hs(9, (0, 0), -0.5)
def hs9(x: Tensor) -> Parts:
    a, b = x
    return torch.sin(pi * a / 12) * torch.cos(pi * b / 16), [4 * a - 3 * b], []


@_hs(10, (-10, 10), -1.0)
def hs10(x: Tensor) -> Parts:
    a, b = x
    return a - b, [], [-3 * a**2 + 2 * a * b - b**2 + 1]


@_hs(11, (4.9, 0.1), -8.498464223)
def hs11(x: Tensor) -> Parts:
    a, b = x
    return (a - 5) ** 2 + b**2 - 25, [], [b - a**2]


@_hs(12, (0, 0), -30.0)
def hs12(x: Tensor) -> Parts:
    a, b = x
    return a**2 / 2 + b**2 - a * b - 7 * a - 7 * b, [], [25 - 4 * a**2 - b**2]


@_hs(13, (-2, -2), 1.0, lower=0)
def hs13(x: Tensor) -> Parts:
    a, b = x
    return (a - 2) ** 2 + b**2, [], [(1 - a) ** 3 - b]


@_hs(14, (2, 2), 9 - 2.875 * sqrt(7))
def hs14(x: Tensor) -> Parts:
    a, b = x
    return (a - 2) ** 2 + (b - 1) ** 2, [a - 2 * b + 1], [1 - a**2 / 4 - b**2]


@_hs(15, (-2, 1), 306.5, upper=(0.5, inf))
def hs15(x: Tensor) -> Parts:
    a, b = x
    return rosenbrock(a, b), [], [a * b - 1, a + b**2]


@_hs(16, (-2, 1), 0.25, lower=(-0.5, -inf), upper=(0.5, 1))
def hs16(x: Tensor) -> Parts:
    a, b = x
    return rosenbrock(a, b), [], [a + b**2, a**2 + b]


@_hs(17, (-2, 1), 1.0, lower=(-0.5, -inf), upper=(0.5, 1))
def hs17(x: Tensor) -> Parts:
    a, b = x
    return rosenbrock(a, b), [], [b**2 - a, a**2 - b]


@_hs(18, (2, 2), 5.0, lower=(2, 0), upper=50)
def hs18(x: Tensor) -> Parts:
    a, b = x
    return 0.01 * a**2 + b**2, [], [a * b - 25, a**2 + b**2 - 25]


@_hs(19, (20.1, 5.84), -6961.81387558, lower=(13, 0), upper=100)
def hs19(x: Tensor) -> Parts:
    a, b = x
    outside, inside = (a - 5) ** 2 + (b - 5) ** 2 - 100, 82.81 - (b - 5) ** 2 - (a - 6) ** 2
    return (a - 10) ** 3 + (b - 20) ** 3, [], [outside, inside]


@_hs(20, (-2, 1), 81.5 - 25 * sqrt(3), lower=(-0.5, -inf), upper=(0.5, inf))
def hs20(x: Tensor) -> Parts:
    a, b = x
    return rosenbrock(a, b), [], [a + b**2, a**2 + b, a**2 + b**2 - 1]


@_hs(21, (-1, -1), -99.96, lower=(2, -50), upper=50)
def hs21(x: Tensor) -> Parts:
    a, b = x
    return 0.01 * a**2 + b**2 - 100, [], [10 * a - b - 10]


@_hs(22, (2, 2), 1.0)
def hs22(x: Tensor) -> Parts:
    a, b = x
    return (a - 2) ** 2 + (b - 1) ** 2, [], [2 - a - b, b - a**2]


@_hs(23, (3, 1), 2.0, lower=-50, upper=50)
def hs23(x: Tensor) -> Parts:
    a, b = x
    return a**2 + b**2, [], [a + b - 1, a**2 + b**2 - 1, 9 * a**2 + b**2 - 9, a**2 - b, b**2 - a]


@_hs(24, (1, 0.5), -1.0, lower=0)
def hs24(x: Tensor) -> Parts:
    a, b = x
    fall = ((a - 3) ** 2 - 9) * b**3 / (27 * sqrt(3))
    return fall, [], [a / sqrt(3) - b, a + sqrt(3) * b, 6 - a - sqrt(3) * b]


# Three variables.


@_hs(25, (100, 12.5, 3), 0.0, lower=(0.1, 0, 0), upper=(100, 25.6, 5))
def hs25(x: Tensor) -> Parts:
    a, b, c = x
    share = torch.arange(1, 100).to(x) / 100
    levels = 25 + (-50 * share.log()) ** (2 / 3)
    return (torch.exp(-((levels - b) ** c) / a) - share).square().sum(), [], []


@_hs(26, (-2.6, 2, 2), 0.0)
def hs26(x: Tensor) -> Parts:
    a, b, c = x
    return (a - b) ** 2 + (b - c) ** 4, [(1 + b**2) * a + c**4 - 3], []


@_hs(27, (2, 2, 2), 0.04)
def hs27(x: Tensor) -> Parts:
    a, b, c = x
    return 0.01 * (a - 1) ** 2 + (b - a**2) ** 2, [a + c**2 + 1], []


@_hs(28, (-4, 1, 1), 0.0)
def hs28(x: Tensor) -> Parts:
    a, b, c = x
    return (a + b) ** 2 + (b + c) ** 2, [a + 2 * b + 3 * c - 1], []


@_hs(29, (1, 1, 1), -16 * sqrt(2))
def hs29(x: Tensor) -> Parts:
    a, b, c = x
    return -a * b * c, [], [48 - a**2 - 2 * b**2 - 4 * c**2]


@_hs(30, (1, 1, 1), 1.0, lower=(1, -10, -10), upper=10)
def hs30(x: Tensor) -> Parts:
    a, b, _ = x
    return x.square().sum(), [], [a**2 + b**2 - 1]


@_hs(31, (1, 1, 1), 6.0, lower=(-10, 1, -10), upper=(10, 10, 1))
def hs31(x: Tensor) -> Parts:
    a, b, c = x
    return 9 * a**2 + b**2 + 9 * c**2, [], [a * b - 1]


@_hs(32, (0.1, 0.7, 0.2), 1.0, lower=0)
def hs32(x: Tensor) -> Parts:
    a, b, c = x
    return (a + 3 * b + c) ** 2 + 4 * (a - b) ** 2, [1 - a - b - c], [6 * b + 4 * c - a**3 - 3]


@_hs(33, (0, 0, 3), sqrt(2) - 6, lower=0, upper=(inf, inf, 5))
def hs33(x: Tensor) -> Parts:
    a, b, c = x
    return (a - 1) * (a - 2) * (a - 3) + c, [], [c**2 - b**2 - a**2, x.square().sum() - 4]


@_hs(34, (0, 1.05, 2.9), -log(log(10)), lower=0, upper=(100, 100, 10))
def hs34(x: Tensor) -> Parts:
    a, b, c = x
    return -a, [], [b - torch.exp(a), c - torch.exp(b)]


@_hs(35, (0.5, 0.5, 0.5), 1 / 9, lower=0)
def hs35(x: Tensor) -> Parts:
    a, b, c = x
    bowl = 9 - 8 * a - 6 * b - 4 * c + 2 * a**2 + 2 * b**2 + c**2 + 2 * a * b + 2 * a * c
    return bowl, [], [3 - a - b - 2 * c]


@_hs(36, (10, 10, 10), -3300.0, lower=0, upper=(20, 11, 42))
def hs36(x: Tensor) -> Parts:
    a, b, c = x
    return -a * b * c, [], [72 - a - 2 * b - 2 * c]


@_hs(37, (10, 10, 10), -3456.0, lower=0, upper=42)
def hs37(x: Tensor) -> Parts:
    a, b, c = x
    girth = a + 2 * b + 2 * c
    return -a * b * c, [], [72 - girth, girth]


# Four variables.


@_hs(38, (-3, -1, -3, -1), 0.0, lower=-10, upper=10)
def hs38(x: Tensor) -> Parts:
    return colville(*x), [], []


@_hs(39, (2, 2, 2, 2), -1.0)
def hs39(x: Tensor) -> Parts:
    a, b, c, d = x
    return -a, [b - a**3 - c**2, a**2 - b - d**2], []


@_hs(40, (0.8, 0.8, 0.8, 0.8), -0.25)
def hs40(x: Tensor) -> Parts:
    a, b, c, d = x
    return -x.prod(), [a**3 + b**2 - 1, a**2 * d - c, d**2 - b], []


@_hs(41, (2, 2, 2, 2), 52 / 27, lower=0, upper=(1, 1, 1, 2))
def hs41(x: Tensor) -> Parts:
    a, b, c, d = x
    return 2 - a * b * c, [a + 2 * b + 2 * c - d], []


@_hs(42, (1, 1, 1, 1), 28 - 10 * sqrt(2))
def hs42(x: Tensor) -> Parts:
    a, _, c, d = x
    return (x - torch.arange(1, 5).to(x)).square().sum(), [a - 2, c**2 + d**2 - 2], []


@_hs(43, (0, 0, 0, 0), -44.0)
def hs43(x: Tensor) -> Parts:
    a, b, c, d = x
    bowl = a**2 + b**2 + 2 * c**2 + d**2 - 5 * a - 5 * b - 21 * c + 7 * d
    first = 8 - x.square().sum() - a + b - c + d
    second = 10 - a**2 - 2 * b**2 - c**2 - 2 * d**2 + a + d
    return bowl, [], [first, second, 5 - 2 * a**2 - b**2 - c**2 - 2 * a + b + d]


@_hs(44, (0, 0, 0, 0), -15.0, lower=0)
def hs44(x: Tensor) -> Parts:
    a, b, c, d = x
    limits = [8 - a - 2 * b, 12 - 4 * a - b, 12 - 3 * a - 4 * b, 8 - 2 * c - d, 8 - c - 2 * d, 5 - c - d]
    return a - b - c - a * c + a * d + b * c - b * d, [], limits


# Five variables.


@_hs(45, (2, 2, 2, 2, 2), 1.0, lower=0, upper=(1, 2, 3, 4, 5))
def hs45(x: Tensor) -> Parts:
    return 2 - x.prod() / 120, [], []


@_hs(46, (sqrt(2) / 2, 1.75, 0.5, 2, 2), 0.0)
def hs46(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6
    return powers, [a**2 * d + torch.sin(d - e) - 1, b + c**4 * d**2 - 2], []


@_hs(47, (2, sqrt(2), -1, 2 - sqrt(2), 0.5), 0.0)
def hs47(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - b) ** 2 + (b - c) ** 3 + (c - d) ** 4 + (d - e) ** 4
    return powers, [a + b**2 + c**3 - 3, b - c**2 + d - 1, a * e - 1], []


@_hs(48, (3, 5, -3, 2, -2), 0.0)
def hs48(x: Tensor) -> Parts:
    a, b, c, d, e = x
    return (a - 1) ** 2 + (b - c) ** 2 + (d - e) ** 2, [x.sum() - 5, c - 2 * (d + e) + 3], []


@_hs(49, (10, 7, 2, -3, 0.8), 0.0)
def hs49(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6
    return powers, [a + b + c + 4 * d - 7, c + 5 * e - 6], []


@_hs(50, (35, -31, 11, 5, -5), 0.0)
def hs50(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 2
    return powers, [a + 2 * b + 3 * c - 6, b + 2 * c + 3 * d - 6, c + 2 * d + 3 * e - 6], []


@_hs(51, (2.5, 0.5, 2, -1, 0.5), 0.0)
def hs51(x: Tensor) -> Parts:
    a, b, c, d, e = x
    bowl = (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2
    return bowl, [a + 3 * b - 4, c + d - 2 * e, b - e], []


@_hs(52, (2, 2, 2, 2, 2), 1859 / 349)
def hs52(x: Tensor) -> Parts:
    a, b, c, d, e = x
    bowl = (4 * a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2
    return bowl, [a + 3 * b, c + d - 2 * e, b - e], []


@_hs(53, (2, 2, 2, 2, 2), 176 / 43, lower=-10, upper=10)
def hs53(x: Tensor) -> Parts:
    a, b, c, d, e = x
    bowl = (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2
    return bowl, [a + 3 * b, c + d - 2 * e, b - e], []


# Six and seven variables.


@_hs(
    54,
    (6e3, 1.5, 4e6, 2, 3e-3, 5e7),
    -exp(-27 / 280),
    lower=(0, -10, 0, 0, -1, 0),
    upper=(2e4, 10, 1e7, 20, 1, 2e8),
)
def hs54(x: Tensor) -> Parts:
    a, b, c, d, e, f = x
    a, b = a - 1e4, b - 1
    first = (a**2 / 6.4e7 + a * b / 2e4 + b**2) / 0.96 + (c - 2e6) ** 2 / 4.9e13
    second = (d - 10) ** 2 / 2.5e3 + (e - 1e-3) ** 2 / 2.5e-3 + (f - 1e8) ** 2 / 2.5e17
    return -torch.exp(-(first + second) / 2), [a + 4e3 * b - 3.6e3], []


@_hs(55, (1, 2, 0, 0, 0, 2), 19 / 3, lower=0, upper=(1, inf, inf, 1, inf, inf))
def hs55(x: Tensor) -> Parts:
    a, b, c, d, e, f = x
    sums = [a + 2 * b + 5 * e - 6, a + b + c - 3, d + e + f - 2, a + d - 1, b + e - 2, c + f - 2]
    return a + 2 * b + 4 * e + torch.exp(a * d), sums, []


@_hs(56, (1, 1, 1, *3 * (asin(sqrt(1 / 4.2)),), asin(sqrt(5 / 7.2))), -3.456)
def hs56(x: Tensor) -> Parts:
    a, b, c, d, e, f, g = x
    sides = [side - 4.2 * torch.sin(angle) ** 2 for side, angle in ((a, d), (b, e), (c, f))]
    return -a * b * c, [*sides, a + 2 * b + 2 * c - 7.2 * torch.sin(g) ** 2], []


# Two and three variables.

CHLORINE_TIMES = data(
    *(
        time
        for time, times in zip(range(8, 43, 2), (2, 4, 4, 3, 3, 2, 3, 3, 3, 3, 2, 3, 2, 1, 2, 2, 1, 1), strict=True)
        for _ in range(times)
    )
)
CHLORINE = data(
    *(0.49, 0.49, 0.48, 0.47, 0.48, 0.47, 0.46, 0.46, 0.45, 0.43, 0.45, 0.43, 0.43, 0.44, 0.43),
    *(0.43, 0.46, 0.45, 0.42, 0.42, 0.43, 0.41, 0.41, 0.40, 0.42, 0.40, 0.40, 0.41, 0.40, 0.41),
    *(0.41, 0.40, 0.40, 0.40, 0.38, 0.41, 0.40, 0.40, 0.41, 0.38, 0.40, 0.40, 0.39, 0.39),
)  # fmt: skip


@_hs(57, (0.42, 5), 0.02845966972, lower=(0.4, -4))
def hs57(x: Tensor) -> Parts:
    a, b = x
    fit = a + (0.49 - a) * torch.exp(-b * (CHLORINE_TIMES.to(x) - 8))
    return (CHLORINE.to(x) - fit).square().sum(), [], [0.49 * b - a * b - 0.09]


@_hs(59, (90, 10), -7.804226324, lower=0, upper=(75, 65))
def hs59(x: Tensor) -> Parts:
    a, b = x
    response = (
        -75.196
        + 3.8112 * a
        - 0.12694 * a**2
        + 0.0020567 * a**3
        - 1.0345e-5 * a**4
        + 6.8306 * b
        - 0.030234 * a * b
        + 1.28134e-3 * b * a**2
        - 3.5256e-5 * a**3 * b
        + 2.266e-7 * a**4 * b
        - 0.25645 * b**2
        + 0.0034604 * b**3
        - 1.3514e-5 * b**4
        + 28.106 / (b + 1)
        + 5.2375e-6 * a**2 * b**2
        + 6.3e-8 * a**3 * b**2
        - 7e-10 * a**3 * b**3
        - 3.4054e-4 * a * b**2
        + 1.6638e-6 * a * b**3
        + 2.8673 * torch.exp(0.0005 * a * b)
    )
    return response, [], [a * b - 700, b - a**2 / 125, (b - 50) ** 2 - 5 * (a - 55)]


@_hs(60, (2, 2, 2), 0.03256820025, lower=-10, upper=10)
def hs60(x: Tensor) -> Parts:
    a, b, c = x
    return (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 4, [a * (1 + b**2) + c**4 - 4 - 3 * sqrt(2)], []


@_hs(61, (0, 0, 0), -143.6461422)
def hs61(x: Tensor) -> Parts:
    a, b, c = x
    bowl = 4 * a**2 + 2 * b**2 + 2 * c**2 - 33 * a + 16 * b - 24 * c
    return bowl, [3 * a - 2 * b**2 - 7, 4 * a - c**2 - 11], []


@_hs(62, (0.7, 0.2, 0.1), -26272.51448, lower=0, upper=1)
def hs62(x: Tensor) -> Parts:
    a, b, c = x
    first = 255 * torch.log((a + b + c + 0.03) / (0.09 * a + b + c + 0.03))
    second = 280 * torch.log((b + c + 0.03) / (0.07 * b + c + 0.03))
    return -32.174 * (first + second + 290 * torch.log((c + 0.03) / (0.13 * c + 0.03))), [a + b + c - 1], []


@_hs(63, (2, 2, 2), 961.7151721, lower=0)
def hs63(x: Tensor) -> Parts:
    a, b, c = x
    hill = 1000 - a**2 - 2 * b**2 - c**2 - a * b - a * c
    return hill, [8 * a + 14 * b + 7 * c - 56, x.square().sum() - 25], []


@_hs(64, (1, 1, 1), 6299.842428, lower=1e-5)
def hs64(x: Tensor) -> Parts:
    a, b, c = x
    cost = 5 * a + 50000 / a + 20 * b + 72000 / b + 10 * c + 144000 / c
    return cost, [], [1 - 4 / a - 32 / b - 120 / c]


@_hs(65, (-5, 5, 0), 0.9535288567, lower=(-4.5, -4.5, -5), upper=(4.5, 4.5, 5))
def hs65(x: Tensor) -> Parts:
    a, b, c = x
    return (a - b) ** 2 + (a + b - 10) ** 2 / 9 + (c - 5) ** 2, [], [48 - x.square().sum()]


@_hs(66, (0, 1.05, 2.9), 0.5181632741, lower=0, upper=(100, 100, 10))
def hs66(x: Tensor) -> Parts:
    a, b, c = x
    return 0.2 * c - 0.8 * a, [], [b - torch.exp(a), c - torch.exp(b)]


# Four variables.


def _normal(x: Tensor) -> Tensor:
    """The normal distribution function."""
    return torch.erfc(-x / sqrt(2)) / 2


def _chart(cost: float, loss: float, shift: float, size: int) -> Callable[[Tensor], Parts]:
    """The design of a control chart."""

    def parts(x: Tensor) -> Parts:
        a, b, c, d = x
        growth = torch.expm1(a)
        value = (cost * size - (loss * growth - c) * d / (growth + d)) / a
        far = shift * sqrt(size)
        return value, [c - 2 * _normal(-b), d - _normal(far - b) - _normal(-far - b)], []

    return parts


CHART = dict(lower=(1e-4, 0, 0, 0), upper=(100, 100, 2, 2))
_hs(68, (1, 1, 1, 1), -0.920425026, **CHART)(_chart(1e-4, 1, 1, 24))
_hs(69, (1, 1, 1, 1), -956.71288, **CHART)(_chart(0.1, 1000, 1, 4))


FLOW_TIMES = data(0.1, *range(1, 19))
FLOW = data(
    *(0.00189, 0.1038, 0.268, 0.506, 0.577, 0.604, 0.725, 0.898, 0.947, 0.845),
    *(0.702, 0.528, 0.385, 0.257, 0.159, 0.0869, 0.0453, 0.01509, 0.00189),
)


@_hs(70, (2, 4, 0.04, 2), 0.007498464, lower=1e-5, upper=(100, 100, 1, 100))
def hs70(x: Tensor) -> Parts:
    a, b, c, d = x
    mean = c + (1 - c) * d
    ratio = FLOW_TIMES.to(x) / 7.658

    def wave(shape: Tensor, speed: Tensor) -> Tensor:
        front = speed**shape * (shape / 6.2832) ** 0.5 / (1 + 1 / (12 * shape))
        return front * ratio ** (shape - 1) * torch.exp(shape - speed * ratio * shape)

    return (c * wave(b, mean) + (1 - c) * wave(a, mean / d) - FLOW.to(x)).square().sum(), [], [mean]


@_hs(71, (1, 5, 5, 1), 17.0140173, lower=1, upper=5)
def hs71(x: Tensor) -> Parts:
    a, b, c, d = x
    return a * d * (a + b + c) + c, [x.square().sum() - 40], [x.prod() - 25]


@_hs(72, (1, 1, 1, 1), 727.67937, lower=0.001, upper=(4e5, 3e5, 2e5, 1e5))
def hs72(x: Tensor) -> Parts:
    first = 0.0401 - (data(4, 2.25, 1, 0.25).to(x) / x).sum()
    return 1 + x.sum(), [], [first, 0.010085 - (data(0.16, 0.36, 0.64, 0.64).to(x) / x).sum()]


@_hs(73, (1, 1, 1, 1), 29.89437816, lower=0)
def hs73(x: Tensor) -> Parts:
    spread = torch.sqrt(data(0.28, 0.19, 20.5, 0.62).to(x) @ x.square())
    protein = data(12, 11.9, 41.8, 52.1).to(x) @ x - 21 - 1.645 * spread
    fat = data(2.3, 5.6, 11.1, 1.3).to(x) @ x - 5
    return data(24.55, 26.75, 39, 40.5).to(x) @ x, [x.sum() - 1], [fat, protein]


def _power_flow(limit: float) -> Callable[[Tensor], Parts]:
    def parts(x: Tensor) -> Parts:
        a, b, c, d = x
        cost = 3 * a + 1e-6 * a**3 + 2 * b + 2e-6 / 3 * b**3
        first = 1000 * torch.sin(-c - 0.25) + 1000 * torch.sin(-d - 0.25) + 894.8 - a
        second = 1000 * torch.sin(c - 0.25) + 1000 * torch.sin(c - d - 0.25) + 894.8 - b
        third = 1000 * torch.sin(d - 0.25) + 1000 * torch.sin(d - c - 0.25) + 1294.8
        return cost, [first, second, third], [d - c + limit, c - d + limit]

    return parts


for _number, _limit, _best in ((74, 0.55, 5126.4981), (75, 0.48, 5174.4129)):
    _box = dict(lower=(0, 0, -_limit, -_limit), upper=(1200, 1200, _limit, _limit))
    _hs(_number, (0, 0, 0, 0), _best, **_box)(_power_flow(_limit))


@_hs(76, (0.5, 0.5, 0.5, 0.5), -4.681818181, lower=0)
def hs76(x: Tensor) -> Parts:
    a, b, c, d = x
    bowl = a**2 + b**2 / 2 + c**2 + d**2 / 2 - a * c + c * d - a - 3 * b + c - d
    return bowl, [], [5 - a - 2 * b - c - d, 4 - 3 * a - b - 2 * c + d, b + 4 * c - 1.5]


# Five variables.


@_hs(77, (2, 2, 2, 2, 2), 0.24150513)
def hs77(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6
    return powers, [a**2 * d + torch.sin(d - e) - 2 * sqrt(2), b + c**4 * d**2 - 8 - sqrt(2)], []


def _sphere(x: Tensor) -> list[Tensor]:
    a, b, c, d, e = x
    return [x.square().sum() - 10, b * c - 5 * d * e, a**3 + b**3 + 1]


@_hs(78, (-2, 1.5, 2, -1, -1), -2.91970041)
def hs78(x: Tensor) -> Parts:
    return x.prod(), _sphere(x), []


@_hs(79, (2, 2, 2, 2, 2), 0.0787768209)
def hs79(x: Tensor) -> Parts:
    a, b, c, d, e = x
    powers = (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4
    return powers, [a + b**2 + c**3 - 2 - 3 * sqrt(2), b - c**2 + d + 2 - 2 * sqrt(2), a * e - 2], []


SPHERE_BOX = dict(lower=(-2.3, -2.3, -3.2, -3.2, -3.2), upper=(2.3, 2.3, 3.2, 3.2, 3.2))


@_hs(80, (-2, 2, 2, -1, -1), 0.0539498478, **SPHERE_BOX)
def hs80(x: Tensor) -> Parts:
    return torch.exp(x.prod()), _sphere(x), []


@_hs(81, (-2, 2, 2, -1, -1), 0.0539498478, **SPHERE_BOX)
def hs81(x: Tensor) -> Parts:
    return torch.exp(x.prod()) - (x[0] ** 3 + x[1] ** 3 + 1) ** 2 / 2, _sphere(x), []


@_hs(83, (78, 33, 27, 27, 27), -30665.53867, lower=(78, 33, 27, 27, 27), upper=(102, 45, 45, 45, 45))
def hs83(x: Tensor) -> Parts:
    a, b, c, d, e = x
    cost = 5.3578547 * c**2 + 0.8356891 * a * e + 37.293239 * a - 40792.141
    first = 85.334407 + 0.0056858 * b * e + 0.0006262 * a * d - 0.0022053 * c * e
    second = 80.51249 + 0.0071317 * b * e + 0.0029955 * a * b + 0.0021813 * c**2 - 90
    third = 9.300961 + 0.0047026 * c * e + 0.0012547 * a * c + 0.0019085 * c * d - 20
    return cost, [], [first, second, third, 92 - first, 20 - second, 5 - third]


MIX = torch.tensor(
    [
        (-8720288.849, 150512.5253, -156.6950325, 476470.3222, 729482.8271),
        (-145421.402, 2931.1506, -40.427932, 5106.192, 15711.36),
        (-155011.1084, 4360.53352, 12.9492344, 10236.884, 13176.786),
        (-326669.5104, 7390.68412, -27.8986976, 16643.076, 30988.146),
    ],
    dtype=torch.float64,
)


@_hs(84, (2.52, 2, 37.5, 9.25, 6.8), -5280335.133, lower=(0, 1.2, 20, 9, 6.5), upper=(1000, 2.4, 60, 9.3, 7))
def hs84(x: Tensor) -> Parts:
    income, first, second, third = MIX.to(x) @ torch.cat((x[:1] ** 0, x[1:])) * x[0]
    limits = [294000 - first, 294000 - second, 277200 - third]
    return 24345 - income, [], [first, second, third, *limits]


COLVILLE_C = torch.tensor(
    [
        (30, -20, -10, 32, -10),
        (-20, 39, -6, -31, 32),
        (-10, -6, 10, -6, -10),
        (32, -31, -6, 39, -20),
        (-10, 32, -10, -20, 30),
    ],
    dtype=torch.float64,
)
COLVILLE_A = torch.tensor(
    [
        (-16, 2, 0, 1, 0),
        (0, -2, 0, 0.4, 2),
        (-3.5, 0, 2, 0, 0),
        (0, -2, 0, -4, -1),
        (0, -9, -2, 1, -2.8),
        (2, 0, -4, 0, 0),
        (-1, -1, -1, -1, -1),
        (-1, -2, -3, -2, -1),
        (1, 2, 3, 4, 5),
        (1, 1, 1, 1, 1),
    ],
    dtype=torch.float64,
)
COLVILLE_B = data(-40, -2, -0.25, -4, -4, -1, -40, -60, 5, 1)
COLVILLE_D, COLVILLE_E = data(4, 8, 10, 6, 2), data(-15, -27, -36, -18, -12)


@_hs(86, (0, 0, 0, 0, 1), -32.34867897, lower=0)
def hs86(x: Tensor) -> Parts:
    cost = COLVILLE_E.to(x) @ x + x @ COLVILLE_C.to(x) @ x + COLVILLE_D.to(x) @ x**3
    return cost, [], [*(COLVILLE_A.to(x) @ x - COLVILLE_B.to(x))]


# Six and seven variables.


@_hs(93, (5.54, 4.4, 12.02, 11.82, 0.702, 0.852), 135.075961, lower=0)
def hs93(x: Tensor) -> Parts:
    a, b, c, d, e, f = x
    first, second = a * d * (a + b + c), b * c * (a + 1.57 * b + d)
    cost = 0.0204 * first + 0.0187 * second + 0.0607 * first * e**2 + 0.0437 * second * f**2
    return cost, [], [0.001 * x.prod() - 2.07, 1 - 0.00062 * first * e**2 - 0.00058 * second * f**2]


def _additives(*needed: float) -> Callable[[Tensor], Parts]:
    def parts(x: Tensor) -> Parts:
        a, b, c, d, e, f = x
        first = (
            data(17.1, 38.2, 204.2, 212.3, 623.4, 1495.5).to(x) @ x
            - 169 * a * c - 3580 * c * e - 3810 * d * e - 18500 * d * f - 24300 * e * f
        )  # fmt: skip
        second = (
            data(17.9, 36.8, 113.9, 169.7, 337.8, 1385.2).to(x) @ x
            - 139 * a * c - 2450 * d * e - 16600 * d * f - 17200 * e * f
        )  # fmt: skip
        third = -273 * b - 70 * d - 819 * e + 26000 * d * e
        fourth = 159.9 * a - 311 * b + 587 * d + 391 * e + 2198 * f - 14000 * a * f
        shares = zip((first, second, third, fourth), needed, strict=True)
        return data(4.3, 31.8, 63.3, 15.8, 68.5, 4.7).to(x) @ x, [], [have - need for have, need in shares]

    return parts


for _number, _best, _needed in (
    (95, 0.015619514, (4.97, -1.88, -29.08, -78.02)),
    (96, 0.015619514, (4.97, -1.88, -69.08, -118.02)),
    (97, 3.1358091, (32.97, 25.12, -29.08, -78.02)),
    (98, 3.1358091, (32.97, 25.12, -124.08, -173.02)),
):
    _hs(_number, 6 * (0,), _best, lower=0, upper=(0.31, 0.046, 0.068, 0.042, 0.028, 0.0134))(_additives(*_needed))


THRUST, TIMES = (50, 50, 75, 75, 75, 100, 100), (0, 25, 50, 100, 150, 200, 290, 380)


@_hs(99, 7 * (0.5,), -831079891.5, lower=0, upper=1.58)
def hs99(x: Tensor) -> Parts:
    distance = height = speed = x.sum() * 0
    for angle, thrust, begin, end in zip(x, THRUST, TIMES[:-1], TIMES[1:], strict=True):
        length, lift = end - begin, thrust * torch.sin(angle) - 32
        distance = distance + thrust * length * torch.cos(angle)
        height = height + length**2 * lift / 2 + length * speed
        speed = speed + length * lift
    return -(distance**2), [height - 1e5, speed - 1e3], []


@_hs(100, (1, 2, 0, 4, 0, 1, 1), 680.6300573)
def hs100(x: Tensor) -> Parts:
    a, b, c, d, e, f, g = x
    cost = (a - 10) ** 2 + 5 * (b - 12) ** 2 + c**4 + 3 * (d - 11) ** 2 + 10 * e**6 + 7 * f**2 + g**4
    first = 127 - 2 * a**2 - 3 * b**4 - c - 4 * d**2 - 5 * e
    second = 282 - 7 * a - 3 * b - 10 * c**2 - d + e
    third = 196 - 23 * a - b**2 - 6 * f**2 + 8 * g
    fourth = -4 * a**2 - b**2 + 3 * a * b - 2 * c**2 - 5 * f + 11 * g
    return cost - 4 * f * g - 10 * f - 8 * g, [], [first, second, third, fourth]


def _geometric(power: float) -> Callable[[Tensor], Parts]:
    def parts(x: Tensor) -> Parts:
        a, b, c, d, e, f, g = x
        cost = (
            10 * a / b * d**2 / f**3 * g**power
            + 15 / a / b**2 * c * d / e / g**0.5
            + 20 / a**2 * b / d / e**2 * f
            + 25 * a**2 * b**2 / c * e**0.5 / f**2 * g
        )
        limits = [
            0.5 * a**0.5 / c / f**2 * g + 0.7 * a**3 * b / c**2 * f * g**0.5
            + 0.2 / b * c / d**0.5 * f ** (2 / 3) * g**0.25,
            1.3 / a**0.5 * b / c / e * f + 0.8 * c / d / e * f**2 + 3.1 / a * b**0.5 / d**2 / e * f ** (1 / 3),
            2 * a / c**1.5 * e / f * g ** (1 / 3) + 0.1 * b / c**0.5 * e / f / g**0.5
            + b / a * c**0.5 * e + 0.65 / b**2 * c * e / f * g,
            0.2 / a**2 * b / d * e**0.5 * g ** (1 / 3) + 0.3 * a**0.5 * b**2 * c * d ** (1 / 3) / e ** (2 / 3) * g**0.25
            + 0.4 / a**3 / b**2 * c * e * g**0.75 + 0.5 / c**2 * d * g**0.5,
        ]  # fmt: skip
        return cost, [], [*(1 - limit for limit in limits), cost - 100, 3000 - cost]

    return parts


for _number, _power, _best in ((101, -0.25, 1809.76476), (102, 0.125, 911.880571), (103, 0.5, 543.667958)):
    _hs(_number, 7 * (6,), _best, lower=(*6 * (0.1,), 0.01), upper=10)(_geometric(_power))


# Eight to ten variables.


@_hs(104, (6, 3, 0.4, 0.2, 6, 6, 1, 0.5), 3.9511634396, lower=0.1, upper=10)
def hs104(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h = x
    cost = 0.4 * a**0.67 / g**0.67 + 0.4 * b**0.67 / h**0.67 + 10 - a - b
    limits = [
        0.0588 * e * g + 0.1 * a,
        0.0588 * f * h + 0.1 * a + 0.1 * b,
        4 * c / e + 2 / c**0.71 / e + 0.0588 / c**1.3 * g,
        4 * d / f + 2 / d**0.71 / f + 0.0588 / d**1.3 * h,
    ]
    return cost, [], [*(1 - limit for limit in limits), cost - 1, 4.2 - cost]


# Weights, and how often each was measured.
WEIGHTS = (
    *((95, 1), (105, 1), (110, 4), (115, 4), (120, 15), (125, 15), (130, 15), (135, 13), (140, 21), (145, 12)),
    *((150, 17), (155, 4), (160, 20), (165, 8), (170, 17), (175, 8), (180, 6), (185, 6), (190, 7), (195, 4)),
    *((200, 3), (205, 3), (210, 8), (215, 1), (220, 6), (230, 5), (235, 1), (240, 7), (245, 1), (260, 2)),
)
MIXTURE = dict(lower=(0.001, 0.001, 100, 130, 170, 5, 5, 5), upper=(0.499, 0.499, 180, 210, 240, 25, 25, 25))


# Published: 1138.416240, where a lower value is near.
@_hs(105, (0.1, 0.2, 100, 125, 175, 11.2, 13.2, 15.8), 1138.410664, **MIXTURE)
def hs105(x: Tensor) -> Parts:
    weights, times = torch.tensor(WEIGHTS).to(x).T
    shares = torch.cat((x[:2], 1 - x[:2].sum().reshape(1)))
    bells = shares / x[5:] * torch.exp(-((weights[:, None] - x[2:5]) ** 2) / (2 * x[5:] ** 2))
    return -(times * torch.log(bells.sum(1) / sqrt(2 * pi))).sum(), [], [1 - x[0] - x[1]]


@_hs(
    106,
    (5000, 5000, 5000, 200, 350, 150, 225, 425),
    7049.2480205,  # published: 7049.330923
    lower=(100, 1000, 1000, *5 * (10,)),
    upper=(*3 * (10000,), *5 * (1000,)),
)
def hs106(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h = x
    limits = [
        1 - 0.0025 * (d + f),
        1 - 0.0025 * (e + g - d),
        1 - 0.01 * (h - e),
        a * f - 833.33252 * d - 100 * a + 83333.333,
        b * g - 1250 * e - b * d + 1250 * d,
        c * h - 1250000 - c * e + 2500 * e,
    ]
    return a + b + c, [], limits


@_hs(
    107,
    (0.8, 0.8, 0.2, 0.2, 1.0454, 1.0454, 1.0454, 0, 0),
    5055.011803,
    lower=(0, 0, -inf, -inf, *3 * (0.90909,), -inf, -inf),
    upper=(*4 * (inf,), *3 * (1.0909,), inf, inf),
)
def hs107(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h, i = x
    sine, cosine = 48.4 / 50.176 * sin(0.25), 48.4 / 50.176 * cos(0.25)

    def real(angle: Tensor) -> Tensor:
        return cosine * torch.sin(angle) + sine * torch.cos(angle)

    def reactive(angle: Tensor) -> Tensor:
        return sine * torch.sin(angle) - cosine * torch.cos(angle)

    cost = 3000 * a + 1000 * a**3 + 2000 * b + 2000 / 3 * b**3
    balances = [
        0.4 - a + 2 * sine * e**2 - e * f * real(h) - e * g * real(i),
        0.4 - b + 2 * sine * f**2 - e * f * real(-h) - f * g * real(i - h),
        0.8 + 2 * sine * g**2 - e * g * real(-i) - f * g * real(h - i),
        0.2 - c + 2 * cosine * e**2 + e * f * reactive(h) + e * g * reactive(i),
        0.2 - d + 2 * cosine * f**2 + e * f * reactive(-h) + f * g * reactive(i - h),
        -0.337 + 2 * cosine * g**2 + e * g * reactive(-i) + f * g * reactive(h - i),
    ]
    return cost, balances, []


@_hs(108, 9 * (1,), -0.8660254038, lower=(*8 * (-inf,), 0))
def hs108(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h, i = x
    limits = [
        1 - c**2 - d**2,
        1 - i**2,
        1 - e**2 - f**2,
        1 - a**2 - (b - i) ** 2,
        1 - (a - e) ** 2 - (b - f) ** 2,
        1 - (a - g) ** 2 - (b - h) ** 2,
        1 - (c - e) ** 2 - (d - f) ** 2,
        1 - (c - g) ** 2 - (d - h) ** 2,
        1 - g**2 - (h - i) ** 2,
        a * d - b * c,
        c * i,
        -e * i,
        e * h - f * g,
    ]
    return -(a * d - b * c + c * i - e * i + e * h - f * g) / 2, [], limits


@_hs(
    109,
    9 * (0,),
    5362.06928,
    lower=(0, 0, -0.55, -0.55, *3 * (196,), -400, -400),
    upper=(inf, inf, 0.55, 0.55, *3 * (252,), 800, 800),
)
def hs109(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h, i = x
    scale, sine, cosine = 50.176, sin(0.25), cos(0.25) - 0.7533e-3 * 50.176 / 2
    cost = 3 * a + 1e-6 * a**3 + 2 * b + 0.522074e-6 * b**3

    def real(angle: Tensor) -> Tensor:
        return torch.sin(angle - 0.25)

    def reactive(angle: Tensor) -> Tensor:
        return torch.cos(angle - 0.25)

    balances = [
        e * f * real(-c) + e * g * real(-d) + 2 * sine * e**2 - scale * a + 400 * scale,
        e * f * real(c) + f * g * real(c - d) + 2 * sine * f**2 - scale * b + 400 * scale,
        e * g * real(d) + f * g * real(d - c) + 2 * sine * g**2 + 881.779 * scale,
        scale * h + e * f * reactive(-c) + e * g * reactive(-d) - 200 * scale - 2 * cosine * e**2,
        scale * i + e * f * reactive(c) + f * g * reactive(c - d) - 200 * scale - 2 * cosine * f**2,
        e * g * reactive(d) + f * g * reactive(d - c) - 22.938 * scale - 2 * cosine * g**2,
    ]
    limits = [d - c + 0.55, c - d + 0.55, 2250000 - a**2 - h**2, 2250000 - b**2 - i**2]
    return cost, balances, limits


@_hs(110, 10 * (9,), -45.77846971, lower=2.001, upper=9.999)
def hs110(x: Tensor) -> Parts:
    return (torch.log(x - 2) ** 2 + torch.log(10 - x) ** 2).sum() - x.prod() ** 0.2, [], []


ENERGIES = data(-6.089, -17.164, -34.054, -5.914, -24.721, -14.986, -24.1, -10.708, -26.662, -22.179)


def _atoms(x: Tensor) -> list[Tensor]:
    a, b, c, d, e, f, g, h, i, j = x
    return [a + 2 * b + 2 * c + f + j - 2, d + 2 * e + f + g - 1, c + g + h + 2 * i + j - 1]


@_hs(111, 10 * (-2.3,), -47.76109026, lower=-100, upper=100)
def hs111(x: Tensor) -> Parts:
    moles = torch.exp(x)
    return moles @ (ENERGIES.to(x) + x - torch.log(moles.sum())), _atoms(moles), []


@_hs(112, 10 * (0.1,), -47.76109086, lower=1e-6)  # published: -47.707579
def hs112(x: Tensor) -> Parts:
    return x @ (ENERGIES.to(x) + torch.log(x / x.sum())), _atoms(x), []


@_hs(113, (2, 3, 5, 5, 1, 2, 7, 3, 6, 10), 24.3062091)
def hs113(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h, i, j = x
    cost = (
        a**2 + b**2 + a * b - 14 * a - 16 * b + (c - 10) ** 2 + 4 * (d - 5) ** 2 + (e - 3) ** 2 + 2 * (f - 1) ** 2
        + 5 * g**2 + 7 * (h - 11) ** 2 + 2 * (i - 10) ** 2 + (j - 7) ** 2 + 45
    )  # fmt: skip
    limits = [
        105 - 4 * a - 5 * b + 3 * g - 9 * h,
        -10 * a + 8 * b + 17 * g - 2 * h,
        8 * a - 2 * b - 5 * i + 2 * j + 12,
        120 - 3 * (a - 2) ** 2 - 4 * (b - 3) ** 2 - 2 * c**2 + 7 * d,
        40 - 5 * a**2 - 8 * b - (c - 6) ** 2 + 2 * d,
        30 - 0.5 * (a - 8) ** 2 - 2 * (b - 4) ** 2 - 3 * e**2 + f,
        -(a**2) - 2 * (b - 2) ** 2 + 2 * a * b - 14 * e + 6 * f,
        3 * a - 6 * b - 12 * (i - 8) ** 2 + 7 * j,
    ]
    return cost, [], limits


@_hs(
    114,
    (1745, 12000, 110, 3048, 1974, 89.2, 92.8, 8, 3.6, 145),
    -1768.80696,
    lower=(*5 * (1e-5,), 85, 90, 3, 1.2, 145),
    upper=(2000, 16000, 120, 5000, 2000, 93, 95, 12, 4, 162),
)
def hs114(x: Tensor) -> Parts:
    a, b, c, d, e, f, g, h, i, j = x
    alkylate = 1.12 * a + 0.13167 * a * h - 0.00667 * a * h**2
    octane = 57.425 + 1.098 * h - 0.038 * h**2 + 0.325 * f
    dilution, performance = 35.82 - 0.222 * j, 3 * g - 133
    limits = [
        dilution - 0.9 * i,
        performance - 0.99 * j,
        i / 0.9 - dilution,
        j / 0.99 - performance,
        alkylate - 0.99 * d,
        octane - 0.99 * g,
        d / 0.99 - alkylate,
        g / 0.99 - octane,
    ]
    balances = [1.22 * d - a - e, 98000 * c / (d * i + 1000 * c) - f, (b + e) / a - h]
    return 5.04 * a + 0.035 * b + 10 * c + 3.36 * e - 0.063 * d * g, balances, limits
