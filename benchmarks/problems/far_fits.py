"""Fits and equations from far starts: where a least-squares solver must get through flat and steep regions.

Curves of the sciences with made-up data, systems of equations, geometry from distances, and factorizations. Nobody
tunes on these: they validate what was tuned on the problems of Moré, Garbow & Hillstrom.

Sources: the systems: Dennis & Schnabel 1983, and Dennis, Gay & Vu 1985 (the problems DENSCHN of CUTEst), Engvall 1966,
    Powell 1970, Griewank & Osborne 1983, and La Cruz, Martínez & Raydan 2006,
    https://doi.org/10.1090/S0025-5718-06-01840-0. Curves are the usual forms of their fields.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from problems import more_fits
from problems.curve_fits import Curve, fitted
from problems.fit import Fit, moved
from problems.models import rand, randn
from problems.problem import Function, count, data

FACTORS = (1, 3, 30)
SPREAD = 0.5  # of the logarithm of each variable


# Systems of equations.


def cube(x: Tensor) -> Tensor:
    return torch.stack((x[0] - 1, 10 * (x[1] - x[0] ** 3)))


def himmelblau(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((a**2 + b - 11, a + b**2 - 7))


def powell_singular_pair(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((a, 10 * a / (a.abs() + 0.1) + 2 * b**2))


def griewank_osborne(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((29 / 16 * a**3 - 2 * a * b, b - a**2))


def engvall(x: Tensor) -> Tensor:
    a, b, c = x
    return torch.stack(
        (
            a**2 + b**2 + c**2 - 1,
            a**2 + b**2 + (c - 2) ** 2 - 1,
            a + b + c - 1,
            a + b - c + 1,
            a**3 + 3 * b**2 + (5 * c - a + 1) ** 2 - 36,
        )
    )


def denschnb(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((a - 2, (a - 2) * b, b + 1))


def denschnc(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((a**2 + b**2 - 2, torch.exp(a - 1) + b**3 - 2))


def denschnd(x: Tensor) -> Tensor:
    a, b, c = x
    return torch.stack((a**2 + b**3 - c**4, 2 * a * b * c, 2 * a * b - 3 * b * c + a * c))


def denschne(x: Tensor) -> Tensor:
    a, b, c = x
    return torch.stack((a, b + b**2, torch.exp(c) - 1))


def denschnf(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack((2 * (a + b) ** 2 + (a - b) ** 2 - 8, 5 * a**2 + (b - 3) ** 2 - 9))


def exponential(x: Tensor) -> Tensor:
    return torch.cat((torch.exp(x[:1] - 1) - 1, count(x)[1:] * (torch.exp(x[1:] - 1) - x[1:])))


def exponential_chain(x: Tensor) -> Tensor:
    return torch.cat((torch.exp(x[:1]) - 1, count(x)[1:] / 10 * (torch.exp(x[1:]) + x[:-1] - 1)))


def trigexp(x: Tensor) -> Tensor:
    around = pad(x, (1, 1))
    before, after = around[:-2], around[2:]
    inner = x * (4 + 3 * x**2) - before * torch.exp(before - x) + 2 * after - 8
    inner = inner + torch.sin(x - after) * torch.sin(x + after)
    first = 3 * x[:1] ** 3 + 2 * x[1:2] - 5 + torch.sin(x[:1] - x[1:2]) * torch.sin(x[:1] + x[1:2])
    last = 4 * x[-1:] - x[-2:-1] * torch.exp(x[-2:-1] - x[-1:]) - 3
    return torch.cat((first, inner[1:-1], last))


def radiation(x: Tensor) -> Tensor:
    """Chandrasekhar's H-equation by the midpoint rule."""
    mu = (count(x) - 0.5) / len(x)
    return x - 1 / (1 - 0.99 / (2 * len(x)) * (mu[:, None] / (mu[:, None] + mu)) @ x)


