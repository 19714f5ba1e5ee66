"""Functions in common use in which variables meet their neighbours, or all the others.

``a, b, c, d`` are the variables of each term, in order. Sources: see ``collection.py``.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from problems import more
from problems.problem import Family, Function, count, data, repeat, sizes, squares


def over_neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:-1], x[1:]


def over_triples(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x[:-2], x[1:-1], x[2:]


# Sums over neighbours.


def generalized_rosenbrock(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return 1 + (100 * (b - a**2) ** 2 + (b - 1) ** 2).sum()


def chained_rosenbrock(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return (100 * (a**2 - b) ** 2 + (a - 1) ** 2).sum()


def chained_freudenstein_roth(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return torch.cat((-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b))


def fletcher(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return 10 * (b - a + 1 - a**2)


def chained_tridiagonal1(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return torch.cat((a + b - 3, (a - b + 1) ** 2))


def chained_tridiagonal2(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return ((a * b - 1) ** 2 + 0.1 * (a + 1) * (b + 1)).sum()


def generalized_tridiagonal2(x: Tensor) -> Tensor:
    around = pad(x, (1, 1))
    return (5 - 3 * x - x**2) * x - around[:-2] - 3 * around[2:] + 1


def edensch(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return 16 + ((a - 2) ** 4 + (a * b - 2 * b) ** 2 + (b + 1) ** 2).sum()


def engval1(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return ((a**2 + b**2) ** 2 - 4 * a + 3).sum()


def cosine(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return torch.cos(a**2 - b / 2).sum()


def generalized_humps(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return ((torch.sin(2 * a) * torch.sin(2 * b)) ** 2 + 0.05 * (a**2 + b**2)).sum()


def dixon(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, x.diff(), x[-1:] - 1))


def tridia(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return torch.cat((x[:1] - 1, count(a, first=2).sqrt() * (2 * b - a)))


def staircase(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return a + b - count(a, first=2)


def dqdrtic(x: Tensor) -> Tensor:
    a, b, c = over_triples(x)
    return (a**2 + 100 * b**2 + 100 * c**2).sum()


def tointgss(x: Tensor) -> Tensor:
    a, b, c = over_triples(x)
    return ((10 / (len(x) + 2) + c**2) * (2 - torch.exp(-((a - b) ** 2) / (0.1 + c**2)))).sum()


def schmvett(x: Tensor) -> Tensor:
    a, b, c = over_triples(x)
    return -(1 / (1 + (a - b) ** 2) + torch.sin((pi * b + c) / 2) + torch.exp(-(((a + c) / b - 2) ** 2))).sum()


def every_other_four(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[:-3:2], x[1:-2:2], x[2:-1:2], x[3::2]


def chained_wood(x: Tensor) -> Tensor:
    a, b, c, d = every_other_four(x)
    rows = 10 * (b - a**2), 1 - a, sqrt(90) * (d - c**2), 1 - c, sqrt(10) * (b + d - 2), (b - d) / sqrt(10)
    return torch.cat(rows)


def chained_powell(x: Tensor) -> Tensor:
    a, b, c, d = every_other_four(x)
    return torch.cat((a + 10 * b, sqrt(5) * (c - d), (b - 2 * c) ** 2, sqrt(10) * (a - d) ** 2))


def cragg_levy(x: Tensor) -> Tensor:
    a, b, c, d = every_other_four(x)
    rows = (torch.exp(a) - b) ** 2, 10 * (b - c) ** 3, (torch.tan(c - d) + c - d) ** 2, a**4, d - 1
    return torch.cat(rows)


# One variable, or a sum of all of them, in every term.


def arwhead(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3).sum()


def nondia(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, 10 * (x[0] - x[:-1] ** 2)))


def liarwhd(x: Tensor) -> Tensor:
    return torch.cat((2 * (x**2 - x[0]), x - 1))


def tquartic(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, x[0] ** 2 - x[1:] ** 2))


def sinquad(x: Tensor) -> Tensor:
    middle = torch.sin(x[1:-1] - x[-1]) - x[0] ** 2 + x[1:-1] ** 2
    return torch.cat(((x[:1] - 1) ** 2, middle, x[-1:] ** 2 - x[0] ** 2))


def eg2(x: Tensor) -> Tensor:
    return torch.sin(x[0] + x[:-1] ** 2 - 1).sum() + torch.sin(x[-1] ** 2) / 2


def nondquar(x: Tensor) -> Tensor:
    a, b = over_neighbours(x)
    return torch.cat((x[:1] - x[1], (a + b + x[-1])[:-1] ** 2, x[-2:-1] + x[-1]))


def bdqrtic(x: Tensor) -> Tensor:
    a, b, c, d = x[:-4], x[1:-3], x[2:-2], x[3:-1]
    return torch.cat((3 - 4 * a, a**2 + 2 * b**2 + 3 * c**2 + 4 * d**2 + 5 * x[-1] ** 2))


def perturbed_quadratic(x: Tensor) -> Tensor:
    return count(x) @ x**2 + x.sum() ** 2 / 100


def perturbed_quadratic_diagonal(x: Tensor) -> Tensor:
    return x.sum() ** 2 + count(x) @ x**2 / 100


def tridiagonal_perturbed_quadratic(x: Tensor) -> Tensor:
    a, b, c = over_triples(x)
    return torch.cat((count(x).sqrt() * x, a + b + c))


def quadratic1(x: Tensor) -> Tensor:
    return count(x) @ x**2 / 2 - x[-1]


def quadratic2(x: Tensor) -> Tensor:
    return count(x) @ (x**2 - 1) ** 2 / 2 - x[-1]


def quadratic_penalty1(x: Tensor) -> Tensor:
    return torch.cat((x[:-1] ** 2 - 2, (x @ x - 0.5).reshape(1)))


def quadratic_penalty2(x: Tensor) -> Tensor:
    return torch.cat((x[:-1] ** 2 - torch.sin(x[:-1]), (x @ x - 100).reshape(1)))


def hilbert(x: Tensor) -> Tensor:
    return x @ (x / (count(x)[:, None] + count(x) - 1)).sum(1) / 2


# Variables that meet far from each other.


def picked(x: Tensor, factor: int) -> Tensor:
    """x at factor i modulo n."""
    return x[torch.arange(len(x), device=x.device) * factor % len(x)]


def noncvxu2(x: Tensor) -> Tensor:
    s = x + picked(x, 3) + picked(x, 7)
    return (s**2 + 4 * torch.cos(s)).sum()


def sparsine(x: Tensor) -> Tensor:
    sines = torch.sin(x)
    return count(x).sqrt() * sum((picked(sines, factor) for factor in (2, 3, 5, 7, 11)), sines)


def curly(x: Tensor) -> Tensor:
    sums = pad(x, (0, 10)).unfold(0, 11, 1).sum(1)
    return (sums * (sums * (sums**2 - 20) - 0.1)).sum()


def matrix_root(x: Tensor) -> Tensor:
    n = round(sqrt(len(x)))
    root = torch.sin(count(x) ** 2).reshape(n, n)
    matrix = x.reshape(n, n)
    return (matrix @ matrix - root @ root).reshape(-1)


def dixmaan(alpha: float, beta: float, gamma: float, delta: float, power: int) -> Function:
    """Dixon & Maany's function; terms 1 and 4 are weighted with (i/n)^power."""

    def fun(x: Tensor) -> Tensor:
        m = len(x) // 3
        weights = (count(x) / len(x)) ** power
        a, b = over_neighbours(x)
        neighbours = (a * (b + b**2)).square().sum()
        second = (x[: 2 * m] * x[m:] ** 2).square().sum()
        third = (x[:m] * x[2 * m :] * weights[:m]).sum()
        return 1 + alpha * (x**2) @ weights + beta * neighbours + gamma * second + delta * third

    return fun


