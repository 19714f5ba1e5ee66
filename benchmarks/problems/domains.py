"""Functions with an edge: logarithms, roots and poles that give NaN or Inf beyond it.

The start lies inside. Also maximum-likelihood fits in the parameters' own units, where a variance
or a shape must stay positive and no logarithm of it is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from problems.models import rand, randn, seeded, zeros
from problems.problem import Function, Problem, count, data, repeat


def analytic_center(matrix: Tensor, limits: Tensor) -> Function:
    """-sum log(limits - matrix x) - sum log(1 - x^2): Boyd & Vandenberghe 2004, exercise 9.30."""

    def fun(x: Tensor) -> Tensor:
        return -torch.log(limits.to(x) - matrix.to(x) @ x).sum() - torch.log(1 - x**2).sum()

    return fun


def barrier(cost: Tensor, matrix: Tensor, limits: Tensor, weight: float) -> Function:
    """A linear programme with a logarithmic barrier."""

    def fun(x: Tensor) -> Tensor:
        return cost.to(x) @ x - weight * torch.log(limits.to(x) - matrix.to(x) @ x).sum()

    return fun


def entropy(x: Tensor) -> Tensor:
    """x log x with a penalty for sum and mean; NaN for negative x."""
    places = count(x) / len(x)
    return (x * torch.log(x)).sum() + 50 * (x.sum() - 1) ** 2 + 50 * (places @ x - 0.3) ** 2


def dome(x: Tensor) -> Tensor:
    """The lower half of a sphere, tilted: the root is NaN outside the unit ball."""
    return -torch.sqrt(1 - x @ x) + torch.sin(count(x)) @ x


def root_ridge(x: Tensor) -> Tensor:
    """A root of a chained quadratic minus half a square; NaN where neighbours differ too much."""
    return -torch.sqrt(2 - x.diff() ** 2).sum() + (x - torch.sin(count(x))).square().sum() / 2


def reciprocal(x: Tensor) -> Tensor:
    """Poles at 0 and, from the logarithm, NaN below."""
    return (1 / x + count(x) * x - torch.log(x)).sum()


def log_squares(x: Tensor) -> Tensor:
    """Squares of logarithms, as in a fit of magnitudes over decades: minimum 0 at x_i = i."""
    return torch.log(x / count(x)).square().sum() + torch.log(x).diff().sub(torch.log(count(x)).diff()).square().sum()


def exponential_sum(matrix: Tensor, shifts: Tensor) -> Function:
    """Log of a sum of exponentials: overflows nowhere, but is nearly linear far out."""
    return lambda x: torch.logsumexp(matrix.to(x) @ x + shifts.to(x), 0)


def naive_exponential_sum(matrix: Tensor, shifts: Tensor) -> Function:
    """The sum of exponentials itself: a long step overflows to Inf."""
    return lambda x: torch.exp(matrix.to(x) @ x + shifts.to(x)).sum()


def clusters(x: Tensor) -> Tensor:
    """Lennard-Jones energy of atoms in space, -1 per pair at distance 1, in a weak bowl; Inf if two meet."""
    atoms = x.reshape(-1, 3)
    first, second = torch.triu_indices(len(atoms), len(atoms), 1, device=x.device)
    inverse6 = (atoms[first] - atoms[second]).square().sum(1) ** -3
    return (inverse6**2 - 2 * inverse6).sum() + 0.01 * (x @ x)


def normal_fit(sample: Tensor) -> Function:
    """Mean and standard deviation."""

    def fun(x: Tensor) -> Tensor:
        return torch.log(x[1]) + ((sample.to(x) - x[0]) / x[1]).square().mean() / 2

    return fun


def gamma_fit(sample: Tensor) -> Function:
    """Shape and rate."""
    mean, log_mean = sample.mean(), sample.log().mean()

    def fun(x: Tensor) -> Tensor:
        shape, rate = x
        value: Tensor = torch.lgamma(shape) - shape * torch.log(rate) - (shape - 1) * log_mean.to(x) + rate * mean.to(x)
        return value

    return fun


def beta_fit(sample: Tensor) -> Function:
    """Both shapes."""
    log_mean, log_rest = sample.log().mean(), (1 - sample).log().mean()

    def fun(x: Tensor) -> Tensor:
        a, b = x
        normalizer = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        value: Tensor = normalizer - (a - 1) * log_mean.to(x) - (b - 1) * log_rest.to(x)
        return value

    return fun


def weibull_fit(sample: Tensor) -> Function:
    """Shape and scale."""

    def fun(x: Tensor) -> Tensor:
        shape, scale = x
        logs = torch.log(sample.to(x) / scale)
        value: Tensor = -torch.log(shape / scale) - (shape - 1) * logs.mean() + torch.exp(shape * logs).mean()
        return value

    return fun


def mixture_fit(sample: Tensor) -> Function:
    """Two normal distributions: logit of the first's share, means, standard deviations."""

    def fun(x: Tensor) -> Tensor:
        means, deviations = x[1:3], x[3:5]
        shares = torch.nn.functional.logsigmoid(torch.stack((x[0], -x[0])))
        logs = shares - torch.log(deviations) - ((sample.to(x)[:, None] - means) / deviations) ** 2 / 2
        return -torch.logsumexp(logs, 1).mean()

    return fun