def singular_tridiagonal(x: Tensor) -> Tensor:
    around = pad(x, (1, 1))
    return ((3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1) ** 2


def ignition(x: Tensor) -> Tensor:
    """Bratu's equation on a line."""
    around, h = pad(x, (1, 1)), 1 / (len(x) + 1)
    return 2 * x - around[:-2] - around[2:] - 2 * h**2 * torch.exp(x)


def chained_rosenbrock(x: Tensor) -> Tensor:
    return torch.cat((10 * (x[:-1] ** 2 - x[1:]), x[:-1] - 1))


SYSTEMS: tuple[tuple[Function, tuple[float, ...]], ...] = (
    (cube, (-1.2, 1)),
    (himmelblau, (1, 1)),
    (powell_singular_pair, (3, 1)),
    (griewank_osborne, (1, 1)),
    (engvall, (1, 2, 1)),
    (denschnb, (1, 1)),
    (denschnc, (2, 3)),
    (denschnd, (10, 10, 10)),
    (denschne, (2, 3, -8)),
    (denschnf, (2, 1)),
    (exponential, (0.5,) * 8),
    (exponential_chain, (0.5,) * 8),
    (trigexp, (0.5,) * 10),
    (radiation, (1,) * 10),
    (singular_tridiagonal, (-1,) * 10),
    (ignition, (0.5,) * 10),
    (chained_rosenbrock, (-1.2, 1) * 5),
)


# Curves.


def absorption(p: Tensor, t: Tensor) -> Tensor:
    """Bateman's: a dose that is absorbed and eliminated."""
    return p[0] * p[1] / (p[1] - p[2]) * (torch.exp(-p[2] * t) - torch.exp(-p[1] * t))


def antoine(p: Tensor, t: Tensor) -> Tensor:
    return p[0] - p[1] / (t + p[2])


def substrate_inhibition(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * t / (p[1] + t + t**2 / p[2])


def weibull(p: Tensor, t: Tensor) -> Tensor:
    return p[0] - p[1] * torch.exp(-p[2] * t ** p[3])


def richards(p: Tensor, t: Tensor) -> Tensor:
    return p[0] / (1 + torch.exp(-p[1] * (t - p[2]))) ** p[3]


def gompertz(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * torch.exp(-p[2] * t))


def retention(p: Tensor, t: Tensor) -> Tensor:
    """Van Genuchten's, of water in soil."""
    return p[0] + p[1] / (1 + (p[2] * t).abs() ** p[3]) ** (1 - 1 / p[3])


def morse(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * (1 - torch.exp(-p[1] * (t - p[2]))) ** 2


def birch(p: Tensor, t: Tensor) -> Tensor:
    """Birch & Murnaghan's energy of a crystal: energy, volume, modulus and its derivative."""
    squeeze = (p[1].abs() / t) ** (2 / 3) - 1
    return p[0] + 9 / 16 * p[1] * p[2] * (squeeze**3 * p[3] + squeeze**2 * (2 - 4 * squeeze))


def three_decays(p: Tensor, t: Tensor) -> Tensor:
    return torch.exp(-p[3:] * t[:, None]) @ p[:3]


def gaussian_line(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-(((t - p[1]) / p[2]) ** 2)) + p[3] + p[4] * t


def resonance(p: Tensor, t: Tensor) -> Tensor:
    """Amplitude of a driven oscillator."""
    return p[0] / torch.sqrt((p[1] ** 2 - t**2) ** 2 + (p[2] * t) ** 2)


def sips(p: Tensor, t: Tensor) -> Tensor:
    grown = (p[1] * t).abs() ** p[2]
    return p[0] * grown / (1 + grown)


def stretched(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-((t / p[1]).abs() ** p[2])) + p[3]


def diode(p: Tensor, t: Tensor) -> Tensor:
    return p[0] - p[1] * torch.expm1(t / p[2]) - p[3] * t


TIME = torch.linspace(0.1, 6.0, 40, dtype=torch.float64)
CURVES: tuple[tuple[Curve, tuple[float, ...], Tensor, float], ...] = (
    (absorption, (5, 2, 0.4), TIME, 0.02),
    (antoine, (8, 1700, 230), 20 + 15 * TIME, 0.01),
    (substrate_inhibition, (4, 0.6, 3), TIME, 0.02),
    (weibull, (3, 2.5, 0.4, 1.6), TIME, 0.02),
    (richards, (5, 2, 2.5, 1.5), TIME, 0.03),
    (gompertz, (5, 6, 0.9), TIME, 0.03),
    (retention, (0.1, 0.4, 1.2, 2.2), TIME, 0.003),
    (morse, (4, 1.1, 1.5), 0.7 + TIME, 0.03),
    (birch, (-10, 17, 1.2, 4.2), 13 + TIME, 0.001),
    (three_decays, (1, 2, 3, 0.3, 1.5, 6), TIME, 0.001),
    (gaussian_line, (3, 2.7, 0.6, 0.5, 0.2), TIME, 0.03),
    (resonance, (3, 2.5, 0.5), TIME, 0.02),
    (sips, (4, 0.8, 1.7), TIME, 0.02),
    (stretched, (3, 1.2, 0.6, 0.2), TIME, 0.01),
    (diode, (3, 0.01, 1.0, 0.05), TIME, 0.02),
)


# Geometry and factorizations.


def places(n: int, seed: int) -> Fit:
    """Points of a plane from their noisy distances to six anchors and to each other."""
    anchors, truth = 4 * rand(seed, 6, 2) - 2, 2 * rand(seed + 1, n, 2) - 1

    def distances(points: Tensor) -> Tensor:
        every = torch.cat((points, anchors.to(points)))
        rows, columns = torch.triu_indices(n, n + 6, 1)
        return (points[rows] - every[columns]).square().sum(1).add(1e-12).sqrt()

    seen = distances(truth)
    seen = seen + 0.01 * randn(seed + 2, len(seen))
    return Fit(f"places-{2 * n}", lambda x: distances(x.reshape(n, 2)) - seen.to(x), randn(seed + 3, 2 * n))


def phases(n: int, m: int, seed: int) -> Fit:
    """A vector from squared products with known ones."""
    known, truth = randn(seed, m, n), randn(seed + 1, n)
    squares = (known @ truth) ** 2
    return Fit(f"phases-{n}", lambda x: (known.to(x) @ x) ** 2 - squares.to(x), randn(seed + 2, n), minima=(0.0,))


def factors(rows: int, columns: int, rank: int, seed: int) -> Fit:
    """A matrix as a product of two with noise."""
    target = randn(seed, rows, rank) @ randn(seed + 1, rank, columns) + 0.1 * randn(seed + 2, rows, columns)

    def residuals(x: Tensor) -> Tensor:
        left, right = x[: rows * rank].reshape(rows, rank), x[rows * rank :].reshape(rank, columns)
        return (left @ right - target.to(x)).reshape(-1)

    size = (rows + columns) * rank
    return Fit(f"factors-{size}", residuals, randn(seed + 3, size))


def arm(links: int, seed: int) -> Fit:
    """Angles of a robot's arm in space that reaches a point with little bending."""
    target = data(1.0, 0.5, 0.8) * links / 3

    def residuals(x: Tensor) -> Tensor:
        tilt, turn = x.reshape(2, links).cumsum(1)
        ends = torch.stack((torch.cos(tilt) * torch.cos(turn), torch.cos(tilt) * torch.sin(turn), torch.sin(tilt)))
        return torch.cat((ends.sum(1) - target.to(x), 0.01 * x))

    return Fit(f"arm-{2 * links}", residuals, randn(seed, 2 * links))


def network(width: int, seed: int) -> Fit:
    """A curve by a network with one hidden layer."""
    t = torch.linspace(-2, 2, 50, dtype=torch.float64)
    y = torch.sin(3 * t) * torch.exp(-(t**2) / 2) + 0.02 * randn(seed, 50)

    def residuals(x: Tensor) -> Tensor:
        inner, shift, outer = x[:-1].reshape(3, width)
        values: Tensor = torch.tanh(t.to(x)[:, None] * inner + shift) @ outer + x[-1] - y.to(x)
        return values

    return Fit(f"network-{3 * width + 1}", residuals, randn(seed + 1, 3 * width + 1))


Maker = Callable[[], Fit]
MADE: tuple[Maker, ...] = (
    lambda: places(4, 900),
    lambda: places(12, 910),
    lambda: phases(6, 24, 920),
    lambda: phases(12, 60, 930),
    lambda: factors(6, 5, 2, 940),
    lambda: factors(12, 10, 3, 950),
    lambda: arm(4, 960),
    lambda: arm(8, 970),
    lambda: network(3, 980),
    lambda: network(6, 990),
)


def named() -> list[Fit]:
    """Each problem from a near start: of a curve the truth itself."""
    systems = [Fit(f"{system.__name__}-{len(start)}", system, data(*start), minima=(0.0,)) for system, start in SYSTEMS]
    curves = [
        Fit(f"{curve.__name__}-{len(truth)}", fitted(curve, data(*truth), t, noise, seed), data(*truth))
        for seed, (curve, truth, t, noise) in enumerate(CURVES, 700)
    ]
    return [*systems, *curves, *(make() for make in MADE)]


def spread(fits: list[Fit], factors: tuple[int, ...], seed: int) -> list[Fit]:
    """Each problem from multiples of its start, each variable of which is moved at random as well, if it is defined."""
    far = [
        moved(fit._replace(name=f"{fit.name}-times{factor}", x0=factor * fit.x0), seed + 1000 * place + factor, SPREAD)
        for place, fit in enumerate(fits)
        if fit.x0.any()
        for factor in factors
    ]
    return [fit for fit in far if fit.residuals(fit.x0).isfinite().all()]


def far_fits() -> list[Fit]:
    """Those of this file from their start, 3 and 30 times that, moved."""
    return spread(named(), FACTORS, 1)


def far_more() -> list[Fit]:
    """Moré, Garbow & Hillstrom's from 3 and 30 times their starts, moved."""
    return spread(more_fits.standard(), FACTORS[1:], 2)
