"""Smooth functions in common use, at several sizes: the collections of Andrei, CUTE and Lukšan.

Here are the separable ones and sums over pairs of variables; in a pair they are ``a, b``. Those in
which variables meet their neighbours, or all others, are in ``chained.py``.

Sources:
    Andrei 2008, An unconstrained optimization test functions collection, AMO 10(1), 147-161.
    Bongartz, Conn, Gould & Toint 1995, CUTE, ACM TOMS 21(1), https://doi.org/10.1145/200979.201043
    Lukšan & Vlček 1999, Sparse and partially separable test problems, ICS AS CR report 767.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt

import torch
from torch import Tensor

from problems import chained, more
from problems.problem import Family, Problem, count, every, repeat, sizes, squares


def over_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[::2], x[1::2]


# Separable.


def raydan1(x: Tensor) -> Tensor:
    return count(x) @ (torch.exp(x) - x) / 10


def raydan2(x: Tensor) -> Tensor:
    return (torch.exp(x) - x).sum()


def diagonal1(x: Tensor) -> Tensor:
    return (torch.exp(x) - count(x) * x).sum()


def diagonal2(x: Tensor) -> Tensor:
    return (torch.exp(x) - x / count(x)).sum()


def diagonal3(x: Tensor) -> Tensor:
    return (torch.exp(x) - count(x) * torch.sin(x)).sum()


def diagonal4(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return (a**2 + 100 * b**2).sum() / 2


def diagonal5(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x).sum()


def hager(x: Tensor) -> Tensor:
    return (torch.exp(x) - count(x).sqrt() * x).sum()


def quartic(x: Tensor) -> Tensor:
    return ((x - count(x)) ** 4).sum()


def power(x: Tensor) -> Tensor:
    return (count(x) * x).square().sum()


# Sums over pairs.


def himmelblau(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a**2 + b - 11, a + b**2 - 7))


def freudenstein_roth_pairs(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b))


def beale_pairs(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((1.5 - a * (1 - b), 2.25 - a * (1 - b**2), 2.625 - a * (1 - b**3)))


def white_holst(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((10 * (b - a**3), 1 - a))


def tridiagonal1(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a + b - 3, (a - b + 1) ** 2))


def bd1(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a**2 + b - 2, torch.exp(a - 1) - b))


def hiebert(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a - 10, a * b - 50000))


def denschna(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a**2, a + b, torch.exp(b) - 1))


def denschnb(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a - 2, (a - 2) * b, b + 1))


def denschnf(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((2 * (a + b) ** 2 + (a - b) ** 2 - 8, 5 * a**2 + (b - 3) ** 2 - 9))


def three_exponentials(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return (torch.exp(a + 3 * b - 0.1) + torch.exp(a - 3 * b - 0.1) + torch.exp(-a - 0.1)).sum()


def psc1(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return torch.cat((a**2 + b**2 + a * b, torch.sin(a), torch.cos(b)))


def maratos(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return (a + 100 * (a**2 + b**2 - 1) ** 2).sum()


def cliff(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return (((a - 3) / 100) ** 2 - (a - b) + torch.exp(20 * (a - b))).sum()


def sisser(x: Tensor) -> Tensor:
    a, b = over_pairs(x)
    return (3 * a**4 - 2 * (a * b) ** 2 + 3 * b**4).sum()


def constant(start: Callable[[int], float]) -> Callable[[int], Tensor]:
    return lambda n: repeat(start(n))(n)


def total(term: Callable[[int], float], *numbers: int) -> dict[int, tuple[float, ...]]:
    """For each n the sum of a term over 1 to n."""
    return {n: (sum(map(term, range(1, n + 1))),) for n in numbers}


SEPARABLE = (
    Family("raydan1", raydan1, repeat(1), total(lambda i: i / 10, 4, 30, 100, 1000)),
    Family("raydan2", raydan2, repeat(1), total(lambda i: 1, 100)),
    Family("diagonal1", diagonal1, constant(lambda n: 1 / n), total(lambda i: i - i * log(i), 4, 30, 100)),
    Family("diagonal2", diagonal2, lambda n: 1 / more.ramp(n), total(lambda i: (1 + log(i)) / i, 10, 100, 1000)),
    Family("diagonal3", diagonal3, repeat(1), sizes(10, 100, minima=None)),
    Family("diagonal4", diagonal4, repeat(1), sizes(2, 1000)),
    Family("diagonal5", diagonal5, repeat(1.1), total(lambda i: log(2), 2, 1000)),
    Family("hager", hager, repeat(1), total(lambda i: sqrt(i) * (1 - log(i) / 2), 10, 100, 1000)),
    Family("quartic", quartic, repeat(2), sizes(4, 25, 100)),
    Family("power", power, repeat(1), sizes(4, 10, 100, 1000)),
)

PAIRS = (
    Family("himmelblau", squares(himmelblau), repeat(1), sizes(2, 100)),
    Family(
        "freudenstein_roth_pairs", squares(freudenstein_roth_pairs), repeat(0.5, -2, 4, 3), sizes(10, 1000, minima=None)
    ),
    Family("beale_pairs", squares(beale_pairs), repeat(1, 0.8), sizes(10, 1000)),
    Family("white_holst", squares(white_holst), repeat(-1.2, 1), sizes(2, 10, 1000)),
    Family("tridiagonal1", squares(tridiagonal1), repeat(2), sizes(2, 1000)),
    Family("bd1", squares(bd1), repeat(0.1), sizes(2, 1000)),
    Family("hiebert", squares(hiebert), repeat(0), sizes(2, 100)),
    Family("denschna", squares(denschna), repeat(8), sizes(2, 100)),
    Family("denschnb", squares(denschnb), repeat(10), sizes(2, 100)),
    Family("denschnf", squares(denschnf), repeat(100), sizes(2, 100)),
    Family("three_exponentials", three_exponentials, repeat(0.1), {n: (n / 2 * 2.559267,) for n in (2, 100)}),
    Family("psc1", squares(psc1), repeat(3, 0.1), {n: (n / 2 * 0.7731991,) for n in (2, 1000)}),
    Family("maratos", maratos, repeat(1.1, 0.1), {n: (n / 2 * -1.000624,) for n in (2, 10, 100)}),
    Family("cliff", cliff, repeat(0, -1), {n: (n / 2 * 0.19978661,) for n in (2, 100)}),
    Family("sisser", sisser, repeat(1, 0.1), sizes(2, 100)),
)


def problems() -> list[Problem]:
    return every((*SEPARABLE, *PAIRS, *chained.FAMILIES))
