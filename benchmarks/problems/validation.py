"""Problems with bounds that the bounded solver is judged by: half of them it was tuned on, half it was not.

Most are from the collection CUTEst, with its data and starts; the others are models whose variables have bounds by
nature. None is made by putting a box around a problem of the other modules.

Sources:
    Gould, Orban & Toint 2015, CUTEst, https://doi.org/10.1007/s10589-014-9687-3, whose names are kept.
    Hock & Schittkowski 1981, Test examples for nonlinear programming codes, LNEMS 187.
    Lin & Pang 1987, Iterative methods for large convex quadratic programs, SIAM J. Control Optim. 25.
    Lee & Seung 2001, Algorithms for non-negative matrix factorization, NIPS 13.
    Chambolle 2004, An algorithm for total variation minimization, J. Math. Imaging Vis. 20.
    Bollerslev 1986, Generalized autoregressive conditional heteroskedasticity, J. Econometrics 31.
"""

from __future__ import annotations

from math import inf, pi

import torch
from sklearn.datasets import load_diabetes, load_iris, load_wine
from torch import Tensor
from torch.nn.functional import pad

from problems.bounds import bounded, least_squares
from problems.models import rand, randn, table, zeros
from problems.problem import Function, Problem, count, data, repeat, squares

# Curve fits.

HOBBS = data(5.308, 7.24, 9.638, 12.866, 17.069, 23.192, 31.443, 38.558, 50.156, 62.948, 75.995, 91.972)
# Palmer's angles in radians, and energies of HNNN in kJ/mol.
ANGLES = data(
    1.788963, 1.745329, 1.658063, 1.570796, 1.483530, 1.396263, 1.308997, 1.218612, 1.134464, 1.047198, 0.872665,
    0.698132, 0.523599, 0.349066, 0.174533, 0.0,
)  # fmt: skip
ENERGIES = data(
    78.596218, 65.77963, 43.96947, 27.038816, 14.6126, 6.2614, 1.53833, 0.0, 1.188045, 4.6841, 16.9321, 33.6988,
    52.3664, 70.163, 83.4221, 88.3995,
)  # fmt: skip


def weeds(x: Tensor) -> Tensor:
    """A logistic curve."""
    return HOBBS.to(x) - x[0] / (1 + x[1] * torch.exp(-x[2] * count(HOBBS).to(x)))


def palmer(x: Tensor) -> Tensor:
    """A parabola and a rational function of the angle."""
    square = ANGLES.to(x) ** 2
    return x[0] * square + x[1] / (x[2] + square / x[3]) - ENERGIES.to(x)


def hs25(x: Tensor) -> Tensor:
    share = torch.arange(1, 100, dtype=x.dtype, device=x.device) / 100
    places = 25 + (-50 * torch.log(share)) ** (2 / 3)
    return torch.exp(-((places - x[1]) ** x[2]) / x[0]) - share


def spectrum(peaks: int) -> Function:
    """Heights, centres and widths of Gaussian peaks."""
    places = torch.linspace(0, 10, 100, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        height, centre, width = x.reshape(3, peaks, 1)
        return (height * torch.exp(-(((places.to(x) - centre) / width) ** 2))).sum(0)

    truth = torch.cat((1 + rand(1, peaks), 10 * (torch.arange(peaks) + 0.5) / peaks, 0.4 + rand(2, peaks) / 2))
    noisy = model(truth.double()) + 0.02 * randn(3, 100)
    return squares(lambda x: model(x) - noisy.to(x))


def spectrum_start(peaks: int) -> Tensor:
    return torch.cat((torch.ones(peaks), 10 * (torch.arange(peaks) + 0.4) / peaks, torch.ones(peaks))).double()


def decays(x: Tensor) -> Tensor:
    """Amplitudes and rates of three decays."""
    times = torch.linspace(0, 4, 40, dtype=x.dtype, device=x.device)
    truth = 1.5 * torch.exp(-times) + 0.7 * torch.exp(-4 * times)
    return torch.exp(-x[3:, None] * times).T @ x[:3] - truth


def enzyme(x: Tensor) -> Tensor:
    """Competitive inhibition, by Michaelis and Menten: largest rate and two constants."""
    substrate, inhibitor = torch.cartesian_prod(*torch.tensor([[0.2, 0.5, 1, 2, 5], [0, 1, 3, 10, 30]]).to(x)).T
    rate = 2 * substrate / (0.7 * (1 + inhibitor / 4) + substrate)
    return x[0] * substrate / (x[1] * (1 + inhibitor / x[2]) + substrate) - rate * (1 + 0.05 * torch.sin(7 * rate))


def fits() -> list[Problem]:
    low = 1e-5
    return [
        bounded("weeds", squares(weeds), repeat(1)(3), (0, 0, -inf), (inf, inf, 3), 9.205439),
        bounded("palmer1", squares(palmer), repeat(1)(4), (-inf, low, low, low), inf),
        bounded("hs25", squares(hs25), data(50, 20, 2), (0.1, 0, 0), (100, 25.6, 5)),
        bounded("spectrum", spectrum(3), spectrum_start(3), 0.1, 10),
        bounded("spectrum", spectrum(8), spectrum_start(8), 0.1, 10),
        bounded("decays", squares(decays), data(1, 1, 1, 0.1, 1, 3), 0, 5),
        bounded("enzyme", squares(enzyme), data(1, 1, 1), 1e-3, (inf, inf, 3)),
    ]


# Small problems and chains of CUTEst.


def hatflda(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, x[:-1] - x[1:].sqrt()))