def fractions(n: int) -> Tensor:
    return more.ramp(n) / (n + 1)


def small_root(n: int) -> Tensor:
    return torch.sin(more.ramp(n) ** 2) / 5


NEIGHBOURS = (
    Family("generalized_rosenbrock", generalized_rosenbrock, fractions, sizes(5, 30, 100, minima=(1.0,))),
    Family("chained_rosenbrock", chained_rosenbrock, repeat(-1.2, 1), sizes(10, 100, minima=None)),
    Family(
        "chained_freudenstein_roth", squares(chained_freudenstein_roth), repeat(0.5, -2), sizes(10, 1000, minima=None)
    ),
    Family("fletcher", squares(fletcher), repeat(0), sizes(10, 100)),
    Family("chained_tridiagonal1", squares(chained_tridiagonal1), repeat(2), sizes(10, 1000, minima=None)),
    Family("chained_tridiagonal2", chained_tridiagonal2, repeat(1), sizes(10, 100, minima=None)),
    Family("generalized_tridiagonal2", squares(generalized_tridiagonal2), repeat(-1), sizes(10, 100, minima=None)),
    Family("edensch", edensch, repeat(0), {36: (219.2840,), 1000: None}),
    Family("engval1", engval1, repeat(2), {2: (0.0,), 50: None, 1000: None}),
    Family("cosine", cosine, repeat(1), {n: (float(1 - n),) for n in (10, 100, 1000)}),
    Family("generalized_humps", generalized_humps, repeat(-5.06, 5.06), sizes(5, 100, minima=None)),
    Family("dixon", squares(dixon), repeat(-1), sizes(10, 100)),
    Family("tridia", squares(tridia), repeat(1), sizes(10, 30, 100, 1000)),
    Family("staircase", squares(staircase), repeat(1), sizes(10, 100)),
    Family("dqdrtic", dqdrtic, repeat(3), sizes(10, 1000)),
    Family("tointgss", tointgss, repeat(3), sizes(10, 100, minima=None)),
    Family("schmvett", schmvett, repeat(0.5), {n: (-3.0 * (n - 2),) for n in (3, 10, 1000)}),
    Family("chained_wood", squares(chained_wood), repeat(-3, -1), sizes(10, 100, 1000, minima=None)),
    Family("chained_powell", squares(chained_powell), repeat(3, -1, 0, 1), sizes(10, 100)),
    Family(
        "cragg_levy",
        squares(cragg_levy),
        lambda n: torch.cat((data(1), repeat(2)(n - 1))),
        {4: (0.0,), 10: (1.886566,), 100: (32.27,), 1000: (336.423,)},
    ),
)

