"""Problems with bounds: boxes that cut minimizers off, and models whose variables have a sign.

Sources:
    Gay 1984, A trust-region approach to linearly constrained optimization, LNM 1066, 72-105.
    Hock & Schittkowski 1981, Test examples for nonlinear programming codes, LNEMS 187.
    Moré & Toraldo 1989, Algorithms for bound constrained quadratic programming, Numer. Math. 55.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, pi

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor

from problems import grids, more
from problems.models import factorization, gaussian_process, logistic, rand, randn, table, wave_data, zeros
from problems.problem import Function, Problem, boxed, count, data, repeat, squares

# Gay's boxes: each cuts off the minimizer in some of the variables.
BOXES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "rosenbrock-2": ((-50, 0), (0.5, 100)),
    "freudenstein_roth-2": ((0, -30), (20, -0.9)),
    "powell_badly_scaled-2": ((0, 1), (1, 9)),
    "brown_badly_scaled-2": ((0, 3e-5), (1e6, 100)),
    "beale-2": ((0.6, 0.5), (10, 100)),
    "jennrich_sampson-2": ((0.26, 0), (10, 20)),
    "helical_valley-3": ((-100, -1, -1), (0.8, 1, 1)),
    "bard-3": ((0.1, 0, 0), (50, 100, 50)),
    "gaussian-3": ((0.398, 1, -0.5), (4.2, 2, 0.1)),
    "meyer-3": ((0.006, 0, 0), (2, 3e5, 3e4)),
    "gulf-3": ((1e-3, 0, 0), (10, 10, 10)),
    "box-3": ((0, 5, 0), (2, 9.5, 20)),
    "powell_singular-4": ((0.1, -20, -1, -1), (100, 20, 1, 50)),
    "wood-4": ((-100, -100, -100, -100), (0, 10, 100, 100)),
    "kowalik_osborne-4": ((0.13, -1, 0.12, 0.12), (inf, 12, 13, 12)),
    "brown_dennis-4": ((-10, 0, -100, -20), (100, 15, 0, 0.2)),
    "osborne1-5": ((0.3, 0, -1.4, 0.01, 0.01), (50, 1.9, -0.1, 0.1, 10)),
    "biggs-6": ((0, 0, 0, 1, 0, 0), (2, 8, 1, 7, 5, 5)),
    "osborne2-11": ((1, 0.5, 0, 0.6, 0, 0, 0, 0, 0, 0, 0), (150, 100, 100, 100, 100, 100, 100, 10, 100, 10, 100)),
    "watson-6": ((-1, 0, -1, -1, -1, -1), (0.01, 0.9, 1, 1, 1, 1)),
    "penalty1-10": ((0,) * 10, (0.2,) * 5 + (inf,) * 5),
    "penalty2-10": ((0, 1, 0, 0, 0, 1, 0, 0, 0, 1), (2,) * 10),
    "variably_dimensioned-10": ((0,) * 10, (10, 20, 30, 40, 50, 60, 70, 80, 90, 0.5)),
    "trigonometric-10": (tuple(range(0, 100, 10)), tuple(range(10, 110, 10))),
    "brown_almost_linear-10": ((0,) * 10, (2, 2, 2, 2, 2, 2, 2, 2, 2, 0.9)),
    "chebyquad-8": ((0, 0, 0.1, 0, 0, 0.5, 0, 0), (0.04, 0.2, 0.3, 0.4, 0.4, 1, 1, 1)),
}

Bounds = tuple[Tensor, Tensor]


def box(start: Tensor, seed: int) -> Bounds:
    """Both bounds near the start, at distances of a tenth to all of its size, or of 1."""
    width = start.abs().clamp(min=1)
    below, above = 0.1 + 0.9 * rand(seed, 2, len(start))
    return start - width * below, start + width * above


def half(start: Tensor, seed: int) -> Bounds:
    """In turn no bound, a lower one and an upper one."""
    lower, upper = box(start, seed)
    turn = torch.arange(len(start)) % 3
    return torch.where(turn == 1, lower, -inf), torch.where(turn == 2, upper, inf)


def corner(start: Tensor, seed: int) -> Bounds:
    """The start is on a bound in every variable."""
    lower, upper = box(start, seed)
    at_lower = rand(seed + 1, len(start)) < 0.5
    return torch.where(at_lower, start, lower), torch.where(at_lower, upper, start)


def fixed(start: Tensor, seed: int) -> Bounds:
    """Every third variable is fixed, every third boxed, the others are free."""
    lower, upper = box(start, seed)
    turn = torch.arange(len(start)) % 3
    fixed = turn == 0
    return (
        torch.where(fixed, start, torch.where(turn == 1, lower, -inf)),
        torch.where(fixed, start, torch.where(turn == 1, upper, inf)),
    )


KINDS: tuple[Callable[[Tensor, int], Bounds], ...] = (box, half, corner, fixed)


BASES = (
    "rosenbrock-10", "rosenbrock-1000", "powell_singular-40", "wood-4", "watson-9", "penalty1-10", "penalty2-10",
    "variably_dimensioned-30", "trigonometric-100", "boundary_value-30", "integral_equation-100",
    "broyden_tridiagonal-100", "broyden_banded-1000", "chebyquad-20", "osborne1-5", "biggs-6", "raydan1-100",
    "diagonal3-100", "hager-1000", "power-100", "himmelblau-100", "freudenstein_roth_pairs-10", "beale_pairs-1000",
    "white_holst-10", "maratos-100", "generalized_rosenbrock-100", "chained_freudenstein_roth-1000", "quadratic2-100",
    "edensch-1000", "engval1-50", "cosine-100", "generalized_humps-100", "dixon-100", "tridia-100", "schmvett-1000",
    "chained_wood-100", "chained_powell-100", "cragg_levy-100", "nondia-10", "liarwhd-1000", "sinquad-100",
    "bdqrtic-100", "perturbed_quadratic-1000", "noncvxu2-100", "sparsine-100", "dixmaan_d-15", "dixmaan_h-90",
    "dixmaan_l-300", "factorization-150", "clusters-39",
)  # fmt: skip


def cut(problems: dict[str, Problem]) -> list[Problem]:
    """Each base with two kinds of bounds, in turn."""
    cut = []
    for number, name in enumerate(BASES):
        for kind in (KINDS[number % 4], KINDS[(number + 1) % 4]):
            lower, upper = kind(problems[name].x0, number)
            cut.append(boxed(problems[name], kind.__name__, lower, upper))
    return cut


def bounded(name: str, fun: Function, start: Tensor, lower: object, upper: object, *minima: float) -> Problem:
    """A problem whose bounds may be numbers; the start is moved into them."""
    low, high = (torch.as_tensor(bound, dtype=torch.float64).expand(len(start)).clone() for bound in (lower, upper))
    return Problem(f"{name}-{len(start)}", fun, start.clamp(low, high), minima or None, low, high)


def least_squares(matrix: Tensor, targets: Tensor) -> Function:
    return squares(lambda x: matrix.to(x) @ x - targets.to(x))


def quadratic(n: int, condition: float, seed: int) -> Function:
    """A convex quadratic with eigenvalues spread over a condition number (Moré & Toraldo 1989)."""
    basis = torch.linalg.qr(randn(seed, n, n))[0]
    matrix = basis * torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64) @ basis.T
    slope = matrix @ randn(seed + 1, n)
    return lambda x: x @ (matrix.to(x) @ x) / 2 - slope.to(x) @ x


def support_vectors(features: Tensor, signs: Tensor) -> Function:
    """The dual of a support vector machine without intercept; linear kernel."""
    rows = features * signs[:, None]
    return lambda x: (x @ rows.to(x)).square().sum() / 2 - x.sum()


def hs3(x: Tensor) -> Tensor:
    return x[1] + 1e-5 * (x[1] - x[0]) ** 2


def hs4(x: Tensor) -> Tensor:
    return (x[0] + 1) ** 3 / 3 + x[1]


def hs5(x: Tensor) -> Tensor:
    return torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def hs45(x: Tensor) -> Tensor:
    return 2 - x.prod() / 120


def hs110(x: Tensor) -> Tensor:
    """NaN outside 2 < x < 10; its bounds are close to that."""
    return (torch.log(x - 2) ** 2 + torch.log(10 - x) ** 2).sum() - x.prod() ** 0.2


def camel(x: Tensor) -> Tensor:
    a, b = x
    value: Tensor = 4 * a**2 - 2.1 * a**4 + a**6 / 3 + a * b - 4 * b**2 + 4 * b**4
    return value


def mccormick(x: Tensor) -> Tensor:
    a, b = x[:-1], x[1:]
    return (torch.sin(a + b) + (a - b) ** 2 - 1.5 * a + 2.5 * b + 1).sum()


def nonscomp(x: Tensor) -> Tensor:
    return (x[0] - 1) ** 2 + 4 * (x[1:] - x[:-1] ** 2).square().sum()


def explin(x: Tensor) -> Tensor:
    few = x[: len(x) // 10]
    return torch.exp(0.1 * few[1:] * few[:-1]).sum() - 10 * (count(x) * x).sum()


def chen_harker(x: Tensor) -> Tensor:
    """A degenerate quadratic: many variables end on a bound with no gradient."""
    around = torch.nn.functional.pad(x, (2, 2))
    second = around[4:] + around[:-4] - 2 * around[2:-2]
    return second.square().sum() / 2 - torch.where(count(x) % 2 == 0, 1.0, 0.0).to(x) @ x / len(x)


def classics() -> list[Problem]:
    rosenbrock = squares(more.rosenbrock)
    start = repeat(-2, 1)(2)
    return [
        bounded("hs1", rosenbrock, start, (-inf, -1.5), inf, 0.0),
        bounded("hs2", rosenbrock, start, (-inf, 1.5), inf, 0.05042619, 4.941229),
        bounded("hs3", hs3, data(10, 1), (-inf, 0), inf, 0.0),
        bounded("hs4", hs4, data(1.125, 0.125), (1, 0), inf, 8 / 3),
        bounded("hs5", hs5, data(0, 0), (-1.5, -3), (4, 3), -(3**0.5) / 2 - pi / 3),
        bounded("hs38", squares(more.wood), repeat(-3, -1)(4), -10, 10, 0.0),
        bounded("hs45", hs45, repeat(0.5)(5), 0, (1, 2, 3, 4, 5), 1.0),
        bounded("hs110", hs110, repeat(9)(10), 2.001, 9.999, -45.77847),
        bounded("camel", camel, data(-2, 1), (-3, -1.5), (3, 1.5), -1.031628, -0.2154638, 2.104250),
        bounded("mccormick", mccormick, repeat(0)(100), -1.5, 3),
        bounded("nonscomp", nonscomp, repeat(3)(100), torch.arange(100) % 2 - 100, 100),
        bounded("explin", explin, repeat(0)(120), 0, 10),
        bounded("chen_harker", chen_harker, repeat(0.5)(100), 0, 1),
    ]


def with_signs() -> list[Problem]:
    """Models whose variables may not be negative, or not large."""
    cancer, digits = table(load_breast_cancer), table(load_digits)
    features, scores = table(load_diabetes)
    few = rand(1, 60, 20), rand(2, 60)
    hilbert = 1 / (more.ramp(12)[:, None] + more.ramp(12) - 1)
    pixels = digits[0][:120]
    signs = 1 - 2 * (digits[1][:120] % 2)
    positive = randn(40, 150).abs()
    return [
        bounded("nonnegative_squares", least_squares(*few), zeros(20), 0, inf),
        bounded("nonnegative_hilbert", least_squares(hilbert, hilbert @ randn(3, 12)), zeros(12), 0, inf),
        bounded("nonnegative_diabetes", least_squares(features, scores / 100), zeros(11), 0, inf),
        bounded("nonnegative_pixels", least_squares(pixels.T, pixels.mean(0) + randn(4, 65)), zeros(120), 0, inf),
        bounded("logistic_nonnegative", logistic(*cancer, 1e-4), zeros(31), 0, inf),
        bounded("logistic_nonpositive", logistic(*cancer, 1e-4), zeros(31), -inf, 0),
        bounded("logistic_box", logistic(*cancer, 0.0), zeros(31), -1, 1),
        bounded("logistic_digits_box", logistic(digits[0], digits[1] % 2, 1e-4), zeros(65), -0.3, 0.3),
        bounded("support_vectors", support_vectors(pixels, signs), zeros(120), 0, 0.01),
        bounded("support_vectors_hard", support_vectors(pixels, signs), zeros(120), 0, 1),
        bounded("process_boxed", gaussian_process(*wave_data(50)), data(0, 0, 0), (-1, -1, -2), (0.5, 2, 0)),
        bounded("process_noisy", gaussian_process(*wave_data(50)), data(0, 0, 0), (-2, -inf, -1), (2, inf, 0)),
        bounded("factorization_nonnegative", factorization(30, 20, 3, 1e-4, seed=30), positive, 0, inf),
        *(
            bounded(f"quadratic_{condition:g}", quadratic(n, condition, seed), zeros(n), -rand(5, n), rand(6, n))
            for n, condition, seed in ((20, 1e2, 10), (100, 1e4, 20), (100, 1e6, 30), (300, 1e3, 40))
        ),
    ]


def problems(unconstrained: list[Problem]) -> list[Problem]:
    """Every problem with bounds; those without are what the boxes are put around."""
    named = {problem.name: problem for problem in unconstrained}
    return [
        *(boxed(named[name], "gay", data(*lower), data(*upper)) for name, (lower, upper) in BOXES.items()),
        *cut(named),
        *classics(),
        *with_signs(),
        *grids.bounded(),
    ]