def hatfldc(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, x[2:] - x[1:-1] ** 2, x[-1:] - 1))


def pspdoc(x: Tensor) -> Tensor:
    return torch.sqrt(1 + x[:-2] ** 2 + (x[1:-1] - x[2:]) ** 2).sum()


def logros(x: Tensor) -> Tensor:
    value: Tensor = torch.log1p(10000 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)
    return value


def mdhole(x: Tensor) -> Tensor:
    value: Tensor = 100 * (torch.sin(x[0]) - x[1]) ** 2 + x[0]
    return value


def eg1(x: Tensor) -> Tensor:
    a, b, c = x
    value: Tensor = a**2 + (b * c) ** 4 + a * c + b * torch.sin(a + c) + b
    return value


def s368(x: Tensor) -> Tensor:
    value: Tensor = (x**3).sum() ** 2 - (x**2).sum() * (x**4).sum()
    return value


def bdexp(x: Tensor) -> Tensor:
    pair = x[:-2] + x[1:-1]
    return (pair * torch.exp(-pair * x[2:])).sum()


def biggsb1(x: Tensor) -> Tensor:
    return torch.cat((x[:1] - 1, x[1:] - x[:-1], 1 - x[-1:]))


def sineali(x: Tensor) -> Tensor:
    value: Tensor = torch.sin(x[0] - 1) + 100 * torch.sin(x[1:] - x[:-1] ** 2).sum()
    return value


def sineali_bounds(n: int) -> tuple[Tensor, Tensor]:
    upper = [pi / 2]
    while len(upper) < n:
        upper.append((upper[-1] + pi / 2) ** 0.5)
    return data(*upper) - 2 * pi, data(*upper)


def probpenl(x: Tensor) -> Tensor:
    """Probabilities that sum to one by a penalty."""
    value: Tensor = ((x[:-1] + x[1:]) * torch.exp(-x[:-1] * x[1:])).sum() / len(x) + 100 * (x.sum() - 1) ** 2
    return value


