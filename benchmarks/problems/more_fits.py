"""Moré, Garbow & Hillstrom's 35 problems as least squares, from 1, 10 and 100 times the standard starts, and boxes."""

from __future__ import annotations

from problems import more
from problems.bounds import BOXES
from problems.fit import Fit, bounded_fit, moved

# Of each formula these numbers of variables; the paper's where it fixes them.
SIZES: dict[str, tuple[int, ...]] = {
    "rosenbrock": (2, 10),
    "watson": (6, 9, 12),
    "penalty1": (4, 10),
    "penalty2": (4, 10),
    "variably_dimensioned": (10,),
    "trigonometric": (10,),
    "powell_singular": (4, 40),
    "brown_almost_linear": (10, 30),
    "boundary_value": (10,),
    "integral_equation": (10,),
    "broyden_tridiagonal": (10,),
    "broyden_banded": (10,),
    "linear_full_rank": (10,),
    "linear_rank1": (10,),
    "linear_rank1_zeros": (10,),
    "chebyquad": (8, 9, 10),
}
FACTORS = (1, 10, 100)


def standard() -> list[Fit]:
    """Each formula at its sizes, from the standard start."""
    return [
        Fit(f"{family.name}-{n}", family.fun, family.start(n), minima=family.minima[n])
        for family in more.RESIDUALS
        for n in SIZES.get(family.name, tuple(family.minima))
    ]


def fits() -> list[Fit]:
    """Each formula from every start; a start of zero is one only."""
    return [
        fit._replace(name=f"{fit.name}-times{factor}", x0=factor * fit.x0)
        for fit in standard()
        for factor in FACTORS
        if factor == 1 or fit.x0.any()
    ]


def boxed_fits() -> list[Fit]:
    """Gay's boxes, each of which cuts off the minimizer in some of the variables."""
    named = {fit.name: fit for fit in standard()}
    return [
        bounded_fit(f"{name}-gay", named[name].residuals, named[name].x0, lower, upper)
        for name, (lower, upper) in BOXES.items()
    ]


def moved_fits() -> list[Fit]:
    """Each formula from one more start: to validate what was tuned on the others."""
    return [moved(fit, seed, 0.5) for seed, fit in enumerate(standard(), 100) if fit.x0.any()]