ALL_TOGETHER = (
    Family("arwhead", arwhead, repeat(1), sizes(100, 1000)),
    Family("nondia", squares(nondia), repeat(-1), sizes(10, 1000)),
    Family("liarwhd", squares(liarwhd), repeat(4), sizes(36, 1000)),
    Family("tquartic", squares(tquartic), repeat(0.1), sizes(5, 50, 500)),
    Family("sinquad", squares(sinquad), repeat(0.1), sizes(5, 100, minima=None)),
    Family("eg2", eg2, repeat(1), sizes(10, 1000, minima=None)),
    Family("nondquar", squares(nondquar), repeat(1, -1), sizes(10, 100)),
    Family("bdqrtic", squares(bdqrtic), repeat(1), sizes(10, 100, 1000, minima=None)),
    Family("perturbed_quadratic", perturbed_quadratic, repeat(0.5), sizes(10, 100, 1000)),
    Family("perturbed_quadratic_diagonal", perturbed_quadratic_diagonal, repeat(0.5), sizes(10, 100, 1000)),
    Family("tridiagonal_perturbed_quadratic", squares(tridiagonal_perturbed_quadratic), repeat(0.5), sizes(10, 1000)),
    Family("quadratic1", quadratic1, repeat(1), {n: (-0.5 / n,) for n in (10, 100, 1000)}),
    Family("quadratic2", quadratic2, repeat(0.5), sizes(10, 100, 1000, minima=None)),
    Family("quadratic_penalty1", squares(quadratic_penalty1), repeat(1), sizes(4, 100, minima=None)),
    Family("quadratic_penalty2", squares(quadratic_penalty2), repeat(1), sizes(4, 100, minima=None)),
    Family("hilbert", hilbert, repeat(-3), sizes(2, 4, 10)),
    Family("noncvxu2", noncvxu2, more.ramp, sizes(10, 100, 1000, minima=None)),
    Family("sparsine", squares(sparsine), repeat(0.5), sizes(50, 100, minima=None)),
    Family("curly", curly, lambda n: 1e-4 * fractions(n), sizes(20, 100, minima=None)),
    Family("matrix_root", squares(matrix_root), small_root, sizes(4, 25, 100)),
)

# (i/n)^k weighs the sum of squares and the last sum: k is 0 for A to D, 1 for E to H, 2 for I to L.
DIXMAAN = tuple(
    Family(
        f"dixmaan_{'abcdefghijkl'[4 * power + kind]}",
        dixmaan(1.0, beta, gamma, delta, power),
        repeat(2),
        sizes((15, 90, 300)[(kind + power) % 3], minima=(1.0,)),
    )
    for power in range(3)
    for kind, (beta, gamma, delta) in enumerate(
        ((0, 0.125, 0.125), (0.0625, 0.0625, 0.0625), (0.125, 0.125, 0.125), (0.26, 0.26, 0.26))
    )
)

FAMILIES = (*NEIGHBOURS, *ALL_TOGETHER, *DIXMAAN)
