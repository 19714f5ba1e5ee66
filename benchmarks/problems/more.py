"""The 35 problems of Moré, Garbow & Hillstrom 1981 as sums of squares of residuals.

Numbers in comments are the paper's. Where the number of residuals m is free, it is the one that the
paper gives the minima for; 2 n for the linear problems (32 to 34), n for chebyquad (35).

Source: Moré, Garbow & Hillstrom 1981, ACM TOMS 7(1), 17-41, https://doi.org/10.1145/355934.355936
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from problems.problem import Family, Problem, count, data, every, repeat, sizes, squares

BARD = data(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
GAUSS = data(9, 44, 175, 540, 1295, 2420, 3521, 3989, 3521, 2420, 1295, 540, 175, 44, 9) / 1e4
MEYER = data(
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872
)  # fmt: skip
KOWALIK = data(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_AT = data(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
OSBORNE1 = data(
    844, 908, 932, 936, 925, 908, 881, 850, 818, 784, 751, 718, 685, 658, 628, 603, 580, 558, 538, 522, 506, 490, 478,
    467, 457, 448, 438, 431, 424, 420, 414, 411, 406
) / 1e3  # fmt: skip
OSBORNE2 = data(
    1366, 1191, 1112, 1013, 991, 885, 831, 847, 786, 725, 746, 679, 608, 655, 616, 606, 602, 626, 651, 724, 649, 649,
    694, 644, 624, 661, 612, 558, 533, 495, 500, 423, 395, 375, 372, 391, 396, 405, 428, 429, 523, 562, 607, 653, 672,
    708, 633, 668, 645, 632, 591, 559, 597, 625, 739, 710, 729, 720, 636, 581, 428, 292, 162, 98, 54
) / 1e3  # fmt: skip


def steps(x: Tensor, number: int, width: float) -> Tensor:
    """width, 2 width, ... in the dtype of x."""
    return width * torch.arange(1, number + 1, dtype=x.dtype, device=x.device)


def rosenbrock(x: Tensor) -> Tensor:  # 1, 21
    odd, even = x[::2], x[1::2]
    return torch.cat((10 * (even - odd**2), 1 - odd))


def freudenstein_roth(x: Tensor) -> Tensor:  # 2
    a, b = x
    return torch.stack((-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b))


def powell_badly_scaled(x: Tensor) -> Tensor:  # 3
    a, b = x
    return torch.stack((1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001))


def brown_badly_scaled(x: Tensor) -> Tensor:  # 4
    a, b = x
    return torch.stack((a - 1e6, b - 2e-6, a * b - 2))


def beale(x: Tensor) -> Tensor:  # 5
    a, b = x
    return torch.stack((1.5 - a * (1 - b), 2.25 - a * (1 - b**2), 2.625 - a * (1 - b**3)))


def jennrich_sampson(x: Tensor) -> Tensor:  # 6
    i = steps(x, 10, 1)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


def helical_valley(x: Tensor) -> Tensor:  # 7
    a, b, c = x
    angle = torch.atan2(b, a)
    # The paper's angle runs from -pi/2 to 3 pi/2.
    angle = torch.where((a < 0) & (b < 0), angle + 2 * pi, angle)
    return torch.stack((10 * (c - 5 / pi * angle), 10 * (torch.hypot(a, b) - 1), c))


def bard(x: Tensor) -> Tensor:  # 8
    u = steps(x, 15, 1)
    v = 16 - u
    return BARD.to(x) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def gaussian(x: Tensor) -> Tensor:  # 9
    t = (8 - steps(x, 15, 1)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - GAUSS.to(x)


def meyer(x: Tensor) -> Tensor:  # 10
    t = 45 + steps(x, 16, 5)
    return x[0] * torch.exp(x[1] / (t + x[2])) - MEYER.to(x)


def gulf(x: Tensor) -> Tensor:  # 11
    t = steps(x, 99, 0.01)
    # As printed, the paper multiplies y by m i; its minimizer (50, 25, 1.5) needs this difference.
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-(torch.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x: Tensor) -> Tensor:  # 12
    t = steps(x, 10, 0.1)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def powell_singular(x: Tensor) -> Tensor:  # 13, 22
    a, b, c, d = x.reshape(-1, 4).T
    return torch.cat((a + 10 * b, sqrt(5) * (c - d), (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2))


def wood(x: Tensor) -> Tensor:  # 14
    a, b, c, d = x
    return torch.stack(
        (10 * (b - a**2), 1 - a, sqrt(90) * (d - c**2), 1 - c, sqrt(10) * (b + d - 2), (b - d) / sqrt(10))
    )


def kowalik_osborne(x: Tensor) -> Tensor:  # 15
    u = KOWALIK_AT.to(x)
    return KOWALIK.to(x) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:  # 16
    t = steps(x, 20, 0.2)
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def osborne1(x: Tensor) -> Tensor:  # 17
    t = steps(x, 33, 10) - 10
    return OSBORNE1.to(x) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs(x: Tensor) -> Tensor:  # 18
    t = steps(x, 13, 0.1)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def osborne2(x: Tensor) -> Tensor:  # 19
    t = steps(x, 65, 0.1) - 0.1
    peaks = torch.exp(-x[5:8] * (t[:, None] - x[8:]) ** 2)
    return OSBORNE2.to(x) - (x[0] * torch.exp(-t * x[4]) + peaks @ x[1:4])


def watson(x: Tensor) -> Tensor:  # 20
    powers = steps(x, 29, 1 / 29)[:, None] ** count(x, first=0)
    slope = (powers[:, :-1] * count(x[1:])) @ x[1:]
    return torch.cat((slope - (powers @ x) ** 2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1))


def penalty1(x: Tensor) -> Tensor:  # 23
    return torch.cat((sqrt(1e-5) * (x - 1), (x @ x - 0.25).reshape(1)))


def penalty2(x: Tensor) -> Tensor:  # 24
    grown, powers = torch.exp(x / 10), torch.exp(count(x) / 10)
    pairs = grown[1:] + grown[:-1] - powers[1:] - powers[:-1]
    ring = (count(x).flip(0) @ x**2 - 1).reshape(1)
    return torch.cat((x[:1] - 0.2, sqrt(1e-5) * pairs, sqrt(1e-5) * (grown[1:] - torch.exp(-powers.log()[:1])), ring))


def variably_dimensioned(x: Tensor) -> Tensor:  # 25
    total = (count(x) @ (x - 1)).reshape(1)
    return torch.cat((x - 1, total, total**2))


def trigonometric(x: Tensor) -> Tensor:  # 26
    versine = 2 * torch.sin(x / 2) ** 2  # 1 - cos(x), also where that rounds to nothing
    return versine.sum() + count(x) * versine - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:  # 27
    return torch.cat((x[:-1] + x.sum() - (len(x) + 1), (x.prod() - 1).reshape(1)))


def boundary_value(x: Tensor) -> Tensor:  # 28
    h = 1 / (len(x) + 1)
    around = pad(x, (1, 1))
    return 2 * x - around[:-2] - around[2:] + h**2 / 2 * (x + h * count(x) + 1) ** 3


def integral_equation(x: Tensor) -> Tensor:  # 29
    h = 1 / (len(x) + 1)
    t = h * count(x)
    cubes = (x + t + 1) ** 3
    below, above = torch.cumsum(t * cubes, 0), torch.cumsum((1 - t) * cubes, 0)
    return x + h / 2 * ((1 - t) * below + t * (above[-1] - above))


def broyden_tridiagonal(x: Tensor) -> Tensor:  # 30
    around = pad(x, (1, 1))
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


def broyden_banded(x: Tensor) -> Tensor:  # 31
    terms = x * (1 + x)
    band = pad(terms, (5, 1)).unfold(0, 7, 1).sum(1)
    return x * (2 + 5 * x**2) + 1 - (band - terms)


def linear_full_rank(x: Tensor) -> Tensor:  # 32
    return pad(x, (0, len(x))) - x.sum() / len(x) - 1


def linear_rank1(x: Tensor) -> Tensor:  # 33
    return steps(x, 2 * len(x), 1) * (count(x) @ x) - 1


def linear_rank1_zeros(x: Tensor) -> Tensor:  # 34
    inner = steps(x, 2 * len(x) - 2, 1) * (count(x)[1:-1] @ x[1:-1])
    return pad(inner, (1, 1)) - 1


def chebyquad(x: Tensor) -> Tensor:  # 35
    before, values = torch.ones_like(x), 2 * x - 1
    means = []
    for i in range(1, len(x) + 1):
        means.append(values.mean() + (1 / (i * i - 1) if i % 2 == 0 else 0))
        before, values = values, 2 * (2 * x - 1) * values - before
    return torch.stack(means)


def ramp(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def parabola(n: int) -> Tensor:
    t = ramp(n) / (n + 1)
    return t * (t - 1)


def zero_rows_minimum(n: int) -> tuple[float]:
    m = 2 * n
    return ((m * m + 3 * m - 6) / (2 * (2 * m - 3)),)


RESIDUALS = (
    Family("rosenbrock", rosenbrock, repeat(-1.2, 1), sizes(2, 10, 100, 1000)),
    Family("freudenstein_roth", freudenstein_roth, repeat(0.5, -2), {2: (0.0, 48.98425)}),
    Family("powell_badly_scaled", powell_badly_scaled, repeat(0, 1), sizes(2)),
    Family("brown_badly_scaled", brown_badly_scaled, repeat(1), sizes(2)),
    Family("beale", beale, repeat(1), sizes(2)),
    Family("jennrich_sampson", jennrich_sampson, repeat(0.3, 0.4), {2: (124.3622,)}),
    Family("helical_valley", helical_valley, repeat(-1, 0, 0), sizes(3)),
    Family("bard", bard, repeat(1), {3: (8.214877e-3, 17.42869)}),
    Family("gaussian", gaussian, repeat(0.4, 1, 0), {3: (1.127933e-8,)}),
    Family("meyer", meyer, repeat(0.02, 4000, 250), {3: (87.94586,)}),
    Family("gulf", gulf, repeat(5, 2.5, 0.15), sizes(3)),
    Family("box", box, repeat(0, 10, 20), sizes(3)),
    Family("powell_singular", powell_singular, repeat(3, -1, 0, 1), sizes(4, 40, 100, 1000)),
    Family("wood", wood, repeat(-3, -1), sizes(4)),
    Family("kowalik_osborne", kowalik_osborne, repeat(0.25, 0.39, 0.415, 0.39), {4: (3.075056e-4, 1.02734e-3)}),
    Family("brown_dennis", brown_dennis, repeat(25, 5, -5, -1), {4: (85822.20,)}),
    Family("osborne1", osborne1, repeat(0.5, 1.5, -1, 0.01, 0.02), {5: (5.464895e-5,)}),
    Family("biggs", biggs, repeat(1, 2, 1, 1, 1, 1), {6: (0.0, 5.655650e-3)}),
    Family("osborne2", osborne2, repeat(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), {11: (4.013774e-2,)}),
    Family("watson", watson, repeat(0), {6: (2.287670e-3,), 9: (1.399760e-6,), 12: (4.722381e-10,), 31: None}),
    Family("penalty1", penalty1, ramp, {4: (2.249977e-5,), 10: (7.087651e-5,), 100: None}),
    Family("penalty2", penalty2, repeat(0.5), {4: (9.376293e-6,), 10: (2.936605e-4,), 100: None}),
    Family("variably_dimensioned", variably_dimensioned, lambda n: 1 - ramp(n) / n, sizes(4, 10, 30, 100)),
    Family(
        "trigonometric",
        trigonometric,
        lambda n: repeat(1 / n)(n),
        {**sizes(4, 30, 100, 1000, minima=None), 10: (0.0, 2.795057e-5)},
    ),
    Family(
        "brown_almost_linear",
        brown_almost_linear,
        repeat(0.5),
        sizes(4, 10, 30, 100, minima=(0.0, 1.0)),
    ),
    Family("boundary_value", boundary_value, parabola, sizes(4, 10, 30, 100, 1000)),
    Family("integral_equation", integral_equation, parabola, sizes(4, 10, 100, 1000)),
    Family("broyden_tridiagonal", broyden_tridiagonal, repeat(-1), {**sizes(4, 10, 30, 100), 1000: None}),
    Family("broyden_banded", broyden_banded, repeat(-1), sizes(4, 10, 30, 100, 1000)),
    Family("linear_full_rank", linear_full_rank, repeat(1), {n: (float(n),) for n in (4, 10, 100, 1000)}),
    Family(
        "linear_rank1",
        linear_rank1,
        repeat(1),
        {n: (n * (2 * n - 1) / (4 * n + 1),) for n in (4, 10, 30, 100)},
    ),
    Family(
        "linear_rank1_zeros",
        linear_rank1_zeros,
        repeat(1),
        {n: zero_rows_minimum(n) for n in (4, 10, 30, 100)},
    ),
    Family(
        "chebyquad",
        chebyquad,
        lambda n: ramp(n) / (n + 1),
        {**sizes(2, 4, 6, 7, 9), 8: (3.516873e-3,), 10: (6.503954e-3, 4.772714e-3), 20: None, 50: None},
    ),
)


def problems() -> list[Problem]:
    return every(family._replace(fun=squares(family.fun)) for family in RESIDUALS)
