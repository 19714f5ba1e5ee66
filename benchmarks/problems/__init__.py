"""Smooth problems for `minimize`: where it is developed and measured, not where it is judged."""

from __future__ import annotations

from functools import cache

import torch

from problems import bounds, collection, domains, grids, models, more, validation
from problems.problem import Problem, boxed, rounded, scaled

__all__ = ["Problem", "bounded", "bounded_seen", "bounded_unseen", "boxed", "rounded", "scaled", "unconstrained"]

# Copies in other units: name of the problem, factor of the variables, factor of the values. A pair of
# factors of the variables is spread between the first and the last one, evenly in the logarithm.
COPIES = (
    ("rosenbrock-10", 1e-8, 1.0),
    ("beale-2", 1e8, 1e8),
    ("wood-4", 1.0, 1e8),
    ("freudenstein_roth-2", 1e-8, 1e-8),
    ("brown_dennis-4", 1.0, 1e-8),
    ("trigonometric-100", 1.0, 1e8),
    ("broyden_banded-30", 1e8, 1e8),
    ("variably_dimensioned-10", 1e8, 1.0),
    ("integral_equation-10", 1e-8, 1e-8),
    ("himmelblau-2", 1e8, 1e12),
    ("engval1-50", 1e-8, 1.0),
    ("logistic_cancer-31", 1e8, 1e8),
    ("hager-100", 1e-8, 1e8),
    ("dixmaan_c-300", 1.0, 1e12),
    ("analytic_center-10", 1e-8, 1e-8),
    ("process_wave-3", 1e8, 1e8),
    ("rosenbrock-2", (1e-8, 1e8), 1.0),
    ("himmelblau-2", (1e-4, 1e4), 1.0),
    ("helical_valley-3", (1e-3, 1e3), 1.0),
    ("kowalik_osborne-4", (1e2, 1e-2), 1.0),
    ("broyden_tridiagonal-10", (1e-2, 1e2), 1.0),
    ("raydan1-30", (1e2, 1e-2), 1.0),
    ("edensch-36", (1e-2, 1e2), 1.0),
    ("logistic_cancer-31", (1e-2, 1e2), 1.0),
)


def copied(problem: Problem, factor_x: float | tuple[float, float], factor_f: float) -> Problem:
    if not isinstance(factor_x, tuple):
        return scaled(problem, f"x{factor_x:g}_f{factor_f:g}", factor_x, factor_f)
    first, last = torch.tensor(factor_x, dtype=torch.float64).log10().tolist()
    factors = torch.logspace(first, last, len(problem.x0), dtype=torch.float64)
    return scaled(problem, f"x{factor_x[0]:g}_to_{factor_x[1]:g}", factors, factor_f)


@cache
def in_own_units() -> tuple[Problem, ...]:
    return (
        *more.problems(),
        *collection.problems(),
        *models.problems(),
        *domains.problems(),
        *grids.problems(),
    )


def unconstrained() -> list[Problem]:
    """Every problem without bounds, badly scaled copies included."""
    named = {problem.name: problem for problem in in_own_units()}
    return [*named.values(), *(copied(named[name], factor_x, factor_f) for name, factor_x, factor_f in COPIES)]


def bounded() -> list[Problem]:
    """Every problem with bounds."""
    return bounds.problems(list(in_own_units()))


def bounded_seen() -> list[Problem]:
    """Problems of ``validation`` on which the solver was tuned."""
    return validation.halves()[0]


def bounded_unseen() -> list[Problem]:
    """Problems of ``validation`` on which it was not: they are run to report a figure, never to choose."""
    return validation.halves()[1]