def qudlin(x: Tensor) -> Tensor:
    few = x[: len(x) // 2]
    return (few[1:] * few[:-1]).sum() - 10 * (count(x) * x).sum()


def expquad(x: Tensor) -> Tensor:
    number = len(x) // 12
    few, rest = x[: number + 1], x[number:-1]
    powers = 0.1 * count(few[1:]) / number * few[:-1] * few[1:]
    quadratic = 4 * rest**2 + 2 * x[-1] ** 2 + rest * x[-1]
    return torch.exp(powers).sum() + quadratic.sum() - 10 * (count(x) * x).sum()


def expquad_bounds(n: int) -> tuple[Tensor, Tensor]:
    is_few = torch.arange(n) < n // 12
    return torch.where(is_few, 0.0, -inf), torch.where(is_few, 10.0, inf)


def bqp(positive: float) -> Function:
    """A quadratic of which a share of the squares is added, and the others are subtracted."""

    def fun(x: Tensor) -> Tensor:
        n, i = len(x), torch.arange(1, len(x) + 1, device=x.device)
        sums = x + x[(2 * i - 1) % n] + x[(3 * i - 1) % n]
        signs = torch.where(i <= positive * n, 1.0, -1.0).to(x)
        return (signs * count(x) * sums**2).sum() / 2

    return fun


def pentdi(x: Tensor) -> Tensor:
    half = len(x) // 2
    quadratic = 6 * (x @ x) - 4 * (x[1:] @ x[:-1]) + x[2:] @ x[:-2]
    value: Tensor = quadratic - 3 * x[0] + x[1] + x[half - 2] - 3 * x[half - 1] + 4 * x[half] + x[half + 2 :].sum()
    return value


def linverse(n: int) -> Function:
    """L with two diagonals such that L T L' is near the identity; T has five."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    lower = torch.tril(torch.outer(torch.sin(i), torch.cos(i)))
    lower = lower - torch.tril(lower, -3)
    target = lower + torch.tril(lower, -1).T

    def fun(x: Tensor) -> Tensor:
        matrix = torch.diag(x[:n]) + torch.diag(x[n:], -1)
        product = matrix @ target.to(x) @ matrix.T
        # Entries farther than two from the diagonal are left out, as in CUTEst.
        near = torch.triu(torch.tril(torch.ones_like(product), 2), -2)
        value: Tensor = ((product - torch.eye(n).to(x)) * near).square().sum()
        return value

    return fun


def qr3d(n: int) -> tuple[Function, Tensor, Tensor]:
    """The factors Q and R of a tridiagonal matrix, whose diagonal is not negative: function, start, lower bounds."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    beside = (1 - i) / n
    matrix = torch.diag(2 * i / n) + torch.diag(beside[1:], -1) + torch.diag(beside[:-1], 1)
    matrix[-1, -1] = 2 * n
    row, column = torch.triu_indices(n, n)

    def fun(x: Tensor) -> Tensor:
        orthogonal = x[: n * n].reshape(n, n)
        upper = torch.zeros(n, n, dtype=x.dtype, device=x.device).index_put((row, column), x[n * n :])
        gram = torch.triu(orthogonal @ orthogonal.T - torch.eye(n).to(x))
        value: Tensor = gram.square().sum() + (orthogonal @ upper - matrix.to(x)).square().sum()
        return value

    start = torch.cat((torch.eye(n, dtype=torch.float64).reshape(-1), matrix[row, column]))
    lower = torch.cat((torch.full((n * n,), -inf), torch.where(row == column, 0.0, -inf)))
    return fun, start, lower.double()


def scond(n: int) -> Function:
    """The semiconductor equation of Rheinboldt 1986, between two fixed ends, by least squares."""
    places = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    doping = torch.where(places < 0.5, -1.0, 1.0).double()

    def residuals(x: Tensor) -> Tensor:
        around = torch.cat((x.new_zeros(1), x, x.new_full((1,), 7.0)))
        carriers = torch.exp(0.5 * (x - 7)) - torch.exp(-0.5 * x)
        step = 20 / (n + 1)
        return around[2:] - 2 * x + around[:-2] - step**2 * (carriers - doping.to(x) * 0.1)

    return squares(residuals)


def chebyqad(x: Tensor) -> Tensor:
    """Chebyshev quadrature on (0, 1)."""
    angles = torch.arccos((2 * x - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    i = count(x)
    exact = torch.where(i % 2 == 0, -1 / (i**2 - 1), 0.0)
    return torch.cos(i[:, None] * angles).mean(1) - exact


def levy(x: Tensor) -> Tensor:
    """Levy and Montalvo's, with many local minima."""
    y = 1 + (x - 1) / 4
    middle = ((y[:-1] - 1) ** 2 * (1 + 10 * torch.sin(pi * y[1:]) ** 2)).sum()
    value: Tensor = pi / len(x) * (10 * torch.sin(pi * y[0]) ** 2 + middle + (y[-1] - 1) ** 2)
    return value


def bent_bounds(n: int) -> tuple[Tensor, Tensor]:
    """Every second variable is at most 1/2, every fourth at least 1/4."""
    i = torch.arange(n)
    return torch.where(i % 4 == 3, 0.25, -inf), torch.where(i % 2 == 1, 0.5, inf)


def valley(x: Tensor) -> Tensor:
    """Long chained valleys of exponentials."""
    return torch.cat((10 * (x[1:] - torch.expm1(x[:-1])), 1 - x[:-1]))


def chains() -> list[Problem]:
    return [
        bounded("hatflda", squares(hatflda), repeat(0.1)(4), 1e-7, inf, 0.0),
        bounded("hatfldb", squares(hatflda), repeat(0.1)(4), 1e-7, (inf, 0.8, inf, inf), 0.0055728),
        bounded("hatfldc", squares(hatfldc), repeat(0.9)(25), 0, (10,) * 24 + (inf,), 0.0),
        bounded("pspdoc", pspdoc, repeat(3)(4), -inf, (-1, inf, inf, inf), 2.414214),
        bounded("logros", logros, data(-1.2, 1), 0, inf, 0.0),
        bounded("mdhole", mdhole, data(10, 1), (0, -inf), inf, 0.0),
        bounded("eg1", eg1, data(0.5, 0, 1.5), (-inf, -1, 1), (inf, 1, 2)),
        *(bounded("s368", s368, count(zeros(n)) / (n + 1), 0, 1) for n in (8, 50)),
        *(bounded("bdexp", bdexp, repeat(1)(n), 0, inf) for n in (100, 5000)),
        *(bounded("biggsb1", squares(biggsb1), zeros(n), 0, (0.9,) * (n - 1) + (inf,), 0.015) for n in (25, 200)),
        *(bounded("sineali", sineali, zeros(n), *sineali_bounds(n)) for n in (4, 20, 1000)),
        *(bounded("probpenl", probpenl, repeat(0.5)(n), 0, 1) for n in (10, 500)),
        *(bounded("qudlin", qudlin, repeat(5)(n), 0, 10) for n in (12, 1200)),
        *(bounded("expquad", expquad, zeros(n), *expquad_bounds(n)) for n in (12, 120)),
        *(bounded("cvxbqp1", bqp(1.0), repeat(0.5)(n), 0.1, 10) for n in (10, 1000)),
        *(bounded("ncvxbqp1", bqp(0.25), repeat(0.5)(n), 0.1, 10) for n in (10, 1000)),
        *(bounded("ncvxbqp2", bqp(0.75), repeat(0.5)(n), 0.1, 10) for n in (10, 1000)),
        *(bounded("pentdi", pentdi, repeat(1)(n), 0, inf, -0.75) for n in (10, 1000)),
        *(
            bounded("linverse", linverse(n), repeat(-1)(2 * n - 1), (1e-8,) * n + (-inf,) * (n - 1), inf)
            for n in (10, 50)
        ),
        *(bounded("qr3d", fun, start, lower, inf, 0.0) for fun, start, lower in map(qr3d, (5, 10))),
        *(bounded("scond", scond(n), torch.linspace(0, 7, n + 2)[1:-1].double(), -1, 7) for n in (30, 100)),
        *(bounded("chebyqad", squares(chebyqad), count(zeros(n)) / (n + 1), 0, 1) for n in (9, 40)),
        *(bounded("levy", levy, repeat(8)(n), -10, 10) for n in (5, 500)),
        *(bounded("valley", squares(valley), repeat(-1)(n), *bent_bounds(n)) for n in (4, 60, 2000)),
    ]


# Particles, paths and grids.


def repulsion(x: Tensor) -> Tensor:
    """Points in a square that repel each other (Powell's)."""
    points = x.reshape(-1, 2)
    row, column = torch.triu_indices(len(points), len(points), 1)
    return ((points[row] - points[column]) ** 2).sum(1).rsqrt().sum()


def crowd(x: Tensor) -> Tensor:
    """Soft spheres pressed into a box by gravity."""
    points = x.reshape(-1, 3)
    row, column = torch.triu_indices(len(points), len(points), 1)
    overlap = 1 - ((points[row] - points[column]) ** 2).sum(1)
    return 50 * (overlap.clamp(min=0) ** 3).sum() + points[:, 2].sum()


def shortest_time(n: int) -> Function:
    """A ray through a medium whose speed changes; its height has a floor (a version of RAYBENDL)."""

    def fun(x: Tensor) -> Tensor:
        path = torch.cat((x.new_zeros(1), x, x.new_full((1,), 1.0)))
        speed = 1 + 2 * ((path[1:] + path[:-1]) / 2 - 0.3) ** 2
        return (torch.sqrt((1 / (n + 1)) ** 2 + path.diff() ** 2) / speed).sum()

    return fun


def hanging_chain(x: Tensor) -> Tensor:
    """Masses on springs above a floor."""
    across, down = x.reshape(2, -1)
    ends = x.new_tensor([0.0, 1.0]), x.new_tensor([0.0, 0.0])
    line = torch.stack((torch.cat((ends[0][:1], across, ends[0][1:])), torch.cat((ends[1][:1], down, ends[1][1:]))))
    lengths = (line.diff(dim=1).square().sum(0) + 1e-12).sqrt() * (len(across) + 1)
    value: Tensor = 50 * ((lengths - 1) ** 2).mean() + down.mean()
    return value


def hanging_start(n: int) -> Tensor:
    line = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return torch.cat((line, -0.05 * torch.sin(pi * line)))


def heat_control(n: int, weight: float) -> Function:
    """A heat source on a line, bounded, that makes the temperature follow a profile."""
    step = 1 / (n + 1)
    stiffness = (2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)).double()
    inverse = torch.linalg.inv(stiffness / step**2)
    places = torch.arange(1, n + 1, dtype=torch.float64) * step
    wanted = torch.sin(2 * pi * places) * torch.exp(places)

    def fun(x: Tensor) -> Tensor:
        value: Tensor = n * ((inverse.to(x) @ x - wanted.to(x)).square().mean() + weight * x.square().mean())
        return value

    return fun


def denoising_dual(signal: Tensor) -> Function:
    """The dual of denoising by total variation: the variables are forces between neighbours."""

    def residuals(x: Tensor) -> Tensor:
        return pad(x, (1, 0)) - pad(x, (0, 1)) + signal.to(x)

    return squares(residuals)


def steps(n: int) -> Tensor:
    return torch.floor(5 * torch.arange(n) / n).remainder(2).double() + 0.3 * randn(4, n)


def image_dual(n: int) -> Function:
    """The same for an image."""
    image = torch.zeros(n, n, dtype=torch.float64)
    image[n // 4 : n // 2, n // 3 :] = 1.0
    image += 0.2 * randn(5, n, n)

    def fun(x: Tensor) -> Tensor:
        right, down = x[: n * (n - 1)].reshape(n, n - 1), x[n * (n - 1) :].reshape(n - 1, n)
        spread = pad(right, (1, 0)) - pad(right, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))
        value: Tensor = (spread + image.to(x)).square().sum() / 2
        return value

    return fun


def ginzburg_landau(n: int, weight: float) -> Function:
    """A phase field on a periodic square grid; its entries stay between -1 and 1."""

    def fun(x: Tensor) -> Tensor:
        field = x.reshape(n, n)
        slopes = (field - field.roll(1, 0)) ** 2 + (field - field.roll(1, 1)) ** 2
        pull = 0.2 * torch.sin(2 * pi * torch.arange(n).to(x) / n)
        value: Tensor = weight * slopes.sum() / 2 + ((1 - field**2) ** 2).sum() / 4 - (pull * field).sum()
        return value

    return fun


def contact(n: int) -> Function:
    """A stiff beam over bumpy ground: squares of second differences, and its weight."""

    def fun(x: Tensor) -> Tensor:
        line = pad(x, (2, 2))
        value: Tensor = 2.0 * line.diff().diff().square().sum() + x.sum() / 50
        return value

    return fun


def ground(n: int) -> Tensor:
    places = torch.arange(n, dtype=torch.float64) / n
    return -0.5 + 0.3 * torch.sin(9 * pi * places) * places


def fields() -> list[Problem]:
    def spread(points: int, dimensions: int) -> Tensor:
        return rand(7, points * dimensions)

    return [
        *(bounded("repulsion", repulsion, (count(zeros(n)) / n) ** 2, 0, 1) for n in (10,)),
        *(bounded("crowd", crowd, 3 * spread(n, 3), 0, 3) for n in (6, 40)),
        *(
            bounded("shortest_time", shortest_time(n), torch.linspace(0, 1, n + 2)[1:-1].double(), 0.1, inf)
            for n in (20, 100)
        ),
        *(bounded("hanging_chain", hanging_chain, hanging_start(n), (-inf,) * n + (-0.2,) * n, inf) for n in (6, 25)),
        *(bounded("heat_control", heat_control(n, 1e-5), zeros(n), -30, 50) for n in (50, 400)),
        *(bounded("denoising_dual", denoising_dual(steps(n)), zeros(n - 1), -1, 1) for n in (60, 500)),
        *(bounded("image_dual", image_dual(n), zeros(2 * n * (n - 1)), -0.2, 0.2) for n in (8, 30)),
        *(bounded("ginzburg_landau", ginzburg_landau(n, 1.0), 0.5 * randn(8, n * n), -1, 1) for n in (8, 32)),
        *(bounded("contact", contact(n), zeros(n), ground(n), inf) for n in (20, 80)),
    ]


# Statistics and learning.


def nonnegative_factors(rows: int, columns: int, rank: int, is_divergence: bool) -> Function:
    """A nonnegative matrix as a product of two, by squares or by Kullback and Leibler's divergence."""
    matrix = rand(10, rows, rank) @ rand(11, rank, columns) + 0.05 * rand(12, rows, columns)

    def fun(x: Tensor) -> Tensor:
        product = x[: rows * rank].reshape(rows, rank) @ x[rows * rank :].reshape(rank, columns)
        given = matrix.to(x)
        if is_divergence:
            return (product - given * torch.log(product + 1e-9)).sum()
        return (product - given).square().sum() / 2

    return fun


def split_lasso(features: Tensor, targets: Tensor, weight: float) -> Function:
    """Regression with absolute values as a penalty: positive and negative parts are variables of their own."""

    def fun(x: Tensor) -> Tensor:
        half = len(x) // 2
        errors = features.to(x) @ (x[:half] - x[half:]) - targets.to(x)
        return errors.square().mean() / 2 + weight * x.sum()

    return fun


def split_logistic(features: Tensor, classes: Tensor, weight: float) -> Function:
    """The same for logistic regression."""
    signed = features * (1 - 2 * classes)[:, None]

    def fun(x: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.nn.functional.softplus(signed.to(x) @ (x[:half] - x[half:])).mean() + weight * x.sum()

    return fun


def kernel_machine(features: Tensor, classes: Tensor) -> Function:
    """The dual of a support vector machine with a Gaussian kernel, without intercept."""
    signs = 2 * classes - 1
    kernel = torch.exp(-(torch.cdist(features, features) ** 2) / 10) * signs[:, None] * signs

    def fun(x: Tensor) -> Tensor:
        return x @ (kernel.to(x) @ x) / 2 - x.sum()

    return fun


def blurred(n: int) -> tuple[Tensor, Tensor]:
    """A Gaussian blur as a matrix, and counts of photons."""
    places = torch.arange(n, dtype=torch.float64)
    blur = torch.exp(-((places[:, None] - places) ** 2) / 8)
    blur /= blur.sum(1, keepdim=True)
    light = torch.where(rand(13, n) < 0.1, 100.0, 1.0).double()
    return blur, torch.round(blur @ light)


def photons(blur: Tensor, counts: Tensor) -> Function:
    """Negative log-likelihood of counts, by a nonnegative source."""

    def fun(x: Tensor) -> Tensor:
        rate = blur.to(x) @ x + 0.1
        return (rate - counts.to(x) * torch.log(rate)).mean()

    return fun


def garch(n: int) -> Function:
    """Volatility of returns: constant, share of the last square, share of the last variance."""
    noise, variance, squared = randn(14, n), 0.5, []
    for shock in noise.tolist():
        squared.append(variance * shock**2)
        variance = 0.05 + 0.1 * squared[-1] + 0.85 * variance
    series = data(*squared)

    def fun(x: Tensor) -> Tensor:
        state, total = series.mean().to(x), x.new_zeros(())
        for square in series.to(x):
            total = total + torch.log(state) + square / state
            state = x[0] + x[1] * square + x[2] * state
        return total / (2 * n)

    return fun


def mixture_shares(n: int, kinds: int) -> Function:
    """Unnormalized shares of fixed densities, nonnegative, whose sum is driven to one by the likelihood."""
    densities = torch.exp(-((randn(15, n, 1) * 2 - torch.linspace(-4, 4, kinds, dtype=torch.float64)) ** 2) / 2)

    def fun(x: Tensor) -> Tensor:
        return x.sum() - torch.log(densities.to(x) @ x + 1e-12).mean()

    return fun


def clipped_network(width: int) -> Function:
    """A network of one hidden layer whose weights are clipped."""
    inputs = torch.linspace(-2, 2, 50, dtype=torch.float64)
    targets = torch.sin(2 * inputs) + 0.3 * inputs

    def residuals(x: Tensor) -> Tensor:
        into, bias, out = x.reshape(3, width)
        return torch.tanh(inputs.to(x)[:, None] * into + bias) @ out - targets.to(x)

    return lambda x: residuals(x).square().mean()


def portfolio(n: int) -> Function:
    """Risk minus return of positions that may not be short, with a penalty for the budget."""
    factors, returns = randn(16, n, 5), 0.1 * rand(17, n)
    risks = 0.05 + rand(18, n)

    def fun(x: Tensor) -> Tensor:
        risk = (factors.to(x).T @ x).square().sum() + (risks.to(x) * x**2).sum()
        value: Tensor = risk / 2 - returns.to(x) @ x + 10 * (x.sum() - 1) ** 2
        return value

    return fun


def relevance(features: Tensor, targets: Tensor) -> Function:
    """Marginal likelihood of a regression, by logarithms of the weights' precisions."""

    def fun(x: Tensor) -> Tensor:
        design = features.to(x)
        covariance = (design * torch.exp(-x)) @ design.T + 0.5 * torch.eye(len(design)).to(x)
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, targets.to(x)[:, None], upper=False)
        return white.square().mean() / 2 + factor.diagonal().log().mean()

    return fun


def statistics() -> list[Problem]:
    (wine, sorts), (diabetes, scores) = table(load_wine), table(load_diabetes)
    flowers, kinds = table(load_iris)
    several = torch.cat((diabetes, diabetes[:, :10, None].mul(diabetes[:, None, :10]).reshape(-1, 100)), 1)
    is_first = (sorts == 1).double()
    return [
        bounded("factors_squares", nonnegative_factors(12, 10, 3, False), rand(20, 66), 0, inf),
        bounded("factors_squares", nonnegative_factors(60, 40, 5, False), rand(20, 500), 0, inf),
        bounded("factors_divergence", nonnegative_factors(12, 10, 3, True), rand(21, 66), 1e-6, inf),
        bounded("factors_divergence", nonnegative_factors(60, 40, 5, True), rand(21, 500), 1e-6, inf),
        bounded("lasso", split_lasso(diabetes, scores / 100, 0.02), zeros(22), 0, inf),
        bounded("lasso", split_lasso(several, scores / 100, 0.01), zeros(222), 0, inf),
        bounded("lasso_logistic", split_logistic(wine, is_first, 0.01), zeros(28), 0, inf),
        bounded("lasso_logistic", split_logistic(flowers, (kinds == 1).double(), 1e-4), 0.1 * rand(22, 10), 0, inf),
        bounded("kernel_machine", kernel_machine(wine, is_first), zeros(178), 0, 1),
        bounded("kernel_machine", kernel_machine(flowers, (kinds == 1).double()), zeros(150), 0, 10),
        *(bounded("photons", photons(*blurred(n)), repeat(10)(n), 0, inf) for n in (40, 300)),
        bounded("deblurring", least_squares(*blurred(100)), repeat(1)(100), 0, 50),
        bounded("garch", garch(150), data(0.2, 0.2, 0.5), (1e-4, 0, 0), (inf, 1, 0.98)),
        *(bounded("mixture_shares", mixture_shares(200, kinds), repeat(1 / kinds)(kinds), 0, 1) for kinds in (5, 60)),
        bounded("clipped_network", clipped_network(5), 0.5 * randn(23, 15), -1, 1),
        bounded("clipped_network", clipped_network(30), 0.5 * randn(24, 90), -1, 1),
        *(bounded("portfolio", portfolio(n), repeat(1 / n)(n), 0, 0.3) for n in (20, 1000)),
        bounded("relevance", relevance(wine[:60], is_first[:60]), zeros(14), -4, 8),
        bounded("relevance", relevance(several[:80], scores[:80] / 100), zeros(111), -4, 8),
    ]


def moved(problem: Problem, seed: int) -> Problem:
    """The same problem from a random start nearby, with many variables on their bounds."""
    start = problem.x0 + 0.5 * problem.x0.abs().clamp(min=0.5) * randn(seed, len(problem.x0))
    return problem._replace(name=f"{problem.name}-moved", x0=start.clamp(problem.lower, problem.upper))


def halves() -> tuple[list[Problem], list[Problem]]:
    """The problems that the solver was tuned on, and those that it was not: formulas in turn, in all their sizes.

    Each is there from its own start and from another one.
    """
    formulas: dict[str, list[Problem]] = {}
    for seed, problem in enumerate((*fits(), *chains(), *fields(), *statistics())):
        formulas.setdefault(problem.name.split("-")[0], []).extend((problem, moved(problem, seed)))
    in_turn = list(formulas.values())
    seen, unseen = ([problem for formula in in_turn[first::2] for problem in formula] for first in (0, 1))
    return seen, unseen
