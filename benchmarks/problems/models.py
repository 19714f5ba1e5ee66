"""Models fitted to data: regressions, Gaussian processes, a factorization, two networks for physics.

Real data are scikit-learn's; made-up data come from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import pi

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor

from problems.problem import Function, Problem


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=seeded(seed), dtype=torch.float64)


def rand(seed: int, *size: int) -> Tensor:
    return torch.rand(size, generator=seeded(seed), dtype=torch.float64)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


@cache
def table(load: Callable[..., tuple[object, object]], standardize: bool = True) -> tuple[Tensor, Tensor]:
    """Features with a column of ones, and targets, of one of scikit-learn's data sets."""
    features, targets = (torch.as_tensor(array).double() for array in load(return_X_y=True))
    if standardize:
        deviation = features.std(0)
        features = (features - features.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
    return torch.cat((features, torch.ones(len(features), 1, dtype=torch.float64)), 1), targets


def logistic(features: Tensor, targets: Tensor, l2: float) -> Function:
    """Mean log-loss of logistic regression for targets 0 and 1."""
    signed = features * (1 - 2 * targets)[:, None]

    def fun(x: Tensor) -> Tensor:
        return torch.logaddexp(signed.to(x) @ x, x.new_zeros(())).mean() + l2 / 2 * (x @ x)

    return fun


def softmax(features: Tensor, targets: Tensor, l2: float) -> Function:
    """Mean log-loss of logistic regression with several classes."""
    chosen = torch.nn.functional.one_hot(targets.long()).double()

    def fun(x: Tensor) -> Tensor:
        scores = features.to(x) @ x.reshape(-1, chosen.shape[1])
        losses = torch.logsumexp(scores, 1) - (chosen.to(x) * scores).sum(1)
        return losses.mean() + l2 / 2 * (x @ x)

    return fun


def poisson(features: Tensor, targets: Tensor) -> Function:
    """Mean negative log-likelihood of counts whose log-rate is linear, without its constant."""

    def fun(x: Tensor) -> Tensor:
        log_rate = features.to(x) @ x
        return (torch.exp(log_rate) - targets.to(x) * log_rate).mean()

    return fun


def student(features: Tensor, targets: Tensor, freedom: float) -> Function:
    """Mean negative log-likelihood of a regression with Student's t; the last x is log sigma."""

    def fun(x: Tensor) -> Tensor:
        errors = (features.to(x) @ x[:-1] - targets.to(x)) * torch.exp(-x[-1])
        return (freedom + 1) / 2 * torch.log1p(errors**2 / freedom).mean() + x[-1]

    return fun


def gaussian_process(inputs: Tensor, targets: Tensor) -> Function:
    """Negative log marginal likelihood per point of a Gaussian process with a squared-exponential kernel.

    x is log length scale per column of the inputs, log amplitude, log noise. NaN where the covariance
    has no Cholesky factor.
    """
    gaps = (inputs[:, None] - inputs) ** 2

    def fun(x: Tensor) -> Tensor:
        distances = gaps.to(x) @ torch.exp(-2 * x[:-2])
        noise = torch.exp(2 * x[-1]) * torch.eye(len(targets), dtype=x.dtype, device=x.device)
        factor, failed = torch.linalg.cholesky_ex(torch.exp(2 * x[-2] - distances / 2) + noise)
        white = torch.linalg.solve_triangular(factor, targets.to(x)[:, None], upper=False)
        value = (white.square().sum() / 2 + factor.diagonal().log().sum()) / len(targets)
        return torch.where(failed == 0, value, torch.nan)

    return fun


def factorization(rows: int, columns: int, rank: int, l2: float, seed: int) -> Function:
    """Mean squared error of U V on two thirds of a noisy low-rank matrix, with weight decay."""
    matrix = randn(seed, rows, rank) @ randn(seed + 1, rank, columns) + 0.1 * randn(seed + 2, rows, columns)
    seen = (rand(seed + 3, rows, columns) < 2 / 3).double()

    def fun(x: Tensor) -> Tensor:
        left, right = x[: rows * rank].reshape(rows, rank), x[rows * rank :].reshape(rank, columns)
        errors = (left @ right - matrix.to(x)) * seen.to(x)
        return errors.square().sum() / seen.sum().to(x) + l2 * (x @ x)

    return fun


def network(weights: Tensor, width: int, points: Tensor) -> Tensor:
    """A network of one input, two hidden layers of tanh and one output, at many points."""
    first, bias1, bias2, last = weights[: 4 * width].reshape(4, width)
    second = weights[4 * width : -1].reshape(width, width)
    values: Tensor = torch.tanh(torch.tanh(points[:, None] * first + bias1) @ second + bias2) @ last
    return values + weights[-1]


def network_start(width: int, seed: int) -> Tensor:
    """Normal weights over the square root of the layer's inputs."""
    scale = torch.full((4 * width + width * width + 1,), width**-0.5, dtype=torch.float64)
    scale[: 2 * width] = 1
    return randn(seed, len(scale)) * scale


def slope(values: Tensor, points: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def poisson_network(width: int) -> Function:
    """u'' = -pi^2 sin(pi t) on (-1, 1) with u = 0 at both ends, by a network; u by double backward."""

    def fun(x: Tensor) -> Tensor:
        with torch.enable_grad():
            points = torch.linspace(-1, 1, 33, dtype=x.dtype, device=x.device).requires_grad_()
            u = network(x, width, points)
            residual = slope(slope(u, points), points) / pi**2 + torch.sin(pi * points)
            ends: Tensor = u[0] ** 2 + u[-1] ** 2
            return residual.square().mean() + 10 * ends

    return fun


def burgers_network(width: int, viscosity: float = 0.1) -> Function:
    """u u' = viscosity u'' on (-1, 1) with u(-1) = 1 and u(1) = -1, by a network; u' and u'' forward."""

    def fun(x: Tensor) -> Tensor:
        points = torch.linspace(-1, 1, 41, dtype=x.dtype, device=x.device)
        along = torch.ones_like(points)

        def value(t: Tensor) -> Tensor:
            return network(x, width, t)

        def first(t: Tensor) -> Tensor:
            derivative: Tensor = torch.func.jvp(value, (t,), (along,))[1]
            return derivative

        u = value(points)
        u1, u2 = torch.func.jvp(first, (points,), (along,))[:2]
        residual: Tensor = u * u1 - viscosity * u2
        return residual.square().mean() + 10 * ((u[0] - 1) ** 2 + (u[-1] + 1) ** 2)

    return fun


def poisson_data(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    features = randn(seed, rows, columns)
    rates = torch.exp(features @ (0.7 * randn(seed + 1, columns) / columns**0.5) + 1)
    return features, torch.poisson(rates, generator=seeded(seed + 2))


def wave_data(points: int) -> tuple[Tensor, Tensor]:
    inputs = 10 * rand(0, points, 1)
    return inputs, (torch.sin(inputs) + 0.3 * torch.cos(4 * inputs)).reshape(-1) + 0.1 * randn(1, points)


def regressions() -> list[Problem]:
    cancer, digits, diabetes = table(load_breast_cancer), table(load_digits), table(load_diabetes)
    raw = table(load_breast_cancer, standardize=False)
    counts = poisson_data(10, 200, 8), poisson_data(20, 400, 40)
    scores = diabetes[1] / 100
    return [
        Problem("logistic_cancer_weak-31", logistic(*cancer, 1e-4), zeros(31)),
        Problem("logistic_cancer-31", logistic(*cancer, 1e-2), zeros(31)),
        Problem("logistic_cancer_raw-31", logistic(*raw, 1e-4), zeros(31)),
        Problem("logistic_even_digits-65", logistic(digits[0], digits[1] % 2, 1e-3), zeros(65)),
        Problem("softmax_digits-650", softmax(*digits, 1e-3), zeros(650)),
        Problem("softmax_digits_few-650", softmax(digits[0][::10], digits[1][::10], 1e-4), zeros(650)),
        Problem("poisson_regression-8", poisson(*counts[0]), zeros(8)),
        Problem("poisson_regression-40", poisson(*counts[1]), zeros(40)),
        Problem("student_diabetes-12", student(diabetes[0], scores, 3.0), zeros(12)),
        Problem("student_diabetes_cauchy-12", student(diabetes[0], scores, 1.0), zeros(12)),
    ]


def processes() -> list[Problem]:
    features, targets = table(load_diabetes)
    few = (features[:80, :-1], (targets[:80] - targets[:80].mean()) / 100)
    return [
        Problem("process_wave-3", gaussian_process(*wave_data(50)), zeros(3)),
        Problem("process_wave_far-3", gaussian_process(*wave_data(50)), torch.tensor([1.5, 1, -2]).double()),
        Problem("process_diabetes-12", gaussian_process(*few), zeros(12)),
    ]


def problems() -> list[Problem]:
    return [
        *regressions(),
        *processes(),
        Problem("factorization-150", factorization(30, 20, 3, 1e-4, seed=30), randn(40, 150) / 2),
        Problem("factorization_small-24", factorization(7, 5, 2, 1e-3, seed=50), randn(60, 24) / 2),
        Problem("factorization-1000", factorization(120, 80, 5, 1e-5, seed=70), randn(80, 1000) / 2),
        Problem("poisson_network-97", poisson_network(8), network_start(8, seed=0)),
        Problem("poisson_network-193", poisson_network(12), network_start(12, seed=1)),
        Problem("burgers_network-97", burgers_network(8), network_start(8, seed=2)),
        Problem("burgers_network-193", burgers_network(12, 0.3), network_start(12, seed=3)),
    ]
