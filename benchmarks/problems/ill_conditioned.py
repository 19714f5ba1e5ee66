"""Ill-conditioned least squares of fewer than 100 variables, where conjugate gradients need more products than columns.

Sources:
    Lanczos 1956, Applied Analysis, Prentice Hall: sums of exponentials.
    Hansen 1994, Regularization tools, Numer. Algorithms 6: discretized integral equations.
    Higham 1995, The test matrix toolbox for MATLAB: matrices of Hilbert, Cauchy, Pascal and Vandermonde.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor

from problems.models import rand, randn, zeros
from problems.problem import Function, Problem, count, data, repeat, squares


def linear(name: str, matrix: Tensor, targets: Tensor | None = None) -> Problem:
    """Least squares with a matrix; without targets the solution is all ones."""
    right = matrix.sum(1) if targets is None else targets
    return Problem(
        f"{name}-{matrix.shape[1]}", squares(lambda x: matrix.to(x) @ x - right.to(x)), zeros(matrix.shape[1])
    )


def hilbert(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i - 1)


def cauchy(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i.sqrt())


def pascal(n: int) -> Tensor:
    matrix = torch.ones(n, n, dtype=torch.float64)
    for row in range(1, n):
        matrix[row] = matrix[row - 1].cumsum(0)
    return matrix


def powers(first: float, last: float, degree: int, points: int = 200) -> Tensor:
    return torch.linspace(first, last, points, dtype=torch.float64)[:, None] ** torch.arange(degree + 1)


def spread(n: int, condition: float, seed: int) -> Tensor:
    """Random orthogonal vectors of lengths that spread over a condition number."""
    basis = torch.linalg.qr(randn(seed, n, n))[0]
    value: Tensor = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)[:, None] * basis
    return value


def units(n: int, decades: float, seed: int) -> Tensor:
    """A random matrix whose columns have different units."""
    return randn(seed, 2 * n, n) * torch.logspace(0, decades, n, dtype=torch.float64)


def kernel(n: int, width: float) -> Tensor:
    """A Gaussian blur on a line."""
    places = torch.linspace(0, 1, n, dtype=torch.float64)
    return torch.exp(-(((places[:, None] - places) / width) ** 2)) / n


def laplace(n: int) -> Tensor:
    """The Laplace transform at n places, by a rule of n points."""
    places = torch.linspace(0.1, 5, n, dtype=torch.float64)
    return torch.exp(-places[:, None] * places) / n


def exponentials(terms: int, seed: int) -> Function:
    """Amplitudes and rates of a sum of exponentials."""
    times = torch.linspace(0, 3, 60, dtype=torch.float64)
    rates = torch.arange(1, terms + 1) * 1.5 + rand(seed, terms)

    def residuals(x: Tensor) -> Tensor:
        truth = torch.exp(-times[:, None] * rates).sum(1)
        return torch.exp(-times.to(x)[:, None] * x[terms:]) @ x[:terms] - truth.to(x)

    return squares(residuals)


def rational(degree: int) -> Function:
    """A quotient of polynomials that fits an exponential."""
    places = torch.linspace(0, 2, 50, dtype=torch.float64)

    def residuals(x: Tensor) -> Tensor:
        rows = places.to(x)[:, None] ** torch.arange(degree + 1, device=x.device)
        return rows @ x[: degree + 1] / (1 + rows[:, 1:] @ x[degree + 1 :]) - torch.exp(-places.to(x))

    return squares(residuals)


def peaks(number: int) -> Function:
    """Heights, places and widths of overlapping peaks."""
    places = torch.linspace(0, 1, 80, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        height, centre, width = x.reshape(3, number, 1)
        value: Tensor = (height / (1 + ((places.to(x) - centre) / width) ** 2)).sum(0)
        return value

    truth = model(torch.cat((1 + rand(1, number), (torch.arange(number) + 0.5) / number, repeat(0.15)(number))))
    return squares(lambda x: model(x) - truth.to(x))


def saturating(matrix: Tensor) -> Function:
    """Responses that saturate, of an ill-conditioned design."""
    targets = torch.tanh(matrix.sum(1) / 4)
    return squares(lambda x: torch.tanh(matrix.to(x) @ x / 4) - targets.to(x))


def network(width: int) -> Function:
    """A network of one hidden layer that fits a wave."""
    places = torch.linspace(-1, 1, 60, dtype=torch.float64)

    def residuals(x: Tensor) -> Tensor:
        into, bias, out = x.reshape(3, width)
        value: Tensor = torch.tanh(places.to(x)[:, None] * into + bias) @ out - torch.sin(pi * places.to(x))
        return value

    return squares(residuals)


def cubes(matrix: Tensor) -> Function:
    return squares(lambda x: (matrix.to(x) @ (x - 1)) + 0.1 * (matrix.to(x) @ (x - 1)) ** 3)


def curved() -> list[Problem]:
    def start(terms: int) -> Tensor:
        return torch.cat((repeat(1)(terms), count(zeros(terms))))

    def peak_start(number: int) -> Tensor:
        return torch.cat((repeat(1)(number), (torch.arange(number) + 0.4) / number, repeat(0.2)(number)))

    def made(
        name: str, sizes: tuple[int, ...], fun: Callable[[int], Function], x0: Callable[[int], Tensor]
    ) -> list[Problem]:
        return [Problem(f"{name}-{len(x0(size))}", fun(size), x0(size)) for size in sizes]

    return [
        *made("exponentials", (2, 3, 5), lambda terms: exponentials(terms, terms), start),
        *made("rational", (2, 4), rational, lambda degree: torch.cat((data(1), zeros(2 * degree)))),
        *made("peaks", (2, 4, 8), peaks, peak_start),
        *made("saturating", (6, 12), lambda degree: saturating(powers(0, 1, degree)), lambda degree: zeros(degree + 1)),
        *made("network", (4, 10, 25), network, lambda width: randn(width, 3 * width)),
        *made("cubes_hilbert", (6, 20, 60), lambda n: cubes(hilbert(n)), zeros),
        *made("cubes_spread", (20, 90), lambda n: cubes(spread(n, 1e4, n)), zeros),
    ]


def problems() -> list[Problem]:
    wave = torch.sin(torch.linspace(0, 8, 200, dtype=torch.float64)) + 0.1 * randn(0, 200)
    return [
        *(linear("hilbert_squares", hilbert(n)) for n in (4, 8, 15, 40, 90)),
        *(linear("cauchy", cauchy(n)) for n in (6, 30)),
        *(linear("pascal", pascal(n)) for n in (5, 9)),
        *(linear("powers_0_1", powers(0, 1, degree), wave) for degree in (4, 9, 19)),
        *(linear("powers_around_0", powers(-1, 1, degree), wave) for degree in (9, 29)),
        *(linear("powers_0_4", powers(0, 4, degree), wave) for degree in (4, 7)),
        *(linear("spread_1e3", spread(n, 1e3, n)) for n in (20, 80)),
        *(linear("spread_1e6", spread(n, 1e6, n)) for n in (20, 80)),
        *(linear("units_3", units(n, 3, n)) for n in (10, 50)),
        *(linear("units_6", units(n, 6, n)) for n in (10, 90)),
        *(linear("blur_0.1", kernel(n, 0.1)) for n in (30, 90)),
        *(linear("blur_0.03", kernel(n, 0.03)) for n in (30, 90)),
        *(linear("laplace", laplace(n)) for n in (10, 60)),
        *curved(),
    ]