def precision_fit(sample: Tensor) -> Function:
    """A symmetric precision matrix, by its lower triangle; NaN where it is not positive definite."""
    size = sample.shape[1]
    covariance = sample.T @ sample / len(sample)
    row, column = torch.tril_indices(size, size)

    def fun(x: Tensor) -> Tensor:
        lower = torch.zeros(size, size, dtype=x.dtype, device=x.device).index_put((row, column), x)
        precision = lower + lower.T
        factor, failed = torch.linalg.cholesky_ex(precision)
        value = (covariance.to(x) * precision).sum() / 2 - factor.diagonal().log().sum()
        return torch.where(failed == 0, value, torch.nan)

    return fun


def half_identity(size: int) -> Tensor:
    """The triangle of an identity, halved: ``precision_fit`` adds its transpose."""
    return (torch.eye(size, dtype=torch.float64) / 2)[tuple(torch.tril_indices(size, size))]


def lattice(atoms: int, seed: int) -> Tensor:
    """Atoms on a cubic lattice, shaken."""
    axis = torch.arange(3, dtype=torch.float64)
    return (1.2 * torch.cartesian_prod(axis, axis, axis)[:atoms] + 0.1 * randn(seed, atoms, 3)).reshape(-1)


def fits() -> list[Problem]:
    lifetimes = 3 * (-torch.log(rand(0, 200))) ** (1 / 1.7)
    between = torch.distributions.Beta(2.0, 5.0)
    torch_state = torch.get_rng_state()  # distributions draw from the global generator
    torch.manual_seed(1)
    shares = between.sample((150,)).double()
    torch.set_rng_state(torch_state)
    two = torch.cat((randn(2, 120) - 2, 0.5 * randn(3, 80) + 1.5))
    return [
        Problem("normal_fit-2", normal_fit(100 + 20 * randn(4, 100)), data(60, 5)),
        Problem("gamma_fit-2", gamma_fit(lifetimes), data(1, 1)),
        Problem("beta_fit-2", beta_fit(shares), data(1, 1)),
        Problem("weibull_fit-2", weibull_fit(lifetimes), data(1, 1)),
        Problem("weibull_fit_far-2", weibull_fit(1000 * lifetimes), data(0.5, 10)),
        Problem("mixture_fit-5", mixture_fit(two), data(0, -1, 1, 1, 1)),
        Problem("precision_fit-10", precision_fit(randn(5, 60, 4)), half_identity(4)),
        Problem("precision_fit-120", precision_fit(randn(6, 200, 15) * torch.linspace(0.3, 3, 15)), half_identity(15)),
    ]


def problems() -> list[Problem]:
    signs = torch.cat((torch.eye(8), -torch.eye(8), torch.randn(20, 8, generator=seeded(7)))).double()
    return [
        Problem("analytic_center-10", analytic_center(randn(0, 30, 10), 1 + rand(1, 30)), zeros(10)),
        Problem("analytic_center-50", analytic_center(randn(2, 200, 50), 1 + rand(3, 200)), zeros(50)),
        Problem("barrier-8", barrier(randn(4, 8), signs, torch.ones(36).double(), 0.1), zeros(8)),
        Problem("barrier_sharp-8", barrier(randn(5, 8), signs, torch.ones(36).double(), 0.001), zeros(8)),
        Problem("entropy-10", entropy, repeat(0.1)(10)),
        Problem("entropy-100", entropy, repeat(0.5)(100)),
        Problem("dome-3", dome, zeros(3)),
        Problem("dome-30", dome, zeros(30)),
        Problem("root_ridge-20", root_ridge, zeros(20)),
        Problem("root_ridge-200", root_ridge, zeros(200)),
        Problem("reciprocal-5", reciprocal, repeat(0.01)(5)),
        Problem("reciprocal-50", reciprocal, repeat(5)(50)),
        Problem("log_squares-10", log_squares, repeat(1)(10), (0.0,)),
        Problem("log_squares-100", log_squares, repeat(1)(100), (0.0,)),
        Problem("exponential_sum-10", exponential_sum(randn(8, 60, 10), randn(9, 60)), zeros(10)),
        Problem("naive_exponential_sum-10", naive_exponential_sum(randn(8, 60, 10), randn(9, 60)), zeros(10)),
        Problem("naive_exponential_sum-100", naive_exponential_sum(randn(11, 400, 100), randn(12, 400)), zeros(100)),
        Problem("clusters-12", clusters, lattice(4, seed=13)),
        Problem("clusters-39", clusters, lattice(13, seed=14)),
        *fits(),
    ]
